"""Tasks of generated word problems (see `wordmath`), which need no data.

* `wordmath`: all kinds of problems;
* `wordmath_sums`: problems with only additions and subtractions; `wordmath_products`: also
  multiplications; `wordmath_quotients`: with divisions;
* `wordmath_choice`: choose the result of a solution's last step from four.
"""

from collections.abc import Iterator
import dataclasses
import hashlib
import itertools

from experiments.tasks import base, wordmath

COUNT = 1000  # examples per split
_NEAR = tuple(sign * step for step in (1, 2, 3, 9, 10, 11, 20, 100) for sign in (1, -1))


def _problems(split: str) -> Iterator[wordmath.Problem]:
  split = "test" if split == "all" else split
  return (wordmath.problem(split, i) for i in itertools.count())


def kind_of(problem: wordmath.Problem) -> str:
  """Returns "quotients" if a step divides, else "products" if one multiplies, else "sums"."""
  return "quotients" if "/" in problem.content else "products" if "*" in problem.content else "sums"


def _read(name, kind=None):
  def read(split, data_dir, chat):
    del data_dir
    of_kind = (p for p in _problems(split) if kind in (None, kind_of(p)))
    for i, problem in enumerate(itertools.islice(of_kind, COUNT)):
      yield base.Example(
        id=f"{name}/{'test' if split == 'all' else split}/{i}",
        prompt=wordmath.prompt(problem),
        target=problem.result,
        max_new_tokens=96,
        reference=wordmath.completion(problem),
        messages=({"role": "user", "content": problem.question},) if chat else (),
        data=dataclasses.asdict(problem),
      )

  return read


def _read_choice(split, data_dir, chat):
  del data_dir
  for i, problem in enumerate(itertools.islice(_problems(split), COUNT)):
    steps = wordmath.completion(problem).rpartition("=")[0] + "="
    results, target = _results(problem)
    yield base.Example(
      id=f"wordmath_choice/{'test' if split == 'all' else split}/{i}",
      prompt=wordmath.prompt(problem) + steps,
      target=target,
      choices=tuple(f"{result}. #### {result}" for result in results),
      messages=(
        {"role": "user", "content": problem.question},
        {"role": "assistant", "content": steps.strip()},
      )
      if chat
      else (),
      data=dataclasses.asdict(problem),
    )


def _results(problem):
  """Returns four similar results, by a stable hash, and the index of the right one."""
  digest = hashlib.blake2b(problem.question.encode(), digest_size=16).digest()
  near = sorted(
    _NEAR, key=lambda step: hashlib.blake2b(digest + str(step).encode(), digest_size=8).digest()
  )
  wrong = [
    problem.result + step for step in near if 0 < problem.result + step <= wordmath.MAX_RESULT
  ][:3]
  target = digest[0] % 4
  return [*wrong[:target], problem.result, *wrong[target:]], target


def _score(example, output):
  return {"exact_match": float(wordmath.extract(output) == example.target)}


def _score_choice(example, output):
  if isinstance(output, str):
    return {"acc": float(output.strip() == example.choices[example.target])}
  return base.chosen(example, output)


_VALIDATION = (
  f"the first {COUNT} generated problems of the validation split, whose arithmetic occurs "
  "neither in training nor in test problems"
)


def _task(name, kind=None):
  return base.Task(
    name=name,
    category="math",
    metric="exact_match",
    read=_read(name, kind),
    judge=base.each(_score),
    validation=_VALIDATION,
  )


WORDMATH = (
  _task("wordmath"),
  *(_task(f"wordmath_{kind}", kind) for kind in ("sums", "products", "quotients")),
  base.Task(
    name="wordmath_choice",
    category="math",
    metric="acc",
    read=_read_choice,
    judge=base.each(_score_choice),
    validation=_VALIDATION,
  ),
)
