"""Aggregations against their formulas in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from roe_jax.aggregation import AGGREGATIONS
from roe_jax.aggregation import contrast as make_contrast


def softmax(x):
  p = np.exp(x - x.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)


def mean_probability(logits):
  return softmax(logits).mean(axis=0)


def mean_logit(logits):
  return softmax(logits.mean(axis=0))


def majority(logits):
  p = mean_probability(logits)
  for member in logits:
    for place in np.ndindex(p.shape[:-1]):
      p[place][np.argmax(member[place])] += 1
  return p / (len(logits) + 1)


def contrast(logits):
  strong, weak = logits[0], logits[1:].mean(axis=0)
  p = softmax(strong)
  plausible = p >= 0.1 * p.max(-1, keepdims=True)
  return softmax(np.where(plausible, 1.5 * strong - 0.5 * weak, -np.inf))


FORMULAS = {f.__name__: f for f in (mean_probability, mean_logit, majority, contrast)}


def random_logits(scale):
  random = np.random.RandomState(0)
  # An offset for each member and place is no part of its distribution.
  return (
    scale * random.standard_normal((5, 3, 4, 11)) + random.uniform(-50, 50, (5, 3, 4, 1))
  ).astype(np.float32)


@pytest.mark.parametrize("scale", [1.0, 25.0])  # 25: probabilities down to exp(-140)
@pytest.mark.parametrize("name", FORMULAS)
def test_aggregations_follow_their_formulas(name, scale):
  logits = random_logits(scale)
  actual = AGGREGATIONS[name](jnp.asarray(logits))
  assert actual.dtype == jnp.float32
  with np.errstate(divide="ignore"):  # the contrast leaves tokens without probability
    expected = np.log(FORMULAS[name](logits.astype(np.float64)))
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-5)


def test_the_contrast_has_its_parameters():
  logits = random_logits(2.0).astype(np.float64)
  strong, weak = logits[0], logits[1:].mean(axis=0)
  for alpha, beta in ((0.1, 0.0), (0.5, 0.9)):
    p = softmax(strong)
    plausible = p >= alpha * p.max(-1, keepdims=True)
    expected = softmax(np.where(plausible, (1 + beta) * strong - beta * weak, -np.inf))
    found = make_contrast(alpha, beta)(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-5, atol=2e-5)
  with pytest.raises(ValueError, match="beta be at least 0"):
    make_contrast(beta=-1)


def test_every_aggregation_has_a_formula_and_they_differ():
  assert set(AGGREGATIONS) == set(FORMULAS)
  results = [FORMULAS[name](random_logits(2.0).astype(np.float64)) for name in FORMULAS]
  for i in range(len(results)):
    assert np.abs(results[i] - results[i - 1]).max() > 0.05


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_results_are_normalized_even_for_very_peaked_members(name):
  log_probs = AGGREGATIONS[name](jnp.asarray(random_logits(100.0)))
  assert name == "contrast" or np.all(np.isfinite(log_probs))
  np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, rtol=1e-5)


def test_majority_breaks_ties_by_mean_probability():
  # Two votes each for tokens 0 and 1; token 1's voters are surer, and token 2
  # has the largest mean probability of all without any vote.
  logits = np.log(
    np.array([[0.36, 0.30, 0.34], [0.36, 0.30, 0.34], [0.1, 0.46, 0.44], [0.1, 0.46, 0.44]])
  )
  p = np.exp(AGGREGATIONS["majority"](jnp.asarray(logits, jnp.float32)))
  assert logits.mean(0).argmax() == 2 and np.exp(logits).mean(0).argmax() == 2
  assert p.argmax() == 1 and p[0] > p[2]


def test_members_may_come_a_few_at_a_time():
  logits = jnp.asarray(random_logits(2.0))
  for name, aggregation in AGGREGATIONS.items():
    state = None
    for part in (logits[:1], logits[1:3], logits[3:]):
      state = aggregation.add(state, part)
    np.testing.assert_allclose(
      aggregation.finish(state, 5), aggregation(logits), rtol=1e-5, atol=2e-5, err_msg=name
    )


def test_one_member_is_its_own_mean():
  logits = random_logits(2.0)[:1]
  expected = np.log(softmax(logits[0].astype(np.float64)))
  for name in ("mean_probability", "mean_logit"):
    np.testing.assert_allclose(
      AGGREGATIONS[name](jnp.asarray(logits)), expected, rtol=1e-5, atol=1e-5
    )
