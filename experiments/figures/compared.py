"""Records of figures that are made of comparisons, and how they are told."""

from collections.abc import Sequence
from typing import Any

from experiments.analysis import comparisons, paired_statistics, report_page
from experiments.analysis.paired_statistics import Comparison, Difference, Estimate
from experiments.analysis.run_results import Result

Record = dict[str, Any]


def records(results: Sequence[Result], baseline: Result, **also) -> list[Record]:
  """A record for each run and task, paired by example with the baseline.

  Holm's correction is over the runs and tasks given, for accuracies and perplexities each.

  Args:
    results: the runs, the baseline among them.
    baseline: the plain model.
    also: what each record says besides.

  Returns:
    Records with "task", "method" (as it was spelled), "label", "examples", "seeds";
    "metric", "quality" (percent) and "quality_difference" (points); "perplexity" and
    "perplexity_difference" (percent, both at output temperature 1); "fitted" and
    "fitted_difference" (percent, both at fitted output temperatures) and
    "output_temperature"; "ms_per_token", "flops", "rows" (of an example), "experts" (of a
    layer, by step), "peak_bytes". Estimates are {"value", "low", "high"}, differences
    have "p", "adjusted" and "clear" besides; what was not measured is None.
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
      q, as_it_is, fitted = (
        quality.get(key),
        likelihood.get((*key, False)),
        likelihood.get((*key, True)),
      )
      cost = costs[key]
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
          "perplexity": estimate(as_it_is and as_it_is.perplexity),
          "perplexity_difference": estimate(as_it_is and as_it_is.to_plain),
          "fitted": estimate(fitted and fitted.perplexity),
          "fitted_difference": as_json(fitted and fitted.comparison),
          "output_temperature": result.output_temperatures.get(task),
          "ms_per_token": cost.tokens_per_second and 1e3 / cost.tokens_per_second,
          "flops": cost.flops,
          "rows": cost.rows,
          "experts": cost.experts,
          "peak_bytes": cost.peak_bytes,
        }
      )
  return found


def corrected(found: Sequence[Record]) -> list[Record]:
  """Records with Holm's correction over all of them, for each measure that is tested."""
  found = [dict(r) for r in found]
  for measure in ("quality_difference", "fitted_difference"):
    had = [r for r in found if r.get(measure)]
    adjusted = paired_statistics.holm([r[measure]["p"] for r in had])
    for r, p in zip(had, adjusted):
      d = read(r[measure])
      r[measure] = r[measure] | {
        "adjusted": p,
        "clear": p < paired_statistics.SIGNIFICANCE and d.is_significant,
      }
  return found


def estimate(e: Estimate | None) -> dict[str, float] | None:
  """An estimate or a difference as JSON."""
  return None if e is None else {"value": e.value, "low": e.low, "high": e.high}


def as_json(c: Comparison | None) -> dict[str, Any] | None:
  """A comparison as JSON."""
  return (
    None
    if c is None
    else estimate(c.difference) | {"p": c.test.p, "adjusted": c.adjusted, "clear": c.is_significant}
  )


def read(value: dict[str, Any] | None) -> Difference | None:
  """What `estimate` or `compared` wrote; as a Difference, whose interval may be asked."""
  return value and Difference(value["value"], value["low"], value["high"])


def cell(value: dict[str, Any] | None, places: int, signed: bool = False) -> str:
  """An estimate in a table; a clear difference has a star."""
  if value is None:
    return ""
  told = report_page.difference if signed else report_page.estimate
  return told(read(value), places) + (" *" if value.get("clear") else "")


COLUMNS = {
  "quality": ("right, %", lambda r: cell(r["quality"], 1)),
  "quality_difference": ("to plain, points", lambda r: cell(r["quality_difference"], 1, True)),
  "perplexity": ("perplexity", lambda r: cell(r["perplexity"], 4)),
  "perplexity_difference": ("to plain, %", lambda r: cell(r["perplexity_difference"], 2, True)),
  "fitted": ("at fitted T", lambda r: cell(r["fitted"], 4)),
  "fitted_difference": ("to plain at fitted T, %", lambda r: cell(r["fitted_difference"], 2, True)),
  "ms_per_token": ("ms per token", lambda r: report_page.number(r["ms_per_token"])),
  "experts": ("experts read", lambda r: report_page.number(r["experts"])),
  "peak_bytes": ("MiB", lambda r: report_page.number(r["peak_bytes"] and r["peak_bytes"] / 2**20)),
}
NOTE = (
  "In brackets 95 % bootstrap intervals over examples, differences on the same examples; "
  "* is clear after Holm's correction over the table."
)


def table(found: Sequence[Record], first: Sequence[str], columns: Sequence[str]) -> str:
  """A Markdown table of records; columns that no record has are left out.

  Args:
    found: the records.
    first: fields shown as they are.
    columns: keys of `COLUMNS`.
  """
  columns = [c for c in columns if any(r.get(c) is not None for r in found)]
  rows = [[*(r[name] for name in first), *(COLUMNS[c][1](r) for c in columns)] for r in found]
  return report_page.table([*first, *(COLUMNS[c][0] for c in columns)], rows) + "\n\n" + NOTE


def clear(found: Sequence[Record], measure: str, what: str, unit: str = " %") -> str:
  """Which differences are clear, as a sentence.

  Args:
    found: the records.
    measure: such as "fitted_difference".
    what: that in words.
    unit: of the difference.
  """
  had = [r for r in found if r.get(measure) is not None]
  if not had:
    return f"Differences in {what} were not measured."
  told = [
    f"{r['label']} on {r['task']} {r[measure]['value']:+.2f}{unit} "
    f"[{r[measure]['low']:+.2f}, {r[measure]['high']:+.2f}]"
    for r in had
    if r[measure].get("clear")
  ]
  if not told:
    return (
      f"Of {report_page.count(len(had), 'difference')} to the plain model in {what} none is clear "
      "after Holm's correction."
    )
  return (
    f"Of {report_page.count(len(had), 'difference')} to the plain model in {what} {len(told)} "
    f"{'is' if len(told) == 1 else 'are'} clear after Holm's correction: " + "; ".join(told) + "."
  )
