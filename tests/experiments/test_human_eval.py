"""HumanEval and HumanEval+ on a few problems of our own, in the public formats."""

import gzip
import itertools
import json
import sys

import pytest

from experiments import tasks
from experiments.tasks import human_eval, plus_driver

pytestmark = pytest.mark.skipif(
  sys.platform != "linux", reason="programs are confined by the Linux kernel"
)


def problem(number, entry_point, prompt, solution, test, base, plus, atol=0):
  shared = {
    "task_id": f"HumanEval/{number}",
    "prompt": prompt,
    "entry_point": entry_point,
    "canonical_solution": solution,
  }
  return (
    shared | {"test": test},
    shared | {"base_input": base, "plus_input": plus, "atol": atol, "contract": ""},
  )


PROBLEMS = [
  problem(
    1,
    "double",
    'def double(x):\n    """ Returns twice x. """\n',
    "    return 2 * x\n",
    "\n\ndef check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0\n",
    [[2], [0]],
    [[-3], ["ab"], [1.5]],
  ),
  problem(
    2,
    "third",
    'def third(x):\n    """ Returns a third of x, about. """\n',
    "    return x / 3\n",
    "\n\ndef check(candidate):\n    assert abs(candidate(1) - 0.3333333) < 1e-6\n",
    [[1]],
    [[10], [2.5]],
    1e-4,
  ),
  problem(
    3,
    "decode",
    'def encode(s):\n    """ Reverses. """\n    return s[::-1]\n\n\n'
    'def decode(s):\n    """ Undoes encode. """\n',
    "    return s[::-1]\n",
    "\n\ndef check(candidate):\n    assert candidate(encode('abc')) == 'abc'\n",
    [["cba"]],
    [[""], ["aab"]],
  ),
  problem(
    32,
    "find_zero",
    "import math\n\n\ndef find_zero(xs: list):\n"
    '    """ A zero of the polynomial with coefficients xs. """\n',
    "    return -xs[0] / xs[1]\n",
    "\n\ndef check(candidate):\n    assert candidate([1, 2]) == -0.5\n",
    [[[1, 2]]],
    [[[-6, 3]], [[5, 1, 0]]],
    1e-4,
  ),
  problem(
    5,
    "count",
    'def count(n):\n    """ Counts to n. """\n',
    "    return list(range(n))\n",
    "\n\ndef check(candidate):\n    assert candidate(2) == [0, 1]\n",
    [[2]],
    [[0], [5]],
  ),
]


@pytest.fixture
def data_dir(tmp_path):
  with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
    file.writelines(json.dumps(p) + "\n" for p, _ in PROBLEMS)
  with gzip.open(tmp_path / "HumanEvalPlus-Mini.jsonl.gz", "wt") as file:
    file.writelines(json.dumps(p) + "\n" for _, p in PROBLEMS)
  return tmp_path


def scores(name, data_dir, texts, chat=False, metric="pass@1"):
  task = tasks.get(f"paper/{name}")
  examples = task.examples("all", data_dir, chat=chat)
  results = task.score_all(examples, texts, allow_code_execution=True, workers=2)
  return [r[metric] for r in results]


def references():
  return [p["canonical_solution"] for p, _ in PROBLEMS]


@pytest.mark.parametrize(
  "n,c,k", [(5, 0, 1), (5, 5, 1), (5, 2, 1), (6, 3, 2), (7, 1, 7), (8, 6, 3)]
)
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_with_a_correct_one(n, c, k):
  chosen = list(itertools.combinations([True] * c + [False] * (n - c), k))
  expected = sum(map(any, chosen)) / len(chosen)
  assert human_eval.pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n,c,k", [(5, 6, 1), (5, -1, 1), (5, 2, 0), (5, 2, 6)])
def test_impossible_numbers_of_samples_are_refused(n, c, k):
  with pytest.raises(ValueError, match="needs 1 <= k <= n"):
    human_eval.pass_at_k(n, c, k)


@pytest.mark.parametrize("name", ["humaneval", "humaneval_plus"])
def test_reference_solutions_pass(name, data_dir):
  assert scores(name, data_dir, references()) == [1.0] * 5


@pytest.mark.parametrize("name", ["humaneval", "humaneval_plus"])
def test_reference_solutions_pass_as_a_chat_writes_them(name, data_dir):
  texts = [p["prompt"] + p["canonical_solution"] for p, _ in PROBLEMS]
  # As a whole program, with what a chat adds; for the third without the prompt's helper.
  texts[2] = "def decode(s):\n    return s[::-1]\n"
  texts = [f"{text}\n\nprint('tests')\n```\nThis works because it does." for text in texts]
  assert scores(name, data_dir, texts, chat=True) == [1.0] * 5


