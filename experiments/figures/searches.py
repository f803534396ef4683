"""Figures 7 to 9: histories of the searches of τ; and records of all figures made of searches.

    python -m experiments.reproduce --figure=fig7,fig8,fig9 --model=olmoe --data_dir=data \\
        --allow_code_execution

Trials in order: one τ for all layers in steps of 0.05 first, then TPE, with the best so far
and the baseline. The table adds how much of a search's gain holds on fresh examples with
fresh noise, which the paper does not report. With the embedded models, the choice of fig8 is
among four results of the last step of an arithmetic problem, and fig9 generates arithmetic
instead of programs.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, ClassVar

from experiments.analysis import drawing, pictures, report_page
from experiments.analysis.paired_statistics import Contrast, Difference
from experiments.analysis.run_results import Tuning
from experiments.figures import compared, figure_models
from experiments.figures.figure_run import Command, FigureRun
from experiments.tuning import confirm
from roe_jax import typed

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
  """No settings of its own: tasks and budgets are the model's."""

  num_seeds: ClassVar[int] = 4  # of the trials, and three of the confirmation


CONFIGS = figure_models.configs(Config(), Config())


def commands(run: FigureRun) -> list[Command]:
  """Returns the searches for all of the model's tasks."""
  return [run.tune(task) for task in run.model.tasks]


def records(run: FigureRun, tasks: Sequence[str]) -> list[Record]:
  """Returns a record per task.

  Each has "task" and "category"; "settings", "profile" and "trials" as written by tune; and
  "differences" of the confirmation (`Contrast`), with Holm's correction over tasks.
  """
  found = []
  for task in tasks:
    search, folder = run.tuned(task), run.tuning_folder(task)
    found.append(
      {
        "task": task,
        "category": run.model.category(task),
        "settings": typed.read(folder / "settings.json"),
        "profile": search.profile,
        "differences": _differences(search),
        "trials": search.trials,
      }
    )
  return corrected(found)


def measure(run: FigureRun) -> list[Record]:
  """Returns `records` of all of the model's tasks, without trials."""
  return [r | {"trials": []} for r in records(run, run.model.tasks)]


def _differences(search):
  """Returns the differences of a search's confirmation.

  Raises:
    ValueError: an earlier version wrote them without a test.
  """
  found = list(map(Contrast.from_json, search.profile["objective"]["confirmed"]["differences"]))
  if any(c.difference.p is None for c in found):
    raise ValueError(
      f"the temperature profile for {search.name} has differences without a test, of an earlier "
      "version: delete its profile.json, and rerun, which writes it from study.db"
    )
  return found


def corrected(found: Sequence[Record]) -> list[Record]:
  """Returns records with Holm's correction over tasks, for each kind of difference."""
  tests: dict[Any, list[Contrast]] = {}
  for c in (c for r in found for c in r["differences"]):
    tests.setdefault(c.kind, []).append(c)
  adjusted = {kind: iter(confirm.corrected(contrasts)) for kind, contrasts in tests.items()}
  return [r | {"differences": [next(adjusted[c.kind]) for c in r["differences"]]} for r in found]


def tuning(record: Record) -> Tuning:
  """Returns the search of a record."""
  return Tuning(record["task"], record["profile"], record["trials"])


def fresh(
  record: Record, of: str = confirm.TUNED, to: str = confirm.BASELINE, fitted: bool = False
) -> Difference | None:
  """Returns a difference on the confirmation's fresh examples; None: not measured."""
  kind = of, to, fitted
  return next((c.difference for c in record["differences"] if c.kind == kind), None)


def searched_gain(record: Record) -> float:
  """Returns the best trial's difference from the baseline on the search examples (% or points)."""
  objective = record["profile"]["objective"]
  if objective["name"] == "perplexity":
    return 100 * (objective["value"] / objective["baseline"] - 1)
  return 100 * (objective["value"] - objective["baseline"])


def gained(record: Record) -> bool:
  """Whether the best trial beats the baseline on the search examples."""
  gain = searched_gain(record)
  return gain < 0 if record["profile"]["objective"]["name"] == "perplexity" else gain > 0


SEARCHED, FRESH = "difference from baseline, search", "difference from baseline, fresh"
NOTE = (
  "Differences in % of the perplexity or points of accuracy. Search: the best trial on the "
  "search examples. Fresh: on examples and with noise seeds that no trial used, with 95 % "
  "intervals; *: significant after Holm's correction over the column."
)


def table(found: Sequence[Record]) -> str:
  objective, cost = lambda r: r["profile"]["objective"], lambda r: r["profile"]["cost"]
  columns = {
    "task": "task",
    "objective": lambda r: objective(r)["name"],
    "baseline": lambda r: f"{objective(r)['baseline']:.4f}",
    "best trial": lambda r: f"{objective(r)['value']:.4f}",
    SEARCHED: lambda r: f"{searched_gain(r):+.2f}",
    FRESH: lambda r: compared.cell(fresh(r), 2, True),
    "fresh, both at fitted T": lambda r: compared.cell(fresh(r, fitted=True), 2, True),
    "trials": lambda r: cost(r)["trials"],
    "pruned": lambda r: cost(r)["pruned"],
    "τ by layer": lambda r: " ".join(f"{t:.2f}" for t in r["profile"]["temperatures"]),
  }
  return f"{report_page.table_of(found, columns)}\n\n{NOTE}"


def findings(found: Sequence[Record]) -> str:
  """Describes how many gains of searches hold on fresh examples."""
  gains = [r for r in found if gained(r)]
  kept = [
    r["task"]
    for r in gains
    if (d := fresh(r)) and d.is_significant and (d.value < 0) == (searched_gain(r) < 0)
  ]
  return (
    f"On the search examples the best trial beats the baseline on {len(gains)} of "
    f"{report_page.count(len(found), 'task')}; on fresh examples this is significant on "
    f"{len(kept)}" + (f" ({', '.join(kept)})." if kept else ".")
  )


def draw(found: Sequence[Record]):
  """Draws trials in order, a panel per task."""
  figure, axes = drawing.panels([r["task"] for r in found], 3, 3.6, 3.0)
  for r, axis in zip(found, axes):
    pictures.trials(axis, tuning(r))
  drawing.legend(figure, max(axes, key=lambda a: len(a.get_legend_handles_labels()[1])))
  return figure


@dataclasses.dataclass(frozen=True)
class History:
  """The figure of the searches for one category of tasks.

  Attributes:
    TITLE, BACKGROUND: see `experiments.figures`.
    category: of the tasks.
  """

  TITLE: str
  BACKGROUND: str
  category: str
  CONFIGS: ClassVar[dict[str, Config]] = CONFIGS
  table, findings, draw = staticmethod(table), staticmethod(findings), staticmethod(draw)

  def commands(self, run: FigureRun) -> list[Command]:
    return [run.tune(task) for task in getattr(run.model, self.category)]

  def measure(self, run: FigureRun) -> list[Record]:
    return records(run, getattr(run.model, self.category))


FIGURES = {
  name: History(
    f"Searches of τ: {category}, by {objective}",
    f"The paper shows validation {measure} over the trials of its searches ({trials} trials on "
    f"{samples} samples), but not how much of the best trial's gain is selection luck.",
    category,
  )
  for name, category, objective, measure, trials, samples in (
    ("fig7", "math", "perplexity", "perplexity", 50, 100),
    ("fig8", "commonsense", "accuracy", "accuracy", 100, 300),
    ("fig9", "code", "accuracy", "pass@1", 50, 50),
  )
}
