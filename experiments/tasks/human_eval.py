"""HumanEval and HumanEval+, with their authors' scoring.

HumanEval (Chen et al. 2021, arXiv 2107.03374; openai/human-eval at commit 6d43fb9): a
completion passes if prompt, completion and test run to the end within 3 seconds. HumanEval+
(Liu et al. 2023, arXiv 2305.01210; evalplus/evalplus at commit 26d6d00): a solution passes
"base" if it agrees with the reference on HumanEval's inputs, and "plus", the score, if it also
does on many more. Each input may take max(4 s, 4 x the reference's time), all of them a
minute. Solutions are sanitized first. Chat models get evalplus' prompt for both tasks.

HumanEval+ has two public forms. One has inputs (fewer in "Mini"); its references run here,
once per process. The other ("OriginFmt", the one on the hub) has HumanEval's form and does not
distinguish base from plus; a solution may take 4 s + 4 x the reference's time. Its test of
HumanEval/32 fails for every solution (it unpacks a number), so its inputs are extracted and
used as in the first form.

The validation split is a fixed quarter of the problems, 54 of 164, the same for both tasks;
"test" is the rest, and "all" the whole set, for comparison with published numbers.

Programs run in `experiments.sandbox`: a solution in one process, which gets arguments and
returns plain data, and its tests in another, which has the expected answers and the verdict.
"""

import ast
import collections
from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import math
import pathlib
import pickle

from experiments import sandbox
from experiments.sandbox import Limits, Program
from experiments.tasks import base, task_data
from experiments.tasks.sanitizer import sanitize
from experiments.tasks.task_data import Source

SLICE = 0.25
HUMAN_EVAL_SECONDS = 3.0
PLUS_SECONDS = 60.0  # for all inputs together
REFERENCE_SECONDS = 600.0
MEMORY_BYTES = 4 << 30

# Stop strings of completions; PLUS_STOP is evalplus' list for direct completion.
COMPLETION_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
PLUS_STOP = (
  "<|endoftext|>",
  "<|endofmask|>",
  "</s>",
  "\nif __name__",
  "\ndef main(",
  "\nprint(",
  "\ndef ",
  "\nclass ",
  "\nimport ",
  "\nfrom ",
  "\nassert ",
)
CHAT_STOP = (*PLUS_STOP[:6], "\n```\n")
INSTRUCTION = (
  "Please provide a self-contained Python script that solves the following problem in "
  "a markdown code block:"
)
RESPONSE = (
  "Below is a Python script with a self-contained function that solves the problem and "
  "passes corresponding tests:"
)

_DRIVER = pathlib.Path(__file__).with_name("plus_driver.py")


def pass_at_k(samples: int, correct: int, k: int) -> float:
  """Returns the unbiased estimate of pass@k: the probability that one of k samples is correct.

  1 - C(n - c, k) / C(n, k), computed as a product (Chen et al. 2021, section 2.1).

  Args:
    samples: n, number of samples, at least k.
    correct: c, number of correct samples.
    k: at least 1.

  Raises:
    ValueError: a number is out of range.
  """
  if not 1 <= k <= samples or not 0 <= correct <= samples:
    raise ValueError(
      f"pass@k needs 1 <= k <= n and 0 <= c <= n, got k={k}, n={samples}, c={correct}"
    )
  # One factor is zero if n - c < k.
  return 1.0 - math.prod(max(0.0, 1.0 - k / i) for i in range(samples - correct + 1, samples + 1))


def solution(example: base.Example, text: str) -> str:
  """Returns the program in a generated text, without tests."""
  problem = example.data
  if example.messages:
    text = sanitize(text, problem["entry_point"])
    # HumanEval's tests may use other functions of the prompt; evalplus' do not.
    return text if problem["plus"] else f"{text}\n{_helpers(problem)}"
  if problem["plus"]:
    return sanitize(example.prompt + text, problem["entry_point"])
  return example.prompt + text


