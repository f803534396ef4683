"""The rows of a report's tables, before formatting.

Everything is paired by example; examples that either side lacks are left out and counted.
The tests of one table form one family for Holm's correction.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np

from experiments.analysis import calibration_error, paired_statistics
from experiments.analysis.calibration_error import Events
from experiments.analysis.paired_statistics import Comparison, Difference, Estimate
from experiments.analysis.run_results import FITTED_NLL, NLL, TOKENS, Result, paired, quality_metric

CONFIDENCES, FITTED_CONFIDENCES, CORRECT = "confidences", "fitted_confidences", "correct"
MEASURES = {"acc": "accuracy", "exact_match": "exact match", "pass@1": "pass@1"}


@dataclasses.dataclass(frozen=True)
class Quality:
  """A row of the main table.

  Attributes:
    result: the run.
    task: the task.
    metric: the metric's name in the run's records.
    examples: X, the examples that the baseline has, too.
    missing: examples that only one of the two runs has.
    value: in percent.
    between: standard deviation between seeds in points; None for one seed.
    comparison: with the baseline; None for the baseline itself.
  """

  result: Result
  task: str
  metric: str
  examples: int
  missing: int
  value: Estimate
  between: float | None
  comparison: Comparison | None


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """A row of the perplexity table: a run at output temperature 1 or at its fitted one.

  Attributes:
    result: the run.
    task: the task.
    fitted: whether the output temperature is the fitted one.
    examples: X.
    perplexity: of the references.
    between: its standard deviation between seeds; None for one seed.
    difference: relative difference from the baseline at T = 1; None for that itself.
    comparison: with the baseline at its fitted output temperature; None for the
      baseline, and where that was not measured.
  """

  result: Result
  task: str
  fitted: bool
  examples: int
  perplexity: Estimate
  between: float | None
  difference: Difference | None
  comparison: Comparison | None


@dataclasses.dataclass(frozen=True)
class Calibration:
  """A row of the calibration table: a run at output temperature 1 or at its fitted one.

  Attributes:
    result: the run.
    task: the task.
    fitted: whether the output temperature is the fitted one.
    events: confidences and outcomes.
    nll: mean negative log-probability of a token, nats, or None.
    error, width_error: ECE in equal-mass and in equal-width bins.
    brier: Brier score.
    error_difference: of the equal-mass ECE from the baseline at its fitted output
      temperature; None where `comparison` is None.
    comparison: of Brier scores with that baseline; None for the baseline, and where it was
      not measured or has other events (such as an answer instead of its tokens).
  """

  result: Result
  task: str
  fitted: bool
  events: Events
  nll: Estimate | None
  error: Estimate
  width_error: Estimate
  brier: Estimate
  error_difference: Difference | None
  comparison: Comparison | None


@dataclasses.dataclass(frozen=True)
class RunCost:
  """A row of the cost table; None: not measured.

  Attributes:
    result: the run.
    task: the task.
    tokens_per_second: median over batches.
    forward_passes: per example (tokens x members).
    flops: forward FLOPs per example.
    unique_experts: mean number of unique active experts per layer and token.
    peak_bytes: memory.
  """

  result: Result
  task: str
  tokens_per_second: float | None
  forward_passes: float | None
  flops: float | None
  unique_experts: float | None
  peak_bytes: float | None

  @property
  def ms_per_token(self) -> float | None:
    return self.tokens_per_second and 1e3 / self.tokens_per_second


@dataclasses.dataclass(frozen=True)
class Power:
  """Which differences the examples of a task can detect.

  Attributes:
    task: the task.
    measure: "accuracy", ...
    examples: X.
    discordance: mean squared difference of an example between a method and the
      baseline, for the method that differs most.
    points: the smallest true difference, in percentage points, that one test detects
      with 80 % power.
    corrected_points: the same at significance 0.05 / m for the m comparisons of the table.
  """

  task: str
  measure: str
  examples: int
  discordance: float
  points: float
  corrected_points: float


def quality(
  results: Sequence[Result], baseline: Result | None, on_run: Callable[[], object] = lambda: None
) -> list[Quality]:
  """Compares each run with the baseline by each task's metric.

  Args:
    results: all runs.
    baseline: one of them; None without results.
    on_run: called after each run on each task.
  """
  return _rows(_quality, results, baseline, on_run, [quality_metric])


def likelihood(
  results: Sequence[Result], baseline: Result | None, on_run: Callable[[], object] = lambda: None
) -> list[Likelihood]:
  """Compares perplexities, with and without fitted output temperatures; args as `quality`.

  Raises:
    ValueError: two runs scored different numbers of tokens of an example.
  """
  return _rows(_likelihood, results, baseline, on_run)


def calibrations(
  results: Sequence[Result], baseline: Result | None, on_run: Callable[[], object] = lambda: None
) -> list[Calibration]:
  """Compares calibration, with and without fitted output temperatures; args as `quality`."""
  return _rows(_calibration, results, baseline, on_run)


def _rows(make, results, baseline, on_run, variants=(lambda *_: False, lambda *_: True)):
  """The rows of every run on every task in every variant, corrected over all of them."""
  rows = []
  for task in tasks_of(results):
    for result in results:
      on_run()
      for variant in variants:
        rows += make(result, baseline, task, variant(results, task))
  return corrected(rows)


def _quality(result, baseline, task, metric):
  examples = paired(result, [metric], baseline, [metric], task) if metric else []
  if not examples:
    return []
  either = result.records[task].keys() | baseline.records[task].keys()
  values = result.values(task, metric, examples)
  between = paired_statistics.between_seeds(values)
  comparison = None
  if result is not baseline:
    theirs = baseline.values(task, metric, examples)
    test = paired_statistics.paired_test(values, theirs)
    name, *filters = metric.split(",")
    comparison = Comparison(
      result.label,
      baseline.label,
      task,
      MEASURES[name] + "".join(f" ({part})" for part in filters),
      " points",
      len(examples),
      paired_statistics.tested(paired_statistics.paired_accuracy(values, theirs), test),
      test,
    )
  missing, between = len(either) - len(examples), None if between is None else 100 * between
  value = paired_statistics.accuracy(values)
  return [Quality(result, task, metric, len(examples), missing, value, between, comparison)]


def _likelihood(result, baseline, task, fitted):
  ours = FITTED_NLL if fitted else NLL
  examples = paired(result, [ours, TOKENS], baseline, [NLL, TOKENS], task)
  if not examples:
    return []
  nll = result.values(task, ours, examples)
  tokens, theirs = (
    paired_statistics.over_seeds(r.values(task, TOKENS, examples)) for r in (result, baseline)
  )
  if not np.array_equal(tokens, theirs):
    raise ValueError(
      f"{result.path} and {baseline.path} scored different numbers of tokens of examples of "
      f"{task}, so their perplexities are not of the same sequences: rerun one of them"
    )
  by_seed = np.exp(nll.T.reshape(-1, len(examples)).sum(axis=1) / tokens.sum())
  difference = comparison = None
  if fitted or result is not baseline:
    difference = paired_statistics.paired_perplexity(
      nll, baseline.values(task, NLL, examples), tokens
    )
  both = result is not baseline and paired(result, [ours], baseline, [FITTED_NLL], task)
  if both:
    a, b = result.values(task, ours, both), baseline.values(task, FITTED_NLL, both)
    count = paired_statistics.over_seeds(result.values(task, TOKENS, both))
    comparison = compare_perplexities(
      label(result, fitted), label(baseline, True), task, a, b, count
    )
  perplexity = paired_statistics.perplexity(nll, tokens)
  between = paired_statistics.between_seeds(by_seed[None])
  return [
    Likelihood(result, task, fitted, len(examples), perplexity, between, difference, comparison)
  ]


def compare_perplexities(
  method: str, baseline: str, task: str, ours: np.ndarray, theirs: np.ndarray, tokens: np.ndarray
) -> Comparison:
  """Compares two methods' perplexities, from negative log-probabilities `[X]` or `[X, S]`."""
  test = paired_statistics.paired_test(ours, theirs)
  difference = paired_statistics.tested(
    paired_statistics.paired_perplexity(ours, theirs, tokens), test
  )
  return Comparison(method, baseline, task, "perplexity", " %", len(tokens), difference, test)


