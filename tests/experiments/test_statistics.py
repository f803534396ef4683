import itertools

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from experiments.analysis import output_temperatures, paired_statistics, ranking


@pytest.fixture
def quick(monkeypatch):
  """Few resamples, for tests that repeat a whole analysis many times."""
  monkeypatch.setattr(paired_statistics, "RESAMPLES", 400)
  monkeypatch.setattr(paired_statistics, "FLIPS", 399)


def is_plausible(count, trials, share):
  """Whether a count of successes is one that a probability gives (at 0.1 %)."""
  return scipy.stats.binomtest(count, trials, share).pvalue > 0.001


def test_accuracy_difference_has_its_value_and_the_width_of_a_paired_normal_interval():
  rng = np.random.default_rng(0)
  baseline = rng.random(2000) < 0.6
  correct = np.where(rng.random(2000) < 0.1, ~baseline, baseline)
  found = paired_statistics.paired_accuracy(correct, baseline)
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
  found = paired_statistics.paired_perplexity(nll, baseline, tokens)
  ratio = np.exp(nll.sum() / tokens.sum()) / np.exp(baseline.sum() / tokens.sum())
  assert found.value == pytest.approx(100 * (ratio - 1))
  assert found.low < found.value < found.high < 0
  assert found.excludes_zero


def test_the_interval_of_a_ratio_resamples_its_parts_together():
  tokens = np.random.default_rng(3).integers(5, 50, 80)
  found = paired_statistics.perplexity(2.0 * tokens, tokens)
  assert (found.low, found.value, found.high) == pytest.approx(3 * (np.exp(2),))


def test_intervals_cover_no_difference_about_as_often_as_they_say():
  rng = np.random.default_rng(2)
  covered = 0
  for _ in range(100):
    baseline, correct = rng.random(200) < 0.5, rng.random(200) < 0.5
    covered += not paired_statistics.paired_accuracy(correct, baseline).excludes_zero
  assert scipy.stats.binomtest(covered, 100, 0.95).pvalue > 0.001


def test_equal_results_differ_by_exactly_nothing():
  same = np.array([True, False, True])
  assert paired_statistics.paired_accuracy(same, same) == paired_statistics.Difference(
    0.0, 0.0, 0.0
  )


def test_output_temperature_is_found_between_grid_points():
  # Sharp logits of a source that is in truth 1.7 times as flat.
  rng = np.random.default_rng(3)
  logits = rng.normal(0, 3, (4000, 10))
  probs = np.exp(logits / 1.7) / np.exp(logits / 1.7).sum(-1, keepdims=True)
  chosen = (probs.cumsum(-1) > rng.random((4000, 1))).argmax(-1)
  grid = np.geomspace(0.5, 4, 15)
  scaled = logits[None] / grid[:, None, None]
  nll = -(
    np.take_along_axis(scaled, chosen[None, :, None], -1)[..., 0] - np.log(np.exp(scaled).sum(-1))
  )
  assert output_temperatures.fit(nll.T, grid) == pytest.approx(1.7, rel=0.06)


def test_output_temperature_stays_within_the_grid():
  grid = np.array([1.0, 2.0, 3.0])
  assert output_temperatures.fit(np.array([[1.0, 2.0, 3.0]]), grid) == 1.0
  assert output_temperatures.fit(np.array([[3.0, 2.0, 1.0]]), grid) == 3.0


def test_seeds_are_averaged_within_examples_and_their_spread_is_told():
  rng = np.random.default_rng(4)
  correct = rng.random((300, 5)) < 0.4
  baseline = rng.random(300) < 0.4
  found = paired_statistics.paired_accuracy(correct, baseline)
  assert found == paired_statistics.paired_accuracy(correct.mean(axis=1), baseline)
  assert found.value == pytest.approx(100 * (correct.mean() - baseline.mean()))
  assert paired_statistics.between_seeds(correct) == pytest.approx(
    np.std([correct[:, s].mean() for s in range(5)], ddof=1)
  )
  assert paired_statistics.between_seeds(baseline) is None
  assert paired_statistics.between_seeds(correct[:, :1]) is None


