"""Clean Cache against a cache for each member, on every model.

    python -m experiments.reproduce --figure=caches --model=olmoe --data_dir=data

Rosters with either cache, with and without the clean member among those averaged, beside
the plain model: results, perplexity, memory and time. The paper used Clean Cache for OLMoE
and the standard cache for Mixtral and GPT-OSS and compared them on none; its reviewers
asked for both.

    model      checkpoint (see models.py)              hardware               time
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       10 minutes
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    20 minutes
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     10 minutes
    embedded   ships with the package (both models)    one CPU core           4 minutes

Times of the first three are estimated with roe_jax.costs (H100), not measured.
"""

import dataclasses

from experiments.analysis import drawing
from experiments.figures import compared
from experiments.figures.work import Command, Work

TITLE = "Clean Cache against the standard cache"
SAW = (
  "Its reviewers asked for Clean Cache against separate caches on every model. The paper "
  "used either, each on other models, and compared them on none."
)


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    task: the task.
    n: members.
    examples: of the test split.
    seeds: noise seeds.
  """

  task: str = "gsm8k"
  n: int = 8
  examples: int = 300
  seeds: int = 2


CONFIGS = {name: Config() for name in ("olmoe", "mixtral", "gpt_oss")} | {
  "embedded": Config(task="wordmath", examples=60, seeds=1)
}
VARIANTS = {
  "Clean Cache": "cache=clean",
  "standard cache": "cache=standard",
  "Clean Cache, without clean member": "cache=clean,include_clean=false",
  "standard cache, without clean member": "cache=standard,include_clean=false",
}


def _methods(n):
  return {"plain": "baseline"} | {
    label: f"roster:n={n - ('include_clean' in text)},{text}" for label, text in VARIANTS.items()
  }


def _name(checkpoint):
  return checkpoint.rpartition(":")[2].rpartition("/")[2]


def commands(work: Work) -> list[Command]:
  config = work.config
  return [
    work.compare(
      f"caches-{_name(checkpoint)}",
      [config.task],
      list(_methods(config.n).values()),
      checkpoint=checkpoint,
      limit=config.examples,
      num_seeds=config.seeds,
    )
    for checkpoint in work.model.checkpoints
  ]


def measure(work: Work) -> list[compared.Record]:
  found = []
  for checkpoint in work.model.checkpoints:
    results = work.compared(f"caches-{_name(checkpoint)}")
    order = [results[m] for m in _methods(work.config.n).values()]
    labels = {m: label for label, m in _methods(work.config.n).items()}
    found += [
      r | {"label": labels[r["method"]]}
      for r in compared.records(order, order[0], model=_name(checkpoint))
    ]
  return compared.corrected(found)


def table(records: list[compared.Record]) -> str:
  return compared.table(
    records,
    ("model", "label"),
    (
      "quality",
      "quality_difference",
      "perplexity_difference",
      "fitted_difference",
      "ms_per_token",
      "peak_bytes",
    ),
  )


def findings(records: list[compared.Record]) -> str:
  told = [r | {"task": r["model"]} for r in records]
  return " ".join(
    [
      compared.clear(told, "quality_difference", "task results", " points"),
      compared.clear(told, "fitted_difference", "perplexity at fitted output temperatures"),
    ]
  )


def draw(records: list[compared.Record]):
  models = list(dict.fromkeys(r["model"] for r in records))
  of = {(r["model"], r["label"]): r for r in records}
  panels = [
    ("quality_difference", "right, difference to plain (points)"),
    ("perplexity_difference", "perplexity, difference to plain,\nboth as they are (%)"),
    ("fitted_difference", "perplexity, difference to plain,\nboth at fitted T (%)"),
  ]
  figure, axes = drawing.axes(len(panels), width=3.6, height=3.2)
  for (measure_, title), axis in zip(panels, axes[0]):
    drawing.zero(axis)
    drawing.dots(
      axis,
      models,
      {label: [compared.read(of[m, label][measure_]) for m in models] for label in VARIANTS},
    )
    axis.set_ylabel(title)
    axis.tick_params(axis="x", labelsize=8)
  drawing.legend(figure, axes[0, 0], 2)
  return figure
