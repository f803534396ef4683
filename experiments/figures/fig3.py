"""Figure 3: the main result, baseline against roster on every task.

    python -m experiments.reproduce --figure=fig3 --model=olmoe --data_dir=data \\
        --allow_code_execution

τ is tuned on each task's validation split (see `searches`), and the roster with that
temperature profile is compared with the baseline on the test split, greedily, with five noise
seeds.
"""

import dataclasses

from experiments.analysis import drawing
from experiments.evaluation.methods import Baseline, RosterOf, read
from experiments.figures import compared, figure_models
from experiments.figures.figure_run import Command, FigureRun

TITLE = "Main result: baseline against roster with tuned τ"
BACKGROUND = (
  "The paper reports gains on nearly all of its twelve tasks, the largest for OLMoE-1B-7B, "
  "and none on MultiArith for Mixtral and GPT-OSS; it gives no intervals."
)
BASELINE, ROSTER = "baseline", "roster, tuned τ"


@dataclasses.dataclass(frozen=True)
class Config:
  """No settings of its own: tasks, seeds and budgets are the model's."""


CONFIGS = figure_models.configs(Config(), Config())


def commands(run: FigureRun) -> list[Command]:
  return [
    command
    for task in run.model.tasks
    for command in (
      run.tune(task),
      run.compare(f"tuned-{task}", [task], [Baseline(), RosterOf(profile=str(run.profile(task)))]),
    )
  ]


def measure(run: FigureRun) -> list[compared.Record]:
  found = []
  for task in run.model.tasks:
    results = run.compared(f"tuned-{task}")
    also = dict(category=run.model.category(task), checkpoint=run.model.checkpoint)
    found += compared.records(list(results.values()), results[Baseline()], **also)
  for record in found:
    record["label"] = BASELINE if read(record["method"]) == Baseline() else ROSTER
  return compared.corrected(found)


def table(records: list[compared.Record]) -> str:
  columns = ("quality", "quality_difference", "perplexity", "fitted", "fitted_difference")
  return compared.table(records, ("category", "task", "label", "examples"), columns)


findings = compared.findings


def draw(records: list[compared.Record]):
  tasks = compared.unique(records, "task")
  of = {(r["task"], r["label"]): r for r in records}
  figure, axes = drawing.axes(1, 2, width=max(4.5, 1.0 * len(tasks) + 1.5), height=2.6)
  upper, lower = axes[:, 0]
  read = lambda label, name: [of[task, label][name] for task in tasks]
  drawing.dots(upper, tasks, {label: read(label, "quality") for label in (BASELINE, ROSTER)})
  upper.set_ylabel("task result (%)")
  drawing.zero(lower)
  drawing.dots(lower, tasks, {ROSTER: read(ROSTER, "quality_difference")}, 1)
  lower.set_ylabel("difference from\nbaseline (points)")
  for axis in (upper, lower):
    axis.tick_params(axis="x", rotation=20 if len(tasks) > 3 else 0)
  figure.suptitle("95 % intervals over examples", fontsize=9)
  drawing.legend(figure, upper)
  return figure