def test_more_seeds_make_the_interval_narrower_by_their_noise_only():
  rng = np.random.default_rng(5)
  chance, baseline = rng.random(2000), rng.random(2000) < 0.5
  widths = []
  for seeds in (1, 25):
    found = paired_statistics.paired_accuracy(rng.random((2000, seeds)) < chance[:, None], baseline)
    widths.append(found.high - found.low)
  # Variances of one answer: 1/6 of its noise, 1/12 between examples, 1/4 of the baseline.
  expected = np.sqrt((1 / 12 + 1 / 4 + 1 / 6 / 25) / (1 / 12 + 1 / 4 + 1 / 6))
  assert widths[1] / widths[0] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("share", [0.0, 0.03, -0.03])
def test_intervals_of_accuracy_differences_cover_the_truth(quick, share):
  rng = np.random.default_rng(6)
  covered = 0
  for _ in range(200):
    values = rng.choice([0, 1, 2, 3], 300, p=[0.05 + share / 2, 0.05 - share / 2, 0.5, 0.4])
    found = paired_statistics.paired_accuracy(np.isin(values, (0, 2)), np.isin(values, (1, 2)))
    covered += found.low <= 100 * share <= found.high
  assert is_plausible(covered, 200, 0.95)


def test_intervals_of_perplexity_differences_cover_the_truth(quick):
  rng = np.random.default_rng(7)
  covered = 0
  for _ in range(200):
    tokens = rng.integers(5, 60, 300)
    baseline = tokens * rng.gamma(2.0, 0.1, 300)
    nll = baseline - tokens * rng.gamma(1.0, 0.02, 300)
    found = paired_statistics.paired_perplexity(nll, baseline, tokens)
    covered += found.low <= 100 * np.expm1(-0.02) <= found.high
  assert is_plausible(covered, 200, 0.95)


@pytest.mark.parametrize("better, worse", [(9, 2), (30, 41), (0, 6), (5, 5), (0, 0)])
def test_one_seed_is_tested_by_mcnemar_as_statsmodels_does(better, worse):
  correct = np.array([1] * better + [0] * worse + [1] * 20 + [0] * 10, bool)
  baseline = np.array([0] * better + [1] * worse + [1] * 20 + [0] * 10, bool)
  found = paired_statistics.paired_test(correct, baseline)
  assert found.name == "McNemar"
  assert found.p == pytest.approx(mcnemar([[20, worse], [better, 10]], exact=True).pvalue)
  assert found.discordance == pytest.approx((better + worse) / len(correct))


def test_sign_flips_of_few_examples_are_all_of_them():
  difference = np.array([0.4, -0.2, 0.6, 0.2, 0.8, 0.2, 0.0, 0.0])
  found = paired_statistics.paired_test(difference + 0.1, np.full(8, 0.1))
  flips = [abs(np.dot(signs, difference[:6])) for signs in itertools.product((1, -1), repeat=6)]
  assert found.name == "sign-flip"
  assert found.p == pytest.approx(np.mean(np.array(flips) >= difference.sum() - 1e-9))


def test_sign_flips_are_those_of_scipy():
  rng = np.random.default_rng(14)
  for size, shift in ((12, 0.3), (60, 0.2), (60, 0.3), (500, 0.08)):
    difference = rng.normal(shift, 1.0, size)
    expected = scipy.stats.permutation_test(
      (difference,),
      lambda d, axis=-1: d.mean(axis=axis),
      permutation_type="samples",
      vectorized=True,
      n_resamples=9999,
      batch=500,
      rng=np.random.default_rng(1),
    ).pvalue
    found = paired_statistics.paired_test(difference, np.zeros(size)).p
    assert found == pytest.approx(expected, abs=4 * np.sqrt(expected / 9999))


def test_a_p_value_can_be_small_enough_for_a_large_table():
  rng = np.random.default_rng(15)
  p = paired_statistics.paired_test(rng.normal(1.0, 0.5, 200), np.zeros(200)).p
  assert p == 1 / (1 + paired_statistics.FLIPS)  # none of the flips, and the data themselves
  assert paired_statistics.holm([p] + [0.5] * 400)[0] < 0.05


