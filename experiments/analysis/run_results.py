"""Loads runs and searches for reports, and checks that runs are comparable."""

from collections.abc import Sequence
import dataclasses
import glob
import pathlib
import re
from typing import Any

import numpy as np

from experiments.analysis.calibration_error import Events
from experiments.cli import text_files
from experiments.records import runs, store
from roe_jax import typed
from roe_jax.checkpoint_folder import resolved

# Metrics that are a task's result, in order of preference.
QUALITY = ("exact_match", "acc", "pass@1")
NLL, FITTED_NLL, TOKENS = "nll", "fitted_nll", "tokens"
# Settings that must be equal in compared runs, where both have them.
SAME = ("split", "chat", "system", "num_fewshot")
TEMPERATURES = "output_temperatures.json"
PROFILE, TRIALS = "profile.json", "trials.jsonl"


@dataclasses.dataclass(frozen=True)
class Result:
  """A finished run.

  Attributes:
    path: its folder.
    label: its name in tables, unique in a report.
    settings: its settings.json.
    records: {task: {example: {seed: line of examples.jsonl}}}.
    costs: lines of costs.jsonl.
    output_temperatures: {task: output temperature of `FITTED_NLL`}, where recorded.
    fitted_on: {task: number of examples that it was fitted on}, where recorded.
  """

  path: pathlib.Path
  label: str
  settings: dict[str, Any]
  records: dict[str, dict[str, dict[int, dict[str, Any]]]]
  costs: list[dict[str, Any]]
  output_temperatures: dict[str, float]
  fitted_on: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def model(self) -> str | None:
    """The fingerprint of the model; None: not recorded."""
    model = self.settings.get("model")
    return str(model.get("routers")) if isinstance(model, dict) else model

  @property
  def measured_by(self) -> str | None:
    """What measured its costs: `cost.MEASURED_BY`, or an earlier program; None: not recorded."""
    for line in self.costs:
      if "measured_by" in line:
        return line["measured_by"]
    command = self.settings.get(runs.COMMAND, "")
    program = re.search(r"experiments\.(compare|evaluate|tune)\b", command)
    return program and program[1]

  def seeds(self, task: str) -> list[int]:
    return sorted(set().union(*self.records.get(task, {}).values()))

  def examples(self, task: str, *names: str) -> list[str]:
    """Returns the examples that have all named metrics or arrays for all seeds, sorted."""
    seeds = self.seeds(task)
    return sorted(
      example
      for example, lines in self.records.get(task, {}).items()
      if all(
        seed in lines and all(n in lines[seed]["metrics"] or n in lines[seed] for n in names)
        for seed in seeds
      )
    )

  def metrics(self, task: str) -> list[str]:
    """Returns the names of the metrics of any example, in order."""
    return list(
      dict.fromkeys(
        name
        for lines in self.records.get(task, {}).values()
        for line in lines.values()
        for name in line["metrics"]
      )
    )

  def values(self, task: str, metric: str, examples: Sequence[str]) -> np.ndarray:
    """Returns `[X, S]` values of a metric by example and seed; `[X]` for one seed."""
    seeds, lines = self.seeds(task), self.records[task]
    table = np.array([[lines[e][s]["metrics"][metric] for s in seeds] for e in examples], float)
    return table[:, 0] if len(seeds) == 1 else table

  def events(self, task: str, examples: Sequence[str], confidences: str) -> Events:
    """Returns confidences and outcomes of examples, over all seeds."""
    seeds, lines = self.seeds(task), self.records[task]
    return Events.of(
      [np.concatenate([lines[e][s][confidences] for s in seeds]) for e in examples],
      [np.concatenate([lines[e][s]["correct"] for s in seeds]) for e in examples],
      len(seeds),
    )

  def cost(self, task: str, name: str) -> float | None:
    """Returns a cost of a task: the sum, or the maximum of a peak; None: not measured."""
    found = [
      line[name] for line in self.costs if line.get("task") == task and line.get(name) is not None
    ]
    if not found:
      return None
    return float(max(found) if name.startswith("peak_") else sum(found))

  def num_lines(self, task: str) -> int:
    """Returns the number of examples, each seed counted."""
    return sum(map(len, self.records[task].values()))


