"""The page of a report: Markdown from the lines of `analysis`."""

from collections.abc import Sequence
import json
from typing import Any

import tabulate

from experiments.analysis import calibration_error, comparisons, paired_statistics
from experiments.analysis.paired_statistics import Comparison, Difference, Estimate
from experiments.analysis.run_results import Result, Tuning
from experiments.records import runs

NOT_MEASURED = "not measured"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """A Markdown table; what a cell holds is never taken for markup of the table."""
  clean = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
  return tabulate.tabulate(clean, header, tablefmt="pipe", disable_numparse=True)


def estimate(e: Estimate | None, places: int, unit: str = "") -> str:
  if e is None:
    return NOT_MEASURED
  return f"{e.value:.{places}f}{unit} [{e.low:.{places}f}, {e.high:.{places}f}]"


def difference(d: Difference | None, places: int, unit: str = "") -> str:
  if d is None:
    return ""
  return f"{d.value:+.{places}f}{unit} [{d.low:+.{places}f}, {d.high:+.{places}f}]"


def p_value(p: float) -> str:
  return "< 0.001" if p < 0.001 else f"{p:.3f}"


def number(value: float | None, spec: str = ".3g") -> str:
  return NOT_MEASURED if value is None else format(value, spec)


def count(n: int, thing: str) -> str:
  return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def compared(lines: Sequence[Any]) -> str:
  """How many lines of a table have a test."""
  return count(sum(line.comparison is not None for line in lines), "test")


def _verdict(comparison: Comparison | None) -> list[str]:
  if comparison is None:
    return ["", "", ""]
  return [p_value(comparison.test.p), p_value(comparison.adjusted), comparison.verdict]


def quality_section(lines: Sequence[comparisons.Quality], baseline: Result) -> str:
  if not lines:
    return f"Results of tasks are {NOT_MEASURED}."
  rows = []
  for line in lines:
    c = line.comparison
    rows.append(
      [
        line.task,
        line.result.label,
        line.metric,
        line.examples,
        len(line.result.seeds(line.task)),
        estimate(line.value, 1),
        "" if line.between is None else f"{line.between:.2f}",
        difference(c.difference, 1) if c else "",
        c.test.name if c else "",
        *_verdict(c),
      ]
    )
  text = table(
    [
      "task",
      "method",
      "metric",
      "examples",
      "seeds",
      "%",
      "± between seeds",
      f"to {baseline.label}, points",
      "test",
      "p",
      "adjusted p",
      "verdict",
    ],
    rows,
  )
  notes = [
    "In brackets 95 % bootstrap intervals over examples; the metric of each example is first "
    "averaged over noise seeds. ± is the standard deviation of the seeds' means. Differences "
    "are on the same examples. Tests: McNemar's exact one where every example was answered "
    "once, a sign-flip permutation test over examples otherwise; adjusted p: Holm's correction "
    f"over the {compared(lines)} of this table. A verdict needs an adjusted p below 0.05 and an "
    "interval without zero."
  ]
  notes += [
    f"{line.task}: {count(line.missing, 'example')} that only one of {line.result.label} "
    f"and {line.comparison.baseline} has left out; {line.examples} paired."
    for line in lines
    if line.missing and line.comparison
  ]
  return "\n\n".join([text, *notes])


