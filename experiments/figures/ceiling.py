"""Gain against n up to 256, with a fitted ceiling.

    python -m experiments.reproduce --figure=ceiling --model=olmoe --data_dir=data

Perplexity of reference texts with rosters of 1, 2, 4, ... 256 members, with the same noise:
the members of a smaller roster are the first ones of a larger. What can be expected is
this. Members 1, 2, ... are exchangeable, so the mean of n of them converges; -log of a mean
of n exchangeable probabilities has the expectation L + a / n + O(1 / n^2) (a second-order
expansion about the limit: the variance of a mean falls as 1 / n). The clean member, one of
n, adds terms of the same order. So

    nll(n) = L + a / n

is fitted by least squares to the points of n >= 2. Intervals of the ceiling L come from the
bootstrap over texts, fitted anew on each resample. What the exponent of n would be, were it
fitted, too, is shown beside it; far from 1, the expansion does not hold yet, or noise hides
it. Both as they are and at the output temperature of each n. The paper stops at n = 64 and
sees diminishing returns; its reviewers asked for the ceiling.

    model      checkpoint (see models.py)              hardware               time
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       35 minutes
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    40 minutes
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     20 minutes
    embedded   ships with the package                  one CPU core           11 minutes

Times of the first three are estimated with roe_jax.costs (H100), not measured.
"""

import dataclasses

import numpy as np
import scipy.optimize

from experiments.analysis import drawing, report_page
from experiments.figures import compared, likelihoods
from experiments.figures.work import Command, Work
from roe_jax.roster import Roster

TITLE = "Gain against n, and its ceiling"
SAW = (
  "The paper saw the gain grow with n with diminishing returns, up to n = 64. Its "
  "reviewers asked for the ceiling."
)
RESAMPLES = 400  # of the fit, which takes a millisecond


@dataclasses.dataclass(frozen=True)
class Config:
  """The measurement.

  Attributes:
    task: whose reference texts are scored.
    members: n, ascending from 1.
    temperature: τ of all layers.
    examples: on which is reported.
    seeds: noise seeds.
  """

  task: str = "gsm8k"
  members: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
  temperature: float = 0.2
  examples: int = 200
  seeds: int = 1


CONFIGS = {name: Config() for name in ("olmoe", "mixtral", "gpt_oss")} | {
  "embedded": Config(task="wordmath", temperature=0.3, examples=60)
}


def commands(work: Work) -> list[Command]:
  return []


def curve(n: np.ndarray, ceiling: float, a: float, b: float = 1.0) -> np.ndarray:
  """nll(n) = ceiling + a n^-b."""
  return ceiling + a * n**-b


def fit(n: np.ndarray, nll: np.ndarray, b: float = 1.0) -> tuple[float, float]:
  """(ceiling, a) of `curve` by least squares."""
  design = np.stack([np.ones(len(n)), n**-b], axis=1)
  found, *_ = np.linalg.lstsq(design, nll, rcond=None)
  return float(found[0]), float(found[1])


def exponent(n: np.ndarray, nll: np.ndarray) -> float:
  """b of `curve` by least squares, between 0.1 and 3; for each b the rest is linear."""
  return float(
    scipy.optimize.minimize_scalar(
      lambda b: ((curve(n, *fit(n, nll, b), b) - nll) ** 2).sum(),
      bounds=(0.1, 3.0),
      method="bounded",
    ).x
  )


def fit_ceiling(n: np.ndarray, nll: np.ndarray, tokens: np.ndarray) -> dict:
  """The fit to n >= 2, as differences to the plain model's perplexity, with intervals over texts.

  Args:
    n: `[N]` roster sizes, 1 first.
    nll: `[N, X]` of each text.
    tokens: `[X]`.

  Returns:
    JSON: "limit" (percent of the plain perplexity), "reached" {n: share of the
    limit in percent}, or None where the limit's interval has zero in it; "a", and "b",
    the exponent were it fitted, too.
  """
  rng = np.random.default_rng(0)
  many = n >= 2

  def limits(weights):
    means = nll @ weights / (tokens @ weights)
    found = fit(n[many], means[many])
    return found, 100 * np.expm1(found[0] - means[0]), 100 * np.expm1(means - means[0])

  found, limit, gains = limits(np.ones(len(tokens)))
  resampled = []
  for _ in range(RESAMPLES):
    weights = np.bincount(rng.integers(len(tokens), size=len(tokens)), minlength=len(tokens))
    resampled.append(limits(weights.astype(float))[1])
  low, high = np.quantile(resampled, [0.025, 0.975])
  clear = bool(low > 0 or high < 0)
  return {
    "limit": {"value": float(limit), "low": float(low), "high": float(high), "clear": clear},
    "a": found[1],
    "b": exponent(n[many], (nll.sum(axis=1) / tokens.sum())[many]),
    "nll": found[0],
    "plain_nll": float(nll[0].sum() / tokens.sum()),
    "reached": {str(int(k)): float(100 * g / limit) for k, g in zip(n.tolist(), gains)}
    if clear
    else None,
  }