def _calibration(result, baseline, task, fitted):
  ours = FITTED_CONFIDENCES if fitted else CONFIDENCES
  examples = paired(result, [ours, CORRECT], baseline, [CONFIDENCES, CORRECT], task)
  if not examples:
    return []
  events = result.events(task, examples, ours)
  metric = FITTED_NLL if fitted else NLL
  nll = difference = comparison = None
  if scored := [e for e in result.examples(task, metric, TOKENS) if e in set(examples)]:
    sums = [
      paired_statistics.over_seeds(result.values(task, name, scored)) for name in (metric, TOKENS)
    ]
    nll = Estimate(*paired_statistics.bootstrap(sums, paired_statistics.ratio))
  both = result is not baseline and paired(
    result, [ours, CORRECT], baseline, [FITTED_CONFIDENCES, CORRECT], task
  )
  if both:
    a, b = result.events(task, both, ours), baseline.events(task, both, FITTED_CONFIDENCES)
    if np.array_equal(a.counts, b.counts):
      difference = calibration_error.paired_calibration_error(a, b)
      names = label(result, fitted), label(baseline, True), task, "Brier score", ""
      comparison = Comparison(*names, len(both), *calibration_error.paired_brier(a, b))
  return [
    Calibration(
      result,
      task,
      fitted,
      events,
      nll,
      calibration_error.expected_calibration_error(events),
      calibration_error.expected_calibration_error(events, calibration_error.WIDTH),
      calibration_error.brier(events),
      difference,
      comparison,
    )
  ]


