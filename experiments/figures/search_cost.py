"""What a search of τ costs, and what of its gain is left on fresh examples.

    python -m experiments.reproduce --figure=search_cost --model=olmoe --data_dir=data \\
        --allow_code_execution

From the searches of `fig7`, `fig8` and `fig9`: the best value so far against the forward
rows (positions times members) spent; the gain on the examples of the search beside that on
fresh examples with fresh noise, and what share of it that is; a τ for each layer against one
τ for all, after equally many trials of the search and on fresh examples; and how many tokens
of roster inference the search has cost. The paper does not tell costs; its reviewers asked
for them.

    model      checkpoint (see models.py)              hardware               time
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       that of the searches
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    that of the searches
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     that of the searches
    embedded   ships with the package                  one CPU core           6 minutes (searches)
"""

import numpy as np

from experiments.analysis import drawing, report_page
from experiments.figures import compared, searches
from experiments.figures.work import Command, Work
from experiments.tuning import confirm

TITLE = "What a search costs, and what it buys"
SAW = "Its reviewers asked for the cost of the temperature search, which the paper does not tell."
CONFIGS = searches.CONFIGS


def commands(work: Work) -> list[Command]:
  return searches.commands(work, work.model.tasks)


def measure(work: Work) -> list[dict]:
  found = []
  for r in searches.records(work, work.model.tasks):
    tuning, cost = searches.tuning(r), r["profile"]["cost"]
    made = [t for t in tuning.trials if t["state"] in ("complete", "pruned")]
    rows = np.cumsum([t["forward_passes"] for t in made])
    found.append(
      {
        "task": r["task"],
        "objective": tuning.measure,
        "plain": tuning.plain(),
        **{
          name: cost[name] for name in ("tokens", "forward_passes", "seconds", "trials", "pruned")
        },
        "roster_tokens": cost["forward_passes"] / r["settings"]["num_members"],
        "searched": searches.searched_gain(r),
        "fresh": searches.fresh(r),
        "left": _left(r),
        "fresh_fitted": searches.fresh(r, fitted=True),
        "to_uniform": searches.fresh(r, confirm.TUNED, confirm.UNIFORM),
        "equal_trials": _equal_trials(made, tuning.maximizes),
        "history": [
          {
            "forward_passes": int(spent),
            "best": _best(made[:i], tuning.maximizes),
            "kind": t["kind"],
          }
          for i, (t, spent) in enumerate(zip(made, rows), 1)
        ],
      }
    )
  return found


def _best(trials, maximizes):
  """The best value of those that are complete."""
  return (max if maximizes else min)(
    (t["value"] for t in trials if t["state"] == "complete"), default=None
  )


def _equal_trials(made, maximizes):
  """What the sweep and the first trials of TPE, as many, came to; None if there are not so many."""
  sweep, tpe = ([t for t in made if t["kind"] == kind] for kind in ("sweep", "tpe"))
  best = {"sweep": _best(sweep, maximizes), "tpe": _best(tpe[: len(sweep)], maximizes)}
  if len(tpe) < len(sweep) or None in best.values():
    return None
  return {"trials": len(sweep), **best}


def _left(record):
  """The share of the gain on the search's examples that fresh ones have, %; None without one.

  The interval is that of the fresh examples.
  """
  if not searches.gained(record):
    return None
  gain, d = searches.searched_gain(record), searches.fresh(record)
  low, high = sorted(100 * d[bound] / gain for bound in ("low", "high"))
  return {"value": 100 * d["value"] / gain, "low": low, "high": high}


