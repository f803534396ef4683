"""Gain against sparsity: how many of how many experts a token goes through.

    python -m experiments.reproduce --figure=sparsity --model=embedded

Small over-trained models that differ in k and E only, `embedded:wordmath_KofE` (made by
`python -m experiments.train --config=wordmath_sparsity:KofE`, 5 to 10 minutes each on one
core): k varied at E = 16, and E at k = 4. Of each the roster's perplexity against the plain
model, as they are and at fitted output temperatures, at one τ for all models and at the
model's own best τ, which is chosen on other texts, as they are. Among the paper's models k
/ E cannot be varied: they differ in all else, and are shown beside each other for what that
is worth. Its reviewers asked for this.

    model      checkpoints (see models.py)                      hardware               time
    olmoe      OLMoE-1B-7B (8 of 64)                            one GPU of 80 GB       5 minutes
    mixtral    Mixtral-8x7B (2 of 8)                            eight GPUs of 80 GB    10 minutes
    gpt_oss    gpt-oss-20b (4 of 32)                            four GPUs of 80 GB     5 minutes
    embedded   wordmath_{1,2,4,8}of16, _4of8, _4of32            one CPU core           5 minutes

All of the paper's models together: --checkpoint=olmoe,mixtral,gpt-oss. Times of the first
three are estimated with roe_jax.costs (H100), not measured.
"""

import dataclasses

import numpy as np

from experiments.analysis import drawing, report_page
from experiments.figures import compared, likelihoods
from experiments.figures.work import Command, Work
from roe_jax.roster import Roster

TITLE = "Gain against sparsity"
SAW = (
  "Its reviewers asked how the gain depends on sparsity. The paper has three models that "
  "differ in all else, too."
)


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    checkpoints: the models; empty: those of --model.
    task: whose reference texts are scored.
    n: members.
    temperature: τ of all models.
    temperatures: among which each model's best is chosen.
    examples: on which is reported.
    seeds: noise seeds.
  """

  checkpoints: tuple[str, ...] = ()
  task: str = "gsm8k"
  n: int = 8
  temperature: float = 0.3
  temperatures: tuple[float, ...] = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
  examples: int = 300
  seeds: int = 3


FAMILY = ("1of16", "2of16", "4of16", "8of16", "4of8", "4of32")
CONFIGS = {name: Config() for name in ("olmoe", "mixtral", "gpt_oss")} | {
  "embedded": Config(
    tuple(f"embedded:wordmath_{v}" for v in FAMILY), task="wordmath", examples=120, seeds=2
  )
}
SAME, OWN = "one τ for all", "its best τ"


def commands(work: Work) -> list[Command]:
  return []


def measure(work: Work) -> list[compared.Record]:
  config, keep = work.config, work.kept()
  seeds = range(work.seed, work.seed + config.seeds)
  found = []
  for checkpoint in config.checkpoints or work.model.checkpoints:
    texts = likelihoods.Texts(work, checkpoint, config.task, config.examples)
    tokens, k, num_experts = (
      texts.reported_on.tokens,
      texts.config.experts_per_token,
      texts.config.num_experts,
    )

    def roster(seed, tau, texts=texts):
      return Roster.create(texts.config, config.n, tau, seed=seed, cache=work.model.cache)

    plain = keep.get(f"{checkpoint}, plain", texts.plain)
    values = [
      keep.get(f"{checkpoint}, τ = {t:g}", lambda t=t: texts.value(roster(work.seed, t)))
      for t in config.temperatures
    ]
    best = config.temperatures[int(np.argmin(values))]
    also = {"model": checkpoint.rpartition(":")[2], "k": k, "E": num_experts}
    found.append(likelihoods.record(plain, plain, tokens, "plain", config.task, **also))
    for label, tau in ((SAME, config.temperature), (OWN, best)):
      measured = keep.get(
        f"{checkpoint}, measured at {tau:g}",
        lambda tau=tau: texts.measure(lambda seed: roster(seed, tau), seeds),
      )
      found.append(likelihoods.record(measured, plain, tokens, label, config.task, τ=tau, **also))
  return compared.corrected(found)


def table(records: list[compared.Record]) -> str:
  shown = ("perplexity", "perplexity_difference", "fitted", "fitted_difference")
  rows = [
    [
      r["model"],
      f"{r['k']} / {r['E']}",
      r["label"],
      f"{r['τ']:g}" if "τ" in r else "",
      *(compared.COLUMNS[c][1](r) for c in shown),
    ]
    for r in records
  ]
  return (
    report_page.table(["model", "k / E", "", "τ", *(compared.COLUMNS[c][0] for c in shown)], rows)
    + "\n\n"
    + compared.NOTE
  )


def findings(records: list[compared.Record]) -> str:
  return compared.clear(
    [r | {"task": r["model"]} for r in records],
    "fitted_difference",
    "perplexity at fitted output temperatures",
  )


def draw(records: list[compared.Record]):
  panels = [
    ("perplexity_difference", "both as they are"),
    ("fitted_difference", "both at fitted T"),
  ]
  most_k = max(
    {r["k"] for r in records}, key=lambda k: len({r["E"] for r in records if r["k"] == k})
  )
  most_e = max(
    {r["E"] for r in records}, key=lambda e: len({r["k"] for r in records if r["E"] == e})
  )
  curves = [
    (f"k varied, E = {most_e}", lambda r: r["E"] == most_e),
    (f"E varied, k = {most_k}", lambda r: r["k"] == most_k),
  ]
  figure, axes = drawing.axes(2, 2, width=3.4, height=2.6)
  shares = sorted({r["k"] / r["E"] for r in records})
  for (measure_, title), column in zip(panels, axes.T):
    for label, axis in zip((SAME, OWN), column):
      drawing.zero(axis)
      for index, (curve, belongs) in enumerate(curves):
        shown = sorted(
          (r["k"] / r["E"], i) for i, r in enumerate(records) if r["label"] == label and belongs(r)
        )
        values, bars = drawing.bars([compared.read(records[i][measure_]) for _, i in shown])
        axis.errorbar(
          [x * 1.04 ** (2 * index - 1) for x, _ in shown],
          values,
          yerr=bars,
          label=curve,
          **drawing.line(index),
        )
      axis.set_xscale("log", base=2)
      axis.set_xticks(shares, [f"1/{1 / s:g}" for s in shares])
      axis.minorticks_off()
      axis.set_title(f"{label}, {title}", fontsize=9)
  for axis in axes[:, 0]:
    axis.set_ylabel("perplexity, difference\nto plain (%)")
  for axis in axes[1]:
    axis.set_xlabel("k / E, share of experts that run")
  drawing.legend(figure, axes[0, 0])
  return figure
