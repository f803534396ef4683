"""Records of figures that compare methods with the baseline: tables and sentences of them."""

from collections.abc import Callable, Sequence
from typing import Any

from experiments.analysis import comparisons, drawing, paired_statistics, report_page
from experiments.analysis.paired_statistics import Comparison, Difference, Estimate
from experiments.analysis.run_results import Result

Record = dict[str, Any]

QUALITY_AXIS = "task result: difference\nfrom baseline (points)"
PERPLEXITY_AXIS = "perplexity reduction\nfrom baseline (%)"
FITTED_AXIS = "perplexity reduction at fitted T\nfrom baseline at fitted T (%)"
GAINS = {
  "quality_difference": QUALITY_AXIS,
  "perplexity_difference": PERPLEXITY_AXIS,
  "fitted_difference": FITTED_AXIS,
}


def records(results: Sequence[Result], baseline: Result, **also) -> list[Record]:
  """Returns a record per run and task, paired by example with the baseline.

  Holm's correction is over the given runs and tasks, for task results and for perplexities.

  Args:
    results: the runs, including the baseline.
    baseline: the run of the baseline.
    **also: further fields of each record.

  Returns:
    Records with "task", "method" (as given), "label", "examples", "seeds";
    "metric", "quality" (percent) and "quality_difference" (points); "perplexity" and
    "perplexity_difference" (percent, both at output temperature 1); "fitted" and
    "fitted_difference" (percent, both at fitted output temperatures) and
    "output_temperature"; "ms_per_token", "flops", "forward_passes" (per example),
    "unique_experts" (per layer and token), "peak_bytes". Estimates are {"value", "low",
    "high"}, tested differences also have "p", "adjusted" and "significant"; None: not measured.
  """
  quality = {(q.task, q.result.label): q for q in comparisons.quality(results, baseline)}
  likelihood = {
    (l.task, l.result.label, l.fitted): l for l in comparisons.likelihood(results, baseline)
  }
  costs = {(c.task, c.result.label): c for c in comparisons.costs(results)}
  found = []
  for task in comparisons.tasks_of(results):
    for result in results:
      if task not in result.records:
        continue
      key = (task, result.label)
      q, cost = quality.get(key), costs[key]
      unfitted, fitted = (likelihood.get((*key, is_fitted)) for is_fitted in (False, True))
      found.append(
        {
          **also,
          "task": task,
          "method": result.settings["spelled"],
          "label": result.label,
          "examples": q.examples if q else len(result.records[task]),
          "seeds": result.seeds(task),
          "metric": q.metric if q else None,
          "quality": estimate(q and q.value),
          "quality_difference": as_json(q and q.comparison),
          "perplexity": estimate(unfitted and unfitted.perplexity),
          "perplexity_difference": estimate(unfitted and unfitted.difference),
          "fitted": estimate(fitted and fitted.perplexity),
          "fitted_difference": as_json(fitted and fitted.comparison),
          "output_temperature": result.output_temperatures.get(task),
          "ms_per_token": cost.ms_per_token,
          "flops": cost.flops,
          "forward_passes": cost.forward_passes,
          "unique_experts": cost.unique_experts,
          "peak_bytes": cost.peak_bytes,
        }
      )
  return found


def corrected(found: Sequence[Record]) -> list[Record]:
  """Returns records with Holm's correction over all of them, for each tested measure."""
  found = [dict(r) for r in found]
  for measure in ("quality_difference", "fitted_difference"):
    tested = [r for r in found if r.get(measure)]
    for r, d in zip(tested, holm([r[measure] for r in tested])):
      r[measure] = d
  return found


