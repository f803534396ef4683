"""How much of the gain is calibration, by class of token.

    python -m experiments.reproduce --figure=calibration --model=olmoe --data_dir=data

Plain model and roster, each as it is, with one output temperature, and with one for each
class of tokens, all fitted on other texts. Classes are fixed before looking: by the
probability of the plain model's own best token ("confident" to "open"), and by how far its
routers are from another choice ("firm" and "fragile" at the median of the texts that are
fitted on: the smallest margin over layers between the last expert that is chosen and the
first that is not). Gains are nats per token of the class, against the plain model as it is.
What one temperature of the plain model gains, as a share of what the roster with its own
gains, is the share of calibration; it is not defined where the roster gains nothing clear.

    model      checkpoint (see models.py)              hardware               time
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       5 minutes
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    10 minutes
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     5 minutes
    embedded   ships with the package (both models)    one CPU core           2 minutes

Times of the first three are estimated with roe_jax.costs (H100), not measured. Its
reviewers asked which component gives the gain.
"""

import dataclasses
from typing import Any

import numpy as np

from experiments.analysis import drawing, paired_statistics, report_page
from experiments.analysis.paired_statistics import Estimate
from experiments.evaluation.measurer import OUTPUT_TEMPERATURES
from experiments.figures import compared, likelihoods
from experiments.figures.work import Command, Work
from experiments.tuning.objectives import Perplexity
from roe_jax import diagnostics, scoring
from roe_jax.roster import Roster

TITLE = "How much of the gain is calibration"
SAW = (
  "Its reviewers asked which component gives the gain. The paper compares with the plain "
  "model as it is, without an output temperature."
)
ALL = "all"
SYSTEMS = ("plain, one T", "plain, T by class", "roster", "roster, one T", "roster, T by class")


@dataclasses.dataclass(frozen=True)
class Config:
  """The measurement.

  Attributes:
    task: whose reference texts are scored.
    n: members.
    temperature: τ of all layers.
    bounds: of the classes, probabilities of the plain model's best token, descending.
    examples: on which is reported.
    seeds: noise seeds.
  """

  task: str = "gsm8k"
  n: int = 8
  temperature: float = 0.2
  bounds: tuple[float, ...] = (0.99, 0.9, 0.5)
  examples: int = 300
  seeds: int = 2

  @property
  def classes(self) -> list[str]:
    """Of tokens by confidence, from sure to open."""
    edges = [1.0, *self.bounds, 0.0]
    return [f"p {low:g} to {high:g}" for high, low in zip(edges, edges[1:])]


MARGINS = ("firm routing", "fragile routing")
CONFIGS = {name: Config() for name in ("olmoe", "mixtral", "gpt_oss")} | {
  "embedded": Config(task="wordmath", temperature=0.3, examples=160)
}


def commands(work: Work) -> list[Command]:
  return []


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Scored tokens of texts, one after the other.

  Attributes:
    nll: `[M, G]` nats at each output temperature.
    top: `[M]` probability of the most probable token, at T = 1.
    text: `[M]` index of each token's text.
  """

  nll: np.ndarray
  top: np.ndarray
  text: np.ndarray


def _score(
  texts: likelihoods.Texts,
  objective: Perplexity,
  roster: Roster,
  temperatures: np.ndarray,
  ids: range,
) -> Tokens:
  # As many output temperatures in every call, so that nothing is compiled again.
  padded = np.ones(len(OUTPUT_TEMPERATURES) + 1)
  padded[1 : 1 + len(temperatures)] = temperatures
  scores = scoring.score(
    texts.params,
    texts.config,
    objective.texts,
    objective.starts,
    roster=roster,
    request_ids=ids,
    output_temperatures=padded,
    batch_size=16,
  ).sequences
  return Tokens(
    -np.concatenate([s.log_probs for s in scores]).astype(np.float64)[:, 1 : 1 + len(temperatures)],
    np.exp(np.concatenate([s.greedy_log_probs[:, 0] for s in scores])),
    np.repeat(np.arange(len(scores)), [len(s.log_probs) for s in scores]),
  )


def _margins(texts: likelihoods.Texts, objective: Perplexity) -> np.ndarray:
  """`[M]` smallest routing margin over layers, where each scored token is predicted."""
  plain, found = Roster.create(texts.config), []
  for first in range(0, len(objective.texts), 16):
    some = objective.texts[first : first + 16]
    margins = diagnostics.routing_margins(texts.params, texts.config, plain, some)[:, 0].min(axis=0)
    found += [
      row[start - 1 : len(text) - 1]
      for row, text, start in zip(margins, some, objective.starts[first : first + 16])
    ]
  return np.concatenate(found)


def _classes(config: Config, top: np.ndarray) -> np.ndarray:
  """`[M]` index of each token's class."""
  return np.searchsorted(-np.array(config.bounds), -top, side="left")


