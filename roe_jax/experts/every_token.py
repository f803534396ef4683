"""Experts that all tokens pass through: a shared expert, or the only one of a dense model."""

import jax

from roe_jax import collectives
from roe_jax.experts.activation import Activation
from roe_jax.numerics import add_bias, project, project_back, rounded
from roe_jax.params import ExpertParams, SharedExpertParams


@jax.named_scope("experts")
def shared(weights: SharedExpertParams, layer: jax.Array | int, x: jax.Array) -> jax.Array:
  """Returns `down(silu(gate x) * up x)` of tokens `[..., D]`, in their dtype.

  With an own gate w, the output is multiplied by `sigmoid(w x)`.
  """
  y = rounded(collectives.psum(_down_of_hidden(weights, layer, x, Activation()), "tensor"), x.dtype)
  if weights.gate is None:
    return y
  gate = rounded(project(x, weights.gate, layer), x.dtype)
  return rounded(jax.nn.sigmoid(gate.astype(y.dtype)) * y, x.dtype)


def only(
  weights: ExpertParams,
  layer: jax.Array | int,
  x_NxD: jax.Array,
  gates_Nx1: jax.Array,
  activation: Activation,
) -> jax.Array:
  """Applies the only expert `[L, 1, ...]` of unquantized experts; see `experts.apply`."""
  weights = jax.tree.map(lambda w: w.reshape(w.shape[0], *w.shape[2:]), weights)
  y = _down_of_hidden(weights, layer, x_NxD, activation, weights.gate_up_bias)
  y = collectives.psum(gates_Nx1 * add_bias(y, weights.down_bias, layer), "tensor")
  return rounded(y, x_NxD.dtype)


def _down_of_hidden(weights, layer, x, activation, bias=None):
  projected = add_bias(project(x, weights.gate_up, layer), bias, layer)
  hidden = rounded(activation(projected[..., 0], projected[..., 1]), x.dtype)
  return project_back(hidden, weights.down, layer)
