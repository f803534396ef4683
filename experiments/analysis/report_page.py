"""The page of a report: Markdown from the rows of `comparisons`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.analysis import (
  calibration_error,
  comparisons,
  output_temperatures,
  paired_statistics,
)
from experiments.analysis.paired_statistics import Comparison, Difference, Estimate
from experiments.analysis.run_results import Result, Tuning
from experiments.cli import text_files
from experiments.cli.extras import tabulate
from experiments.records import runs

NOT_MEASURED = "not measured"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Formats a Markdown table; cells are escaped."""
  clean = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
  return tabulate.tabulate(clean, header, tablefmt="pipe", disable_numparse=True)


def table_of(records: Sequence[Any], columns: Mapping[str, str | Callable[[Any], Any]]) -> str:
  """Formats a Markdown table with a row per record.

  Args:
    records: dictionaries or objects.
    columns: {header: key of a dictionary, or a function of a record that returns the cell}.
  """
  cells = [
    [r[column] if isinstance(column, str) else column(r) for column in columns.values()]
    for r in records
  ]
  return table(list(columns), cells)


def estimate(e: Estimate | None, places: int, unit: str = "") -> str:
  if e is None:
    return NOT_MEASURED
  return f"{e.value:.{places}f}{unit} [{e.low:.{places}f}, {e.high:.{places}f}]"


def difference(d: Estimate | None, places: int, unit: str = "") -> str:
  if d is None:
    return ""
  return f"{d.value:+.{places}f}{unit} [{d.low:+.{places}f}, {d.high:+.{places}f}]"


def p_value(p: float) -> str:
  return "< 0.001" if p < 0.001 else f"{p:.3f}"


def number(value: float | None, spec: str = ".3g") -> str:
  return NOT_MEASURED if value is None else format(value, spec)


def mebibytes(value: float | None, spec: str = ".3g") -> str:
  return number(value and value / 2**20, spec)


def count(n: int, thing: str) -> str:
  return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def _tests(rows: Sequence[Any]) -> str:
  """Returns "N tests" for the rows of a table."""
  return count(sum(row.comparison is not None for row in rows), "test")


def _of_comparison(column: Callable[[Comparison], Any]) -> Callable[[Any], Any]:
  """Makes a column of `table_of` from a function of a row's comparison; "" without one."""
  return lambda row: column(row.comparison) if row.comparison else ""


P_VALUES = {
  "p": _of_comparison(lambda c: p_value(c.test.p)),
  "adjusted p": _of_comparison(lambda c: p_value(c.adjusted)),
}


def quality_section(rows: Sequence[comparisons.Quality], baseline: Result) -> str:
  if not rows:
    return f"Task results are {NOT_MEASURED}."
  columns = {
    "task": lambda r: r.task,
    "method": lambda r: r.result.label,
    "metric": lambda r: r.metric,
    "examples": lambda r: r.examples,
    "seeds": lambda r: len(r.result.seeds(r.task)),
    "%": lambda r: estimate(r.value, 1),
    "± between seeds": lambda r: "" if r.between is None else f"{r.between:.2f}",
    f"difference from {baseline.label} (points)": _of_comparison(
      lambda c: difference(c.difference, 1)
    ),
    "test": _of_comparison(lambda c: c.test.name),
    **P_VALUES,
    "verdict": _of_comparison(lambda c: c.verdict),
  }
  notes = [
    "Brackets: 95 % bootstrap intervals over examples; each example's metric is first averaged "
    "over noise seeds. ±: standard deviation of the seeds' means. Differences are paired by "
    "example. Tests: McNemar's exact test if every example was answered once, otherwise a "
    "sign-flip permutation test over examples. Adjusted p: Holm's correction over the "
    f"{_tests(rows)} of this table. A difference is significant if adjusted p < 0.05 and its "
    "interval excludes zero."
  ]
  notes += [
    f"{row.task}: left out {count(row.missing, 'example')} that only one of {row.result.label} "
    f"and {row.comparison.baseline} has; {row.examples} paired."
    for row in rows
    if row.missing and row.comparison
  ]
  return "\n\n".join([table_of(rows, columns), *notes])