@pytest.mark.slow
def test_wrong_and_odd_solutions_fail(data_dir):
  texts = [
    "    return 3 * x\n",
    "    return None\n",
    "    raise ValueError\n",
    "    return 1.0\n",
    "    return [0, 1\n",
  ]
  assert scores("humaneval", data_dir, texts) == [0.0] * 5
  assert scores("humaneval_plus", data_dir, texts) == [0.0] * 5
  texts = [
    "    exit(0)\n",
    "    import os; os._exit(0)\n",
    "    return\n\nraise SystemExit(0)",
    "    while True: pass\n",
    "    return range(n)\n",
  ]
  assert scores("humaneval", data_dir, texts) == [0.0] * 5


CHEATS = [
  # An object that equals everything, also in disguise.
  "    return type('Any', (), {'__eq__': lambda *_: True})()\n",
  "    return type('Any', (int,), {'__eq__': lambda *_: True, '__sub__': lambda *_: 0})()\n",
  # The expected answers or the judge's token, from wherever they may be.
  """
    import gc, sys
    frame, found = sys._getframe(), []
    while frame:
      found += [*frame.f_locals.values(), *frame.f_globals.values()]
      frame = frame.f_back
    for thing in [*found, *gc.get_objects()]:
      if isinstance(thing, dict) and "token" in thing:
        import os
        for end in range(3, 32):
          try: os.write(end, thing["token"])
          except OSError: pass
      if isinstance(thing, dict) and "reference" in thing:
        import pickle
        return pickle.loads(thing["reference"])[0][0]
    return None
""",
  # What the judge uses to compare.
  """
    import builtins, numpy
    numpy.allclose = lambda *a, **k: True
    builtins.abs = lambda *a: 0
    builtins.isinstance = lambda *a: True
    return None
""",
  # A trace that changes what runs next.
  """
    import sys
    def trace(frame, event, arg):
      frame.f_locals.clear()
      return trace
    sys.settrace(trace)
    return None
""",
  # An answer that runs code when it is unpickled.
  """
    import os, pickle
    data = pickle.dumps(("answer", os.system))
    for end in range(3, 32):
      try: os.write(end, len(data).to_bytes(8, "little") + data)
      except OSError: pass
""",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["humaneval", "humaneval_plus"])
def test_programs_written_to_deceive_the_judge_fail(name, data_dir):
  for i in range(0, len(CHEATS), 3):
    texts = CHEATS[i : i + 3]
    assert scores(name, data_dir, (texts + texts)[:5]) == [0.0] * 5


@pytest.mark.parametrize(
  "body",
  ["import numpy\n    return numpy.int64(2 * x) if isinstance(x, int) else x + x", "return x + x"],
)
def test_plain_answers_of_other_types_pass(body, data_dir):
  texts = [f"    {body}\n", *references()[1:4], "    return dict.fromkeys(range(n)).keys()\n"]
  assert scores("humaneval", data_dir, texts) == [1.0] * 4 + [0.0]  # a set is no list


def test_plus_is_right_on_all_inputs_and_base_on_the_first(data_dir):
  texts = references()
  texts[0] = "    return x + x if x in (0, 2) else 0\n"
  texts[4] = "    return [0, 1]\n"
  assert scores("humaneval_plus", data_dir, texts) == [0.0, 1.0, 1.0, 1.0, 0.0]
  assert scores("humaneval_plus", data_dir, texts, metric="base_pass@1") == [1.0] * 5


def test_close_floats_and_any_zero_are_right(data_dir):
  texts = references()
  texts[1] = "    return x / 3 + 5e-5\n"
  texts[3] = "    return -xs[0] / xs[1] + 1e-6\n"
  assert scores("humaneval_plus", data_dir, texts)[1:4:2] == [1.0, 1.0]
  texts[1] = "    return x / 3 + 5e-3\n"
  texts[3] = "    return -xs[0] / xs[1] + 1e-3\n"
  assert scores("humaneval_plus", data_dir, texts)[1:4:2] == [0.0, 0.0]


@pytest.mark.parametrize(
  "found,expected,atol,same",
  [
    (1, 1, 0, True),
    (1, 2, 0, False),
    ("a", "a", 0, True),
    (1, 1.0, 0, True),
    (1.0 + 5e-7, 1.0, 0, True),
    (1.0 + 5e-6, 1.0, 0, False),
    (1.0 + 5e-6, 1.0, 1e-5, True),
    ([1.0, 2.0 + 5e-7], [1.0, 2.0], 0, True),
    ([1.0], [1.0, 2.0], 0, False),
    ((1.0 + 1e-9,), [1.0], 0, False),
    ([1.0 + 1e-9, 2], [1.0, 2], 0, False),
    ([1.0 + 1e-9, 2], [1.0, 2], 1e-6, True),
    (None, 1.0, 0, False),
    ([], [], 0, True),
    (1e9 + 50, 1e9, 0, True),
    (1e9 + 500, 1e9, 0, False),
  ],
)
def test_values_agree_as_in_evalplus(found, expected, atol, same):
  assert plus_driver.agree(found, expected, atol) == same


