"""WikiText-103, whose perplexity the RoE paper converts to model sizes (arXiv 2509.17238, fig. 5).

Articles (Merity et al. 2016, arXiv 1609.07843; raw text) are split at paragraphs into pieces
of at most `LENGTH` characters. The first words of a piece, about `OPENING` characters, are the
prompt, so that every scored token has context; the rest is the reference. There is no answer:
examples are of kind "read".
"""

from collections.abc import Iterator, Sequence
import functools
import re

from experiments.tasks import base
from experiments.tasks.task_data import Source

LENGTH, OPENING = 4000, 200  # characters
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


def _read(split, data_dir, chat):
  if chat:
    raise ValueError("task wikitext103 has no chat form: remove --chat")
  split = "test" if split == "all" else split
  lines = [row["text"] for row in _source(split).rows(data_dir)]
  texts = [cut(piece.lstrip()) for piece in pieces(lines)]
  for i, (prompt, reference) in enumerate(text for text in texts if text[1]):
    yield base.Example(
      id=f"wikitext103/{split}/{i}", prompt=prompt, reference=reference, max_new_tokens=0
    )


@functools.cache
def _source(split):
  return Source(
    f"wikitext103/{split}",
    (f"wikitext-103-raw/wiki.{split.removesuffix('ation')}.raw",),
    ({"path": "Salesforce/wikitext", "name": "wikitext-103-raw-v1", "split": split},),
  )


def _judge(examples, outputs, workers, on_done):
  raise ValueError("task wikitext103 has no answers to score")


WIKITEXT103 = base.Task(
  name=base.PAPER + "wikitext103",
  category="language",
  metric="perplexity",
  read=_read,
  judge=_judge,
  validation="its own validation articles",
  higher_is_better=False,
)
