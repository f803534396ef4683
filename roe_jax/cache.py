"""The key/value cache of one sequence (or of one roster member) per row."""

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from roe_jax.config import ModelConfig
from roe_jax.numerics import storage_dtype, to_storage_dtype

# What a slot without a position holds: later than any position.
NO_POSITION = np.iinfo(np.int32).max


class SlidingCache(struct.PyTreeNode):
  """Keys (rotated) and values of the last positions; position p lies in slot p mod S.

  Which position a slot holds is said beside it, so that what has been
  overwritten, or was never written, is not read.

  Attributes:
    keys, values: `[L, B, K, S, C]` of the sliding layers, as those of `KVCache`.
    positions: `[L, B, 1, S, 1]` int32; `NO_POSITION` in an empty slot.
  """

  keys: jax.Array
  values: jax.Array
  positions: jax.Array

  @property
  def capacity(self) -> int:
    return self.keys.shape[-2]


class KVCache(struct.PyTreeNode):
  """Keys (rotated) and values; slot s holds position s.

  Slots at or beyond a row's length hold rubbish that no row ever reads, since
  a row at position t reads slots below t only.

  Attributes:
    keys, values: `[L, B, K, S, C]`, in the storage dtype of the model's: what
      attention contracts lies in the last two axes, so that no step transposes
      the cache. Of the layers that see all positions.
    sliding: of the sliding layers; None where the model has none.
  """

  keys: jax.Array
  values: jax.Array
  sliding: SlidingCache | None = None

  @property
  def capacity(self) -> int:
    return self.keys.shape[-2]


class LayerLocation(struct.PyTreeNode):
  """Where the keys and values of a layer lie in a cache.

  Attributes:
    is_sliding: whether it is a sliding layer; bool `[]` where layers of both kinds
      take turns in one program.
    index: among the cache's layers of this kind, `[]` int32.
  """

  is_sliding: jax.Array | bool
  index: jax.Array | int


def layer_location(
  config: ModelConfig, layer: jax.Array | int, layer_range: tuple[int, int], offset: int = 0
) -> LayerLocation:
  """The place of a layer (may be traced) out of a range `(first, end)`.

  Args:
    config: the model's architecture.
    layer: its index in the model.
    layer_range: the layers that it is one of.
    offset: the layer that the cache begins with.
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
  """Whether each layer is a sliding one, `[L]` bool."""
  return np.isin(np.arange(config.num_layers), config.sliding_layers)


def empty(
  config: ModelConfig,
  batch_size: int,
  capacity: int,
  layers: tuple[int, int] | None = None,
  whole: bool = False,
) -> KVCache:
  """A cache without any position.

  Args:
    config: the model's architecture.
    batch_size: B.
    capacity: positions that it holds.
    layers: `(first, end)` of the layers it is for; all by default.
    whole: whether sliding layers hold as many positions as the others, and not
      only those that the next one sees.
  """
  is_sliding = _is_sliding(config)[slice(*(layers or (0, config.num_layers)))]
  cache = KVCache(*_zeros(config, int((~is_sliding).sum()), batch_size, capacity))
  if not config.sliding_layers:
    return cache
  kept = capacity if whole else min(capacity, config.sliding_window)
  keys, values = _zeros(config, int(is_sliding.sum()), batch_size, kept)
  positions = jnp.full((len(keys), batch_size, 1, kept, 1), NO_POSITION, jnp.int32)
  return cache.replace(sliding=SlidingCache(keys, values, positions))


def _zeros(config, num_layers, batch_size, capacity):
  """Keys and values `[L, B, K, S, C]`."""
  shape = num_layers, batch_size, config.num_kv_heads, capacity, config.head_dim
  dtype = storage_dtype(config.dtype)
  return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


def write(
  cache: KVCache,
  keys: jax.Array,
  values: jax.Array,
  starts_B: jax.Array,
  layer: jax.Array | None = None,
) -> KVCache:
  """Puts T new keys and values into consecutive slots from `starts_B` on.

  Slots beyond the capacity are dropped, and so are layers that the cache does
  not have. Its window stays as it is.

  Args:
    cache: `[L, B, K, S, C]`.
    keys, values: `[B, T, K, C]` of `layer`; of all layers, `[L, B, T, K, C]`,
      without.
    starts_B: int32.
    layer: which layer's; may be traced.
  """
  slots = starts_B[:, None] + jnp.arange(keys.shape[-3])[None]
  return cache.replace(
    keys=_put(cache.keys, keys, slots, layer), values=_put(cache.values, values, slots, layer)
  )


def write_sliding(
  cache: SlidingCache,
  keys: jax.Array,
  values: jax.Array,
  starts_B: jax.Array,
  layer: jax.Array | None = None,
  lengths_B: jax.Array | None = None,
) -> SlidingCache:
  """Puts T new keys and values in the place of the oldest.

  Of more than there are slots the last are kept. What lies at or beyond a row's
  length is dropped: it would take the place of what that row still sees.

  Args:
    cache: `[L, B, K, S, C]`.
    keys, values: see `write`.
    starts_B: int32, position of the first.
    layer: see `write`.
    lengths_B: int32, or None where all T positions count.
  """
  count = keys.shape[-3]
  positions = starts_B[:, None] + jnp.arange(count)[None]
  ends = starts_B + count
  if lengths_B is not None:
    ends = jnp.minimum(ends, lengths_B)
  kept = (positions < ends[:, None]) & (positions >= ends[:, None] - cache.capacity)
  # Slots beyond the capacity are dropped; each is another one.
  slots = jnp.where(kept, positions % cache.capacity, cache.capacity + positions)
  positions = jnp.broadcast_to(positions[..., None, None], (*keys.shape[:-2], 1, 1))
  return SlidingCache(
    _put(cache.keys, keys, slots, layer),
    _put(cache.values, values, slots, layer),
    _put(cache.positions, positions, slots, layer),
  )


def write_step(
  config: ModelConfig, cache: KVCache, keys: jax.Array, values: jax.Array, positions_B: jax.Array
) -> KVCache:
  """Puts all layers' keys and values `[L, B, 1, K, C]` of one position into a cache."""
  is_sliding = _is_sliding(config)
  if not is_sliding.any():
    return write(cache, keys, values, positions_B)
  cache = write(cache, keys[~is_sliding], values[~is_sliding], positions_B)
  return cache.replace(
    sliding=write_sliding(cache.sliding, keys[is_sliding], values[is_sliding], positions_B)
  )


def _put(held, new, slots_BxT, layer):
  """`new` `[B, T, K, C]` or `[L, B, T, K, C]` in slots of `held`; others are dropped."""
  rows = jnp.arange(len(slots_BxT))[:, None]
  new = to_storage_dtype(new, held)
  if layer is None:
    target = held.at[:, rows, :, slots_BxT]
    new = jnp.moveaxis(new, 0, 2)
  else:
    target = held.at[layer, rows, :, slots_BxT]
  return target.set(new, mode="drop", unique_indices=True)
