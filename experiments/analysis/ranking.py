"""The area under the ROC curve: how well a score ranks examples with an event above others.

Intervals are bootstrap intervals over examples, and the difference of two scores of the same
examples is tested by DeLong's test (DeLong et al., Biometrics 44, 1988).
"""

from collections.abc import Sequence

import numpy as np

from experiments.analysis import paired_statistics
from experiments.analysis.paired_statistics import Difference, Estimate
from experiments.cli.extras import scipy


def area(scores: np.ndarray, event: np.ndarray, axis: int = -1) -> np.ndarray:
  """Returns the share of pairs (event, no event) with the larger score in the first; ties are 1/2.

  Args:
    scores: `[..., X]`.
    event: bool `[..., X]`.
    axis: that of the examples, the last one.
  """
  ranks = scipy.stats.rankdata(scores, axis=axis)
  event = np.asarray(event, bool)
  positive, negative = event.sum(axis=axis), (~event).sum(axis=axis)
  above = (ranks * event).sum(axis=axis) - positive * (positive + 1) / 2
  return above / np.maximum(positive * negative, 1)


def roc_area(scores: Sequence[float], event: Sequence[bool]) -> Estimate:
  """Returns the area under the ROC curve in percent."""
  samples = np.asarray(scores, float), np.asarray(event, float)
  return Estimate(*paired_statistics.bootstrap(samples, _percent))


def _percent(scores, event, axis=-1):
  return 100.0 * area(scores, event > 0.5, axis)


def paired_roc_area(
  scores: Sequence[float], baseline: Sequence[float], event: Sequence[bool]
) -> Difference:
  """Returns the difference of the areas of two scores of the same examples, in points."""
  ours, theirs = np.asarray(scores, float), np.asarray(baseline, float)
  happens = np.asarray(event, float)

  def difference(a, b, e, axis=-1):
    return _percent(a, e, axis) - _percent(b, e, axis)

  found = paired_statistics.bootstrap((ours, theirs, happens), difference)
  return Difference(*found, p=_de_long(ours, theirs, happens > 0.5))


def _de_long(ours, theirs, event):
  """Returns the p-value of equal areas; 1 if the event holds of all examples or of none."""
  if event.all() or not event.any():
    return 1.0
  differences = [_placements(ours, e) - _placements(theirs, e) for e in (event, ~event)]
  variance = sum(d.var(ddof=1) / len(d) for d in differences if len(d) > 1)
  mean = float(differences[0].mean())
  return float(2 * scipy.stats.norm.sf(abs(mean) / np.sqrt(variance))) if variance > 0 else 1.0


def _placements(scores, event):
  """Returns, for each example of the event, the share of the others that it ranks above."""
  ranks, own = scipy.stats.rankdata(scores)[event], scipy.stats.rankdata(scores[event])
  return (ranks - own) / (~event).sum()
