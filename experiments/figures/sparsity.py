"""Gain against sparsity: the number of active experts k and of experts E.

    python -m experiments.reproduce --figure=sparsity --model=embedded

Small over-trained models that differ only in k and E, `embedded:wordmath_KofE` (made by
`python -m experiments.train --config=wordmath_sparsity:KofE`, 5 to 10 minutes each on one
core): k is varied at E = 16, and E at k = 4. The roster's perplexity is compared with the
baseline's at T = 1 and at fitted output temperatures, at one τ for all models and at each
model's best τ, chosen on other sequences at T = 1. The paper's models differ in everything else,
too; --checkpoint=olmoe,mixtral,gpt-oss shows all of them together.
"""

import dataclasses

import numpy as np

from experiments.analysis import drawing
from experiments.figures import compared, figure_models, likelihoods
from experiments.figures.figure_run import FigureRun
from roe_jax.roster import Roster

TITLE = "Gain against sparsity"
BACKGROUND = (
  "Its reviewers asked how the gain depends on sparsity. The paper has three models that also "
  "differ in everything else."
)


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    checkpoints: the models; empty: those of --model.
    task: whose references are scored.
    num_members: members.
    tau: τ of all models.
    temperatures: candidates for each model's best τ.
    num_examples: to report on.
    num_seeds: noise seeds.
  """

  checkpoints: tuple[str, ...] = ()
  task: str = "paper/gsm8k"
  num_members: int = 8
  tau: float = 0.3
  temperatures: tuple[float, ...] = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
  num_examples: int = 300
  num_seeds: int = 3


FAMILY = ("1of16", "2of16", "4of16", "8of16", "4of8", "4of32")
_EMBEDDED = tuple(f"embedded:wordmath_{name}" for name in FAMILY)
CONFIGS = figure_models.configs(
  Config(), embedded=Config(_EMBEDDED, task="wordmath", num_examples=120, num_seeds=2)
)
SAME, OWN = "one τ for all", "its best τ"


def measure(run: FigureRun) -> list[compared.Record]:
  config, keep = run.config, run.measurements()
  seeds = range(run.seed, run.seed + config.num_seeds)
  found = []
  for checkpoint in config.checkpoints or run.model.checkpoints:
    scorer = likelihoods.ReferenceScorer(run, checkpoint, config.task, config.num_examples)
    k, num_experts = scorer.config.experts_per_token, scorer.config.num_experts

    def roster(seed, tau, scorer=scorer):
      return Roster.create(scorer.config, config.num_members, tau, seed=seed, cache=run.model.cache)

    def record(measured, label, scorer=scorer, **also):
      tokens = scorer.report_on.tokens
      return likelihoods.record(measured, baseline, tokens, label, config.task, **also)

    baseline = keep.get(f"{checkpoint}, baseline", scorer.baseline)
    values = [
      keep.get(f"{checkpoint}, τ = {t:g}", lambda t=t: scorer.value(roster(run.seed, t)))
      for t in config.temperatures
    ]
    best = config.temperatures[int(np.argmin(values))]
    also = {"model": checkpoint.rpartition(":")[2], "k": k, "E": num_experts}
    found.append(record(baseline, "baseline", **also))
    for label, tau in ((SAME, config.tau), (OWN, best)):
      measured = keep.get(
        f"{checkpoint}, measured at {tau:g}",
        lambda tau=tau: scorer.measure(lambda seed: roster(seed, tau), seeds),
      )
      found.append(record(measured, label, τ=tau, **also))
  return compared.corrected(found)


def table(records: list[compared.Record]) -> str:
  first = {
    "model": "model",
    "k / E": lambda r: f"{r['k']} / {r['E']}",
    "": "label",
    "τ": lambda r: f"{r['τ']:g}" if "τ" in r else "",
  }
  return compared.table(records, first, compared.LIKELIHOOD)


def findings(records: list[compared.Record]) -> str:
  return compared.findings(compared.by_model(records), ("fitted",))


def draw(records: list[compared.Record]):
  panels = {"perplexity_difference": "both at T = 1", "fitted_difference": "both at fitted T"}
  most = lambda name, other: max(
    {r[name] for r in records}, key=lambda v: len({r[other] for r in records if r[name] == v})
  )
  k, num_experts = most("k", "E"), most("E", "k")
  curves = {
    f"k varied, E = {num_experts}": lambda r: r["E"] == num_experts,
    f"E varied, k = {k}": lambda r: r["k"] == k,
  }
  figure, axes = drawing.axes(2, 2, width=3.4, height=2.6, sharey=True)
  shares = sorted({r["k"] / r["E"] for r in records})
  for (name, title), column in zip(panels.items(), axes.T):
    for label, axis in zip((SAME, OWN), column):
      for index, (curve, belongs) in enumerate(curves.items()):
        shown = [r for r in records if r["label"] == label and belongs(r)]
        shown.sort(key=lambda r: r["k"] / r["E"])
        x = [r["k"] / r["E"] * 1.04 ** (2 * index - 1) for r in shown]
        compared.draw_gains(axis, name, x, shown, label=curve, **drawing.line(index))
      axis.set_xscale("log", base=2)
      axis.set_xticks(shares, [f"1/{1 / s:g}" for s in shares])
      axis.minorticks_off()
      axis.set_title(f"{label}, {title}", fontsize=9)
  for axis in axes[:, 0]:
    axis.set_ylabel(compared.PERPLEXITY_AXIS)
  for axis in axes[1]:
    axis.set_xlabel("k / E, share of active experts (log scale;\ncurves drawn side by side)")
  drawing.legend(figure, axes[0, 0])
  return figure
