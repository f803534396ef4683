"""WikiText-2 and -103, raw text (Merity et al. 2016, arXiv 1609.07843).

`text/wikitext2` and `text/wikitext103` read each article in strided windows: a window scores
`STRIDE` characters, up to the next space, after at most `CONTEXT` characters of the same article
before them; the first one of an article is scored from its first character on. Windows are
counted in characters, so that all tokenizers have the same ones; `experiments.score` has windows of
tokens. "word_perplexity" is per word of the raw text.

`paper/wikitext103` is the perplexity that the RoE paper converts to model sizes (arXiv 2509.17238,
fig. 5). Articles are split at paragraphs into pieces of at most `LENGTH` characters. The first
words of a piece, about `OPENING` characters, are the prompt, so that every scored token has
context; the rest is the reference.

There is no answer: examples are of kind "read".
"""

from collections.abc import Iterator, Sequence
import functools
import re

from experiments.tasks import base
from experiments.tasks.task_data import Source

LENGTH, OPENING = 4000, 200  # characters
CONTEXT, STRIDE = 2000, 2000
_HEADING = re.compile(r" = [^=].* = ?\n?")


def pieces(lines: Sequence[str]) -> Iterator[str]:
  """Yields pieces of at most `LENGTH` characters (a longer paragraph is its own piece).

  Args:
    lines: lines of the raw text: headings such as " = Title = ", paragraphs, empty lines.
  """
  piece = ""
  for line in lines:
    line = line.rstrip("\n") + "\n"
    if piece and (_HEADING.fullmatch(line) or len(piece) + len(line) > LENGTH):
      yield piece
      piece = ""
    piece += line
  yield piece


def cut(piece: str) -> tuple[str, str]:
  """Splits a piece into its opening and the rest, which is empty if the piece is too short."""
  end = piece.find(" ", OPENING)
  return (piece[:end], piece[end:].rstrip()) if end > 0 else (piece, "")


def articles(lines: Sequence[str]) -> Iterator[str]:
  """Yields the text of each article, whose first line is its heading."""
  article = ""
  for line in lines:
    if _HEADING.fullmatch(line) and article.strip():
      yield article
      article = ""
    article += line
  if article.strip():
    yield article


def windows(article: str) -> Iterator[tuple[str, str]]:
  """Yields the context and the scored text of each window; both are joined as they were."""
  begin = 0
  while begin < len(article):
    space = article.find(" ", begin + STRIDE)
    end = space if space > 0 else len(article)
    if article[begin:end].strip():
      yield article[max(0, begin - CONTEXT) : begin], article[begin:end]
    begin = end


def _pieces(lines):
  texts = (cut(piece.lstrip()) for piece in pieces(lines))
  return (text for text in texts if text[1])


def _windows(lines):
  return (window for article in articles(lines) for window in windows(article.strip()))


def _read(task, number, divide, split, data_dir, chat):
  if chat:
    raise ValueError(f"task {task} has no chat form: remove --chat")
  split = "test" if split == "all" else split
  lines = [row["text"] for row in _source(number, split).rows(data_dir)]
  name = task.removeprefix(base.PAPER)
  for i, (prompt, reference) in enumerate(divide(lines)):
    yield base.Example(
      id=f"{name}/{split}/{i}", prompt=prompt, reference=reference, max_new_tokens=0
    )


@functools.cache
def _source(number, split):
  file = f"wiki.{split.removesuffix('ation')}.raw"
  return Source(
    f"wikitext{number}/{split}",
    (f"wikitext-{number}-raw/{file}", f"wikitext{number}/{file}"),
    ({"path": "Salesforce/wikitext", "name": f"wikitext-{number}-raw-v1", "split": split},),
  )


def _task(name, number, divide):
  return base.Task(
    name=name,
    category="language",
    metric=base.PERPLEXITY,
    read=functools.partial(_read, name, number, divide),
    judge=base.each(lambda example, _: {"words": float(len((example.reference or "").split()))}),
    validation="its own validation articles",
    higher_is_better=False,
  )


WIKITEXT103 = _task(base.PAPER + "wikitext103", 103, _pieces)
WIKITEXT = tuple(_task(f"{base.TEXT}wikitext{number}", number, _windows) for number in (2, 103))
