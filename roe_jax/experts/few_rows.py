"""Kernels over the selected experts, for few rows on an accelerator.

With one or a few rows, as in decoding, the time is that of reading weights. The
kernels here read the weights of each selected expert where they lie, once a
(row, choice) pair, and write only hidden values and partial outputs.

State of things: the GPU's kernels were run in Pallas' interpret mode on CPU,
lowered for CUDA, and compiled to PTX for an H100 by Triton (16-byte loads, no
spills); not run or timed on a GPU. For TPUs see `tpu_kernels`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from roe_jax.experts.activation import Activation
from roe_jax.experts.packing import combine
from roe_jax.experts.tpu_kernels import apply_on_tpu
from roe_jax.params import ExpertParams

# Tiles of the GPU's kernels, powers of two as Triton wants them. A program keeps
# a float32 sum for each element of a tile, 32 a thread of 4 warps. One row of 8
# choices in OLMoE (D = 2048, F = 1024) makes 512 programs of either kernel, 4 for
# each of the 132 multiprocessors of an H100 or H200.
HIDDEN_TILE = (16, 256)  # of F and of D, which is summed over in steps
DOWN_TILE = (32, 128)  # of F, which is summed over in steps, and of D
DOWN_SPLIT = 256  # how much of F one program sums over


def selected(num_experts: int, activation: Activation, weights: ExpertParams,
             layer: jax.Array | int, x: jax.Array, indices: jax.Array,
             gates: jax.Array) -> jax.Array:
  """Gate-weighted sum of the chosen experts' outputs, one pair at a time.

  Args:
    num_experts: E, the experts of one layer.
    activation: between the projections.
    weights: of all layers, with `[L·E, ...]` for the leading axes.
    layer: int32 scalar; may be traced.
    x: `[N, D]` rows, float32 or bfloat16, the dtype of the weights.
    indices: `[N, A]` int32 chosen experts of each row, in `[0, E)`.
    gates: `[N, A]` float32 weights of the chosen experts.

  Returns:
    `[N, D]`, dtype of `x`; products are accumulated in float32. It has no
    derivative and no batching rule, and wants `check_vma=False` in a `shard_map`.
  """
  def pairs(kernel):
    return functools.partial(by_pairs, kernel, num_experts, activation)
  return jax.lax.platform_dependent(
      weights, jnp.asarray(layer, jnp.int32), x, indices, gates,
      cuda=pairs(on_gpu), rocm=pairs(on_gpu), tpu=pairs(on_tpu),
      default=pairs(functools.partial(on_gpu, interpret=True)))


def by_pairs(kernel, num_experts, activation, weights, layer, x, indices, gates):
  """`selected` with `kernel(activation, experts [N, A], weights, x) -> [N, A, D]`."""
  experts = layer * num_experts + indices
  out = kernel(activation, experts, weights, x)
  if weights.down_bias is not None:
    out += weights.down_bias[experts]
  return combine(out, gates, x.dtype)


def on_tpu(activation, experts, weights, x, interpret=False):
  """The TPU's kernels: blocks of one row. Arguments and result as of `on_gpu`."""
  (n, a), d = experts.shape, x.shape[1]
  rows = jnp.broadcast_to(x[:, None], (n, a, d)).reshape(n * a, 1, d)
  out = apply_on_tpu(activation, experts.reshape(n * a), weights, rows, interpret)
  return out.reshape(n, a, d)


