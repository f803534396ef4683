"""Thirteen tasks with the prompts and scoring of LLM-Adapters, ten of them as in the RoE paper.

Five tasks of arithmetic word problems, where the answer is the last number in the generated
text, and eight of common sense, where it is the most probable of "the correct answer is
answer1", "... answer2" and so on (RoE, arXiv 2509.17238, section 4.1; Hu et al. 2023,
arXiv 2304.01933; repository AGI-Edgerunners/LLM-Adapters at commit 8166572). That repository
generates the choice as text, which `score` accepts too. The paper has no PIQA, WinoGrande and
BoolQ; LLM-Adapters asks BoolQ's questions without their passages.

Test sets are the public ones: 1319 (GSM8K), 1000 (SVAMP), 395 (AddSub), 508 (SingleEq), 600
(MultiArith), 2376 (ARC-e), 1172 (ARC-c), 500 (OBQA), 1954 (SIQA, its development set), 10042
(HellaSwag, its validation set), and the validation sets of PIQA (1838), WinoGrande (1267) and BoolQ
(3270). MultiArith has 20 duplicate questions and SIQA 24, which are kept, as is usual.

The paper does not say what it tuned on. Here, validation and test splits share no question
(compared by words):

* Arithmetic: GSM8K's training problems, with their human solutions as references. The
  "output" entries of LLM-Adapters are model-written rationales, often wrong, and unused.
* ARC, OBQA, PIQA, WinoGrande and BoolQ: their training questions.
* SIQA and HellaSwag, whose validation sets are the test sets here: a fixed slice of them,
  selected by the questions' words, so that duplicates are in one split. "test" is the rest,
  "all" the whole set. Other questions about the same situation may be in the other split.
"""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import functools
import hashlib
import math
import pathlib
import re

from experiments.tasks import base, task_data
from experiments.tasks.task_data import Row, Source

TOLERANCE = 1e-3  # some labels are numbers such as 0.6666666666666666
SIQA_SLICE, HELLASWAG_SLICE = 0.18, 1 / 30  # 311 of 1954 questions; about 335 of 10042

_INDENT = " " * 16  # LLM-Adapters' prompt is an indented string literal
_GITHUB = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main/dataset/{}/test.json"
_NUMBER = re.compile(r"-?\d+\.?\d*")
_ANNOTATION = re.compile(r"<<.*?>>")  # GSM8K's calculator annotations
_FORMAT = re.compile(
  r"Answer format: (true/false|(?P<word>answer|ending|solution|option)1(?:/(?P=word)\d)+)\s*$"
)


@dataclasses.dataclass(frozen=True)
class Question:
  """A question in a common form.

  Attributes:
    instruction: the question in LLM-Adapters' words.
    target: a number, or the index of a choice.
    names: names of the choices, such as "answer1"; empty for numbers.
    reference: a human solution, if there is one.
  """

  instruction: str
  target: float | int
  names: tuple[str, ...] = ()
  reference: str | None = None


def wrap(instruction: str) -> str:
  """Returns the raw prompt, with the exact whitespace of LLM-Adapters."""
  return (
    "Below is an instruction that describes a task. Write a response that appropriately "
    f"completes the request. \n\n{_INDENT}### Instruction:\n{_INDENT}{instruction}\n\n"
    f"{_INDENT}### Response:\n{_INDENT}"
  )


def extract_number(text: str) -> float | None:
  """Returns the last number in a text, ignoring commas, or None."""
  found = _NUMBER.findall(text.replace(",", ""))
  return float(found[-1]) if found else None


def extract_choice(text: str, names: Sequence[str] = ("answer1", "ending1")) -> str | None:
  """Returns the first choice named in a text, such as "answer2", or None.

  Args:
    text: the text.
    names: names of the question's choices; numbered ones stand for those up to 5.
  """
  kinds = dict.fromkeys(re.sub(r"\d$", "[1-5]", name) for name in names)
  match = re.search("|".join(kinds), text)
  return match.group() if match else None


def read_math(row: Row) -> Question:
  """Reads a word problem of LLM-Adapters, GSM8K, SVAMP, MAWPS subsets or the hub's MultiArith.

  Raises:
    KeyError, ValueError: it is none of them.
  """
  if "instruction" in row:
    return _problem(row["instruction"], row["answer"])
  if "Body" in row:  # SVAMP; its body may lack the full stop
    body = row["Body"].rstrip()
    body += "" if body.endswith((".", ",", "?", "!")) else "."
    return _problem(f"{body} {row['Question']}", row["Answer"])
  if "sQuestion" in row:
    return _problem(row["sQuestion"], row["lSolutions"][0])
  if "final_ans" in row:
    return _problem(row["question"], row["final_ans"])
  solution = _ANNOTATION.sub("", row["answer"])
  before, mark, result = solution.rpartition("#### ")
  if not mark:
    raise ValueError('a solution must end with "#### " and the result')
  return _problem(row["question"], result.replace(",", ""), before + mark + result)


