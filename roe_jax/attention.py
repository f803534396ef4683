"""Rotary embeddings, and attention to a KV cache and the token's own key and value."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from roe_jax import cache as kv_cache
from roe_jax import collectives, latent_attention, numerics
from roe_jax.cache import NO_POSITION, KVCache, LayerLocation, SlidingCache
from roe_jax.config import ModelConfig
from roe_jax.layer_inputs import CacheAccess, TokenBatch
from roe_jax.numerics import add, add_bias, einsum, multiply, rms_norm, rounded, to_compute_dtype
from roe_jax.params import AttentionParams, LatentAttentionParams


def rotation(config: ModelConfig, positions_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns cos and sin of each rotated pair, `[B, T, 1, rotary_dim/2]` in `config.dtype`."""
  positions = positions_BxT[..., None, None].astype(jnp.float32)
  angles = positions * frequencies(config)[None, None, None]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  if config.rope_scaling is not None:
    factor = config.rope_scaling.attention_factor
    cos, sin = factor * cos, factor * sin
  dtype = jnp.dtype(config.dtype)
  return rounded(cos, dtype), rounded(sin, dtype)


def frequencies(config: ModelConfig) -> jax.Array:
  """Returns the radians per position of each rotated pair, `[rotary_dim/2]` float32."""
  width = config.rotary_dim or config.head_dim
  exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / width
  unscaled = 1.0 / (config.rope_theta**exponents)
  if config.rope_scaling is None:
    return unscaled
  return config.rope_scaling.scale(unscaled, config.rope_theta)


