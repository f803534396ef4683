"""Contractions and normalization with stated precision, and how weights are read.

Every weight matrix is stored with the model width D last, stacked over layers:
`[L, out, D]` where it projects from the model width, `[L, in, D]` where it
projects back to it. So a few rows of a layer's matrix are a contiguous tile,
whatever the size of the tile.

On CPUs XLA copies what is sliced from a stack before it is multiplied. There
the matrices are walked tile by tile, so that the copy stays in the core's
cache (measured: 1.5 times the time to read the weights, against 2.2). The same
loop also converts weights that are held as bfloat16 bits (`storage_dtype`). Where XLA
spreads every operation over several cores, tiles are larger: it takes longer to
hand out a small one than to compute it.
"""

from collections.abc import Callable
import math
import os
from typing import Any

import jax
import jax.numpy as jnp

from roe_jax import collectives

# Bytes of a tile as it is multiplied. On one core it must fit the second-level
# cache; on several the least time was seen with all of an expert of this size.
ONE_CORE_TILE = 512 * 1024
TILE = 4 * 1024 * 1024


def einsum(subscripts: str, x: jax.Array, weights: jax.Array) -> jax.Array:
  """`jnp.einsum` accumulated in float32; the result is float32.

  float32 operands are multiplied in full float32 on every platform (the
  default of GPUs and TPUs is shorter), bfloat16 ones as they are; weights held
  as bits are widened, and `x` with them, as it is with float32 weights. Let axes
  that both operands and the result share lead the result of a matmul: with
  others in front, XLA's CPU backend fails on some bfloat16 dots.
  """
  if weights.dtype == jnp.uint16:
    weights = bits_to_float32(weights)
  if weights.dtype == jnp.float32:
    x = x.astype(jnp.float32)
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jnp.einsum(subscripts, x, weights, precision=precision, preferred_element_type=jnp.float32)


def tile_bytes() -> int:
  """The size of a tile, by the number of cores that XLA uses."""
  return ONE_CORE_TILE if num_cores() == 1 else TILE


def num_cores() -> int:
  """Cores that this process, and so XLA's CPU backend, may use."""
  if "NPROC" in os.environ:  # as XLA counts
    return int(os.environ["NPROC"])
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def storage_dtype(dtype: str) -> jnp.dtype:
  """What weights and caches of a model dtype are held in on this platform.

  XLA's CPU backend turns a loop over bfloat16 arrays into one over float32
  copies of them. There they are held as their bits, which nothing converts.
  """
  if dtype == "bfloat16" and jax.default_backend() == "cpu":
    return jnp.dtype(jnp.uint16)
  return jnp.dtype(dtype)


def to_storage_dtype(x: jax.Array, like: jax.Array) -> jax.Array:
  """`x` in the form that `like` is held in: bfloat16 bits, or its dtype."""
  if like.dtype == jnp.uint16:
    return jax.lax.bitcast_convert_type(rounded(x, jnp.bfloat16), jnp.uint16)
  return x.astype(like.dtype)


def to_compute_dtype(held: jax.Array) -> jax.Array:
  """bfloat16 values of what is held as their bits; others as they are."""
  if held.dtype != jnp.uint16:
    return held
  return jax.lax.bitcast_convert_type(held, jnp.bfloat16)


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """`x` in `dtype`, by a rounding that is always done.

  XLA leaves out a conversion to bfloat16 whose result is widened again at once,
  and whether it sees that depends on what it fuses: one row would be rounded
  otherwise than several.
  """
  if dtype == jnp.bfloat16:
    x = jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
  return x.astype(dtype)


def add(x: jax.Array, y: jax.Array) -> jax.Array:
  """`x + y`, computed in float32 and rounded to the dtype of `x`."""
  return rounded(x.astype(jnp.float32) + y.astype(jnp.float32), x.dtype)


def multiply(x: jax.Array, y: jax.Array) -> jax.Array:
  """`x * y`, computed in float32 and rounded to the dtype of `x`."""
  return rounded(x.astype(jnp.float32) * y.astype(jnp.float32), x.dtype)


def add_bias(x: jax.Array, bias: jax.Array | None, layer: jax.Array | int) -> jax.Array:
  """Float32 `x` plus the layer's bias, which has its last axes; None is no bias."""
  if bias is None:
    return x
  return x + jnp.broadcast_to(to_compute_dtype(bias[layer]).astype(jnp.float32), x.shape)


def bits_to_float32(held: jax.Array) -> jax.Array:
  """float32 values of what is held as bfloat16 bits."""
  return jax.lax.bitcast_convert_type(held.astype(jnp.uint32) << 16, jnp.float32)