def likelihood_section(lines: Sequence[comparisons.Likelihood], baseline: Result) -> str:
  if not lines:
    return f"Perplexities of reference texts are {NOT_MEASURED}."
  has_fit = {line.task for line in lines if line.fitted and line.result is baseline}
  rows = []
  for line in lines:
    c = line.comparison
    is_baseline = line.result is baseline
    rows.append(
      [
        line.task,
        comparisons.label(line.result, line.fitted),
        "" if not line.fitted else number(line.result.output_temperatures.get(line.task)),
        line.examples,
        estimate(line.perplexity, 4),
        "" if line.between is None else f"{line.between:.4f}",
        difference(line.to_plain, 2),
        difference(c.difference, 2) if c else "",
        *(
          _verdict(c)
          if c or is_baseline
          else ["", "", f"none: {baseline.label} at its fitted T is {NOT_MEASURED}"]
        ),
      ]
    )
  text = table(
    [
      "task",
      "method",
      "T",
      "examples",
      "perplexity",
      "± between seeds",
      f"to {baseline.label}, %",
      f"to {baseline.label} at fitted T, %",
      "p",
      "adjusted p",
      f"verdict, to {baseline.label} at fitted T",
    ],
    rows,
  )
  notes = [
    "A model that is too sure of itself gains from anything that flattens its distribution, an "
    "output temperature as well as a roster. Verdicts are therefore against "
    f"{baseline.label} with its output temperature T fitted on validation data; sign-flip tests "
    f"over examples with Holm's correction over the {compared(lines)} of this table. Lower is "
    "better."
  ]
  missing = sorted({line.task for line in lines} - has_fit)
  if missing:
    notes.append(
      f"**{baseline.label} at a fitted output temperature is {NOT_MEASURED} for "
      f"{', '.join(missing)}: without it no claim about perplexity can be made there.**"
    )
  return "\n\n".join([text, *notes])


def calibration_section(lines: Sequence[comparisons.Calibration], baseline: Result) -> str:
  if not lines:
    return f"Calibration is {NOT_MEASURED}: the runs hold no confidences."
  rows, differences = [], []
  for line in lines:
    name, c = comparisons.label(line.result, line.fitted), line.comparison
    rows.append(
      [
        line.task,
        name,
        len(line.events.confidences),
        estimate(line.nll, 4),
        estimate(line.error, 4),
        estimate(line.width_error, 4),
        estimate(line.brier, 4),
      ]
    )
    if c:
      differences.append(
        [
          line.task,
          name,
          difference(line.error_difference, 4),
          difference(c.difference, 4),
          *_verdict(c),
        ]
      )
  ece = f"ECE, {calibration_error.MASS}"
  parts = [
    table(
      [
        "task",
        "method",
        "events",
        "NLL per token, nats",
        ece,
        f"ECE, {calibration_error.WIDTH}",
        "Brier score",
      ],
      rows,
    ),
    f"ECE with {calibration_error.BINS} bins; where this page speaks of ECE alone it is that of "
    f"{calibration_error.MASS} bins. Its intervals are reversed percentile ones, and begin at 0 "
    "where a calibrated model would show as much. Events of one example (and of its "
    "seeds) are resampled together.",
  ]
  if differences:
    at_fitted = f"to {baseline.label} at fitted T"
    parts += [
      table(
        [
          "task",
          "method",
          f"ECE, {at_fitted}",
          f"Brier score, {at_fitted}",
          "p",
          "adjusted p",
          "verdict on the Brier score",
        ],
        differences,
      ),
      "Lower is better. ECEs have no per-example values that could be swapped, so that "
      "their differences have an interval, but no test.",
    ]
  fitted = {line.task for line in lines if line.fitted and line.result is baseline}
  for task in sorted({line.task for line in lines} - fitted):
    parts.append(
      f"**{task}: confidences of {baseline.label} at a fitted output temperature are "
      f"{NOT_MEASURED}: without them no claim about calibration can be made.**"
    )
  others = [
    f"{comparisons.label(line.result, line.fitted)} on {line.task}"
    for line in lines
    if line.task in fitted and line.result is not baseline and not line.comparison
  ]
  if others:
    parts.append(
      f"Not compared, as they have other events than {baseline.label}: {', '.join(others)}."
    )
  return "\n\n".join(parts)