def _problem(question, answer, reference=None):
  target = float(answer)
  if not math.isfinite(target):
    raise ValueError(f"the answer must be a finite number, got {answer!r}")
  return Question(question, target, reference=reference)


def read_choice(row: Row) -> Question:
  """Reads a question of LLM-Adapters, or of the original of one of its tasks of common sense.

  Raises:
    KeyError, ValueError: it is none of them.
  """
  if "instruction" in row:
    match = _FORMAT.search(row["instruction"])
    if match is None:
      raise ValueError('the instruction must end with "Answer format: answer1/answer2..."')
    names = tuple(match.group(1).split("/"))
    return Question(row["instruction"], names.index(row["answer"]), names)
  if "endings" in row:
    return _choice(
      "ending",
      "ending to complete the given sentence",
      f"{row['activity_label']}: {row['ctx']}",
      row["endings"],
      int(row["label"]),
    )
  if "passage" in row:
    names = ("true", "false")
    return Question(
      f"Please answer the following question with true or false, question: {row['question']}?"
      f"\n\nAnswer format: {'/'.join(names)}",
      names.index(str(row["answer"]).lower()),
      names,
    )
  if "goal" in row:
    return _choice(
      "solution",
      "solution to the question",
      row["goal"],
      [row["sol1"], row["sol2"]],
      int(row["label"]),
      between="\n\n",
    )
  if "sentence" in row:
    return _choice(
      "option",
      "answer to fill in the blank to complete the given sentence",
      row["sentence"],
      [row["option1"], row["option2"]],
      int(row["answer"]) - 1,
      before_format=" ",
    )
  if "answerC" in row:
    return _choice(
      "answer",
      "answer to the question",
      f"{row['context']} {row['question']}",
      [row["answerA"], row["answerB"], row["answerC"]],
      int(row["label"]) - 1,
    )
  if isinstance(row.get("question"), dict):  # ARC and OBQA as their authors publish them
    stem, listed = row["question"]["stem"], row["question"]["choices"]
    texts, labels = [c["text"] for c in listed], [c["label"] for c in listed]
  else:
    stem = row["question_stem"] if "question_stem" in row else row["question"]
    texts, labels = row["choices"]["text"], list(row["choices"]["label"])
  return _choice("answer", "answer to the question", stem, texts, labels.index(row["answerKey"]))


def _choice(word, what, question, texts, target, between=" ", before_format="\n\n"):
  if not 0 <= target < len(texts):
    raise ValueError(f"the label must be one of {len(texts)} choices, got index {target}")
  names = tuple(f"{word}{i}" for i in range(1, len(texts) + 1))
  listed = between.join(f"{name.capitalize()}: {text}" for name, text in zip(names, texts))
  return Question(
    f"Please choose the correct {what}: {question}\n\n{listed}{before_format}"
    f"Answer format: {'/'.join(names)}",
    target,
    names,
  )


def _questions(source, reader, data_dir):
  return task_data.parse(source.rows(data_dir), reader, source.name)


def _read(
  name: str,
  reader,
  test: Source,
  validation: Source | float,
  split: str,
  data_dir: pathlib.Path | None,
  chat: bool,
) -> Iterator[base.Example]:
  """Yields a split; `validation` is a source, or the share of the test set that is its slice."""
  questions = _questions(test, reader, data_dir)
  if isinstance(validation, float):
    if split != "all":
      wanted = split == "validation"
      questions = [
        q
        for q in questions
        if task_data.in_slice(task_data.content(q.instruction), validation) == wanted
      ]
  elif split == "validation":
    tested = {task_data.content(q.instruction) for q in questions}
    questions = [
      q
      for q in _questions(validation, reader, data_dir)
      if task_data.content(q.instruction) not in tested
    ]
  copies = collections.Counter()
  for question in questions:
    # Independent of the order, which differs between the forms of the data.
    digest = hashlib.blake2b(task_data.content(question.instruction).encode(), digest_size=6)
    key = f"{name}/{digest.hexdigest()}"
    copies[key] += 1
    yield _example(f"{key}-{copies[key]}" if copies[key] > 1 else key, question, chat)


def _example(key, question, chat):
  choices = tuple(f"the correct answer is {name}" for name in question.names) or None
  return base.Example(
    id=key,
    prompt=wrap(question.instruction),
    choices=choices,
    target=question.target,
    # LLM-Adapters takes the text between the first and the second of these.
    stop=("### Response:",),
    max_new_tokens=32 if choices else 256,
    reference=choices[question.target] if choices else question.reference,
    messages=({"role": "user", "content": question.instruction},) if chat else (),
    data={"instruction": question.instruction, "names": question.names},
  )


def _score_number(example, text):
  number = extract_number(text)
  correct = number is not None and abs(number - example.target) <= TOLERANCE
  return {"exact_match": float(correct)}


