"""Routing: from router logits to the chosen experts and their gates."""

import functools

import jax
import jax.numpy as jnp

from roe_jax.config import ModelConfig
from roe_jax.numerics import rounded, to_compute_dtype
from roe_jax.routers import ROUTERS

CLEAN = "clean"
NOISY = "noisy"
CLEAN_RESCALED = "clean_rescaled"
GATE_WEIGHTS = (CLEAN, NOISY, CLEAN_RESCALED)
EXTRA_GATES = ("model", "rescaled", "renormalized")


def with_experts(config: ModelConfig, count: int, gates: str = "model") -> ModelConfig:
  """Returns the model with another number of experts per token, k' instead of k.

  `gates` sets the gates of the chosen experts:

  * `model`: the model's own rule, at k'.
  * `rescaled`: scaled so that they sum to what the gates of the best k alone would.
    Equal to `model` where gates are normalized.
  * `renormalized`: scaled so that they sum to one.

  Raises:
    ValueError: `count` or `gates` is invalid.
  """
  if gates not in EXTRA_GATES:
    raise ValueError(f"unknown gates {gates!r}; choose one of {', '.join(EXTRA_GATES)}")
  least = config.experts_per_token if gates == "rescaled" else 1
  if not least <= count <= config.num_experts:
    raise ValueError(
      f"the number of experts per token must lie in [{least}, {config.num_experts}] "
      f"for a model with {config.num_experts} experts, got {count}"
    )
  return config.replace(
    experts_per_token=count,
    gate_mass_experts=config.experts_per_token if gates == "rescaled" else None,
    normalize_gates=config.normalize_gates or gates == "renormalized",
  )


def scores(config: ModelConfig, logits: jax.Array, bias: jax.Array | None = None) -> jax.Array:
  """Returns the scores by which experts are chosen.

  These are the logits, or for a sigmoid router (DeepSeek-V3, arXiv 2412.19437 section 2.1.2)
  their sigmoids plus the correction bias, and -inf outside the groups with the largest sum of
  their two largest scores.

  Args:
    config: the kind of router, and its groups.
    logits: `[..., E]` float32, with or without noise. An expert at -inf stays there, and adds
      nothing to its group.
    bias: `[E]` float32, the correction bias.

  Returns:
    `[..., E]` float32.
  """
  if not ROUTERS[config.router].gates_by_sigmoid:
    return logits
  values, banned = jax.nn.sigmoid(logits), jnp.isneginf(logits)
  if bias is not None:
    values += jnp.broadcast_to(bias, values.shape)
  if config.expert_groups > 1:
    in_groups = (*logits.shape[:-1], config.expert_groups, -1)
    two, _ = jax.lax.top_k(jnp.where(banned, -jnp.inf, values).reshape(in_groups), 2)
    none = jnp.isneginf(two)
    totals = jnp.where(none[..., 0], -jnp.inf, jnp.where(none, 0.0, two).sum(-1))
    _, kept = jax.lax.top_k(totals, config.groups_per_token)
    is_kept = jax.nn.one_hot(kept, config.expert_groups, dtype=bool).any(-2)
    banned |= ~jnp.repeat(is_kept, config.num_experts // config.expert_groups, axis=-1)
  return jnp.where(banned, -jnp.inf, values)


@jax.named_scope("router")
def route(
  config: ModelConfig,
  logits: jax.Array,
  perturbed: jax.Array | None = None,
  gate_weights: str = CLEAN,
  scales: jax.Array | None = None,
  bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Chooses the experts with the largest perturbed logits and computes their gates.

  A sigmoid router chooses by the `scores` of the perturbed logits: noise enters before the
  sigmoid and so before the correction bias, and may change the chosen groups.

  With Gumbel noise the choice is arXiv 2509.17238 eq. (1). The paper defines only the
  choice; `gate_weights` sets the gates of the chosen experts:

  * `clean`: the model's gates from the unperturbed logits.
  * `noisy`: the model's gates from the perturbed logits.
  * `clean_rescaled`: `clean`, scaled to the sum of the gates of the unperturbed
    choice. Differs from `clean` only where gates are not normalized (OLMoE).

  Args:
    config: whether gates are normalized, and the dtype that they are used in.
    logits: `[..., E]` float32 router logits.
    perturbed: `[..., E]` float32, the logits with noise, or None. An expert at -inf has a
      gate of zero.
    gate_weights: one of `GATE_WEIGHTS`.
    scales: `[E]`, u of each expert if the model has `gate_scales`.
    bias: `[E]`, the correction bias of a sigmoid router if the model has one. It never enters
      the gates.

  Returns:
    The chosen experts `[..., A]` int32, best first, and their gates `[..., A]` float32
    (rounded to `config.dtype` where the family rounds them).
  """
  if logits.shape[-1] == 1 and perturbed is None:  # no choice: a dense model
    return jnp.zeros(logits.shape, jnp.int32), jnp.ones(logits.shape, jnp.float32)
  source = logits if perturbed is None else perturbed
  ranked = scores(config, source, bias)
  _, experts = jax.lax.top_k(ranked, config.experts_per_token)
  gates_of = functools.partial(_gates, config, scales)
  gates = gates_of(source if gate_weights == NOISY else logits, ranked, experts)
  if not config.normalize_gates:
    mass_of = config.gate_mass_experts or config.experts_per_token
    if gate_weights == CLEAN_RESCALED and perturbed is not None:
      clean = scores(config, logits, bias)
      _, clean_experts = jax.lax.top_k(clean, mass_of)
      # Summed in the order of the experts, so that the factor is exactly one
      # where both choices are the same set.
      clean_mass = gates_of(logits, clean, jnp.sort(clean_experts)).sum(-1, keepdims=True)
      mass = gates_of(logits, ranked, jnp.sort(experts)).sum(-1, keepdims=True)
      gates = gates * (clean_mass / mass)
    elif config.gate_mass_experts is not None:
      gates = gates * (gates[..., :mass_of].sum(-1, keepdims=True) / gates.sum(-1, keepdims=True))
  if config.gate_multiplier != 1:
    gates = config.gate_multiplier * gates
  if config.gates_in_model_dtype:
    gates = rounded(gates, jnp.dtype(config.dtype)).astype(jnp.float32)
  return experts, gates


def _gates(config, scales, logits, ranked, experts):
  left_out = jnp.isneginf(jnp.take_along_axis(ranked, experts, axis=-1))
  if config.unit_gates:
    gates = 1.0
    if scales is not None:  # CMoE (arXiv 2502.04416)
      probabilities = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), experts, axis=-1)
      gates += to_compute_dtype(scales).astype(jnp.float32)[experts] * probabilities
    gates = jnp.where(left_out, 0.0, gates)
    return gates / gates.sum(-1, keepdims=True) if config.normalize_gates else gates
  chosen = jnp.take_along_axis(logits, experts, axis=-1)
  if ranked is not logits:
    chosen = jnp.where(left_out, -jnp.inf, chosen)
  if ROUTERS[config.router].gates_by_sigmoid:
    gates = jax.nn.sigmoid(chosen)
    # As the models do where all scores underflow.
    return gates / (gates.sum(-1, keepdims=True) + 1e-20) if config.normalize_gates else gates
  if config.normalize_gates:
    # Equal to a softmax over all experts, renormalized over the chosen ones.
    return jax.nn.softmax(chosen, axis=-1)
  return jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
