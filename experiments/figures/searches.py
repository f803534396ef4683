"""Records of figures that are made of searches of τ."""

from collections.abc import Sequence
import dataclasses
import json
from typing import Any, ClassVar

from experiments import confirm, drawing
from experiments.figures import compared
from experiments.figures.work import Command, Work
from experiments.reporting import page, pictures
from experiments.reporting.results import Tuning

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
  """Nothing of its own: tasks and budgets are the model's."""

  seeds: ClassVar[int] = 4  # of the trials, and three of the confirmation


CONFIGS = {name: Config() for name in ("olmoe", "mixtral", "gpt_oss", "embedded")}


def commands(work: Work, tasks: Sequence[str]) -> list[Command]:
  return [work.tune(task) for task in tasks]


def records(work: Work, tasks: Sequence[str]) -> list[Record]:
  """A record for each task: "task", "category", "settings", "profile" and "trials", as tune wrote them."""
  found = []
  for task in tasks:
    tuning = work.tuned(task)
    settings = json.loads((work.root / "tune" / task / "settings.json").read_text())
    found.append({"task": task, "category": work.model.category(task), "settings": settings,
                  "profile": tuning.profile, "trials": tuning.trials})
  return found


def tuning(record: Record) -> Tuning:
  """The search of a record."""
  return Tuning(record["task"], record["profile"], record["trials"])


def fresh(record: Record, of: str = confirm.TUNED, to: str = confirm.PLAIN,
          fitted: bool = False) -> dict[str, Any] | None:
  """A difference of the confirmation on fresh examples; None: not there."""
  return next((d for d in record["profile"]["objective"]["confirmed"]["differences"]
               if (d["of"], d["to"], d["fitted"]) == (of, to, fitted)), None)


def searched_gain(record: Record) -> float:
  """The best trial against plain on the examples of the search: percent, or points."""
  objective = record["profile"]["objective"]
  if objective["name"] == "perplexity":
    return 100 * (objective["value"] / objective["plain"] - 1)
  return 100 * (objective["value"] - objective["plain"])


def table(found: Sequence[Record]) -> str:
  """Plain, the best trial, and what of it was found on fresh examples."""
  rows = []
  for r in found:
    objective, cost = r["profile"]["objective"], r["profile"]["cost"]
    rows.append([
        r["task"], objective["name"], f"{objective['plain']:.4f}", f"{objective['value']:.4f}",
        f"{searched_gain(r):+.2f}", compared.cell(fresh(r), 2, True),
        compared.cell(fresh(r, fitted=True), 2, True), cost["trials"], cost["pruned"],
        " ".join(f"{t:.2f}" for t in r["profile"]["temperatures"])])
  return page.table(
      ["task", "objective", "plain", "best trial", "to plain, searched",
       "to plain, fresh", "there at fitted T", "trials", "pruned", "τ by layer"],
      rows) + "\n\n" + NOTE


NOTE = ("Differences in % of the perplexity or points of accuracy; fresh: on examples that no trial "
         "saw, with noise seeds that none used, 95 % intervals; * the interval leaves out zero.")


def findings(found: Sequence[Record]) -> str:
  """How many gains of a search are there on fresh examples."""
  gains = [r for r in found if searched_gain(r) and (searched_gain(r) < 0) == (
      r["profile"]["objective"]["name"] == "perplexity")]
  kept = [r for r in gains if fresh(r)["clear"] and (fresh(r)["value"] < 0) == (
      searched_gain(r) < 0)]
  return (f"On the examples of the search the best trial is better than the plain model on {len(gains)} "
          f"of {page.count(len(found), 'task')}; on fresh ones this is clear on {len(kept)}"
          + (f" ({', '.join(r['task'] for r in kept)})." if kept else "."))


def draw(found: Sequence[Record]):
  """Trials in their order, a panel for each task."""
  columns = min(3, len(found))
  figure, axes = drawing.axes(columns, -(-len(found) // columns), width=3.6, height=3.0)
  for r, axis in zip(found, axes.flat):
    pictures.trials(axis, tuning(r))
    axis.set_title(r["task"], fontsize=9)
  for axis in axes.flat[len(found):]:
    axis.set_visible(False)
  named = max(axes.flat[:len(found)], key=lambda a: len(a.get_legend_handles_labels()[1]))
  drawing.legend(figure, named)
  return figure
