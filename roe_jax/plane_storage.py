"""Checkpoints of experts with a plan of bits store the planes that each expert has, and no others.

In memory all experts have the planes of the format, those beyond an expert's bits with scales of
zero (`bit_plans.apply`), so that experts can be placed on any mesh; `native` does not read them.
In a piece of a checkpoint, the codes `[layers, E, ..., bits·W]` of a matrix are `[P, ..., W]`, one
plane after the other of one expert after the other, and so are its scales by kind.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from roe_jax import quantization
from roe_jax.checkpoint_folder import Piece
from roe_jax.config import ModelConfig

# Of stored arrays. Other names than in memory: their first axes are not layers and experts.
_PREFIX = "planes."


def stored(config: ModelConfig, piece: Piece, arrays: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what a piece's arrays are stored as.

  Args:
    config: config of the checkpoint.
    piece: the piece.
    arrays: `ShapeDtypeStruct`s, with shardings or without, or NumPy arrays, whose values do not
      matter, named as in `checkpoint_folder.piece_shapes`.
  """

  def of(array, is_kept):
    shape = (int(is_kept.sum()), *array.shape[2:-1], array.shape[-1] // is_kept.shape[-1])
    if isinstance(array, np.ndarray):
      return np.broadcast_to(np.zeros((), array.dtype), shape)
    sharding = array.sharding
    if isinstance(sharding, NamedSharding):
      spec = [*sharding.spec, *[None] * (len(array.shape) - len(sharding.spec))]
      sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *spec[2:-1]))
    return jax.ShapeDtypeStruct(shape, array.dtype, sharding=sharding)

  return _changed(
    config, piece, arrays, lambda name, is_kept: (_PREFIX + name, of(arrays[name], is_kept))
  )


def pack(config: ModelConfig, piece: Piece, arrays: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a piece's arrays as they are stored."""

  def of(array, is_kept):
    parts = array.reshape(*array.shape[:-1], is_kept.shape[-1], -1)
    library = jnp if isinstance(array, jax.Array) else np
    return library.moveaxis(parts, -2, 2)[np.nonzero(is_kept)]

  return _changed(
    config, piece, arrays, lambda name, is_kept: (_PREFIX + name, of(arrays[name], is_kept))
  )


def unpack(
  config: ModelConfig, piece: Piece, arrays: Mapping[str, Any], like: Mapping[str, Any]
) -> dict[str, Any]:
  """Inverts `pack`.

  Args:
    config: config of the checkpoint.
    piece: the piece.
    arrays: its arrays as they are stored.
    like: its arrays, as in `stored`.
  """

  def of(library, array, is_kept):
    places = (np.cumsum(is_kept) - 1).reshape(is_kept.shape) * is_kept
    mask = is_kept.reshape(*is_kept.shape, *[1] * (array.ndim - 1))
    parts = library.where(mask, array[places], library.zeros((), array.dtype))
    parts = library.moveaxis(parts, 2, -2)
    return parts.reshape(*parts.shape[:-2], -1)

  def found(name, is_kept):
    array = arrays[_PREFIX + name]
    if not isinstance(array, jax.Array):
      return name, of(np, array, is_kept)
    run = jax.jit(lambda a: of(jnp, a, is_kept), out_shardings=like[name].sharding)
    return name, run(array)

  return _changed(config, piece, like, found, arrays)


def _changed(config, piece, arrays, change, others=None):
  """Returns arrays, those of planes as `(name, array)` of `change(name, is_kept)`.

  `is_kept` is whether an expert has a plane or kind of scales, `[layers, E, planes or kinds]`. The
  other arrays are those of `others`.
  """
  if config.expert_bits is None or not piece.num_layers:
    return dict(others or arrays)
  plan = np.array(config.expert_bits[piece.start : piece.stop])
  format = quantization.nested_format(config.expert_format)
  kinds = {"codes": (format.bits, plan), "scales": (format.num_scales, plan - format.base + 2)}
  found = {}
  for name, array in arrays.items():
    of_experts, _, part = name.rpartition(".")
    if of_experts in (f"experts.{matrix}" for matrix in quantization.CONTRACTED):
      size, kept = kinds[part]
      new, array = change(name, np.arange(size) < kept[..., None])
      found[new] = array
    else:
      found[name] = (others or arrays)[name]
  return found
