"""Router kinds: the weights that a layer's router has, and how it scores experts.

`ModelConfig.router` names an entry of `ROUTERS`.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

from roe_jax.numerics import add_bias, project, rounded

LINEAR = "linear"
NEURONS = "neurons"
NONE = "none"
SIGMOID = "sigmoid"
_SMALLEST = 1e-20  # where a neuron is zero, its logarithm is finite


@dataclasses.dataclass(frozen=True)
class Router:
  """A kind of router.

  Attributes:
    axes: logical axes of the weights of one layer, the model width last; None if it has none,
      which allows one expert only.
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
      x: normalized hidden states `[..., D]`.

    Returns:
      `[..., E]` float32; zeros `[..., 1]` for a router without weights.
    """
    if weights is None:
      return jnp.zeros((*x.shape[:-1], 1), jnp.float32)
    scores = self.score(add_bias(project(x, weights, layer), bias, layer))
    if not self.in_float32:
      scores = rounded(scores, x.dtype)
    return scores.astype(jnp.float32)


def _log_of_neurons(projected: jax.Array) -> jax.Array:
  """Returns log |h| of one SwiGLU neuron per expert from its gate and up projections."""
  hidden = jax.nn.silu(projected[..., 0]) * projected[..., 1]
  return jnp.log(jnp.abs(hidden) + _SMALLEST)


ROUTERS = {
  LINEAR: Router(("routed_experts", "embed")),
  # CMoE (arXiv 2502.04416): the activation of one neuron represents its expert.
  NEURONS: Router(("routed_experts", "gate_up", "embed"), _log_of_neurons),
  # DeepSeek-V3 (arXiv 2412.19437).
  SIGMOID: Router(("routed_experts", "embed"), in_float32=True, gates_by_sigmoid=True),
  NONE: Router(None),
}