def _helpers(problem):
  """Returns the prompt's functions other than the entry point."""
  names = [
    node.name
    for node in ast.parse(problem["prompt"]).body
    if isinstance(node, ast.FunctionDef) and node.name != problem["entry_point"]
  ]
  return "\n".join(sanitize(problem["prompt"], name) for name in names)


def _read(
  name: str, source: Source, plus: bool, split: str, data_dir: pathlib.Path | None, chat: bool
):
  read = functools.partial(_example, name=name, plus=plus, chat=chat)
  for example in task_data.parse(source.rows(data_dir), read, source.name):
    validates = task_data.in_slice(example.data["task_id"], SLICE)
    if split == "all" or validates == (split == "validation"):
      yield example


def _example(row, name, plus, chat):
  problem = {key: row[key] for key in ("task_id", "prompt", "entry_point", "canonical_solution")}
  if not all(isinstance(value, str) for value in problem.values()):
    raise ValueError("task_id, prompt, entry_point and canonical_solution must be strings")
  if plus and "plus_input" in row:
    problem |= {
      "inputs": [*row["base_input"], *row["plus_input"]],
      "base": len(row["base_input"]),
      "atol": row["atol"],
    }
  elif plus and row["entry_point"] == "find_zero":
    problem |= {"inputs": _inputs(row["test"]), "base": None, "atol": 1e-4}
  else:
    problem["test"] = row["test"]
  prompt = row["prompt"].strip() + "\n" if plus else row["prompt"]
  messages = ()
  if chat:
    messages = (
      {"role": "user", "content": f"{INSTRUCTION}\n```\n{row['prompt'].strip()}\n```\n"},
      {"role": "assistant", "content": f"{RESPONSE}\n```python\n"},
    )
  return base.Example(
    id=f"{name}/{row['task_id'].rpartition('/')[2]}",
    prompt=prompt,
    stop=CHAT_STOP if chat else PLUS_STOP if plus else COMPLETION_STOP,
    max_new_tokens=768 if plus or chat else 512,
    reference=row["canonical_solution"],
    messages=messages,
    data=problem | {"plus": plus},
  )


def _inputs(test):
  """Returns the inputs in a test of HumanEval's form."""
  for node in ast.walk(ast.parse(test)):
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "inputs":
      return ast.literal_eval(node.value)
  raise ValueError("the test has no inputs")


def _solves(problem):
  """Returns the reference solution as a program."""
  return problem["prompt"] + problem["canonical_solution"]


def _tested(problem, text, seconds):
  """Returns the problem's test of a solution, which runs in another process."""
  name = problem["entry_point"]
  # Tests may use other functions of the prompt; they get the prompt's.
  test = f"{_solves(problem)}\n{name} = __peer__.call\n{problem['test']}\ncheck({name})"
  limits = Limits(seconds=seconds, memory_bytes=MEMORY_BYTES)
  return Program(test, limits=limits, peer=_served(problem, text, limits))


def _served(problem, text, limits):
  return Program(f"{text}\n__peer__.serve({problem['entry_point']})", limits=limits)


def _driven(problem, seconds, text=None, **more):
  """Returns the driver's run of the reference, or its comparison of a solution's `text` with it."""
  job = {"entry_point": problem["entry_point"], "inputs": problem["inputs"]}
  limits = Limits(seconds=seconds, memory_bytes=MEMORY_BYTES)
  return Program(
    _DRIVER.read_text("utf-8"),
    pickle.dumps(job | more),
    limits,
    None if text is None else _served(problem, text, limits),
  )


def _judge_human_eval(examples, outputs, workers, on_done):
  outcomes = sandbox.run_programs(
    [_tested(e.data, solution(e, o), HUMAN_EVAL_SECONDS) for e, o in zip(examples, outputs)],
    workers,
    lambda index: on_done(),
  )
  return [{"pass@1": float(o.passed)} for o in outcomes]


