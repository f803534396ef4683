"""Records of figures that compare methods with the baseline: tables and sentences of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.analysis import comparisons, drawing, paired_statistics, report_page
from experiments.analysis.paired_statistics import Difference, Estimate
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
    "unique_experts" (per layer and token), "peak_bytes". Estimates are of type `Estimate`,
    differences `Difference`; None: not measured.
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
          "quality": q and q.value,
          "quality_difference": q and q.comparison and q.comparison.difference,
          "perplexity": unfitted and unfitted.perplexity,
          "perplexity_difference": unfitted and unfitted.difference,
          "fitted": fitted and fitted.perplexity,
          "fitted_difference": fitted and fitted.comparison and fitted.comparison.difference,
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
  found = list(found)
  for measure in ("quality_difference", "fitted_difference"):
    differences = paired_statistics.corrected([r.get(measure) for r in found])
    found = [r | {measure: d} if d else r for r, d in zip(found, differences)]
  return found


def cell(value: Estimate | None, places: int, signed: bool = False) -> str:
  """Formats an estimate for a table; a significant difference gets a star."""
  if value is None:
    return ""
  formatted = (report_page.difference if signed else report_page.estimate)(value, places)
  return formatted + (" *" if isinstance(value, Difference) and value.is_significant else "")


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
    f"{r['label']} on {r['task']} {report_page.difference(r[measure], 2, unit)}"
    for r in tested
    if r[measure].is_significant
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


def gain(r: Record | None, name: str) -> Any:
  """Returns a `Difference` in `GAINS`, with the sign that makes more better; None without one."""
  d = None if r is None else r[name]
  return d if d is None or name == "quality_difference" else -d


def draw_dots(
  axis, name: str, groups: Sequence[str], series: Mapping[str, Sequence[Record | None]]
) -> None:
  """Draws gains of records with error bars, a column per group; see `drawing.dots`."""
  drawing.zero(axis)
  drawing.dots(axis, groups, {label: [gain(r, name) for r in of] for label, of in series.items()})
  axis.set_ylabel(GAINS[name])


def draw_gains(axis, name: str, x: Sequence[float], found: Sequence[Record], **settings) -> None:
  """Draws gains of records with error bars; see `drawing.errorbars`."""
  drawing.zero(axis)
  drawing.errorbars(axis, x, [gain(r, name) for r in found], **settings)
