"""Experts applied to blocks of rows on TPUs, as Pallas kernels.

The experts of the blocks are fetched ahead of the grid and choose the tiles of
weights, which Pallas' pipeline copies from main memory into VMEM while the one
before is multiplied. Of consecutive blocks of one expert only the first has a
tile copied, as tiles vary slowest.

State of things: run in Pallas' interpret mode on CPU, and compiled for a TPU v5e
without one; not run or timed on a TPU. Blocks of 64 rows in float32 with F = 14336
do not fit into its VMEM.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Of a tile of weights, two of which are in VMEM at a time.
TILE_BYTES = 2**21


def apply_on_tpu(experts, gate_up, down, x, interpret=False):
  """The output of block k's expert for its rows.

  Args:
    experts: `[K]` int32 indices into the leading axis of the weights; a negative
      one for a block that is not in use.
    gate_up: `[L·E, F, 2, D]`.
    down: `[L·E, F, D]`.
    x: `[K, B, D]` rows in blocks, of the dtype of the weights.
    interpret: whether to run the kernels as JAX operations on any platform.

  Returns:
    `[K, B, D]` in float32, undefined in blocks that are not in use.
  """
  k, b, d = x.shape
  f = down.shape[1]

  def call(kernel, width, tile, inputs, weights, weights_block, weights_index, dtype):
    return pl.pallas_call(
        kernel, jax.ShapeDtypeStruct((k, b, width), dtype), interpret=interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(pl.cdiv(width, tile), k),
            in_specs=[
                pl.BlockSpec((None, *inputs.shape[1:]), lambda t, k, experts: (k, 0, 0)),
                pl.BlockSpec(weights_block, lambda t, k, experts: (
                    jnp.maximum(experts[k], 0), *weights_index(t)))],
            out_specs=pl.BlockSpec((None, b, tile), lambda t, k, experts: (k, 0, t))),
    )(experts, inputs, weights)

  tile = _tile(f, 2 * d * x.dtype.itemsize)
  hidden = call(_hidden_kernel, f, tile, x, gate_up, (None, tile, 2, d),
                lambda t: (t, 0, 0), x.dtype)
  tile = _tile(d, f * x.dtype.itemsize)
  return call(_down_kernel, d, tile, hidden, down, (None, f, tile),
              lambda t: (0, t), jnp.float32)


def _tile(size, bytes_each):
  """A multiple of 128, or all of `size`; about `TILE_BYTES`."""
  return min(size, max(128, TILE_BYTES // bytes_each // 128 * 128))


def _dot(x, weights, axis):
  """`[B, K]` rows times a matrix, summed over its `axis`; float32."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jax.lax.dot_general(x, weights, (((1,), (axis,)), ((), ())), precision=precision,
                             preferred_element_type=jnp.float32)


def _hidden_kernel(experts_ref, x_ref, gate_up_ref, hidden_ref):
  """x `[B, D]`, gate_up `[tile, 2, D]`, hidden `[B, tile]`."""
  @pl.when(experts_ref[pl.program_id(1)] >= 0)
  def _():
    gate, up = (_dot(x_ref[...], gate_up_ref[:, i], 1) for i in (0, 1))
    hidden_ref[...] = (jax.nn.silu(gate) * up).astype(hidden_ref.dtype)


def _down_kernel(experts_ref, hidden_ref, down_ref, out_ref):
  """hidden `[B, F]`, down `[F, tile]`, out `[B, tile]` in float32."""
  @pl.when(experts_ref[pl.program_id(1)] >= 0)
  def _():
    out_ref[...] = _dot(hidden_ref[...], down_ref[...], 0)