@dataclasses.dataclass(frozen=True)
class _Reference:
  """Pickled answers of a reference solution, never unpickled here, and its seconds."""

  answers: bytes
  seconds: float


_references: dict[bytes, _Reference] = {}  # by hash of the program


def _run_references(problems, workers):
  """Returns each problem's reference; runs those that this process has not run yet.

  Raises:
    ValueError: a reference solution fails.
  """
  programs = []
  for problem in problems:
    text = _solves(problem)
    programs.append(
      _driven(problem, REFERENCE_SECONDS, solution=text)
      if "inputs" in problem
      else _tested(problem, text, REFERENCE_SECONDS)
    )
  keys = [hashlib.blake2b(repr((p.text, p.data)).encode()).digest() for p in programs]
  missing = {k: i for i, k in enumerate(keys) if k not in _references}
  outcomes = sandbox.run_programs([programs[i] for i in missing.values()], workers)
  for (key, i), outcome in zip(missing.items(), outcomes):
    if not outcome.passed:
      raise ValueError(
        f"the reference solution of {problems[i]['task_id']} failed "
        f"({outcome.reason}): {outcome.output[-300:]}"
      )
    _references[key] = _Reference(outcome.result, outcome.seconds)
  return [_references[key] for key in keys]


def _judge_plus(examples: Sequence[base.Example], outputs, workers, on_done):
  """Returns "pass@1" on all inputs and, if known, "base_pass@1" on HumanEval's own."""
  programs, owners = [], []
  references = _run_references([e.data for e in examples], workers)
  for i, (example, output, reference) in enumerate(zip(examples, outputs, references)):
    problem, text = example.data, solution(example, output)
    if "inputs" not in problem:
      groups = [_tested(problem, text, 4.0 + 4.0 * reference.seconds)]
    else:
      count, own = len(problem["inputs"]), problem["base"]
      ranges = [(0, count)] if own is None else [(0, own), (own, count)]
      more = dict(reference=reference.answers, atol=problem["atol"])
      groups = [_driven(problem, PLUS_SECONDS, text, group=group, **more) for group in ranges]
    programs += groups
    owners += [i] * len(groups)
  running = collections.Counter(owners)

  def ended(index):
    running[owners[index]] -= 1
    if not running[owners[index]]:
      on_done()

  passed: list[list[bool]] = [[] for _ in examples]
  for i, outcome in zip(owners, sandbox.run_programs(programs, workers, ended)):
    passed[i].append(outcome.passed)
  # With two groups, the first has HumanEval's own inputs.
  return [
    {"pass@1": float(all(p))} | ({"base_pass@1": float(p[0])} if len(p) == 2 else {})
    for p in passed
  ]


def _task(name, source, plus, judge):
  return base.Task(
    name=base.PAPER + name,
    category="code",
    metric="pass@1",
    runs_code=True,
    judge=judge,
    read=functools.partial(_read, name, source, plus),
    validation=f'a fixed slice ({100 * SLICE:.0f} %) of the problems; "test" is the rest',
  )


HUMAN_EVAL = _task(
  "humaneval",
  Source(
    "humaneval",
    ("HumanEval.jsonl.gz", "HumanEval.jsonl"),
    ({"path": "openai/openai_humaneval", "split": "test"},),
  ),
  plus=False,
  judge=_judge_human_eval,
)
HUMAN_EVAL_PLUS = _task(
  "humaneval_plus",
  Source(
    "humaneval_plus",
    (
      "HumanEvalPlus.jsonl*",
      "HumanEvalPlus-v*.jsonl*",
      "HumanEvalPlus-Mini*.jsonl*",
      "HumanEvalPlus-OriginFmt*.jsonl*",
    ),
    ({"path": "evalplus/humanevalplus", "split": "test"},),
  ),
  plus=True,
  judge=_judge_plus,
)
