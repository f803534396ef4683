"""The KV cache: keys and values of one sequence (or one roster member) per batch entry.

With latent attention (`latent_attention`) the values are the keys: the cache holds keys, and None
in place of values.
"""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from roe_jax.config import ModelConfig
from roe_jax.numerics import storage_dtype, to_storage_dtype

# The position of an empty entry: later than any real position.
NO_POSITION = np.iinfo(np.int32).max


class SlidingCache(struct.PyTreeNode):
  """A ring buffer of the last S positions of sliding layers: position p is stored at p mod S.

  It records which position each entry holds, so that overwritten and unwritten
  entries are never read.

  Attributes:
    keys, values: `[L, B, K, S, C]` of the sliding layers, as in `KVCache`.
    positions: `[L, B, 1, S, 1]` int32; `NO_POSITION` in an empty entry.
  """

  keys: jax.Array
  values: jax.Array | None
  positions: jax.Array

  @property
  def capacity(self) -> int:
    return self.keys.shape[-2]


class KVCache(struct.PyTreeNode):
  """Keys (rotated) and values, indexed by position.

  Entries at or beyond a sequence's length hold garbage that is never read, since the
  token at position t reads positions < t only.

  Attributes:
    keys, values: `[L, B, K, S, C]` of the layers with full attention, in the storage
      dtype. The axes that attention contracts are last, so no step transposes the cache.
    sliding: the cache of the sliding layers; None without any.
  """

  keys: jax.Array
  values: jax.Array | None
  sliding: SlidingCache | None = None

  @property
  def capacity(self) -> int:
    return self.keys.shape[-2]


class LayerLocation(struct.PyTreeNode):
  """Where a layer's keys and values are in a cache.

  Attributes:
    is_sliding: whether it is a sliding layer; a traced bool `[]` where one program runs
      layers of both kinds.
    index: index among the cache's layers of this kind, int32 `[]`.
  """

  is_sliding: jax.Array | bool
  index: jax.Array | int


def layer_location(
  config: ModelConfig, layer: jax.Array | int, layer_range: tuple[int, int], offset: int = 0
) -> LayerLocation:
  """Returns where a layer is in a cache.

  Args:
    config: the model's architecture.
    layer: its index in the model; may be traced.
    layer_range: `(first, end)` of the layers that it may be.
    offset: the first layer in the cache.
  """
  is_sliding = _is_sliding(config)
  if not is_sliding.any():
    return LayerLocation(False, layer - offset)
  index = np.where(
    is_sliding,
    is_sliding.cumsum() - 1 - is_sliding[:offset].sum(),
    (~is_sliding).cumsum() - 1 - (~is_sliding[:offset]).sum(),
  )
  kinds = set(is_sliding[slice(*layer_range)].tolist())
  return LayerLocation(
    kinds.pop() if len(kinds) == 1 else jnp.asarray(is_sliding)[layer],
    jnp.asarray(index, jnp.int32)[layer],
  )


def _is_sliding(config):
  """Returns whether each layer is sliding, `[L]` bool."""
  return np.isin(np.arange(config.num_layers), config.sliding_layers)


def empty(
  config: ModelConfig,
  batch_size: int,
  capacity: int,
  layers: tuple[int, int] | None = None,
  rerun: int = 0,
) -> KVCache:
  """Returns an empty cache.

  Args:
    config: the model's architecture.
    batch_size: B.
    capacity: S, the number of positions it can hold.
    layers: `(first, end)` of its layers; all by default.
    rerun: how many positions sliding layers keep beyond the last `config.sliding_window`, so
      that so many of the newest can be run again.
  """
  is_sliding = _is_sliding(config)[slice(*(layers or (0, config.num_layers)))]
  cache = KVCache(*_zeros(config, int((~is_sliding).sum()), batch_size, capacity))
  if config.sliding_window is None:
    return cache
  kept = min(capacity, config.sliding_window + rerun)
  keys, values = _zeros(config, int(is_sliding.sum()), batch_size, kept)
  positions = jnp.full((len(keys), batch_size, 1, kept, 1), NO_POSITION, jnp.int32)
  return cache.replace(sliding=SlidingCache(keys, values, positions))


