"""Router kinds: the weights that a layer's router has, and how it scores experts.

`ModelConfig.router` names an entry of `ROUTERS`.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

from roe_jax.numerics import add_bias, project, rounded

LINEAR = "linear"
NONE = "none"


@dataclasses.dataclass(frozen=True)
class Router:
  """A kind of router.

  Attributes:
    axes: logical axes of the weights of one layer, the model width last; None if it has none,
      which allows one expert only.
    score: maps the float32 projection of tokens by these weights and the bias, `[..., *axes[:-1]]`,
      to router logits `[..., E]`.
  """

  axes: tuple[str, ...] | None
  score: Callable[[jax.Array], jax.Array] = lambda projected: projected

  def logits(
    self, weights: jax.Array | None, bias: jax.Array | None, layer: jax.Array | int, x: jax.Array
  ) -> jax.Array:
    """Computes router logits, rounded to the dtype of `x` as in training.

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
    return rounded(scores, x.dtype).astype(jnp.float32)


ROUTERS = {LINEAR: Router(("routed_experts", "embed")), NONE: Router(None)}
