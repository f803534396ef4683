import numpy as np
import pytest

from experiments.analysis import calibration_error, paired_statistics
from experiments.analysis.calibration_error import Events


def draw(rng, examples, tokens=1, sharpness=1.0):
  """Events of a model that is too sure of itself by a factor in log-odds."""
  logits = np.abs(rng.normal(1.0, 2.0, (examples, tokens)))
  right = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
  return Events.of(1 / (1 + np.exp(-sharpness * logits)), right)


def error_by_hand(events, edges):
  """ECE with bins (low, high] in a plain loop."""
  total = 0.0
  for low, high in zip(edges[:-1], edges[1:]):
    inside = [(c, y) for c, y in zip(events.confidences, events.correct) if low < c <= high]
    total += abs(sum(c - y for c, y in inside))
  return total / len(events.confidences)


def test_errors_are_those_of_a_plain_loop():
  events = draw(np.random.default_rng(0), 200, 3, 2.0)
  width = calibration_error.expected_calibration_error(events, calibration_error.WIDTH)
  assert width.value == pytest.approx(error_by_hand(events, np.arange(16) / 15))
  mass = calibration_error.expected_calibration_error(events)
  ordered = np.sort(events.confidences)
  between = (ordered[39::40] + np.append(ordered[40::40], 2.0)) / 2
  assert mass.value == pytest.approx(error_by_hand(events, [0.0, *between]))


def test_bins_of_equal_mass_hold_equally_many_events_and_equal_ones_stay_together():
  confidences = np.random.default_rng(1).random(600)
  assert np.bincount(calibration_error.bins(confidences)).tolist() == [40] * 15
  same = calibration_error.bins(np.array([0.5] * 50 + [0.9] * 50))
  assert len(set(same[:50])) == len(set(same[50:])) == 1 and same[0] != same[-1]


def test_bins_of_equal_width_take_in_both_ends():
  found = calibration_error.bins(np.array([0.0, 0.49, 0.99, 1.0]), calibration_error.WIDTH, 2)
  assert found.tolist() == [0, 0, 1, 1]


def test_brier_score_is_the_mean_square_over_events_of_all_examples():
  events = Events.of([[0.9, 0.6], [0.5]], [[True, False], [True]])
  assert calibration_error.brier(events).value == pytest.approx((0.01 + 0.36 + 0.25) / 3)


@pytest.mark.parametrize(
  "examples, tokens, sharpness", [(300, 1, 1.0), (300, 1, 2.0), (100, 20, 1.0), (100, 20, 1.5)]
)
def test_intervals_of_errors_cover_the_truth_in_nine_of_ten_cases(
  monkeypatch, examples, tokens, sharpness
):
  monkeypatch.setattr(paired_statistics, "RESAMPLES", 400)
  calibration_error._weights.cache_clear()
  rng = np.random.default_rng(2)
  many = draw(rng, 100_000, 1, sharpness)
  truth = error_by_quantiles(many)
  found = [
    calibration_error.expected_calibration_error(draw(rng, examples, tokens, sharpness))
    for _ in range(100)
  ]
  calibration_error._weights.cache_clear()
  assert sum(e.low <= truth <= e.high for e in found) >= 85
  if sharpness > 1 and tokens > 1:  # not by being too wide to say anything
    assert all(e.low > 0 for e in found)


def error_by_quantiles(events):
  """ECE of very many events in 15 equal parts."""
  order = np.argsort(events.confidences)
  gaps = (events.confidences - events.correct)[order]
  return sum(abs(part.sum()) for part in np.array_split(gaps, 15)) / len(gaps)


def test_an_interval_of_a_calibrated_model_begins_at_zero_where_a_naive_one_does_not():
  events = draw(np.random.default_rng(3), 300)
  found = calibration_error.expected_calibration_error(events)
  assert found.low == 0.0 < found.value <= found.high


def test_intervals_of_brier_differences_are_paired():
  rng = np.random.default_rng(4)
  logits = np.abs(rng.normal(1.0, 2.0, (300, 5)))
  right = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
  sure, fitted = (Events.of(1 / (1 + np.exp(-s * logits)), right) for s in (1.5, 1.0))
  difference, test = calibration_error.paired_brier(sure, fitted)
  assert difference.value == pytest.approx(
    calibration_error.brier(sure).value - calibration_error.brier(fitted).value
  )
  alone = calibration_error.brier(sure)
  assert difference.high - difference.low < 0.5 * (alone.high - alone.low)
  assert difference.low > 0 and test.p < 0.01
  errors = calibration_error.paired_calibration_error(sure, fitted)
  assert errors.low > 0 and errors.value < 0.1


def test_seeds_are_not_more_examples():
  events = draw(np.random.default_rng(5), 200, 4, 1.5)
  shape = (200, 4)
  thrice = Events.of(
    np.tile(events.confidences.reshape(shape), 3),
    np.tile(events.correct.reshape(shape), 3),
    num_seeds=3,
  )
  for measure in (calibration_error.brier, calibration_error.expected_calibration_error):
    once, again = measure(events), measure(thrice)
    assert (again.value, again.low, again.high) == pytest.approx(
      (once.value, once.low, once.high), rel=1e-5
    )
  difference, test = calibration_error.paired_brier(thrice, events)
  assert abs(difference.value) < 1e-9 and test.p == 1.0


def test_a_reliability_diagram_has_each_bins_means():
  events = Events.of([[0.2], [0.2], [0.9], [0.9]], [[0], [1], [1], [1]])
  points = calibration_error.reliability(events, calibration_error.WIDTH, 2)
  assert points.confidence == pytest.approx([0.2, 0.9])
  assert [p.value for p in points.correct] == [0.5, 1.0]
  assert points.count.tolist() == [2, 2]
  assert points.correct[0].low == 0.0 and points.correct[0].high == 1.0


@pytest.mark.parametrize(
  "confidences, correct, message",
  [
    ([[0.5, 0.5]], [[True]], "as many confidences as outcomes"),
    ([[]], [[]], "no event"),
    ([[1.5]], [[True]], "from 0 to 1"),
  ],
)
def test_what_is_no_event_is_refused(confidences, correct, message):
  with pytest.raises(ValueError, match=message):
    Events.of(confidences, correct)


def test_other_examples_or_events_are_not_compared():
  rng = np.random.default_rng(6)
  with pytest.raises(ValueError, match="5 and 6 examples cannot be paired"):
    calibration_error.paired_calibration_error(draw(rng, 5), draw(rng, 6))
  with pytest.raises(ValueError, match="on the same events"):
    calibration_error.paired_brier(draw(rng, 5, 2), draw(rng, 5, 3))