def _fit(nll: np.ndarray, chosen: np.ndarray) -> float:
  """The output temperature of some tokens; 1 where there are fewer than ten to fit on."""
  if chosen.sum() < 10:
    return 1.0
  return paired_statistics.fit_output_temperature(nll[chosen], OUTPUT_TEMPERATURES)


def _measure(work: Work, checkpoint: str) -> dict[str, Any]:
  """JSON: "tokens" {class: [X]}, "gain" {class: {system: [X]}} nats summed over the tokens of a text."""
  config = work.config
  texts = likelihoods.Texts(work, checkpoint, config.task, config.examples)
  fit_on, report_on = texts.chosen_on, texts.reported_on
  fit_ids = range(len(fit_on.texts))
  report_ids = range(len(fit_ids), len(fit_ids) + len(report_on.texts))
  seeds = range(work.seed, work.seed + config.seeds)

  def roster(seed):
    return Roster.create(
      texts.config, config.n, config.temperature, seed=seed, cache=work.model.cache
    )

  on_grid = {
    "plain": _score(texts, fit_on, Roster.create(texts.config), OUTPUT_TEMPERATURES, fit_ids),
    "roster": _score(texts, fit_on, roster(seeds[0]), OUTPUT_TEMPERATURES, fit_ids),
  }
  of_fit = _classes(config, on_grid["plain"].top)
  fitted = {
    name: [
      _fit(t.nll, np.full(len(of_fit), True)),
      *(_fit(t.nll, of_fit == c) for c in range(len(config.classes))),
    ]
    for name, t in on_grid.items()
  }
  reported = {
    "plain": [
      _score(
        texts, report_on, Roster.create(texts.config), np.array([1.0, *fitted["plain"]]), report_ids
      )
    ],
    "roster": [
      _score(texts, report_on, roster(seed), np.array([1.0, *fitted["roster"]]), report_ids)
      for seed in seeds
    ],
  }
  plain = reported["plain"][0]
  of = _classes(config, plain.top)
  median = np.median(_margins(texts, fit_on))
  fragile = _margins(texts, report_on) < median
  nll = {}
  for name, runs in reported.items():
    mean = np.mean([t.nll for t in runs], axis=0)  # over seeds
    nll[name], nll[f"{name}, one T"] = mean[:, 0], mean[:, 1]
    nll[f"{name}, T by class"] = mean[np.arange(len(of)), 2 + of]
  groups = (
    {ALL: np.full(len(of), True)}
    | {label: of == c for c, label in enumerate(config.classes)}
    | dict(zip(MARGINS, (~fragile, fragile)))
  )

  def by_text(values, chosen):
    return np.bincount(plain.text[chosen], values[chosen], len(report_on.texts)).tolist()

  return {
    "temperatures": {name: dict(zip((ALL, *config.classes), t)) for name, t in fitted.items()},
    "tokens": {g: by_text(np.ones(len(of)), chosen) for g, chosen in groups.items()},
    "gain": {
      g: {s: by_text(nll["plain"] - nll[s], chosen) for s in SYSTEMS}
      for g, chosen in groups.items()
    },
  }


