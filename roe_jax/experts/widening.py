"""Matrices as the kernels read them: codes, scales of groups, and what they widen to.

A code holds one weight, or in the formats of four bits two: a low and a high
part, half of the model width apart (see `quantization`). So a tile of codes is one
tile of weights for each part. All operations here are such as Pallas can lower
both for GPUs and for TPUs: arithmetic in 32 bits, and no tables.
"""

from typing import Any

import jax
import jax.numpy as jnp

from roe_jax.quantization import Quantized


def held(matrix: Any) -> tuple[jax.Array, jax.Array | None, str | None]:
  """Codes, scales and format; of an array that is not quantised itself and two None."""
  if isinstance(matrix, Quantized):
    return matrix.codes, matrix.scales, matrix.format
  return matrix, None, None


def group_of(scales: jax.Array | None, axis: int, size: int) -> int:
  """Weights that share a scale along an axis of `size` weights; all of one without scales."""
  return size if scales is None else size // scales.shape[axis]


def num_parts(format: str | None) -> int:
  """How many weights a code holds."""
  return 2 if format in ("int4", "mxfp4") else 1


def widen(codes: jax.Array, format: str | None) -> list[jax.Array]:
  """The weights of each part without their scales.

  They are float32, and no more than eight bits long, so that bfloat16 holds them
  exactly. What is not quantised is returned as it is.
  """
  if format is None:
    return [codes]
  codes = codes.astype(jnp.int32)
  if format == "int8":
    return [codes.astype(jnp.float32)]
  of_four_bits = {"int4": _twos_complement, "mxfp4": _e2m1}[format]
  return [of_four_bits(codes & 15), of_four_bits(codes >> 4)]


def _twos_complement(code):
  return ((code ^ 8) - 8).astype(jnp.float32)


def _e2m1(code):
  """0, 0.5, 1, 1.5, 2, 3, 4, 6 of the lower three bits; the fourth is the sign."""
  size = code & 7
  # Twice the value is linear in the code up to 4, from 4 to 6, and from there on.
  twice = jnp.maximum(size, jnp.maximum(2 * size - 4, 4 * size - 16))
  return 0.5 * jnp.where(code < 8, twice, -twice).astype(jnp.float32)


def widen_scales(scales: jax.Array, format: str) -> jax.Array:
  """float32 scales; of mxfp4's exponents 0 is zero, and 255 infinite."""
  if format != "mxfp4":
    return scales.astype(jnp.float32)
  return jax.lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)