def rotate(x_BxTxHxC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Applies the rotary embedding to the two halves of the rotated dimensions of each head."""
  half = cos.shape[-1]
  first, second, others = jnp.split(x_BxTxHxC, (half, 2 * half), axis=-1)
  new_first = add(multiply(first, cos), -multiply(second, sin))
  new_second = add(multiply(second, cos), multiply(first, sin))
  return jnp.concatenate([new_first, new_second, others], axis=-1)


@jax.named_scope("attention")
def project(
  config: ModelConfig,
  weights: AttentionParams | LatentAttentionParams,
  layer: jax.Array | int,
  x_BxTxD: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Returns rotated queries `[B, T, H, C]`, rotated keys and values `[B, T, K, C]`.

  With latent attention, what `latent_attention.project` does: keys are latents, values None.
  """
  if isinstance(weights, LatentAttentionParams):
    turn = functools.partial(rotate, cos=cos, sin=sin)
    return latent_attention.project(config, weights, layer, x_BxTxD, turn)
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


@jax.named_scope("attention")
def attend_in_layer(
  config: ModelConfig,
  weights: AttentionParams | LatentAttentionParams,
  layer: jax.Array | int,
  new: tuple[jax.Array, jax.Array, jax.Array | None],
  tokens: TokenBatch,
  access: CacheAccess,
  location: LayerLocation,
  members: int = 1,
) -> tuple[jax.Array, KVCache | None]:
  """Attends with full or sliding attention, as the layer requires, and writes the cache.

  A cache with full attention is written before it is read. That of a sliding layer is
  written afterwards, since new keys overwrite some that the tokens attend to.

  Args:
    config: the model's architecture.
    weights: attention parameters of all layers.
    layer: may be traced.
    new: queries, keys and values of the tokens, as `project` returns them.
    tokens: their positions.
    access: the cache.
    location: of the layer in the cache.
    members: how many roster members share the cache, in a `vmap` around this.

  Returns:
    What each head mixed of the values, `[B, T, H, C]` in the dtype of the queries, and the cache.
  """
  is_sliding, index = location.is_sliding, location.index
  cache, write = access.cache, access.write
  attend_to = _attention(config, weights, layer, new, tokens, members, cache is not None)
  if cache is None:
    if is_sliding is False:
      return attend_to(), None
    window = jnp.where(is_sliding, config.sliding_window or NO_POSITION, NO_POSITION)
    return attend_to(window=window), None
  written = *new[1:], tokens.positions_BxT[:, 0]
  sliding = cache.sliding
  if write and is_sliding is not True:
    # A layer index out of bounds is dropped: the other kind's cache is not written.
    target = index if is_sliding is False else jnp.where(is_sliding, len(cache.keys), index)
    cache = kv_cache.write(cache, *written, target)

  def attend_to_all():
    return attend_to(cache, index, rows=access.rows)

  def attend_to_window():
    window = config.sliding_window
    return attend_to(sliding, index, window=window, attend_to_new=write, rows=access.rows)

  if isinstance(is_sliding, bool):
    heads = attend_to_window() if is_sliding else attend_to_all()
  else:
    heads = jax.lax.cond(is_sliding, attend_to_window, attend_to_all)
  if write and sliding is not None and is_sliding is not False:
    target = jnp.where(is_sliding, index, len(sliding.keys))
    target = kv_cache.after_reading(heads[0, 0, 0, 0], target)
    sliding = kv_cache.write_sliding(sliding, *written, target, tokens.lengths_B)
    cache = cache.replace(sliding=sliding)
  return heads, cache


def _attention(config, weights, layer, new, tokens, members, cached):
  """Returns `attend` of these tokens, which takes the cache and what follows it."""
  query, *own = new
  run = functools.partial(attend, scale=config.attention_scale)
  if not isinstance(weights, LatentAttentionParams):
    sinks = None if weights.sinks is None else to_compute_dtype(weights.sinks[layer])
    return functools.partial(run, *new, tokens.positions_BxT, sinks_H=sinks)
  of = weights, layer
  if latent_attention.is_expanded(config, members * query.shape[1], cached):
    expand = functools.partial(latent_attention.expand, *of, dtype=query.dtype)
    return functools.partial(run, *new, tokens.positions_BxT, expand=expand)
  run = functools.partial(run, latent_attention.absorb(*of, query), *own, tokens.positions_BxT)
  return lambda *args, **kwargs: latent_attention.of_mixed(*of, run(*args, **kwargs))


def attend(
  query_BxTxHxC: jax.Array,
  own_key_BxTxKxC: jax.Array,
  own_value_BxTxKxC: jax.Array | None,
  positions_BxT: jax.Array,
  cache: KVCache | SlidingCache | None = None,
  layer: jax.Array | int = 0,
  sinks_H: jax.Array | None = None,
  window: jax.Array | int | None = None,
  attend_to_new: bool = False,
  scale: float | None = None,
  rows: jax.Array | None = None,
  expand: Callable[[jax.Array], tuple[jax.Array, jax.Array]] | None = None,
) -> jax.Array:
  """Attends from each token to earlier cached positions and to itself.

  The token at position t attends to cached positions < t and to its own key and value in
  one softmax. So a cache shared by all members of a roster is contracted with all their
  queries at once and never copied. The cache is read in blocks, up to the last one needed,
  with a running maximum and sum: no array has the size T x S.

  Args:
    query_BxTxHxC: rotated queries.
    own_key_BxTxKxC, own_value_BxTxKxC: the tokens' own. Values are None, here and in the cache, if
      they are the keys.
    positions_BxT: int32.
    cache: the cache to attend to. Without one, the tokens attend to each other, and the
      function is differentiable.
    layer: index in the cache.
    sinks_H: one logit per head that takes part in the softmax without a value.
    window: attention window, including the current position; unlimited by default.
    attend_to_new: whether tokens attend to each other in addition to a cache.
    scale: factor on the scores; `C**-0.5` by default.
    rows: see `CacheAccess`.
    expand: computes keys and values `[B, K, S, C]` from what is in place of keys, here and in the
      cache, one block at a time; see `latent_attention.expand`.

  Returns:
    `[B, T, H, C]` in the dtype of `query`, with the width of values.
  """
  if expand is not None:
    own = expand(own_key_BxTxKxC.swapaxes(1, 2))
    own_key_BxTxKxC, own_value_BxTxKxC = (a.swapaxes(1, 2) for a in own)
  dtype = query_BxTxHxC.dtype
  b, t, h, c = query_BxTxHxC.shape
  k = own_key_BxTxKxC.shape[2]
  query = query_BxTxHxC.reshape(b, t, k, h // k, c)
  factor = c**-0.5 if scale is None else scale
  if own_value_BxTxKxC is None:
    own_value_BxTxKxC = own_key_BxTxKxC

  def visible(positions):
    """Returns the mask `[B, T, S]` of positions `[B, 1, S]`."""
    below = positions < positions_BxT[..., None]
    return below if window is None else below & (positions > positions_BxT[..., None] - window)

  def add(carry, keys, values, visible):
    peak, total, mixed = carry
    scores = einsum("btkgc,bksc->bkgts", query, keys) * factor
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    new_peak = jax.lax.stop_gradient(jnp.maximum(peak, scores.max(-1)))
    weights, shrink = jnp.exp(scores - new_peak[..., None]), jnp.exp(peak - new_peak)
    part = einsum("bkgts,bksc->bkgtc", rounded(weights, dtype), values)
    return (new_peak, shrink * total + weights.sum(-1), shrink[..., None] * mixed + part)

  def add_block(j, carry):
    assert cache is not None
    # The last block may overlap the one before; entries counted there are masked.
    start = jnp.minimum(j * block, cache.capacity - block)
    keys = _block(cache.keys, layer, start, block, rows)
    if expand is not None:
      keys, values = expand(keys)
    elif cache.values is None:
      values = keys
    else:
      values = _block(cache.values, layer, start, block, rows)
    indices = start + jnp.arange(block)[None, None]
    if isinstance(cache, KVCache):
      positions = indices
    else:
      positions = _block(cache.positions, layer, start, block, rows)[..., 0]
    return add(carry, keys, values, visible(positions) & (indices >= j * block))

  # A token's own score is finite: attending to no cached position is no special case.
  own = einsum("btkgc,btkc->bkgt", query, own_key_BxTxKxC) * factor
  own_value = own_value_BxTxKxC.astype(jnp.float32).swapaxes(1, 2)[:, :, None]
  peak = jax.lax.stop_gradient(own)
  if sinks_H is not None:
    sinks = jnp.broadcast_to(sinks_H.astype(jnp.float32).reshape(1, k, h // k, 1), own.shape)
    peak = jnp.maximum(peak, jax.lax.stop_gradient(sinks))
  own_weight = jnp.exp(own - peak)  # 1 without sinks, but its gradient matters
  total = own_weight if sinks_H is None else own_weight + jnp.exp(sinks - peak)
  carry = (peak, total, own_weight[..., None] * own_value)
  if cache is not None:
    block = min(cache.capacity, block_size())
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
  return heads.transpose(0, 3, 1, 2, 4).reshape(b, t, h, -1)


def _block(array, layer, start, block, rows=None):
  """Slices a block `[B, K, block, C]` of a layer from a cache's array, of all sequences or some."""
  _, b, k, _, c = array.shape

  def part(row, count):
    return jax.lax.dynamic_slice(array, (layer, row, 0, start, 0), (1, count, k, block, c))[0]

  return part(0, b) if rows is None else jax.vmap(lambda row: part(row, 1)[0])(rows)


def _blocks(cache, positions_BxT, window, block):
  """Returns the first block that any token attends to, and the one after the last."""
  end = jnp.max(positions_BxT)
  if isinstance(cache, KVCache):
    return 0, -(-end // block)
  # Until entries are reused, entry s holds position s.
  oldest = jnp.maximum(0, jnp.min(positions_BxT) - window + 1)
  first = jnp.where(end <= cache.capacity, oldest // block, 0)
  return first, -(-jnp.minimum(end, cache.capacity) // block)


def block_size(platform: str | None = None) -> int:
  """Returns how many cached positions are read together on a platform (default: the backend)."""
  return 256 if (platform or jax.default_backend()) == "cpu" else 2048


@jax.named_scope("attention")
def output(
  weights: AttentionParams | LatentAttentionParams, layer: jax.Array | int, heads_BxTxHxC: jax.Array
) -> jax.Array:
  """Projects the heads back to the residual stream, `[B, T, D]`."""
  projected = collectives.psum(
    numerics.project_back(heads_BxTxHxC, weights.output, layer), "tensor"
  )
  return rounded(add_bias(projected, weights.output_bias, layer), heads_BxTxHxC.dtype)
