"""The search for temperatures, or for SCMoE's β: trials of one study, run by one or more processes.

The study is an Optuna study in SQLite. Its workers take trials until their shared budget is
spent. A worker holds a file lock while it runs a trial; the system releases it when the worker
ends for any reason, so an unfinished trial with a free lock was lost, and is repeated. (SQLite
itself needs working file locks, too.) Claims are made under another lock.

Trials see the same examples in the same order with the same noise. After each batch, a trial
that is significantly worse than the best one so far, by a signed-rank test on the examples
seen, is pruned. Its value is extrapolated by assuming the same mean difference from the best
trial on the other examples, so that the sampler learns from it, too. (Optuna's WilcoxonPruner
makes the same test, but needs a transaction per example, which takes longer than a small
model.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import math
import pathlib
import time
from typing import Any, Protocol

import numpy as np

from checkpoints_convert import outputs
from experiments.cli.extras import optuna, scipy
from experiments.records import store
from experiments.records.cost import Cost
from roe_jax.typed import check, check_keys

STEP = 0.05  # of the sweep
# Probability of pruning a trial that is no worse than the best one.
PRUNING_ERROR = 0.05
MIN_EXAMPLES = 8  # before the first test
TRIALS = "trials.jsonl"

_STUDY = "temperatures"
_VALUES, _MADE = "values", "made"  # attributes of trials
_RESULTS = dict(
  state=str, examples=int, seconds=float, tokens=int, forward_passes=int
)  # of a trial that was made
_POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Space:
  """The search space: τ is 0 in the first and last layers, and in [0, T] in the others.

  Attributes:
    num_layers: layers of the model.
    fixed_layers: number of first and of last layers that stay at 0.
    max_tau: largest τ.
  """

  num_layers: int
  fixed_layers: int
  max_tau: float

  def __post_init__(self):
    if not 0 <= 2 * self.fixed_layers < self.num_layers:
      raise ValueError(
        f"fixed_layers must leave at least one of the model's {self.num_layers} layers free: give "
        f"0 to {(self.num_layers - 1) // 2}, got {self.fixed_layers}"
      )
    if not (math.isfinite(self.max_tau) and self.max_tau > 0):
      raise ValueError(f"max_tau must be finite and above 0, got {self.max_tau}")

  @property
  def noisy_layers(self) -> tuple[int, int]:
    """Range of layers that may have noise, as in `Roster.create`."""
    return self.fixed_layers, self.num_layers - self.fixed_layers

  @property
  def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
    return {
      _parameter(layer): optuna.distributions.FloatDistribution(0.0, self.max_tau)
      for layer in range(*self.noisy_layers)
    }

  def temperatures(self, params: dict[str, float]) -> list[float]:
    """Returns `[L]` τ of each layer."""
    return [params.get(_parameter(layer), 0.0) for layer in range(self.num_layers)]

  def settings(self, params: dict[str, float]) -> dict[str, Any]:
    """Returns the roster settings that a trial has besides τ."""
    del params
    return {}

  def sweep(self) -> list[float]:
    """Returns τ for all layers in steps of `STEP` up to T; T alone if it is smaller."""
    count = math.floor(self.max_tau / STEP + 1e-6)
    return [round(STEP * i, 6) for i in range(1, count + 1)] or [self.max_tau]


def _parameter(layer):
  return f"layer_{layer}"


@dataclasses.dataclass(frozen=True)
class BetaSpace(Space):
  """The search space of SCMoE's β (arXiv 2405.14507), in [0, max_beta].

  τ is `max_tau` in all layers but the fixed ones: weak members without randomness take any.

  Attributes:
    alpha: of `aggregation.contrast`.
    max_beta: largest β.
  """

  alpha: float
  max_beta: float

  def __post_init__(self):
    super().__post_init__()
    if not (math.isfinite(self.max_beta) and self.max_beta > 0):
      raise ValueError(f"max_beta must be finite and above 0, got {self.max_beta}")

  @property
  def distributions(self):
    return {"beta": optuna.distributions.FloatDistribution(0.0, self.max_beta)}

  def temperatures(self, params):
    layers = range(*self.noisy_layers)
    return [self.max_tau if layer in layers else 0.0 for layer in range(self.num_layers)]

  def settings(self, params):
    return {"aggregation": f"contrast(alpha={self.alpha:g},beta={params['beta']:.6g})"}

  def sweep(self):
    return Space(1, 0, self.max_beta).sweep()


def check_budget(space: Space, num_trials: int) -> None:
  """Checks that there are enough trials for the sweep.

  Raises:
    ValueError: there are not.
  """
  if num_trials < len(space.sweep()):
    raise ValueError(
      f"num_trials must be at least {len(space.sweep())}, the steps of {STEP} up to "
      f"{space.sweep()[-1]:g} that a search starts with; got {num_trials}"
    )


class Objective(Protocol):
  """The objective of a search."""

  name: str
  maximize: bool

  def measure(
    self, temperatures: Sequence[float], part: slice, **settings: Any
  ) -> tuple[np.ndarray, Cost]:
    """Returns `[X]` numbers of a slice of the examples, and the cost; see `Space.settings`."""
    ...

  def value(self, values: np.ndarray) -> float:
    """Returns the objective from the numbers of all examples; it grows with their mean."""
    ...


@dataclasses.dataclass(frozen=True)
class Trial:
  """A trial; a line of `trials.jsonl`.

  Attributes:
    number: in order of creation.
    kind: "sweep" or "tpe".
    state: "complete"; "pruned": stopped after some examples; "failed": its worker was lost,
      and it was repeated under another number; "running".
    temperatures: τ of each layer.
    value: the objective, extrapolated if pruned; None if failed or running.
    settings: other roster settings of the trial.
    examples: number of examples measured.
    tokens, forward_passes, seconds: see `Cost`.
  """

  number: int
  kind: str
  state: str
  temperatures: list[float]
  value: float | None
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  examples: int = 0
  seconds: float = 0.0
  tokens: int = 0
  forward_passes: int = 0


def _database_errors():
  """Returns what a damaged study raises: errors of the database, or of values read from it."""
  import sqlalchemy.exc

  stored = (optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError)
  return (*stored, ValueError, KeyError, AssertionError, TypeError)


class Search:
  """A new or resumed study.

  Args:
    folder: of the study; created if missing.
    space: the search space.
    num_trials: the budget in trials, starting with the sweep.
    maximize: whether to maximize the objective.
    seed: for the sampler.

  Raises:
    ValueError: a setting is out of range, or the study in the folder is damaged.
  """

  def __init__(
    self, folder: pathlib.Path, space: Space, num_trials: int, maximize: bool, seed: int = 0
  ):
    check_budget(space, num_trials)
    self.folder, self.space, self.maximize = folder, space, maximize
    self.num_trials, self._seed = num_trials, seed
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (folder / "running").mkdir(parents=True, exist_ok=True)
    with self.locked():
      path = folder / "study.db"
      try:
        storage = optuna.storages.RDBStorage(
          f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 300}}
        )
        self._study = optuna.create_study(
          storage=storage,
          study_name=_STUDY,
          load_if_exists=True,
          direction="maximize" if maximize else "minimize",
        )
        known = self._study.get_trials(deepcopy=False)
        for trial in known:  # or those without results would be waited for
          if trial.state == optuna.trial.TrialState.COMPLETE:
            check_keys("a trial", trial.user_attrs, {_VALUES: list, _MADE: dict}, others=True)
            check_keys("a trial", trial.user_attrs[_MADE], _RESULTS)
            check("its value", trial.value, float)
      except _database_errors() as error:
        raise ValueError(
          f"{path} is damaged ({str(error).splitlines()[0]}): restore it, or delete {folder} to "
          "search again"
        ) from error
      for temperature in space.sweep()[len(known) :]:
        self._study.enqueue_trial(
          dict.fromkeys(space.distributions, temperature), user_attrs={"kind": "sweep"}
        )

  def trials(self) -> list[Trial]:
    """Returns all started trials, by number."""
    found = self._study.get_trials(deepcopy=False)
    return [self._describe(t) for t in found if t.state != optuna.trial.TrialState.WAITING]

  @property
  def num_finished(self) -> int:
    return sum(t.state in ("complete", "pruned") for t in self.trials())

  def best(self, kind: str | None = None) -> Trial | None:
    """Returns the best complete trial (of a kind), the first if tied."""
    done = [t for t in self.trials() if t.state == "complete" and kind in (None, t.kind)]
    sign = -1 if self.maximize else 1
    return min(done, key=lambda t: (sign * (t.value or 0.0), t.number), default=None)

  def run(
    self,
    objective: Objective,
    batches: Sequence[slice],
    prune: bool = True,
    on_trial: Callable[[], object] = lambda: None,
  ) -> None:
    """Runs trials until the budget is spent and other workers have finished theirs.

    Args:
      objective: what to optimize.
      batches: slices of the examples.
      prune: whether to stop hopeless trials.
      on_trial: called after every trial, and while waiting for others.
    """
    while True:
      with self._next() as trial:
        if trial is not None:
          self._make(trial, objective, batches, prune)
      if trial is None:
        if self.num_finished >= self.num_trials:
          return
        time.sleep(_POLL_SECONDS)
      on_trial()

  def export(self) -> None:
    """Rewrites `trials.jsonl`."""
    store.write_lines(self.folder / TRIALS, map(dataclasses.asdict, self.trials()))

  @contextlib.contextmanager
  def _next(self) -> Iterator[optuna.Trial | None]:
    """Claims the next trial for this worker; None while there is none."""
    with contextlib.ExitStack() as held:
      with self.locked():
        trial = self._claimed()
        if trial is not None:
          path = self._lock_of(trial.number)
          held.enter_context(lock_on(path))
          held.callback(path.unlink)
      yield trial

  def _claimed(self):
    trials = self._study.get_trials(deepcopy=False)
    for trial in trials:
      if trial.state == optuna.trial.TrialState.RUNNING and _is_free(self._lock_of(trial.number)):
        self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        self._lock_of(trial.number).unlink()
        self._study.add_trial(
          optuna.create_trial(
            state=optuna.trial.TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs=trial.user_attrs,
            system_attrs=trial.system_attrs,
          )
        )
    trials = self._study.get_trials(deepcopy=False)
    begun = sum(
      t.state in (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.RUNNING) for t in trials
    )
    if begun >= self.num_trials:
      return None
    # Each trial has its own seed, so it does not matter which process runs it.
    seed = int(np.random.SeedSequence([self._seed, begun]).generate_state(1)[0])
    self._study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return self._study.ask(self.space.distributions)

  def _make(self, trial, objective, batches, prune):
    cost, values = Cost(), np.empty(0)
    temperatures, pruned = self.space.temperatures(trial.params), False
    settings = self.space.settings(trial.params)
    best = self._values_of_best() if prune else None
    for batch in batches:
      found, of_batch = objective.measure(temperatures, batch, **settings)
      values, cost = np.concatenate([values, found]), cost + of_batch
      if not np.all(np.isfinite(found)):
        raise ValueError(
          f"the model gives no finite {objective.name} at τ = {temperatures}"
          + "".join(f", {name} = {value}" for name, value in settings.items())
        )
      if best is not None and batch is not batches[-1]:
        pruned = is_hopeless(values, best, self.maximize, len(batches) - 1)
        if pruned:
          break
    seen = len(values)
    if pruned and best is not None:
      values = np.concatenate([values, best[seen:] + np.mean(values - best[:seen])])
    trial.set_user_attr(_VALUES, values.tolist())
    trial.set_user_attr(
      _MADE,
      {
        "state": "pruned" if pruned else "complete",
        "examples": seen,
        **{name: getattr(cost, name) for name in ("tokens", "forward_passes", "seconds")},
      },
    )
    with self.locked():  # so that it is not mistaken for a lost trial
      self._study.tell(trial, objective.value(values))
      self.export()

  def _values_of_best(self):
    best = self.best()
    if best is not None:
      return np.array(self._study.get_trials(deepcopy=False)[best.number].user_attrs[_VALUES])

  def _describe(self, trial: optuna.trial.FrozenTrial) -> Trial:
    state = "failed" if trial.state == optuna.trial.TrialState.FAIL else "running"
    return Trial(
      **{
        "number": trial.number,
        "kind": trial.user_attrs.get("kind", "tpe"),
        "state": state,
        "value": trial.value,
        "temperatures": self.space.temperatures(trial.params),
        "settings": self.space.settings(trial.params),
        **(
          trial.user_attrs.get(_MADE, {}) if trial.state == optuna.trial.TrialState.COMPLETE else {}
        ),
      }
    )

  def locked(self) -> contextlib.AbstractContextManager[Any]:
    """Returns a lock for exclusive use of the folder's files."""
    return lock_on(self.folder / "lock")

  def _lock_of(self, number):
    return self.folder / "running" / str(number)


