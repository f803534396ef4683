import numpy as np
import pytest
import scipy.stats

from experiments import statistics


def test_accuracy_difference_has_its_value_and_the_width_of_a_paired_normal_interval():
  rng = np.random.default_rng(0)
  baseline = rng.random(2000) < 0.6
  correct = np.where(rng.random(2000) < 0.1, ~baseline, baseline)
  found = statistics.paired_accuracy(correct, baseline)
  difference = 100.0 * (correct.astype(float) - baseline)
  assert found.value == pytest.approx(difference.mean())
  half = 1.96 * difference.std() / np.sqrt(2000)
  assert found.high - found.value == pytest.approx(half, rel=0.1)
  assert found.value - found.low == pytest.approx(half, rel=0.1)


def test_perplexity_difference_is_that_of_the_pooled_perplexities():
  rng = np.random.default_rng(1)
  tokens = rng.integers(5, 40, 300)
  baseline = tokens * rng.gamma(2.0, 0.1, 300)
  nll = baseline + tokens * rng.normal(-0.02, 0.01, 300)
  found = statistics.paired_perplexity(nll, baseline, tokens)
  ratio = np.exp(nll.sum() / tokens.sum()) / np.exp(baseline.sum() / tokens.sum())
  assert found.value == pytest.approx(100 * (ratio - 1))
  assert found.low < found.value < found.high < 0
  assert found.is_clear


def test_intervals_cover_no_difference_about_as_often_as_they_say():
  rng = np.random.default_rng(2)
  covered = 0
  for _ in range(100):
    baseline, correct = rng.random(200) < 0.5, rng.random(200) < 0.5
    covered += not statistics.paired_accuracy(correct, baseline).is_clear
  assert scipy.stats.binomtest(covered, 100, 0.95).pvalue > 0.001


def test_equal_results_differ_by_exactly_nothing():
  same = np.array([True, False, True])
  assert statistics.paired_accuracy(same, same) == statistics.Difference(0.0, 0.0, 0.0)


def test_output_temperature_is_found_between_grid_points():
  # Sharp logits of a source that is in truth 1.7 times as flat.
  rng = np.random.default_rng(3)
  logits = rng.normal(0, 3, (4000, 10))
  probs = np.exp(logits / 1.7) / np.exp(logits / 1.7).sum(-1, keepdims=True)
  chosen = (probs.cumsum(-1) > rng.random((4000, 1))).argmax(-1)
  grid = np.geomspace(0.5, 4, 15)
  scaled = logits[None] / grid[:, None, None]
  nll = -(np.take_along_axis(scaled, chosen[None, :, None], -1)[..., 0]
          - np.log(np.exp(scaled).sum(-1)))
  assert statistics.fit_output_temperature(nll.T, grid) == pytest.approx(1.7, rel=0.06)


def test_output_temperature_stays_within_the_grid():
  grid = np.array([1.0, 2.0, 3.0])
  assert statistics.fit_output_temperature(np.array([[1.0, 2.0, 3.0]]), grid) == 1.0
  assert statistics.fit_output_temperature(np.array([[3.0, 2.0, 1.0]]), grid) == 3.0
