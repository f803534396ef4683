"""Multi-head latent attention: what the cache holds, rosters on it, and meshes.

Its results are those of transformers (test_parity) and of the definition (test_roster).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from roe_jax import cache as kv_cache
from roe_jax import decode, scoring, sharding, training
from roe_jax import params as params_lib
from roe_jax.roster import Roster

CONFIG = tiny.config("deepseek_v3", vocab_size=64, d_expert=256)
PROMPTS = tiny.texts([7, 3, 5, 2], vocab_size=64)


@pytest.fixture(scope="module")
def params():
  return tiny.params(CONFIG)


def test_the_cache_holds_one_latent_and_one_rotary_key_per_position():
  cache = kv_cache.empty(CONFIG, 2, 24)
  assert [a.shape for a in jax.tree.leaves(cache)] == [(3, 2, 1, 24, 10 + 4)]
  roster = Roster.create(CONFIG, 5, 0.3)
  assert roster.cache_mode.bytes(CONFIG, roster, 2, 24) == 3 * 2 * 24 * CONFIG.cached_size * 4
  assert CONFIG.cached_size == 14


def test_without_noise_all_members_of_both_caches_are_the_baseline(params):
  tokens = np.asarray(tiny.texts([12] * 2, vocab_size=64))
  run = jax.jit(scoring.log_probs, static_argnums=1)
  baseline = run(params, CONFIG, tokens, Roster.create(CONFIG))
  noisy = run(params, CONFIG, tokens, Roster.create(CONFIG, 4, 0.5))
  assert np.abs(noisy - baseline).max() > 0.1
  for cache in ("clean", "standard"):
    same = run(params, CONFIG, tokens, Roster.create(CONFIG, 4, [0.0] * 3, cache=cache))
    np.testing.assert_allclose(same, baseline, atol=1e-5)


@pytest.mark.slow
def test_generation_is_the_same_on_a_mesh_and_with_quantized_experts(params):
  quantized, config = params_lib.quantize(params, CONFIG, "int8")
  roster = Roster.create(config, 2, 0.3)

  def generate(parameters):
    return decode.generate(
      parameters, config, PROMPTS, max_new_tokens=5, stop_tokens=(), roster=roster
    )

  expected = generate(quantized)
  mesh = sharding.make_mesh(config, data=2, expert=2, tensor=2)
  found = generate(sharding.shard_params(quantized, config, mesh))
  for one, other in zip(found.completions, expected.completions, strict=True):
    assert one.tokens == other.tokens
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


@pytest.mark.slow
def test_gradients_are_the_same_on_a_mesh_and_recomputed(params):
  """With as many tokens as inference would exchange in rounds, which have no gradients."""
  tokens = jnp.asarray(tiny.texts([32] * 32, vocab_size=64))
  batch = training.Batch(tokens, jnp.ones(tokens.shape), jnp.arange(32, dtype=jnp.uint32))
  settings = training.TrainSettings(num_steps=1, strategy="dense")
  mesh = sharding.make_mesh(CONFIG, expert=8)

  def gradients(params, settings):
    return jax.jit(jax.grad(lambda p: training.loss(p, batch, CONFIG, settings)[0]))(params)

  expected = gradients(params, settings)
  found = gradients(
    sharding.shard_params(params, CONFIG, mesh), dataclasses.replace(settings, rematerialize=True)
  )
  largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), found, expected)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(num_kv_heads=2), "needs num_kv_heads 1, v_head_dim and rotary_dim, got 2, 7 and 4"),
    (dict(rotary_dim=10), "needs dimensions without rotation"),
    (dict(qk_norm=True, attention_sinks=True), "has no qk_norm or attention_sinks"),
    (dict(kv_lora_rank=0), "q_lora_rank and v_head_dim and .* are of latent attention"),
  ],
)
def test_what_does_not_fit_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    CONFIG.replace(**changes)
