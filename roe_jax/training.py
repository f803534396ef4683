"""Training: loss, optimizer and training step, as pure functions.

Routers have two auxiliary losses: the load-balancing loss of Switch Transformers
(arXiv 2101.03961 eq. 4), computed with the fraction of (token, choice) pairs instead of
tokens since a token has several experts, and the z-loss of ST-MoE (arXiv 2202.08906
eq. 5). Both are averaged over layers as in OLMoE (arXiv 2409.02060 section 3).
"""

import dataclasses
import functools
import math
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from roe_jax import noise as noise_lib
from roe_jax import params as params_lib
from roe_jax import perturbations, transformer
from roe_jax.config import ModelConfig
from roe_jax.layer_inputs import RouterInputs
from roe_jax.params import Params
from roe_jax.routers import LINEAR, ROUTERS
from roe_jax.routing import CLEAN, NOISY

STRATEGIES = ("padded", "dense")  # the differentiable ones of `experts.apply`


@dataclasses.dataclass(frozen=True)
class TrainSettings:
  """Training settings; hashable, so that they can be a static argument.

  Attributes:
    num_steps: training steps, after which the learning rate has decayed.
    learning_rate: peak learning rate, reached after `warmup_steps`.
    final_learning_rate: learning rate at the end of the cosine decay.
    warmup_steps: steps of linear warm-up from zero.
    weight_decay: AdamW's weight decay, on all parameters except norms.
    beta1, beta2: decay rates of AdamW's moments.
    max_grad_norm: global norm to which gradients are clipped.
    balance_coefficient: weight of the load-balancing loss.
    z_coefficient: weight of the router z-loss.
    balance_groups: number of groups of sequences that each have a load-balancing loss of their own;
      1: one of the whole batch, up to one per sequence. In between, the loss of a group of devices
      (Pangu Ultra MoE, arXiv 2505.04519).
    bias_rate: γ by which a step raises the correction bias of each expert with less than the mean
      load, and lowers that of those with more (arXiv 2408.15664); 0 leaves the biases as they are.
    noise_temperature: τ of Gumbel noise on all routers during training; 0 for none.
    min_experts: if above 0, each step draws how many experts per token are used, from this number
      to the model's, all equally likely (Matryoshka MoE, arXiv 2509.26520).
    experts_drawn_by: whether each layer has a number of its own ("layer", the paper's best) or all
      have the same ("batch").
    members: M; above 1, each of M members has its own part of the experts and its own loss (E3,
      arXiv 2110.03360; see `perturbations.partition`).
    noise_seed: seed of that noise and of these draws.
    detach_router_state, rematerialize: see `LayerOptions`.
    strategy: expert strategy, one of `STRATEGIES`.
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
  balance_groups: int = 1
  bias_rate: float = 0.0
  noise_temperature: float = 0.0
  min_experts: int = 0
  experts_drawn_by: str = "layer"
  members: int = 1
  noise_seed: int = 0
  detach_router_state: bool = False
  rematerialize: bool = False
  strategy: str = "padded"

  def __post_init__(self):
    if self.num_steps < 1:
      raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
    if not 0 <= self.warmup_steps:
      raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")
    if not self.noise_temperature >= 0:
      raise ValueError(f"noise_temperature must not be negative, got {self.noise_temperature}")
    for name in ("members", "balance_groups"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
    if self.min_experts < 0:
      raise ValueError(f"min_experts must not be negative, got {self.min_experts}")
    if self.experts_drawn_by not in ("layer", "batch"):
      raise ValueError(f"experts_drawn_by must be layer or batch, got {self.experts_drawn_by!r}")
    if not self.bias_rate >= 0:
      raise ValueError(f"bias_rate must not be negative, got {self.bias_rate}")
    if self.strategy not in STRATEGIES:
      raise ValueError(
        f"the expert strategy {self.strategy!r} is not differentiable; choose one of "
        f"{', '.join(STRATEGIES)}"
      )


class Batch(struct.PyTreeNode):
  """Training sequences, padded on the right, as arrays of JAX or NumPy.

  Attributes:
    tokens: `[B, T]` int32.
    weights: `[B, T]` float32 loss weights of predicting each token. A token with weight
      zero is padding for all losses. A sequence's first token is not predicted, so its
      weight is not used.
    ids: `[B]` uint32, which address the routing noise of each sequence.
  """

  tokens: Any
  weights: Any
  ids: Any


class TrainState(struct.PyTreeNode):
  """Everything that a training step changes.

  Attributes:
    step: scalar int32, number of steps done.
    params: what is trained: the model's parameters, or another pytree of weights.
    opt_state: optimizer state.
  """

  step: jax.Array
  params: Any
  opt_state: optax.OptState


def schedule(settings: TrainSettings) -> optax.Schedule:
  """Returns the learning-rate schedule: linear warm-up, then cosine decay."""
  warmup = min(settings.warmup_steps, settings.num_steps - 1)
  return optax.warmup_cosine_decay_schedule(
    0.0 if warmup else settings.learning_rate,
    settings.learning_rate,
    warmup,
    settings.num_steps,
    settings.final_learning_rate,
  )


def optimizer(config: ModelConfig, settings: TrainSettings) -> optax.GradientTransformation:
  """Returns AdamW with clipping by global norm, without decay of norms and correction biases."""
  specs = params_lib.describe(config)
  decayed = jax.tree.map(
    lambda s: s.init != "ones" and s is not specs.layers.correction_bias, specs
  )
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
  """Returns a state with random parameters; `key` is consumed."""
  params: Any = params_lib.initialize(config, key)
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer(config, settings).init(params))


def cross_entropy(logits_BxTxV: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
  """Returns -log p of tokens 1, 2, ... given those before them, float32 `[B, T-1]`."""
  return optax.softmax_cross_entropy_with_integer_labels(
    logits_BxTxV[:, :-1].astype(jnp.float32), tokens_BxT[:, 1:]
  )


def expert_loads(experts_LxBxTxA: jax.Array, mask_BxT: jax.Array, num_experts: int) -> jax.Array:
  """Returns the fraction of (token, choice) pairs of each expert, float32 `[L, E]`."""
  chosen = jax.nn.one_hot(experts_LxBxTxA, num_experts).sum(-2)
  counts = jnp.einsum("lbte,bt->le", chosen, mask_BxT.astype(jnp.float32))
  return counts / counts.sum(-1, keepdims=True)


def balance_loss(
  router_logits_LxBxTxE: jax.Array, loads_LxE: jax.Array, mask_BxT: jax.Array, router: str = LINEAR
) -> jax.Array:
  """Returns E · Σ_e f_e P_e, averaged over layers; 1 if perfectly balanced.

  f is `loads_LxE`, and P the mean router probability over the tokens in `mask_BxT`: of a kind of
  `router` whose gates are sigmoids, these divided by their sum (DeepSeek-V3).
  Gradients flow only through P.
  """
  mask = mask_BxT.astype(jnp.float32)
  logits = router_logits_LxBxTxE.astype(jnp.float32)
  if ROUTERS[router].gates_by_sigmoid:
    probabilities = jax.nn.sigmoid(logits)
    probabilities /= probabilities.sum(-1, keepdims=True)
  else:
    probabilities = jax.nn.softmax(logits)
  mean = jnp.einsum("lbte,bt->le", probabilities, mask) / mask.sum()
  return loads_LxE.shape[-1] * jnp.mean(jnp.sum(loads_LxE * mean, -1))


def z_loss(router_logits_LxBxTxE: jax.Array, mask_BxT: jax.Array) -> jax.Array:
  """Returns the mean squared logsumexp of the router logits over tokens and layers."""
  mask = mask_BxT.astype(jnp.float32)
  squared = jnp.square(jax.nn.logsumexp(router_logits_LxBxTxE.astype(jnp.float32), axis=-1))
  return jnp.mean(jnp.einsum("lbt,bt->l", squared, mask)) / mask.sum()


def _noise(config, settings, batch, member):
  """Returns the routing noise of a member, counted from 1, or None."""
  tau, family = settings.noise_temperature, perturbations.FAMILIES[perturbations.GUMBEL]
  if settings.members > 1:
    family = perturbations.partition(settings.members, gumbel=tau > 0)
    tau = tau or 1.0
  if not tau:
    return None
  positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
  key = noise_lib.stream_key(settings.noise_seed, noise_lib.ROUTING)
  return noise_lib.RoutingNoise(
    keys=noise_lib.position_keys(key, batch.ids, positions),
    temperatures=jnp.full(config.num_layers, tau, jnp.float32),
    member=jnp.int32(member),
    family=family,
    num_noisy=settings.members,
  )


def experts_of_step(
  config: ModelConfig, settings: TrainSettings, step: jax.Array | int
) -> jax.Array | None:
  """Returns how many experts each layer uses in a step, int32 `[1, L]`, or None for all A.

  Raises:
    ValueError: the model uses fewer than `settings.min_experts`.
  """
  least, most = settings.min_experts, config.experts_per_token
  if not least:
    return None
  if least > most:
    raise ValueError(f"min_experts {least} exceeds the model's experts_per_token {most}")
  key = noise_lib.stream_key(settings.noise_seed, noise_lib.TRAINING)
  drawn = config.num_layers if settings.experts_drawn_by == "layer" else 1
  counts = jax.random.randint(jax.random.fold_in(key, step), (1, drawn), least, most + 1)
  return jnp.broadcast_to(counts, (1, config.num_layers))


def loss(
  params: Params,
  batch: Batch,
  config: ModelConfig,
  settings: TrainSettings,
  step: jax.Array | int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Computes the training loss and its parts.

  Args:
    params: the model's parameters.
    batch: the sequences.
    config: its architecture.
    settings: the settings.
    step: the step, which addresses its draws.

  Returns:
    The loss, a float32 scalar, and a dict of float32 scalars: `cross_entropy` (weighted
    mean, in nats), `balance_loss` and `z_loss` (unweighted), and `load_entropy` (entropy
    of the experts' loads, mean over layers; 1 is uniform, 0 is one expert).
  """
  total, (parts, _) = _loss(params, batch, config, settings, step)
  return total, parts


