"""Generates arithmetic word problems with worked steps.

A problem, as the model sees it:

    Question: Ann has 12 pears. Ben gives Ann 5 more. ... How many ...?
    Answer: 12+5=17. 17*2=34. #### 34

It has two to four steps with results in 1..999; 40 % of the problems also have an irrelevant
sentence with a number.

A problem is a pure function of (seed, split, index), which address a counter-based random
stream. Nothing is stored.

Splits are disjoint in two ways. By seed: the split is part of the stream's key. By content: a
problem's content is its sorted worked steps in canonical form (operands of + and * in
ascending order), e.g. "2*17 5+12", without names, nouns, wording, distractors and template. A
stable hash assigns each content to one split (80 % train, 10 % validation, 10 % test), and the
generator redraws a problem's numbers until its content is in the requested split. So no
problem in training has the steps of a test problem, under any seed, template or names.
"""

import dataclasses
import hashlib
import re

import numpy as np

from experiments.tasks import wordmath_templates as lexicon

SPLITS = ("train", "validation", "test")
MAX_RESULT = 999
DISTRACTOR_PERCENT = 40

_BLOCK = 64  # Raw 64-bit words fetched at a time.
_ANSWER = re.compile(r"#### *([0-9]{1,9})(?![0-9]|[.,][0-9])")


@dataclasses.dataclass(frozen=True)
class Problem:
  """One word problem.

  Attributes:
    question: the story and what is asked, on one line.
    answer: the worked steps, then the result after "####".
    result: the final result, an integer in 1..999.
    content: the canonical steps that determine the split.
  """

  question: str
  answer: str
  result: int
  content: str


def problem(split: str, index: int, seed: int = 0) -> Problem:
  """Returns problem `index` (from 0) of `split` under `seed`.

  Raises:
    ValueError: if the split is unknown, or the index or the seed is not an
      integer in 0..2**64-1.
  """
  _check_split(split)
  _check_word("index", index)
  _check_word("seed", seed)
  draw = _stream(seed, SPLITS.index(split), index)
  template = lexicon.TEMPLATES[draw(len(lexicon.TEMPLATES))]
  while True:
    values, steps = _numbers(template, draw)
    if steps is not None:
      content = _content(steps)
      if split_of(content) == split:
        break
  result = steps[-1][3]
  worked = " ".join(f"{a}{op}{b}={c}." for a, op, b, c in steps)
  return Problem(
    question=_story(template, values, draw),
    answer=f"{worked} #### {result}",
    result=result,
    content=content,
  )


def problems(split: str, count: int, seed: int = 0, start: int = 0) -> list[Problem]:
  """Returns the `count` problems from index `start` on; errors as `problem`."""
  _check_split(split)
  _check_word("count", count)
  _check_word("start", start)
  return [problem(split, i, seed) for i in range(start, start + count)]


def prompt(problem: Problem) -> str:
  """Returns the text shown to the model; its `completion` follows directly."""
  return f"Question: {problem.question}\nAnswer:"


def completion(problem: Problem) -> str:
  """Returns the text the model should write after `prompt`."""
  return " " + problem.answer


def extract(text: str) -> int | None:
  """Returns the first whole number written after "####", or None.

  The first counts, as a model that does not stop may go on to invent another
  problem. Decimals, numbers with separators and signed numbers do not match.
  """
  match = _ANSWER.search(text)
  return int(match.group(1)) if match else None


def is_correct(text: str, problem: Problem) -> bool:
  """Returns whether the final number of the completion `text` is right."""
  return extract(text) == problem.result


def split_of(content: str) -> str:
  """Returns the one split to which problems of this content belong."""
  digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
  bucket = int.from_bytes(digest, "little") % 10
  return {8: "validation", 9: "test"}.get(bucket, "train")


def _check_split(split):
  if split not in SPLITS:
    raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")


def _check_word(name, value):
  if not isinstance(value, (int, np.integer)) or not 0 <= value < 2**64:
    raise ValueError(f"{name} must be an integer in 0..2**64-1, got {value!r}.")


def _stream(seed, split_id, index):
  """Returns `draw(n)`, drawing in 0..n-1, addressed by the arguments.

  The index is the top word of the counter, so streams never overlap. Raw bits
  are used since their values, unlike a Generator's, are fixed across versions;
  the bias of the remainder is below 1e-16.
  """
  bits = np.random.Philox(
    key=np.array([seed, split_id], np.uint64), counter=np.array([0, 0, 0, index], np.uint64)
  )
  words = []

  def draw(n):
    if not words:
      words.extend(bits.random_raw(_BLOCK).tolist())
    return words.pop() % n

  return draw


def _numbers(template, draw):
  """Draws numbers; returns (values by letter, steps), steps None if unusable.

  A step is (left, operator, right, result).
  """
  values = {letter: low + draw(high - low + 1) for letter, (low, high) in template.ranges.items()}
  steps = []
  for letter, left, op, right in template.steps:
    a, b = values[left], values[right]
    if op == "+":
      result = a + b
    elif op == "-":
      result = a - b
    elif op == "*":
      result = a * b
    else:
      result, remainder = divmod(a, b)
      if remainder:
        return values, None
    if not 0 < result <= MAX_RESULT:
      return values, None
    values[letter] = result
    steps.append((a, op, b, result))
  return values, steps


def _content(steps):
  def canonical(a, op, b):
    if op in "+*" and a > b:
      a, b = b, a
    return f"{a}{op}{b}"

  return " ".join(sorted(canonical(a, op, b) for a, op, b, _ in steps))


def _story(template, values, draw):
  """Returns the question's text: names, nouns, wordings and a distractor."""
  sentences = [slot[draw(len(slot))] for slot in template.slots]
  if draw(100) < DISTRACTOR_PERCENT:
    # First, or right before the question.
    position = (0, len(sentences) - 1)[draw(2)]
    choices = lexicon.DISTRACTORS
    if position and template.has_protagonist:
      choices += (lexicon.DISTRACTOR_ON_A,)
    sentences.insert(position, choices[draw(len(choices))])
  (name_a, (he, He)), (name_b, _), (name_c, _), (name_d, _) = _distinct(lexicon.NAMES, 4, draw)
  (item, items), (second, seconds) = _distinct(template.items, 2, draw)
  others = [plural for _, plural in lexicon.GOODS if plural != items]
  box, boxes = lexicon.CONTAINERS[draw(len(lexicon.CONTAINERS))]
  return " ".join(sentences).format(
    A=name_a,
    B=name_b,
    C=name_c,
    D=name_d,
    he=he,
    He=He,
    item=item,
    items=items,
    second=second,
    seconds=seconds,
    other=others[draw(len(others))],
    box=box,
    boxes=boxes,
    day=lexicon.DAYS[draw(len(lexicon.DAYS))],
    z=2 + draw(59),
    **values,
  )


def _distinct(choices, count, draw):
  """Draws `count` different choices, in random order."""
  picked = []
  while len(picked) < count:
    choice = choices[draw(len(choices))]
    if choice not in picked:
      picked.append(choice)
  return picked
