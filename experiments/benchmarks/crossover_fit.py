"""The crossovers of expert strategies that fit measured times best, ready to paste.

See `roe_jax.experts.choices`.
"""

from collections.abc import Iterator, Sequence
import itertools
import math
from typing import Any, NamedTuple

from roe_jax.experts.choices import Step


class Time(NamedTuple):
  """A measured strategy: tokens, active experts per token, experts, and milliseconds."""

  strategy: str
  num_tokens: int
  experts_per_token: int
  num_experts: int
  ms: float


class Fit(NamedTuple):
  """Crossovers, and their mean time relative to the fastest strategy at each point."""

  steps: tuple[Step, ...]
  regret: float


def fit(times: Sequence[Time]) -> Fit | None:
  """Returns the crossovers with the least time relative to the fastest strategies.

  Tries a strategy up to a number of pairs per expert, then another up to a number of tokens, then
  a third for all larger ones. A strategy that was not measured at a point where it would be chosen
  excludes the crossovers. The simplest crossovers win ties.
  """
  points: dict[tuple[int, int, int], dict[str, float]] = {}
  for t in times:
    points.setdefault(t[1:4], {})[t.strategy] = t.ms
  points = {point: found for point, found in points.items() if len(found) > 1}
  best = None
  for steps in _candidates(points):
    logs = [0.0] if not points else []
    for point, measured in points.items():
      chosen = next(s.strategy for s in steps if s.holds(*point))
      if chosen not in measured:
        break
      logs.append(math.log(measured[chosen] / min(measured.values())))
    else:
      regret = math.exp(sum(logs) / len(logs))
      if best is None or regret < best.regret - 1e-9:
        best = Fit(steps, regret)
  return best


def _candidates(points) -> Iterator[tuple[Step, ...]]:
  """Yields crossovers from the simplest on."""
  names = sorted({name for measured in points.values() for name in measured})
  tokens = sorted({n for n, _, _ in points})[:-1]
  pairs = sorted({n * a / e for n, a, e in points})[:-1]
  for last in names:
    yield (Step(last),)
  for first, last in itertools.permutations(names, 2):
    for n in tokens:
      yield (Step(first, max_tokens=n), Step(last))
    for p in pairs:
      yield (Step(first, max_pairs=p), Step(last))
  for few, some, many in itertools.permutations(names, 3):
    for p, n in itertools.product(pairs, tokens):
      yield (Step(few, max_pairs=p), Step(some, max_tokens=n), Step(many))


def line(device_kind: str, format: str, found: Fit) -> str:
  """Returns a line of `choices.CROSSOVERS`."""

  def step(s: Step):
    bounds = {k: v for k, v in s._asdict().items() if k != "strategy" and v != math.inf}
    return f'Step("{s.strategy}"{"".join(f", {k}={v:g}" for k, v in bounds.items())})'

  steps = ", ".join(map(step, found.steps))
  steps += "," if len(found.steps) == 1 else ""
  return (
    f'  ("{device_kind}", "{format}"): ({steps}),  # {found.regret:.2f} x the fastest on average'
  )


def lines(device_kind: str, records: Sequence[dict[str, Any]]) -> list[str]:
  """Returns a line for each format with records of experts that are right and were timed."""
  found = []
  for format in dict.fromkeys(r["format"] for r in records):
    times = [
      Time(r["strategy"], r["num_tokens"], r["experts_per_token"], r["num_experts"], r["ms"])
      for r in records
      if r["format"] == format and r.get("differs") is None
    ]
    if times and (best := fit(times)):
      found.append(line(device_kind, format, best))
  return found
