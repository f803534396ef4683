"""Equal compute: a roster against what as many forward rows could be spent on otherwise.

    python -m experiments.reproduce --figure=iso_compute --model=olmoe --data_dir=data

Self-consistency and the most probable of n samples, more experts per token, the plain model
with a fitted output temperature or its best sampling settings, rosters that average
otherwise, and SCMoE, each with what it costs. The paper compared with the plain model only;
its reviewers asked for this.

    model      checkpoint (see models.py)              hardware               time
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       25 minutes
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    50 minutes
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     30 minutes
    embedded   ships with the package                  one CPU core           8 minutes

Times of the first three are estimated with roe_jax.costs (H100), not measured.
"""

import dataclasses

from experiments.analysis import pictures
from experiments.figures import compared
from experiments.figures.work import Command, Work

TITLE = "At equal compute"
SAW = (
  "Its reviewers asked for comparisons at equal compute: with self-consistency, best-of-n"
  " and more experts per token. The paper has none."
)


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    task: the task.
    n: members, and samples of those methods that sample.
    examples: of the test split.
    seeds: noise seeds.
    experts: methods with more experts per token.
  """

  task: str = "gsm8k"
  n: int = 8
  examples: int = 300
  seeds: int = 3
  experts: tuple[str, ...] = ()


CONFIGS = {
  "olmoe": Config(
    experts=(
      "experts:k=16,gates=model",
      "experts:k=16,gates=rescaled",
      "experts:k=16,gates=renormalized",
      "experts:k=64,gates=rescaled",
    )
  ),
  "mixtral": Config(experts=("experts:k=4", "experts:k=8")),
  "gpt_oss": Config(experts=("experts:k=8", "experts:k=32")),
  "embedded": Config(
    task="wordmath",
    examples=60,
    seeds=1,
    experts=(
      "experts:k=8,gates=model",
      "experts:k=8,gates=rescaled",
      "experts:k=8,gates=renormalized",
      "experts:k=16,gates=rescaled",
    ),
  ),
}


def methods(config: Config) -> list[str]:
  """All that are compared, as `experiments.compare` spells them."""
  n = config.n
  return [
    "baseline",
    "baseline+temperature",
    "best_baseline",
    *config.experts,
    f"roster:n={n}",
    f"roster:n={n},gate_weights=noisy",
    f"roster:n={n},aggregation=mean_logit",
    f"roster:n={n - 1},include_clean=false",
    f"roster:n={n},cache=standard",
    f"self_consistency:n={n}",
    f"best_of:n={n}",
    "scmoe",
  ]


def commands(work: Work) -> list[Command]:
  config = work.config
  return [
    work.compare(
      "iso_compute",
      [config.task],
      methods(config),
      limit=config.examples,
      num_seeds=config.seeds,
      num_members=config.n,
    )
  ]


def measure(work: Work) -> list[compared.Record]:
  results = work.compared("iso_compute")
  order = [results[m] for m in methods(work.config)]
  return compared.records(order, order[0])


def table(records: list[compared.Record]) -> str:
  return compared.table(
    records,
    ("label",),
    (
      "quality",
      "quality_difference",
      "fitted",
      "fitted_difference",
      "ms_per_token",
      "experts",
      "peak_bytes",
    ),
  )


def findings(records: list[compared.Record]) -> str:
  return " ".join(
    [
      compared.clear(records, "quality_difference", "task results", " points"),
      compared.clear(records, "fitted_difference", "perplexity at fitted output temperatures"),
    ]
  )


def draw(records: list[compared.Record]):
  rows = [
    ("right: difference\nto plain (points)", "quality_difference"),
    ("perplexity at fitted T: difference\nto plain at fitted T (%)", "fitted_difference"),
  ]
  costs = [
    ("milliseconds per token", "ms_per_token", 1),
    ("forward FLOPs per example", "flops", 1),
    ("experts read per layer and step", "experts", 1),
    ("peak memory (MiB)", "peak_bytes", 2**20),
    ("forward rows per example", "rows", 1),
  ]
  return pictures.differences_against_costs(
    [
      (title, {r["label"]: compared.read(r[name]) for r in records if r[name] or r is records[0]})
      for title, name in rows
    ],
    [
      (title, {r["label"]: r[name] and r[name] / unit for r in records})
      for title, name, unit in costs
    ],
    records[0]["task"],
  )
