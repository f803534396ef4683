"""Experts as batched matmuls over blocks of rows, or over all rows."""

import jax
import jax.numpy as jnp

from roe_jax.experts.packing import block_size, combine, plan
from roe_jax.numerics import einsum, rounded


def padded(num_experts, gate_up, down, layer, x, indices, gates):
  """Blocks of rows of one expert, and a gathered copy of its weights for each."""
  block = block_size(indices.size, num_experts, least=4, most=128)
  rows, slots, experts = plan(indices, num_experts, block)
  x_blocks = x.at[rows.reshape(-1, block)].get(mode="fill", fill_value=0)
  experts = layer * num_experts + jnp.maximum(experts, 0)
  projected = einsum("kbd,kfcd->kbcf", x_blocks, gate_up[experts])
  hidden = rounded(jax.nn.silu(projected[:, :, 0]) * projected[:, :, 1], x.dtype)
  out = einsum("kbf,kfd->kbd", hidden, down[experts])
  return combine(out.reshape(-1, x.shape[1])[slots], gates, x.dtype)


def dense(num_experts, gate_up, down, layer, x, indices, gates):
  """All experts of the layer for all rows."""
  def of_layer(w):
    return jax.lax.dynamic_slice_in_dim(w, layer * num_experts, num_experts)

  n = x.shape[0]
  weights = jnp.zeros((n, num_experts), jnp.float32).at[
      jnp.arange(n)[:, None], indices].set(gates)
  projected = einsum("nd,efcd->encf", x, of_layer(gate_up))
  hidden = jax.nn.silu(projected[:, :, 0]) * projected[:, :, 1]
  # Weighting before `down` leaves one contraction over experts and width.
  hidden = rounded(hidden * weights.T[..., None], x.dtype)
  return rounded(einsum("enf,efd->nd", hidden, of_layer(down)), x.dtype)
