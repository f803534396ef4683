"""Which noise matters: distributions of the noise, and what the chosen experts are weighted with.

    python -m experiments.reproduce --figure=noise_families --model=olmoe --data_dir=data

Gumbel noise as in the paper, Gaussian and uniform noise of the same variance, chosen experts
swapped for others with a probability, and all experts of a layer chosen evenly at random
with a probability; with the model's own gates or with those of the noisy logits. Each at its own best strength, chosen by perplexity on texts of its own,
so that no scheme wins by a strength that suits it. Beside it the share of a member's
experts that the clean member has chosen, too: schemes are comparable where that is alike.
Reference texts of validation examples; perplexities as they are and at fitted output
temperatures.

    model      checkpoint (see models.py)              hardware               time
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       10 minutes
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    10 minutes
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     5 minutes
    embedded   ships with the package                  one CPU core           9 minutes

Times of the first three are estimated with roe_jax.costs (H100), not measured.
"""

import dataclasses

import numpy as np

from experiments.analysis import drawing, report_page
from experiments.figures import compared, likelihoods
from experiments.figures.work import Command, Work
from roe_jax import diagnostics
from roe_jax import noise as noise_lib
from roe_jax.roster import Roster

TITLE = "Which noise matters"
SAW = (
  "Its reviewers asked whether the noise scheme matters, and which component gives the "
  "gain. The paper has Gumbel noise only, and does not say what the chosen experts are "
  "weighted with."
)


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    task: whose reference texts are scored.
    n: members.
    families: of the noise.
    gates: what chosen experts are weighted with.
    temperatures: strengths that are tried of noise that is added.
    probabilities: strengths that are tried of noise whose τ is a probability.
    examples: on which is reported.
    seeds: noise seeds.
    agreement_texts: on which shared experts are counted.
  """

  task: str = "gsm8k"
  n: int = 8
  families: tuple[str, ...] = ("gumbel", "gaussian", "uniform", "swap", "uniform_choice")
  gates: tuple[str, ...] = ("clean", "noisy")
  temperatures: tuple[float, ...] = (0.1, 0.2, 0.3, 0.45, 0.6)
  probabilities: tuple[float, ...] = (0.05, 0.1, 0.2, 0.35, 0.5)
  examples: int = 300
  seeds: int = 3
  agreement_texts: int = 16


CONFIGS = {name: Config() for name in ("olmoe", "mixtral", "gpt_oss")} | {
  "embedded": Config(task="wordmath", examples=120, seeds=2)
}


def commands(work: Work) -> list[Command]:
  return []


def measure(work: Work) -> list[compared.Record]:
  config, keep = work.config, work.kept()
  texts = likelihoods.Texts(work, work.model.checkpoint, config.task, config.examples)
  tokens = texts.reported_on.tokens
  seeds = range(work.seed, work.seed + config.seeds)

  def roster(seed, family, gates, strength, cache=work.model.cache):
    return Roster.create(
      texts.config, config.n, strength, seed=seed, noise=family, gate_weights=gates, cache=cache
    )

  plain = keep.get("plain", texts.plain)
  found = [likelihoods.record(plain, plain, tokens, "plain", config.task)]
  for family in config.families:
    tried = config.probabilities if family in noise_lib.PROBABILITIES else config.temperatures
    for gates in config.gates:
      name = f"{family}, {gates} gates"
      values = [
        keep.get(f"{name}, {s:g}", lambda s=s: texts.value(roster(work.seed, family, gates, s)))
        for s in tried
      ]
      best = tried[int(np.argmin(values))]
      measured = keep.get(
        f"{name}, best",
        lambda: texts.measure(lambda seed: roster(seed, family, gates, best), seeds),
      )
      shared = keep.get(
        f"{name}, agreement",
        lambda: float(
          np.mean(
            diagnostics.routing_agreement(
              texts.params,
              texts.config,
              roster(work.seed, family, gates, best, "clean"),
              texts.tokens(config.agreement_texts),
            )
          )
        ),
      )
      found.append(
        likelihoods.record(
          measured,
          plain,
          tokens,
          name,
          config.task,
          family=family,
          gates=gates,
          strength=best,
          is_edge=best in (tried[0], tried[-1]),
          shared=shared,
        )
      )
  return compared.corrected(found)


def table(records: list[compared.Record]) -> str:
  rows = [
    [
      r["label"],
      f"{r['strength']:g}" + (" (edge of the grid)" if r["is_edge"] else "")
      if "strength" in r
      else "",
      f"{100 * r['shared']:.0f} %" if "shared" in r else "",
      *(compared.COLUMNS[c][1](r) for c in _SHOWN),
    ]
    for r in records
  ]
  return (
    report_page.table(
      [
        "noise",
        "best strength",
        "experts shared with the clean member",
        *(compared.COLUMNS[c][0] for c in _SHOWN),
      ],
      rows,
    )
    + "\n\n"
    + compared.NOTE
  )


_SHOWN = ("perplexity", "perplexity_difference", "fitted", "fitted_difference")


def findings(records: list[compared.Record]) -> str:
  return "Each noise at the strength that was best on other texts. " + compared.clear(
    records, "fitted_difference", "perplexity at fitted output temperatures"
  )


def draw(records: list[compared.Record]):
  rosters = records[1:]
  families = list(dict.fromkeys(r["family"] for r in rosters))
  gates = list(dict.fromkeys(r["gates"] for r in rosters))
  of = {(r["family"], r["gates"]): r for r in rosters}
  panels = [
    ("perplexity_difference", "perplexity, difference to plain,\nboth as they are (%)"),
    ("fitted_difference", "perplexity, difference to plain,\nboth at fitted T (%)"),
  ]
  figure, axes = drawing.axes(2, width=4.0, height=3.4)
  for (measure_, title), axis in zip(panels, axes[0]):
    drawing.zero(axis)
    drawing.dots(
      axis,
      [f.replace("_", "\n") for f in families],
      {f"{g} gates": [compared.read(of[f, g][measure_]) for f in families] for g in gates},
    )
    axis.tick_params(axis="x", labelsize=8)
    axis.set_ylabel(title)
    axis.set_xlabel("noise on the routers")
  drawing.legend(figure, axes[0, 0])
  return figure