@dataclasses.dataclass(frozen=True)
class Tuning:
  """The results of a search by `experiments.tune`.

  Attributes:
    name: its name in tables, unique in a report.
    profile: its profile.json; empty if there is none yet.
    trials: lines of trials.jsonl, by number.
    command: that started it, if known.
  """

  name: str
  profile: dict[str, Any]
  trials: list[dict[str, Any]]
  command: str | None = None

  @property
  def measure(self) -> str:
    """The objective's name."""
    return str(self.profile.get("objective", {}).get("name", "objective"))

  @property
  def maximizes(self) -> bool:
    return self.measure.startswith("acc")

  def complete(self) -> list[dict[str, Any]]:
    return [t for t in self.trials if t["state"] == "complete" and t["value"] is not None]

  def baseline(self) -> float | None:
    """Returns the baseline's objective: the profile's, or that of a trial with all τ 0."""
    found = self.profile.get("objective", {}).get("baseline")
    return (
      found
      if found is not None
      else next((t["value"] for t in self.complete() if not any(t["temperatures"])), None)
    )


def load_runs(patterns: Sequence[str]) -> list[Result]:
  """Loads the runs in folders; a pattern with * stands for the matching folders with a run.

  Raises:
    FileNotFoundError: a folder has no finished run, or a pattern matches none.
    ValueError: a line is not a record of a run.
  """
  results = [_load(path) for path in _folders(patterns, runs.EXAMPLES, "run")]
  for name_of in (lambda r: r.path.name, lambda r: str(r.path)):  # if labels are not unique
    labels = [r.label for r in results]
    results = [
      r if labels.count(r.label) == 1 else dataclasses.replace(r, label=f"{r.label} ({name_of(r)})")
      for r in results
    ]
  return results


def _load(path):
  settings, lines, _ = runs.load(path)
  records: dict[str, dict[str, dict[int, Any]]] = {}
  for line in lines:
    task, example, seed = runs.key(line)
    records.setdefault(task, {}).setdefault(example, {})[seed] = line
  label = str(settings.get("label") or settings.get("name") or path.name)
  temperatures = {task: settings.get("output_temperature") for task in records}
  fitted = {}
  if (path / TEMPERATURES).is_file():
    fitted = typed.read(path / TEMPERATURES, dict[str, dict])
    for task, found in fitted.items():
      kinds = {"temperature": float | None, "examples": int}
      typed.check_keys(f"{task!r} of {path / TEMPERATURES}", found, kinds, others=True)
    temperatures |= {task: found["temperature"] for task, found in fitted.items()}
  return Result(
    path,
    label,
    settings,
    records,
    store.read_lines(path / runs.COSTS),
    {task: t for task, t in temperatures.items() if t is not None},
    {task: f["examples"] for task, f in fitted.items() if f["temperature"] is not None},
  )


def load_tunings(patterns: Sequence[str]) -> list[Tuning]:
  """Loads the searches in folders or patterns.

  Raises:
    FileNotFoundError: a folder has no trials, or a pattern matches none.
    ValueError: a file was not written by `experiments.tune`.
  """
  paths = _folders(patterns, TRIALS, "search")
  names = [path.name for path in paths]
  return [
    _load_tuning(path, name if names.count(name) == 1 else str(path))
    for path, name in zip(paths, names)
  ]


def _load_tuning(path, name):
  kinds = {"number": int, "state": str, "value": float | None, "temperatures": list[float]}
  try:
    profile = typed.read(path / PROFILE) if (path / PROFILE).is_file() else {}
    lines = store.read_lines(path / TRIALS, kinds=kinds)
  except ValueError as error:
    raise ValueError(
      f"{path} is not the folder of a search: its {PROFILE} or {TRIALS} cannot be read ({error})"
    ) from error
  trials = sorted(lines, key=lambda t: t["number"])
  settings = path / runs.SETTINGS
  command = typed.read(settings).get(runs.COMMAND) if settings.is_file() else None
  return Tuning(name, profile, trials, command)


