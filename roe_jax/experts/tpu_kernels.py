"""Experts applied to blocks of rows on TPUs, as Pallas kernels.

The experts of the blocks are fetched ahead of the grid and choose the tiles of
weights, which Pallas' pipeline copies from main memory into VMEM while the one
before is multiplied. Of consecutive blocks of one expert only the first has a
tile copied, as tiles vary slowest.

State of things: run in Pallas' interpret mode on CPU, and compiled for a TPU v5e
without one; not run or timed on a TPU. Blocks of 64 rows in float32 with F = 14336
do not fit into its VMEM.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Of a tile of weights, two of which are in VMEM at a time.
TILE_BYTES = 2**21


def apply_on_tpu(activation, experts, weights, x, interpret=False):
  """The output of block k's expert for its rows.

  Args:
    activation: between the projections.
    experts: `[K]` int32 indices into the leading axis of the weights; a negative
      one for a block that is not in use.
    weights: of all layers, with `[L·E, ...]` for the leading axes; the bias of
      `down` is not used.
    x: `[K, B, D]` rows in blocks, of the dtype of the weights.
    interpret: whether to run the kernels as JAX operations on any platform.

  Returns:
    `[K, B, D]` in float32, without the bias of `down`; undefined in blocks that
    are not in use.
  """
  k, b, d = x.shape
  f = weights.down.shape[1]

  def call(kernel, width, tile, dtype, rows, weights, specs):
    return pl.pallas_call(
        kernel, jax.ShapeDtypeStruct((k, b, width), dtype), interpret=interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(pl.cdiv(width, tile), k),
            in_specs=[
                pl.BlockSpec((None, *rows.shape[1:]), lambda t, k, experts: (k, 0, 0)),
                *specs],
            out_specs=pl.BlockSpec((None, b, tile), lambda t, k, experts: (k, 0, t))),
    )(experts, rows, *weights)

  tile = _tile(f, 2 * d * x.dtype.itemsize)
  bias, bias_spec = weights.gate_up_bias, None
  if bias is not None:  # with F last, as the hidden values have it; little next to the weights
    bias = bias[jnp.maximum(experts, 0)].swapaxes(1, 2)
    bias_spec = pl.BlockSpec((None, 2, tile), lambda t, k, experts: (k, 0, t))
  hidden = call(functools.partial(_hidden_kernel, activation=activation), f, tile, x.dtype, x,
                (weights.gate_up, bias),
                (_of_expert((tile, 2, d), lambda t: (t, 0, 0)), bias_spec))
  tile = _tile(d, f * x.dtype.itemsize)
  return call(_down_kernel, d, tile, jnp.float32, hidden, (weights.down,),
              (_of_expert((f, tile), lambda t: (0, t)),))


def _of_expert(shape, index):
  """A tile of the block's expert: its shape, and its place by the number of the tile."""
  return pl.BlockSpec(
      (None, *shape), lambda t, k, experts: (jnp.maximum(experts[k], 0), *index(t)))


def _tile(size, bytes_each):
  """A multiple of 128, or all of `size`; about `TILE_BYTES`."""
  return min(size, max(128, TILE_BYTES // bytes_each // 128 * 128))


def _dot(x, weights, axis):
  """`[B, K]` rows times a matrix, summed over its `axis`; float32."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jax.lax.dot_general(x, weights, (((1,), (axis,)), ((), ())), precision=precision,
                             preferred_element_type=jnp.float32)


def _hidden_kernel(experts_ref, x_ref, gate_up_ref, bias_ref, hidden_ref, *, activation):
  """x `[B, D]`, gate_up `[tile, 2, D]`, bias `[2, tile]` or None, hidden `[B, tile]`."""
  @pl.when(experts_ref[pl.program_id(1)] >= 0)
  def _():
    projected = [_dot(x_ref[...], gate_up_ref[:, c], 1) for c in (0, 1)]
    if bias_ref is not None:
      projected = [p + bias_ref[c:c + 1].astype(jnp.float32) for c, p in enumerate(projected)]
    hidden_ref[...] = activation(*projected).astype(hidden_ref.dtype)


def _down_kernel(experts_ref, hidden_ref, down_ref, out_ref):
  """hidden `[B, F]`, down `[F, tile]`, out `[B, tile]` in float32."""
  @pl.when(experts_ref[pl.program_id(1)] >= 0)
  def _():
    out_ref[...] = _dot(hidden_ref[...], down_ref[...], 0)
