"""Experts applied to blocks of rows on GPUs, as Pallas kernels lowered to Triton.

State of things: run in Pallas' interpret mode on CPU, lowered for CUDA, and the
lowered kernels compiled for an H100 by Triton and ptxas, with weights in bfloat16
and in each quantized format (no spills but of 20 bytes in mxfp4's with 64 rows in a
block); not run or timed on a GPU.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from roe_jax.quantization import (
  codes_and_scales,
  decode_codes,
  decode_scales,
  weights_per_code,
  weights_per_scale,
)

# Powers of two, as Triton wants them, and no less than 16 in a matmul.
OUT_TILE = 64  # of the columns that a program computes
SUM_BYTES = 128  # of each row of a tile of the axis that it sums over in steps


def apply_on_gpu(activation, experts, weights, x, interpret=False):
  """The output of block k's expert for its rows.

  Args:
    activation: between the projections.
    experts: `[K]` int32 indices into the leading axis of the weights; a negative
      one for a block that is not in use.
    weights: of all layers, with `[L·E, ...]` for the leading axes; the bias of
      `down` is not used. The matrices may be `Quantized`; Triton then wants
      D/2 and the groups to be multiples of 16.
    x: `[K, B, D]` rows in blocks, of the dtype of weights that are not quantized;
      B is a power of two, and 16 or more.
    interpret: whether to run the kernels as JAX operations on any platform.

  Returns:
    `[K, B, D]` in float32, without the bias of `down`; undefined in blocks that
    are not in use.
  """
  k, b, d = x.shape

  def call(kernel, width, columns, dtype, sum_tile, *inputs):
    # Blocks vary fastest, so that neighbors of one expert share a tile of its
    # weights in the cache.
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
  # Within a tile of quantized weights those of an output have one scale.
  tile = most if scales is None else math.gcd(most, width, weights_per_scale(scales, 3, d))
  hidden = call(
    functools.partial(_hidden_kernel, activation=activation, format=format),
    f,
    f,
    x.dtype,
    tile,
    x,
    codes,
    scales,
    weights.gate_up_bias,
  )

  codes, scales, format = codes_and_scales(weights.down)
  tile = most if scales is None else math.gcd(most, weights_per_scale(scales, 1, f))
  return call(
    functools.partial(_down_kernel, format=format),
    d,
    codes.shape[2],
    jnp.float32,
    tile,
    hidden,
    codes,
    scales,
  )


def _precision(dtype):
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _tile(index, size, limit):
  """The index of a tile as a slice, and which of its elements lie below `limit`."""
  return pl.ds(index * size, size), index * size + jnp.arange(size) < limit


def _shifted(tile, by):
  return pl.ds(tile.start + by, tile.size)


def _load(ref, mask):
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
  """`activation(gate x, up x)` of one block for one tile of F.

  All arrays are whole, with P weights in a code: experts `[K]`, x `[K, B, D]`, codes
  `[L·E, F, 2, D/P]`, scales `[L·E, F, 2, G]` or None, bias `[L·E, F, 2]` or None, and
  hidden `[K, B, F]`.
  """
  block, (_, b, model_width), width = pl.program_id(0), x_ref.shape, codes_ref.shape[3]
  expert = experts_ref[block]
  f, in_f = _tile(pl.program_id(1), OUT_TILE, hidden_ref.shape[2])

  def scaled(product, c, first):
    if scales_ref is None:
      return product
    group = first // weights_per_scale(scales_ref, 3, model_width)
    scales = _load(scales_ref.at[expert, f, jnp.int32(c), group], in_f)
    return product * decode_scales(scales)[None, :]

  @pl.when(expert >= 0)
  def _():
    def step(i, sums):
      d, in_d = _tile(i, sum_tile, width)
      x = [
        _load(
          x_ref.at[block, :, _shifted(d, part * width)],
          jnp.broadcast_to(in_d[None, :], (b, sum_tile)),
        )
        for part in range(weights_per_code(format))
      ]
      sums = list(sums)
      for c in (0, 1):
        codes = _load(codes_ref.at[expert, f, jnp.int32(c), d], in_f[:, None] & in_d[None, :])
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
        p + _load(bias_ref.at[expert, f, jnp.int32(c)], in_f).astype(jnp.float32)[None, :]
        for c, p in enumerate(projected)
      ]
    hidden = activation(*projected).astype(hidden_ref.dtype)
    plgpu.store(
      hidden_ref.at[block, :, f], hidden, mask=jnp.broadcast_to(in_f[None, :], hidden.shape)
    )


def _down_kernel(
  experts_ref, hidden_ref, codes_ref, scales_ref, out_ref, *, format, sum_tile, precision
):
  """One block's output for one tile of each part of D.

  All arrays are whole, with P weights in a code: experts `[K]`, hidden `[K, B, F]`,
  codes `[L·E, F, D/P]`, scales `[L·E, G, D]` or None, and out `[K, B, D]`.
  """
  block, (_, b, width) = pl.program_id(0), hidden_ref.shape
  expert, columns = experts_ref[block], codes_ref.shape[2]
  d, in_d = _tile(pl.program_id(1), OUT_TILE, columns)

  def scaled(product, part, f):
    if scales_ref is None:
      return product
    group = f.start // weights_per_scale(scales_ref, 1, width)
    scales = _load(scales_ref.at[expert, group, _shifted(d, part * columns)], in_d)
    return product * decode_scales(scales)[None, :]

  @pl.when(expert >= 0)
  def _():
    def step(i, totals):
      f, in_f = _tile(i, sum_tile, width)
      hidden = _load(hidden_ref.at[block, :, f], jnp.broadcast_to(in_f[None, :], (b, sum_tile)))
      codes = _load(codes_ref.at[expert, f, d], in_f[:, None] & in_d[None, :])
      return [
        total
        + scaled(plgpu.dot(hidden, weights.astype(hidden.dtype), precision=precision), part, f)
        for part, (total, weights) in enumerate(zip(totals, decode_codes(codes, format)))
      ]

    totals = [jnp.zeros((b, OUT_TILE), jnp.float32)] * weights_per_code(format)
    totals = jax.lax.fori_loop(0, pl.cdiv(width, sum_tile), step, totals)
    for part, out in enumerate(totals):
      plgpu.store(
        out_ref.at[block, :, _shifted(d, part * columns)],
        out,
        mask=jnp.broadcast_to(in_d[None, :], out.shape),
      )
