"""A grouped matmul over the selected experts, for many rows on an accelerator.

The (row, choice) pairs are sorted by expert. On GPUs and TPUs they are packed
into blocks of rows of one expert, and a kernel applies each block's expert, whose
weights it reads where they lie. Elsewhere `jax.lax.ragged_dot_general` is used.

That is not used on GPUs and TPUs because of what becomes of it: for NVIDIA GPUs
XLA expands it, by default in jaxlib 0.10.2, to a dense product over all groups
with E times the work and a masked copy of the rows for each group; for a TPU v5e
XLA was seen to copy a layer's experts into another layout for it. It also wants
the experts of one layer by themselves, a copy, or groups for all layers.
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
  """Gate-weighted sum of the chosen experts' outputs, by expert.

  The arguments are those of `few_rows.selected`.

  Returns:
    `[N, D]`, dtype of `x`; products are accumulated in float32. It has no
    derivative on GPUs and TPUs, and wants `check_vma=False` in a `shard_map`.
  """

  def blocks(kernel):
    return functools.partial(by_blocks, kernel, num_experts, activation)

  if isinstance(weights.down, Quantized):  # which `ragged_dot_general` cannot widen
    default = blocks(functools.partial(apply_on_gpu, interpret=True))
  else:
    default = functools.partial(by_ragged_dot, num_experts, activation)
  return jax.lax.platform_dependent(
    weights,
    jnp.asarray(layer, jnp.int32),
    x,
    indices,
    gates,
    cuda=blocks(apply_on_gpu),
    rocm=blocks(apply_on_gpu),
    tpu=blocks(apply_on_tpu),
    default=default,
  )


def by_blocks(kernel, num_experts, activation, weights, layer, x, indices, gates):
  """`grouped_matmul` with `kernel(activation, experts [K], weights, x [K, B, D]) -> [K, B, D]`."""
  # 16 rows are a matmul's least on GPUs.
  block = block_size(indices.size, num_experts, least=16, most=64)
  rows, slots, experts = plan(indices, num_experts, block)
  first = layer * num_experts
  experts = jnp.where(experts < 0, experts, first + experts)
  x_blocks = x.at[rows].get(mode="fill", fill_value=0).reshape(-1, block, x.shape[1])
  out = kernel(activation, experts, weights, x_blocks).reshape(-1, x.shape[1])[slots]
  if weights.down_bias is not None:
    out += weights.down_bias[first + indices]
  return combine(out, gates, x.dtype)


def by_ragged_dot(num_experts, activation, weights, layer, x, indices, gates):
  """`grouped_matmul` with `jax.lax.ragged_dot_general`; differentiable.

  The layer's experts are sliced out. Groups for all layers, empty but for this
  one's, would avoid that, but where the operation is expanded to a dense one they
  multiply the work by the number of layers.
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
  # The last axis is summed over where it lies: no transposed copy of the weights.
  projected = _ragged_dot(x[order // a], gate_up.reshape(num_experts, 2 * f, d), sizes, 2)
  projected = projected.reshape(n * a, f, 2)
  if weights.gate_up_bias is not None:
    projected += weights.gate_up_bias[experts.reshape(n * a)[order]]
  hidden = rounded(activation(*jnp.moveaxis(projected, 2, 0)), x.dtype)
  out = _ragged_dot(hidden, down, sizes, 1)[jnp.argsort(order).reshape(n, a)]
  if weights.down_bias is not None:
    out += weights.down_bias[experts]
  return combine(out, gates, x.dtype)


def _ragged_dot(rows, weights, sizes, axis):
  """Sorted `[M, K]` rows times their group's matrix, summed over its `axis`; float32."""
  precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
  numbers = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (axis,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
  )
  return jax.lax.ragged_dot_general(
    rows, weights, sizes, numbers, precision=precision, preferred_element_type=jnp.float32
  )
