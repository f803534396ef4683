"""LAMBADA: the last word of a passage (Paperno et al. 2016, arXiv 1606.06031).

The prompt is the passage up to its last space, and the reference the rest, as in the task
`lambada_openai` of lm-evaluation-harness: "acc" is 1 if each token of the word is the most probable
one, which no output temperature changes, and "word_perplexity" is its perplexity.

The test set is OpenAI's, with the original capitals and punctuation. Passages to choose on are
those of the development set. The public file has them in lower case and cut into words, which are
joined here; the capitals are lost.
"""

import collections
from collections.abc import Iterator
import hashlib
import re

from experiments.tasks import base, task_data
from experiments.tasks.task_data import Source

NAME = base.TEXT + "lambada"
_TEST = Source(
  "lambada/test",
  ("lambada_test_en.jsonl", "lambada_test.jsonl", "lambada/test*.jsonl"),
  ({"path": "EleutherAI/lambada_openai", "name": "default", "split": "test"},),
)
_DEVELOPMENT = Source(
  "lambada/development",
  ("lambada_development_plain_text.txt", "lambada/development*.txt"),
  ({"path": "cimec/lambada", "split": "validation"},),
)
_JOINED = (
  (r"`` | ''", '"'),
  (r"(?<!\w)` ", "'"),
  (r" n't\b", "n't"),
  (r" - ", "-"),
  (r" (['’](?:s|m|d|re|ve|ll)\b)", r"\1"),
  (r" ([,.;:!?)']|\.\.\.)(?!\w)", r"\1"),
  (r"\( ", "("),
)


def join(text: str) -> str:
  """Joins the words of a passage of the development set."""
  for pattern, joined in _JOINED:
    text = re.sub(pattern, joined, text)
  return text


def _read(split, data_dir, chat) -> Iterator[base.Example]:
  if chat:
    raise ValueError(f"task {NAME} has no chat form: remove --chat")
  is_test = split != "validation"
  rows = (_TEST if is_test else _DEVELOPMENT).rows(data_dir)
  copies = collections.Counter()
  for text in task_data.parse(rows, lambda row: row["text"], NAME):
    prompt, space, word = (text if is_test else join(text.strip())).rpartition(" ")
    if not space:
      continue
    key = "lambada/" + hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    copies[key] += 1
    name = f"{key}-{copies[key]}" if copies[key] > 1 else key
    yield base.Example(name, prompt, reference=space + word, max_new_tokens=0)


LAMBADA = base.Task(
  name=NAME,
  category="language",
  metric="acc",
  read=_read,
  judge=base.each(lambda example, is_greedy: {"acc": float(is_greedy), "words": 1.0}),
  validation="its development set, whose passages are in lower case",
)
