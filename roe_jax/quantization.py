"""Matrices quantized to eight or four bits, and experts to nested bits (see `nested`).

Both matrices of an expert have the model width D last (see `params`). A group of
weights that share a scale runs along the contracted axis: D for `gate_up`, F for `down`.

`quantize` and `dequantize_on_host` process whole matrices with numpy; `dequantize` runs
inside programs, tile by tile.
"""

import dataclasses
import functools
import math
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from roe_jax import nested
from roe_jax.nested import Nested


@dataclasses.dataclass(frozen=True)
class Format:
  """How a format stores weights.

  Attributes:
    bits: of a weight's code.
    group: maximum group size; the actual one is its greatest common divisor with the axis size.
    parts: how many weights share a byte of codes.
    codes_dtype, scales_dtype: dtypes.
    nested: the nested format, or None.
  """

  bits: int
  group: int
  parts: int = 1
  codes_dtype: str = "uint8"
  scales_dtype: str = "bfloat16"
  nested: Nested | None = None

  @property
  def num_scales(self) -> int:
    """Scales per group."""
    return self.nested.num_scales if self.nested else 1

  def code_width(self, width: int) -> int:
    """Returns the codes of so many weights."""
    return width * self.bits // 8


_TABLE = {
  "int8": Format(8, 128, codes_dtype="int8"),
  "int4": Format(4, 64, parts=2),
  "mxfp4": Format(4, 32, parts=2, scales_dtype="uint8"),
}
# Formats without parameters; `find` has nested ones, too.
FORMATS = tuple(_TABLE)
# Contracted axis of each expert matrix.
CONTRACTED = {"gate_up": -1, "down": -2}
# And of the other matrices that may be quantized, by their names in `params`: the projections.
PROJECTIONS = {
  "attention.query": -1,
  "attention.key": -1,
  "attention.value": -1,
  "attention.output": -2,
  "attention.query_down": -1,
  "attention.key_down": -1,
  "shared_expert.gate_up": -1,
  "shared_expert.down": -2,
  "unembedding": -1,
}
EXPERT_MATRICES = {f"experts.{name}": axis for name, axis in CONTRACTED.items()}
PROJECTION_FORMATS = ("int8", "int4")
# FP4 (E2M1) values by code.
_FP4_VALUES = np.array(
  [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32
)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_TILE_ELEMENTS = 2**20  # elements processed at a time on the host, so that they stay in cache


class Quantized(struct.PyTreeNode):
  """A quantized matrix: weight = code * scale of its group.

  Attributes:
    codes: int8 `[..., D]`; for 4-bit formats uint8 `[..., D/2]`, where byte j holds
      element j in its low half and element j + D/2 in its high half, in two's
      complement (int4) or as an FP4 code (mxfp4);
      `[..., bits·D/8]` planes of bits for nested formats (see `nested`).
    scales: one per group, bfloat16; for mxfp4 uint8 exponents with bias 127. Shape
      `[L, E, F, 2, D/group]` for `gate_up`, `[L, E, F/group, D]` for `down`, and so for
      `PROJECTIONS`; the last axis is longer for nested formats, which have several.
    format: a name that `find` knows.
    depth: how many planes of a nested format are read; None: all.
    plan: how many each expert of a model has, `[L, E]`; None: all. Scales of the others are zero.
  """

  codes: Any
  scales: Any
  format: str = struct.field(pytree_node=False)
  depth: int | None = struct.field(pytree_node=False, default=None)
  plan: tuple[tuple[int, ...], ...] | None = struct.field(pytree_node=False, default=None)


def is_quantized(leaf: Any) -> bool:
  return isinstance(leaf, Quantized)


@functools.cache
def find(name: str) -> Format:
  """Returns a format: one of `FORMATS`, or nested:BASE-BITS.

  Raises:
    ValueError: there is no format of this name.
  """
  if name in _TABLE:
    return _TABLE[name]
  if (found := Nested.parse(name)) is None:
    raise ValueError(
      f"unknown expert format {name!r}; choose one of {', '.join(FORMATS)}, or nested:BASE-BITS "
      "with 1 <= BASE <= BITS <= 8, such as nested:2-4"
    )
  return Format(found.bits, nested.GROUP, nested.PARTS, nested=found)


def contracted_axis(name: str) -> int:
  """Returns the contracted axis of a matrix that can be quantized, by its name in `Params`."""
  return (EXPERT_MATRICES | PROJECTIONS)[_in_layer(name)]


def format_of(name: str, experts: str | None, projections: str | None) -> str | None:
  """Returns which of two formats a parameter has, by its name in `Params`; None if neither."""
  if _in_layer(name) in EXPERT_MATRICES:
    return experts
  return projections if _in_layer(name) in PROJECTIONS else None


def _in_layer(name):
  return name.removeprefix("dense_").removeprefix("layers.")


def group_size(format: str, size: int) -> int:
  """Returns how many weights share a scale along an axis of this size."""
  return math.gcd(find(format).group, size)


def first_planes(matrix: Quantized, bits: int) -> Quantized:
  """Returns a matrix of a nested format with its first planes only.

  Raises:
    ValueError: the format is not nested, or has no so many planes.
  """
  return matrix.replace(depth=nested_format(matrix.format).first(bits).bits)


def at_bits(experts: Any, bits: int) -> Any:
  """Returns experts in a nested format that are read at so many bits; see `first_planes`."""
  read = {name: first_planes(getattr(experts, name), bits) for name in CONTRACTED}
  return experts.replace(**read)


def nested_format(format: str | None) -> Nested:
  """Returns the nested format of this name.

  Raises:
    ValueError: the format is not nested.
  """
  found = find(format).nested if format else None
  if found is None:
    raise ValueError(
      f"only experts in a nested format can be read with fewer bits, got {format or 'none'}: "
      "convert the model with --quantize_experts=nested:2-4"
    )
  return found


def check_sizes(format: str, d_model: int, d_expert: int) -> None:
  """Raises a ValueError if the format cannot hold experts of this size."""
  if format == "mxfp4" and (d_model % 32 or d_expert % 32):
    raise ValueError(
      f"mxfp4 has blocks of 32 weights, but d_model {d_model} and d_expert {d_expert} are not "
      "both multiples of 32: use int8 or int4"
    )
  check_width(format, d_model)


def check_width(format: str, width: int, name: str = "d_model") -> None:
  """Raises a ValueError if the format cannot hold rows of this many weights, of this name."""
  parts = find(format).parts
  if width % parts:
    what = f"an even {name}" if parts == 2 else f"a {name} that is a multiple of {parts}"
    raise ValueError(
      f"{format} packs {'two' if parts == 2 else parts} weights per byte and needs {what}, got "
      f"{width}: use int8"
    )


def typical_scales(format: str, stddev: float, size: int) -> np.ndarray:
  """Returns `[size]` scales, the last axis of a matrix's.

  With them, uniformly random codes have about this standard deviation.
  """
  if found := find(format).nested:
    scales = found.typical_scales(stddev)
  elif format == "mxfp4":
    scales = [127 + round(math.log2(stddev / 2.9))]
  else:
    scales = [stddev / (74 if format == "int8" else 4.6)]
  return np.repeat(scales, size // len(scales))


def dequantize(matrix: Quantized, dtype: jnp.dtype = jnp.float32) -> jax.Array:
  """Returns the weights `[..., N, D]` of a quantized matrix inside a program.

  Args:
    matrix: codes `[..., N, D or D/2]` of whole experts or a tile, and scales with the
      same axes divided by their group sizes. bfloat16 scales may be in their storage
      dtype (see `numerics.storage_dtype`).
    dtype: dtype of the result, computed in float32. bfloat16 is exact for mxfp4.
      Subnormal weights (below 2^-126) are zero on platforms that flush them; mxfp4
      exponents may be up to 253.
  """
  return jnp.concatenate([p.astype(dtype) for p in dequantize_parts(matrix)], axis=-1)


def dequantize_layer(tree: Any, layer: Any, num_experts: int, dtype: jnp.dtype) -> Any:
  """Returns one layer `[E, ...]` of a tree of `[L·E, ...]`, with quantized matrices in `dtype`."""
  sliced = jax.tree.map(
    lambda w: jax.lax.dynamic_slice_in_dim(w, layer * num_experts, num_experts), tree
  )
  return jax.tree.map(
    lambda w: dequantize(w, dtype) if is_quantized(w) else w, sliced, is_leaf=is_quantized
  )


def dequantize_parts(matrix: Quantized) -> list[jax.Array]:
  """Like `dequantize` in float32, but separately for the halves of D that share a byte.

  One loop over both halves takes XLA's CPU backend ten times as long.

  Returns:
    One array `[..., N, D]`, or for 4-bit formats two `[..., N, D/2]`.
  """
  format = find(matrix.format)
  parts = 1 if format.nested else format.parts
  *lead, rows, width = matrix.codes.shape
  row_groups, groups = matrix.scales.shape[-2:]
  width, groups = width * 8 // (format.bits * parts), groups // format.num_scales
  # Length of a run of weights with one scale; it must not cross into the other half.
  run = math.gcd(parts * width // groups, width)

  def broadcast(scales):
    grouped = decode_scales(scales)[..., :, None, :, None]
    shape = (*lead, row_groups, rows // row_groups, width // run, run)
    return jnp.broadcast_to(grouped, shape).reshape(*lead, rows, width)

  if format.nested:
    read = format.nested.first(matrix.depth or format.bits)
    planes = jnp.split(matrix.codes, format.bits, axis=-1)[: read.bits]
    scales = jnp.split(matrix.scales, format.num_scales, axis=-1)[: read.num_scales]
    return [read.weights([nested.unpack(p, jnp) for p in planes], [*map(broadcast, scales)])]
  scales = jnp.repeat(matrix.scales, parts * width // run // groups, axis=-1)
  decoded = decode_codes(matrix.codes, matrix.format)
  return [part * broadcast(s) for part, s in zip(decoded, jnp.split(scales, parts, axis=-1))]


def tile_weights(tile: Any, dtype: jnp.dtype) -> list[jax.Array]:
  """Returns a tile's weights as one array, or two halves of D, for products with `dtype`.

  Quantized ones become float32 on CPUs and `dtype` elsewhere; others are unchanged.
  """
  if not is_quantized(tile):
    return [tile]
  return dequantize_parts(tile) if jax.default_backend() == "cpu" else [dequantize(tile, dtype)]


def codes_and_scales(matrix: Any) -> tuple[jax.Array, jax.Array | None, str | None]:
  """Returns codes, scales and format; for an array, the array itself and two None."""
  if isinstance(matrix, Quantized):
    return matrix.codes, matrix.scales, matrix.format
  return matrix, None, None


def read_format(matrix: Any) -> str | None:
  """Returns the format that holds the planes that are read; None for an array."""
  if not is_quantized(matrix) or matrix.depth is None:
    return matrix.format if is_quantized(matrix) else None
  return nested_format(matrix.format).first(matrix.depth).name


def codes_per_row(matrix: Any) -> int:
  """Returns the codes of a row of a matrix, in nested formats of one plane."""
  if not is_quantized(matrix):
    return matrix.shape[-1]
  kind = find(matrix.format)
  return matrix.codes.shape[-1] // (kind.bits if kind.nested else 1)


def weights_per_scale(scales: jax.Array | None, axis: int, size: int) -> int:
  """Returns how many of the `size` weights along an axis share a scale; all without scales."""
  return size if scales is None else size // scales.shape[axis]


def weights_per_code(format: str | None) -> int:
  return 1 if format is None else find(format).parts


def decode_codes(codes: jax.Array, format: str | None) -> list[jax.Array]:
  """Returns the unscaled weights of codes: one array, or of 4-bit formats two halves of D.

  The weights are float32, exact in bfloat16, and for mxfp4 half of the FP4 values.
  An unquantized tile (`format` None) is returned as is. Like `decode_scales`, this
  uses only operations that Pallas lowers for GPUs and TPUs.
  """
  if format is None:
    return [codes]
  if format == "int8":
    return [codes.astype(jnp.float32)]
  codes = codes.astype(jnp.int32)
  if format == "int4":
    return [((n ^ 8) - 8).astype(jnp.float32) for n in (codes & 15, codes >> 4)]
  return [_half_fp4(n) for n in (codes & 15, codes >> 4)]


def _half_fp4(nibbles):
  """Returns half the FP4 values from their bits, without a table or subnormal numbers."""
  magnitude, quarter = nibbles & 7, 125 << 23
  # From code 2 up, a code is the low bits of the exponent and the high bit of the mantissa.
  bits = jnp.where(magnitude < 2, -magnitude & quarter, (magnitude << 22) + quarter)
  return jax.lax.bitcast_convert_type(bits | (nibbles & 8) << 28, jnp.float32)


def decode_scales(scales: jax.Array) -> jax.Array:
  """Returns float32 scales; mxfp4 scales are doubled, since 2^-127 is subnormal."""
  if scales.dtype == jnp.uint8:
    bits = (scales.astype(jnp.int32) + 1) << 23
  elif scales.dtype == jnp.uint16:
    bits = scales.astype(jnp.int32) << 16
  else:
    return scales.astype(jnp.float32)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def quantize(array: np.ndarray, format: str, axis: int) -> Quantized:
  """Quantizes weights on the host, rounding to nearest.

  The scale of a group is: for int8, the smallest (rounded up to bfloat16) that does not
  clip the largest weight; for int4, minus an eighth of the largest weight (rounded to
  bfloat16), which becomes -8 while an equally large weight of the other sign is clipped
  to 7; for mxfp4, the power of two of the OCP Microscaling specification 1.0, which clips
  weights above 6 scales to 6. Groups of zeros have scale zero.

  Args:
    array: `[..., N, D]` weights, float32 or bfloat16.
    format: one of `FORMATS`.
    axis: the contracted axis, -1 or -2; groups run along it.

  Raises:
    ValueError: a weight is not finite, or the format does not support the sizes.
  """
  *lead, rows, width = array.shape
  size = array.shape[axis]
  group, kind = group_size(format, size), find(format)
  if format == "mxfp4" and group != 32:
    raise ValueError(f"mxfp4 has blocks of 32 weights: cannot divide an axis of {size}")
  if width % kind.parts:
    raise ValueError(
      f"{format} packs {'two' if kind.parts == 2 else kind.parts} weights per byte: cannot "
      f"{'halve' if kind.parts == 2 else 'divide'} an axis of {width}"
    )
  groups = (rows, width // group) if axis == -1 else (rows // group, width)
  codes = np.empty((*lead, rows, kind.code_width(width)), kind.codes_dtype)
  scales = np.empty((*lead, groups[0], kind.num_scales * groups[1]), np.dtype(kind.scales_dtype))
  height, along = (1, 3) if axis == -1 else (group, 1)  # rows that share scales
  flat = (
    array.reshape(-1, height, width),
    codes.reshape(-1, height, codes.shape[-1]),
    scales.reshape(-1, kind.num_scales, groups[1]),
  )
  encode = kind.nested.encode if kind.nested else _ENCODERS[format]
  pack_codes = kind.nested.pack if kind.nested else pack if kind.parts == 2 else lambda c: c
  step = max(1, _TILE_ELEMENTS // (height * width))
  for start in range(0, len(flat[0]), step):
    source, codes_part, scales_part = (a[start : start + step] for a in flat)
    # [n, 1, D/group, group], or [n, group, D, 1]
    weights = to_float32(source).reshape(len(source), height, groups[1], -1)
    found, scale = encode(weights, along)
    codes_part[:] = pack_codes(found.reshape(source.shape))
    scale = scale.reshape(kind.num_scales, len(source), groups[1])
    scales_part[:] = np.moveaxis(scale, 0, 1)
  return Quantized(codes, scales, format)


def dequantize_on_host(matrix: Quantized, dtype: np.dtype = np.dtype(np.float32)) -> np.ndarray:
  """Returns the weights `[..., N, D]` of a quantized matrix, computed with numpy.

  Exact in float32, and for mxfp4 also in bfloat16, within the range of the dtype.
  """
  format = find(matrix.format)
  *lead, rows, width = matrix.codes.shape
  row_groups, groups = matrix.scales.shape[-2:]
  width, groups = width * 8 // format.bits, groups // format.num_scales
  weights = np.empty((*lead, rows, width), dtype)
  height = rows // row_groups  # rows that share scales
  flat = weights.reshape(-1, height, width)
  codes = matrix.codes.reshape(len(flat), height, -1)
  scales = matrix.scales.reshape(len(flat), format.num_scales, groups, 1)
  step = max(1, _TILE_ELEMENTS // (height * width))
  for start in range(0, len(flat), step):
    part = slice(start, start + step)
    if format.nested:
      read = format.nested.first(matrix.depth or format.bits)
      planes = np.split(codes[part], format.bits, axis=-1)[: read.bits]
      bits = [nested.unpack(p, np).reshape(*p.shape[:2], groups, -1) for p in planes]
      found = read.weights(bits, list(np.moveaxis(to_float32(scales[part]), 1, 0)[:, :, None]))
      flat[part] = found.reshape(len(found), height, width)
      continue
    values = codes[part] if matrix.format == "int8" else unpack(codes[part])
    if matrix.format == "int4":
      values = (values ^ 8).astype(np.int8) - 8
    if matrix.format == "mxfp4":
      values = _FP4_VALUES[values]
      scale = np.ldexp(np.float32(1), np.minimum(scales[part], 254).astype(np.int32) - 127)
    else:
      values, scale = values.astype(np.float32), to_float32(scales[part])
    grouped = values.reshape(len(values), height, groups, -1)
    flat[part] = (grouped * scale).reshape(values.shape)
  return weights


def pack(nibbles: np.ndarray) -> np.ndarray:
  """Packs 4-bit codes, uint8 `[..., D]`, into bytes `[..., D/2]`."""
  low, high = np.split(nibbles, 2, axis=-1)
  return low | high << 4


def unpack(codes: np.ndarray) -> np.ndarray:
  """Inverts `pack`."""
  return np.concatenate([codes & 15, codes >> 4], axis=-1)


def to_float32(array: np.ndarray) -> np.ndarray:
  """Converts to float32, from bfloat16 faster than `astype`."""
  if array.dtype == _BFLOAT16:
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
  return array.astype(np.float32)


def _encode_int8(weights, axis):
  """Returns codes and scales of float32 weights in groups along an axis (kept, of size 1)."""
  scales = np.abs(weights).max(axis=axis, keepdims=True) / np.float32(127)
  bits = np.ascontiguousarray(scales).view(np.uint32)
  scales = _flush_subnormal((bits + 0xFFFF & 0xFFFF0000).view(np.float32))
  return np.clip(np.rint(_divide(weights, scales)), -127, 127).astype(np.int8), scales


def _encode_int4(weights, axis):
  low, high = (f(weights, axis=axis, keepdims=True) for f in (np.min, np.max))
  scales = np.where(high > -low, high, low) / np.float32(-8)
  scales = _flush_subnormal(scales.astype(_BFLOAT16).astype(np.float32))
  codes = np.clip(np.rint(_divide(weights, scales)), -8, 7).astype(np.int8)
  return codes.view(np.uint8) & 15, scales


def _encode_mxfp4(weights, axis):
  largest = _flush_subnormal(np.abs(weights).max(axis=axis, keepdims=True))
  exponents = np.clip(np.frexp(largest)[1] - 3, -127, 127)  # scales the largest to [4, 8)
  magnitudes = np.abs(weights) * np.ldexp(np.float32(1), -exponents)
  # Round half to even.
  codes = sum((magnitudes > bound).astype(np.uint8) for bound in (0.25, 1.25, 2.5, 5))
  codes += sum((magnitudes >= bound).astype(np.uint8) for bound in (0.75, 1.75, 3.5))
  scales = np.where(largest > 0, exponents + 127, 0).astype(np.uint8)
  return codes | np.signbit(weights).astype(np.uint8) << 3, scales


_ENCODERS = {"int8": _encode_int8, "int4": _encode_int4, "mxfp4": _encode_mxfp4}


def _flush_subnormal(scales):
  """Returns the scales with subnormal ones flushed to zero."""
  if not np.isfinite(scales).all():
    raise ValueError("the experts cannot be quantized: some weights are not finite")
  return np.where(np.abs(scales) < np.finfo(np.float32).tiny, np.float32(0), scales)


def _divide(weights, scales):
  return weights / np.where(scales == 0, np.float32(1), scales)
