"""The search for temperatures: trials of one study, made by one or more processes.

The study lies in SQLite (Optuna). Whoever opens it takes trials until the budget,
which all share, is spent. A worker holds a file lock while it makes a trial; the
system frees it when the worker ends, however it ends, so that a trial whose lock
is free and which is not finished was lost, and is made again. (SQLite needs file
locks that work, too.) Every change of hands is made under one more lock.

Trials see the same examples in the same order with the same noise, and report the
difference of each example to the plain model. After every batch a trial that a
signed-rank test finds worse than the best one so far is given up. It then counts
as if the examples it did not see differed from the plain model as those that it
saw, so that the sampler learns from it, too.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import fcntl
import json
import math
import pathlib
import time
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from experiments import app
from experiments.objectives import Cost

STEP = 0.05  # of the sweep
# The share of trials no worse than the best one that may be given up by mistake.
PRUNING_ERROR = 0.05
MIN_EXAMPLES = 8  # before the first test
SAMPLERS = ("tpe", "sweep")
TRIALS = "trials.jsonl"

_STUDY = "temperatures"
_POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Space:
  """Which τ are tried: 0 in the first and last layers, and [0, T] in the others.

  Attributes:
    num_layers: L of the model.
    fixed_layers: how many of the first, and as many of the last, stay at 0.
    max_temperature: T.
  """

  num_layers: int
  fixed_layers: int
  max_temperature: float

  def __post_init__(self):
    if not 0 <= 2 * self.fixed_layers < self.num_layers:
      raise ValueError(
          f"fixed_layers must leave at least one of the model's {self.num_layers} layers between "
          f"the first and the last so many: it may be 0 to {(self.num_layers - 1) // 2}, got "
          f"{self.fixed_layers}")
    if not (math.isfinite(self.max_temperature) and self.max_temperature > 0):
      raise ValueError(f"max_temperature must be finite and above 0, got {self.max_temperature}")

  @property
  def noisy_layers(self) -> tuple[int, int]:
    """The stretch of layers that may have noise, as `Roster.create` takes it."""
    return self.fixed_layers, self.num_layers - self.fixed_layers

  @property
  def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
    return {_parameter(layer): optuna.distributions.FloatDistribution(0.0, self.max_temperature)
            for layer in range(*self.noisy_layers)}

  def temperatures(self, params: dict[str, float]) -> list[float]:
    """`[L]` τ of each layer."""
    return [params.get(_parameter(layer), 0.0) for layer in range(self.num_layers)]

  def sweep(self) -> list[float]:
    """One τ for all layers in steps of `STEP` up to T; T alone if it is smaller."""
    count = math.floor(self.max_temperature / STEP + 1e-6)
    return [round(STEP * i, 6) for i in range(1, count + 1)] or [self.max_temperature]


def _parameter(layer):
  return f"layer_{layer}"


class Objective(Protocol):
  """What a search optimises."""

  name: str
  maximize: bool

  def measure(self, temperatures: Sequence[float], part: slice) -> tuple[np.ndarray, Cost]:
    """`[X]` numbers of a stretch of the examples, and what measuring them took."""

  def value(self, values: np.ndarray) -> float:
    """The objective, from the numbers of all examples; it grows with their mean."""


@dataclasses.dataclass(frozen=True)
class Trial:
  """A trial as told to others; a line of `trials.jsonl`.

  Attributes:
    number: in the order of their making.
    kind: "sweep" or "tpe".
    state: "complete"; "pruned": given up after some of the examples;
      "failed": its worker was lost, and it was made again under another number;
      "running".
    temperatures: τ of each layer.
    value: the objective, estimated if pruned; None if failed or running.
    examples: that were measured.
    seconds: wall time, with what had to be compiled.
    tokens, forward_rows: see `objectives.Cost`.
  """

  number: int
  kind: str
  state: str
  temperatures: list[float]
  value: float | None
  examples: int = 0
  seconds: float = 0.0
  tokens: int = 0
  forward_rows: int = 0


class Search:
  """A study that is being made, or made further.

  Args:
    folder: of the study; made if it is not there.
    space: which τ are tried.
    num_trials: the budget in trials, sweep included; for "sweep" there are as
      many as it has steps.
    maximize: whether the objective is to be large.
    sampler: "tpe", which begins with the sweep, or "sweep" alone.
    seed: of the sampler.

  Raises:
    ValueError: a setting is out of its range.
  """

  def __init__(self, folder: pathlib.Path, space: Space, num_trials: int, maximize: bool,
               sampler: str = "tpe", seed: int = 0):
    self.folder, self.space, self.maximize = folder, space, maximize
    sweep = space.sweep()
    if sampler == "tpe" and num_trials < len(sweep):
      raise ValueError(
          f"num_trials must be at least {len(sweep)}, the steps of {STEP} up to "
          f"{space.max_temperature} with which the search begins; got {num_trials}")
    self.num_trials = len(sweep) if sampler == "sweep" else num_trials
    self._seed = seed
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (folder / "running").mkdir(parents=True, exist_ok=True)
    with self.locked():
      # Writers of one file take turns.
      storage = optuna.storages.RDBStorage(
          f"sqlite:///{folder / 'study.db'}", engine_kwargs={"connect_args": {"timeout": 300}})
      self._study = optuna.create_study(
          storage=storage, study_name=_STUDY, load_if_exists=True,
          direction="maximize" if maximize else "minimize")
      for temperature in sweep:
        self._study.enqueue_trial(dict.fromkeys(space.distributions, temperature),
                                  user_attrs={"kind": "sweep"}, skip_if_exists=True)

  def trials(self) -> list[Trial]:
    """All trials that were begun, by number."""
    return [self._told(t) for t in self._study.get_trials(deepcopy=False)
            if t.state != TrialState.WAITING]

  @property
  def num_finished(self) -> int:
    return sum(t.state in ("complete", "pruned") for t in self.trials())

  def best(self, kind: str | None = None) -> Trial | None:
    """The best complete trial (of a kind), the first of those that are equal."""
    done = [t for t in self.trials() if t.state == "complete" and kind in (None, t.kind)]
    sign = -1 if self.maximize else 1
    return min(done, key=lambda t: (sign * t.value, t.number), default=None)

  def run(self, objective: Objective, batches: Sequence[slice], baseline: np.ndarray,
          prune: bool = True, on_trial: Callable[[], None] = lambda: None) -> None:
    """Makes trials until the budget is spent and those of other workers are finished.

    Args:
      objective: what is optimised.
      batches: the examples in stretches.
      baseline: `[X]` the plain model's numbers.
      prune: whether hopeless trials are given up.
      on_trial: called after every trial, and while others are waited for.
    """
    looks = max(1, len(batches) - 1)
    pruner = (optuna.pruners.WilcoxonPruner(
        p_threshold=PRUNING_ERROR / looks, n_startup_steps=MIN_EXAMPLES)
        if prune else optuna.pruners.NopPruner())
    while True:
      with self._next() as trial:
        if trial is not None:
          self._study.pruner = pruner
          self._make(trial, objective, batches, baseline)
      if trial is not None:
        with self.locked():
          self.export()
      elif self.num_finished >= self.num_trials:
        return
      else:
        time.sleep(_POLL_SECONDS)
      on_trial()

  def export(self) -> None:
    """Writes `trials.jsonl` anew."""
    app.write_atomically(self.folder / TRIALS, "".join(
        json.dumps(dataclasses.asdict(t)) + "\n" for t in self.trials()))

  @contextlib.contextmanager
  def _next(self) -> Iterator[optuna.Trial | None]:
    """The next trial, which is this worker's alone; None while there is none to make."""
    with contextlib.ExitStack() as held:
      with self.locked():
        trial = self._claimed()
        if trial is not None:
          path = self._lock_of(trial.number)
          held.enter_context(_lock(path))
          held.callback(path.unlink)
      yield trial

  def _claimed(self):
    trials = self._study.get_trials(deepcopy=False)
    for trial in trials:
      if trial.state == TrialState.RUNNING and _is_free(self._lock_of(trial.number)):
        self._study.tell(trial.number, state=TrialState.FAIL)
        optuna.storages.RetryHeartbeatStaleTrialCallback()(self._study, trial)
    trials = self._study.get_trials(deepcopy=False)
    begun = sum(t.state in (TrialState.COMPLETE, TrialState.RUNNING) for t in trials)
    if begun >= self.num_trials:
      return None
    # Each trial has randomness of its own, so that it does not matter which process makes it.
    seed = int(np.random.SeedSequence([self._seed, begun]).generate_state(1)[0])
    self._study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return self._study.ask(self.space.distributions)

  def _make(self, trial, objective, batches, baseline):
    begin, cost, values = time.perf_counter(), Cost(), baseline.astype(float)
    temperatures, seen, pruned = self.space.temperatures(trial.params), 0, False
    for batch in batches:
      found, batch_cost = objective.measure(temperatures, batch)
      values[batch], cost, seen = found, cost + batch_cost, batch.stop
      if not np.all(np.isfinite(found)):
        raise ValueError(f"the model gives no finite {objective.name} at τ = {temperatures}")
      for i in range(batch.start, batch.stop):
        trial.report(values[i] - baseline[i], i)
      if seen < len(values) and trial.should_prune():
        pruned = True
        values[seen:] += np.mean(values[:seen] - baseline[:seen])
        break
    for name, value in {"pruned": pruned, "examples": seen, **dataclasses.asdict(cost),
                        "seconds": time.perf_counter() - begin}.items():
      trial.set_user_attr(name, value)
    self._study.tell(trial, objective.value(values))

  def _told(self, trial: FrozenTrial) -> Trial:
    attributes = dict(trial.user_attrs)
    pruned = attributes.pop("pruned", False)
    state = {TrialState.COMPLETE: "pruned" if pruned else "complete",
             TrialState.FAIL: "failed"}.get(trial.state, "running")
    return Trial(**{"number": trial.number, "kind": "tpe", "state": state, "value": trial.value,
                    "temperatures": self.space.temperatures(trial.params), **attributes})

  def locked(self) -> contextlib.AbstractContextManager[Any]:
    """Whoever holds it is alone with the folder's files."""
    return _lock(self.folder / "lock")

  def _lock_of(self, number):
    return self.folder / "running" / str(number)


@contextlib.contextmanager
def _lock(path):
  with open(path, "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _is_free(path):
  with open(path, "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return False
  return True