def table(records: list[dict]) -> str:
  costs = [
    [
      r["task"],
      r["trials"],
      r["pruned"],
      f"{r['tokens']:,}",
      f"{r['forward_passes']:,}",
      f"{r['seconds']:.0f}",
      f"{r['roster_tokens']:,.0f}",
    ]
    for r in records
  ]
  bought = []
  for r in records:
    equal = r["equal_trials"]
    bought.append(
      [
        r["task"],
        r["objective"],
        f"{r['searched']:+.2f}",
        compared.cell(r["fresh"], 2, True),
        compared.cell(r["left"], 0),
        compared.cell(r["fresh_fitted"], 2, True),
        *(
          (f"{equal['sweep']:.4f}", f"{equal['tpe']:.4f}", equal["trials"])
          if equal
          else ("", "", "")
        ),
        compared.cell(r["to_uniform"], 2, True) or "the search ended with one τ",
      ]
    )
  return "\n\n".join(
    [
      report_page.table(
        ["task", "trials", "pruned", "tokens", "forward rows", "s", "as tokens of the roster"],
        costs,
      ),
      report_page.table(
        [
          "task",
          "objective",
          "to plain, searched",
          "to plain, fresh",
          "of it left, %",
          "fresh, at fitted T",
          "one τ, searched",
          "TPE, searched",
          "trials of each",
          "found profile to one τ, fresh",
        ],
        bought,
      ),
      searches.NOTE + " Of it left: the fresh difference as a share of the searched one. One τ "
      "and TPE, searched: the best value of equally many trials of either, of which TPE's know "
      "those of one τ.",
    ]
  )


def findings(records: list[dict]) -> str:
  tokens = [r["roster_tokens"] for r in records]
  text = (
    f"A search costs as much as writing {min(tokens):,.0f} to {max(tokens):,.0f} tokens with "
    "the roster. "
  )
  left = [r["left"]["value"] for r in records if r["left"]]
  if left:
    clear = sum(
      r["left"] is not None and r["left"]["low"] > 0 and r["fresh"]["clear"] for r in records
    )
    text += (
      f"Of the gain on its examples {np.median(left):.0f} % (median; {min(left):.0f} to "
      f"{max(left):.0f} %) is there on fresh ones, where it is clear on {clear} of "
      f"{report_page.count(len(records), 'task')}. "
    )
  equal = [r for r in records if r["equal_trials"]]
  if equal:
    better = sum(_is_better(r, r["equal_trials"]["tpe"], r["equal_trials"]["sweep"]) for r in equal)
    worse = sum(_is_better(r, r["equal_trials"]["sweep"], r["equal_trials"]["tpe"]) for r in equal)
    text += (
      f"After equally many trials TPE's best is better than the sweep's on {better} of "
      f"{report_page.count(len(equal), 'task')}, and worse on {worse}, on the examples of the "
      "search. "
    )
  layered = [
    r["task"]
    for r in records
    if r["to_uniform"] and r["to_uniform"]["clear"] and _is_better(r, r["to_uniform"]["value"], 0.0)
  ]
  said = f"on {', '.join(layered)}" if layered else "on no task"
  return text + (
    "A τ for each layer is clearly better than the best one τ for all "
    f"{said} of {len(records)}, on fresh examples."
  )


def _is_better(record, value, other):
  return value < other if record["objective"] == "perplexity" else value > other


def draw(records: list[dict]):
  columns = min(3, len(records))
  lines = -(-len(records) // columns)
  figure, axes = drawing.axes(columns, lines, width=3.4, height=2.8)
  for r, axis in zip(records, axes.flat):
    shown = [h for h in r["history"] if h["best"] is not None]
    for kind, style in (
      ("sweep", dict(color="0.45", marker="s", linestyle="--")),
      ("tpe", dict(color="black", marker="o", linestyle="-")),
    ):
      part = [h for h in shown if h["kind"] == kind]
      axis.plot(
        [h["forward_passes"] for h in part],
        [h["best"] for h in part],
        markersize=4,
        fillstyle="none",
        linewidth=1,
        **style,
        label=f"best so far, {kind.replace('tpe', 'TPE')}",
      )
    axis.axhline(r["plain"], color="0.4", linestyle=":", linewidth=1.2, label="without noise")
    axis.set_title(r["task"], fontsize=9)
    axis.set_xlabel("forward rows spent")
    axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    axis.set_ylabel(r["objective"])
  for axis in axes.flat[len(records) :]:
    axis.set_visible(False)
  drawing.legend(figure, axes[0, 0])
  return figure