def test_a_slow_input_is_ended_at_its_limit_and_the_others_are_not_reached(data_dir, monkeypatch):
  driver = data_dir / "driver.py"
  text = human_eval._DRIVER.read_text()
  driver.write_text(text.replace("MIN_SECONDS, FACTOR = 4.0", "MIN_SECONDS, FACTOR = 0.3"))
  monkeypatch.setattr(human_eval, "_DRIVER", driver)
  texts = references()
  texts[0] = "    while x == 0: pass\n    return 2 * x\n"
  task = tasks.get("paper/humaneval_plus")
  example = task.examples("all", data_dir)[0]
  assert task.score(example, texts[0], True) == {"pass@1": 0.0, "base_pass@1": 0.0}


def test_a_solution_that_changes_its_arguments_is_compared_with_the_unchanged(data_dir):
  texts = references()
  texts[3] = "    x = -xs[0] / xs[1]\n    xs.clear()\n    return x\n"
  assert scores("humaneval_plus", data_dir, texts)[3] == 1.0


def test_plus_in_the_form_of_human_eval_is_read_too(tmp_path):
  rows = [p for p, _ in PROBLEMS]
  broken = (
    "import math\ndef _poly(xs, x):\n  return 0\n\ndef check(candidate):\n"
    "    inputs = [[[1, 2]], [[-6, 3]]]\n    results = [-0.5, 2.0]\n"
    "    for i, (inp, exp) in enumerate(zip(inputs, results)):\n"
    "        assert _poly(*candidate(*inp), inp) <= 0.0001\n"
  )
  rows[2] = rows[2] | {"test": "\ndef check(candidate):\n    assert candidate('cba') == 'abc'\n"}
  rows[3] = rows[3] | {"test": broken}
  lines = "".join(json.dumps(r) + "\n" for r in rows)
  (tmp_path / "HumanEvalPlus-OriginFmt.jsonl").write_text(lines)
  texts = references()
  assert scores("humaneval_plus", tmp_path, texts) == [1.0] * 5
  texts[0], texts[3] = "    return x\n", "    return 0.0\n"
  assert scores("humaneval_plus", tmp_path, texts) == [0.0, 1.0, 1.0, 0.0, 1.0]


def test_a_reference_solution_that_does_not_run_is_named(tmp_path):
  row = PROBLEMS[0][1] | {"canonical_solution": "    return y\n", "task_id": "HumanEval/77"}
  (tmp_path / "HumanEvalPlus.jsonl").write_text(json.dumps(row) + "\n")
  with pytest.raises(ValueError, match="reference solution of HumanEval/77 failed.*"):
    scores("humaneval_plus", tmp_path, ["    return 1\n"])


def test_prompts_are_the_authors(data_dir):
  plain = tasks.get("paper/humaneval").examples("all", data_dir)[0]
  assert plain.prompt == PROBLEMS[0][0]["prompt"] and plain.kind == "generate"
  assert "\ndef" in plain.stop and plain.reference == "    return 2 * x\n"
  chat = tasks.get("paper/humaneval_plus").examples("all", data_dir, chat=True)[0]
  user, assistant = chat.messages
  assert user["content"] == (
    "Please provide a self-contained Python script that solves the following problem in a "
    'markdown code block:\n```\ndef double(x):\n    """ Returns twice x. """\n```\n'
  )
  assert assistant["content"].endswith("passes corresponding tests:\n```python\n")
  assert "\n```\n" in chat.stop


def test_both_tasks_validate_on_the_same_problems_and_test_on_the_others(tmp_path):
  for plus, name in ((0, "HumanEval"), (1, "HumanEvalPlus")):
    rows = [PROBLEMS[0][plus] | {"task_id": f"HumanEval/{i}"} for i in range(164)]
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  ids = {
    name: [
      [e.id.split("/")[1] for e in tasks.get(f"paper/{name}").examples(split, tmp_path)]
      for split in ("validation", "test", "all")
    ]
    for name in ("humaneval", "humaneval_plus")
  }
  validation, test, everything = ids["humaneval"]
  assert ids["humaneval"] == ids["humaneval_plus"]
  assert len(validation) == 54 and not set(validation) & set(test)
  assert sorted(validation + test) == sorted(everything) == sorted(map(str, range(164)))


def test_programs_run_only_with_leave(data_dir):
  for name in ("humaneval", "humaneval_plus"):
    task = tasks.get(f"paper/{name}")
    example = task.examples("all", data_dir, limit=1)[0]
    with pytest.raises(ValueError, match="allow it with --allow_code_execution"):
      task.score(example, "    return 2 * x\n")
    with pytest.raises(ValueError, match="allow it with --allow_code_execution"):
      task.check_allowed(False)
    task.check_allowed(True)
  tasks.get("wordmath").check_allowed(False)


def test_on_done_is_called_for_each_output(data_dir):
  for name in ("humaneval", "humaneval_plus"):
    task, calls = tasks.get(f"paper/{name}"), []
    examples = task.examples("all", data_dir, limit=3)
    task.score_all(examples, references()[:3], True, on_done=lambda: calls.append(1))
    assert len(calls) == 3
