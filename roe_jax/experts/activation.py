"""The activation between an expert's two projections."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Activation:
  """SwiGLU, `silu(gate) * up`, or the clamped SwiGLU of GPT-OSS.

  The latter is `(clip(up, -limit, limit) + 1) * g * sigmoid(alpha * g)` with
  `g = min(gate, limit)`.

  Attributes:
    limit: bound on both inputs; None for unclamped SwiGLU.
    alpha: slope of the sigmoid; used only with a limit.
  """

  limit: float | None = None
  alpha: float = 1.0

  def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
    if self.limit is None:
      return jax.nn.silu(gate) * up
    gate = jnp.minimum(gate, self.limit)
    up = jnp.clip(up, -self.limit, self.limit)
    return (up + 1) * gate * jax.nn.sigmoid(self.alpha * gate)
