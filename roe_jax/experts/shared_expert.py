"""The shared expert, which all tokens pass through (Qwen2-MoE)."""

import jax

from roe_jax import collectives
from roe_jax.numerics import project, project_back, rounded
from roe_jax.params import SharedExpertParams


@jax.named_scope("experts")
def shared(weights: SharedExpertParams, layer: jax.Array | int, x: jax.Array) -> jax.Array:
  """Returns `sigmoid(w x) * down(silu(gate x) * up x)` of tokens `[..., D]`, in their dtype."""
  projected = project(x, weights.gate_up, layer)
  hidden = rounded(jax.nn.silu(projected[..., 0]) * projected[..., 1], x.dtype)
  y = rounded(collectives.psum(project_back(hidden, weights.down, layer), "tensor"), x.dtype)
  gate = rounded(project(x, weights.gate, layer), x.dtype)
  return rounded(jax.nn.sigmoid(gate.astype(y.dtype)) * y, x.dtype)
