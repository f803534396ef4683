"""Grouped matmul over the active experts, for many tokens on an accelerator.

The (token, choice) pairs are sorted by expert. On GPUs and TPUs they are packed into
blocks of tokens of one expert, and a kernel applies each block's expert, reading its
weights in place. Elsewhere `jax.lax.ragged_dot_general` is used.

GPUs and TPUs do not use `ragged_dot_general` because XLA lowers it badly. For NVIDIA GPUs,
jaxlib 0.10.2 by default expands it to a dense product over all groups, with E times the
work and a masked copy of the tokens for each group; for a TPU v5e, XLA copied a layer's
experts into another layout. It also needs a copy of one layer's experts, or groups for all
layers.
"""

import functools

import jax
import jax.numpy as jnp

from roe_jax.experts.activation import Activation
from roe_jax.experts.gpu_kernels import apply_on_gpu
from roe_jax.experts.packing import block_size, combine, plan
from roe_jax.experts.tpu_kernels import apply_on_tpu
from roe_jax.numerics import rounded
from roe_jax.params import ExpertParams
from roe_jax.quantization import Quantized


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

  if isinstance(weights.down, Quantized):  # ragged_dot_general cannot dequantize
    default = blocks(functools.partial(apply_on_gpu, interpret=True))
  else:
    default = functools.partial(by_ragged_dot, num_experts, activation)
  gpu, tpu = blocks(apply_on_gpu), blocks(apply_on_tpu)
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


def by_ragged_dot(num_experts, activation, weights, layer, x, indices, gates):
  """Uses `jax.lax.ragged_dot_general`; differentiable.

  This copies the layer's experts. Groups for all layers (empty except this layer's) would
  avoid the copy, but multiply the work by the number of layers where XLA expands the
  operation to a dense one.
  """
  n, a = indices.shape
  f, d = weights.down.shape[1:]
  order = jnp.argsort(indices.reshape(n * a), stable=True)
  experts = layer * num_experts + indices
  sizes = jnp.bincount(indices.reshape(n * a), length=num_experts).astype(jnp.int32)
  gate_up, down = (
    jax.lax.dynamic_slice_in_dim(w, layer * num_experts, num_experts)
    for w in (weights.gate_up, weights.down)
  )
  # Contracts the last axis in place, without a transposed copy of the weights.
  projected = _ragged_dot(x[order // a], gate_up.reshape(num_experts, 2 * f, d), sizes, 2)
  projected = projected.reshape(n * a, f, 2)
  if weights.gate_up_bias is not None:
    projected += weights.gate_up_bias[experts.reshape(n * a)[order]]
  hidden = rounded(activation(*jnp.moveaxis(projected, 2, 0)), x.dtype)
  out = _ragged_dot(hidden, down, sizes, 1)[jnp.argsort(order).reshape(n, a)]
  if weights.down_bias is not None:
    out += weights.down_bias[experts]
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