def _score_choice(example, output):
  if isinstance(output, str):
    names = example.data["names"]
    return {"acc": float(extract_choice(output, names) == names[example.target])}
  return base.chosen(example, output)


def _hub(path, name=None, split="test"):
  return {"path": path, "split": split} | ({"name": name} if name else {})


_GSM8K_TRAIN = Source(
  "gsm8k/train",
  ("gsm8k/train.jsonl", "grade_school_math/data/train.jsonl"),
  (_hub("openai/gsm8k", "main", "train"),),
)


def _math(name, files, hub):
  read = functools.partial(_read, name, read_math, Source(f"{name}/test", files, hub), _GSM8K_TRAIN)
  return base.Task(
    name=base.PAPER + name,
    category="math",
    metric="exact_match",
    read=read,
    judge=base.each(_score_number),
    validation="GSM8K's training problems, except questions of the test split",
  )


def _commonsense(name, files, hub, validation, described):
  read = functools.partial(_read, name, read_choice, Source(f"{name}/test", files, hub), validation)
  return base.Task(
    name=base.PAPER + name,
    category="commonsense",
    metric="acc",
    read=read,
    judge=base.each(_score_choice),
    validation=described,
  )


def _trained(name, folder, files, hub):
  """Makes a task that validates on training questions; `files` and `hub` are by split."""
  validation = Source(f"{name}/train", (f"{folder}/train.json", files("train")), (hub("train"),))
  return _commonsense(
    name,
    (f"{folder}/test.json", files("test")),
    (hub("test"),),
    validation,
    "its training questions, except questions of the test split",
  )


def _sliced(share):
  return (
    f"a fixed slice ({100 * share:.0f} %) of the public test set, selected by the questions' "
    'words; "test" is the rest'
  )


MATH = (
  _math(
    "gsm8k",
    ("gsm8k/test.json", "gsm8k/test.jsonl", "grade_school_math/data/test.jsonl"),
    (_hub("openai/gsm8k", "main"),),
  ),
  _math(
    "svamp",
    ("SVAMP/test.json", "SVAMP.json"),
    (_hub("ChilleD/SVAMP", split="train"), _hub("ChilleD/SVAMP")),
  ),
  _math(
    "addsub",
    ("AddSub/test.json", "AddSub.json"),
    ({"path": "json", "data_files": _GITHUB.format("AddSub"), "split": "train"},),
  ),
  _math(
    "singleeq",
    ("SingleEq/test.json", "SingleEq/questions.json", "SingleEq.json"),
    ({"path": "json", "data_files": _GITHUB.format("SingleEq"), "split": "train"},),
  ),
  _math(
    "multiarith",
    ("MultiArith/test.json", "MultiArith.json"),
    (_hub("ChilleD/MultiArith", split="train"), _hub("ChilleD/MultiArith")),
  ),
)

# The public split of the questions that LLM-Adapters tests, and of those to choose on.
_PUBLIC = {"test": "validation", "train": "train"}
COMMONSENSE = (
  _trained(
    "arc_easy",
    "ARC-Easy",
    lambda s: f"ARC-Easy-{s.capitalize()}.jsonl",
    lambda s: _hub("allenai/ai2_arc", "ARC-Easy", s),
  ),
  _trained(
    "arc_challenge",
    "ARC-Challenge",
    lambda s: f"ARC-Challenge-{s.capitalize()}.jsonl",
    lambda s: _hub("allenai/ai2_arc", "ARC-Challenge", s),
  ),
  _trained(
    "obqa",
    "openbookqa",
    lambda s: f"Main/{s}.jsonl",
    lambda s: _hub("allenai/openbookqa", "main", s),
  ),
  _commonsense(
    "siqa",
    ("social_i_qa/test.json",),
    (_hub("lighteval/siqa", split="validation"),),
    SIQA_SLICE,
    _sliced(SIQA_SLICE),
  ),
  _commonsense(
    "hellaswag",
    ("hellaswag/test.json", "hellaswag_val.jsonl"),
    (_hub("Rowan/hellaswag", split="validation"),),
    HELLASWAG_SLICE,
    _sliced(HELLASWAG_SLICE),
  ),
  _trained(
    "piqa",
    "piqa",
    lambda s: f"piqa/{_PUBLIC[s]}.jsonl",  # with labels, as on the hub
    lambda s: _hub("baber/piqa", split=_PUBLIC[s]),
  ),
  _trained(
    "winogrande",
    "winogrande",
    lambda s: f"winogrande_1.1/{'dev' if s == 'test' else 'train_xl'}.jsonl",
    lambda s: _hub("allenai/winogrande", "winogrande_xl", _PUBLIC[s]),
  ),
  _trained(
    "boolq",
    "boolq",
    lambda s: f"boolq/{'dev' if s == 'test' else s}.jsonl",
    lambda s: _hub("google/boolq", split=_PUBLIC[s]),
  ),
)
