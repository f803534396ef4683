"""Clean Cache against the standard cache, on every model.

    python -m experiments.reproduce --figure=caches --model=olmoe --data_dir=data

Rosters with either cache, with and without the clean member in the average, against the
baseline: task results, perplexity, memory and time.
"""

import dataclasses

from experiments.analysis import drawing
from experiments.evaluation.methods import Baseline, RosterOf, Spec, read
from experiments.figures import compared, figure_models
from experiments.figures.figure_run import Command, FigureRun

TITLE = "Clean Cache against the standard cache"
BACKGROUND = (
  "Its reviewers asked for Clean Cache against separate caches on every model. The paper uses "
  "Clean Cache for OLMoE and the standard cache for Mixtral and GPT-OSS, and compares them on none."
)


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    task: the task.
    num_members: members.
    num_examples: of the test split.
    num_seeds: noise seeds.
  """

  task: str = "paper/gsm8k"
  num_members: int = 8
  num_examples: int = 300
  num_seeds: int = 2


CONFIGS = figure_models.configs(
  Config(), embedded=Config(task="wordmath", num_examples=60, num_seeds=1)
)


def _methods(n) -> dict[Spec, str]:
  """Returns {method: label}, the baseline first."""
  return {
    Baseline(): "baseline",
    RosterOf(n, cache="clean"): "Clean Cache",
    RosterOf(n, cache="standard"): "standard cache",
    RosterOf(n - 1, cache="clean", include_clean=False): "Clean Cache, without clean member",
    RosterOf(n - 1, cache="standard", include_clean=False): "standard cache, without clean member",
  }


def _name(checkpoint):
  return checkpoint.rpartition(":")[2].rpartition("/")[2]


def commands(run: FigureRun) -> list[Command]:
  config, methods = run.config, list(_methods(run.config.num_members))
  flags = dict(num_examples=config.num_examples, num_seeds=config.num_seeds)
  return [
    run.compare(f"caches-{_name(c)}", [config.task], methods, checkpoint=c, **flags)
    for c in run.model.checkpoints
  ]


def measure(run: FigureRun) -> list[compared.Record]:
  labels, found = _methods(run.config.num_members), []
  for name in map(_name, run.model.checkpoints):
    results = run.compared(f"caches-{name}")
    records = compared.records([results[m] for m in labels], results[Baseline()], model=name)
    found += [r | {"label": labels[read(r["method"])]} for r in records]
  return compared.corrected(found)


def table(records: list[compared.Record]) -> str:
  columns = ("quality", "quality_difference", "perplexity_difference", "fitted_difference")
  return compared.table(records, ("model", "label"), (*columns, "ms_per_token", "peak_bytes"))


def findings(records: list[compared.Record]) -> str:
  return compared.findings(compared.by_model(records))


def draw(records: list[compared.Record]):
  models = compared.unique(records, "model")
  of = {(r["model"], r["label"]): r for r in records}
  figure, ((*_, left, right),) = drawing.axes(len(compared.GAINS), width=3.6, height=3.2)
  labels = list(_methods(2).values())[1:]
  series = {label: [of[m, label] for m in models] for label in labels}
  for name, axis in zip(compared.GAINS, figure.axes):
    compared.draw_dots(axis, name, models, series)
  right.sharey(left)
  left.autoscale_view()
  drawing.legend(figure, left, 2)
  return figure
