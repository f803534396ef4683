"""Nested codes: weights of many bits whose first bits are weights of fewer (arXiv 2504.15299).

A base of a few bits, `W_b = Q·s + m` with a step s and an offset m per group, is followed by
planes of one bit each, `W_(k+1) = W_k + s_k·B` with the signs B of what is left over and one
`s_k = mean |W - W_k|` per group, which minimizes the squared error for these signs. So the
first planes of a 4-bit matrix are its 3-bit and its 2-bit matrix, and reading fewer planes reads
fewer bytes.

A byte holds one bit of eight weights: bit i of byte j of a plane is that of element `j + i·D/8`.
The planes of a matrix, most significant bit first, and its scales (s, m, then the planes') are
concatenated along the last axis.
"""

from collections.abc import Sequence
import dataclasses
import re
from typing import Any

import ml_dtypes
import numpy as np

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PREFIX = "nested"
_NAME = re.compile(PREFIX + r":([1-8])-([1-8])")
PARTS = 8  # weights that share a byte of a plane
GROUP = 128  # as in the paper


@dataclasses.dataclass(frozen=True)
class Nested:
  """A nested format; its name is `nested:BASE-BITS`.

  Attributes:
    base: bits of the base.
    bits: bits of all planes.
  """

  base: int
  bits: int

  @classmethod
  def parse(cls, name: str) -> "Nested | None":
    """Returns the format of this name, or None if it is not that of a nested format."""
    match = _NAME.fullmatch(name)
    return cls(*map(int, match.groups())) if match and match[1] <= match[2] else None

  @property
  def name(self) -> str:
    return f"{PREFIX}:{self.base}-{self.bits}"

  @property
  def num_scales(self) -> int:
    """Scales per group: step, offset, and one for each plane after the base."""
    return 2 + self.bits - self.base

  def first(self, bits: int) -> "Nested":
    """Returns the format of the first planes.

    Raises:
      ValueError: there are no so many, or fewer than the base has.
    """
    if not self.base <= bits <= self.bits:
      raise ValueError(
        f"experts in {self.name} can be read with {self.base} to {self.bits} bits, got {bits}"
      )
    return Nested(self.base, bits)

  def typical_scales(self, stddev: float) -> list[float]:
    """Returns scales at which random bits make weights of mean 0 and this standard deviation."""
    step = stddev / (0.29 * 2**self.base)
    rest = [step / 2 ** (k + 2) for k in range(self.bits - self.base)]
    return [step, -step * (2**self.base - 1) / 2, *rest]

  def weights(self, planes: Sequence[Any], scales: Sequence[Any]) -> Any:
    """Returns float32 weights of planes of bits, 0 or 1; exact but for the sums.

    Args:
      planes: integer arrays of equal shapes, at least `base`.
      scales: float32, `num_scales` of the format with so many planes.
    """
    code = planes[0]
    for plane in planes[1 : self.base]:
      code = 2 * code + plane
    weights = code.astype("float32") * scales[0] + scales[1]
    for plane, scale in zip(planes[self.base :], scales[2:]):
      weights = weights + (2 * plane - 1).astype("float32") * scale
    return weights

  def encode(self, weights: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantizes float32 weights in groups along an axis.

    Returns:
      uint8 codes, whose low `bits` bits are those of the planes, and scales `[num_scales, ...]`
      with this axis kept, of size 1; float32, exact in bfloat16.
    """
    low, high = (f(weights, axis=axis, keepdims=True) for f in (np.min, np.max))
    levels = 2**self.base - 1
    scales = [rounded((high - low) / np.float32(levels)), rounded(low)]
    step = np.where(scales[0] == 0, np.float32(1), scales[0])
    codes = np.clip(np.rint((weights - scales[1]) / step), 0, levels)
    left = weights - (codes * scales[0] + scales[1])
    codes = codes.astype(np.uint8)
    for _ in range(self.bits - self.base):
      scale = rounded(np.abs(left).mean(axis=axis, keepdims=True))
      signs = left >= 0
      left = left - np.where(signs, scale, -scale)
      codes = 2 * codes + signs
      scales.append(scale)
    return codes, np.stack(scales)

  def pack(self, codes: np.ndarray) -> np.ndarray:
    """Packs uint8 codes `[..., D]` into planes `[..., bits·D/8]`."""
    parts = np.stack(np.split(codes, PARTS, axis=-1))  # [8, ..., D/8]
    planes = []
    for p in reversed(range(self.bits)):
      plane = np.zeros(parts.shape[1:], np.uint8)
      for i, part in enumerate(parts):
        plane |= (part >> p & 1) << i
      planes.append(plane)
    return np.concatenate(planes, axis=-1)


def unpack(plane: Any, library: Any) -> Any:
  """Returns the bits of a plane `[..., D/8]` as int32 `[..., D]`; `library` is numpy or JAX's."""
  shifts = library.arange(PARTS, dtype="int32").reshape(*[1] * (plane.ndim - 1), PARTS, 1)
  bits = plane.astype("int32")[..., None, :] >> shifts & 1
  return bits.reshape(*plane.shape[:-1], -1)


def rounded(scales: np.ndarray) -> np.ndarray:
  """Rounds scales to bfloat16, those that it cannot hold as normal numbers to zero."""
  scales = scales.astype(_BFLOAT16).astype(np.float32)
  if not np.isfinite(scales).all():
    raise ValueError("the experts cannot be quantized: some weights are not finite")
  return np.where(np.abs(scales) < np.finfo(np.float32).tiny, np.float32(0), scales)