def _folders(patterns, holding, what):
  found = []
  for pattern in patterns:
    paths = sorted(map(pathlib.Path, glob.glob(pattern))) if glob.has_magic(pattern) else None
    here = (
      [p for p in paths if (p / holding).is_file()]
      if paths is not None
      else [pathlib.Path(pattern)]
    )
    if not here:
      raise FileNotFoundError(f"{pattern} finds no folder of a {what} (one with {holding})")
    if paths is None and not (here[0] / holding).is_file():
      raise FileNotFoundError(f"{pattern} is not the folder of a {what}: it has no {holding}")
    found += [p for p in here if resolved(p) not in set(map(resolved, found))]
  return found


def find_baseline(results: Sequence[Result], name: str) -> Result:
  """Returns the run that others are compared with, by label, name, folder or method.

  Raises:
    ValueError: no run or several runs match.
  """
  names = (
    lambda r: r.label,
    lambda r: r.settings.get("name"),
    lambda r: r.path.name,
    lambda r: r.settings.get("method"),
  )
  for name_of in names:
    found = [r for r in results if name_of(r) == name]
    if len(found) == 1:
      return found[0]
    if found:
      raise ValueError(
        f"--baseline={name} matches {len(found)} runs: give one of "
        f"{', '.join(r.label for r in found)}"
      )
  raise ValueError(
    f"--baseline={name} matches none of the runs: give one of {', '.join(r.label for r in results)}"
  )


def check_comparable(results: Sequence[Result], baseline: Result) -> None:
  """Checks that differences between runs are due to their methods.

  Raises:
    ValueError: another model, split, prompt format or definition of costs; no task in common,
      or no example in common of a task.
  """
  for result in results:
    if not result.records.keys() & baseline.records.keys():
      raise ValueError(
        f"{result.path} cannot be compared with {baseline.path}: they have no task in common "
        f"({', '.join(sorted(result.records))}; {', '.join(sorted(baseline.records))})"
      )
    compared = [
      (name, *(r.settings[name] for r in (result, baseline)))
      for name in SAME
      if name in result.settings and name in baseline.settings
    ]
    if result.model and baseline.model:
      compared.append(("model", result.model, baseline.model))
    for name, theirs, ours in compared:
      if theirs != ours:
        raise ValueError(
          f"{result.path} cannot be compared with {baseline.path}: their {name} differs "
          f"({_short(theirs)}, {_short(ours)}); report them separately"
        )
    programs = {p for r in (result, baseline) if (p := r.measured_by)}
    if len(programs) > 1:
      raise ValueError(
        f"{result.path} cannot be compared with {baseline.path}: their costs were measured by "
        f"different definitions ({', '.join(sorted(programs))}), one of an earlier version: "
        "repeat that run, or report them separately"
      )
    for task in result.records.keys() & baseline.records.keys():
      if not result.records[task].keys() & baseline.records[task].keys():
        raise ValueError(
          f"{result.path} cannot be compared with {baseline.path}: they have no example of "
          f"{task} in common; run both with the same --split, --num_examples and data"
        )


def _short(value):
  text = value if isinstance(value, str) else text_files.to_json(value)
  return text if len(text) <= 40 else text[:37] + "..."


def paired(
  result: Result, ours: Sequence[str], baseline: Result, theirs: Sequence[str], task: str
) -> list[str]:
  """Returns examples for which the run has all of `ours` and the baseline all of `theirs`."""
  others = set(baseline.examples(task, *theirs))
  return [e for e in result.examples(task, *ours) if e in others]


def quality_metric(results: Sequence[Result], task: str) -> str | None:
  """Returns a task's main metric, 1 if right and 0 if wrong.

  This is the first of `QUALITY` that the runs have. The harness's metrics may have a filter
  after a comma ("exact_match,strict-match"); the first of several is taken.
  """
  found = list(dict.fromkeys(name for r in results for name in r.metrics(task)))
  return next(
    (name for wanted in QUALITY for name in found if name.partition(",")[0] == wanted), None
  )
