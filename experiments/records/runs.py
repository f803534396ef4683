"""Runs: the results of one method on examples, as a folder that other programs read.

    RUN/settings.json    everything the results depend on, the run's name and command
    RUN/examples.jsonl   one line per (task, example, seed), sorted when complete
    RUN/costs.jsonl      one line of costs per batch
    RUN/summary.json     means, their standard errors, and total costs; written last

A line of `examples.jsonl` has "task", "example" (an id that is equal in all runs and pairs
them), "seed" (of the routing noise), "metrics" ({name: number}) and anything else that a
program adds. A line of `costs.jsonl` has "task", "seed" and numbers to sum ("tokens",
"forward_passes", "flops", "seconds", ...). The metrics of `summary.json` include the
perplexities of references, see `means`. A killed run resumes. Only process 0 reads and
writes; all processes know what is done.
"""

from collections.abc import Collection, Iterable, Set
import json
import pathlib
import shlex
import sys
from typing import Any

import numpy as np

from experiments.cli import app, text_files
from experiments.records import store
from experiments.records.store import read_lines
from roe_jax import typed
from roe_jax.checkpoint_folder import resolved

SETTINGS, EXAMPLES, COSTS, SUMMARY = (
  "settings.json",
  "examples.jsonl",
  "costs.jsonl",
  "summary.json",
)
COMMAND = "command"
# (task, example, seed)
Key = tuple[str, str, int]


# The types of a line of `examples.jsonl`; metrics that are not finite are null.
KINDS: dict[str, Any] = {
  "task": str,
  "example": str | int,
  "seed": int,
  "metrics": dict[str, float | bool | None],
}


def key(record: dict[str, Any]) -> Key:
  """Returns the key of a line of `examples.jsonl`."""
  return record["task"], str(record["example"]), int(record["seed"])


def claim(
  path: pathlib.Path, settings: dict[str, Any], kept: tuple[str, ...] = ()
) -> dict[str, Any]:
  """Writes the settings of a run into its folder, or checks those that are there.

  Args:
    path: the folder.
    settings: the settings.
    kept: settings that may differ from those in the folder, which stay.

  Returns:
    The settings in the folder.

  Raises:
    ValueError: the folder has a run with other settings.
  """
  wanted = json.loads(text_files.to_json(settings))
  found = path / SETTINGS
  if not found.is_file():
    command = shlex.join(
      ["python", "-m", f"experiments.{pathlib.Path(sys.argv[0]).stem}", *sys.argv[1:]]
    )
    app.write_atomically(found, text_files.to_json(wanted | {COMMAND: command}, indent=2) + "\n")
    return wanted
  try:
    there = typed.read(found)
  except ValueError as error:
    raise ValueError(f"{error}: choose another folder or delete {path}") from error
  there.pop(COMMAND, None)
  wanted |= {name: there[name] for name in kept if name in there}
  differing = sorted(k for k in there.keys() | wanted.keys() if there.get(k) != wanted.get(k))
  if differing:
    raise ValueError(
      f"{path} has a run with other settings ({', '.join(differing)}): choose another folder "
      "or delete it"
    )
  return there


class Run:
  """A run in progress.

  Attributes:
    path: its folder.
    name: its name in tables.
    done: keys of the examples that are done.
    cost_lines: lines of `costs.jsonl`.
  """

  def __init__(self, path: str | pathlib.Path, name: str | None, settings: dict[str, Any]):
    """Opens or creates a folder.

    Args:
      path: the folder.
      name: its name in tables; None for the name that its folder had when it was created.
      settings: everything that its results depend on.

    Raises:
      ValueError: the folder has a run with another name or other settings.
    """
    self.path = pathlib.Path(path)
    kept = () if name else ("name",)
    wanted = {"name": name or resolved(self.path).name, **settings}
    self.name = app.from_first_process(lambda: claim(self.path, wanted, kept)["name"])
    self._examples = store.Store(self.path / EXAMPLES, key, kinds=KINDS)
    self._costs = store.Store(self.path / COSTS, None)

  @property
  def done(self) -> Set[Key]:
    return self._examples.records.keys()

  @property
  def cost_lines(self) -> Collection[dict[str, Any]]:
    return self._costs.records.values()

  def write(self, records: Iterable[dict[str, Any]], costs: dict[str, Any] | None = None) -> None:
    """Appends lines of examples and one line of their costs."""
    if costs is not None:  # first, so that a kill in between does not lose costs
      self._costs.add([costs])
    self._examples.add(records)

  def finish(self) -> dict[str, Any]:
    """Sorts the lines; writes and returns the summary."""
    self._examples.replace(sorted(self._examples.records.values(), key=key))
    tasks = means(self._examples.records.values())
    found = {"name": self.name, "tasks": tasks, "costs": self.costs()}
    app.write_atomically(self.path / SUMMARY, text_files.to_json(found, indent=2) + "\n")
    return found

  def costs(self) -> dict[str, float]:
    """Sums the numbers of `costs.jsonl`; takes the maximum of those named "peak_..."."""
    total: dict[str, float] = {}
    for line in self.cost_lines:
      for name, value in line.items():
        if name in ("task", "seed") or type(value) not in (int, float):
          continue
        largest = name.startswith("peak_")
        total[name] = max(total.get(name, value), value) if largest else total.get(name, 0) + value
    return total