def test_sign_flips_of_many_examples_agree_with_the_normal_approximation():
  rng = np.random.default_rng(8)
  values, baseline = rng.random((500, 2)).T + np.array([[0.03], [0.0]])
  found = paired_statistics.paired_test(values, baseline)
  assert found.p == pytest.approx(scipy.stats.ttest_rel(values, baseline).pvalue, abs=0.02)


def test_tests_find_nothing_in_nothing_as_often_as_they_say(quick):
  rng = np.random.default_rng(9)
  mcnemar_errors = flip_errors = 0
  for _ in range(400):
    correct, baseline = rng.random((2, 300)) < 0.5
    mcnemar_errors += paired_statistics.paired_test(correct, baseline).p < 0.05
    seeds = rng.random((60, 3)) < 0.5
    flip_errors += paired_statistics.paired_test(seeds, rng.random(60) < 0.5).p < 0.05
  assert is_plausible(flip_errors, 400, 0.05)
  assert 0 < mcnemar_errors <= scipy.stats.binom.ppf(0.999, 400, 0.05)  # exact: at most 5 %


def test_rounding_is_no_difference():
  nll = np.random.default_rng(10).gamma(2.0, 5.0, 200)
  assert paired_statistics.paired_test(nll * (1 + 1e-7), nll).p == 1.0
  assert paired_statistics.paired_test(nll * (1 + 1e-3), nll).p < 0.001


def test_holm_multiplies_as_holm_does():
  assert paired_statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
    [0.03, 0.06, 0.06, 0.02]
  )
  assert paired_statistics.holm([0.9, 0.8]) == [1.0, 1.0]
  p = np.random.default_rng(13).random(20) ** 4
  assert paired_statistics.holm(p) == pytest.approx(multipletests(p, method="holm")[1])
  assert paired_statistics.holm([]) == []


def test_holm_keeps_the_error_of_a_table_and_finds_what_is_there():
  rng = np.random.default_rng(11)
  p = rng.random((1000, 12))
  errors = sum(min(paired_statistics.holm(row)) < 0.05 for row in p)
  assert is_plausible(errors, 1000, 1 - (1 - 0.05 / 12) ** 12)
  p[:, 0] = 1e-4  # one that is there
  adjusted = np.array([paired_statistics.holm(row) for row in p])
  assert (adjusted[:, 0] < 0.05).all()
  assert (adjusted[:, 1:].min(axis=1) < 0.05).sum() <= scipy.stats.binom.ppf(0.999, 1000, 0.05)


@pytest.mark.parametrize("examples, discordance", [(1319, 0.1), (160, 0.3), (10042, 0.02)])
def test_detectable_difference_is_that_of_connors_sample_size(examples, discordance):
  d = paired_statistics.detectable_difference(examples, discordance)
  needed = ((1.959964 * discordance**0.5 + 0.841621 * (discordance - d**2) ** 0.5) / d) ** 2
  assert needed == pytest.approx(examples, rel=1e-4)


def test_with_1319_questions_of_which_a_tenth_differ_one_sees_two_and_a_half_points():
  assert 100 * paired_statistics.detectable_difference(1319, 0.1) == pytest.approx(2.43, abs=0.01)


def test_detectable_difference_of_few_examples_needs_all_that_differ_on_one_side():
  d = paired_statistics.detectable_difference(1319, 0.0)
  assert d * 1319 == pytest.approx(7.85, abs=0.05)  # (1.96 + 0.84)^2 examples
  assert paired_statistics.detectable_difference(2, 0.5) == 1.0


def test_a_detectable_difference_is_found_in_four_of_five_cases():
  rng = np.random.default_rng(12)
  examples, discordance = 1319, 0.12
  d = paired_statistics.detectable_difference(examples, discordance)
  found = 0
  for _ in range(500):
    kind = rng.choice(
      [1, -1, 0], examples, p=[(discordance + d) / 2, (discordance - d) / 2, 1 - discordance]
    )
    found += paired_statistics.paired_test(kind > 0, kind < 0).p < 0.05
  # The exact test keeps a little below its 5 %, and so below the power of the formula.
  assert is_plausible(found, 500, 0.78)


