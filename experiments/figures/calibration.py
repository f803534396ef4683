"""How much of the gain is calibration, by token class.

    python -m experiments.reproduce --figure=calibration --model=olmoe --data_dir=data

Baseline and roster, each at T = 1, with one output temperature, and with one per class of
tokens, all fitted on other sequences. Classes are fixed in advance: by the baseline's probability
p of its most probable token, and by the routing margin (the difference in router logits
between the last chosen expert and the best one not chosen, minimum over layers), below or
above its median on the sequences fitted on. Gains are in nats per token of the class, relative to
the baseline at T = 1. The share of calibration is the gain of one output temperature on the
baseline relative to that of the roster with its own, undefined where the roster's is not
significantly positive.
"""

import dataclasses
from typing import Any

import numpy as np

from experiments.analysis import drawing, output_temperatures, paired_statistics, report_page
from experiments.analysis.output_temperatures import GRID
from experiments.analysis.paired_statistics import Estimate
from experiments.figures import compared, figure_models, likelihoods
from experiments.figures.figure_run import FigureRun
from experiments.tuning.objectives import Perplexity
from roe_jax import diagnostics
from roe_jax.roster import Roster

TITLE = "How much of the gain is calibration"
BACKGROUND = (
  "Its reviewers asked which component gives the gain. The paper compares with the baseline "
  "without an output temperature."
)
ALL = "all tokens"
SYSTEMS = {  # key in records: name in the picture
  "baseline, one T": "baseline, one fitted T",
  "baseline, T by class": "baseline, fitted T of each class of p",
  "roster": "roster at T = 1",
  "roster, one T": "roster, one fitted T",
  "roster, T by class": "roster, fitted T of each class of p",
}
MARGINS = ("large routing margin", "small routing margin")


@dataclasses.dataclass(frozen=True)
class Config:
  """The measurement.

  Attributes:
    task: whose references are scored.
    num_members: members.
    tau: τ of all layers.
    bounds: of the classes: probabilities of the baseline's best token, descending.
    num_examples: to report on.
    num_seeds: noise seeds.
  """

  task: str = "paper/gsm8k"
  num_members: int = 8
  tau: float = 0.2
  bounds: tuple[float, ...] = (0.99, 0.9, 0.5)
  num_examples: int = 300
  num_seeds: int = 2

  @property
  def classes(self) -> list[str]:
    """Names of the classes of tokens by confidence, descending."""
    between = [f"{low:g} ≤ p < {high:g}" for high, low in zip(self.bounds, self.bounds[1:])]
    return [f"p ≥ {self.bounds[0]:g}", *between, f"p < {self.bounds[-1]:g}"]


CONFIGS = figure_models.configs(
  Config(), embedded=Config(task="wordmath", tau=0.3, num_examples=160)
)


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Scored tokens of sequences, concatenated.

  Attributes:
    nll: `[M, G]` nats at each output temperature.
    top: `[M]` probability of the most probable token, at T = 1.
    sequence: `[M]` index of each token's sequence.
  """

  nll: np.ndarray
  top: np.ndarray
  sequence: np.ndarray


def _score(
  scorer: likelihoods.ReferenceScorer,
  objective: Perplexity,
  roster: Roster,
  temperatures: np.ndarray,
) -> Tokens:
  # One more than on the grid, as many in every call, to reuse the compiled program.
  grid = output_temperatures.padded([1.0, *temperatures], len(GRID) + 1)
  found = objective.likelihoods(scorer.params, roster, slice(None), grid)
  return Tokens(
    -np.concatenate([f.token_log_probs for f in found])[:, 1 : 1 + len(temperatures)],
    np.concatenate([f.confidences[0] for f in found]),
    np.repeat(np.arange(len(found)), [f.tokens for f in found]),
  )


def _margins(scorer: likelihoods.ReferenceScorer, objective: Perplexity) -> np.ndarray:
  """Returns `[M]` smallest routing margins over layers, where each scored token is predicted."""
  baseline, found = Roster.create(scorer.config), []
  for first in range(0, len(objective.requests), 16):
    some = objective.requests[first : first + 16]
    margins = diagnostics.routing_margins(
      scorer.params, scorer.config, baseline, [r.sequence for r in some]
    )
    found += [
      margin[len(r.context) - 1 : r.max_length - 1]
      for margin, r in zip(margins[:, 0].min(axis=0), some)
    ]
  return np.concatenate(found)


def _classes(config: Config, top: np.ndarray) -> np.ndarray:
  """Returns the `[M]` index of each token's class."""
  return np.searchsorted(-np.array(config.bounds), -top, side="left")


