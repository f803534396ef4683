"""Timing of calls in turns, and statistics of the times."""

from collections.abc import Callable, Mapping
import dataclasses
import time
from typing import Any, TypeVar

import jax
import numpy as np

Name = TypeVar("Name")
# Seconds: faster calls are repeated within a turn, so that call overhead does not count.
SHORTEST = 0.02
# Seconds: slower calls need no warm-up.
LONG = 1.0
# Seconds of turns after which a call drops out, after three turns at least.
BUDGET = 15.0

_compiled = {}


def compiled(function: Callable, *args: Any) -> Callable:
  """Returns a jitted function compiled for these arguments; compiles each program once."""
  leaves, tree = jax.tree.flatten(args)
  key = function, tree, tuple((x.shape, str(x.dtype)) if hasattr(x, "shape") else x for x in leaves)
  if key not in _compiled:
    _compiled[key] = function.lower(*args).compile()
  return _compiled[key]


def memory(program: Any) -> dict[str, int]:
  """Returns the bytes of a program's arguments and temporaries, if the backend reports them."""
  found = program.memory_analysis()
  if found is None:
    return {}
  return {"argument_bytes": found.argument_size_in_bytes, "temp_bytes": found.temp_size_in_bytes}


@dataclasses.dataclass
class Timed:
  """A call that takes turns.

  Attributes:
    call: `call(count)` repeats the work `count` times and waits for the results.
    count: repetitions per turn.
    turns: number of rounds it takes part in.
    warms: whether an untimed call precedes each timed one.
  """

  call: Callable[[int], object]
  count: int = 1
  turns: int = 0
  warms: bool = True

  def try_out(self, rounds: int) -> None:
    """Calls once, or twice if that is fast, and sets the other attributes."""
    seconds = self._time(1)
    if seconds < LONG:
      seconds = self._time(1)
    self.count = int(np.clip(np.ceil(SHORTEST / seconds), 1, 100))
    self.warms = seconds < LONG
    self.turns = int(np.clip(BUDGET // seconds, min(3, rounds), rounds))

  def take_turn(self) -> float:
    """Takes a turn and returns the seconds per repetition."""
    if self.warms:
      self.call(self.count)
    return self._time(self.count) / self.count

  def _time(self, count):
    begin = time.perf_counter()
    self.call(count)
    return time.perf_counter() - begin


def take_turns(
  calls: Mapping[Name, Callable[[int], object]],
  rounds: int,
  seed: int = 0,
  on_turn: Callable[[], object] = lambda: None,
) -> dict[Name, np.ndarray]:
  """Returns the seconds of each call in each round, `[rounds]`; NaN where it took no part.

  In every round each call has one turn, in shuffled order, so that other load on the machine
  affects all alike. A call is slower after another call than after itself, so an untimed one
  comes first; slow calls, where this is negligible, skip it and take part in fewer rounds.

  Args:
    calls: compiled calls by name, see `Timed`.
    rounds: number of rounds.
    seed: seed for the order.
    on_turn: called after each call's turn, and for each turn it skips.
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


def repeated(call: Callable[[], Any]) -> Callable[[int], None]:
  """Returns a call for `Timed` that repeats one without arguments."""

  def run(count):
    for _ in range(count):
      jax.block_until_ready(call())

  return run


def ratios(
  calls: Mapping[str, Callable[[], Any]], reference: str, rounds: int = 5
) -> dict[str, float]:
  """Returns the median time of calls, made in turns, relative to that of one of them."""
  seconds = take_turns({name: repeated(call) for name, call in calls.items()}, rounds)
  return {name: median_ratio(of, seconds[reference]) for name, of in seconds.items()}


def quartiles(values: np.ndarray) -> tuple[float, float, float]:
  """Returns lower quartile, median and upper quartile, ignoring NaN."""
  lower, median, upper = map(float, np.nanquantile(values, (0.25, 0.5, 0.75)))
  return lower, median, upper


def median_ratio(values: np.ndarray, others: np.ndarray) -> float:
  """Returns the median of the ratios within the rounds that have both."""
  return float(np.nanmedian(values / others))
