"""Gain against n up to 256, with a fitted ceiling.

    python -m experiments.reproduce --figure=ceiling --model=olmoe --data_dir=data

Perplexity of references with rosters of 1, 2, 4, ... 256 members and the same noise: the
members of a smaller roster are the first ones of a larger roster. Members 1, 2, ... are
exchangeable, so their mean over n converges; -log of a mean of n exchangeable probabilities
has the expectation L + a / n + O(1 / n^2) (second-order expansion about the limit: the
variance of a mean falls as 1 / n). The clean member, one of n, adds terms of the same order. So

    nll(n) = L + a / n

is fitted by least squares to the points with n >= 2. Intervals of the ceiling L come from the
bootstrap over sequences, refitting each resample. The exponent of n, if fitted as well, is also
shown: far from 1, the expansion does not hold yet, or noise hides it. All at T = 1 and at the
fitted output temperature of each n.
"""

import dataclasses

import numpy as np

from experiments.analysis import drawing, report_page
from experiments.analysis.paired_statistics import Difference
from experiments.cli.extras import scipy
from experiments.figures import compared, figure_models, likelihoods
from experiments.figures.figure_run import FigureRun
from roe_jax.roster import Roster

TITLE = "Gain against n, and its ceiling"
BACKGROUND = (
  "The paper reports a gain that grows with n with diminishing returns, up to n = 64. Its "
  "reviewers asked for the ceiling."
)
RESAMPLES = 400  # of the fit, which takes a millisecond


@dataclasses.dataclass(frozen=True)
class Config:
  """The measurement.

  Attributes:
    task: whose references are scored.
    members: n, ascending from 1.
    tau: τ of all layers.
    num_examples: to report on.
    num_seeds: noise seeds.
  """

  task: str = "paper/gsm8k"
  members: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
  tau: float = 0.2
  num_examples: int = 200
  num_seeds: int = 1


CONFIGS = figure_models.configs(
  Config(), embedded=Config(task="wordmath", tau=0.3, num_examples=60)
)
KINDS = {
  "nll": ("perplexity_difference", "at T = 1"),
  "fitted_nll": ("fitted_difference", "at fitted T"),
}


def curve(n: np.ndarray, ceiling: float, a: float, b: float = 1.0) -> np.ndarray:
  """Returns nll(n) = ceiling + a n^-b."""
  return ceiling + a * n**-b


def fit(n: np.ndarray, nll: np.ndarray, b: float = 1.0) -> tuple[float, float]:
  """Fits (ceiling, a) of `curve` by least squares."""
  design = np.stack([np.ones(len(n)), n**-b], axis=1)
  found, *_ = np.linalg.lstsq(design, nll, rcond=None)
  return float(found[0]), float(found[1])


def exponent(n: np.ndarray, nll: np.ndarray) -> float:
  """Fits b of `curve` in [0.1, 3] by least squares; for each b the rest is linear."""
  return float(
    scipy.optimize.minimize_scalar(
      lambda b: ((curve(n, *fit(n, nll, b), b) - nll) ** 2).sum(),
      bounds=(0.1, 3.0),
      method="bounded",
    ).x
  )


def fit_ceiling(n: np.ndarray, nll: np.ndarray, tokens: np.ndarray) -> dict:
  """Fits the ceiling to n >= 2, as a difference from the baseline's perplexity.

  Args:
    n: `[N]` roster sizes, 1 first.
    nll: `[N, X]` of each sequence.
    tokens: `[X]`.

  Returns:
    JSON: "limit" (percent of the baseline's perplexity, with its interval over sequences),
    "reached" {n: percent of the limit}, or None if the limit is not significant; "a", and
    "b", the exponent if fitted as well.
  """
  rng = np.random.default_rng(0)
  many = n >= 2

  def limits(weights):
    means = nll @ weights / (tokens @ weights)
    found = fit(n[many], means[many])
    return found, 100 * np.expm1(found[0] - means[0]), 100 * np.expm1(means - means[0])

  (ceiling, a), limit, gains = limits(np.ones(len(tokens)))
  resampled = []
  for _ in range(RESAMPLES):
    weights = np.bincount(rng.integers(len(tokens), size=len(tokens)), minlength=len(tokens))
    resampled.append(limits(weights.astype(float))[1])
  low, high = map(float, np.quantile(resampled, [0.025, 0.975]))
  limit = Difference(float(limit), low, high)
  reached = {str(int(k)): float(100 * g / limit.value) for k, g in zip(n.tolist(), gains)}
  return {
    "limit": limit,
    "a": a,
    "b": exponent(n[many], (nll.sum(axis=1) / tokens.sum())[many]),
    "nll": ceiling,
    "baseline_nll": float(nll[0].sum() / tokens.sum()),
    "reached": reached if limit.excludes_zero else None,
  }


