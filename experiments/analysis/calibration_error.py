"""Expected calibration error and Brier score.

An example has one or more events (its answer, or each of its tokens), each with the
probability of what was chosen ("confidence") and whether it was right. Examples are
resampled with all of their events.
"""

from collections.abc import Sequence
import dataclasses
import functools

import numpy as np

from experiments.analysis import paired_statistics
from experiments.analysis.paired_statistics import Difference, Estimate

BINS = 15
MASS, WIDTH = "equal-mass", "equal-width"


@dataclasses.dataclass(frozen=True)
class Events:
  """Confidences and outcomes by example.

  Attributes:
    confidences: `[N]` probabilities, the events of all examples concatenated.
    correct: `[N]` bool.
    example: `[N]` int, index of each event's example.
    num_examples: X.
    num_seeds: S, seeds per example; their events count as one example.
  """

  confidences: np.ndarray
  correct: np.ndarray
  example: np.ndarray
  num_examples: int
  num_seeds: int = 1

  @classmethod
  def of(
    cls,
    confidences: Sequence[Sequence[float] | np.ndarray],
    correct: Sequence[Sequence[bool] | np.ndarray],
    num_seeds: int = 1,
  ) -> "Events":
    """Makes events from one list per example.

    Raises:
      ValueError: lists of different lengths, no event, or no probabilities.
    """
    lengths = [len(c) for c in confidences]
    if lengths != [len(c) for c in correct]:
      raise ValueError("an example has as many confidences as outcomes")
    flat = np.concatenate([np.asarray(c, float) for c in confidences] or [np.empty(0)])
    if not flat.size:
      raise ValueError("there is no event whose confidence could be judged")
    if not ((flat >= 0) & (flat <= 1 + 1e-6)).all():
      raise ValueError("confidences are probabilities, from 0 to 1")
    return cls(
      flat.clip(0, 1),
      np.concatenate([np.asarray(c, bool) for c in correct]),
      np.repeat(np.arange(len(lengths)), lengths),
      len(lengths),
      num_seeds,
    )

  def sums(self, values: np.ndarray) -> np.ndarray:
    """Returns `[X]` sums of `values` `[N]` over each example's events, averaged over seeds."""
    return np.bincount(self.example, values, self.num_examples) / self.num_seeds

  @property
  def counts(self) -> np.ndarray:
    """`[X]` events of each example."""
    return self.sums(np.ones_like(self.confidences))


def bins(confidences: np.ndarray, kind: str = MASS, count: int = BINS) -> np.ndarray:
  """Returns the bin of each event, `[N]` int in [0, count).

  Equal-mass bins hold equally many events, except that equal confidences stay together;
  equal-width bins split [0, 1].
  """
  if kind == WIDTH:
    return np.minimum((confidences * count).astype(int), count - 1)
  edges = np.quantile(confidences, np.arange(1, count) / count, method="inverted_cdf")
  return np.searchsorted(edges, confidences, side="left")