def measure(work: Work) -> list[dict]:
  config, keep = work.config, work.kept()
  seeds = range(work.seed, work.seed + config.seeds)
  found = []
  for checkpoint in work.model.checkpoints:
    model = checkpoint.rpartition(":")[2]
    texts = likelihoods.Texts(work, checkpoint, config.task, config.examples)
    tokens = texts.reported_on.tokens
    values = {}
    for n in config.members:
      values[n] = keep.get(
        f"{model}, n = {n}",
        texts.plain
        if n == 1
        else lambda n=n: texts.measure(
          lambda seed: Roster.create(texts.config, n, config.temperature, seed=seed), seeds
        ),
      )
      label = "plain" if n == 1 else f"n = {n}"
      found.append(
        likelihoods.record(values[n], values[1], tokens, label, config.task, model=model, n=n)
      )
    for name in ("nll", "fitted_nll"):
      nll = np.array([np.mean(values[n][name], axis=1) for n in config.members])
      found.append(
        {
          "model": model,
          "fit": name,
          "temperature": config.temperature,
          **fit_ceiling(np.array(config.members, float), nll, tokens.astype(float)),
        }
      )
  return compared.corrected(found)


def _parts(records):
  return [r for r in records if "n" in r], [r for r in records if "fit" in r]


def table(records: list[dict]) -> str:
  points, fits = _parts(records)
  rows = [
    [
      f["model"],
      "at fitted T" if f["fit"] == "fitted_nll" else "as it is",
      compared.cell(f["limit"], 2, True),
      f"{f['b']:.2f}",
      *(
        f"{f['reached'][k]:.0f} %" if f["reached"] and k in f["reached"] else "not defined"
        for k in _told(fits)
      ),
    ]
    for f in fits
  ]
  return (
    compared.table(
      points,
      ("model", "label"),
      ("perplexity", "perplexity_difference", "fitted", "fitted_difference"),
    )
    + (
      "\n\nThe fitted ceiling, perplexity against plain in % (* its interval leaves out zero), and the "
      "share of it that n members reach:\n\n"
    )
    + report_page.table(
      ["model", "", "ceiling, %", "exponent, were it fitted", *(f"n = {k}" for k in _told(fits))],
      rows,
    )
  )


def _told(fits):
  known = [k for f in fits for k in (f["reached"] or {})]
  return [k for k in ("2", "8", "32", "128") if k in known]


def findings(records: list[dict]) -> str:
  told = []
  for f in _parts(records)[1]:
    what = f"{f['model']}, {'at fitted T' if f['fit'] == 'fitted_nll' else 'as it is'}"
    limit = f["limit"]
    interval = f"{limit['value']:+.2f} % [{limit['low']:+.2f}, {limit['high']:+.2f}]"
    if not f["reached"]:
      told.append(f"{what}: no ceiling that differs clearly from the plain model ({interval}).")
      continue
    most = {int(k): v for k, v in f["reached"].items()}
    enough = next((k for k in sorted(most) if most[k] >= 90), None)
    told.append(
      f"{what}: the ceiling is {interval} of the perplexity"
      + (f", of which n = {enough} reaches {most[enough]:.0f} %." if enough else ".")
    )
  return " ".join(told)


def draw(records: list[dict]):
  points, fits = _parts(records)
  models = list(dict.fromkeys(f["model"] for f in fits))
  kinds = [
    ("nll", "perplexity_difference", "both as they are"),
    ("fitted_nll", "fitted_difference", "both at fitted T"),
  ]
  figure, axes = drawing.axes(2, len(models), width=3.6, height=2.6)
  for model, line in zip(models, axes):
    for (name, measure_, title), axis in zip(kinds, line):
      shown = [r for r in points if r["model"] == model and r[measure_]]
      drawing.zero(axis)
      values, bars = drawing.bars([compared.read(r[measure_]) for r in shown])
      axis.errorbar(
        [r["n"] for r in shown],
        values,
        yerr=bars,
        **drawing.style(0) | {"markersize": 4},
        label="measured",
      )
      f = next(f for f in fits if f["model"] == model and f["fit"] == name)
      n = np.geomspace(2, shown[-1]["n"], 60)
      axis.plot(
        n,
        100 * np.expm1(curve(n, f["nll"], f["a"]) - f["plain_nll"]),
        "-",
        color="0.4",
        linewidth=1,
        label="fitted L + a / n",
      )
      axis.axhspan(
        f["limit"]["low"],
        f["limit"]["high"],
        color="0.9",
        zorder=-1,
        label="ceiling, 95 % interval",
      )
      axis.axhline(f["limit"]["value"], color="0.4", linestyle=":", linewidth=1, label="ceiling")
      drawing.members_axis(axis, [r["n"] for r in shown])
      axis.set_title(f"{model}, {title}", fontsize=9)
    line[0].set_ylabel("perplexity, difference\nto plain (%)")
  drawing.legend(figure, axes[0, 0], 4)
  return figure
