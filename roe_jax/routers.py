"""Router kinds: the weights that a layer's router has, and how it scores experts.

`ModelConfig.router` names an entry of `ROUTERS`.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from roe_jax.numerics import add_bias, project, rounded, to_compute_dtype

LINEAR = "linear"
LINEAR_FLOAT32 = "linear_float32"
NEURONS = "neurons"
NONE = "none"
RECURRENT = "recurrent"
SIGMOID = "sigmoid"
_SMALLEST = 1e-20  # where a neuron is zero, its logarithm is finite


@dataclasses.dataclass(frozen=True)
class Router:
  """A kind of router.

  Attributes:
    axes: logical axes of the weights of one layer, the width of its input last; None if it has
      none, which allows one expert only.
    score: maps the float32 projection of tokens by these weights and the bias, `[..., *axes[:-1]]`,
      to router logits `[..., E]`.
    in_float32: whether logits keep float32 precision.
    gates_by_sigmoid: whether the gates, and the scores by which experts are chosen, are sigmoids
      of the logits, in place of a softmax over them.
  """

  axes: tuple[str, ...] | None
  score: Callable[[jax.Array], jax.Array] = lambda projected: projected
  in_float32: bool = False
  gates_by_sigmoid: bool = False

  def logits(
    self, weights: jax.Array | None, bias: jax.Array | None, layer: jax.Array | int, x: jax.Array
  ) -> jax.Array:
    """Computes router logits, rounded to the dtype of `x` as in training unless `in_float32`.

    Args:
      weights: `[L, *axes]`, or None for a router without weights.
      bias: `[L, *axes[:-1]]` or None.
      layer: may be traced.
      x: normalized hidden states `[..., D]`; of a recurrent router, its state `[..., q]`.

    Returns:
      `[..., E]` float32; zeros `[..., 1]` for a router without weights.
    """
    if weights is None:
      return jnp.zeros((*x.shape[:-1], 1), jnp.float32)
    scores = self.score(add_bias(project(x, weights, layer), bias, layer))
    if not self.in_float32:
      scores = rounded(scores, x.dtype)
    return scores.astype(jnp.float32)


@jax.named_scope("router")
def advance(
  cell: Any, projections: jax.Array, layer: jax.Array | int, x: jax.Array, state: jax.Array
) -> jax.Array:
  """Advances the state of a recurrent router by one layer (RMoE, arXiv 2408.06793).

  A gated recurrent unit over layers, not over time: each token has its own state, zero before the
  first layer. With u = P_l x, r and z the sigmoids of W u + b + U h + b' of their gates, and
  c = tanh(W_c u + b_c + r (U_c h + b'_c)), the new state is (1 - z) c + z h.

  Args:
    cell: a `params.RouterCell`, the same in all layers.
    projections: P, `[L, q, D]`.
    layer: may be traced.
    x: normalized hidden states `[..., D]`.
    state: h, `[..., q]` in the dtype of `x`.

  Returns:
    The state after the layer, `[..., q]` in the dtype of `x`.
  """
  u = rounded(project(x, projections, layer), x.dtype)
  of_input = add_bias(project(u, cell.input[None], 0), cell.input_bias[None], 0)
  of_state = add_bias(project(state, cell.state[None], 0), cell.state_bias[None], 0)
  r, z = (jax.nn.sigmoid(of_input[..., i, :] + of_state[..., i, :]) for i in (0, 1))
  candidate = jnp.tanh(of_input[..., 2, :] + r * of_state[..., 2, :])
  old = to_compute_dtype(state).astype(jnp.float32)
  return rounded((1 - z) * candidate + z * old, x.dtype)


def _log_of_neurons(projected: jax.Array) -> jax.Array:
  """Returns log |h| of one SwiGLU neuron per expert from its gate and up projections."""
  hidden = jax.nn.silu(projected[..., 0]) * projected[..., 1]
  return jnp.log(jnp.abs(hidden) + _SMALLEST)


ROUTERS = {
  LINEAR: Router(("routed_experts", "embed")),
  # DeepSeek-V2 (arXiv 2405.04434).
  LINEAR_FLOAT32: Router(("routed_experts", "embed"), in_float32=True),
  # CMoE (arXiv 2502.04416): the activation of one neuron represents its expert.
  NEURONS: Router(("routed_experts", "gate_up", "embed"), _log_of_neurons),
  # RMoE (arXiv 2408.06793); see `advance`.
  RECURRENT: Router(("routed_experts", "router_state")),
  # DeepSeek-V3 (arXiv 2412.19437).
  SIGMOID: Router(("routed_experts", "embed"), in_float32=True, gates_by_sigmoid=True),
  NONE: Router(None),
}
