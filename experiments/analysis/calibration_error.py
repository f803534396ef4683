"""Whether probabilities mean what they say: expected calibration error and Brier score.

An example has one or several events (its answer, or each token of it), each with
the probability that was given to what was chosen ("confidence") and whether that
was right. Examples are what is resampled, with all of their events.
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
    confidences: `[N]` probabilities, all examples' events one after another.
    correct: `[N]` bool.
    example: `[N]` int, the index of the example that an event belongs to.
    num_examples: X.
    num_seeds: S, how many seeds' events an example has; it counts as one example.
  """

  confidences: np.ndarray
  correct: np.ndarray
  example: np.ndarray
  num_examples: int
  num_seeds: int = 1

  @classmethod
  def of(
    cls,
    confidences: Sequence[Sequence[float]],
    correct: Sequence[Sequence[bool]],
    num_seeds: int = 1,
  ) -> "Events":
    """From one list for each example.

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
    """`[X]` sums of `values` `[N]` over each example's events, means over seeds."""
    return np.bincount(self.example, values, self.num_examples) / self.num_seeds

  @property
  def counts(self) -> np.ndarray:
    """`[X]` how many events each example has."""
    return self.sums(np.ones_like(self.confidences))


def bins(confidences: np.ndarray, kind: str = MASS, count: int = BINS) -> np.ndarray:
  """The bin of each event, `[N]` int in [0, count).

  Bins of equal mass hold equally many events, as far as equal confidences, which
  stay together, allow; bins of equal width split [0, 1].
  """
  if kind == WIDTH:
    return np.minimum((confidences * count).astype(int), count - 1)
  edges = np.quantile(confidences, np.arange(1, count) / count, method="inverted_cdf")
  return np.searchsorted(edges, confidences, side="left")


@functools.lru_cache(maxsize=1)
def _weights(num_examples):
  """[resamples, X]: how often each example is in each resample.

  All that follows is made of sums over examples, and one product with this matrix
  gives those of all resamples and bins.
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
  """[X, K] sums of confidence minus outcome in each bin in use, as shares of all events."""
  where = bins(events.confidences, kind)
  gap = (events.confidences - events.correct) * events.num_seeds / len(where)
  return np.stack([events.sums(np.where(where == b, gap, 0.0)) for b in np.unique(where)], 1)


def expected_calibration_error(events: Events, kind: str = MASS) -> Estimate:
  """Mean distance of a bin's mean confidence from its share of right outcomes (ECE).

  Guo et al. (2017), with equal-width bins; Nguyen and O'Connor (2015), with
  equal-mass ones. A resample's ECE is larger than the sample's, as that is than
  the truth, so that the interval is the reversed percentile one ("basic"), over
  examples, in fixed bins; and it begins at 0 where the ECE is one that resampling
  alone gives in 95 % of cases to a model without any gap.
  """
  gaps = _gaps(events, kind)
  value, resampled, chance = _resample(gaps)
  low, high = _basic(value, resampled)
  by_chance = value <= np.quantile(chance, paired_statistics.CONFIDENCE)
  return Estimate(value, 0.0 if by_chance else max(0.0, low), max(value, high))


def paired_calibration_error(events: Events, baseline: Events, kind: str = MASS) -> Difference:
  """Difference of two ECEs on the same examples; each has its own bins.

  Raises:
    ValueError: not the same number of examples.
  """
  _check_paired(events, baseline)
  (ours, ours_resampled, _), (theirs, theirs_resampled, _) = (
    _resample(_gaps(e, kind)) for e in (events, baseline)
  )
  return Difference(ours - theirs, *_basic(ours - theirs, ours_resampled - theirs_resampled))


def _resample(gaps):
  """The ECE, those of resamples, and those of their deviations alone."""
  total = gaps.sum(axis=0)
  resampled = _weights(len(gaps)) @ gaps
  return (
    float(np.abs(total).sum()),
    np.abs(resampled).sum(axis=1),
    np.abs(resampled - total).sum(axis=1),
  )


def _basic(value, resampled):
  """Reversed percentiles."""
  tail = (1 - paired_statistics.CONFIDENCE) / 2
  low, high = np.quantile(resampled, [1 - tail, tail])
  return float(2 * value - low), float(2 * value - high)


def _squares(events):
  return events.sums((events.confidences - events.correct) ** 2)


def brier(events: Events) -> Estimate:
  """Mean squared distance of confidence and outcome (Brier, 1950), over events."""
  return Estimate(
    *paired_statistics.bootstrap([_squares(events), events.counts], paired_statistics.ratio)
  )


def paired_brier(events: Events, baseline: Events) -> tuple[Difference, paired_statistics.Test]:
  """Difference of two Brier scores on the same examples, and its sign-flip test.

  Raises:
    ValueError: not the same numbers of examples and events.
  """
  _check_paired(events, baseline)
  if not np.array_equal(events.counts, baseline.counts):
    raise ValueError("Brier scores are compared on the same events")
  ours, theirs = _squares(events), _squares(baseline)
  return (
    Difference(
      *paired_statistics.bootstrap([ours - theirs, events.counts], paired_statistics.ratio)
    ),
    paired_statistics.paired_test(ours, theirs),
  )


def _check_paired(events, baseline):
  if events.num_examples != baseline.num_examples:
    raise ValueError(f"{events.num_examples} and {baseline.num_examples} examples cannot be paired")


@dataclasses.dataclass(frozen=True)
class Reliability:
  """The points of a reliability diagram, one for each bin in use, by confidence.

  Attributes:
    confidence: `[K]` mean confidence.
    correct: K shares of right outcomes, with intervals over examples.
    count: `[K]` events.
  """

  confidence: np.ndarray
  correct: list[Estimate]
  count: np.ndarray


def reliability(events: Events, kind: str = MASS, count: int = 10) -> Reliability:
  """How often events of about the same confidence were right."""
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
