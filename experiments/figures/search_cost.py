"""What a search of τ costs, and what of its gain is left on fresh examples.

    python -m experiments.reproduce --figure=search_cost --model=olmoe --data_dir=data --allow_code_execution

From the searches of `fig7`, `fig8` and `fig9`: the best value so far against the forward
rows (positions times members) spent; the gain on the examples of the search beside that on
fresh examples with fresh noise; a profile for each layer against the best one τ for all;
and how many tokens of roster inference the search has cost. The paper does not tell costs;
its reviewers asked for them.

    model      checkpoint (see models.py)              hardware               time
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       that of the searches
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    that of the searches
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     that of the searches
    embedded   ships with the package                  one CPU core           that of the searches, 6 minutes
"""

import numpy as np

from experiments import confirm, drawing
from experiments.figures import compared, searches
from experiments.figures.work import Command, Work
from experiments.reporting import page

TITLE = "What a search costs, and what it buys"
SAW = ("Its reviewers asked for the cost of the temperature search, which the paper does not "
       "tell.")


CONFIGS = searches.CONFIGS


def commands(work: Work) -> list[Command]:
  return searches.commands(work, work.model.tasks)


def measure(work: Work) -> list[dict]:
  found = []
  for r in searches.records(work, work.model.tasks):
    tuning, cost = searches.tuning(r), r["profile"]["cost"]
    made = [t for t in tuning.trials if t["state"] in ("complete", "pruned")]
    rows = np.cumsum([t["forward_rows"] for t in made])
    best, history = None, []
    for t, spent in zip(made, rows):
      if t["state"] == "complete":
        better = best is None or (t["value"] > best if tuning.maximises else t["value"] < best)
        best = t["value"] if better else best
      history.append({"forward_rows": int(spent), "best": best, "kind": t["kind"]})
    found.append({
        "task": r["task"], "objective": tuning.measure, "plain": tuning.plain(),
        "tokens": cost["tokens"], "forward_rows": cost["forward_rows"], "seconds": cost["seconds"],
        "roster_tokens": cost["forward_rows"] / r["settings"]["num_members"],
        "searched": searches.searched_gain(r), "fresh": searches.fresh(r),
        "fresh_fitted": searches.fresh(r, fitted=True),
        "to_uniform": searches.fresh(r, confirm.TUNED, confirm.UNIFORM), "history": history})
  return found


def table(records: list[dict]) -> str:
  rows = [[r["task"], r["objective"], f"{r['forward_rows']:,}", f"{r['seconds']:.0f}",
           f"{r['roster_tokens']:,.0f}", f"{r['searched']:+.2f}", compared.cell(r["fresh"], 2, True),
           compared.cell(r["fresh_fitted"], 2, True),
           compared.cell(r["to_uniform"], 2, True) or "the search ended with one τ"]
          for r in records]
  return page.table(
      ["task", "objective", "forward rows", "s", "as tokens of the roster", "to plain, searched",
       "to plain, fresh", "there at fitted T", "to the best one τ, fresh"],
      rows) + "\n\n" + searches.NOTE


def findings(records: list[dict]) -> str:
  tokens = [r["roster_tokens"] for r in records]
  layered = [r["task"] for r in records if r["to_uniform"] and r["to_uniform"]["clear"]
             and (r["to_uniform"]["value"] < 0) == (r["objective"] == "perplexity")]
  said = (f"on {', '.join(layered)}" if layered else "on no task")
  return (f"A search costs as much as writing {min(tokens):,.0f} to {max(tokens):,.0f} tokens with the "
          f"roster. A τ for each layer is clearly better than the best one τ for all {said} of "
          f"{len(records)}, on fresh examples.")


def draw(records: list[dict]):
  columns = min(3, len(records))
  lines = -(-len(records) // columns)
  figure, axes = drawing.axes(columns, lines, width=3.4, height=2.8)
  for r, axis in zip(records, axes.flat):
    shown = [h for h in r["history"] if h["best"] is not None]
    for kind, style in (("sweep", dict(color="0.45", marker="s", linestyle="--")),
                        ("tpe", dict(color="black", marker="o", linestyle="-"))):
      part = [h for h in shown if h["kind"] == kind]
      axis.plot([h["forward_rows"] for h in part], [h["best"] for h in part], markersize=4,
                fillstyle="none", linewidth=1, **style,
                label=f"best so far, {kind.replace('tpe', 'TPE')}")
    axis.axhline(r["plain"], color="0.4", linestyle=":", linewidth=1.2, label="without noise")
    axis.set_title(r["task"], fontsize=9)
    axis.set_xlabel("forward rows spent")
    axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    axis.set_ylabel(r["objective"])
  for axis in axes.flat[len(records):]:
    axis.set_visible(False)
  drawing.legend(figure, axes[0, 0])
  return figure
