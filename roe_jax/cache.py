"""The key/value cache of one sequence (or of one roster member) per row."""

from flax import struct
import jax
import jax.numpy as jnp

from roe_jax.config import ModelConfig


@struct.dataclass
class KVCache:
  """Keys (rotated) and values; slot s holds position s.

  Slots at or beyond a row's length hold rubbish that no row ever reads, since
  a row at position t reads slots below t only.

  Attributes:
    keys, values: `[L, B, K, S, C]`: what attention contracts lies in the last
      two axes, so that no step transposes the cache.
  """

  keys: jax.Array
  values: jax.Array

  @property
  def capacity(self) -> int:
    return self.keys.shape[-2]


def empty(config: ModelConfig, batch_size: int, capacity: int) -> KVCache:
  """A cache of zeros, `[L, B, K, S, C]` in `config.dtype`."""
  shape = (config.num_layers, batch_size, config.num_kv_heads, capacity,
           config.head_dim)
  return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def write_layer(slots_BxKxSxC: jax.Array, new_BxTxKxC: jax.Array,
                starts_B: jax.Array) -> jax.Array:
  """Puts T new keys or values into consecutive slots from `starts_B` on.

  Slots beyond the capacity are dropped; with T = 1 the slot must lie within it.
  """
  capacity = slots_BxKxSxC.shape[2]

  def one_row(slots_KxSxC, new_TxKxC, start):
    positions = start + jnp.arange(new_TxKxC.shape[0])
    return slots_KxSxC.at[:, positions].set(
        new_TxKxC.swapaxes(0, 1), mode="drop", unique_indices=True)

  if new_BxTxKxC.shape[1] == 1:
    # One slot a row is a plain in-place update, which scatter is not everywhere.
    def one_slot(slots_KxSxC, new_TxKxC, start):
      return jax.lax.dynamic_update_slice(
          slots_KxSxC, new_TxKxC.swapaxes(0, 1), (0, jnp.minimum(start, capacity - 1), 0))
    return jax.vmap(one_slot)(slots_BxKxSxC, new_BxTxKxC, starts_B)
  return jax.vmap(one_row)(slots_BxKxSxC, new_BxTxKxC, starts_B)


def write(cache: KVCache, keys_LxBxTxKxC: jax.Array, values_LxBxTxKxC: jax.Array,
          starts_B: jax.Array) -> KVCache:
  """`write_layer` for the keys and values of all layers."""
  put = jax.vmap(write_layer, in_axes=(0, 0, None))
  return KVCache(put(cache.keys, keys_LxBxTxKxC, starts_B),
                 put(cache.values, values_LxBxTxKxC, starts_B))