def _loss(params, batch, config, settings, step):
  """Returns the loss, and its parts and the experts' loads; means over members."""
  members = range(1, settings.members + 1)
  found = [_member_loss(params, batch, config, settings, step, member) for member in members]
  parts, loads = jax.tree.map(lambda *values: sum(values) / len(values), *found)
  total = (
    parts["cross_entropy"]
    + settings.balance_coefficient * parts["balance_loss"]
    + settings.z_coefficient * parts["z_loss"]
  )
  entropy = jnp.mean(jax.scipy.special.entr(loads).sum(-1)) / math.log(max(config.num_experts, 2))
  return total, (parts | {"load_entropy": entropy}, loads)


def _member_loss(params, batch, config, settings, step, member):
  """Returns the parts of a member's loss, and the loads of the experts `[L, E]`."""
  logits, outputs = transformer.forward(
    params,
    config,
    batch.tokens,
    noise=_noise(config, settings, batch, member),
    router=RouterInputs(counts=experts_of_step(config, settings, step)),
    keep=("experts", "router_logits"),
    gate_weights=CLEAN if settings.members == 1 else NOISY,
    strategy=settings.strategy,
    detach_router_state=settings.detach_router_state,
    rematerialize=settings.rematerialize,
  )
  weights, mask = batch.weights[:, 1:], batch.weights > 0
  of_router = outputs.router_logits
  if settings.members > 1:
    own = perturbations.parts_of(config.num_experts, settings.members) == member - 1
    of_router = jnp.where(jnp.broadcast_to(own, of_router.shape), of_router, -jnp.inf)
  loads = expert_loads(outputs.experts, mask, config.num_experts)
  parts = {
    "cross_entropy": (
      jnp.sum(weights * cross_entropy(logits, batch.tokens)) / jnp.maximum(weights.sum(), 1e-6)
    ),
    "balance_loss": _balance(of_router, outputs.experts, mask, config, settings) / settings.members,
    "z_loss": z_loss(of_router, mask),
  }
  return parts, loads


