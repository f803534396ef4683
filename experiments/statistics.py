"""Paired comparisons with confidence intervals."""

import dataclasses

import numpy as np
import scipy.stats

CONFIDENCE = 0.95
RESAMPLES = 4000


@dataclasses.dataclass(frozen=True)
class Difference:
  """A difference to a baseline on the same examples, with its interval.

  Attributes:
    value: the difference.
    low, high: bounds of the 95 % bootstrap interval over examples.
  """

  value: float
  low: float
  high: float

  @property
  def is_clear(self) -> bool:
    """Whether the interval leaves out zero."""
    return self.low > 0 or self.high < 0


def paired_accuracy(correct: np.ndarray, baseline: np.ndarray) -> Difference:
  """Difference of two accuracies on the same problems, in percentage points.

  Args:
    correct: bool `[X]`, by problem.
    baseline: bool `[X]`.
  """
  difference = 100.0 * (correct.astype(float) - baseline.astype(float))
  return _bootstrap((difference,), lambda d, axis=-1: d.mean(axis=axis))


def paired_perplexity(nll: np.ndarray, baseline: np.ndarray, tokens: np.ndarray) -> Difference:
  """Relative difference of two perplexities on the same texts, in percent.

  A perplexity is exp(sum of nll / sum of tokens) over all texts; texts are what
  is resampled.

  Args:
    nll: `[X]` summed negative log-probability of each text, nats.
    baseline: `[X]` likewise.
    tokens: `[X]` number of scored tokens of each text.
  """
  def statistic(difference, count, axis=-1):
    return 100.0 * np.expm1(difference.sum(axis=axis) / count.sum(axis=axis))
  return _bootstrap((nll - baseline, tokens.astype(float)), statistic)


def _bootstrap(samples, statistic) -> Difference:
  value = float(statistic(*samples))
  if all(np.all(s == s[0]) for s in samples[:1]):
    return Difference(value, value, value)  # no variation to resample
  interval = scipy.stats.bootstrap(
      samples, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES,
      confidence_level=CONFIDENCE, method="percentile", batch=500,
      rng=np.random.default_rng(0)).confidence_interval
  return Difference(value, float(interval.low), float(interval.high))


def fit_output_temperature(nll: np.ndarray, temperatures: np.ndarray) -> float:
  """The output temperature with the lowest total nll, from a grid.

  The minimum of a parabola through the best grid point and its neighbours in
  log-temperature; the grid's edge, if the best point lies there.

  Args:
    nll: `[X, G]` negative log-probabilities.
    temperatures: `[G]`, increasing.
  """
  total = nll.sum(axis=0, dtype=np.float64)
  best = int(np.argmin(total))
  if not 0 < best < len(temperatures) - 1:
    return float(temperatures[best])
  around = slice(best - 1, best + 2)
  curve = np.polynomial.Polynomial.fit(np.log(temperatures[around]), total[around], 2)
  return float(np.exp(curve.deriv().roots()[0].real))