def measure(work: Work) -> list[dict]:
  keep, found = work.kept(), []
  for checkpoint in work.model.checkpoints:
    m = keep.get(checkpoint, lambda: _measure(work, checkpoint))
    everything = np.sum(m["tokens"][ALL])
    for group, counts in m["tokens"].items():
      counts = np.array(counts)
      if not counts.sum():
        continue
      record = {
        "model": checkpoint.rpartition(":")[2],
        "class": group,
        "share": float(counts.sum() / everything),
        "tokens": int(counts.sum()),
        "T": m["temperatures"]["plain"].get(group),
      }
      for system in SYSTEMS:
        gain = np.array(m["gain"][group][system])
        record[system] = dict(
          zip(
            ("value", "low", "high"),
            paired_statistics.bootstrap([1e3 * gain, counts], paired_statistics.ratio),
          )
        )
      record["share of calibration"] = _share(
        m["gain"][group]["plain, one T"], m["gain"][group]["roster, one T"], record["roster, one T"]
      )
      found.append(record)
  return found


def _share(plain, roster, gain):
  """The gain of the plain model's temperature in percent of the roster's with its own, or None."""
  if not gain["low"] > 0:
    return None
  value, low, high = paired_statistics.bootstrap(
    [100 * np.array(plain), np.array(roster)], paired_statistics.ratio
  )
  return {"value": value, "low": low, "high": high}


def table(records: list[dict]) -> str:
  rows = [
    [
      r["model"],
      r["class"],
      f"{100 * r['share']:.1f} %",
      f"{r['T']:.2f}" if r["T"] else "",
      *(compared.cell(r[s], 2, True) for s in SYSTEMS),
      compared.cell(r["share of calibration"], 0) or "not defined",
    ]
    for r in records
  ]
  return report_page.table(
    ["model", "tokens", "share", "T of plain", *SYSTEMS, "share of calibration, %"], rows
  ) + (
    "\n\nGains over the plain model as it is, in thousandths of a nat per token of "
    "the class; 95 % bootstrap intervals over texts. T by class is fitted for each "
    "class of confidence."
  )


def findings(records: list[dict]) -> str:
  told = []
  for r in (r for r in records if r["class"] == ALL):
    gain = r["roster, one T"]
    if not (share := r["share of calibration"]):
      told.append(
        f"{r['model']}: the roster with its own output temperature gains nothing clear "
        f"({gain['value']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}] thousandths of a nat "
        "per token), so that no share of it can be given."
      )
    else:
      told.append(
        f"{r['model']}: one output temperature of the plain model gains {share['value']:.0f} % "
        f"[{share['low']:.0f}, {share['high']:.0f}] of what the roster with its own gains."
      )
  return " ".join(told)


def draw(records: list[dict]):
  """Gains times the share of the class: what each class adds to the gain of all tokens."""
  models = list(dict.fromkeys(r["model"] for r in records))
  figure, axes = drawing.axes(1, len(models), width=7.4, height=2.6)
  for model, axis in zip(models, axes[:, 0]):
    shown = [r for r in records if r["model"] == model]

    def added(r, system):
      return Estimate(*(r["share"] * r[system][name] for name in ("value", "low", "high")))

    drawing.zero(axis)
    drawing.dots(
      axis,
      [f"{r['class']}\n{100 * r['share']:.1f} %" for r in shown],
      {s: [added(r, s) for r in shown] for s in SYSTEMS},
    )
    axis.set_title(model, fontsize=9)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_ylabel("added to the gain over plain\n(0.001 nat per token)", fontsize=8)
  axes[-1, 0].set_xlabel("class of tokens, and its share of all")
  drawing.legend(figure, axes[0, 0], 5)
  return figure
