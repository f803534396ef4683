"""What a search of τ costs, and how much of its gain holds on fresh examples.

    python -m experiments.reproduce --figure=search_cost --model=olmoe --data_dir=data \\
        --allow_code_execution

From the searches of fig7, fig8 and fig9: the best value so far against forward passes (tokens
x members) spent; the gain on the search examples, that on fresh examples with fresh noise, and
their ratio; a τ per layer against one τ for all layers, after equally many trials and on fresh
examples; and the cost of the search in tokens of roster inference.
"""

from typing import Any

import numpy as np

from experiments.analysis import drawing, report_page
from experiments.figures import compared, searches
from experiments.figures.figure_run import FigureRun
from experiments.tuning import confirm

TITLE = "Cost and gain of a search"
BACKGROUND = "Its reviewers asked for the cost of the temperature search, which the paper omits."
CONFIGS, commands = searches.CONFIGS, searches.commands


def measure(run: FigureRun) -> list[dict]:
  found = []
  for r in searches.records(run, run.model.tasks):
    tuning, cost = searches.tuning(r), r["profile"]["cost"]
    made = [t for t in tuning.trials if t["state"] in ("complete", "pruned")]
    passes = np.cumsum([t["forward_passes"] for t in made])
    costs = ("tokens", "forward_passes", "seconds", "trials", "pruned")
    found.append(
      {
        "task": r["task"],
        "objective": tuning.measure,
        "baseline": tuning.baseline(),
        **{name: cost[name] for name in costs},
        "roster_tokens": cost["forward_passes"] / r["settings"]["num_members"],
        "searched": searches.searched_gain(r),
        "fresh": searches.fresh(r),
        "retained": _retained(r),
        "fresh_fitted": searches.fresh(r, fitted=True),
        "to_uniform": searches.fresh(r, confirm.TUNED, confirm.UNIFORM),
        "equal_trials": _equal_trials(made, tuning.maximizes),
        "history": [
          {
            "forward_passes": int(spent),
            "best": _best(made[:i], tuning.maximizes),
            "kind": t["kind"],
          }
          for i, (t, spent) in enumerate(zip(made, passes), 1)
        ],
      }
    )
  return found


def _best(trials, maximizes):
  """Returns the best value of the complete trials."""
  values = (t["value"] for t in trials if t["state"] == "complete")
  return (max if maximizes else min)(values, default=None)


def _equal_trials(made, maximizes):
  """Returns the best of the sweep and of as many first trials of TPE; None if there are fewer."""
  sweep, tpe = ([t for t in made if t["kind"] == kind] for kind in ("sweep", "tpe"))
  best = {"sweep": _best(sweep, maximizes), "tpe": _best(tpe[: len(sweep)], maximizes)}
  if len(tpe) < len(sweep) or None in best.values():
    return None
  return {"trials": len(sweep), **best}


def _retained(record):
  """Returns the fresh gain in percent of the search gain; None without a search gain.

  The interval is that of the fresh examples.
  """
  if not searches.gained(record):
    return None
  gain, d = searches.searched_gain(record), searches.fresh(record)
  return d and (d if gain > 0 else -d).scaled(100 / abs(gain))


def table(records: list[dict]) -> str:
  def equal(key, spec):
    return lambda r: format(r["equal_trials"][key], spec) if r["equal_trials"] else ""

  costs = {
    "task": "task",
    "trials": "trials",
    "pruned": "pruned",
    "tokens": lambda r: f"{r['tokens']:,}",
    "forward passes": lambda r: f"{r['forward_passes']:,}",
    "seconds": lambda r: f"{r['seconds']:.0f}",
    "equivalent roster tokens": lambda r: f"{r['roster_tokens']:,.0f}",
  }
  gains = {
    "task": "task",
    "objective": "objective",
    searches.SEARCHED: lambda r: f"{r['searched']:+.2f}",
    searches.FRESH: lambda r: compared.cell(r["fresh"], 2, True),
    "retained (%)": lambda r: compared.cell(r["retained"], 0),
    "fresh, both at fitted T": lambda r: compared.cell(r["fresh_fitted"], 2, True),
    "best of sweep": equal("sweep", ".4f"),
    "best of TPE": equal("tpe", ".4f"),
    "trials of each": equal("trials", ""),
    "difference from best one τ, fresh": lambda r: (
      compared.cell(r["to_uniform"], 2, True) or "the search found one τ"
    ),
  }
  return "\n\n".join(
    [
      report_page.table_of(records, costs),
      report_page.table_of(records, gains),
      f"{searches.NOTE} Retained: the fresh difference in percent of the search difference. Best "
      "of sweep and of TPE: the best value of equally many trials of each; TPE's start from the "
      "sweep's.",
    ]
  )


def findings(records: list[dict]) -> str:
  tokens, count = [r["roster_tokens"] for r in records], report_page.count
  text = (
    f"A search costs as much as generating {min(tokens):,.0f} to {max(tokens):,.0f} tokens with "
    "the roster. "
  )
  gained = [r for r in records if r["retained"]]
  if gained:
    retained = [r["retained"].value for r in gained]
    significant = sum(r["retained"].low > 0 and r["fresh"].is_significant for r in gained)
    text += (
      f"{np.median(retained):.0f} % of the search gain (median; {min(retained):.0f} to "
      f"{max(retained):.0f} %) is retained on fresh examples, where it is significant on "
      f"{significant} of {count(len(records), 'task')}. "
    )
  equal = [r for r in records if r["equal_trials"]]
  if equal:
    wins = {
      (a, b): sum(_is_better(r, r["equal_trials"][a], r["equal_trials"][b]) for r in equal)
      for a, b in (("tpe", "sweep"), ("sweep", "tpe"))
    }
    text += (
      f"After equally many trials TPE's best beats the sweep's on {wins['tpe', 'sweep']} of "
      f"{count(len(equal), 'task')} and loses on {wins['sweep', 'tpe']}, on the search examples. "
    )
  layered = [
    r["task"]
    for r in records
    if (d := r["to_uniform"]) and d.is_significant and _is_better(r, d.value, 0.0)
  ]
  return text + (
    "A τ per layer is significantly better than the best one τ for all layers on "
    f"{', '.join(layered) or 'none'} of {count(len(records), 'task')}, on fresh examples."
  )


def _is_better(record, value, other):
  return value < other if record["objective"] == "perplexity" else value > other


def draw(records: list[dict]):
  figure, axes = drawing.panels([r["task"] for r in records], 3, 3.4, 2.8)
  styles = {"sweep": ("0.45", "s", "--", "sweep"), "tpe": ("black", "o", "-", "TPE")}
  for r, axis in zip(records, axes):
    for kind, (color, marker, line, name) in styles.items():
      points = [
        (h["forward_passes"], h["best"])
        for h in r["history"]
        if h["kind"] == kind and h["best"] is not None
      ]
      style: dict[str, Any] = dict(
        color=color, marker=marker, linestyle=line, markersize=4, fillstyle="none"
      )
      axis.plot(*zip(*points), linewidth=1, label=f"best so far, {name}", **style)
    axis.axhline(r["baseline"], color="0.4", linestyle=":", linewidth=1.2, label="baseline")
    axis.set_xlabel("forward passes")
    axis.xaxis.set_major_formatter(drawing.short)
    better = "lower" if r["objective"] == "perplexity" else "higher"
    axis.set_ylabel(f"{r['objective']} ({better} is better)")
  drawing.legend(figure, axes[0])
  return figure