def cost_section(lines: Sequence[comparisons.Cost]) -> str:
  rows = [
    [
      line.task,
      line.result.label,
      number(line.tokens_per_second, ".4g"),
      number(line.rows, ".4g"),
      number(line.flops),
      number(line.experts),
      number(None if line.peak_bytes is None else line.peak_bytes / 2**20, ".4g"),
    ]
    for line in lines
  ]
  return "\n\n".join(
    [
      table(
        [
          "task",
          "method",
          "tokens/s",
          "forward rows per example",
          "forward FLOPs per example",
          "experts read per layer and step",
          "peak memory, MiB",
        ],
        rows,
      ),
      "Tokens per second are medians over stretches of work. Rows and FLOPs are those that one "
      "example with one seed took. Experts are the different ones that a layer reads in a step, "
      "means over layers and steps.",
    ]
  )


def power_section(
  lines: Sequence[comparisons.Power], likelihoods: Sequence[comparisons.Likelihood]
) -> str:
  sentences = [
    f"{p.task}: with {p.examples} examples, of which {100 * p.discordance:.1f} % differ (mean "
    f"squared difference in {p.measure} of the method that differs most), one comparison sees "
    f"true differences of {p.points:.1f} points and more with {100 * paired_statistics.POWER:.0f} % "
    f"power, and at the strictest level of Holm's correction {p.corrected_points:.1f} points."
    for p in lines
  ]
  widest: dict[str, float] = {}
  for line in likelihoods:
    if line.comparison:
      seen = paired_statistics.detectable_from_interval(line.comparison.difference)
      widest[line.task] = max(widest.get(line.task, 0.0), seen)
  sentences += [
    f"{task}: relative differences of perplexity of {seen:.2f} % and more, from the "
    "widest interval of its table, before correction."
    for task, seen in widest.items()
  ]
  if not sentences:
    return "Nothing is compared, so that nothing can be said about power."
  return "\n".join(f"* {s}" for s in sentences) + (
    '\n\n"No clear difference" says that a difference of this size would probably have been '
    "seen, not that the methods are equal."
  )


def findings(
  quality: Sequence[comparisons.Quality],
  likelihoods: Sequence[comparisons.Likelihood],
  calibrations: Sequence[comparisons.Calibration],
  baseline: Result | None,
) -> str:
  """What is significant, in sentences made from the figures."""
  if baseline is None:
    return "No runs are compared here."
  parts = []
  for what, lines in (
    ("task results", quality),
    ("perplexities", likelihoods),
    ("Brier scores", calibrations),
  ):
    comparisons = [line.comparison for line in lines if line.comparison]
    if not comparisons:
      parts.append(
        f"No {what} are compared"
        + (
          f": those of {baseline.label} at a fitted output temperature, or of others beside it, "
          f"are {NOT_MEASURED}."
          if lines is not quality
          else "."
        )
      )
      continue
    against = comparisons[0].baseline
    clear = [c for c in comparisons if c.is_significant]
    uncorrected = [
      c for c in comparisons if not c.is_significant and c.test.p < paired_statistics.SIGNIFICANCE
    ]
    if clear:
      parts.append(
        f"Of {count(len(comparisons), 'comparison')} of {what} with {against}, "
        f"{len(clear)} {'is' if len(clear) == 1 else 'are'} clear:\n\n"
        + "\n".join(f"* {c.sentence()}" for c in clear)
      )
    else:
      parts.append(
        f"No clear difference from {against} in {what}, in {count(len(comparisons), 'comparison')}."
      )
    if uncorrected:
      parts.append(
        f"Without the correction another {len(uncorrected)} would have p < 0.05, which "
        "is no finding."
      )
  for line in likelihoods:
    if line.result is baseline and line.fitted:
      d = line.to_plain
      verb = (
        "makes no clear difference to"
        if not d.is_significant
        else ("lowers" if d.value < 0 else "raises")
      )
      parts.append(
        f"{line.task}: one fitted output temperature {verb} the perplexity of "
        f"{baseline.label} ({difference(d, 2, ' %')})."
      )
  return "\n\n".join(parts)


