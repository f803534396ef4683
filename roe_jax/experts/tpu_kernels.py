"""Experts applied to blocks of tokens on TPUs, as Pallas kernels.

The experts of the blocks are prefetched scalars that select tiles of weights. Pallas'
pipeline copies a tile from main memory to VMEM while the previous one is multiplied. Tiles
vary slowest, so consecutive blocks of one expert copy a tile only once.

Status: tested in Pallas' interpret mode on CPU, and compiled for a TPU v5e (ahead of time)
with bfloat16 weights and each quantized format; not run or timed on a TPU. Blocks of 64
float32 tokens with F = 14336 do not fit in its VMEM.

For the TPU v5e, XLA's layouts let the kernels read weights in place if the last axis (D, or
D/2 for 4-bit formats) is a multiple of 128. Otherwise, as with D = 2880, each call copies
the weights of all layers, so these kernels should not be chosen.
"""

import functools

import jax
import jax.numpy as jnp

from roe_jax.lazy_modules import pl, pltpu
from roe_jax.quantization import codes_and_scales, decode_codes, decode_scales, weights_per_code

# Bytes of a tile of (dequantized) weights; VMEM holds two at a time.
TILE_BYTES = 2**21


def apply_on_tpu(activation, experts, weights, x, interpret=False):
  """Applies block k's expert to its tokens.

  Args:
    activation: activation between the projections.
    experts: `[K]` int32 indices into the leading axis of the weights; negative for an
      unused block.
    weights: weights of all layers `[L·E, ...]`; `down_bias` is not used. The matrices may
      be `Quantized`.
    x: `[K, B, D]` tokens in blocks, in the dtype of unquantized weights.
    interpret: whether to run in Pallas' interpret mode, on any platform.

  Returns:
    `[K, B, D]` float32, without `down_bias`; undefined in unused blocks.
  """
  k, b, d = x.shape
  codes, scales, format = codes_and_scales(weights.gate_up)
  parts, (f, _, width) = weights_per_code(format), codes.shape[1:]
  of_block = jnp.maximum(experts, 0)

  def call(kernel, shape, tile, dtype, inputs, specs):
    return pl.pallas_call(
      kernel,
      jax.ShapeDtypeStruct((k, *shape), dtype),
      interpret=interpret,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(pl.cdiv(shape[-1], tile), k),
        in_specs=specs,
        out_specs=_of_block(*shape[:-1], tile),
      ),
    )(experts, *inputs)

  tile = _tile(f, 2 * d * x.dtype.itemsize)
  if scales is None:
    codes_spec, scales_spec = _of_expert((tile, 2, width), lambda t: (t, 0, 0)), None
  else:  # the layout that XLA chooses, so that nothing is copied
    codes, scales = codes.swapaxes(1, 2), scales.transpose(0, 2, 3, 1)
    codes_spec = _of_expert((2, tile, width), lambda t: (0, t, 0))
    scales_spec = _of_expert((2, scales.shape[2], tile), lambda t: (0, 0, t))
  bias = weights.gate_up_bias
  if bias is not None:  # with F last, as in the hidden values; small compared to the weights
    bias = bias[of_block].swapaxes(1, 2)
  bias_spec = bias if bias is None else _of_block(2, tile)
  kernel = functools.partial(_hidden_kernel, activation=activation, format=format)
  inputs = x.reshape(k, b, parts, width).swapaxes(1, 2), codes, scales, bias
  specs = _all_of_block(parts, b, width), codes_spec, scales_spec, bias_spec
  hidden = call(kernel, (b, f), tile, x.dtype, inputs, specs)

  codes, scales, format = codes_and_scales(weights.down)
  parts, width = weights_per_code(format), codes.shape[2]
  tile = _tile(width, parts * f * x.dtype.itemsize)
  if scales is not None:  # one array per half of D; also small
    scales = scales[of_block].reshape(k, -1, parts, width).swapaxes(1, 2)
  scales_spec = scales if scales is None else _of_block(*scales.shape[1:3], tile)
  specs = _all_of_block(b, f), _of_expert((f, tile), lambda t: (0, t)), scales_spec
  kernel = functools.partial(_down_kernel, format=format)
  out = call(kernel, (parts, b, width), tile, jnp.float32, (hidden, codes, scales), specs)
  return out.swapaxes(1, 2).reshape(k, b, d)