def likelihood_section(rows: Sequence[comparisons.Likelihood], baseline: Result) -> str:
  if not rows:
    return f"Perplexities of reference texts are {NOT_MEASURED}."
  has_fit = {row.task for row in rows if row.fitted and row.result is baseline}
  no_verdict = f"none: {baseline.label} at its fitted T is {NOT_MEASURED}"
  columns = {
    "task": lambda r: r.task,
    "method": lambda r: comparisons.label(r.result, r.fitted),
    "T": lambda r: number(r.result.output_temperatures.get(r.task)) if r.fitted else "",
    "examples": lambda r: r.examples,
    "perplexity": lambda r: estimate(r.perplexity, 4),
    "± between seeds": lambda r: "" if r.between is None else f"{r.between:.4f}",
    f"difference from {baseline.label} (%)": lambda r: difference(r.difference, 2),
    f"difference from {baseline.label} at fitted T (%)": _of_comparison(
      lambda c: difference(c.difference, 2)
    ),
    **P_VALUES,
    f"verdict against {baseline.label} at fitted T": lambda r: (
      r.comparison.verdict if r.comparison else "" if r.result is baseline else no_verdict
    ),
  }
  notes = [
    "Anything that flattens its distribution helps an overconfident model, an output temperature "
    f"as well as a roster. Verdicts are therefore against {baseline.label} with its output "
    "temperature T fitted on validation data; sign-flip tests over examples with Holm's "
    f"correction over the {_tests(rows)} of this table. Lower is better."
  ]
  few = [
    output_temperatures.warning(row.task, row.result.fitted_on[row.task])
    for row in rows
    if row.fitted and row.task in row.result.fitted_on
  ]
  notes += [f"**{sentence}.**" for sentence in dict.fromkeys(few) if sentence]
  missing = sorted({row.task for row in rows} - has_fit)
  if missing:
    notes.append(
      f"**{baseline.label} at a fitted output temperature is {NOT_MEASURED} for "
      f"{', '.join(missing)}: without it no claim about perplexity can be made there.**"
    )
  return "\n\n".join([table_of(rows, columns), *notes])


def calibration_section(rows: Sequence[comparisons.Calibration], baseline: Result) -> str:
  if not rows:
    return f"Calibration is {NOT_MEASURED}: the runs have no confidences."
  names = {"task": lambda r: r.task, "method": lambda r: comparisons.label(r.result, r.fitted)}
  columns = names | {
    "events": lambda r: len(r.events.confidences),
    "NLL per token (nats)": lambda r: estimate(r.nll, 4),
    f"ECE, {calibration_error.MASS}": lambda r: estimate(r.error, 4),
    f"ECE, {calibration_error.WIDTH}": lambda r: estimate(r.width_error, 4),
    "Brier score": lambda r: estimate(r.brier, 4),
  }
  parts = [
    table_of(rows, columns),
    f"ECE with {calibration_error.BINS} bins; ECE alone means {calibration_error.MASS} bins. Its "
    "intervals are reversed percentile intervals, and begin at 0 where a calibrated model would "
    "show as much. Events of one example (and of its seeds) are resampled together.",
  ]
  if tested := [row for row in rows if row.comparison]:
    at_fitted = f"difference from {baseline.label} at fitted T"
    columns = names | {
      f"ECE: {at_fitted}": lambda r: difference(r.error_difference, 4),
      f"Brier score: {at_fitted}": lambda r: difference(r.comparison.difference, 4),
      **P_VALUES,
      "verdict on the Brier score": lambda r: r.comparison.verdict,
    }
    parts += [
      table_of(tested, columns),
      "Lower is better. An ECE has no per-example values to swap, so its differences have an "
      "interval but no test.",
    ]
  fitted = {row.task for row in rows if row.fitted and row.result is baseline}
  parts += [
    f"**{task}: confidences of {baseline.label} at a fitted output temperature are "
    f"{NOT_MEASURED}: without them no claim about calibration can be made.**"
    for task in sorted({row.task for row in rows} - fitted)
  ]
  others = [
    f"{comparisons.label(row.result, row.fitted)} on {row.task}"
    for row in rows
    if row.task in fitted and row.result is not baseline and not row.comparison
  ]
  if others:
    parts.append(
      f"Not compared, since their events differ from those of {baseline.label}: "
      f"{', '.join(others)}."
    )
  return "\n\n".join(parts)