def tuning_section(tunings: Sequence[Tuning]) -> str:
  if not tunings:
    return f"Tuning is {NOT_MEASURED}: no folder was given."
  rows = []
  for t in tunings:
    complete = t.complete()
    values = [trial["value"] for trial in complete]
    best = None if not values else (max if t.maximizes else min)(values)
    states = [trial["state"] for trial in t.trials]
    total = lambda name: sum(trial.get(name) or 0 for trial in t.trials)
    rows.append(
      [
        t.name,
        t.measure,
        len(t.trials),
        states.count("pruned"),
        states.count("failed"),
        number(t.plain(), ".5g"),
        number(best, ".5g"),
        number(total("tokens"), ".0f"),
        number(total("seconds"), ".0f"),
      ]
    )
  parts = [
    table(
      [
        "tuning",
        "objective",
        "trials",
        "pruned",
        "failed",
        "without noise",
        "best seen",
        "tokens",
        "seconds",
      ],
      rows,
    ),
    "The best of many trials on the examples that it was chosen by is too good: only a "
    "confirmation with fresh noise and fresh examples counts.",
  ]
  confirmed = [(t, t.profile.get("objective", {}).get("confirmed")) for t in tunings]
  rows = []
  for t, found in confirmed:
    for d in found["differences"] if found else ():
      interval = Difference(d["value"], d["low"], d["high"])
      rows.append(
        [
          t.name,
          d["of"],
          d["to"],
          "yes" if d["fitted"] else "no",
          found["examples"],
          difference(interval, 2, " points" if t.maximizes else " %"),
          "yes" if interval.is_significant else "no",
        ]
      )
  if rows:
    parts += [
      table(
        [
          "tuning",
          "of",
          "to",
          "output T fitted to both",
          "examples",
          "difference",
          "interval leaves out zero",
        ],
        rows,
      ),
      "Confirmation on fresh examples with fresh noise, not corrected for several looks: "
      "a report on the runs of the confirmation is.",
    ]
  parts += [f"{t.name}: confirmation {NOT_MEASURED}." for t, found in confirmed if not found]
  return "\n\n".join(parts)


def settings_section(results: Sequence[Result], tunings: Sequence[Tuning], command: str) -> str:
  """What all runs share, in what they differ, and how to make it again."""
  flat = [_flatten({k: v for k, v in r.settings.items() if k != runs.COMMAND}) for r in results]
  names = sorted(set().union(*flat)) if flat else []
  shared = {n: flat[0].get(n) for n in names if all(f.get(n) == flat[0].get(n) for f in flat)}
  parts = []
  if shared:
    parts += [
      "The same in all runs:",
      table(["setting", "value"], [[n, _inline(v)] for n, v in shared.items()]),
    ]
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
    told = {
      name: t.profile[name]
      for name in ("model", "roster", "objective", "data", "cost")
      if t.profile.get(name)
    }
    told |= {"objective": {k: v for k, v in told.get("objective", {}).items() if k != "confirmed"}}
    parts.append(
      f"Tuning {t.name}: "
      + "; ".join(f"{k}: {_inline(v)}" for k, v in told.items())
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
  """A setting in one line; equal numbers of all layers as one, of many names the ends."""
  if (
    isinstance(value, list)
    and len(value) > 1
    and isinstance(value[0], float)
    and all(v == value[0] for v in value)
  ):
    return f"{_inline(value[0])} ({len(value)} times)"
  if isinstance(value, list) and len(value) > 4 and isinstance(value[0], str):
    return f"{value[0]} ... {value[-1]} ({len(value)})"
  if isinstance(value, float):
    return f"{value:.6g}"
  if isinstance(value, dict):
    return ", ".join(f"{k} {_inline(v)}" for k, v in value.items())
  return value if isinstance(value, str) else json.dumps(value)


def picture(name: str, caption: str) -> str:
  """A picture beside the page, with its caption and its form for print."""
  return f"![{caption}]({name}.png)\n\n*{caption}* ([PDF]({name}.pdf))"
