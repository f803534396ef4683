"""Noise that members share: does it make a roster of n steadier, or cheaper?

    python -m experiments.reproduce --figure=shared_noise --model=embedded

Each member's own noise is that of independent Gumbel variables in all of the first schemes; what
differs is how members depend on each other: antithetic and stratified noise should make the mean
distribution vary less between seeds, and positively coupled noise should make members choose the
same experts. The last schemes confine the noise to half of the layers, the other way to cheaper
members. The variance is that of the next token's distribution between noise seeds, summed over
tokens and averaged over positions; with independent members it falls as one over their number.
"""

from collections.abc import Sequence
import dataclasses
import functools

import numpy as np

from experiments.analysis import drawing, paired_statistics, report_page
from experiments.analysis.paired_statistics import Estimate
from experiments.figures import compared, figure_models, likelihoods, passages
from experiments.figures.figure_run import FigureRun
from roe_jax import diagnostics
from roe_jax.roster import Roster

TITLE = "Noise that members share"
BACKGROUND = (
  "The paper draws the members' noise independently. Common variance reduction, and members that "
  "share experts, would make a roster of n worth more, or cost less."
)
REFERENCE = "independent"


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    task: whose references are read.
    num_members: numbers of members, the clean one included.
    tau: τ of all noisy layers.
    num_examples: references.
    num_seeds: noise seeds that the variance is estimated from.
  """

  task: str = "paper/gsm8k"
  num_members: tuple[int, ...] = (5, 9)
  tau: float = 0.3
  num_examples: int = 200
  num_seeds: int = 12


CONFIGS = figure_models.configs(
  Config(), embedded=Config("wordmath", (9,), tau=0.5, num_examples=24, num_seeds=8)
) | {"smollm2": Config("text/lambada", (9,), num_examples=100, num_seeds=8)}
# Name: the noise, and the part of the layers that has it.
SCHEMES = {
  REFERENCE: ("gumbel", (0.0, 1.0)),
  "antithetic": ("antithetic", (0.0, 1.0)),
  "stratified": ("stratified", (0.0, 1.0)),
  "coupled, 0.5": ("coupled(correlation=0.5)", (0.0, 1.0)),
  "coupled, 0.75": ("coupled(correlation=0.75)", (0.0, 1.0)),
  "first half of the layers": ("gumbel", (0.0, 0.5)),
  "second half of the layers": ("gumbel", (0.5, 1.0)),
}


def measure(run: FigureRun) -> list[compared.Record]:
  config, keep = run.config, run.measurements()
  scorer = likelihoods.ReferenceScorer(run, run.model.checkpoint, config.task, config.num_examples)
  layers = scorer.config.num_layers
  found = []
  for n in config.num_members:
    reference = None
    for name, (noise, part) in SCHEMES.items():
      first, end = (round(share * layers) for share in part)
      taus = [config.tau if first <= layer < end else 0.0 for layer in range(layers)]
      rosters = [
        Roster.create(scorer.config, n, taus, seed=run.seed + i, noise=noise)
        for i in range(config.num_seeds)
      ]
      measured = keep.get(
        f"{name}, n = {n}", functools.partial(_measure, scorer, rosters, run.model.batch_size)
      )
      reference = reference or measured
      found.append(_record(n, name, measured, reference))
  return found


def _measure(scorer, rosters, batch_size):
  """Returns `[X]` variances and log-likelihoods of each example, and its unique experts."""
  requests = scorer.report_on.requests
  variances, nll = np.zeros((2, len(requests)))
  for i, of_rosters in passages.each_distribution(
    scorer.params, scorer.config, rosters, requests, batch_size
  ):
    log_p, r = np.stack(of_rosters), requests[i]
    variances[i] = np.exp(log_p).var(axis=0, ddof=1, dtype=np.float64).sum()
    nll[i] = -log_p[:, range(len(r.tokens)), r.tokens].sum(axis=-1, dtype=np.float64).mean()
  few = requests[:batch_size]
  unique = diagnostics.unique_experts(
    scorer.params,
    scorer.config,
    rosters[0],
    [r.sequence for r in few],
    [len(r.context) for r in few],
    [r.request_id for r in few],
  )
  return {
    "variances": variances.tolist(),
    "nll": nll.tolist(),
    "tokens": [len(r.tokens) for r in requests],
    "unique_experts": float(unique.by_position.mean()),
  }


def _record(n, name, measured, reference):
  values, of_reference, tokens = (
    np.array(v) for v in (measured["variances"], reference["variances"], measured["tokens"])
  )
  share = paired_statistics.bootstrap((values, of_reference), paired_statistics.ratio)
  return {
    "n": n,
    "label": name,
    "variance": float(values.sum() / tokens.sum()),
    "variance_ratio": Estimate(*share),
    "perplexity": paired_statistics.perplexity(np.array(measured["nll"]), tokens),
    "unique_experts": measured["unique_experts"],
  }


def table(records: Sequence[compared.Record]) -> str:
  columns = {
    "n": "n",
    "noise": "label",
    "variance between seeds": lambda r: f"{r['variance']:.2e}",
    "times that of independent noise": lambda r: report_page.estimate(r["variance_ratio"], 2),
    "perplexity (mean over seeds)": lambda r: report_page.estimate(r["perplexity"], 4),
    "unique active experts": lambda r: report_page.number(r["unique_experts"]),
  }
  return report_page.table_of(records, columns) + (
    "\n\nBrackets: 95 % bootstrap intervals over examples, of ratios paired by example."
  )


def findings(records: Sequence[compared.Record]) -> str:
  lower = [
    f"{r['label']} at n = {r['n']} ({r['variance_ratio'].value:.2f} times)"
    for r in records
    if r["label"] != REFERENCE and r["variance_ratio"].high < 0.9
  ]
  return (
    "Of the schemes, " + ("none lowers" if not lower else "these lower") + " the variance between "
    "seeds by more than 10 %" + (": " if lower else "") + "; ".join(lower) + "."
  )


def draw(records: Sequence[compared.Record]):
  figure, axes = drawing.axes(2, width=4.4, height=3.4)
  numbers = compared.unique(records, "n")
  names = [name for name in SCHEMES if name != REFERENCE]
  of = {(r["n"], r["label"]): r for r in records}
  series = {f"n = {n}": [of[n, name]["variance_ratio"] for name in names] for n in numbers}
  labels = [name.replace(", ", "\n").replace(" of the ", "\nof the ") for name in names]
  drawing.dots(axes[0, 0], labels, series)
  axes[0, 0].axhline(1, color="0.6", linewidth=0.8)
  axes[0, 0].set_yscale("log", base=2)
  ticks = (0.25, 0.5, 1, 2, 4)
  axes[0, 0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
  axes[0, 0].set_ylabel("variance between seeds\n(independent: 1; log scale)")
  experts = {
    f"n = {n}": [Estimate(*3 * [of[n, name]["unique_experts"]]) for name in (REFERENCE, *names)]
    for n in numbers
  }
  drawing.dots(axes[0, 1], [REFERENCE, *labels], experts)
  axes[0, 1].set_ylabel("unique active experts\nof all members at a position")
  for axis in axes[0]:
    axis.tick_params(axis="x", labelrotation=90, labelsize=7)
  drawing.legend(figure, axes[0, 0])
  return figure