def measure(run: FigureRun) -> list[dict]:
  config, keep = run.config, run.measurements()
  seeds = range(run.seed, run.seed + config.num_seeds)
  found = []
  for checkpoint in run.model.checkpoints:
    model = checkpoint.rpartition(":")[2]
    scorer = likelihoods.ReferenceScorer(run, checkpoint, config.task, config.num_examples)
    tokens = scorer.report_on.tokens
    values = {}
    for n in config.members:
      roster = lambda seed, n=n: Roster.create(scorer.config, n, config.tau, seed=seed)
      make = scorer.baseline if n == 1 else lambda: scorer.measure(roster, seeds)
      values[n] = keep.get(f"{model}, n = {n}", make)
      label = "baseline" if n == 1 else f"n = {n}"
      found.append(
        likelihoods.record(values[n], values[1], tokens, label, config.task, model=model, n=n)
      )
    for kind in KINDS:
      nll = np.array([np.mean(values[n][kind], axis=1) for n in config.members])
      fitted = fit_ceiling(np.array(config.members, float), nll, tokens.astype(float))
      found.append({"model": model, "fit": kind, "temperature": config.tau, **fitted})
  return compared.corrected(found)


def _parts(records):
  return [r for r in records if "n" in r], [r for r in records if "fit" in r]


def table(records: list[dict]) -> str:
  points, fits = _parts(records)
  return compared.table(points, ("model", "label"), compared.LIKELIHOOD) + table_of_fits(fits)


def table_of_fits(fits: list[dict]) -> str:
  """Returns a table of what `fit_ceiling` returned, with a sentence before it."""
  known = set().union(*(f["reached"] or () for f in fits))

  def reached(k):
    return lambda f: f"{f['reached'][k]:.0f} %" if f["reached"] else "undefined"

  columns = {
    "model": "model",
    "": lambda f: KINDS[f["fit"]][1],
    "ceiling (%)": lambda f: (
      report_page.difference(f["limit"], 2) + " *" * f["limit"].excludes_zero
    ),
    "exponent if fitted": lambda f: f"{f['b']:.2f}",
    **{f"n = {k}": reached(k) for k in ("2", "8", "32", "128") if k in known},
  }
  return (
    "\n\nThe fitted ceiling of the difference in perplexity from the baseline (*: its interval "
    "excludes zero), and the share of it that n members reach:\n\n"
  ) + report_page.table_of(fits, columns)


def findings(records: list[dict]) -> str:
  sentences = []
  for f in _parts(records)[1]:
    what = f"{f['model']}, {KINDS[f['fit']][1]}"
    limit = report_page.difference(f["limit"], 2, " %")
    if not f["reached"]:
      sentences.append(
        f"{what}: no ceiling that differs significantly from the baseline ({limit})."
      )
      continue
    most = {int(k): v for k, v in f["reached"].items()}
    enough = next((k for k in sorted(most) if most[k] >= 90), None)
    reach = f"; n = {enough} reaches {most[enough]:.0f} % of it" if enough else ""
    sentences.append(f"{what}: the ceiling is {limit} perplexity{reach}.")
  return " ".join(sentences)


def draw(records: list[dict]):
  points, fits = _parts(records)
  models = compared.unique(fits, "model")
  figure, axes = drawing.axes(2, len(models), width=3.6, height=2.6, sharey="row")
  for model, row in zip(models, axes):
    for (kind, (name, title)), axis in zip(KINDS.items(), row):
      shown = [r for r in points if r["model"] == model and r[name]]
      numbers, style = [r["n"] for r in shown], drawing.style(0) | {"markersize": 4}
      compared.draw_gains(axis, name, numbers, shown, label="measured", **style)
      f = next(f for f in fits if f["model"] == model and f["fit"] == kind)
      n, limit = np.geomspace(2, numbers[-1], 60), -f["limit"]
      fitted = -100 * np.expm1(curve(n, f["nll"], f["a"]) - f["baseline_nll"])
      axis.plot(n, fitted, "-", color="0.4", linewidth=1, label="fitted L + a / n")
      interval = dict(color="0.9", zorder=-1, label="ceiling L, 95 % interval")
      axis.axhspan(limit.low, limit.high, **interval)
      axis.axhline(limit.value, color="0.4", linestyle=":", linewidth=1, label="ceiling L")
      drawing.members_axis(axis, numbers)
      axis.set_title(f"{model}, both {title}", fontsize=9)
    row[0].set_ylabel(compared.PERPLEXITY_AXIS)
  drawing.legend(figure, axes[0, 0], 4)
  return figure
