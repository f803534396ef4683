"""Gather GEMV: kernels over (token, choice) pairs, for few tokens on an accelerator.

With few tokens, as in decoding, reading weights takes most of the time. These kernels
read each pair's expert in place and write only hidden values and partial outputs.

Status of the GPU kernels: tested in Pallas' interpret mode on CPU; lowered for CUDA and
compiled for an H100 by Triton and ptxas, with bfloat16 weights and each quantized format
(16-byte loads of weights and codes, no register spills); not run or timed on a GPU. For
TPUs see `tpu_kernels`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from roe_jax.experts.activation import Activation
from roe_jax.experts.gpu_kernels import load, shifted, tile_at
from roe_jax.experts.grouped_matmul import by_ragged_dot
from roe_jax.experts.packing import combine
from roe_jax.experts.tpu_kernels import apply_on_tpu
from roe_jax.lazy_modules import is_available, pl, plgpu
from roe_jax.params import ExpertParams
from roe_jax.quantization import (
  codes_and_scales,
  decode_codes,
  decode_scales,
  weights_per_code,
  weights_per_scale,
)

# Tiles of the GPU kernels in weights; powers of two, as Triton requires. A program keeps a
# float32 sum per element of a tile, 32 per thread of 4 warps. One token with 8 choices in
# OLMoE (D = 2048, F = 1024) makes 512 programs of either kernel, 4 for each of the 132
# multiprocessors of an H100 or H200.
HIDDEN_TILE = (16, 256)  # of F, and of D, which is summed over in steps
DOWN_TILE = (32, 128)  # of F, which is summed over in steps, and of D
DOWN_SPLIT = 256  # part of F that one program sums over


def compute(
  num_experts: int,
  activation: Activation,
  weights: ExpertParams,
  layer: jax.Array | int,
  x: jax.Array,
  indices: jax.Array,
  gates: jax.Array,
) -> jax.Array:
  """Returns the gate-weighted sum of the active experts' outputs, pair by pair.

  Args:
    num_experts: E, the experts of one layer.
    activation: activation between the projections.
    weights: weights of all layers `[L·E, ...]`; the matrices may be `Quantized`.
    layer: int32 scalar; may be traced.
    x: `[N, D]` tokens, float32 or bfloat16, the dtype of unquantized weights.
    indices: `[N, A]` int32 active experts of each token, in `[0, E)`.
    gates: `[N, A]` float32 gate weights.

  Returns:
    `[N, D]` float32. There is no
    derivative and no batching rule; `shard_map` needs `check_vma=False`.
  """

  def pairs(kernel):
    return functools.partial(by_pairs, kernel, num_experts, activation)

  if is_available(plgpu):
    gpu, default = pairs(on_gpu), pairs(functools.partial(on_gpu, interpret=True))
  else:  # Pallas' Triton backend is deprecated since jax 0.11
    gpu = default = functools.partial(by_ragged_dot, num_experts, activation)
  kernels = {"cuda": gpu, "rocm": gpu, "tpu": pairs(on_tpu)}
  inputs = weights, jnp.asarray(layer, jnp.int32), x, indices, gates
  return jax.lax.platform_dependent(*inputs, **kernels, default=default)


def by_pairs(kernel, num_experts, activation, weights, layer, x, indices, gates):
  """Runs `kernel(activation, experts [N, A], weights, x) -> [N, A, D]`."""
  experts = layer * num_experts + indices
  out = kernel(activation, experts, weights, x)
  if weights.down_bias is not None:
    out += weights.down_bias[experts]
  return combine(out, gates)


def on_tpu(activation, experts, weights, x, interpret=False):
  """Runs the TPU kernels on blocks of one token; arguments and result as in `on_gpu`."""
  (n, a), d = experts.shape, x.shape[1]
  tokens = jnp.broadcast_to(x[:, None], (n, a, d)).reshape(n * a, 1, d)
  out = apply_on_tpu(activation, experts.reshape(n * a), weights, tokens, interpret)
  return out.reshape(n, a, d)


def on_gpu(activation, experts, weights, x, interpret=False):
  """Runs the GPU kernels, through the Triton lowering of Pallas.

  Args:
    activation: activation between the projections.
    experts: `[N, A]` int32 indices into the leading axis of the weights.
    weights: weights of all layers; `down_bias` is not used.
    x: `[N, D]`.
    interpret: whether to run in Pallas' interpret mode, on any platform.

  Returns:
    `[N, A, D]` float32, without `down_bias`.
  """
  (n, d), a = x.shape, experts.shape[1]
  experts, pairs = experts.reshape(n * a), n * a

  def call(kernel, shape, dtype, grid, *inputs):
    # Tiles vary fastest, so that concurrent programs read adjacent memory.
    return pl.pallas_call(
      kernel,
      jax.ShapeDtypeStruct(shape, dtype),
      grid=(*grid, pairs),
      interpret=interpret,
      compiler_params=plgpu.CompilerParams(num_warps=4),
      name=f"gather_gemv{kernel.func.__name__}",
    )(experts, *inputs)

  codes, scales, format = codes_and_scales(weights.gate_up)
  parts, (f, _, width) = weights_per_code(format), codes.shape[1:]
  columns = min(HIDDEN_TILE[1] // parts, pl.next_power_of_2(width))
  # Within a piece of the columns, the weights of each half share a scale.
  piece = columns if scales is None else math.gcd(columns, width, weights_per_scale(scales, 3, d))
  tiles = (min(HIDDEN_TILE[0], pl.next_power_of_2(f)), columns // piece, piece)
  kernel = functools.partial(
    _hidden_kernel, activation=activation, format=format, choices=a, tiles=tiles
  )
  inputs = x, codes, scales, weights.gate_up_bias
  hidden = call(kernel, (pairs, f), x.dtype, (pl.cdiv(f, tiles[0]),), *inputs)

  codes, scales, format = codes_and_scales(weights.down)
  parts, width, splits = weights_per_code(format), codes.shape[2], pl.cdiv(f, DOWN_SPLIT)
  # Within a tile, the weights of a column share a scale.
  tiles = (
    math.gcd(min(DOWN_TILE[0], pl.next_power_of_2(f)), weights_per_scale(scales, 1, f)),
    min(DOWN_TILE[1] // parts, pl.next_power_of_2(width)),
  )
  kernel = functools.partial(_down_kernel, format=format, tiles=tiles)
  shape, grid = (pairs, splits, d), (pl.cdiv(width, tiles[1]), splits)
  partial = call(kernel, shape, jnp.float32, grid, hidden, codes, scales)
  return partial.reshape(n, a, splits, d).sum(2)


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
  choices,
  tiles,
):
  """Computes `activation(gate x, up x)` of one pair for one tile of F.

  Refs are whole arrays, with P weights per code: experts `[N·A]`, x `[N, D]`, codes
  `[L·E, F, 2, D/P]`, scales `[L·E, F, 2, G]` or None, bias `[L·E, F, 2]` or None, and
  hidden `[N·A, F]`. Only the loaded tiles are read from main memory.

  `tiles` are the sizes of a tile of F, the pieces per step, and the codes per piece.
  """
  pair, expert = pl.program_id(1), experts_ref[pl.program_id(1)]
  (_, d), width, (_, pieces, piece) = x_ref.shape, codes_ref.shape[3], tiles
  f, in_f = tile_at(pl.program_id(0), tiles[0], hidden_ref.shape[1])
  rows = f.start + jnp.arange(tiles[0])[:, None]

  def scaled(weights, c, first, mask):
    if scales_ref is None:
      return weights.astype(jnp.float32)
    groups = first // weights_per_scale(scales_ref, 3, d)
    scales = load(scales_ref.at[expert, rows, jnp.int32(c), groups], mask)
    return weights * decode_scales(scales)[..., None]

  def step(i, sums):
    first = piece * (i * pieces + jnp.arange(pieces)[None, :])
    columns = first[..., None] + jnp.arange(piece)[None, None, :]
    in_d = columns < width
    mask = in_f[:, None, None] & in_d
    sums = list(sums)
    # The sum over D within a tile is last: in the loop, threads would have to exchange data.
    for c in (0, 1):
      codes = load(codes_ref.at[expert, rows[..., None], jnp.int32(c), columns], mask)
      for part, weights in enumerate(decode_codes(codes, format)):
        x = load(x_ref.at[pair // choices, part * width + columns], in_d).astype(jnp.float32)
        sums[c] += x * scaled(weights, c, part * width + first, in_f[:, None] & (first < width))
    return sums

  zeros = jnp.zeros(tiles, jnp.float32)
  sums = jax.lax.fori_loop(0, pl.cdiv(width, pieces * piece), step, [zeros, zeros])
  projected = [total.sum(2).sum(1) for total in sums]
  if bias_ref is not None:
    projected = [
      p + load(bias_ref.at[expert, f, jnp.int32(c)], in_f).astype(jnp.float32)
      for c, p in enumerate(projected)
    ]
  hidden = activation(*projected)
  plgpu.store(hidden_ref.at[pair, f], hidden.astype(hidden_ref.dtype), mask=in_f)


def _down_kernel(experts_ref, hidden_ref, codes_ref, scales_ref, partial_ref, *, format, tiles):
  """Computes one pair's output for one tile of each half of D, over `DOWN_SPLIT` of F.

  Refs are whole arrays, with P weights per code: experts `[N·A]`, hidden `[N·A, F]`,
  codes `[L·E, F, D/P]`, scales `[L·E, G, D]` or None, and partial `[N·A, splits, D]`.
  """
  split, pair = pl.program_id(1), pl.program_id(2)
  expert, steps = experts_ref[pair], DOWN_SPLIT // tiles[0]
  _, width, columns = codes_ref.shape
  d, in_d = tile_at(pl.program_id(0), tiles[1], columns)

  def scaled(weights, part, f):
    if scales_ref is None:
      return weights.astype(jnp.float32)
    group = f.start // weights_per_scale(scales_ref, 1, width)
    scales = load(
      scales_ref.at[expert, group, shifted(d, part * columns)], in_d & (f.start < width)
    )
    return weights * decode_scales(scales)[None, :]

  def step(i, totals):
    f, in_f = tile_at(split * steps + i, tiles[0], width)
    hidden = load(hidden_ref.at[pair, f], in_f).astype(jnp.float32)[:, None]
    codes = load(codes_ref.at[expert, f, d], in_f[:, None] & in_d[None, :])
    return [
      total + hidden * scaled(weights, part, f)
      for part, (total, weights) in enumerate(zip(totals, decode_codes(codes, format)))
    ]

  totals = [jnp.zeros(tiles, jnp.float32)] * weights_per_code(format)
  for part, total in enumerate(jax.lax.fori_loop(0, steps, step, totals)):
    plgpu.store(partial_ref.at[pair, split, shifted(d, part * columns)], total.sum(0), mask=in_d)
