"""Figure 6: one τ for all layers, in steps of 0.05.

    python -m experiments.reproduce --figure=fig6 --model=olmoe --data_dir=data

Results on the math tasks' test examples against τ, with intervals of the difference from the
baseline on the same examples, and the perplexity of their references where there are any.
"""

import dataclasses

from experiments.analysis import drawing
from experiments.evaluation.methods import Baseline, RosterOf, Spec, read
from experiments.figures import compared, figure_models
from experiments.figures.figure_run import Command, FigureRun

TITLE = "One temperature for all layers"
BACKGROUND = (
  "The paper reports that accuracy rises with τ, peaks at a task-specific value, and falls."
)


@dataclasses.dataclass(frozen=True)
class Config:
  """The sweep.

  Attributes:
    step, top: τ are step, 2 step, ... up to top.
    num_examples: of each task, the first of the test split.
    num_seeds: noise seeds.
  """

  step: float = 0.05
  top: float = 0.5
  num_examples: int = 300
  num_seeds: int = 1

  @property
  def temperatures(self) -> list[float]:
    return [round(self.step * (i + 1), 10) for i in range(round(self.top / self.step))]


CONFIGS = figure_models.configs(Config(), embedded=Config(num_examples=50))


def _methods(config) -> dict[Spec, float]:
  """Returns {method: τ}."""
  methods: dict[Spec, float] = {Baseline(): 0.0}
  return methods | {RosterOf(t=t): t for t in config.temperatures}


def commands(run: FigureRun) -> list[Command]:
  config, methods = run.config, list(_methods(run.config))
  tasks = list(run.model.math)
  return [
    run.compare(
      "sweep", tasks, methods, num_examples=config.num_examples, num_seeds=config.num_seeds
    )
  ]


def measure(run: FigureRun) -> list[compared.Record]:
  results, tau = run.compared("sweep"), _methods(run.config)
  found = compared.records(list(results.values()), results[Baseline()])
  return sorted(
    (r | {"τ": tau[read(r["method"])]} for r in found), key=lambda r: (r["task"], r["τ"])
  )


def table(records: list[compared.Record]) -> str:
  columns = ("quality", "quality_difference", *compared.LIKELIHOOD)
  return compared.table(records, ("task", "τ", "examples"), columns)


def findings(records: list[compared.Record]) -> str:
  best = []
  for task in compared.unique(records, "task"):
    top = max((r for r in records if r["task"] == task), key=lambda r: r["quality"].value)
    best.append(f"{top['τ']:g} on {task}")
  return (
    f"The best task results are at τ = {', '.join(best)}, which means little by itself because "
    f"of selection luck. {compared.findings(records)}"
  )


def draw(records: list[compared.Record]):
  tasks = compared.unique(records, "task")
  measures = ("quality_difference", "perplexity_difference")
  measures = [m for m in measures if any(r[m] for r in records)]
  figure, axes = drawing.axes(len(tasks), len(measures), width=3.0, height=2.4, sharey="row")
  for name, row in zip(measures, axes):
    for task, axis in zip(tasks, row):
      shown = [r for r in records if r["task"] == task and r[name]]
      compared.draw_gains(axis, name, [r["τ"] for r in shown], shown, **drawing.line(0))
      axis.set_xlabel("τ of all layers (router logits)")
      axis.set_title(task, fontsize=9)
    row[0].set_ylabel(compared.GAINS[name])
  return figure
