"""Experts' matrices in eight or four bits, widened where they are used.

Both matrices of an expert have the model width D last (see `params`); a group
of weights that share a scale runs along the axis that the matrix is contracted
over: D for `gate_up`, F for `down`.
"""

import math
from typing import Any

from flax import struct

# Weights that share a scale, at most: the largest common divisor with the axis' size.
GROUPS = {"int8": 128, "int4": 64, "mxfp4": 32}
FORMATS = tuple(GROUPS)


@struct.dataclass
class Quantized:
  """A matrix of experts in few bits: weight = code * scale of its group.

  Attributes:
    codes: int8 `[..., D]`; in the formats of four bits uint8 `[..., D/2]`,
      where byte j holds element j in its low and element j + D/2 in its high
      half.
    scales: one for each group: bfloat16, for mxfp4 uint8 exponents with a bias
      of 127. Of `gate_up` `[L, E, F, 2, D/group]`, of `down` `[L, E, F/group, D]`.
    format: one of `FORMATS`.
  """

  codes: Any
  scales: Any
  format: str = struct.field(pytree_node=False)


def group_size(format: str, size: int) -> int:
  """Weights that share a scale along an axis of this size."""
  return math.gcd(GROUPS[format], size)


def typical_scale(format: str, stddev: float) -> float | int:
  """The scale with which codes of random bits have about this standard deviation."""
  if format == "mxfp4":
    return 127 + round(math.log2(stddev / 2.9))
  return stddev / (74 if format == "int8" else 4.6)