def cost_section(rows: Sequence[comparisons.RunCost]) -> str:
  columns = {
    "task": lambda r: r.task,
    "method": lambda r: r.result.label,
    "tokens/s": lambda r: number(r.tokens_per_second, ".4g"),
    "forward passes per example": lambda r: number(r.forward_passes, ".4g"),
    "forward FLOPs per example": lambda r: number(r.flops),
    "unique active experts per layer and token": lambda r: number(r.unique_experts),
    "peak memory (MiB)": lambda r: mebibytes(r.peak_bytes, ".4g"),
  }
  return (
    table_of(rows, columns) + "\n\nTokens per second are medians over batches. Forward passes "
    "(tokens x members) and FLOPs are per example and seed. Unique active experts are means over "
    "layers and tokens of answers."
  )


def power_section(
  rows: Sequence[comparisons.Power], likelihoods: Sequence[comparisons.Likelihood]
) -> str:
  sentences = [
    f"{p.task}: with {p.examples} examples and a discordance of {100 * p.discordance:.1f} % (mean "
    f"squared difference in {p.measure}, of the method that differs most), one comparison detects "
    f"true differences of {p.points:.1f} points or more with {100 * paired_statistics.POWER:.0f} % "
    f"power; at the strictest level of Holm's correction, {p.corrected_points:.1f} points."
    for p in rows
  ]
  widest: dict[str, float] = {}
  for row in likelihoods:
    if row.comparison:
      seen = paired_statistics.detectable_from_interval(row.comparison.difference)
      widest[row.task] = max(widest.get(row.task, 0.0), seen)
  sentences += [
    f"{task}: relative differences in perplexity of at least {seen:.2f} %, from the widest "
    "interval of its table, before correction."
    for task, seen in widest.items()
  ]
  if not sentences:
    return "There are no comparisons, hence no statement about power."
  return "\n".join(f"* {s}" for s in sentences) + (
    '\n\n"No significant difference" means that a difference of this size would probably have '
    "been detected, not that the methods are equal."
  )


def findings(
  quality: Sequence[comparisons.Quality],
  likelihoods: Sequence[comparisons.Likelihood],
  calibrations: Sequence[comparisons.Calibration],
  baseline: Result | None,
) -> str:
  """Describes the significant differences in sentences."""
  if baseline is None:
    return "No runs are compared."
  parts = []
  for what, rows in (
    ("task results", quality),
    ("perplexities", likelihoods),
    ("Brier scores", calibrations),
  ):
    comparisons = [row.comparison for row in rows if row.comparison]
    if not comparisons:
      missing = f": they are {NOT_MEASURED} for {baseline.label} at a fitted output temperature, "
      missing += "or for all other methods"
      parts.append(f"No {what} are compared{'' if rows is quality else missing}.")
      continue
    against = comparisons[0].baseline
    significant = [c for c in comparisons if c.is_significant]
    uncorrected = [
      c for c in comparisons if not c.is_significant and c.test.p < paired_statistics.SIGNIFICANCE
    ]
    if significant:
      parts.append(
        f"Of {count(len(comparisons), 'comparison')} of {what} with {against}, "
        f"{len(significant)} {'is' if len(significant) == 1 else 'are'} significant:\n\n"
        + "\n".join(f"* {c.sentence()}" for c in significant)
      )
    else:
      parts.append(
        f"No significant difference from {against} in {what}, in "
        f"{count(len(comparisons), 'comparison')}."
      )
    if uncorrected:
      parts.append(
        f"Without correction another {len(uncorrected)} would have p < 0.05; that is no finding."
      )
  for row in likelihoods:
    if row.result is baseline and row.fitted:
      parts.append(
        f"{row.task}: one fitted output temperature changes the perplexity of {baseline.label} by "
        f"{difference(row.difference, 2, ' %')} (95 % interval, not corrected)."
      )
  return "\n\n".join(parts)


