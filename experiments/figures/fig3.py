"""Figure 3: the main result, plain against roster on every task.

    python -m experiments.reproduce --figure=fig3 --model=olmoe --data_dir=data --allow_code_execution

For each task τ is tuned on its validation split (see `fig7`, `fig8`, `fig9`), and the
roster with that profile is compared with the plain model on the test split, greedily, five
noise seeds. The paper saw gains on nearly all of twelve tasks, largest for OLMoE, none on
MultiArith for Mixtral and GPT-OSS; it drew no intervals and had no other baseline.

    model      checkpoint (see models.py)              hardware               time beside the searches
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       30 minutes
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    1 hour
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     30 minutes
    embedded   ships with the package                  one CPU core           3 minutes

Times of the first three are estimated with roe_jax.costs (H100), not measured.
"""

import dataclasses

from experiments.analysis import drawing
from experiments.figures import compared
from experiments.figures.work import Command, Work

TITLE = "Main result: plain against roster with tuned τ"
SAW = (
  "The paper saw gains on nearly all of its twelve tasks, the largest for OLMoE-1B-7B, "
  "and none on MultiArith for Mixtral and GPT-OSS; it gave no intervals."
)
ROSTER = "roster, tuned τ"


@dataclasses.dataclass(frozen=True)
class Config:
  """Nothing of its own: tasks, seeds and budgets are the model's."""


CONFIGS = {name: Config() for name in ("olmoe", "mixtral", "gpt_oss", "embedded")}


def _roster(work: Work, task: str) -> str:
  return f"roster:profile={work.profile(task)}"


def commands(work: Work) -> list[Command]:
  return [
    command
    for task in work.model.tasks
    for command in (
      work.tune(task),
      work.compare(f"tuned-{task}", [task], ["baseline", _roster(work, task)]),
    )
  ]


def measure(work: Work) -> list[compared.Record]:
  found = []
  for task in work.model.tasks:
    results = work.compared(f"tuned-{task}")
    category = work.model.category(task)
    found += compared.records(
      list(results.values()),
      results["baseline"],
      category=category,
      checkpoint=work.model.checkpoint,
    )
  for record in found:
    record["label"] = "plain" if record["method"] == "baseline" else ROSTER
  return compared.corrected(found)


def table(records: list[compared.Record]) -> str:
  return compared.table(
    records,
    ("category", "task", "label", "examples"),
    ("quality", "quality_difference", "perplexity", "fitted", "fitted_difference"),
  )


def findings(records: list[compared.Record]) -> str:
  return " ".join(
    [
      compared.clear(records, "quality_difference", "task results", " points"),
      compared.clear(records, "fitted_difference", "perplexity at fitted output temperatures"),
    ]
  )


def draw(records: list[compared.Record]):
  tasks = list(dict.fromkeys(r["task"] for r in records))
  of = {(r["task"], r["label"]): r for r in records}
  figure, axes = drawing.axes(1, 2, width=max(4.5, 1.0 * len(tasks) + 1.5), height=2.6)
  upper, lower = axes[:, 0]
  drawing.dots(
    upper,
    tasks,
    {
      label: [compared.read(of[task, label]["quality"]) for task in tasks]
      for label in ("plain", ROSTER)
    },
  )
  upper.set_ylabel("right (%)")
  drawing.zero(lower)
  drawing.dots(
    lower,
    tasks,
    {"roster to plain": [compared.read(of[task, ROSTER]["quality_difference"]) for task in tasks]},
    1,
  )
  lower.set_ylabel("difference (points)")
  for axis in (upper, lower):
    axis.tick_params(axis="x", labelsize=8, rotation=20 if len(tasks) > 3 else 0)
  figure.suptitle("95 % intervals over examples", fontsize=9)
  drawing.legend(figure, upper)
  return figure