def _zeros(config, num_layers, batch_size, capacity):
  """Returns keys and values `[L, B, K, S, C]`."""
  shape = num_layers, batch_size, config.num_kv_heads, capacity, config.cached_head_dim
  dtype = storage_dtype(config.dtype)
  values = None if config.kv_lora_rank else jnp.zeros(shape, dtype)
  return jnp.zeros(shape, dtype), values


def write(
  cache: KVCache,
  keys: jax.Array,
  values: jax.Array | None,
  starts_B: jax.Array,
  layer: jax.Array | int | None = None,
) -> KVCache:
  """Writes T new keys and values at consecutive positions from `starts_B` on.

  Positions beyond the capacity are dropped, and so are layers that the cache does
  not have. Its sliding layers stay as they are.

  Args:
    cache: `[L, B, K, S, C]`.
    keys, values: `[B, T, K, C]` of `layer`; without `layer`, `[L, B, T, K, C]` of all.
    starts_B: int32.
    layer: index in the cache; may be traced.
  """
  positions = starts_B[:, None] + jnp.arange(keys.shape[-3])[None]
  return cache.replace(
    keys=_put(cache.keys, keys, positions, layer),
    values=_put(cache.values, values, positions, layer),
  )


def write_sliding(
  cache: SlidingCache,
  keys: jax.Array,
  values: jax.Array | None,
  starts_B: jax.Array,
  layer: jax.Array | int | None = None,
  lengths_B: jax.Array | None = None,
) -> SlidingCache:
  """Overwrites the oldest positions with T new keys and values.

  If T exceeds the capacity, the last positions are kept. Positions at or beyond a
  sequence's length are dropped: they would overwrite ones that it still attends to.

  Args:
    cache: `[L, B, K, S, C]`.
    keys, values: see `write`.
    starts_B: int32, the first position.
    layer: see `write`.
    lengths_B: int32, or None if all T positions count.
  """
  count = keys.shape[-3]
  positions = starts_B[:, None] + jnp.arange(count)[None]
  ends = starts_B + count
  if lengths_B is not None:
    ends = jnp.minimum(ends, lengths_B)
  kept = (positions < ends[:, None]) & (positions >= ends[:, None] - cache.capacity)
  # Indices beyond the capacity are dropped; they are distinct, as `_put` requires.
  indices = jnp.where(kept, positions % cache.capacity, cache.capacity + positions)
  positions = jnp.broadcast_to(positions[..., None, None], (*keys.shape[:-2], 1, 1))
  return SlidingCache(
    _put(cache.keys, keys, indices, layer),
    _put(cache.values, values, indices, layer),
    _put(cache.positions, positions, indices, layer),
  )


def write_step(
  config: ModelConfig,
  cache: KVCache,
  keys: jax.Array,
  values: jax.Array | None,
  positions_B: jax.Array,
) -> KVCache:
  """Writes all layers' keys and values `[L, B, 1, K, C]` of one position to a cache."""
  if cache.sliding is None:
    return write(cache, keys, values, positions_B)
  is_sliding = _is_sliding(config)

  def of(layers):
    return keys[layers], None if values is None else values[layers], positions_B

  sliding = write_sliding(cache.sliding, *of(is_sliding))
  return write(cache, *of(~is_sliding)).replace(sliding=sliding)


def after_reading(read: jax.Array, value: jax.Array) -> jax.Array:
  """Returns `value`, to be written to a cache, as a result of what was computed from it.

  Otherwise XLA copies a cache that is written where it is still read.

  Args:
    read: computed from the cache; broadcasts to `value`.
    value: what is written, or where.
  """
  always = (read <= jnp.inf) | jnp.isnan(read)
  return jnp.where(always, value, jnp.zeros_like(value))


def _put(array, new, indices_BxT, layer) -> Any:
  """Writes `new` `[B, T, K, C]` or `[L, B, T, K, C]` to `array`; drops indices out of bounds.

  There is nothing to write where both are None.
  """
  if array is None:
    return None
  batch = jnp.arange(len(indices_BxT))[:, None]
  new = to_storage_dtype(new, array)
  if layer is None:
    target = array.at[:, batch, :, indices_BxT]
    new = jnp.moveaxis(new, 0, 2)
  else:
    target = array.at[layer, batch, :, indices_BxT]
  return target.set(new, mode="drop", unique_indices=True)