def on_gpu(activation, experts, weights, x, interpret=False):
  """The GPU's kernels, through the Triton lowering of Pallas.

  Args:
    activation: between the projections.
    experts: `[N, A]` int32 indices into the leading axis of the weights.
    weights: of all layers; the bias of `down` is not used.
    x: `[N, D]`.
    interpret: whether to run the kernels as JAX operations on any platform.

  Returns:
    `[N, A, D]` float32, without the bias of `down`.
  """
  (n, d), a, f = x.shape, experts.shape[1], weights.down.shape[1]
  pairs, splits = n * a, pl.cdiv(f, DOWN_SPLIT)
  experts = experts.reshape(pairs)
  # Tiles vary fastest, so that programs that run together read what lies together.
  tiles = [min(t, pl.next_power_of_2(s)) for t, s in zip(HIDDEN_TILE, (f, d))]
  hidden = pl.pallas_call(
      functools.partial(_hidden_kernel, activation=activation, choices=a, tiles=tiles),
      jax.ShapeDtypeStruct((pairs, f), x.dtype),
      grid=(pl.cdiv(f, tiles[0]), pairs), interpret=interpret,
      compiler_params=plgpu.CompilerParams(num_warps=4),
      name="selected_experts_hidden")(experts, x, weights.gate_up, weights.gate_up_bias)
  tiles = [min(t, pl.next_power_of_2(s)) for t, s in zip(DOWN_TILE, (f, d))]
  partial = pl.pallas_call(
      functools.partial(_down_kernel, tiles=tiles),
      jax.ShapeDtypeStruct((pairs, splits, d), jnp.float32),
      grid=(pl.cdiv(d, tiles[1]), splits, pairs), interpret=interpret,
      compiler_params=plgpu.CompilerParams(num_warps=4),
      name="selected_experts_down")(experts, hidden, weights.down)
  return partial.reshape(n, a, splits, d).sum(2)


def _tile(index, size, limit):
  """The index of a tile as a slice, and which of its elements lie below `limit`."""
  return pl.ds(index * size, size), index * size + jnp.arange(size) < limit


def _load(ref, mask):
  """What `ref` points to, in float32, with zeros where `mask` is false."""
  return plgpu.load(ref, mask=mask, other=0).astype(jnp.float32)


def _hidden_kernel(experts_ref, x_ref, gate_up_ref, bias_ref, hidden_ref, *, activation,
                   choices, tiles):
  """`activation(gate x, up x)` of one pair for one tile of F.

  All arrays are whole: experts `[N·A]`, x `[N, D]`, gate_up `[L·E, F, 2, D]`, bias
  `[L·E, F, 2]` or None, and hidden `[N·A, F]`. Nothing but the tiles that are
  loaded leaves main memory.
  """
  pair, width = pl.program_id(1), x_ref.shape[1]
  expert, row = experts_ref[pair], pair // choices
  f, in_f = _tile(pl.program_id(0), tiles[0], hidden_ref.shape[1])

  def step(i, sums):
    d, in_d = _tile(i, tiles[1], width)
    x = _load(x_ref.at[row, d], in_d)[None, :]
    mask = in_f[:, None] & in_d[None, :]
    # The sum over D within a tile waits until the end: in the loop it would be
    # an exchange between threads.
    return [total + x * _load(gate_up_ref.at[expert, f, jnp.int32(c), d], mask)
            for c, total in enumerate(sums)]

  zeros = jnp.zeros(tiles, jnp.float32)
  sums = jax.lax.fori_loop(0, pl.cdiv(width, tiles[1]), step, [zeros, zeros])
  projected = [total.sum(1) for total in sums]
  if bias_ref is not None:
    projected = [p + _load(bias_ref.at[expert, f, jnp.int32(c)], in_f)
                 for c, p in enumerate(projected)]
  hidden = activation(*projected)
  plgpu.store(hidden_ref.at[pair, f], hidden.astype(hidden_ref.dtype), mask=in_f)


def _down_kernel(experts_ref, hidden_ref, down_ref, partial_ref, *, tiles):
  """One pair's output for one tile of D, summed over `DOWN_SPLIT` of F.

  All arrays are whole: experts `[N·A]`, hidden `[N·A, F]`, down `[L·E, F, D]` and
  partial `[N·A, splits, D]`.
  """
  split, pair = pl.program_id(1), pl.program_id(2)
  expert, steps = experts_ref[pair], DOWN_SPLIT // tiles[0]
  d, in_d = _tile(pl.program_id(0), tiles[1], down_ref.shape[2])

  def step(i, total):
    f, in_f = _tile(split * steps + i, tiles[0], down_ref.shape[1])
    hidden = _load(hidden_ref.at[pair, f], in_f)[:, None]
    mask = in_f[:, None] & in_d[None, :]
    return total + hidden * _load(down_ref.at[expert, f, d], mask)

  total = jax.lax.fori_loop(0, steps, step, jnp.zeros(tiles, jnp.float32))
  plgpu.store(partial_ref.at[pair, split, d], total.sum(0), mask=in_d)
