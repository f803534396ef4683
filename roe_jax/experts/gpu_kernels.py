"""Experts applied to blocks of rows on GPUs, as Pallas kernels lowered to Triton.

State of things: run in Pallas' interpret mode on CPU, lowered for CUDA, and the
lowered kernels compiled to PTX for an H100 by Triton; not run or timed on a GPU.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

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
      `down` is not used.
    x: `[K, B, D]` rows in blocks, of the dtype of the weights; B is a power of
      two, and 16 or more.
    interpret: whether to run the kernels as JAX operations on any platform.

  Returns:
    `[K, B, D]` in float32, without the bias of `down`; undefined in blocks that
    are not in use.
  """
  k, b, _ = x.shape

  def call(kernel, width, dtype, *inputs):
    # Blocks vary fastest, so that neighbours of one expert share a tile of its
    # weights in the cache.
    return pl.pallas_call(
        functools.partial(kernel, sum_tile=SUM_BYTES // x.dtype.itemsize,
                          precision=_precision(x.dtype)),
        jax.ShapeDtypeStruct((k, b, width), dtype),
        grid=(k, pl.cdiv(width, OUT_TILE)), interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=4))(experts, *inputs)

  f, d = weights.down.shape[1:]
  hidden = call(functools.partial(_hidden_kernel, activation=activation), f, x.dtype,
                x, weights.gate_up, weights.gate_up_bias)
  return call(_down_kernel, d, jnp.float32, hidden, weights.down)


def _precision(dtype):
  return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _tile(index, size, limit):
  """The index of a tile as a slice, and which of its elements lie below `limit`."""
  return pl.ds(index * size, size), index * size + jnp.arange(size) < limit


def _load(ref, mask):
  return plgpu.load(ref, mask=mask, other=0)


def _hidden_kernel(experts_ref, x_ref, gate_up_ref, bias_ref, hidden_ref, *, activation,
                   sum_tile, precision):
  """`activation(gate x, up x)` of one block for one tile of F.

  All arrays are whole: experts `[K]`, x `[K, B, D]`, gate_up `[L·E, F, 2, D]`, bias
  `[L·E, F, 2]` or None, and hidden `[K, B, F]`.
  """
  block, (_, b, width) = pl.program_id(0), x_ref.shape
  expert = experts_ref[block]
  f, in_f = _tile(pl.program_id(1), OUT_TILE, hidden_ref.shape[2])

  @pl.when(expert >= 0)
  def _():
    def step(i, sums):
      d, in_d = _tile(i, sum_tile, width)
      x = _load(x_ref.at[block, :, d], jnp.broadcast_to(in_d[None, :], (b, sum_tile)))
      mask = in_f[:, None] & in_d[None, :]
      return [total + plgpu.dot(x, _load(gate_up_ref.at[expert, f, jnp.int32(c), d], mask),
                                trans_b=True, precision=precision)
              for c, total in enumerate(sums)]

    zeros = jnp.zeros((b, OUT_TILE), jnp.float32)
    projected = jax.lax.fori_loop(0, pl.cdiv(width, sum_tile), step, [zeros, zeros])
    if bias_ref is not None:
      projected = [
          p + _load(bias_ref.at[expert, f, jnp.int32(c)], in_f).astype(jnp.float32)[None, :]
          for c, p in enumerate(projected)]
    hidden = activation(*projected).astype(hidden_ref.dtype)
    plgpu.store(hidden_ref.at[block, :, f], hidden,
                mask=jnp.broadcast_to(in_f[None, :], hidden.shape))


def _down_kernel(experts_ref, hidden_ref, down_ref, out_ref, *, sum_tile, precision):
  """One block's output for one tile of D.

  All arrays are whole: experts `[K]`, hidden `[K, B, F]`, down `[L·E, F, D]` and
  out `[K, B, D]`.
  """
  block, (_, b, width) = pl.program_id(0), hidden_ref.shape
  expert = experts_ref[block]
  d, in_d = _tile(pl.program_id(1), OUT_TILE, out_ref.shape[2])

  @pl.when(expert >= 0)
  def _():
    def step(i, total):
      f, in_f = _tile(i, sum_tile, width)
      hidden = _load(hidden_ref.at[block, :, f],
                     jnp.broadcast_to(in_f[None, :], (b, sum_tile)))
      weights = _load(down_ref.at[expert, f, d], in_f[:, None] & in_d[None, :])
      return total + plgpu.dot(hidden, weights, precision=precision)

    out = jax.lax.fori_loop(0, pl.cdiv(width, sum_tile), step,
                            jnp.zeros((b, OUT_TILE), jnp.float32))
    plgpu.store(out_ref.at[block, :, d], out,
                mask=jnp.broadcast_to(in_d[None, :], out.shape))