def _fit(nll: np.ndarray, chosen: np.ndarray) -> float:
  """Returns the output temperature of the chosen tokens; 1 for fewer than ten."""
  if chosen.sum() < 10:
    return 1.0
  return output_temperatures.fit(nll[chosen])


def _measure(run: FigureRun, checkpoint: str) -> dict[str, Any]:
  """Returns "tokens" {class: [X]} and "gain" {class: {system: [X]}}, nats of sequences."""
  config = run.config
  scorer = likelihoods.ReferenceScorer(run, checkpoint, config.task, config.num_examples)
  fit_on, report_on = scorer.choose_on, scorer.report_on
  seeds = range(run.seed, run.seed + config.num_seeds)
  rosters = {
    "baseline": [Roster.create(scorer.config)],
    "roster": [
      Roster.create(scorer.config, config.num_members, config.tau, seed=s, cache=run.model.cache)
      for s in seeds
    ],
  }
  on_grid = {name: _score(scorer, fit_on, of_seeds[0], GRID) for name, of_seeds in rosters.items()}
  of_fit = _classes(config, on_grid["baseline"].top)
  every = np.full(len(of_fit), True)
  fitted = {
    name: [_fit(t.nll, every), *(_fit(t.nll, of_fit == c) for c in range(len(config.classes)))]
    for name, t in on_grid.items()
  }
  reported = {
    name: [_score(scorer, report_on, roster, np.array([1.0, *fitted[name]])) for roster in of_seeds]
    for name, of_seeds in rosters.items()
  }
  baseline = reported["baseline"][0]
  of = _classes(config, baseline.top)
  small = _margins(scorer, report_on) < np.median(_margins(scorer, fit_on))
  nll = {}
  for name, of_seeds in reported.items():
    mean = np.mean([t.nll for t in of_seeds], axis=0)
    nll[name], nll[f"{name}, one T"] = mean[:, 0], mean[:, 1]
    nll[f"{name}, T by class"] = mean[np.arange(len(of)), 2 + of]
  groups = (
    {ALL: np.full(len(of), True)}
    | {label: of == c for c, label in enumerate(config.classes)}
    | dict(zip(MARGINS, (~small, small)))
  )

  def by_sequence(values, chosen):
    return np.bincount(baseline.sequence[chosen], values[chosen], len(report_on.requests)).tolist()

  return {
    "temperatures": {name: dict(zip((ALL, *config.classes), t)) for name, t in fitted.items()},
    "tokens": {g: by_sequence(np.ones(len(of)), chosen) for g, chosen in groups.items()},
    "gain": {
      g: {s: by_sequence(nll["baseline"] - nll[s], chosen) for s in SYSTEMS}
      for g, chosen in groups.items()
    },
  }


def measure(run: FigureRun) -> list[dict]:
  keep, found = run.measurements(), []
  for checkpoint in run.model.checkpoints:
    m = keep.get(checkpoint, lambda: _measure(run, checkpoint))
    total = np.sum(m["tokens"][ALL])
    for group, counts in m["tokens"].items():
      counts, gains = np.array(counts), m["gain"][group]
      if not counts.sum():
        continue
      record = {
        "model": checkpoint.rpartition(":")[2],
        "class": group,
        "share": float(counts.sum() / total),
        "tokens": int(counts.sum()),
        "T": m["temperatures"]["baseline"].get(group),
      }
      record |= {system: _ratio(1e3 * np.array(gains[system]), counts) for system in SYSTEMS}
      one_t = [gains[f"{name}, one T"] for name in ("baseline", "roster")]
      record["share of calibration"] = _share(*one_t, gain=record["roster, one T"])
      found.append(record)
  return found


