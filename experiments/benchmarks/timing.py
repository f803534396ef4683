"""Cases that take turns, and what to make of their times."""

from collections.abc import Callable, Mapping
import dataclasses
import time
from typing import Any

import jax
import numpy as np

# A timed call repeats what is faster than this, so that calling it does not count.
SHORTEST = 0.02
# What takes longer than this needs no call before it to be timed as always.
LONG = 1.0
# A case stops taking turns after so many seconds, with three turns at least.
BUDGET = 15.0

_compiled = {}


def compiled(function: Callable, *args: Any) -> Callable:
  """The program that a jitted function is for these arguments, compiled once."""
  leaves, tree = jax.tree.flatten(args)
  key = function, tree, tuple((x.shape, str(x.dtype)) if hasattr(x, "shape") else x for x in leaves)
  if key not in _compiled:
    _compiled[key] = function.lower(*args).compile()
  return _compiled[key]


def memory(program: Any) -> dict[str, int]:
  """Bytes of a compiled program's arguments and temporaries, where the backend tells."""
  found = program.memory_analysis()
  if found is None:
    return {}
  return {"argument_bytes": found.argument_size_in_bytes, "temp_bytes": found.temp_size_in_bytes}


@dataclasses.dataclass
class Timed:
  """A call that takes turns.

  Attributes:
    call: does its work `count` times and waits for it: `call(count)`.
    count: times in a timed call.
    turns: rounds that it takes part in.
    warms: whether an untimed call comes before each timed one.
  """

  call: Callable[[int], None]
  count: int = 1
  turns: int = 0
  warms: bool = True

  def try_out(self, rounds: int) -> None:
    """Calls once, or twice if that is quick, and settles how often to call."""
    seconds = self._time(1)
    if seconds < LONG:
      seconds = self._time(1)
    self.count = int(np.clip(np.ceil(SHORTEST / seconds), 1, 100))
    self.warms = seconds < LONG
    self.turns = int(np.clip(BUDGET // seconds, min(3, rounds), rounds))

  def take_turn(self) -> float:
    """Seconds of doing the work once."""
    if self.warms:
      self.call(self.count)
    return self._time(self.count) / self.count

  def _time(self, count):
    begin = time.perf_counter()
    self.call(count)
    return time.perf_counter() - begin


def take_turns(
  calls: Mapping[str, Callable[[int], None]],
  rounds: int,
  seed: int = 0,
  on_turn: Callable[[], Any] = lambda: None,
) -> dict[str, np.ndarray]:
  """Seconds of each call in each round, `[rounds]`; NaN where it took no part.

  In every round each call has one turn, in an order that changes: what else
  the machine does falls on all alike. A call after another one is slower than
  after itself, so an untimed one comes first. Slow calls, where that does not
  show, do without it, and take part in fewer rounds.

  Args:
    calls: see `Timed`; compiled already.
    rounds: how many.
    seed: of the order.
    on_turn: called after each call's turn, and once for each it misses.
  """
  timed = {name: Timed(call) for name, call in calls.items()}
  for t in timed.values():
    t.try_out(rounds)
  seconds = {name: np.full(rounds, np.nan) for name in timed}
  random = np.random.default_rng(seed)
  names = list(timed)
  for turn in range(rounds):
    for i in random.permutation(len(names)):
      if turn < timed[names[i]].turns:
        seconds[names[i]][turn] = timed[names[i]].take_turn()
      on_turn()
  return seconds


def quartiles(values: np.ndarray) -> tuple[float, float, float]:
  """Lower quartile, median and upper quartile of what was measured."""
  return tuple(float(q) for q in np.nanquantile(values, (0.25, 0.5, 0.75)))


def median_ratio(values: np.ndarray, others: np.ndarray) -> float:
  """Median of the ratios within the rounds that have both."""
  return float(np.nanmedian(values / others))
