"""Equal compute: a roster against other uses of as many forward passes.

    python -m experiments.reproduce --figure=iso_compute --model=olmoe --data_dir=data

Self-consistency and the most probable of n samples, more experts per token, the baseline with
a fitted output temperature or its best sampling settings, rosters with other averages, and
SCMoE, each with its cost.
"""

import dataclasses

from experiments.analysis import pictures
from experiments.evaluation.methods import (
  BestBaseline,
  BestOf,
  Experts,
  SelfConsistency,
  Spec,
  at_equal_compute,
  read,
)
from experiments.figures import compared
from experiments.figures.figure_run import Command, FigureRun

TITLE = "At equal compute"
BACKGROUND = (
  "Its reviewers asked for comparisons at equal compute: with self-consistency, best-of-n and "
  "more experts per token. The paper compares only with the baseline."
)


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    task: the task.
    num_members: members, or samples of sampling methods.
    num_examples: of the test split.
    num_seeds: noise seeds.
    experts: methods with more experts per token.
    sampled: whether to compare methods that sample; answers must be generated.
  """

  task: str = "paper/gsm8k"
  num_members: int = 8
  num_examples: int = 300
  num_seeds: int = 3
  experts: tuple[str, ...] = ()
  sampled: bool = True


def _experts(some, many):
  rules = ("model", "rescaled", "renormalized")
  return (*(str(Experts(str(some), rule)) for rule in rules), str(Experts(str(many), "rescaled")))


CONFIGS = {
  "olmoe": Config(experts=_experts(16, 64)),
  "mixtral": Config(experts=("experts:k=4", "experts:k=8")),
  "gpt_oss": Config(experts=("experts:k=8", "experts:k=32")),
  "smollm2": Config(
    "text/lambada",
    num_examples=1000,
    num_seeds=1,
    experts=("experts:k=10", "experts:k=12"),
    sampled=False,
  ),
  "embedded": Config(task="wordmath", num_examples=60, num_seeds=1, experts=_experts(8, 16)),
}


def methods(config: Config) -> list[Spec]:
  """Returns the methods to compare."""
  found = at_equal_compute(config.num_members, list(map(read, config.experts)))
  sampling = (BestBaseline, SelfConsistency, BestOf)
  return [spec for spec in found if config.sampled or type(spec) not in sampling]


def commands(run: FigureRun) -> list[Command]:
  config = run.config
  flags = dict(
    num_examples=config.num_examples, num_seeds=config.num_seeds, num_members=config.num_members
  )
  return [run.compare("iso_compute", [config.task], methods(config), **flags)]


def measure(run: FigureRun) -> list[compared.Record]:
  results = run.compared("iso_compute")
  order = [results[m] for m in methods(run.config)]
  return compared.records(order, order[0])


def table(records: list[compared.Record]) -> str:
  columns = ("quality", "quality_difference", "fitted", "fitted_difference")
  costs = ("ms_per_token", "unique_experts", "peak_bytes")
  return compared.table(records, {"method": "label"}, (*columns, *costs))


findings = compared.findings


def draw(records: list[compared.Record]):
  rows = [
    (
      compared.GAINS[m],
      {r["label"]: compared.gain(r, m) for r in records if r[m] or r is records[0]},
    )
    for m in ("quality_difference", "fitted_difference")
  ]
  costs = {r["label"]: r for r in records}
  return pictures.differences_against_costs(rows, costs, records[0]["task"])
