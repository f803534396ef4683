"""Matrices as the kernels read them: codes and scales of groups.

A code holds one weight, or in the formats of four bits two: a low and a high
part, half of the model width apart (see `quantization`). So a tile of codes is one
tile of weights for each part.
"""

from typing import Any

import jax

from roe_jax.quantization import Quantized, values


def codes_and_scales(matrix: Any) -> tuple[jax.Array, jax.Array | None, str | None]:
  """Codes, scales and format; of an array that is not quantized itself and two None."""
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
  """The weights of each part without their scales; what is not quantized as it is."""
  return [codes] if format is None else values(codes, format)
