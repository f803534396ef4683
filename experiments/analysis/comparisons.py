"""What a report compares: lines of its tables, as figures.

All is paired by example; examples that one side lacks are left out and counted.
The tests of one table are one family of Holm's correction.
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
  """A line of the main table.

  Attributes:
    result: the run.
    task: the task.
    metric: its name in the run's lines.
    examples: X, those that the baseline has, too.
    missing: examples that only one of the two has.
    value: in percent.
    between: standard deviation between seeds, points; None for one seed.
    comparison: to the baseline; None for the baseline itself.
  """

  result: Result
  task: str
  metric: str
  examples: int
  missing: int
  value: Estimate
  between: float | None
  comparison: Comparison | None


def quality(
  results: Sequence[Result], baseline: Result, on_run: Callable[[], None] = lambda: None
) -> list[Quality]:
  """Each run on each task by the task's metric, beside the baseline.

  Args:
    results: all runs.
    baseline: one of them.
    on_run: called after each run on each task.
  """
  lines = []
  for task in tasks_of(results):
    metric = quality_metric(results, task)
    for result in results:
      on_run()
      examples = paired(result, [metric], baseline, [metric], task) if metric else []
      if not examples:
        continue
      either = result.records[task].keys() | baseline.records[task].keys()
      values = result.values(task, metric, examples)
      between = paired_statistics.between_seeds(values)
      comparison = None
      if result is not baseline:
        theirs = baseline.values(task, metric, examples)
        comparison = Comparison(
          result.label,
          baseline.label,
          task,
          _told(metric),
          " points",
          len(examples),
          paired_statistics.paired_accuracy(values, theirs),
          paired_statistics.paired_test(values, theirs),
          1.0,
        )
      lines.append(
        Quality(
          result,
          task,
          metric,
          len(examples),
          len(either) - len(examples),
          paired_statistics.accuracy(values),
          None if between is None else 100 * between,
          comparison,
        )
      )
  return corrected(lines)


def _told(metric):
  """A metric as it is called in a sentence."""
  name, *rest = metric.split(",")
  return MEASURES[name] + "".join(f" ({part})" for part in rest)


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """A line of the perplexity table: a run as it is, or at its fitted output temperature.

  Attributes:
    result: the run.
    task: the task.
    fitted: whether the output temperature is the fitted one.
    examples: X.
    perplexity: of the reference texts.
    between: its standard deviation between seeds; None for one seed.
    to_plain: relative difference to the baseline as it is; None for that itself.
    comparison: to the baseline at its fitted output temperature; None for the
      baseline, and where that was not measured.
  """

  result: Result
  task: str
  fitted: bool
  examples: int
  perplexity: Estimate
  between: float | None
  to_plain: Difference | None
  comparison: Comparison | None


def likelihood(
  results: Sequence[Result], baseline: Result, on_run: Callable[[], None] = lambda: None
) -> list[Likelihood]:
  """Perplexities of each run, with and without a fitted output temperature.

  Args: see `quality`.

  Raises:
    ValueError: two runs scored different numbers of tokens of an example.
  """
  lines = []
  for task in tasks_of(results):
    for result in results:
      on_run()
      for fitted in (False, True):
        lines += _likelihood(result, baseline, task, fitted)
  return corrected(lines)


def _likelihood(result, baseline, task, fitted):
  ours = FITTED_NLL if fitted else NLL
  examples = paired(result, [ours, TOKENS], baseline, [NLL, TOKENS], task)
  if not examples:
    return []
  nll = result.values(task, ours, examples)
  tokens = paired_statistics.over_seeds(result.values(task, TOKENS, examples))
  theirs = paired_statistics.over_seeds(baseline.values(task, TOKENS, examples))
  if not np.array_equal(tokens, theirs):
    raise ValueError(
      f"{result.path} and {baseline.path} scored different numbers of tokens of examples of "
      f"{task}: their perplexities are not of the same texts"
    )
  by_seed = np.exp(nll.T.reshape(-1, len(examples)).sum(axis=1) / tokens.sum())
  is_baseline = result is baseline and not fitted
  to_plain = (
    None
    if is_baseline
    else paired_statistics.paired_perplexity(nll, baseline.values(task, NLL, examples), tokens)
  )
  comparison = None
  if result is not baseline:
    both = paired(result, [ours], baseline, [FITTED_NLL], task)
    if both:
      a, b = result.values(task, ours, both), baseline.values(task, FITTED_NLL, both)
      count = paired_statistics.over_seeds(result.values(task, TOKENS, both))
      comparison = Comparison(
        label(result, fitted),
        label(baseline, True),
        task,
        "perplexity",
        " %",
        len(both),
        paired_statistics.paired_perplexity(a, b, count),
        paired_statistics.paired_test(a, b),
        1.0,
      )
  return [
    Likelihood(
      result,
      task,
      fitted,
      len(examples),
      paired_statistics.perplexity(nll, tokens),
      paired_statistics.between_seeds(by_seed[None]),
      to_plain,
      comparison,
    )
  ]


def label(result: Result, fitted: bool) -> str:
  """What a run is called as it is, or at its fitted output temperature."""
  return f"{result.label}, fitted T" if fitted else result.label


@dataclasses.dataclass(frozen=True)
class Calibration:
  """A line of the calibration table: a run as it is, or at its fitted output temperature.

  Attributes:
    result: the run.
    task: the task.
    fitted: whether the output temperature is the fitted one.
    events: confidences and outcomes.
    nll: mean negative log-probability of a token, nats, or None.
    error, width_error: ECE in equal-mass and in equal-width bins.
    brier: Brier score.
    error_difference: of the equal-mass ECE to the baseline at its fitted output
      temperature; None as for `comparison`.
    comparison: of Brier scores to it; None for the baseline, and where that was
      not measured or has other events (such as an answer in place of its tokens).
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


