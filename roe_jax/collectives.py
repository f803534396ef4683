"""Collectives that do nothing outside a `shard_map`.

The model's functions run on whole arrays, or inside a `shard_map` on one
device's shards (see `sharding`). On whole arrays these functions are identities.
"""

import math

import jax
import jax.numpy as jnp


def axis_size(axis: str) -> int:
  """Returns the number of shards along a mesh axis; 1 outside a `shard_map`."""
  return jax.lax.axis_size(axis) if _sharded((axis,)) else 1


def axis_index(*axes: str) -> jax.Array | int:
  """Returns this device's index along mesh axes, the first of them slowest."""
  return jax.lax.axis_index(axes) if _sharded(axes) else 0


def psum(x: jax.Array, *axes: str) -> jax.Array:
  """Sums `x` over the devices along mesh axes."""
  axes = _sharded(axes)
  return jax.lax.psum(x, axes) if axes else x


def pmean(x: jax.Array, *axes: str) -> jax.Array:
  """Averages `x` over the devices along mesh axes."""
  return psum(x, *axes) / math.prod(map(axis_size, axes))


def broadcast_from_first(x: jax.Array, *axes: str) -> jax.Array:
  """Broadcasts `x` from the first device along mesh axes to all of them."""
  return psum(jnp.where(axis_index(*axes) == 0, x, jnp.zeros_like(x)), *axes) if axes else x


def take_rows(table: jax.Array, rows: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Returns `table[rows]` of a table whose rows are sharded over mesh axes.

  Args:
    table: `[N, ...]`, this device's shard.
    rows: indices into the whole table.
    axes: the mesh axes that shard the rows.
  """
  own = rows - axis_index(*axes) * len(table)
  return _from_owner(table[jnp.clip(own, 0, len(table) - 1)], own, len(table), axes)


def take_slice(x: jax.Array, position: jax.Array, axis: int, axes: tuple[str, ...]) -> jax.Array:
  """Returns one position, kept with size 1, of an array axis that is sharded over mesh axes."""
  size = x.shape[axis]
  own = position - axis_index(*axes) * size
  found = jax.lax.dynamic_slice_in_dim(x, jnp.clip(own, 0, size - 1), 1, axis)
  return _from_owner(found, own, size, axes)


def _from_owner(found, own, size, axes):
  """Takes each entry from the device where `own` (leading axes of `found`) is in [0, size)."""
  if not axes:
    return found
  is_own = jnp.expand_dims((own >= 0) & (own < size), tuple(range(jnp.ndim(own), found.ndim)))
  return psum(jnp.where(is_own, found, jnp.zeros_like(found)), *axes)


def _sharded(axes):
  """Keeps the axes that shard arrays in the current context."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(a for a in axes if a in mesh.manual_axes and mesh.shape[a] > 1)
