"""Rotary embeddings and two-part attention against direct formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from roe_jax import attention, numerics, transformer
from roe_jax import cache as kv_cache
from roe_jax.cache import KVCache, SlidingCache
from roe_jax.layer_inputs import LayerOptions, TokenBatch
from roe_jax.rope import Yarn

B, T, S, H, K, C = 2, 5, 9, 4, 2, 8
STARTS = np.array([0, 3])


def inputs(seed=0):
  random = np.random.RandomState(seed)
  shapes = dict(
    query=(B, T, H, C),
    own_key=(B, T, K, C),
    own_value=(B, T, K, C),
    keys=(B, K, S, C),
    values=(B, K, S, C),
  )
  arrays = {
    name: jnp.asarray(2 * random.standard_normal(shape), jnp.float32)
    for name, shape in shapes.items()
  }
  return arrays | {"positions": jnp.asarray(STARTS[:, None] + np.arange(T))}


def attend(a, layer=1):
  """With the slots as the second of three layers of a cache."""
  cache = KVCache(*(jnp.stack([a[n] + 1e3, a[n], a[n] - 1e3]) for n in ("keys", "values")))
  return jax.jit(lambda *args: attention.attend(*args))(
    a["query"], a["own_key"], a["own_value"], a["positions"], cache, jnp.int32(layer)
  )


@pytest.fixture(params=[S, 4, 1])
def block(request, monkeypatch):
  """All slots at once; blocks of which the last overlaps; one at a time."""
  monkeypatch.setattr(attention, "block_size", lambda: request.param)
  return request.param


def by_loop(query, own_key, own_value, keys, values, positions):
  """One softmax over the visible slots and the row itself, in float64."""
  query, own_key, own_value, keys, values = (
    np.asarray(a, np.float64) for a in (query, own_key, own_value, keys, values)
  )
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
    np.testing.assert_array_equal(
      np.asarray(attend(a | huge))[visible], np.asarray(expected)[visible]
    )


def test_blocks_that_no_row_sees_are_not_read(monkeypatch):
  monkeypatch.setattr(attention, "block_size", lambda: 1)
  a = inputs()
  expected = attend(a)
  for n in ("keys", "values"):
    a[n] = a[n].at[:, :, int(a["positions"].max()) :].set(jnp.nan)
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

  ours = results(lambda **a: attention.attend(a["query"], a["own_key"], a["own_value"], positions))
  for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(results(direct))):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def by_definition(query, keys, values, positions, sinks, window):
  """Float64 attention of rows to `keys[b, k, p]` of all positions p that they see."""
  query, keys, values, sinks = (np.asarray(a, np.float64) for a in (query, keys, values, sinks))
  out = np.zeros(query.shape)
  for b, t, h in np.ndindex(*query.shape[:3]):
    k, position = h // (H // K), int(positions[b, t])
    seen = slice(max(0, position - window + 1), position + 1)
    scores = np.append(keys[b, k, seen] @ query[b, t, h] / np.sqrt(C), sinks[h])
    weights = np.exp(scores - scores.max())
    out[b, t, h] = weights[:-1] @ values[b, k, seen] / weights.sum()
  return out


SINKS = np.array([0.5, -3.0, 4.0, 0.0])
TEXT = 23


def text(seed=0):
  """Queries `[B, TEXT, H, C]`, keys and values `[B, K, TEXT, C]` of whole texts."""
  random = np.random.RandomState(seed)
  return [
    jnp.asarray(random.standard_normal(shape), jnp.float32)
    for shape in ((B, TEXT, H, C), (B, K, TEXT, C), (B, K, TEXT, C))
  ]


@functools.partial(jax.jit, static_argnames=("window", "block", "attend_to_new"))
def jitted_attend(query, key, value, positions, cache, sinks, window, block, attend_to_new=False):
  del block  # it is what the program is compiled for
  options = {"attend_to_new": True} if attend_to_new else {}
  return attention.attend(query, key, value, positions, cache, 1, sinks, window, **options)


def attend_in_window(cache, query, keys, values, first, count, window, sinks=SINKS, **options):
  """Rows of the texts from positions `first` `[B]` on."""
  positions = np.asarray(first)[:, None] + np.arange(count)
  rows = lambda a: np.stack([x[p] for x, p in zip(np.asarray(a), positions)])
  own = query, keys.swapaxes(1, 2), values.swapaxes(1, 2)
  sinks_H, block = jnp.asarray(sinks, jnp.float32), attention.block_size()
  found = jitted_attend(*map(rows, own), positions, cache, sinks_H, window, block, **options)
  np.testing.assert_allclose(
    found, by_definition(rows(query), keys, values, positions, sinks, window), rtol=1e-4, atol=1e-5
  )


def filled_window(capacity, keys, values, lengths):
  """The second of three layers holds the last positions below `lengths`."""
  empty = SlidingCache(
    *(
      jnp.full((3, B, n, capacity, c), v)
      for n, c, v in ((K, C, 1e30), (K, C, 1e30), (1, 1, kv_cache.NO_POSITION))
    )
  )
  return kv_cache.write_sliding(
    empty,
    keys.swapaxes(1, 2),
    values.swapaxes(1, 2),
    jnp.zeros(B, jnp.int32),
    1,
    jnp.asarray(lengths),
  )


@pytest.mark.parametrize("window, capacity", [(4, 6), (9, 9), (99, TEXT)])
@pytest.mark.slow
def test_a_row_sees_the_last_positions_of_a_window_and_a_sink(block, window, capacity):
  query, keys, values = text()
  for lengths in ([0, 3], [17, 8], [22, 22]):
    cache = filled_window(capacity, keys, values, lengths)
    attend_in_window(cache, query, keys, values, lengths, 1, window)
    attend_in_window(
      cache, query, keys, values, lengths, TEXT - max(lengths), window, attend_to_new=True
    )


def test_rows_of_a_filled_text_are_run_beside_each_other(block):
  """All positions are held: later ones are there already, and are not seen."""
  query, keys, values = text()
  cache = filled_window(TEXT, keys, values, [TEXT, TEXT])
  for first, count in (([0, 0], TEXT), ([3, 15], 8), ([22, 0], 1)):
    attend_in_window(cache, query, keys, values, first, count, 4)


def test_blocks_of_a_filled_text_that_no_row_reaches_are_not_read(monkeypatch):
  monkeypatch.setattr(attention, "block_size", lambda: 2)
  query, keys, values = text()
  cache = filled_window(TEXT, keys, values, [TEXT, TEXT])
  poisoned = cache.replace(
    values=cache.values.at[:, :, :, :8].set(jnp.nan).at[:, :, :, 18:].set(jnp.nan)
  )
  attend_in_window(poisoned, query, keys, values, [12, 13], 4, 5)


@pytest.mark.parametrize("window", [None, 1, 4, 99])
def test_rows_without_a_cache_see_each_other_and_a_sink(window):
  attend_in_window(None, *text(), [0, 0], TEXT, TEXT if window is None else window)


@pytest.mark.parametrize("size", [-1e4, 1e4])
def test_a_sink_far_from_the_scores_does_not_overflow(block, size):
  a = inputs()
  cache = KVCache(a["keys"][None], a["values"][None])
  found = attention.attend(
    a["query"], a["own_key"], a["own_value"], a["positions"], cache, sinks_H=jnp.full(H, size)
  )
  expected = np.zeros(found.shape) if size > 0 else by_loop(**a)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_with_sinks_and_a_window_are_those_of_the_formula():
  query, keys, values = text()
  positions = jnp.broadcast_to(jnp.arange(TEXT), (B, TEXT))
  target = jnp.asarray(np.random.RandomState(1).standard_normal(query.shape), jnp.float32)
  distance = np.arange(TEXT)[:, None] - np.arange(TEXT)
  seen = jnp.asarray((distance >= 0) & (distance < 4))[None, None]

  def direct(query, keys, values, sinks):
    keys, values = (jnp.repeat(x, H // K, 1) for x in (keys, values))
    scores = jnp.where(seen, jnp.einsum("bthc,bhsc->bhts", query, keys) / np.sqrt(C), -1e30)
    column = jnp.broadcast_to(sinks[None, :, None, None], (B, H, TEXT, 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, column], -1))[..., :-1]
    return jnp.einsum("bhts,bhsc->bthc", weights, values)

  def ours(query, keys, values, sinks):
    return attention.attend(
      query, keys.swapaxes(1, 2), values.swapaxes(1, 2), positions, sinks_H=sinks, window=4
    )

  arguments = query, keys, values, jnp.asarray(SINKS, jnp.float32)
  one, other = (
    jax.jit(jax.grad(lambda *a: jnp.sum(target * f(*a)), argnums=(0, 1, 2, 3)))(*arguments)
    for f in (ours, direct)
  )
  for found, expected in zip(one, other):
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_biases_are_added_before_the_one_rounding(dtype):
  config = tiny.config("mixtral", dtype=dtype, qkv_bias=True, output_bias=True)
  weights = tiny.params(config).layers.attention
  random = np.random.RandomState(1)
  x = jnp.asarray(random.standard_normal((2, 3, 32)), dtype)
  heads = jnp.asarray(random.standard_normal((2, 3, 4, 8)), dtype)
  still = jnp.ones((2, 3, 1, 4), dtype), jnp.zeros((2, 3, 1, 4), dtype)
  held = jax.tree.map(
    lambda w: numerics.to_storage_dtype(w, jnp.zeros(0, numerics.storage_dtype(dtype))), weights
  )
  found = (*attention.project(config, held, 1, x, *still), attention.output(held, 1, heads))
  w = jax.tree.map(lambda w: np.asarray(w[1], np.float64), weights)
  x, heads = (np.asarray(a, np.float64) for a in (x, heads))
  expected = (
    np.einsum("btd,hcd->bthc", x, w.query) + w.query_bias,
    np.einsum("btd,kcd->btkc", x, w.key) + w.key_bias,
    np.einsum("btd,kcd->btkc", x, w.value) + w.value_bias,
    np.einsum("bthc,hcd->btd", heads, w.output) + w.output_bias,
  )
  for one, other in zip(found, expected):
    assert one.dtype == jnp.dtype(dtype)
    unit = 2.0**-8 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=1.01 * unit, atol=1e-4)


def test_bfloat16_attention_runs_and_is_close():
  a = inputs()
  rounded = {n: x if n == "positions" else x.astype(jnp.bfloat16) for n, x in a.items()}
  held = {n: jax.lax.bitcast_convert_type(rounded[n], jnp.uint16) for n in ("keys", "values")}
  cache = KVCache(*(x[None] for x in held.values()))
  actual = attention.attend(
    rounded["query"], rounded["own_key"], rounded["own_value"], a["positions"], cache
  )
  assert actual.dtype == jnp.bfloat16
  # Weights (summing to one) and output are rounded, by half a unit each.
  expected = by_loop(**{n: np.asarray(x, np.float64) for n, x in rounded.items()})
  largest = max(np.abs(np.asarray(rounded[n], np.float64)).max() for n in ("values", "own_value"))
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
  turned = (x[..., : C // 2] + 1j * x[..., C // 2 :]) * turn
  np.testing.assert_allclose(
    actual, np.concatenate([turned.real, turned.imag], -1), rtol=1e-5, atol=1e-5
  )


def yarn(**changes):
  """The rotary embedding of GPT-OSS."""
  settings = dict(
    factor=32.0,
    original_context=4096,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=False,
    attention_factor=0.1 * np.log(32) + 1,
  )
  return tiny.config(
    "olmoe", head_dim=64, rope_theta=150000.0, rope_scaling=Yarn(**(settings | changes))
  )


def ramp(**changes):
  config = yarn(**changes)
  return config.rope_scaling.ramp(config.head_dim, config.rope_theta)


def test_yarn_has_the_frequencies_of_gpt_oss():
  np.testing.assert_allclose(ramp(), (8.0928, 17.3980), atol=1e-4)
  assert ramp(truncate=True) == (8, 18)
  found = np.asarray(attention.frequencies(yarn()))
  np.testing.assert_allclose(found[[0, 1, 2, -1]], [1.0, 0.689044, 0.474782, 3.0235e-7], rtol=1e-5)
  # Fast pairs keep their frequency, slow ones are divided, the ramp lies between.
  shares = found * 150000.0 ** (np.arange(32) / 32)
  np.testing.assert_allclose(shares[:9], 1, rtol=1e-5)
  np.testing.assert_allclose(shares[18:], 1 / 32, rtol=1e-5)
  assert (np.diff(shares[8:19]) < 0).all()


def test_the_ramp_of_yarn_stays_within_the_pairs():
  assert ramp(original_context=150)[0] == 0
  assert ramp(original_context=10**30)[1] == 63
  low, high = ramp(beta_slow=32.0)
  assert high - low == pytest.approx(0.001)


def test_yarn_scales_cosines_and_sines():
  config = yarn(attention_factor=1.5)
  positions = jnp.asarray([[0, 3, 40]])
  cos, sin = attention.rotation(config, positions)
  angles = np.asarray(positions)[..., None, None] * np.asarray(attention.frequencies(config))
  np.testing.assert_allclose(cos, 1.5 * np.cos(angles), atol=1e-5)
  np.testing.assert_allclose(sin, 1.5 * np.sin(angles), atol=1e-5)


def test_no_logit_depends_on_a_later_token():
  config = tiny.config("olmoe", num_layers=2)
  params = tiny.params(config)
  tokens = jnp.asarray(tiny.texts([6]))
  mix = jnp.asarray(np.random.RandomState(2).standard_normal(config.vocab_size), jnp.float32)

  def logits(x):
    tokens, options = TokenBatch(jnp.arange(6)[None]), LayerOptions(strategy="dense")
    x, _, _ = transformer.run_layers(params, config, x, tokens, options=options)
    return transformer.unembed(params, config, x)[0] @ mix

  # [t, s]: how the logits at t depend on the embedding at s.
  jacobian = jax.jit(jax.jacrev(logits))(transformer.embed(params, config, tokens))[:, 0]
  influence = np.abs(jacobian).max(-1)
  later = np.triu(np.ones((6, 6), bool), 1)
  np.testing.assert_array_equal(influence[later], 0)
  assert influence[~later].min() > 1e-4
