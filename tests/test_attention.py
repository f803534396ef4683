"""Rotary embeddings and two-part attention against direct formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from roe_jax import attention, transformer
from roe_jax.cache import KVCache

B, T, S, H, K, C = 2, 5, 9, 4, 2, 8
STARTS = np.array([0, 3])


def inputs(seed=0):
  random = np.random.RandomState(seed)
  shapes = dict(query=(B, T, H, C), own_key=(B, T, K, C), own_value=(B, T, K, C),
                keys=(B, K, S, C), values=(B, K, S, C))
  arrays = {name: jnp.asarray(2 * random.standard_normal(shape), jnp.float32)
            for name, shape in shapes.items()}
  return arrays | {"positions": jnp.asarray(STARTS[:, None] + np.arange(T))}


def attend(a, layer=1):
  """With the slots as the second of three layers of a cache."""
  cache = KVCache(*(jnp.stack([a[n] + 1e3, a[n], a[n] - 1e3]) for n in ("keys", "values")))
  return jax.jit(lambda *args: attention.attend(*args))(a["query"], a["own_key"], a["own_value"], a["positions"],
                                   cache, jnp.int32(layer))


@pytest.fixture(params=[S, 4, 1])
def block(request, monkeypatch):
  """All slots at once; blocks of which the last overlaps; one at a time."""
  monkeypatch.setattr(attention, "block_slots", lambda: request.param)
  return request.param


def by_loop(query, own_key, own_value, keys, values, positions):
  """One softmax over the visible slots and the row itself, in float64."""
  query, own_key, own_value, keys, values = (
      np.asarray(a, np.float64) for a in (query, own_key, own_value, keys, values))
  out = np.zeros(query.shape)
  for b, t, h in np.ndindex(B, T, H):
    k, position = h // (H // K), int(positions[b, t])
    seen_keys = np.concatenate([keys[b, k, :position], own_key[b, t, k][None]])
    seen_values = np.concatenate([values[b, k, :position], own_value[b, t, k][None]])
    scores = seen_keys @ query[b, t, h] / np.sqrt(C)
    weights = np.exp(scores - scores.max())
    out[b, t, h] = weights @ seen_values / weights.sum()
  return out


def test_two_parts_are_one_softmax(block):
  a = inputs()
  np.testing.assert_allclose(attend(a), by_loop(**a), rtol=1e-5, atol=1e-5)


def test_large_scores_do_not_overflow(block):
  a = inputs()
  for own, cached in ((1e4, 1.0), (1.0, 1e4)):
    scaled = a | {"own_key": own * a["own_key"], "keys": cached * a["keys"]}
    np.testing.assert_allclose(attend(scaled), by_loop(**scaled), rtol=1e-4, atol=1e-4)


def test_slots_from_the_position_on_are_never_read(block):
  a = inputs()
  expected = attend(a)
  for first in range(1, S):
    # The rows at positions up to `first` may read the slots below it only.
    huge = {n: a[n].at[:, :, first:].set(1e30) for n in ("keys", "values")}
    visible = np.asarray(a["positions"]) <= first
    np.testing.assert_array_equal(np.asarray(attend(a | huge))[visible],
                                  np.asarray(expected)[visible])


def test_blocks_that_no_row_sees_are_not_read(monkeypatch):
  monkeypatch.setattr(attention, "block_slots", lambda: 1)
  a = inputs()
  expected = attend(a)
  for n in ("keys", "values"):
    a[n] = a[n].at[:, :, int(a["positions"].max()):].set(jnp.nan)
  np.testing.assert_array_equal(attend(a), expected)


def test_gradients_without_a_cache_are_those_of_the_formula():
  a = {n: x for n, x in inputs().items() if n in ("query", "own_key", "own_value")}
  positions = jnp.broadcast_to(jnp.arange(T), (B, T))
  target = jnp.asarray(np.random.RandomState(1).standard_normal((B, T, H, C)), jnp.float32)

  def direct(query, own_key, own_value):
    keys, values = (jnp.repeat(x, H // K, 2) for x in (own_key, own_value))
    scores = jnp.einsum("bthc,bshc->bhts", query, keys) / np.sqrt(C)
    weights = jax.nn.softmax(jnp.where(jnp.tri(T, dtype=bool)[None, None], scores, -1e30))
    return jnp.einsum("bhts,bshc->bthc", weights, values)

  def results(function):
    value = lambda a: jnp.sum(target * function(**a))
    return jax.jit(jax.value_and_grad(value))(a)

  ours = results(lambda **a: attention.attend(
      a["query"], a["own_key"], a["own_value"], positions))
  for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(results(direct))):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_bfloat16_attention_runs_and_is_close():
  a = inputs()
  rounded = {n: x if n == "positions" else x.astype(jnp.bfloat16) for n, x in a.items()}
  held = {n: jax.lax.bitcast_convert_type(rounded[n], jnp.uint16) for n in ("keys", "values")}
  cache = KVCache(*(x[None] for x in held.values()))
  actual = attention.attend(rounded["query"], rounded["own_key"], rounded["own_value"],
                            a["positions"], cache)
  assert actual.dtype == jnp.bfloat16
  # Weights (summing to one) and output are rounded, by half a unit each.
  expected = by_loop(**{n: np.asarray(x, np.float64) for n, x in rounded.items()})
  largest = max(np.abs(np.asarray(rounded[n], np.float64)).max()
                for n in ("values", "own_value"))
  assert np.abs(np.asarray(actual, np.float64) - expected).max() < 2.0**-8 * largest


def test_rotation_turns_pairs_of_the_two_halves():
  config = tiny.config("olmoe", rope_theta=500.0)
  positions = jnp.asarray([[0, 1, 2], [7, 40, 47]])
  x = np.random.RandomState(0).standard_normal((2, 3, H, C)).astype(np.float32)
  cos, sin = attention.rotation(config, positions)
  actual = np.asarray(attention.rotate(jnp.asarray(x), cos, sin))
  # The same as multiplication of complex numbers.
  frequencies = 500.0 ** (-np.arange(0, C, 2) / C)
  turn = np.exp(1j * np.asarray(positions)[..., None, None] * frequencies)
  turned = (x[..., :C // 2] + 1j * x[..., C // 2:]) * turn
  np.testing.assert_allclose(actual, np.concatenate([turned.real, turned.imag], -1),
                             rtol=1e-5, atol=1e-5)


def test_no_logit_depends_on_a_later_token():
  config = tiny.config("olmoe", num_layers=2)
  params = tiny.params(config)
  tokens = jnp.asarray(tiny.texts([6]))
  mix = jnp.asarray(np.random.RandomState(2).standard_normal(config.vocab_size), jnp.float32)

  def logits(x):
    x, _, _ = transformer.run_layers(
        params, config, x, jnp.arange(6)[None], strategy="dense")
    return transformer.unembed(params, config, x)[0] @ mix

  # [t, s]: how the logits at t depend on the embedding at s.
  jacobian = jax.jit(jax.jacrev(logits))(transformer.embed(params, tokens))[:, 0]
  influence = np.abs(jacobian).max(-1)
  later = np.triu(np.ones((6, 6), bool), 1)
  np.testing.assert_array_equal(influence[later], 0)
  assert influence[~later].min() > 1e-4
