"""Training: loss, optimizer and one step, as pure functions.

Routers get two auxiliary losses: the load-balancing loss of Switch Transformers
(arXiv 2101.03961 eq. 4), with the fraction of (token, choice) pairs in place of
the fraction of tokens since several experts are chosen, and the z-loss of
ST-MoE (arXiv 2202.08906 eq. 5), both averaged over layers as in OLMoE
(arXiv 2409.02060 section 3).
"""

import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp
import optax

from roe_jax import noise as noise_lib
from roe_jax import params as params_lib
from roe_jax import transformer
from roe_jax.config import ModelConfig
from roe_jax.params import Params

STRATEGIES = ("padded", "dense")  # Those of `experts.apply` with a reverse mode.


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """How to train; hashable, so that it can be a static argument.

  Attributes:
    num_steps: at which the learning rate has decayed.
    learning_rate: the peak, reached after `warmup_steps`.
    final_learning_rate: where the cosine ends.
    warmup_steps: of linear increase from zero.
    weight_decay: of AdamW, on all parameters but norms.
    beta1, beta2: decay rates of AdamW's moments.
    max_grad_norm: global norm to which gradients are clipped.
    balance_coefficient: factor on the load-balancing loss.
    z_coefficient: factor on the router z-loss.
    noise_temperature: τ of Gumbel noise on all routers while training; 0 is none.
    noise_seed: of that noise.
    strategy: of the experts, one of `STRATEGIES`.
  """

  num_steps: int
  learning_rate: float = 1e-3
  final_learning_rate: float = 0.0
  warmup_steps: int = 100
  weight_decay: float = 0.1
  beta1: float = 0.9
  beta2: float = 0.95
  max_grad_norm: float = 1.0
  balance_coefficient: float = 0.01
  z_coefficient: float = 0.001
  noise_temperature: float = 0.0
  noise_seed: int = 0
  strategy: str = "padded"

  def __post_init__(self):
    if self.num_steps < 1:
      raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
    if not 0 <= self.warmup_steps:
      raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")
    if not self.noise_temperature >= 0:
      raise ValueError(f"noise_temperature must not be negative, got {self.noise_temperature}")
    if self.strategy not in STRATEGIES:
      raise ValueError(
        f"expert strategy {self.strategy!r} cannot be trained with; choose one of "
        f"{', '.join(STRATEGIES)}"
      )


class Batch(struct.PyTreeNode):
  """Texts to train on, padded on the right.

  Attributes:
    tokens: `[B, T]` int32.
    weights: `[B, T]` float32, of predicting each token from those before it.
      A token of weight zero counts as padding: it is in no loss. The first
      token of a text is predicted from nothing, so its weight is not used.
    ids: `[B]` uint32, which address the routing noise of each text.
  """

  tokens: jax.Array
  weights: jax.Array
  ids: jax.Array


class TrainState(struct.PyTreeNode):
  """Everything a step changes.

  Attributes:
    step: scalar int32, steps done.
    params: the model's parameters.
    opt_state: the optimizer's state.
  """

  step: jax.Array
  params: Params
  opt_state: optax.OptState


def schedule(settings: TrainSettings) -> optax.Schedule:
  """Learning rate by step: linear warm-up, then a cosine to the final rate."""
  warmup = min(settings.warmup_steps, settings.num_steps - 1)
  return optax.warmup_cosine_decay_schedule(
    0.0 if warmup else settings.learning_rate,
    settings.learning_rate,
    warmup,
    settings.num_steps,
    settings.final_learning_rate,
  )


def optimizer(config: ModelConfig, settings: TrainSettings) -> optax.GradientTransformation:
  """AdamW with clipping by global norm; norms, which start at one, do not decay."""
  decayed = jax.tree.map(lambda spec: spec.init != "ones", params_lib.describe(config))
  return optax.chain(
    optax.clip_by_global_norm(settings.max_grad_norm),
    optax.adamw(
      schedule(settings),
      settings.beta1,
      settings.beta2,
      weight_decay=settings.weight_decay,
      mask=decayed,
    ),
  )


def init_state(config: ModelConfig, settings: TrainSettings, key: jax.Array) -> TrainState:
  """A state with random parameters; `key` is consumed."""
  params = params_lib.initialize(config, key)
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer(config, settings).init(params))


