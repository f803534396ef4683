"""Grouped matmul over the active experts, for many tokens on an accelerator.

The (token, choice) pairs are sorted by expert. On GPUs and TPUs they are packed into
blocks of tokens of one expert, and a kernel applies each block's expert, reading its
weights in place. Elsewhere `jax.lax.ragged_dot_general` is used.

GPUs and TPUs do not use `ragged_dot_general` because XLA lowers it badly. For NVIDIA GPUs,
jaxlib 0.10.2 by default expands it to a dense product over all groups, with E times the
work and a masked copy of the tokens for each group; for a TPU v5e, XLA copied a layer's
experts into another layout. It also needs a copy of one layer's experts, or groups for all
layers. It takes over on GPUs if Pallas' Triton backend, deprecated since jax 0.11, is gone.
"""

import functools

import jax
import jax.numpy as jnp

from roe_jax.experts.activation import Activation
from roe_jax.experts.gpu_kernels import apply_on_gpu
from roe_jax.experts.packing import block_size, combine, plan
from roe_jax.experts.tpu_kernels import apply_on_tpu
from roe_jax.lazy_modules import is_available, plgpu
from roe_jax.numerics import rounded
from roe_jax.params import ExpertParams
from roe_jax.quantization import Quantized, dequantize_layer


def compute(
  num_experts: int,
  activation: Activation,
  weights: ExpertParams,
  layer: jax.Array | int,
  x: jax.Array,
  indices: jax.Array,
  gates: jax.Array,
) -> jax.Array:
  """Returns the gate-weighted sum of the active experts' outputs, expert by expert.

  Args:
    num_experts, activation, weights, layer, x, indices, gates: as in `gather_gemv.compute`.

  Returns:
    `[N, D]` float32. There is no
    derivative on GPUs and TPUs; `shard_map` needs `check_vma=False`.
  """

  def blocks(kernel):
    return functools.partial(by_blocks, kernel, num_experts, activation)

  gpu = default = functools.partial(by_ragged_dot, num_experts, activation)
  tpu = blocks(apply_on_tpu)
  if is_available(plgpu):
    gpu = blocks(apply_on_gpu)
    if isinstance(weights.down, Quantized):  # without a dequantized copy of the layer
      default = blocks(functools.partial(apply_on_gpu, interpret=True))
  inputs = weights, jnp.asarray(layer, jnp.int32), x, indices, gates
  return jax.lax.platform_dependent(*inputs, cuda=gpu, rocm=gpu, tpu=tpu, default=default)


def by_blocks(kernel, num_experts, activation, weights, layer, x, indices, gates):
  """Runs `kernel(activation, experts [K], weights, x [K, B, D]) -> [K, B, D]`."""
  # 16 tokens are a GPU's smallest matmul.
  block = block_size(indices.size, num_experts, least=16, most=64)
  tokens, places, experts = plan(indices, num_experts, block)
  first = layer * num_experts
  experts = jnp.where(experts < 0, experts, first + experts)
  x_blocks = x.at[tokens].get(mode="fill", fill_value=0).reshape(-1, block, x.shape[1])
  out = kernel(activation, experts, weights, x_blocks).reshape(-1, x.shape[1])[places]
  if weights.down_bias is not None:
    out += weights.down_bias[first + indices]
  return combine(out, gates)


def _ragged_dot(tokens, weights, sizes, axis):
  """Multiplies sorted tokens `[M, K]` by their group's matrix, contracting its `axis`; float32."""
  precision = jax.lax.Precision.HIGHEST if tokens.dtype == jnp.float32 else None
  numbers = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (axis,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
  )
  return jax.lax.ragged_dot_general(
    tokens, weights, sizes, numbers, precision=precision, preferred_element_type=jnp.float32
  )


def by_tokamax(*args):
  """Uses `tokamax.ragged_dot`, which contracts the middle axis: XLA may copy `gate_up`."""
  import tokamax  # pyright: ignore[reportMissingImports]

  def ragged_dot(tokens, weights, sizes, axis):
    weights = weights if axis == 1 else weights.swapaxes(1, 2)
    precision = jax.lax.Precision.HIGHEST if tokens.dtype == jnp.float32 else None
    return tokamax.ragged_dot(tokens, weights, sizes, precision, jnp.float32)

  return by_ragged_dot(*args, ragged_dot=ragged_dot)


def by_ragged_dot(
  num_experts, activation, weights, layer, x, indices, gates, ragged_dot=_ragged_dot
):
  """Uses `jax.lax.ragged_dot_general`; differentiable.

  This copies the layer's experts. Groups for all layers (empty except this layer's) would
  avoid the copy, but multiply the work by the number of layers where XLA expands the
  operation to a dense one.
  """
  n, a = indices.shape
  order = jnp.argsort(indices.reshape(n * a), stable=True)
  experts = layer * num_experts + indices
  sizes = jnp.bincount(indices.reshape(n * a), length=num_experts).astype(jnp.int32)
  gate_up, down = (
    dequantize_layer(w, layer, num_experts, x.dtype) for w in (weights.gate_up, weights.down)
  )
  f, d = down.shape[1:]
  # Contracts the last axis in place, without a transposed copy of the weights.
  projected = ragged_dot(x[order // a], gate_up.reshape(num_experts, 2 * f, d), sizes, 2)
  projected = projected.reshape(n * a, f, 2)
  if weights.gate_up_bias is not None:
    projected += weights.gate_up_bias[experts.reshape(n * a)[order]]
  hidden = rounded(activation(*jnp.moveaxis(projected, 2, 0)), x.dtype)
  out = ragged_dot(hidden, down, sizes, 1)[jnp.argsort(order).reshape(n, a)]
  if weights.down_bias is not None:
    out += weights.down_bias[experts]
  return combine(out, gates)