def _balance(router_logits_LxBxTxE, experts_LxBxTxA, mask_BxT, config, settings):
  """Returns the mean of the groups' balance losses."""
  groups, size = settings.balance_groups, len(mask_BxT)
  if size % groups:
    raise ValueError(f"a batch of {size} sequences cannot be split into {groups} balance_groups")

  def of_group(logits, chosen, mask):
    loads = expert_loads(chosen, mask, config.num_experts)
    return balance_loss(logits, loads, mask, config.router)

  def split(a, axis):
    a = a.reshape(*a.shape[:axis], groups, size // groups, *a.shape[axis + 1 :])
    return jnp.moveaxis(a, axis, 0)

  if groups == 1:
    return of_group(router_logits_LxBxTxE, experts_LxBxTxA, mask_BxT)
  by_group = split(router_logits_LxBxTxE, 1), split(experts_LxBxTxA, 1), split(mask_BxT, 0)
  return jax.vmap(of_group)(*by_group).mean()


def _with_balanced_biases(params, loads_LxE, rate):
  """Returns the parameters with correction biases a step nearer to equal loads."""
  step = rate * jnp.sign(loads_LxE.mean(-1, keepdims=True) - loads_LxE)
  bias = params.layers.correction_bias + step
  return params.replace(layers=params.layers.replace(correction_bias=bias))


@functools.partial(jax.jit, static_argnames=("config", "settings"), donate_argnames="state")
def train_step(
  state: TrainState, batch: Batch, *, config: ModelConfig, settings: TrainSettings
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Runs one training step; `state` is consumed.

  Returns:
    The new state, and a dict of float32 scalars: `loss`, the parts returned by `loss`,
    `grad_norm` (before clipping) and `learning_rate` (of this step).
  """
  params: Any = state.params
  compute = jax.value_and_grad(_loss, has_aux=True)
  (value, (parts, loads)), grads = compute(params, batch, config, settings, state.step)
  updates, opt_state = optimizer(config, settings).update(grads, state.opt_state, params)
  metrics = {
    "loss": value,
    **parts,
    "grad_norm": optax.tree.norm(grads),
    "learning_rate": schedule(settings)(state.step),
  }
  params = optax.apply_updates(params, updates)
  if settings.bias_rate and config.correction_bias:
    params = _with_balanced_biases(params, loads, settings.bias_rate)
  return TrainState(state.step + 1, params, opt_state), metrics