def project(x: jax.Array, weights: jax.Array, layer: jax.Array | int) -> jax.Array:
  """`x @ weights[layer].T`: from the model width to a matrix's other axes.

  Args:
    x: `[..., D]`.
    weights: `[L, *out, D]`.
    layer: which layer's; may be traced.

  Returns:
    `[..., *out]` float32.
  """
  out = weights.shape[1:-1]
  size = math.prod(out)
  rows = tile_rows(size, weights.shape[-1])

  def add(tile, start, y):
    part = einsum("...d,td->...t", x, tile)
    return jax.lax.dynamic_update_slice_in_dim(y, part, start, y.ndim - 1)

  y = loop_over_tiles(
    weights.reshape(-1, weights.shape[-1]),
    layer * size,
    size,
    rows,
    add,
    jnp.zeros((*x.shape[:-1], size), jnp.float32),
  )
  return y.reshape(*x.shape[:-1], *out)


def project_back(x: jax.Array, weights: jax.Array, layer: jax.Array | int) -> jax.Array:
  """`x @ weights[layer]`: from a matrix's other axes back to the model width.

  Args:
    x: `[..., *in]`.
    weights: `[L, *in, D]`.
    layer: which layer's; may be traced.

  Returns:
    `[..., D]` float32.
  """
  inner = weights.ndim - 2
  size = math.prod(weights.shape[1:-1])
  x = x.reshape(*x.shape[:-inner], size)
  rows = tile_rows(size, weights.shape[-1])

  def add(tile, start, y):
    part = jax.lax.dynamic_slice_in_dim(x, start, rows, x.ndim - 1)
    return y + einsum("...t,td->...d", part, tile)

  return loop_over_tiles(
    weights.reshape(size * weights.shape[0], -1),
    layer * size,
    size,
    rows,
    add,
    jnp.zeros((*x.shape[:-1], weights.shape[-1]), jnp.float32),
  )


def loop_over_tiles(
  weights: Any, first: jax.Array | int, size: int, rows: int, add: Callable, y: jax.Array
) -> jax.Array:
  """Goes over `size` rows of matrices in tiles of `rows`.

  Args:
    weights: one matrix `[N, ...]`, or a pytree of them. One that has fewer rows
      than the others has a row for each group of theirs; tiles are then whole
      groups, or lie within one (see `tile_rows`).
    first: index of the first row.
    size: how many rows; a multiple of `rows`.
    rows: of one tile.
    add: `(tile, start, y) -> y`, where the tile (or pytree of them) starts
      `start` rows after the first.
    y: what `add` works on.
  """
  total = max(w.shape[0] for w in jax.tree.leaves(weights))

  def step(t, y):
    def cut(w):
      group = total // w.shape[0]
      return jax.lax.dynamic_slice_in_dim(w, (first + t * rows) // group, max(1, rows // group))

    return add(jax.tree.map(cut, weights), t * rows, y)

  if rows == size:
    return step(0, y)
  return jax.lax.fori_loop(0, size // rows, step, y)


def tile_rows(size: int, row_elements: int, group: int = 1) -> int:
  """Rows of a tile of a matrix of `size` rows.

  The largest divisor of `size` that a tile holds and that is whole groups of
  rows, or lies within one; all rows on other platforms than CPUs, and where all
  divisors are very small.
  """
  if jax.default_backend() != "cpu":
    return size
  most = max(1, tile_bytes() // (4 * row_elements))
  rows = max(
    d for d in range(1, min(most, size) + 1) if size % d == 0 and (d % group == 0 or group % d == 0)
  )
  return rows if 8 * rows >= min(most, size) else size


def rms_norm(
  x: jax.Array,
  weight: jax.Array,
  epsilon: float,
  weight_in_float32: bool = False,
  split: str | None = None,
) -> jax.Array:
  """Root-mean-square normalization over the axes that `weight` has.

  Computed in float32 and rounded to the dtype of `x`.

  Args:
    x: `[..., *weight.shape]`.
    weight: normalizes jointly over all its axes.
    epsilon: added to the mean square.
    weight_in_float32: whether it is rounded once, after the weight is applied
      (GPT-OSS), or before it and after (the others).
    split: the mesh axis along which devices may hold parts of the normalized axes.
  """
  weight = to_compute_dtype(weight)
  axes = tuple(range(-weight.ndim, 0))
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(x32), axis=axes, keepdims=True)
  if split is not None:
    mean_square = collectives.pmean(mean_square, split)
  normed = x32 * jax.lax.rsqrt(mean_square + epsilon)
  weight = jnp.broadcast_to(weight, x.shape)
  if weight_in_float32:
    return rounded(normed * weight.astype(jnp.float32), x.dtype)
  return multiply(rounded(normed, x.dtype), weight)