def holm(differences: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns differences with "adjusted" by Holm's correction over their "p", and "significant"."""
  return [
    d | {"adjusted": p, "significant": p < paired_statistics.SIGNIFICANCE and read(d).excludes_zero}
    for d, p in zip(differences, paired_statistics.holm([d["p"] for d in differences]))
  ]


def estimate(e: Estimate | tuple[float, float, float] | None) -> dict[str, float] | None:
  """Returns an estimate, or (value, low, high), as JSON."""
  if isinstance(e, tuple):
    e = Estimate(*e)
  return None if e is None else {"value": e.value, "low": e.low, "high": e.high}


def as_json(c: Comparison | None) -> dict[str, Any] | None:
  """Returns a comparison as JSON."""
  if c is None:
    return None
  tested = {"p": c.test.p, "adjusted": c.adjusted, "significant": c.is_significant}
  return estimate(c.difference) | tested


def read(value: dict[str, Any] | None) -> Difference | None:
  """Returns the estimate or difference that was written as JSON."""
  return value and Difference(value["value"], value["low"], value["high"])


def interval(value: dict[str, Any], places: int = 2, unit: str = "") -> str:
  """Formats a difference for a sentence."""
  return report_page.difference(read(value), places, unit)


def cell(value: dict[str, Any] | None, places: int, signed: bool = False) -> str:
  """Formats an estimate for a table; a significant difference gets a star."""
  if value is None:
    return ""
  formatted = (report_page.difference if signed else report_page.estimate)(read(value), places)
  return formatted + (" *" if value.get("significant") else "")


COLUMNS: dict[str, tuple[str, Callable[[Record], str]]] = {
  "quality": ("task result (%)", lambda r: cell(r["quality"], 1)),
  "quality_difference": (
    "difference from baseline (points)",
    lambda r: cell(r["quality_difference"], 1, True),
  ),
  "perplexity": ("perplexity", lambda r: cell(r["perplexity"], 4)),
  "perplexity_difference": (
    "difference from baseline (%)",
    lambda r: cell(r["perplexity_difference"], 2, True),
  ),
  "fitted": ("perplexity at fitted T", lambda r: cell(r["fitted"], 4)),
  "fitted_difference": (
    "difference from baseline at fitted T (%)",
    lambda r: cell(r["fitted_difference"], 2, True),
  ),
  "ms_per_token": ("ms per token", lambda r: report_page.number(r["ms_per_token"])),
  "unique_experts": ("unique active experts", lambda r: report_page.number(r["unique_experts"])),
  "peak_bytes": ("memory (MiB)", lambda r: report_page.mebibytes(r["peak_bytes"])),
}
LIKELIHOOD = ("perplexity", "perplexity_difference", "fitted", "fitted_difference")
NOTE = (
  "Brackets: 95 % bootstrap intervals over examples, differences paired by example; *: "
  "significant after Holm's correction over the table."
)


def table(
  found: Sequence[Record], first: Sequence[str] | dict[str, Any], columns: Sequence[str]
) -> str:
  """Formats a Markdown table of records; columns that no record has are left out.

  Args:
    found: the records.
    first: leading fields shown as they are, or columns of `report_page.table_of`.
    columns: keys of `COLUMNS`.
  """
  leading = first if isinstance(first, dict) else {name: name for name in first}
  shown = dict(COLUMNS[c] for c in columns if any(r.get(c) is not None for r in found))
  return report_page.table_of(found, leading | shown) + "\n\n" + NOTE


def findings(found: Sequence[Record], measures: Sequence[str] = ("quality", "fitted")) -> str:
  """Describes the significant differences of task results and fitted perplexities."""
  return " ".join(_findings(found, f"{measure}_difference") for measure in measures)


def _findings(found, measure):
  what, unit = {
    "quality_difference": ("task results", " points"),
    "fitted_difference": ("perplexity at fitted output temperatures", " %"),
  }[measure]
  tested = [r for r in found if r.get(measure) is not None]
  if not tested:
    return f"Differences in {what} were not measured."
  significant = [
    f"{r['label']} on {r['task']} {interval(r[measure], 2, unit)}"
    for r in tested
    if r[measure].get("significant")
  ]
  number = f"{len(significant)} {'is' if len(significant) == 1 else 'are'}"
  return (
    f"Of {report_page.count(len(tested), 'difference')} from the baseline in {what}, "
    f"{number if significant else 'none is'} significant after Holm's correction"
    + (": " if significant else "")
    + "; ".join(significant)
    + "."
  )


def by_model(found: Sequence[Record]) -> list[Record]:
  """Returns records with the model in place of the task, for figures of several models."""
  return [r | {"task": r["model"]} for r in found]


def unique(found: Sequence[Record], name: str) -> list[Any]:
  """Returns the values of a field, in order."""
  return list(dict.fromkeys(r[name] for r in found))


def gain(r: Record | None, name: str) -> Difference | None:
  """Returns a difference in `GAINS` with the sign that makes more better."""
  d = read(r and r[name])
  return d if d is None or name == "quality_difference" else -d


def draw_dots(
  axis, name: str, groups: Sequence[str], series: dict[str, Sequence[Record | None]]
) -> None:
  """Draws gains of records with error bars, a column per group; see `drawing.dots`."""
  drawing.zero(axis)
  drawing.dots(axis, groups, {label: [gain(r, name) for r in of] for label, of in series.items()})
  axis.set_ylabel(GAINS[name])


def draw_gains(axis, name: str, x: Sequence[float], found: Sequence[Record], **settings) -> None:
  """Draws gains of records with error bars; see `drawing.errorbars`."""
  drawing.zero(axis)
  drawing.errorbars(axis, x, [gain(r, name) for r in found], **settings)


def draw_line(axis, x: Sequence[float], values: Sequence[dict[str, Any]], **settings) -> None:
  """Draws estimates (as JSON) with error bars; see `drawing.errorbars`."""
  drawing.errorbars(axis, x, list(map(read, values)), **settings)
