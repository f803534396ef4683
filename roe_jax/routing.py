"""From router logits to the chosen experts and their gates."""

import jax
import jax.numpy as jnp

from roe_jax.config import ModelConfig
from roe_jax.numerics import rounded

CLEAN = "clean"
NOISY = "noisy"
CLEAN_RESCALED = "clean_rescaled"
GATE_WEIGHTS = (CLEAN, NOISY, CLEAN_RESCALED)


def route(config: ModelConfig, logits: jax.Array, noise: jax.Array | None = None,
          gate_weights: str = CLEAN) -> tuple[jax.Array, jax.Array]:
  """Chooses experts by Gumbel-top-k (arXiv 2509.17238 eq. 1) and weights them.

  The paper defines the choice only. What the chosen experts are weighted with
  is `gate_weights`:

  * `clean`: the model's own gates of the unperturbed logits at the chosen
    experts.
  * `noisy`: the model's own gates of the perturbed logits.
  * `clean_rescaled`: `clean`, scaled so that they sum to what the gates of the
    unperturbed choice sum to. Differs from `clean` only where gates are not
    normalised (OLMoE).

  Args:
    config: says whether gates are normalised and in which dtype they are used.
    logits: `[..., E]` float32 router logits.
    noise: `[..., E]` float32 added to them, or None.
    gate_weights: one of `GATE_WEIGHTS`.

  Returns:
    The chosen experts `[..., A]` int32, best first, and their gates `[..., A]`
    float32 (holding values of `config.dtype` where the family rounds them).
  """
  perturbed = logits if noise is None else logits + noise
  _, experts = jax.lax.top_k(perturbed, config.experts_per_token)
  source = perturbed if gate_weights == NOISY else logits
  gates = _gates(config, source, experts)
  if gate_weights == CLEAN_RESCALED and noise is not None and not config.normalize_gates:
    _, clean_experts = jax.lax.top_k(logits, config.experts_per_token)
    # Summed in the order of the experts, so that the factor is exactly one
    # where the choice is the clean one in another order.
    clean_mass, mass = (
        _gates(config, logits, jnp.sort(chosen, axis=-1)).sum(-1, keepdims=True)
        for chosen in (clean_experts, experts))
    gates = gates * (clean_mass / mass)
  if config.gates_in_model_dtype:
    gates = rounded(gates, jnp.dtype(config.dtype)).astype(jnp.float32)
  return experts, gates


def _gates(config, logits, experts):
  chosen = jnp.take_along_axis(logits, experts, axis=-1)
  if config.normalize_gates:
    # Equal to a softmax over all experts, renormalised over the chosen ones.
    return jax.nn.softmax(chosen, axis=-1)
  return jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