def test_detectable_difference_of_an_interval_is_2_8_standard_errors():
  normal = paired_statistics.Difference(0.3, 0.3 - 1.959964, 0.3 + 1.959964)
  assert paired_statistics.detectable_from_interval(normal) == pytest.approx(2.8016, abs=1e-3)


def comparison(value, low, high, p, adjusted):
  return paired_statistics.Comparison(
    "roster",
    "baseline",
    "gsm8k",
    "accuracy",
    " points",
    1319,
    paired_statistics.Difference(value, low, high, p, adjusted),
    paired_statistics.Test("McNemar", p, 0.1),
  )


def test_a_sentence_says_what_is_clear_and_what_is_not():
  assert comparison(3.2, 1.1, 5.3, 0.002, 0.004).sentence() == (
    "gsm8k: roster raises accuracy against baseline (+3.2 points, 95 % interval +1.1 to +5.3, "
    "p = 0.004 after Holm's correction, 1319 examples)."
  )
  assert "lowers accuracy" in comparison(-3.2, -5.3, -1.1, 1e-5, 1e-4).sentence()
  for unclear in (
    comparison(3.2, -0.1, 6.3, 0.06, 0.06),
    comparison(3.2, 0.1, 6.3, 0.04, 0.12),
    comparison(3.2, -0.1, 6.3, 0.04, 0.04),
  ):
    assert "no significant difference between roster and baseline" in unclear.sentence()
    assert unclear.verdict == "no significant difference"


def test_a_comparison_as_json():
  assert comparison(3.2, 1.1, 5.3, 0.002, 0.004).to_json() == {
    "method": "roster",
    "baseline": "baseline",
    "task": "gsm8k",
    "measure": "accuracy",
    "unit": " points",
    "examples": 1319,
    "difference": {"value": 3.2, "low": 1.1, "high": 5.3},
    "test": {"name": "McNemar", "p": 0.002, "discordance": 0.1},
    "adjusted": 0.004,
    "is_significant": True,
  }


def test_correction_is_over_all_lines_of_a_table():
  lines = [paired_statistics.Difference(3.0, 1.0, 5.0, p) for p in (0.02, 0.03, 0.6)]
  not_tested = paired_statistics.Difference(3.0, 1.0, 5.0)
  lines = paired_statistics.corrected([None, *lines, not_tested])
  assert lines[0] is None and lines[-1] == not_tested
  assert [line.adjusted for line in lines[1:-1]] == pytest.approx([0.06, 0.06, 0.6])
  assert not any(line.is_significant for line in lines[1:])


def test_the_area_under_the_curve_counts_pairs():
  rng = np.random.default_rng(0)
  event = rng.random(60) < 0.4
  scores = np.round(rng.normal(size=60) + event, 1)  # with ties
  pairs = scores[event][:, None] - scores[~event]
  expected = 100 * ((pairs > 0) + 0.5 * (pairs == 0)).mean()
  found = ranking.roc_area(scores, event)
  assert found.value == pytest.approx(expected) and found.low < expected < found.high
  u = scipy.stats.mannwhitneyu(scores[event], scores[~event]).statistic
  assert found.value == pytest.approx(100 * u / pairs.size)


def test_de_longs_test_is_that_of_its_kernel():
  """The variance of a difference of two U-statistics, from the kernel of all pairs."""
  rng = np.random.default_rng(1)
  event = rng.random(80) < 0.5
  ours, theirs = rng.normal(size=(2, 80)) + np.array([[1.2], [0.4]]) * event

  def kernel(scores):
    return (scores[event][:, None] > scores[~event]).astype(float)

  k = kernel(ours) - kernel(theirs)
  variance = k.mean(axis=1).var(ddof=1) / len(k) + k.mean(axis=0).var(ddof=1) / len(k.T)
  found = ranking.paired_roc_area(ours, theirs, event)
  assert found.value == pytest.approx(100 * k.mean())
  assert found.p == pytest.approx(2 * scipy.stats.norm.sf(abs(k.mean()) / variance**0.5))
  assert (found.high - found.low) / 3.92 == pytest.approx(100 * variance**0.5, rel=0.15)
  assert ranking.paired_roc_area(ours, ours, event).p == 1.0
