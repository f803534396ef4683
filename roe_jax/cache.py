"""The key/value cache of one sequence (or of one roster member) per row."""

from flax import struct
import jax
import jax.numpy as jnp

from roe_jax.config import ModelConfig
from roe_jax.numerics import storage_dtype, to_storage


@struct.dataclass
class KVCache:
  """Keys (rotated) and values; slot s holds position s.

  Slots at or beyond a row's length hold rubbish that no row ever reads, since
  a row at position t reads slots below t only.

  Attributes:
    keys, values: `[L, B, K, S, C]`, in the storage dtype of the model's: what
      attention contracts lies in the last two axes, so that no step transposes
      the cache.
  """

  keys: jax.Array
  values: jax.Array

  @property
  def capacity(self) -> int:
    return self.keys.shape[-2]


def empty(config: ModelConfig, batch_size: int, capacity: int,
          num_layers: int | None = None) -> KVCache:
  """A cache of zeros, `[L, B, K, S, C]`, by default for all layers."""
  shape = (config.num_layers if num_layers is None else num_layers, batch_size,
           config.num_kv_heads, capacity, config.head_dim)
  dtype = storage_dtype(config.dtype)
  return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write(cache: KVCache, keys: jax.Array, values: jax.Array, starts_B: jax.Array,
          layer: jax.Array | None = None) -> KVCache:
  """Puts T new keys and values into consecutive slots from `starts_B` on.

  Slots beyond the capacity are dropped.

  Args:
    cache: `[L, B, K, S, C]`.
    keys, values: `[B, T, K, C]` of `layer`; of all layers, `[L, B, T, K, C]`,
      without.
    starts_B: int32.
    layer: which layer's; may be traced.
  """
  rows = jnp.arange(starts_B.shape[0])[:, None]
  slots = starts_B[:, None] + jnp.arange(keys.shape[-3])[None]

  def put(held, new):
    new = to_storage(new, held)
    if layer is None:
      place = held.at[:, rows, :, slots]
      new = jnp.moveaxis(new, 0, 2)
    else:
      place = held.at[layer, rows, :, slots]
    return place.set(new, mode="drop", unique_indices=True)

  return KVCache(put(cache.keys, keys), put(cache.values, values))
