"""Experts applied to blocks of tokens on GPUs: Pallas kernels lowered to Triton.

Status: tested in Pallas' interpret mode on CPU; lowered for CUDA and compiled for an H100
by Triton and ptxas, with bfloat16 weights and each quantized format (no register spills,
except 20 bytes for mxfp4 with blocks of 64 tokens); not run or timed on a GPU.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from roe_jax.lazy_modules import pl, plgpu
from roe_jax.quantization import (
  codes_and_scales,
  decode_codes,
  decode_scales,
  weights_per_code,
  weights_per_scale,
)

# Powers of two, as Triton requires, and at least 16 in a matmul.
OUT_TILE = 64  # columns that a program computes
SUM_BYTES = 128  # bytes per step along the axis that a program sums over


def apply_on_gpu(activation, experts, weights, x, interpret=False):
  """Applies block k's expert to its tokens.

  Args:
    activation: activation between the projections.
    experts: `[K]` int32 indices into the leading axis of the weights; negative for an
      unused block.
    weights: weights of all layers `[L·E, ...]`; `down_bias` is not used. The matrices may
      be `Quantized`; Triton then requires D/2 and group sizes to be multiples of 16.
    x: `[K, B, D]` tokens in blocks, in the dtype of unquantized weights; B is a power of
      two, at least 16.
    interpret: whether to run in Pallas' interpret mode, on any platform.

  Returns:
    `[K, B, D]` float32, without `down_bias`; undefined in unused blocks.
  """
  k, b, d = x.shape

  def call(kernel, width, columns, dtype, sum_tile, *inputs):
    # Blocks vary fastest, so that neighboring blocks of one expert share its tile in cache.
    return pl.pallas_call(
      functools.partial(kernel, sum_tile=sum_tile, precision=_precision(x.dtype)),
      jax.ShapeDtypeStruct((k, b, width), dtype),
      grid=(k, pl.cdiv(columns, OUT_TILE)),
      interpret=interpret,
      compiler_params=plgpu.CompilerParams(num_warps=4),
    )(experts, *inputs)

  most = SUM_BYTES // x.dtype.itemsize
  codes, scales, format = codes_and_scales(weights.gate_up)
  f, _, width = codes.shape[1:]
  # Within a tile, quantized weights of one output share a scale.
  tile = most if scales is None else math.gcd(most, width, weights_per_scale(scales, 3, d))
  kernel = functools.partial(_hidden_kernel, activation=activation, format=format)
  hidden = call(kernel, f, f, x.dtype, tile, x, codes, scales, weights.gate_up_bias)

  codes, scales, format = codes_and_scales(weights.down)
  tile = most if scales is None else math.gcd(most, weights_per_scale(scales, 1, f))
  kernel = functools.partial(_down_kernel, format=format)
  return call(kernel, d, codes.shape[2], jnp.float32, tile, hidden, codes, scales)


def _precision(dtype):
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def tile_at(index: Any, size: int, limit: int) -> tuple[Any, jax.Array]:
  """Returns a tile as a slice, and the mask of its elements below `limit`."""
  return pl.ds(index * size, size), index * size + jnp.arange(size) < limit


def shifted(tile: Any, by: int) -> Any:
  return pl.ds(tile.start + by, tile.size)


def load(ref: Any, mask: jax.Array) -> jax.Array:
  """Loads from `ref`, with zeros where `mask` is false."""
  return plgpu.load(ref, mask=mask, other=0)


def _hidden_kernel(
  experts_ref,
  x_ref,
  codes_ref,
  scales_ref,
  bias_ref,
  hidden_ref,
  *,
  activation,
  format,
  sum_tile,
  precision,
):
  """Computes `activation(gate x, up x)` of one block for one tile of F.

  Refs are whole arrays, with P weights per code: experts `[K]`, x `[K, B, D]`, codes
  `[L·E, F, 2, D/P]`, scales `[L·E, F, 2, G]` or None, bias `[L·E, F, 2]` or None, and
  hidden `[K, B, F]`.
  """
  block, (_, b, model_width), width = pl.program_id(0), x_ref.shape, codes_ref.shape[3]
  expert = experts_ref[block]
  f, in_f = tile_at(pl.program_id(1), OUT_TILE, hidden_ref.shape[2])

  def scaled(product, c, first):
    if scales_ref is None:
      return product
    group = first // weights_per_scale(scales_ref, 3, model_width)
    scales = load(scales_ref.at[expert, f, jnp.int32(c), group], in_f)
    return product * decode_scales(scales)[None, :]

  @pl.when(expert >= 0)
  def _():
    def step(i, sums):
      d, in_d = tile_at(i, sum_tile, width)
      x = [
        load(
          x_ref.at[block, :, shifted(d, part * width)],
          jnp.broadcast_to(in_d[None, :], (b, sum_tile)),
        )
        for part in range(weights_per_code(format))
      ]
      sums = list(sums)
      for c in (0, 1):
        codes = load(codes_ref.at[expert, f, jnp.int32(c), d], in_f[:, None] & in_d[None, :])
        for part, weights in enumerate(decode_codes(codes, format)):
          product = plgpu.dot(
            x[part], weights.astype(x_ref.dtype), trans_b=True, precision=precision
          )
          sums[c] += scaled(product, c, d.start + part * width)
      return sums

    zeros = jnp.zeros((b, OUT_TILE), jnp.float32)
    projected = jax.lax.fori_loop(0, pl.cdiv(width, sum_tile), step, [zeros, zeros])
    if bias_ref is not None:
      projected = [
        p + load(bias_ref.at[expert, f, jnp.int32(c)], in_f).astype(jnp.float32)[None, :]
        for c, p in enumerate(projected)
      ]
    hidden = activation(*projected).astype(hidden_ref.dtype)
    plgpu.store(
      hidden_ref.at[block, :, f], hidden, mask=jnp.broadcast_to(in_f[None, :], hidden.shape)
    )


def _down_kernel(
  experts_ref, hidden_ref, codes_ref, scales_ref, out_ref, *, format, sum_tile, precision
):
  """Computes one block's output for one tile of each half of D.

  Refs are whole arrays, with P weights per code: experts `[K]`, hidden `[K, B, F]`,
  codes `[L·E, F, D/P]`, scales `[L·E, G, D]` or None, and out `[K, B, D]`.
  """
  block, (_, b, width) = pl.program_id(0), hidden_ref.shape
  expert, columns = experts_ref[block], codes_ref.shape[2]
  d, in_d = tile_at(pl.program_id(1), OUT_TILE, columns)

  def scaled(product, part, f):
    if scales_ref is None:
      return product
    group = f.start // weights_per_scale(scales_ref, 1, width)
    scales = load(scales_ref.at[expert, group, shifted(d, part * columns)], in_d)
    return product * decode_scales(scales)[None, :]

  @pl.when(expert >= 0)
  def _():
    def step(i, totals):
      f, in_f = tile_at(i, sum_tile, width)
      hidden = load(hidden_ref.at[block, :, f], jnp.broadcast_to(in_f[None, :], (b, sum_tile)))
      codes = load(codes_ref.at[expert, f, d], in_f[:, None] & in_d[None, :])
      return [
        total
        + scaled(plgpu.dot(hidden, weights.astype(hidden.dtype), precision=precision), part, f)
        for part, (total, weights) in enumerate(zip(totals, decode_codes(codes, format)))
      ]

    totals = [jnp.zeros((b, OUT_TILE), jnp.float32)] * weights_per_code(format)
    totals = jax.lax.fori_loop(0, pl.cdiv(width, sum_tile), step, totals)
    for part, out in enumerate(totals):
      plgpu.store(
        out_ref.at[block, :, shifted(d, part * columns)],
        out,
        mask=jnp.broadcast_to(in_d[None, :], out.shape),
      )
