"""Sums over the parts of an array that devices hold.

The model's functions run on whole arrays, or inside a `shard_map` on one
device's part of them (see `sharding`). What must be known of the other parts
goes through these functions; on whole arrays they do nothing.
"""

import math

import jax
import jax.numpy as jnp


def axis_size(axis: str) -> int:
  """Into how many parts arrays are split along a mesh axis; 1 outside of a `shard_map`."""
  return jax.lax.axis_size(axis) if _split((axis,)) else 1


def axis_index(*axes: str) -> jax.Array | int:
  """This device's index along mesh axes, the first of them slowest."""
  return jax.lax.axis_index(axes) if _split(axes) else 0


def psum(x: jax.Array, *axes: str) -> jax.Array:
  """`x` summed over the devices along mesh axes."""
  axes = _split(axes)
  return jax.lax.psum(x, axes) if axes else x


def pmean(x: jax.Array, *axes: str) -> jax.Array:
  """`x` averaged over the devices along mesh axes."""
  return psum(x, *axes) / math.prod(map(axis_size, axes))


def broadcast_from_first(x: jax.Array, *axes: str) -> jax.Array:
  """`x` of the first device along mesh axes, on all of them."""
  return psum(jnp.where(axis_index(*axes) == 0, x, jnp.zeros_like(x)), *axes) if axes else x


def take_rows(table: jax.Array, rows: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """`table[rows]` of a whole table whose rows are split over mesh axes."""
  own = rows - axis_index(*axes) * len(table)
  return _of_owner(table[jnp.clip(own, 0, len(table) - 1)], own, len(table), axes)


def take_slice(x: jax.Array, position: jax.Array, axis: int, axes: tuple[str, ...]) -> jax.Array:
  """One position of a whole array's axis, kept with size 1, that is split over mesh axes."""
  size = x.shape[axis]
  own = position - axis_index(*axes) * size
  return _of_owner(
    jax.lax.dynamic_slice_in_dim(x, jnp.clip(own, 0, size - 1), 1, axis), own, size, axes
  )


def _of_owner(found, own, size, axes):
  """What was found where `own`, leading axes of `found`, lies in [0, size)."""
  if not axes:
    return found
  is_own = jnp.expand_dims((own >= 0) & (own < size), tuple(range(jnp.ndim(own), found.ndim)))
  return psum(jnp.where(is_own, found, jnp.zeros_like(found)), *axes)


def _split(axes):
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(a for a in axes if a in mesh.manual_axes and mesh.shape[a] > 1)