def cross_entropy(logits_BxTxV: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
  """-log p of tokens 1, 2, ... given those before them: float32 `[B, T-1]`."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits_BxTxV[:, :-1].astype(jnp.float32), tokens_BxT[:, 1:]
  )


def expert_loads(experts_LxBxTxA: jax.Array, mask_BxT: jax.Array, num_experts: int) -> jax.Array:
  """Share of the (token, choice) pairs that each expert gets: float32 `[L, E]`.

  Each layer's shares sum to one.
  """
  chosen = jax.nn.one_hot(experts_LxBxTxA, num_experts).sum(-2)
  counts = jnp.einsum("lbte,bt->le", chosen, mask_BxT.astype(jnp.float32))
  return counts / counts.sum(-1, keepdims=True)


def balance_loss(
  router_logits_LxBxTxE: jax.Array, loads_LxE: jax.Array, mask_BxT: jax.Array
) -> jax.Array:
  """E · Σ_e f_e P_e, averaged over layers: 1 when perfectly balanced.

  f is `loads_LxE` and P the mean router probability over the tokens of
  `mask_BxT`; gradients flow through P alone.
  """
  mask = mask_BxT.astype(jnp.float32)
  probabilities = jax.nn.softmax(router_logits_LxBxTxE.astype(jnp.float32))
  mean = jnp.einsum("lbte,bt->le", probabilities, mask) / mask.sum()
  return loads_LxE.shape[-1] * jnp.mean(jnp.sum(loads_LxE * mean, -1))


def z_loss(router_logits_LxBxTxE: jax.Array, mask_BxT: jax.Array) -> jax.Array:
  """Mean of the squared logsumexp of the router logits over tokens and layers."""
  mask = mask_BxT.astype(jnp.float32)
  squared = jnp.square(jax.nn.logsumexp(router_logits_LxBxTxE.astype(jnp.float32), axis=-1))
  return jnp.mean(jnp.einsum("lbt,bt->l", squared, mask)) / mask.sum()


def _noise(config, settings, batch):
  if not settings.noise_temperature:
    return None
  positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
  key = noise_lib.stream_key(settings.noise_seed, noise_lib.ROUTING)
  return noise_lib.RoutingNoise(
    keys=noise_lib.position_keys(key, batch.ids, positions),
    temperatures=jnp.full(config.num_layers, settings.noise_temperature, jnp.float32),
    member=jnp.int32(1),
  )


def loss(
  params: Params, batch: Batch, config: ModelConfig, settings: TrainSettings
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The training loss and its parts.

  Returns:
    A float32 scalar, and float32 scalars `cross_entropy` (weighted mean, in
    nats), `balance_loss`, `z_loss` (both without their coefficients) and
    `load_entropy` (of the experts' loads, mean over layers; 1 is even).
  """
  logits, outputs = transformer.forward(
    params,
    config,
    batch.tokens,
    noise=_noise(config, settings, batch),
    keep=("experts", "router_logits"),
    strategy=settings.strategy,
  )
  weights = batch.weights[:, 1:]
  mask = batch.weights > 0
  loads = expert_loads(outputs.experts, mask, config.num_experts)
  parts = {
    "cross_entropy": (
      jnp.sum(weights * cross_entropy(logits, batch.tokens)) / jnp.maximum(weights.sum(), 1e-6)
    ),
    "balance_loss": balance_loss(outputs.router_logits, loads, mask),
    "z_loss": z_loss(outputs.router_logits, mask),
  }
  total = (
    parts["cross_entropy"]
    + settings.balance_coefficient * parts["balance_loss"]
    + settings.z_coefficient * parts["z_loss"]
  )
  entropy = jnp.mean(jax.scipy.special.entr(loads).sum(-1)) / jnp.log(config.num_experts)
  return total, parts | {"load_entropy": entropy}


@functools.partial(jax.jit, static_argnames=("config", "settings"), donate_argnames="state")
def train_step(
  state: TrainState, batch: Batch, *, config: ModelConfig, settings: TrainSettings
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One step of AdamW; `state` is consumed.

  Returns:
    The state after it, and float32 scalars: `loss`, its parts as in `loss`,
    `grad_norm` (before clipping) and `learning_rate` (of this step).
  """
  (value, parts), grads = jax.value_and_grad(loss, has_aux=True)(
    state.params, batch, config, settings
  )
  updates, opt_state = optimizer(config, settings).update(grads, state.opt_state, state.params)
  metrics = {
    "loss": value,
    **parts,
    "grad_norm": optax.tree.norm(grads),
    "learning_rate": schedule(settings)(state.step),
  }
  return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics
