"""Experts as batched matmuls: over blocks of tokens of one expert, or over all tokens."""

import jax
import jax.numpy as jnp

from roe_jax.experts.packing import block_size, combine, plan
from roe_jax.numerics import einsum, rounded


def padded(num_experts, activation, weights, layer, x, indices, gates):
  """Applies experts to blocks of tokens, each with a gathered copy of its expert's weights."""
  block = block_size(indices.size, num_experts, least=4, most=128)
  tokens, places, experts = plan(indices, num_experts, block)
  x_blocks = x.at[tokens.reshape(-1, block)].get(mode="fill", fill_value=0)
  experts = layer * num_experts + jnp.maximum(experts, 0)
  projected = einsum("kbd,kfcd->kbcf", x_blocks, weights.gate_up[experts])
  if weights.gate_up_bias is not None:
    projected += weights.gate_up_bias[experts].swapaxes(1, 2)[:, None]
  hidden = rounded(activation(projected[:, :, 0], projected[:, :, 1]), x.dtype)
  out = einsum("kbf,kfd->kbd", hidden, weights.down[experts])
  if weights.down_bias is not None:
    out += weights.down_bias[experts][:, None]
  return combine(out.reshape(-1, x.shape[1])[places], gates)


def dense(num_experts, activation, weights, layer, x, indices, gates):
  """Applies all experts of the layer to all tokens."""

  def of_layer(w):
    return jax.lax.dynamic_slice_in_dim(w, layer * num_experts, num_experts)

  n = x.shape[0]
  by_expert = jnp.zeros((n, num_experts), jnp.float32)
  by_expert = by_expert.at[jnp.arange(n)[:, None], indices].set(gates)
  projected = einsum("nd,efcd->encf", x, of_layer(weights.gate_up))
  if weights.gate_up_bias is not None:
    projected += of_layer(weights.gate_up_bias).swapaxes(1, 2)[:, None]
  hidden = activation(projected[:, :, 0], projected[:, :, 1])
  # Applying gates before `down` leaves one contraction over experts and width.
  hidden = rounded(hidden * by_expert.T[..., None], x.dtype)
  y = einsum("enf,efd->nd", hidden, of_layer(weights.down))
  if weights.down_bias is not None:
    y += einsum("ne,ed->nd", by_expert, of_layer(weights.down_bias).astype(jnp.float32))
  return y
