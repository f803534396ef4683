"""Tests of the `wordmath` task and its tokenizer."""

import dataclasses
import json
import operator
import re

import numpy as np
import pytest
import tokenizers

from experiments.tasks import wordmath, wordmath_tokenizer
from experiments.tasks import wordmath_templates as templates

COUNT = 3000
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@pytest.fixture(scope="module")
def by_split():
  return {s: wordmath.problems(s, COUNT) for s in wordmath.SPLITS}


@pytest.fixture(scope="module")
def tokenizer():
  return wordmath_tokenizer.build_tokenizer(num_problems=2000)


def parse_steps(answer):
  """Returns [(a, op, b, c), ...] and the result, from the text alone."""
  steps, result = answer.split(" #### ")
  parsed = []
  for step in steps.split(" "):
    match = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)\.", step)
    assert match, answer
    a, op, b, c = match.groups()
    parsed.append((int(a), op, int(b), int(c)))
  return parsed, int(result)


def test_a_problem_is_a_function_of_seed_split_and_index():
  later = wordmath.problems("train", 5, seed=3, start=7)
  assert later == wordmath.problems("train", 20, seed=3)[7:12]
  assert later[2] == wordmath.problem("train", np.int64(9), seed=3)
  assert later[2] != wordmath.problem("train", 9, seed=4)
  assert wordmath.problems("test", 0) == []


def test_generation_is_pinned():
  # Published numbers refer to these problems, on every platform.
  problem = wordmath.problem("test", 0)
  assert problem.answer == "5*17=85. 85-29=56. 56+37=93. #### 93"
  assert problem.content == "37+56 5*17 85-29"


def test_splits_are_disjoint_by_content(by_split):
  contents = {s: {p.content for p in ps} for s, ps in by_split.items()}
  for split, own in contents.items():
    assert {wordmath.split_of(content) for content in own} == {split}
    for other in wordmath.SPLITS:
      assert other == split or not own & contents[other]
  # Another seed draws other problems, yet from the same side of the division.
  reseeded = {p.content for p in wordmath.problems("train", COUNT, seed=1)}
  assert not reseeded & contents["test"]
  assert not reseeded & contents["validation"]


def test_split_shares():
  names = [wordmath.split_of(f"{a}+{b}") for a in range(99) for b in range(99)]
  shares = [names.count(s) / len(names) for s in wordmath.SPLITS]
  np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.015)


def test_content_depends_on_the_steps_alone(by_split):
  # Recomputed from the answer: no name, noun, wording or distractor enters,
  # so renaming a test problem leaves it a test problem.
  questions = {}
  for problem in sum(by_split.values(), []):
    canonical = []
    for a, op, b, _ in parse_steps(problem.answer)[0]:
      low, high = sorted((a, b)) if op in "+*" else (a, b)
      canonical.append(f"{low}{op}{high}")
    assert problem.content == " ".join(sorted(canonical))
    questions.setdefault(problem.content, set()).add(problem.question)
  assert any(len(same) > 1 for same in questions.values())


def test_steps_are_true_and_used(by_split):
  lengths = set()
  for problem in sum(by_split.values(), []):
    steps, result = parse_steps(problem.answer)
    stated = {int(n) for n in re.findall(r"\d+", problem.question)}
    known = set(stated)
    for a, op, b, c in steps:
      assert OPERATORS[op](a, b) == c and 0 < c <= wordmath.MAX_RESULT
      assert op != "/" or b * c == a
      half = op == "/" and b == 2 and "half" in problem.question
      assert a in known and (b in known or half), problem
      known.add(c)
    assert result == problem.result == steps[-1][3]
    # All but at most one distractor number is used.
    assert len(stated - {x for a, _, b, _ in steps for x in (a, b)}) <= 1
    lengths.add(len(steps))
  assert lengths == {2, 3, 4}


def test_questions_are_closed_and_well_formed(by_split):
  words = set()
  for problem in sum(by_split.values(), []):
    question = problem.question
    words.update(re.findall(r"[A-Za-z]+", question))
    assert re.fullmatch(r"[A-Za-z0-9 .,?]+[.?]", question)
    assert "  " not in question
    assert not re.search(r"\b[01] ", question)  # Plural after every number.
    assert not re.search(r"\ba [aeiouAEIOU]", question)
  assert len(words) <= 260


def test_two_fifths_have_one_distractor_outside_their_content(by_split, monkeypatch):
  monkeypatch.setattr(wordmath, "DISTRACTOR_PERCENT", 0)
  without = wordmath.problems("train", COUNT)
  extra = []
  for problem, plain in zip(by_split["train"], without):
    assert problem.content == plain.content
    assert problem.answer == plain.answer
    numbers, sentences = (
      len(re.findall(pattern, problem.question)) - len(re.findall(pattern, plain.question))
      for pattern in (r"\d+", r"[.?]")
    )
    assert numbers == sentences and numbers in (0, 1)
    extra.append(numbers)
  np.testing.assert_allclose(np.mean(extra), 0.4, atol=0.03)