def _ratio(numerator, denominator):
  samples = [numerator, np.array(denominator)]
  return Estimate(*paired_statistics.bootstrap(samples, paired_statistics.ratio))


def _share(baseline, roster, gain):
  """Returns the gain of the baseline's T in percent of the roster's with its own T, or None."""
  return _ratio(100 * np.array(baseline), roster) if gain.low > 0 else None


def table(records: list[dict]) -> str:
  columns = {
    "model": "model",
    "tokens": "class",
    "share": lambda r: f"{100 * r['share']:.1f} %",
    "T of baseline": lambda r: f"{r['T']:.2f}" if r["T"] else "",
    **{s: lambda r, s=s: compared.cell(r[s], 2, True) for s in SYSTEMS},
    "share of calibration (%)": lambda r: (
      compared.cell(r["share of calibration"], 0) or "undefined"
    ),
  }
  return (
    f"{report_page.table_of(records, columns)}\n\nGains over the baseline at T = 1, in 0.001 nat "
    "per token of the class, with 95 % bootstrap intervals over sequences. p: the baseline's "
    "probability of its most probable token. Routing margin: difference in router logits between "
    "the last chosen expert and the best one not chosen, minimum over layers; large: at least the "
    "median. T by class is fitted for each class of p."
  )


def findings(records: list[dict]) -> str:
  sentences = []
  for r in (r for r in records if r["class"] == ALL):
    if share := r["share of calibration"]:
      sentences.append(
        f"{r['model']}: one output temperature on the baseline gains {share.value:.0f} % "
        f"[{share.low:.0f}, {share.high:.0f}] of what the roster with its own gains."
      )
    else:
      sentences.append(
        f"{r['model']}: the roster with its own output temperature has no significant gain "
        f"({report_page.difference(r['roster, one T'], 2)} x 0.001 nat per token), so its share of "
        "calibration is undefined."
      )
  return " ".join(sentences)


def draw(records: list[dict]):
  """Draws each class's contribution to the gain: its gain times its share of tokens."""
  models = compared.unique(records, "model")
  figure, axes = drawing.axes(1, len(models), width=7.8, height=2.9, sharey=True)
  for model, axis in zip(models, axes[:, 0]):
    shown = [r for r in records if r["model"] == model]

    drawing.zero(axis)
    names = [r["class"].replace(" routing margin", "\nmargin") for r in shown]
    groups = [f"{name}\n{100 * r['share']:.1f} %" for name, r in zip(names, shown)]
    series = {label: [r[s].scaled(r["share"]) for r in shown] for s, label in SYSTEMS.items()}
    drawing.dots(axis, groups, series)
    # All tokens are split once by confidence, and once by routing margin.
    num_margins = sum(r["class"] in MARGINS for r in shown)
    for last in (0, len(shown) - 1 - num_margins):
      axis.axvline(last + 0.5, color="0.6", linewidth=0.8, linestyle=":")
    axis.set_title(model, fontsize=9)
    axis.set_ylabel("gain over the baseline at T = 1\n(0.001 nat per token)", fontsize=8)
  axes[-1, 0].set_xlabel(
    "all tokens, split by p, or split by routing margin; below: share of tokens\n"
    "p: probability of the baseline's most probable token. T: output temperature. Routing margin:\n"
    "router logit of the last chosen expert less that of the best one not chosen, minimum over "
    "layers;\nlarge: at least the median",
    fontsize=8,
  )
  figure.suptitle(
    "Gain in log-likelihood, up is better: each class's part of the gain on all tokens, with 95 % "
    "intervals",
    fontsize=9,
  )
  drawing.legend(figure, axes[0, 0], 3)
  return figure