def means(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Returns the means of each task's metrics over examples and seeds.

  The metrics also include "perplexity" and "fitted_perplexity" = exp(sum of "nll" or "fitted_nll" /
  sum of "tokens"), where measured, and "word_perplexity" and "fitted_word_perplexity", per "words".

  Returns:
    {task: {"examples", "seeds", "metrics", "standard_errors", "std_over_seeds"}}, the last three
    {metric: number}. Standard errors are over examples, whose seeds are averaged first, those of
    perplexities by the delta method; both they and standard deviations of the seeds' means are
    left out where there is only one example or seed.
  """
  by_task: dict[str, list[dict[str, Any]]] = {}
  for record in records:
    by_task.setdefault(record["task"], []).append(record)
  return {task: _summary(lines) for task, lines in sorted(by_task.items())}


def _summary(lines):
  """Returns the entry of one task in `means`."""
  found: dict[str, dict[str, float]] = {"metrics": {}, "standard_errors": {}, "std_over_seeds": {}}

  def add(name, statistics):
    for kind, value in zip(found, statistics):
      if value is not None:
        found[kind][name] = float(value)

  for name in sorted(set().union(*(r["metrics"] for r in lines))):
    some = [r for r in lines if name in r["metrics"]]
    add(name, _ratio(some, name))
  for weight, of in {"tokens": "", "words": "word_"}.items():
    for fitted in ("", "fitted_"):
      name = f"{fitted}nll"
      if some := [r for r in lines if name in r["metrics"] and r["metrics"].get(weight)]:
        value, error, spread = _ratio(some, name, weight, np.exp)
        add(f"{fitted}{of}perplexity", (value, error and value * error, spread))
  return {
    "examples": len({str(r["example"]) for r in lines}),
    "seeds": len({r["seed"] for r in lines}),
    **found,
  }


def _ratio(lines, name, weight=None, of=lambda ratio: ratio):
  """Returns of(sum / sum of weights), the standard error of the ratio, and std of `of` by seed."""
  values = np.array([r["metrics"][name] for r in lines], float)
  weights = np.array([r["metrics"][weight] if weight else 1.0 for r in lines], float)
  ratio = values.sum() / weights.sum()
  example = np.unique([str(r["example"]) for r in lines], return_inverse=True)[1]
  seeds, seed = np.unique([r["seed"] for r in lines], return_inverse=True)
  # Taylor's linearization of a ratio (Cochran, 1977); of a mean it is the usual formula.
  residuals = np.bincount(example, values - ratio * weights)
  count = len(residuals)
  error = spread = None
  if count > 1:
    error = np.sqrt(count / (count - 1) * np.square(residuals).sum()) / weights.sum()
  if len(seeds) > 1:
    spread = of(np.bincount(seed, values) / np.bincount(seed, weights)).std(ddof=1)
  return of(ratio), error, spread


def load(path: str | pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
  """Loads the settings, examples and summary of a finished run.

  Raises:
    FileNotFoundError: the folder is not a finished run.
    ValueError: a file of it is damaged.
  """
  path = pathlib.Path(path)
  for name in (SETTINGS, EXAMPLES, SUMMARY):
    if not (path / name).is_file():
      raise FileNotFoundError(
        f"{path} has no {name}, so it is not a finished run: rerun the program that writes it"
      )
  return (
    typed.read(path / SETTINGS),
    read_lines(path / EXAMPLES, kinds=KINDS),
    typed.read(path / SUMMARY),
  )