def test_every_template_has_its_numbers_in_every_wording():
  for template in templates.TEMPLATES:
    for letter, (low, high) in template.ranges.items():
      assert 2 <= low <= high
      if (low, high) == (2, 2):
        continue  # Spelled out: "half".
      having = [s for s in template.slots if "{%s}" % letter in s[0]]
      assert len(having) == 1
      assert all(w.count("{%s}" % letter) == 1 for w in having[0])


def test_prompt_and_completion():
  problem = wordmath.problem("train", 0)
  text = wordmath.prompt(problem) + wordmath.completion(problem)
  assert text == f"Question: {problem.question}\nAnswer: {problem.answer}"
  assert wordmath.is_correct(text, problem)
  assert wordmath.is_correct(wordmath.completion(problem), problem)
  wrong = dataclasses.replace(problem, result=problem.result + 1)
  assert not wordmath.is_correct(text, wrong)


@pytest.mark.parametrize(
  "text, number",
  [
    (" 12+5=17. #### 17", 17),
    ("####8", 8),
    ("#### 007\nQuestion: Ann", 7),
    ("#### 3. #### 4", 3),
    ("#### 5.", 5),
    ("#### 0", 0),
    ("", None),
    ("17", None),
    ("### 17", None),
    ("####", None),
    ("#### x 17", None),
    ("#### -3", None),
    ("#### 1.5", None),
    ("#### 1,200", None),
    ("#### ٣", None),
    ("#### " + "9" * 5000, None),
  ],
)
def test_extract(text, number):
  assert wordmath.extract(text) == number


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: wordmath.problem("dev", 0), "split must be one of"),
    (lambda: wordmath.problem("test", -1), "index must be an integer"),
    (lambda: wordmath.problem("test", 1.0), "index must be an integer"),
    (lambda: wordmath.problem("test", 0, -1), "seed must be an integer"),
    (lambda: wordmath.problem("test", 0, 2**64), "seed must be"),
    (lambda: wordmath.problems("dev", 0), "split must be one of"),
    (lambda: wordmath.problems("test", -1), "count must be an integer"),
    (lambda: wordmath.problems("test", 1, start=-1), "start must be"),
  ],
)
def test_bad_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize(
  "text",
  [
    "",
    " ",
    "Ann has 12 pears.",
    "  two  spaces\n\n\tand a tab ",
    "unknown zyzzyva's words, 3.14e-5 #### -7",
    "naïve 東京 🙂 ٣٤ é\u0301 \u200b\x00",
    "<|endoftext",
  ],
)
def test_tokenizer_is_lossless(tokenizer, text):
  ids = tokenizer.encode(text).ids
  assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_words_and_digits_are_single_tokens(tokenizer):
  encoding = tokenizer.encode("Question: Ann has 120 pears.\nAnswer: #### 120")
  assert [tokenizer.decode([i]) for i in encoding.ids] == [
    "Question",
    ":",
    " Ann",
    " has",
    " ",
    "1",
    "2",
    "0",
    " pears",
    ".",
    "\n",
    "Answer",
    ":",
    " ####",
    " ",
    "1",
    "2",
    "0",
  ]
  assert not [t for t in tokenizer.get_vocab() if re.search(r"\d\d", t)]


def test_tokenizer_covers_the_other_splits(tokenizer, by_split):
  for problem in by_split["test"]:
    text = wordmath.prompt(problem) + wordmath.completion(problem)
    encoding = tokenizer.encode(text)
    assert tokenizer.decode(encoding.ids) == text
    # A word in pieces would leave a letter as a token.
    assert not [t for t in encoding.tokens if re.fullmatch("[b-z]", t)]
    assert len(encoding.ids) < wordmath_tokenizer.MODEL_MAX_LENGTH


def test_special_tokens(tokenizer):
  ends = [wordmath_tokenizer.END_OF_TEXT, wordmath_tokenizer.PADDING]
  assert [tokenizer.token_to_id(t) for t in ends] == [0, 1]
  assert tokenizer.encode("7<|endoftext|><|padding|>").ids[1:] == [0, 1]
  assert tokenizer.decode([0, 1]) == ""
  ids = sorted(tokenizer.get_vocab().values())
  assert ids == list(range(tokenizer.get_vocab_size()))


def test_tokenizer_is_deterministic_and_loads_from_file(tokenizer, tmp_path):
  again = wordmath_tokenizer.build_tokenizer(num_problems=2000)
  assert again.to_str() == tokenizer.to_str()
  wordmath_tokenizer.save_tokenizer(tokenizer, tmp_path / "hub")
  loaded = tokenizers.Tokenizer.from_file(str(tmp_path / "hub/tokenizer.json"))
  assert loaded.to_str() == tokenizer.to_str()
  text = wordmath.prompt(wordmath.problem("validation", 0))
  assert loaded.encode(text).ids == tokenizer.encode(text).ids
  config = json.loads((tmp_path / "hub/tokenizer_config.json").read_text())
  assert config["eos_token"] == config["bos_token"] == "<|endoftext|>"
  assert config["pad_token"] == "<|padding|>"
