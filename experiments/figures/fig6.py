"""Figure 6: one τ for all layers, in steps of 0.05.

    python -m experiments.reproduce --figure=fig6 --model=olmoe --data_dir=data

Results of the math tasks' test examples against τ, with intervals of the difference to the
plain model on the same examples, and below the perplexity of their references where there
are any. The paper saw accuracy rise, peak at a τ that depends on the task, and fall.

    model      checkpoint (see models.py)              hardware               time
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       35 minutes
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    80 minutes
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     40 minutes
    embedded   ships with the package                  one CPU core           4 minutes

Times of the first three are estimated with roe_jax.costs (H100), not measured.
"""

import dataclasses

from experiments.analysis import drawing
from experiments.figures import compared
from experiments.figures.work import Command, Work

TITLE = "One temperature for all layers"
SAW = "The paper saw accuracy rise with τ, peak at a value that depends on the task, and fall."


@dataclasses.dataclass(frozen=True)
class Config:
  """The sweep.

  Attributes:
    step, top: τ are step, 2 step, ... up to top.
    examples: of each task, the first of the test split.
    seeds: noise seeds.
  """

  step: float = 0.05
  top: float = 0.5
  examples: int = 300
  seeds: int = 1

  @property
  def temperatures(self) -> list[float]:
    return [round(self.step * (i + 1), 10) for i in range(round(self.top / self.step))]


CONFIGS = {
  "olmoe": Config(),
  "mixtral": Config(),
  "gpt_oss": Config(),
  "embedded": Config(examples=50),
}


def _method(tau):
  return f"roster:t={tau:g}"


def commands(work: Work) -> list[Command]:
  methods = ["baseline", *map(_method, work.config.temperatures)]
  return [
    work.compare(
      "sweep",
      list(work.model.math),
      methods,
      limit=work.config.examples,
      num_seeds=work.config.seeds,
    )
  ]


def measure(work: Work) -> list[compared.Record]:
  results = work.compared("sweep")
  tau = {"baseline": 0.0} | {_method(t): t for t in work.config.temperatures}
  found = compared.records(list(results.values()), results["baseline"])
  return sorted((r | {"τ": tau[r["method"]]} for r in found), key=lambda r: (r["task"], r["τ"]))


def table(records: list[compared.Record]) -> str:
  return compared.table(
    records,
    ("task", "τ", "examples"),
    (
      "quality",
      "quality_difference",
      "perplexity",
      "perplexity_difference",
      "fitted",
      "fitted_difference",
    ),
  )


def findings(records: list[compared.Record]) -> str:
  best = []
  for task in dict.fromkeys(r["task"] for r in records):
    of_task = [r for r in records if r["task"] == task]
    top = max(of_task, key=lambda r: r["quality"]["value"])
    best.append(f"{top['τ']:g} on {task}")
  return (
    f"The highest shares of right answers are at τ = {', '.join(best)}, which says little by "
    "itself, as the best of many is lucky. "
    + compared.clear(records, "quality_difference", "task results", " points")
    + " "
    + compared.clear(records, "fitted_difference", "perplexity at fitted T")
  )


def draw(records: list[compared.Record]):
  tasks = list(dict.fromkeys(r["task"] for r in records))
  rows = [
    ("quality_difference", "right, difference\nto plain (points)"),
    ("perplexity_difference", "perplexity, difference\nto plain (%)"),
  ]
  rows = [row for row in rows if any(r[row[0]] for r in records)]
  figure, axes = drawing.axes(len(tasks), len(rows), width=3.0, height=2.4)
  for (measure_, title), line in zip(rows, axes):
    for task, axis in zip(tasks, line):
      drawing.zero(axis)
      shown = [r for r in records if r["task"] == task and r[measure_]]
      values, bars = drawing.bars([compared.read(r[measure_]) for r in shown])
      axis.errorbar([r["τ"] for r in shown], values, yerr=bars, **drawing.line(0))
      axis.set_xlabel("τ of all layers (router logits)")
      axis.set_title(task, fontsize=9)
    line[0].set_ylabel(title)
    low, high = (
      f(*(limit(a) for a in line)) if len(line) > 1 else limit(line[0])
      for f, limit in ((min, lambda a: a.get_ylim()[0]), (max, lambda a: a.get_ylim()[1]))
    )
    for axis in line:
      axis.set_ylim(low, high)
  return figure
