"""Multi-head latent attention: what the cache holds, rosters on it, and meshes.

Its results are those of transformers (test_parity) and of the definition (test_roster).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from roe_jax import attention, costs, decode, latent_attention, presets, scoring, sharding, training
from roe_jax import cache as kv_cache
from roe_jax import params as params_lib
from roe_jax.layer_inputs import CacheAccess, TokenBatch
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


def test_expanded_keys_give_the_same_as_absorbed_products(params, monkeypatch):
  """In prefill by blocks of 5 positions, also of a window, for members, and in gradients."""
  config = CONFIG.replace(sliding_window=6, sliding_layers=(1,))
  monkeypatch.setattr(attention, "block_size", lambda *_: 5)
  random = np.random.RandomState(0)
  draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
  positions = np.asarray([[17], [4]]) + np.arange(13)
  cache = kv_cache.empty(config, 2, 33)
  sliding = cache.sliding.replace(keys=draw(*cache.sliding.keys.shape))
  # Each entry holds the last position before the new ones that belongs there.
  held = positions[:, :1] - 1 - (positions[:, :1] - 1 - np.arange(6)) % 6
  sliding = sliding.replace(positions=jnp.asarray(held)[None, :, None, :, None])
  cache = cache.replace(keys=draw(*cache.keys.shape), sliding=sliding)

  def attend(weights, query, key, cached=None, write=False, is_sliding=False):
    new, location = (query, key, None), kv_cache.LayerLocation(is_sliding, 0)
    access, tokens = CacheAccess(cached, write), TokenBatch(jnp.asarray(positions))
    return attention.attend_in_layer(config, weights, 1, new, tokens, access, location)[0]

  def results(expanded):
    monkeypatch.setattr(latent_attention, "is_expanded", lambda *_: expanded)
    one = weights, query[0], key[0]
    prefill = [attend(*one, cache, True, is_sliding) for is_sliding in (False, True)]
    members = jax.vmap(lambda q, k: attend(weights, q, k, cache))(query, key)
    loss = lambda *a: jnp.sum(target * attend(*a))
    return prefill, members, jax.grad(loss, argnums=(0, 1, 2))(*one)

  weights, target = params.layers.attention, draw(2, 13, config.num_heads, config.v_head_dim)
  query, key = (
    draw(3, 2, 13, config.num_heads, config.head_dim),
    draw(3, 2, 13, 1, config.cached_head_dim),
  )
  expected, found = (jax.tree.leaves(jax.jit(results, static_argnums=0)(e)) for e in (False, True))
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5 * max(1.0, float(jnp.abs(other).max())))
  assert any(bool((one != other).any()) for one, other in zip(found, expected))


def multiply_adds(jaxpr):
  """Of all matrix products, also of inner functions."""
  total = 0
  for eqn in jaxpr.eqns:
    inner = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns"))
    total += sum(multiply_adds(j) for j in inner if hasattr(j, "eqns"))
    if eqn.primitive.name == "dot_general":
      contracted = eqn.params["dimension_numbers"][0][0]
      total += eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
  return total


@pytest.mark.parametrize("queries, members", [(156, 1), (160, 4), (256, 4)])
def test_the_way_with_fewer_flops_is_chosen_and_counted(queries, members, monkeypatch):
  """Of matrix products with 64 cached positions, by a head of DeepSeek-V2."""
  config = presets.PRESETS["deepseek-v2-lite"].replace(num_heads=1, dtype="float32")
  weights = params_lib.abstract(config).layers.attention
  cached, size = kv_cache.empty(config.replace(num_layers=2), 1, 64), queries // members
  tokens = TokenBatch(jnp.full((1, size), 63))

  def count(expanded):
    def run(weights, query, key):
      given = (query, key, None), tokens, CacheAccess(cached), kv_cache.LayerLocation(False, 0)
      return attention.attend_in_layer(config, weights, 0, *given, members)[0]

    shapes = ((members, 1, size, 1, width) for width in (192, 576))
    arrays = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    with monkeypatch.context() as patch:
      patch.setattr(latent_attention, "is_expanded", lambda *_: expanded)
      jaxpr = jax.make_jaxpr(jax.vmap(run, in_axes=(None, 0, 0)))(weights, *arrays)
    # Without what each query takes once, in either way, and its score of its own key.
    own = queries * (512 * (128 + 128) + (192 if expanded else 576))
    return multiply_adds(jaxpr.jaxpr) - own

  chosen = latent_attention.is_expanded(config, queries)
  assert chosen == (queries > 157)
  found, other = count(chosen), count(not chosen)
  assert found < other
  per_pair = costs.flops.attention_flops(config, queries) / 2
  assert found == pytest.approx(per_pair * queries * 64, rel=1e-3)


@pytest.mark.slow
def test_generation_of_a_quantized_model_is_the_same_on_a_mesh():
  config = CONFIG.replace(d_dense=256, d_shared_expert=256)  # groups for both devices
  quantized, config = params_lib.quantize(tiny.params(config), config, "int4", "int8")
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