@functools.lru_cache(maxsize=1)
def _weights(num_examples):
  """Returns [resamples, X] counts of each example in each resample.

  All statistics below are sums over examples; one product with this matrix gives them for
  all resamples and bins.
  """
  rng = np.random.default_rng(0)
  uniform = np.full(num_examples, 1 / num_examples)
  return np.concatenate(
    [
      rng.multinomial(num_examples, uniform, 100).astype(np.float32)
      for _ in range(paired_statistics.RESAMPLES // 100)
    ]
  )


def _gaps(events, kind):
  """Returns [X, K] sums of confidence minus outcome per used bin, as shares of all events."""
  where = bins(events.confidences, kind)
  gap = (events.confidences - events.correct) * events.num_seeds / len(where)
  return np.stack([events.sums(np.where(where == b, gap, 0.0)) for b in np.unique(where)], 1)


def expected_calibration_error(events: Events, kind: str = MASS) -> Estimate:
  """Returns the ECE: mean distance between a bin's mean confidence and its accuracy.

  Guo et al. (2017) use equal-width bins, Nguyen and O'Connor (2015) equal-mass ones. A
  resample's ECE exceeds the sample's just as that exceeds the truth, so the interval is the
  reversed percentile ("basic") one, over examples, with fixed bins. It begins at 0 if a
  perfectly calibrated model would reach this ECE by resampling alone in 5 % of cases.
  """
  gaps = _gaps(events, kind)
  value, resampled, chance = _resample(gaps)
  low, high = _basic(value, resampled)
  by_chance = value <= np.quantile(chance, paired_statistics.CONFIDENCE)
  return Estimate(value, 0.0 if by_chance else max(0.0, low), max(value, high))


def paired_calibration_error(events: Events, baseline: Events, kind: str = MASS) -> Difference:
  """Returns the difference of two ECEs on the same examples; each has its own bins.

  Raises:
    ValueError: different numbers of examples.
  """
  _check_paired(events, baseline)
  (ours, ours_resampled, _), (theirs, theirs_resampled, _) = (
    _resample(_gaps(e, kind)) for e in (events, baseline)
  )
  return Difference(ours - theirs, *_basic(ours - theirs, ours_resampled - theirs_resampled))


def _resample(gaps):
  """Returns the ECE, those of resamples, and those of their deviations alone."""
  total = gaps.sum(axis=0)
  resampled = _weights(len(gaps)) @ gaps
  return (
    float(np.abs(total).sum()),
    np.abs(resampled).sum(axis=1),
    np.abs(resampled - total).sum(axis=1),
  )


def _basic(value, resampled):
  """Returns reversed percentiles."""
  tail = (1 - paired_statistics.CONFIDENCE) / 2
  low, high = np.quantile(resampled, [1 - tail, tail])
  return float(2 * value - low), float(2 * value - high)


def _squares(events):
  return events.sums((events.confidences - events.correct) ** 2)


def brier(events: Events) -> Estimate:
  """Returns the mean squared distance of confidence and outcome over events (Brier, 1950)."""
  return Estimate(
    *paired_statistics.bootstrap([_squares(events), events.counts], paired_statistics.ratio)
  )


def paired_brier(events: Events, baseline: Events) -> tuple[Difference, paired_statistics.Test]:
  """Returns the difference of two Brier scores on the same examples, and its sign-flip test.

  Raises:
    ValueError: different numbers of examples or events.
  """
  _check_paired(events, baseline)
  if not np.array_equal(events.counts, baseline.counts):
    raise ValueError("Brier scores are compared on the same events")
  ours, theirs = _squares(events), _squares(baseline)
  test = paired_statistics.paired_test(ours, theirs)
  samples = [ours - theirs, events.counts]
  return Difference(*paired_statistics.bootstrap(samples, paired_statistics.ratio), test.p), test


def _check_paired(events, baseline):
  if events.num_examples != baseline.num_examples:
    raise ValueError(f"{events.num_examples} and {baseline.num_examples} examples cannot be paired")


@dataclasses.dataclass(frozen=True)
class Reliability:
  """The points of a reliability diagram, one per used bin, by confidence.

  Attributes:
    confidence: `[K]` mean confidence.
    correct: K accuracies, with intervals over examples.
    count: `[K]` events.
  """

  confidence: np.ndarray
  correct: list[Estimate]
  count: np.ndarray


def reliability(events: Events, kind: str = MASS, count: int = BINS) -> Reliability:
  """Returns the accuracy of events of similar confidence, in the bins of the ECE by default."""
  where = bins(events.confidences, kind, count)
  used = np.unique(where)
  tail = (1 - paired_statistics.CONFIDENCE) / 2
  points = []
  for b in used:
    inside = (where == b).astype(float)
    sums = np.stack([events.sums(inside * events.correct), events.sums(inside)], axis=1)
    right, number = (_weights(events.num_examples) @ sums).T
    shares = right[number > 0] / number[number > 0]
    points.append(
      Estimate(
        float(np.divide(*sums.sum(axis=0))), *map(float, np.quantile(shares, [tail, 1 - tail]))
      )
    )
  return Reliability(
    np.array([events.confidences[where == b].mean() for b in used]),
    points,
    np.array([(where == b).sum() for b in used]),
  )
