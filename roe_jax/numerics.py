"""Contractions and normalization with explicit precision, and how weights are read.

Every weight matrix is stored with the model width D last, stacked over layers:
`[L, out, D]` if it projects from the model width, `[L, in, D]` if it projects back to
it. So consecutive rows of a layer's matrix are a contiguous tile of any size.

On CPUs XLA copies a slice of a stack before multiplying it. There, matrices are read
tile by tile, so that the copy stays in the core's cache (measured: 1.5 times the time
to read the weights, instead of 2.2). The same loop converts weights that are stored as
bfloat16 bits (`storage_dtype`). Where XLA spreads every operation over several cores,
tiles are larger: handing out a small one takes longer than computing it.

With few tokens, `project` and `project_back` use the kernels of `native` where those are available.
Both also read matrices that are `quantization.Quantized`, and dequantize them tile by tile.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import collectives, kernel_check, native, quantization

# Bytes of a tile in float32. On one core it must fit the L2 cache; on several cores this
# size, a whole expert, was fastest.
ONE_CORE_TILE = 512 * 1024
TILE = 4 * 1024 * 1024
# Most tokens for which the native kernels multiply with a matrix.
NATIVE_TOKENS = 64


def einsum(subscripts: str, x: jax.Array, weights: jax.Array) -> jax.Array:
  """Computes `jnp.einsum` with float32 accumulation and result.

  float32 operands are multiplied in full float32 on every platform (GPUs and TPUs
  default to less); bfloat16 operands stay bfloat16. With weights in float32 or
  stored as bits, both operands are float32. Batch axes must lead the result:
  otherwise XLA's CPU backend fails on some bfloat16 dots.
  """
  if weights.dtype == jnp.uint16:
    weights = bits_to_float32(weights)
  if weights.dtype == jnp.float32:
    x = x.astype(jnp.float32)
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jnp.einsum(subscripts, x, weights, precision=precision, preferred_element_type=jnp.float32)


def tile_bytes() -> int:
  """Returns the size of a tile for the number of cores that XLA uses."""
  return ONE_CORE_TILE if num_cores() == 1 else TILE


def num_cores() -> int:
  """Returns the number of cores that this process, and so XLA's CPU backend, may use."""
  if "NPROC" in os.environ:  # as XLA counts
    return int(os.environ["NPROC"])
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def storage_dtype(dtype: str) -> jnp.dtype:
  """Returns the dtype that stores weights and caches of a model dtype on this platform.

  XLA's CPU backend turns a loop over bfloat16 arrays into one over float32 copies.
  There bfloat16 is stored as uint16 bits, which it does not convert.
  """
  if dtype == "bfloat16" and jax.default_backend() == "cpu":
    return jnp.dtype(jnp.uint16)
  return jnp.dtype(dtype)


def to_storage_dtype(x: jax.Array, like: jax.Array) -> jax.Array:
  """Converts `x` to the storage dtype of `like`: bfloat16 bits, or its dtype."""
  if like.dtype == jnp.uint16:
    return jax.lax.bitcast_convert_type(rounded(x, jnp.bfloat16), jnp.uint16)
  return x.astype(like.dtype)


def to_compute_dtype(x: jax.Array) -> jax.Array:
  """Converts bfloat16 bits to bfloat16; returns other arrays as they are."""
  return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Rounds `x` to `dtype`, never optimized away.

  XLA drops a conversion to bfloat16 that is followed by one to float32, depending on
  what it fuses: one token would be rounded differently from several.
  """
  if dtype == jnp.bfloat16:
    x = jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
  return x.astype(dtype)


def add(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns `x + y`, computed in float32 and rounded to the dtype of `x`."""
  return rounded(x.astype(jnp.float32) + y.astype(jnp.float32), x.dtype)


