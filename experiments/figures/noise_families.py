"""Which noise matters: noise distributions and gate weights.

    python -m experiments.reproduce --figure=noise_families --model=olmoe --data_dir=data

Gumbel noise as in the paper, Gaussian and uniform noise of the same variance, swapping chosen
experts with some probability, and choosing all experts of a layer uniformly at random with
some probability; each with clean and with noisy gates. Each scheme has its own best strength,
chosen by perplexity on other sequences, so that none wins because a strength suits it. The share
of a member's experts that the clean member chose, too, shows which schemes are comparable.
Perplexities are of validation references, at T = 1 and at fitted output temperatures.
"""

import dataclasses

import numpy as np

from experiments.analysis import drawing
from experiments.figures import compared, figure_models, likelihoods
from experiments.figures.figure_run import FigureRun
from roe_jax import diagnostics, perturbations
from roe_jax.roster import Roster

TITLE = "Which noise matters"
BACKGROUND = (
  "Its reviewers asked whether the noise scheme matters, and which component gives the gain. "
  "The paper has Gumbel noise only, and does not state the gate weights of the chosen experts."
)


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    task: whose references are scored.
    num_members: members.
    families: of the noise.
    gates: gate weights of the chosen experts.
    temperatures: candidate strengths of additive noise.
    probabilities: candidate strengths of noise whose τ is a probability.
    num_examples: to report on.
    num_seeds: noise seeds.
    agreement_sequences: sequences on which shared experts are counted.
  """

  task: str = "paper/gsm8k"
  num_members: int = 8
  families: tuple[str, ...] = ("gumbel", "gaussian", "uniform", "swap", "uniform_choice")
  gates: tuple[str, ...] = ("clean", "noisy")
  temperatures: tuple[float, ...] = (0.1, 0.2, 0.3, 0.45, 0.6)
  probabilities: tuple[float, ...] = (0.05, 0.1, 0.2, 0.35, 0.5)
  num_examples: int = 300
  num_seeds: int = 3
  agreement_sequences: int = 16


CONFIGS = figure_models.configs(
  Config(), embedded=Config(task="wordmath", num_examples=120, num_seeds=2)
)


def measure(run: FigureRun) -> list[compared.Record]:
  config, keep, task = run.config, run.measurements(), run.config.task
  scorer = likelihoods.ReferenceScorer(run, run.model.checkpoint, task, config.num_examples)
  tokens = scorer.report_on.tokens
  seeds = range(run.seed, run.seed + config.num_seeds)
  agreement_on = [r.sequence for r in scorer.report_on.requests[: config.agreement_sequences]]

  def roster(seed, family, gates, strength, cache=run.model.cache):
    return Roster.create(
      scorer.config,
      config.num_members,
      strength,
      seed=seed,
      noise=family,
      gate_weights=gates,
      cache=cache,
    )

  def agreement(*scheme):
    clean = roster(run.seed, *scheme, cache="clean")
    found = diagnostics.routing_agreement(scorer.params, scorer.config, clean, agreement_on)
    return float(np.mean(found))

  baseline = keep.get("baseline", scorer.baseline)
  found = [likelihoods.record(baseline, baseline, tokens, "baseline", task)]
  for family in config.families:
    tried = config.probabilities if family in perturbations.PROBABILITIES else config.temperatures
    for gates in config.gates:
      name = f"{family}, {gates} gates"
      values = [
        keep.get(f"{name}, {s:g}", lambda s=s: scorer.value(roster(run.seed, family, gates, s)))
        for s in tried
      ]
      best = tried[int(np.argmin(values))]
      scheme = family, gates, best
      measured = keep.get(
        f"{name}, best", lambda: scorer.measure(lambda seed: roster(seed, *scheme), seeds)
      )
      also = {
        "family": family,
        "gates": gates,
        "strength": best,
        "is_edge": best in (tried[0], tried[-1]),
        "shared": keep.get(f"{name}, agreement", lambda: agreement(*scheme)),
      }
      found.append(likelihoods.record(measured, baseline, tokens, name, task, **also))
  return compared.corrected(found)


def table(records: list[compared.Record]) -> str:
  def strength(r):
    edge = " (edge of the grid)" if r.get("is_edge") else ""
    return f"{r['strength']:g}{edge}" if "strength" in r else ""

  first = {
    "noise": "label",
    "best strength": strength,
    "experts shared with the clean member": lambda r: (
      f"{100 * r['shared']:.0f} %" if "shared" in r else ""
    ),
  }
  return compared.table(records, first, compared.LIKELIHOOD)


def findings(records: list[compared.Record]) -> str:
  return "Each noise at the strength that was best on other sequences. " + compared.findings(
    records, ("fitted",)
  )


def draw(records: list[compared.Record]):
  rosters = records[1:]
  families, gates = compared.unique(rosters, "family"), compared.unique(rosters, "gates")
  of = {(r["family"], r["gates"]): r for r in rosters}
  figure, axes = drawing.axes(2, width=4.0, height=3.4, sharey=True)
  series = {f"{g} gates": [of[f, g] for f in families] for g in gates}
  for name, axis in zip(("perplexity_difference", "fitted_difference"), axes[0]):
    compared.draw_dots(axis, name, [f.replace("_", "\n") for f in families], series)
    axis.tick_params(labelleft=True)
    axis.set_xlabel("noise on the routers")
  drawing.legend(figure, axes[0, 0])
  return figure