def _all_of_block(*shape):
  return pl.BlockSpec((None, *shape), lambda t, k, experts: (k, *[0] * len(shape)))


def _of_block(*shape):
  """A tile along the last axis of each block's array."""
  return pl.BlockSpec((None, *shape), lambda t, k, experts: (k, *[0] * (len(shape) - 1), t))


def _of_expert(shape, index):
  """A tile of the block's expert; `index` maps the tile's number to block indices."""
  return pl.BlockSpec((None, *shape), lambda t, k, experts: (jnp.maximum(experts[k], 0), *index(t)))


def _tile(size, bytes_each):
  """Returns a multiple of 128 that takes about `TILE_BYTES`, or `size` if smaller."""
  return min(size, max(128, TILE_BYTES // bytes_each // 128 * 128))


def _dot(x, weights, axis):
  """Multiplies tokens `[B, K]` by a matrix, contracting its `axis`; float32."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    x, weights, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
  )


def _repetition(shape, axis, group, first):
  """Returns a 0/1 matrix that repeats scales: ones where `first + i` on `axis` is in group j.

  Multiplying by it is how a TPU repeats values along either axis of a tile.
  """
  weight = first + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
  start = group * jax.lax.broadcasted_iota(jnp.int32, shape, 1 - axis)
  return jnp.where((weight >= start) & (weight < start + group), 1.0, 0.0)


def _repeated(left, axis, right):
  """Contracts `left` over `axis` with `right`: scales and ones, which are exact in bfloat16."""
  return jax.lax.dot_general(
    left.astype(jnp.bfloat16),
    right.astype(jnp.bfloat16),
    (((axis,), (0,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _hidden_kernel(
  experts_ref, x_ref, codes_ref, scales_ref, bias_ref, hidden_ref, *, activation, format
):
  """Computes one block's hidden values for one tile of F, with D in P parts.

  x `[P, B, D/P]`, bias `[2, tile]` or None, hidden `[B, tile]`. Unquantized weights are
  `[tile, 2, D]`, codes `[2, tile, D/P]` and scales `[2, G, tile]`.
  """
  parts, _, width = x_ref.shape

  def unscaled(c):
    return decode_codes(codes_ref[:, c] if scales_ref is None else codes_ref[c], format)

  def scaled(weights, c, part):
    if scales_ref is None:
      return weights
    groups = scales_ref.shape[1]
    repetition = _repetition((groups, width), 1, parts * width // groups, part * width)
    scales = _repeated(decode_scales(scales_ref[c]), 0, repetition)
    return (weights * scales).astype(x_ref.dtype)

  @pl.when(experts_ref[pl.program_id(1)] >= 0)
  def _():
    projected = [
      sum(
        _dot(x_ref[part], scaled(weights, c, part), 1) for part, weights in enumerate(unscaled(c))
      )
      for c in (0, 1)
    ]
    if bias_ref is not None:
      projected = [p + bias_ref[c : c + 1].astype(jnp.float32) for c, p in enumerate(projected)]
    hidden_ref[...] = activation(*projected).astype(hidden_ref.dtype)


def _down_kernel(experts_ref, hidden_ref, codes_ref, scales_ref, out_ref, *, format):
  """Computes one block's output for one tile of each of the P parts of D.

  hidden `[B, F]`, codes `[F, tile]`, scales `[P, G, tile]` or None, out
  `[P, B, tile]` in float32.
  """
  width = codes_ref.shape[0]

  def scaled(weights, part):
    if scales_ref is None:
      return weights
    groups = scales_ref.shape[1]
    repetition = _repetition((width, groups), 0, width // groups, 0)
    scales = _repeated(repetition, 1, decode_scales(scales_ref[part]))
    return (weights * scales).astype(hidden_ref.dtype)

  @pl.when(experts_ref[pl.program_id(1)] >= 0)
  def _():
    for part, weights in enumerate(decode_codes(codes_ref[...], format)):
      out_ref[part] = _dot(hidden_ref[...], scaled(weights, part), 0)