def label(result: Result, fitted: bool) -> str:
  """Returns a run's label, marked if at its fitted output temperature."""
  return f"{result.label}, fitted T" if fitted else result.label


def costs(results: Sequence[Result]) -> list[RunCost]:
  """Returns the cost of each run on each task."""
  rows = []
  for task in tasks_of(results):
    for result in (r for r in results if task in r.records):
      timed = [
        line["tokens"] / line["seconds"]
        for line in result.costs
        if line.get("task") == task and line.get("tokens") and line.get("seconds")
      ]
      count = result.num_lines(task)
      passes, flops, reads, steps, peak = (
        result.cost(task, name)
        for name in ("forward_passes", "flops", "unique_experts_read", "steps", "peak_bytes")
      )
      rows.append(
        RunCost(
          result,
          task,
          float(np.median(timed)) if timed else None,
          None if passes is None else passes / count,
          None if flops is None else flops / count,
          reads / steps if reads and steps else None,
          peak,
        )
      )
  return rows


def power(rows: Sequence[Quality]) -> list[Power]:
  """Returns each task's detectable differences, from the observed discordance."""
  comparisons = [row.comparison for row in rows if row.comparison]
  found = []
  for task in dict.fromkeys(c.task for c in comparisons):
    c = max((c for c in comparisons if c.task == task), key=lambda c: c.test.discordance)
    points = [
      100
      * paired_statistics.detectable_difference(
        c.examples, c.test.discordance, significance=paired_statistics.SIGNIFICANCE / m
      )
      for m in (1, len(comparisons))
    ]
    found.append(Power(task, c.measure, c.examples, c.test.discordance, *points))
  return found


def tasks_of(results: Sequence[Result]) -> list[str]:
  return sorted(set().union(*(r.records for r in results)))


def corrected(rows):
  """Returns rows with Holm's correction over all of their comparisons."""
  differences = paired_statistics.corrected(
    [row.comparison and row.comparison.difference for row in rows]
  )
  return [
    dataclasses.replace(row, comparison=dataclasses.replace(row.comparison, difference=d))
    if d
    else row
    for row, d in zip(rows, differences)
  ]
