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
EXTRA_GATES = ("model", "raw", "rescaled", "renormalized")


def with_experts(
  config: ModelConfig, count: int, gates: str = "model", mass: float | None = None
) -> ModelConfig:
  """Returns the model with another number of experts per token, k' instead of k.

  `gates` sets the gates of the chosen experts:

  * `model`: the model's own rule, at k'.
  * `raw`: the probabilities of all experts, not scaled.
  * `rescaled`: scaled so that they sum to what the gates of the best k alone would.
    Equal to `model` where gates are normalized.
  * `renormalized`: scaled so that they sum to one.

  Args:
    config: the model's architecture.
    count: k', the largest number with `mass`.
    gates: one of `EXTRA_GATES`.
    mass: a token's experts are the fewest that have this probability; see
      `ModelConfig.expert_mass`.

  Raises:
    ValueError: `count`, `gates` or `mass` is invalid.
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
    expert_mass=config.expert_mass if mass is None else mass,
    gate_mass_experts=config.experts_per_token if gates == "rescaled" else None,
    normalize_gates=(config.normalize_gates and gates != "raw") or gates == "renormalized",
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
  count: jax.Array | int | None = None,
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
    config: how many experts, whether gates are normalized, and the dtype that they are used in.
    logits: `[..., E]` float32 router logits.
    perturbed: `[..., E]` float32, the logits with noise, or None. An expert at -inf is left out.
    gate_weights: one of `GATE_WEIGHTS`.
    scales: `[E]`, u of each expert if the model has `gate_scales`.
    bias: `[E]`, the correction bias of a sigmoid router if the model has one. It never enters
      the gates.
    count: how many of the A experts are used, int32 broadcastable to `[...]`; None: all. Gates are
      then those of `with_experts(count)`.

  Returns:
    The chosen experts `[..., A]` int32, best first, and their gates `[..., A]` float32
    (rounded to `config.dtype` where the family rounds them). An expert that is left out has
    index E and a gate of zero.
  """
  if logits.shape[-1] == 1 and perturbed is None:  # no choice: a dense model
    return jnp.zeros(logits.shape, jnp.int32), jnp.ones(logits.shape, jnp.float32)
  source = logits if perturbed is None else perturbed
  values, experts = jax.lax.top_k(scores(config, source, bias), config.experts_per_token)
  banned = jnp.isneginf(values)
  left_out = banned | _beyond(config, logits, source, experts, count)
  gates_of = functools.partial(_gates, config, scales)
  by = source if gate_weights == NOISY else logits
  gates = gates_of(by, experts, left_out)
  if not config.normalize_gates:
    of_best = config.gate_mass_experts
    if gate_weights == CLEAN_RESCALED and perturbed is not None:
      best = of_best or config.experts_per_token
      _, clean = jax.lax.top_k(scores(config, logits, bias), best)
      unused = False if of_best else _beyond(config, logits, logits, clean, count)
      gates *= _mass(gates_of, logits, clean, unused) / _mass(gates_of, logits, experts, left_out)
    elif of_best is not None:
      whole = gates_of(by, experts, banned)
      gates *= whole[..., :of_best].sum(-1, keepdims=True) / gates.sum(-1, keepdims=True)
  if config.gate_multiplier != 1:
    gates = config.gate_multiplier * gates
  if config.gates_in_model_dtype:
    gates = rounded(gates, jnp.dtype(config.dtype)).astype(jnp.float32)
  return jnp.where(left_out, logits.shape[-1], experts), gates


def _beyond(config, logits, source, experts, count):
  """Returns which of the experts, best first, are beyond the count or the mass: `[..., A]`."""
  rank = jax.lax.broadcasted_iota(jnp.int32, experts.shape, experts.ndim - 1)
  beyond = jnp.zeros(experts.shape, bool)
  if count is not None:
    beyond |= rank >= jnp.broadcast_to(count, experts.shape[:-1])[..., None]
  if config.expert_mass is not None and config.expert_mass < 1:
    # XMoE (arXiv 2403.18926): a rank is used while those before it have less than the mass.
    # Compared with what is left, since a sum of probabilities reaches 1 too early in float32.
    by = logits if config.expert_mass_of == CLEAN else source
    if ROUTERS[config.router].gates_by_sigmoid:
      p = jax.nn.sigmoid(by)
      p /= p.sum(-1, keepdims=True)
    else:
      p = jax.nn.softmax(by, axis=-1)
    others = jnp.put_along_axis(p, experts, 0.0, axis=-1, inplace=False)
    chosen = jnp.take_along_axis(p, experts, axis=-1)
    left = jnp.cumsum(chosen[..., ::-1], axis=-1)[..., ::-1] + others.sum(-1, keepdims=True)
    beyond |= (left <= 1 - config.expert_mass) & (rank > 0)
  return beyond


def _mass(gates_of, logits, experts, left_out):
  """Returns the sum of the gates, `[..., 1]`.

  In the order of the experts, so that it is the same for two choices of one set.
  """
  none = logits.shape[-1]
  ordered = jnp.sort(jnp.where(left_out, none, experts), axis=-1)
  last = ordered == none
  return gates_of(logits, jnp.where(last, 0, ordered), last).sum(-1, keepdims=True)


def _gates(config, scales, logits, experts, left_out):
  """Returns the gates of the experts `[..., A]` from logits; zero for those left out."""
  if config.unit_gates:
    gates = 1.0
    if scales is not None:  # CMoE (arXiv 2502.04416)
      probabilities = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), experts, axis=-1)
      gates += to_compute_dtype(scales).astype(jnp.float32)[experts] * probabilities
    gates = jnp.where(left_out, 0.0, gates)
    return gates / gates.sum(-1, keepdims=True) if config.normalize_gates else gates
  chosen = jnp.where(left_out, -jnp.inf, jnp.take_along_axis(logits, experts, axis=-1))
  if ROUTERS[config.router].gates_by_sigmoid:
    gates = jax.nn.sigmoid(chosen)
    # As the models do where all scores underflow.
    return gates / (gates.sum(-1, keepdims=True) + 1e-20) if config.normalize_gates else gates
  if config.normalize_gates:
    # Equal to a softmax over all experts, renormalized over the chosen ones.
    return jax.nn.softmax(chosen, axis=-1)
  return jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