def tuning_section(tunings: Sequence[Tuning]) -> str:
  if not tunings:
    return f"Tuning is {NOT_MEASURED}: give folders with --tune."
  states = lambda t: [trial["state"] for trial in t.trials]
  total = lambda t, name: number(sum(trial.get(name) or 0 for trial in t.trials), ".0f")
  best = lambda t: (max if t.maximizes else min)((x["value"] for x in t.complete()), default=None)
  columns = {
    "search": lambda t: t.name,
    "objective": lambda t: t.measure,
    "trials": lambda t: len(t.trials),
    "pruned": lambda t: states(t).count("pruned"),
    "failed": lambda t: states(t).count("failed"),
    "baseline": lambda t: number(t.baseline(), ".5g"),
    "best trial": lambda t: number(best(t), ".5g"),
    "tokens": lambda t: total(t, "tokens"),
    "seconds": lambda t: total(t, "seconds"),
  }
  parts = [
    table_of(tunings, columns),
    "The best of many trials looks too good on the examples that selected it: only a "
    "confirmation on fresh examples with fresh noise counts.",
  ]
  confirmed = [(t, t.profile.get("objective", {}).get("confirmed")) for t in tunings]
  found = [
    (t, c["examples"], d, Difference.from_json(d))
    for t, c in confirmed
    if c
    for d in c["differences"]
  ]
  if found:
    columns = {
      "search": lambda r: r[0].name,
      "method": lambda r: r[2]["of"],
      "against": lambda r: r[2]["to"],
      "output T fitted to both": lambda r: "yes" if r[2]["fitted"] else "no",
      "examples": lambda r: r[1],
      "difference": lambda r: difference(r[3], 2, " points" if r[0].maximizes else " %"),
      "interval excludes zero": lambda r: "yes" if r[3].excludes_zero else "no",
    }
    parts += [
      table_of(found, columns),
      "Confirmation on fresh examples with fresh noise, not corrected for multiple tests: a "
      "report on the confirmation's runs is.",
    ]
  parts += [f"{t.name}: confirmation {NOT_MEASURED}." for t, c in confirmed if not c]
  return "\n\n".join(parts)


def settings_section(results: Sequence[Result], tunings: Sequence[Tuning], command: str) -> str:
  """Lists the settings that all runs share, those that differ, and the commands."""
  flat = [_flatten({k: v for k, v in r.settings.items() if k != runs.COMMAND}) for r in results]
  names = sorted(set().union(*flat)) if flat else []
  shared = {n: flat[0].get(n) for n in names if all(f.get(n) == flat[0].get(n) for f in flat)}
  parts = []
  if shared:
    rows = [[n, _inline(v)] for n, v in shared.items()]
    parts += ["The same in all runs:", table(["setting", "value"], rows)]
  differing = [n for n in names if n not in shared and n not in ("name", "label")]
  if differing:
    parts += [
      "Different:",
      "\n".join(
        f"* {r.label}: " + "; ".join(f"{n} {_inline(f[n])}" for n in differing if n in f)
        for r, f in zip(results, flat)
      ),
    ]
  commands = [t.command for t in tunings if t.command]
  commands += [r.settings[runs.COMMAND] for r in results if runs.COMMAND in r.settings]
  lacking = [r.label for r in results if not r.model]
  if lacking:
    parts.append(f"The fingerprint of the model is not recorded for {', '.join(lacking)}.")
  for t in tunings:
    names = ("model", "roster", "objective", "data", "cost")
    shown = {name: t.profile[name] for name in names if t.profile.get(name)}
    shown |= {
      "objective": {k: v for k, v in shown.get("objective", {}).items() if k != "confirmed"}
    }
    parts.append(
      f"Search {t.name}: "
      + "; ".join(f"{k}: {_inline(v)}" for k, v in shown.items())
      + f"; seed {_inline(t.profile.get('seed'))}."
    )
  return "\n\n".join(
    [*parts, "Commands:", "```sh\n" + "\n".join([*dict.fromkeys(commands), command]) + "\n```"]
  )


def _flatten(settings, prefix=""):
  flat = {}
  for name, value in settings.items():
    if isinstance(value, dict):
      flat |= _flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat


def _inline(value):
  """Formats a setting in one line, shortening equal τ of all layers and long lists of names."""
  if isinstance(value, list) and len(value) > 1:
    if isinstance(value[0], float) and all(v == value[0] for v in value):
      return f"{_inline(value[0])} ({len(value)} times)"
    if len(value) > 4 and isinstance(value[0], str):
      return f"{value[0]} ... {value[-1]} ({len(value)})"
  if isinstance(value, float):
    return f"{value:.6g}"
  if isinstance(value, dict):
    return ", ".join(f"{k} {_inline(v)}" for k, v in value.items())
  return value if isinstance(value, str) else text_files.to_json(value)


def picture(name: str, caption: str) -> str:
  """Formats a picture with its caption and a link to its PDF."""
  return f"![{caption}]({name}.png)\n\n*{caption}* ([PDF]({name}.pdf))"