def is_hopeless(values: np.ndarray, best: np.ndarray, maximize: bool, looks: int) -> bool:
  """Whether a trial is significantly worse than the best one, on the examples seen so far.

  Its mean is worse, and so is it by the one-sided signed-rank test (Wilcoxon, 1945). With
  Bonferroni's correction over all looks, at most a share `PRUNING_ERROR` of the trials that
  are no worse is pruned, if differences are symmetric.

  Args:
    values: `[X']` of the trial.
    best: `[X]` of the best one, starting with the same examples.
    maximize: whether larger is better.
    looks: maximum number of looks at a trial.
  """
  if len(values) < MIN_EXAMPLES:
    return False
  worse = (values - best[: len(values)]) * (-1 if maximize else 1)
  if worse.mean() <= 0:
    return False
  # Zeros count half on either side: many examples may be equally right.
  test = scipy.stats.wilcoxon(worse, alternative="greater", zero_method="zsplit")
  return bool(test.pvalue < PRUNING_ERROR / looks)


@contextlib.contextmanager
def lock_on(path: pathlib.Path) -> Iterator[None]:
  """Holds a lock that only one process can hold, and that is released when it ends."""
  with open(path, "w", encoding="utf-8") as file:
    outputs.lock_file(file.fileno())
    yield


def _is_free(path):
  with open(path, "w", encoding="utf-8") as file:
    return outputs.lock_file(file.fileno(), wait=False)
