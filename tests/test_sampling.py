"""The next token's distribution against exact probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from roe_jax import noise, sampling
from roe_jax.sampling import Sampler

PROBABILITIES = np.array([0.05, 0.3, 0.02, 0.22, 0.08, 0.18, 0.1, 0.05])
COUNT = 40_000

choose = jax.jit(sampling.choose)


def draws(sampler, seed=0, count=COUNT):
  """One token for each of `count` addresses."""
  log_probs = jnp.log(jnp.tile(jnp.asarray(PROBABILITIES, jnp.float32), (count, 1)))
  requests = jnp.arange(count, dtype=jnp.uint32) // 10
  return np.asarray(choose(sampler, jnp.uint32(seed), log_probs, requests, jnp.arange(count) % 10))


def exact(temperature, top_k, top_p):
  """Temperature, then top-k, then top-p, as sets of tokens."""
  p = PROBABILITIES ** (1 / temperature)
  order = np.argsort(-p, kind="stable")[: top_k or None]
  kept = np.zeros_like(p)
  total = p[order].sum()
  for token in order:
    if kept.sum() / total >= top_p:
      break
    kept[token] = p[token]
  return kept / kept.sum()


def p_value(tokens, probabilities):
  if np.any(probabilities[tokens] == 0):
    return 0.0
  use = probabilities > 0
  observed = np.bincount(tokens, minlength=8)[use]
  return scipy.stats.chisquare(observed, probabilities[use] * len(tokens)).pvalue


@pytest.mark.parametrize(
  "temperature, top_k, top_p, kept",
  [
    (1.0, 0, 1.0, 8),
    (0.6, 0, 1.0, 8),
    (2.0, 0, 1.0, 8),
    (1.0, 3, 1.0, 3),
    (1.0, 0, 0.75, 4),
    (1.5, 5, 0.75, 4),
    (1.0, 100, 0.35, 2),
    (0.7, 0, 0.01, 1),
  ],
)
def test_tokens_follow_the_exact_distribution(temperature, top_k, top_p, kept):
  tokens = draws(Sampler.create(temperature, top_k, top_p), seed=3)
  expected = exact(temperature, top_k, top_p)
  assert np.sum(expected > 0) == len(np.unique(tokens)) == kept
  if kept > 1:
    assert p_value(tokens, expected) > 0.01
    # The same statistic tells a temperature 20 % higher.
    assert p_value(tokens, exact(1.2 * temperature, top_k, top_p)) < 1e-3


def by_sorting(sampler, seed, log_probs, requests, positions):
  """Ranks the whole vocabulary."""
  key = noise.stream_key(seed, noise.SAMPLING)
  keys = noise.position_keys(key, requests, positions[:, None])[:, 0]
  order = jnp.argsort(-log_probs, axis=-1, stable=True)
  ranked = jnp.take_along_axis(log_probs, order, axis=-1) / sampler.temperature
  keep = (sampler.top_k == 0) | (jnp.arange(ranked.shape[-1])[None] < sampler.top_k)
  probs = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
  keep &= jnp.cumsum(probs, axis=-1) - probs < sampler.top_p
  drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(keep, ranked, -jnp.inf))
  return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0]


@pytest.fixture(scope="module")
def sorting():
  return jax.jit(by_sorting)


@pytest.mark.parametrize("spread", [0.1, 2.0, 6.0])  # flat: all tokens must be ranked
@pytest.mark.parametrize("settings", [(1.0,), (1.0, 40), (1.0, 0, 0.9), (0.7, 400, 0.95)])
def test_most_tokens_need_not_be_ranked(sorting, settings, spread):
  logits = spread * np.random.RandomState(0).standard_normal((16, 8 * sampling.RANKED))
  logits[:, ::3] = logits[:, :1]  # ties
  arguments = (
    jnp.uint32(1),
    jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)),
    jnp.arange(16, dtype=jnp.uint32),
    jnp.arange(16),
  )
  sampler = Sampler.create(*settings)
  np.testing.assert_array_equal(choose(sampler, *arguments), sorting(sampler, *arguments))


def test_temperature_zero_is_the_most_probable_token():
  for sampler in (Sampler.greedy(), Sampler.create(), Sampler.create(0.0, 3, 0.5)):
    assert sampler.is_greedy and sampler.settings() == {"temperature": 0.0}
    np.testing.assert_array_equal(draws(sampler, count=10), 1)


def test_a_draw_is_a_function_of_its_address():
  sampler, seed = Sampler.create(1.0), jnp.uint32(5)
  random = np.random.RandomState(0)
  log_probs = jax.nn.log_softmax(jnp.asarray(random.standard_normal((50, 8)), jnp.float32))
  requests = jnp.asarray(random.randint(0, 2**31, 50), jnp.uint32)
  positions = jnp.asarray(random.randint(0, 100, 50))
  tokens = choose(sampler, seed, log_probs, requests, positions)
  order = jnp.asarray(random.permutation(50)[:20])
  np.testing.assert_array_equal(
    choose(sampler, seed, log_probs[order], requests[order], positions[order]), tokens[order]
  )
  for other in (
    choose(sampler, seed + 1, log_probs, requests, positions),
    choose(sampler, seed, log_probs, requests + 1, positions),
    choose(sampler, seed, log_probs, requests, positions + 1),
  ):
    assert np.mean(np.asarray(other) != np.asarray(tokens)) > 0.5


def test_changing_a_samplers_numbers_compiles_nothing():
  draws(Sampler.create(1.0))
  size = choose._cache_size()
  draws(Sampler.create(0.3, 4, 0.5), seed=8)
  assert choose._cache_size() == size


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(temperature=-1.0), "temperature"),
    (dict(temperature=float("nan")), "temperature"),
    (dict(temperature=1.0, top_k=-1), "top_k"),
    (dict(temperature=1.0, top_p=0.0), "top_p"),
    (dict(temperature=1.0, top_p=1.5), "top_p"),
  ],
)
def test_wrong_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    Sampler.create(**settings)


def test_settings_are_plain_values():
  assert Sampler.create(0.7, 4, 0.9).settings() == dict(temperature=0.7, top_k=4, top_p=0.9)
