"""Rotary embeddings and attention to a cache beside a row's own key and value."""

import math

import jax
import jax.numpy as jnp

from roe_jax import cache as kv_cache
from roe_jax import collectives, numerics
from roe_jax.cache import NO_POSITION, KVCache, LayerLocation, SlidingCache
from roe_jax.config import ModelConfig
from roe_jax.numerics import add, add_bias, einsum, multiply, rms_norm, rounded, to_compute_dtype
from roe_jax.params import AttentionParams


def rotation(config: ModelConfig, positions_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of the rotary embedding, `[B, T, 1, C/2]` in `config.dtype`."""
  angles = (
    positions_BxT[..., None, None].astype(jnp.float32) * frequencies(config)[None, None, None]
  )
  turns = jnp.cos(angles), jnp.sin(angles)
  if config.rope_scaling is not None:
    turns = (config.rope_scaling.attention_factor * turn for turn in turns)
  return tuple(rounded(turn, jnp.dtype(config.dtype)) for turn in turns)


def frequencies(config: ModelConfig) -> jax.Array:
  """Radians per position of each rotated pair, `[C/2]` float32.

  With `rope_scaling`, fast ones stay, slow ones are divided by its factor, and
  those on the ramp in between are a mixture (YaRN, arXiv 2309.00071, section
  3.2; the bounds of the ramp as in transformers).
  """
  exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
  plain = 1.0 / (config.rope_theta**exponents)
  if config.rope_scaling is None:
    return plain
  low, high = yarn_ramp(config)
  slow = jnp.clip((jnp.arange(config.head_dim // 2) - low) / (high - low), 0, 1)
  return plain / config.rope_scaling.factor * slow + plain * (1 - slow)


def yarn_ramp(config: ModelConfig) -> tuple[float, float]:
  """Between which pairs the frequencies go over from plain to divided ones."""
  yarn = config.rope_scaling

  def pair(rotations):
    """Index of the pair that turns so often within the original context."""
    turned = yarn.original_context / (rotations * 2 * math.pi)
    return config.head_dim * math.log(turned) / (2 * math.log(config.rope_theta))

  low, high = pair(yarn.beta_fast), pair(yarn.beta_slow)
  if yarn.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, config.head_dim - 1)
  return low, high if high != low else high + 0.001


def rotate(x_BxTxHxC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the two halves of each head against each other."""
  first, second = jnp.split(x_BxTxHxC, 2, axis=-1)
  return jnp.concatenate(
    [
      add(multiply(first, cos), -multiply(second, sin)),
      add(multiply(second, cos), multiply(first, sin)),
    ],
    axis=-1,
  )


def project(
  config: ModelConfig,
  weights: AttentionParams,
  layer: jax.Array | int,
  x_BxTxD: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Rotated queries `[B, T, H, C]`, rotated keys and values `[B, T, K, C]`."""
  query, key, value = (
    rounded(add_bias(numerics.project(x_BxTxD, w, layer), bias, layer), x_BxTxD.dtype)
    for w, bias in (
      (weights.query, weights.query_bias),
      (weights.key, weights.key_bias),
      (weights.value, weights.value_bias),
    )
  )
  if config.qk_norm:
    split = None if config.qk_norm_per_head else "tensor"
    query = rms_norm(query, weights.query_norm[layer], config.rms_norm_eps, split=split)
    key = rms_norm(key, weights.key_norm[layer], config.rms_norm_eps, split=split)
  if config.clip_qkv is not None:
    query, key, value = (
      jnp.clip(a, -config.clip_qkv, config.clip_qkv) for a in (query, key, value)
    )
  return rotate(query, cos, sin), rotate(key, cos, sin), value


def attend_in_layer(
  config: ModelConfig,
  weights: AttentionParams,
  layer: jax.Array | int,
  query_BxTxHxC: jax.Array,
  key_BxTxKxC: jax.Array,
  value_BxTxKxC: jax.Array,
  positions_BxT: jax.Array,
  cache: KVCache | None,
  location: LayerLocation,
  write: bool,
  lengths_B: jax.Array | None = None,
) -> tuple[jax.Array, KVCache | None]:
  """Attention as the layer's kind has it, and the cache written if asked.

  All slots are written before they are attended to. A window is written
  afterwards, as the rows' own keys take the place of some that they see.

  Args:
    config: the model's architecture.
    weights: attention of all layers, for the sinks.
    layer: may be traced.
    query_BxTxHxC, key_BxTxKxC, value_BxTxKxC: of the rows, rotated.
    positions_BxT: int32.
    cache: see `transformer.run_layers`.
    place: of the layer.
    write: whether to put keys and values into the cache.
    lengths_B: see `cache.write_sliding`.

  Returns:
    `[B, T, H, C]`, dtype of `query`, and the cache.
  """
  sinks = None if weights.sinks is None else to_compute_dtype(weights.sinks[layer])
  is_sliding, index = location.is_sliding, location.index
  rows = query_BxTxHxC, key_BxTxKxC, value_BxTxKxC, positions_BxT
  if cache is None:
    window = (
      None if is_sliding is False else jnp.where(is_sliding, config.sliding_window, NO_POSITION)
    )
    return attend(*rows, sinks_H=sinks, window=window), None
  if write and is_sliding is not True:
    # What a cache of other layers lacks is dropped.
    elsewhere = jnp.where(is_sliding, len(cache.keys), index) if is_sliding is not False else index
    cache = kv_cache.write(cache, key_BxTxKxC, value_BxTxKxC, positions_BxT[:, 0], elsewhere)

  def to_all():
    return attend(*rows, cache, index, sinks)

  def to_window():
    return attend(*rows, cache.sliding, index, sinks, config.sliding_window, attend_to_new=write)

  if isinstance(is_sliding, bool):
    heads = to_window() if is_sliding else to_all()
  else:
    heads = jax.lax.cond(is_sliding, to_window, to_all)
  if write and is_sliding is not False:
    # Always true: XLA copies the window, unless the write depends on what has
    # been computed from it.
    after_reading = (heads[0, 0, 0, 0] <= jnp.inf) | jnp.isnan(heads[0, 0, 0, 0])
    elsewhere = jnp.where(is_sliding & after_reading, index, len(cache.sliding.keys))
    cache = cache.replace(
      sliding=kv_cache.write_sliding(
        cache.sliding, key_BxTxKxC, value_BxTxKxC, positions_BxT[:, 0], elsewhere, lengths_B
      )
    )
  return heads, cache


def attend(
  query_BxTxHxC: jax.Array,
  own_key_BxTxKxC: jax.Array,
  own_value_BxTxKxC: jax.Array,
  positions_BxT: jax.Array,
  cache: KVCache | SlidingCache | None = None,
  layer: jax.Array | int = 0,
  sinks_H: jax.Array | None = None,
  window: jax.Array | int | None = None,
  attend_to_new: bool = False,
) -> jax.Array:
  """Attention of each row to slots below its position, and to itself.

  A row at position t sees the slots s < t and its own key and value: parts of
  one softmax, so that a cache shared by all members of a roster is contracted
  with all their queries at once and never copied to them. The cache is read
  in blocks of slots, up to the last that any row sees, with a running maximum
  and sum: no array has the size of T times S.

  Args:
    query_BxTxHxC: rotated queries.
    own_key_BxTxKxC, own_value_BxTxKxC: of the rows themselves.
    positions_BxT: int32.
    cache: whose slots are seen; without, the rows see each other.
      Differentiable then.
    layer: of the cache.
    sinks_H: scores of each head that take part in the softmax without a value.
    window: how many positions a row sees, its own included; all by default.
    attend_to_new: whether rows see each other beside a cache.

  Returns:
    `[B, T, H, C]`, dtype of `query`.
  """
  dtype = query_BxTxHxC.dtype
  b, t, h, c = query_BxTxHxC.shape
  k = own_key_BxTxKxC.shape[2]
  query = query_BxTxHxC.reshape(b, t, k, h // k, c)
  scale = c**-0.5

  def visible(positions):
    """`[B, T, S]` from positions `[B, 1, S]`."""
    below = positions < positions_BxT[..., None]
    return below if window is None else below & (positions > positions_BxT[..., None] - window)

  def add(carry, keys, values, visible):
    peak, total, mixed = carry
    scores = einsum("btkgc,bksc->bkgts", query, keys) * scale
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    new_peak = jax.lax.stop_gradient(jnp.maximum(peak, scores.max(-1)))
    weights, shrink = jnp.exp(scores - new_peak[..., None]), jnp.exp(peak - new_peak)
    part = einsum("bkgts,bksc->bkgtc", rounded(weights, dtype), values)
    return (new_peak, shrink * total + weights.sum(-1), shrink[..., None] * mixed + part)

  def add_block(j, carry):
    # The last block may overlap the one before: its first slots are not counted again.
    start = jnp.minimum(j * block, cache.capacity - block)
    keys, values = (_block(a, layer, start, block) for a in (cache.keys, cache.values))
    slots = start + jnp.arange(block)[None, None]
    held = (
      slots if isinstance(cache, KVCache) else _block(cache.positions, layer, start, block)[..., 0]
    )
    return add(carry, keys, values, visible(held) & (slots >= j * block))

  # A row's own score is finite, so that one that sees no slot is no special case.
  own = einsum("btkgc,btkc->bkgt", query, own_key_BxTxKxC) * scale
  own_value = own_value_BxTxKxC.astype(jnp.float32).swapaxes(1, 2)[:, :, None]
  peak = jax.lax.stop_gradient(own)
  if sinks_H is not None:
    sinks = jnp.broadcast_to(sinks_H.astype(jnp.float32).reshape(1, k, h // k, 1), own.shape)
    peak = jnp.maximum(peak, jax.lax.stop_gradient(sinks))
  own_weight = jnp.exp(own - peak)  # without sinks one, but not to a gradient
  total = own_weight if sinks_H is None else own_weight + jnp.exp(sinks - peak)
  carry = (peak, total, own_weight[..., None] * own_value)
  if cache is not None:
    block = min(cache.capacity, block_slots())
    if block == cache.capacity:
      carry = add_block(0, carry)
    else:
      carry = jax.lax.fori_loop(*_blocks(cache, positions_BxT, window, block), add_block, carry)
  if cache is None or (attend_to_new and t > 1):
    carry = add(
      carry,
      own_key_BxTxKxC.swapaxes(1, 2),
      own_value_BxTxKxC.swapaxes(1, 2),
      visible(positions_BxT[:, None]),
    )
  _, total, mixed = carry
  heads = rounded(mixed / total[..., None], dtype)
  return heads.transpose(0, 3, 1, 2, 4).reshape(b, t, h, c)


def _block(array, layer, start, block):
  """Some slots `[B, K, block, C]` of a layer of a cache's array."""
  _, b, k, _, c = array.shape
  return jax.lax.dynamic_slice(array, (layer, 0, 0, start, 0), (1, b, k, block, c))[0]


def _blocks(cache, positions_BxT, window, block):
  """The first block of slots that any row sees, and the one after the last."""
  end = jnp.max(positions_BxT)
  if isinstance(cache, KVCache):
    return 0, -(-end // block)
  # As long as no slot has been used again, slot s holds position s.
  oldest = jnp.maximum(0, jnp.min(positions_BxT) - window + 1)
  first = jnp.where(end <= cache.capacity, oldest // block, 0)
  return first, -(-jnp.minimum(end, cache.capacity) // block)


def block_slots(platform: str | None = None) -> int:
  """How many slots of a cache are read together on a platform (default: the backend)."""
  return 256 if (platform or jax.default_backend()) == "cpu" else 2048


def output(weights: AttentionParams, layer: jax.Array | int, heads_BxTxHxC: jax.Array) -> jax.Array:
  """The attention block's contribution to the residual stream, `[B, T, D]`."""
  projected = collectives.psum(
    numerics.project_back(heads_BxTxHxC, weights.output, layer), "tensor"
  )
  return rounded(add_bias(projected, weights.output_bias, layer), heads_BxTxHxC.dtype)