def calibrations(
  results: Sequence[Result], baseline: Result, on_run: Callable[[], None] = lambda: None
) -> list[Calibration]:
  """Calibration of each run, with and without a fitted output temperature.

  Args: see `quality`.
  """
  lines = []
  for task in tasks_of(results):
    for result in results:
      on_run()
      for fitted in (False, True):
        lines += _calibration(result, baseline, task, fitted)
  return corrected(lines)


def _calibration(result, baseline, task, fitted):
  ours = FITTED_CONFIDENCES if fitted else CONFIDENCES
  examples = paired(result, [ours, CORRECT], baseline, [CONFIDENCES, CORRECT], task)
  if not examples:
    return []
  events = result.events(task, examples, ours)
  metric = FITTED_NLL if fitted else NLL
  nll = None
  if scored := [e for e in result.examples(task, metric, TOKENS) if e in set(examples)]:
    nll = Estimate(
      *paired_statistics.bootstrap(
        [
          paired_statistics.over_seeds(result.values(task, name, scored))
          for name in (metric, TOKENS)
        ],
        paired_statistics.ratio,
      )
    )
  difference = comparison = None
  both = (
    []
    if result is baseline
    else paired(result, [ours, CORRECT], baseline, [FITTED_CONFIDENCES, CORRECT], task)
  )
  if both:
    a, b = result.events(task, both, ours), baseline.events(task, both, FITTED_CONFIDENCES)
  if both and np.array_equal(a.counts, b.counts):
    difference = calibration_error.paired_calibration_error(a, b)
    score, test = calibration_error.paired_brier(a, b)
    comparison = Comparison(
      label(result, fitted),
      label(baseline, True),
      task,
      "Brier score",
      "",
      len(both),
      score,
      test,
      1.0,
    )
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


@dataclasses.dataclass(frozen=True)
class Cost:
  """A line of the cost table; None: not measured.

  Attributes:
    result: the run.
    task: the task.
    tokens_per_second: median over stretches of work.
    rows: forward rows for an example.
    flops: forward FLOPs for an example.
    experts: mean number of different experts that a layer reads in a step.
    peak_bytes: memory.
  """

  result: Result
  task: str
  tokens_per_second: float | None
  rows: float | None
  flops: float | None
  experts: float | None
  peak_bytes: float | None


def costs(results: Sequence[Result]) -> list[Cost]:
  """What each run cost on each task."""
  lines = []
  for task in tasks_of(results):
    for result in (r for r in results if task in r.records):
      timed = [
        line["tokens"] / line["seconds"]
        for line in result.costs
        if line.get("task") == task and line.get("tokens") and line.get("seconds")
      ]
      count = result.num_lines(task)
      rows, flops, reads, steps = (
        result.cost(task, name)
        for name in ("forward_passes", "flops", "unique_experts_read", "steps")
      )
      lines.append(
        Cost(
          result,
          task,
          float(np.median(timed)) if timed else None,
          None if rows is None else rows / count,
          None if flops is None else flops / count,
          reads / steps if reads and steps else None,
          result.cost(task, "peak_bytes"),
        )
      )
  return lines


@dataclasses.dataclass(frozen=True)
class Power:
  """What differences the examples of a task can show.

  Attributes:
    task: the task.
    measure: "accuracy", ...
    examples: X.
    discordance: mean squared difference of an example between a method and the
      baseline, of the method that differs most.
    points: the smallest true difference, in percentage points, that one test finds
      with 80 % power.
    corrected_points: likewise at a significance of 0.05 / m with the m comparisons
      of the table.
  """

  task: str
  measure: str
  examples: int
  discordance: float
  points: float
  corrected_points: float


def power(lines: Sequence[Quality]) -> list[Power]:
  """By task, from the discordance that was observed."""
  comparisons = [line.comparison for line in lines if line.comparison]
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


def corrected(lines):
  """Lines with Holm's correction over all of their comparisons."""
  compared = iter(
    paired_statistics.corrected([line.comparison for line in lines if line.comparison])
  )
  return [
    dataclasses.replace(line, comparison=next(compared)) if line.comparison else line
    for line in lines
  ]