def multiply(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns `x * y`, computed in float32 and rounded to the dtype of `x`."""
  return rounded(x.astype(jnp.float32) * y.astype(jnp.float32), x.dtype)


def add_bias(x: jax.Array, bias: jax.Array | None, layer: jax.Array | int) -> jax.Array:
  """Adds the layer's bias `[L, *last axes of x]`, or None, to float32 `x`."""
  if bias is None:
    return x
  return x + jnp.broadcast_to(to_compute_dtype(bias[layer]).astype(jnp.float32), x.shape)


def bits_to_float32(bits: jax.Array) -> jax.Array:
  """Converts bfloat16 bits to float32 values."""
  return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def project(x: jax.Array, weights: Any, layer: jax.Array | int) -> jax.Array:
  """Computes `x @ weights[layer].T`: from the model width to a matrix's other axes.

  Args:
    x: `[..., D]`.
    weights: `[L, *out, D]`, or `Quantized` along D.
    layer: may be traced.

  Returns:
    `[..., *out]` float32.
  """
  codes = quantization.codes_and_scales(weights)[0]
  y = _product(weights, _project_tiled)(x, _with_rows(weights), layer)
  return y.reshape(*x.shape[:-1], *codes.shape[1:-1])


def _project_tiled(x, weights, layer):
  size = quantization.codes_and_scales(weights)[0].shape[1]
  rows = tile_rows(size, x.shape[-1])

  def add(tile, start, y):
    tile = quantization.tile_weights(tile, x.dtype)
    parts = zip(jnp.split(x, len(tile), axis=-1), tile)
    part = jnp.asarray(sum(einsum("...d,td->...t", *part) for part in parts))
    return jax.lax.dynamic_update_slice_in_dim(y, part, start, y.ndim - 1)

  y = jnp.zeros((*x.shape[:-1], size), jnp.float32)
  return loop_over_tiles(_merged(weights), layer * size, size, rows, add, y)


def project_back(x: jax.Array, weights: Any, layer: jax.Array | int) -> jax.Array:
  """Computes `x @ weights[layer]`: from a matrix's other axes to the model width.

  Args:
    x: `[..., *in]`.
    weights: `[L, *in, D]`, or `Quantized` along the last axis of `in`.
    layer: may be traced.

  Returns:
    `[..., D]` float32.
  """
  inner = quantization.codes_and_scales(weights)[0].shape[1:-1]
  x = x.reshape(*x.shape[: -len(inner)], math.prod(inner))
  return _product(weights, _project_back_tiled)(x, _with_rows(weights), layer)


def _project_back_tiled(x, weights, layer):
  codes, scales, _ = quantization.codes_and_scales(weights)
  size, d = codes.shape[1], (codes if scales is None else scales).shape[2]
  rows = tile_rows(size, d, 1 if scales is None else size // scales.shape[1])

  def add(tile, start, y):
    part = jax.lax.dynamic_slice_in_dim(x, start, rows, x.ndim - 1)
    tile = quantization.tile_weights(tile, x.dtype)
    return y + jnp.concatenate([einsum("...t,td->...d", part, w) for w in tile], axis=-1)

  y = jnp.zeros((*x.shape[:-1], d), jnp.float32)
  return loop_over_tiles(_merged(weights), layer * size, size, rows, add, y)


def _with_rows(weights):
  """Merges the axes of a matrix, or its codes and scales, between the first and the last."""
  return jax.tree.map(lambda w: w.reshape(w.shape[0], -1, w.shape[-1]), weights)


def _merged(weights):
  return jax.tree.map(lambda w: w.reshape(-1, w.shape[-1]), weights)


_PRODUCTS = {_project_tiled: native.project, _project_back_tiled: native.project_back}
# Formats of matrices, by the dtype of those that are not quantized.
_KINDS = {"float32": "float32", "uint16": "bfloat16"}


def _kind(weights):
  """Returns the native kernels' name of a matrix's format; None if they have none."""
  codes, _, format = quantization.codes_and_scales(weights)
  return format or _KINDS.get(str(codes.dtype))


def _product(weights, tiled):
  """Returns the function of a product: with the native kernel, if that can multiply with these."""
  kind = _kind(weights)
  usable = kind is not None and quantization.codes_per_row(weights) % native.MULTIPLE == 0
  if usable and native.is_available() and _native_passes(kind):
    return _with_kernel(tiled, kind)
  return tiled


@functools.cache
def _with_kernel(tiled, kind):
  """Returns `tiled`, with the kernel for few tokens. A mapped axis of x is folded into tokens."""

  @jax.custom_batching.custom_vmap
  def folding(x, weights, layer):
    *lead, size = x.shape
    tokens = math.prod(lead)
    if tokens > NATIVE_TOKENS:
      return tiled(x, weights, layer)
    return _native(tiled, kind, x.reshape(tokens, size), weights, layer).reshape(*lead, -1)

  @folding.def_vmap
  def _(axis_size, in_batched, x, weights, layer):
    del axis_size
    if any(jax.tree.leaves(in_batched[1:])):
      axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(in_batched))
      return jax.vmap(tiled, in_axes=axes)(x, weights, layer), True
    return folding(x, weights, layer), True

  product = jax.custom_jvp(folding)
  product.defjvp(functools.partial(jax.jvp, tiled))
  return product


def _native(tiled, kind, x, weights, layer):
  codes, scales, _ = quantization.codes_and_scales(weights)
  return _PRODUCTS[tiled](kind, x, codes, scales, layer)


@functools.cache
def _native_passes(kind):
  """Checks the native kernels against the tiled products, on a small case."""

  def error():
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (9, 128))
    random = jax.random.normal(keys[1], (2, 128, 128))
    errors = []
    for tiled, axis in ((_project_tiled, -1), (_project_back_tiled, -2)):
      if kind in native.UNQUANTIZED:
        weights: Any = to_storage_dtype(random, jnp.zeros(0, storage_dtype(kind)))
      else:
        quantized = quantization.quantize(np.asarray(random), kind, axis)
        weights = jax.tree.map(jnp.asarray, quantized)
      found, right = _native(tiled, kind, x, weights, 1), tiled(x, weights, 1)
      errors.append(float(jnp.abs(found - right).max() / jnp.abs(right).max()))
    return max(errors)

  return kernel_check.passes(
    functools.partial(native.remembered, f"products_{kind}", error),
    1e-5,
    what=f"the native product with {kind} weights",
    instead="the tiled one",
  )


