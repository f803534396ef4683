"""Which sentence of a minimal pair is grammatical: a choice without an output temperature.

    python -m experiments.reproduce --figure=minimal_pairs --model=smollm2 --data_dir=data

The answer is the sentence with the larger total log-probability (BLiMP, arXiv 1912.00582). Pairs
take turns between the 67 paradigms. τ is the one that `last_words` chooses on LAMBADA's development
passages, so nothing is chosen on BLiMP.
"""

import dataclasses

from experiments.analysis import pictures
from experiments.evaluation.methods import Baseline, Experts, RosterOf, Spec
from experiments.figures import compared
from experiments.figures.figure_run import Command, FigureRun

TITLE = "Minimal pairs"
BACKGROUND = (
  "The paper has no task that compares whole sentences, at every token of which the members of a "
  "roster differ."
)


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    task: pairs of sentences.
    tau: of all layers.
    num_members: n of the rosters.
    experts: numbers of experts per token of other methods.
    num_examples: pairs.
    num_seeds: noise seeds.
    num_validation: other pairs, whose perplexity is not shown.
  """

  task: str = "text/blimp"
  tau: float = 0.1
  num_members: tuple[int, ...] = (8,)
  experts: tuple[int, ...] = (12,)
  num_examples: int = 1000
  num_seeds: int = 1
  num_validation: int = 16


CONFIGS = {"smollm2": Config()}


def _methods(config: Config) -> list[Spec]:
  experts = [Experts(str(k)) for k in config.experts]
  return [Baseline(), *experts, *(RosterOf(n) for n in config.num_members)]


def commands(run: FigureRun) -> list[Command]:
  of = run.config
  flags = dict(
    tau=of.tau,
    num_examples=of.num_examples,
    num_seeds=of.num_seeds,
    num_validation=of.num_validation,
  )
  return [run.compare("minimal_pairs", [of.task], _methods(of), **flags)]


def measure(run: FigureRun) -> list[compared.Record]:
  results = run.compared("minimal_pairs")
  order = [results[m] for m in _methods(run.config)]
  return compared.records(order, order[0])


def table(records: list[compared.Record]) -> str:
  columns = ("quality", "quality_difference", "unique_experts", "ms_per_token")
  return compared.table(records, {"method": "label", "pairs": "examples"}, columns)


def findings(records: list[compared.Record]) -> str:
  return compared.findings(records, ("quality",))


def draw(records: list[compared.Record]):
  name = "quality_difference"
  rows = [(compared.GAINS[name], {r["label"]: compared.gain(r, name) for r in records})]
  return pictures.differences_against_costs(
    rows, {r["label"]: r for r in records}, records[0]["task"]
  )