def loop_over_tiles(
  weights: Any, first: jax.Array | int, size: int, rows: int, add: Callable, y: jax.Array
) -> jax.Array:
  """Folds `add` over `size` rows of matrices in tiles of `rows`.

  Args:
    weights: a matrix `[N, ...]`, or a pytree of them. A matrix with fewer rows than the
      others has one row per group of theirs; tiles are then whole groups, or lie within
      one (see `tile_rows`).
    first: index of the first row.
    size: number of rows; a multiple of `rows`.
    rows: rows of one tile.
    add: `(tile, start, y) -> y`, for a tile (or pytree of them) that starts `start` rows
      after the first.
    y: the initial value.
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
  """Returns the rows per tile of a matrix of `size` rows.

  On CPUs, the largest divisor of `size` that fits a tile and is whole groups of rows,
  or lies within one. All rows on other platforms, and where such divisors are tiny.
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
  """Applies RMSNorm jointly over the axes of `weight`, in float32; rounds to `x.dtype`.

  Args:
    x: `[..., *weight.shape]`.
    weight: the scale.
    epsilon: added to the mean square.
    weight_in_float32: whether to round once, after applying the weight (GPT-OSS), or
      before and after (other families).
    split: the mesh axis that may shard the normalized axes.
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


class NonFiniteLogits(FloatingPointError):
  """Logits that are NaN or infinite.

  Attributes:
    sequence: index of the sequence, or a name that a program gives it.
    position: index of the first token at which they were seen; they predict the next one. The
      cause may be a later token of the same chunk, since masked attention multiplies it by zero.
  """

  def __init__(self, sequence: int | str, position: int):
    name = sequence if isinstance(sequence, str) else f"sequence {sequence} (counted from 0)"
    super().__init__(
      f"the logits of {name} at position {position} are NaN or infinite: a parameter is not "
      "finite, or activations overflow in the compute dtype (try float32)"
    )
    self.sequence, self.position = sequence, position


@contextlib.contextmanager
def naming_sequences(names: Sequence[int] | Sequence[str]) -> Iterator[None]:
  """Renames the sequence of a `NonFiniteLogits` error to its entry in `names`."""
  try:
    yield
  except NonFiniteLogits as error:
    assert isinstance(error.sequence, int)
    raise NonFiniteLogits(names[error.sequence], error.position) from None
