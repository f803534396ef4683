"""Trains bit routers, everything else frozen (D2MoE, arXiv 2504.15299, section 4.2).

The loss is the KL divergence from the model at all bits to the model at the bits that are chosen,
per token, plus a multiple of the squared distance of the mean bits to those that are wanted. The
paper weights the mean bits instead, and tries weights until their number fits.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from roe_jax import transformer
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.training import TrainState


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of the training.

  Attributes:
    mean: bits that are wanted, on average over tokens and experts.
    steps: number of steps.
    learning_rate: peak of Adam's, which decays to zero as a cosine.
    weight: of the squared distance of the mean bits, in nats.
  """

  mean: float
  steps: int = 200
  learning_rate: float = 1e-2
  weight: float = 1.0

  @property
  def optimizer(self) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.steps))


def start(params: Params, settings: Settings) -> TrainState:
  """Returns the state before the first step; its parameters are the routers of `params`."""
  routers = params.layers.bit_router.astype(jnp.float32)
  return TrainState(jnp.zeros((), jnp.int32), routers, settings.optimizer.init(routers))


def with_routers(params: Params, routers: jax.Array | None) -> Params:
  """Returns parameters with bit routers in the dtype of the others, or without any."""
  if routers is not None:
    routers = routers.astype(params.final_norm.dtype)
  return params.replace(layers=params.layers.replace(bit_router=routers))


def divergence(
  params: Params,
  config: ModelConfig,
  routers: jax.Array,
  tokens_BxT: jax.Array,
  used_BxT: jax.Array,
  trains: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Returns the KL divergence from all bits, nats per token, and the mean bits.

  Args:
    params: the model.
    config: its architecture.
    routers: `[L, E, W, D]` float32.
    tokens_BxT: int32.
    used_BxT: bool, the tokens that count.
    trains: see `bit_routing.apply`.
  """
  forward = functools.partial(transformer.forward, config=config, tokens_BxT=tokens_BxT)
  strategy = "dense" if trains else None
  whole, _ = forward(with_routers(params, None), strategy=strategy)
  routed, outputs = forward(
    with_routers(params, routers), strategy=strategy, trains_bits=trains, keep=("bits",)
  )
  expected, found = jax.lax.stop_gradient(jax.nn.log_softmax(whole)), jax.nn.log_softmax(routed)
  kl = (jnp.exp(expected) * (expected - found)).sum(-1)
  return jnp.mean(kl, where=used_BxT), jnp.mean(outputs.bits, where=used_BxT[None, ..., None])


@functools.partial(jax.jit, static_argnames=("config", "settings"))
def train_step(
  state: TrainState,
  params: Params,
  tokens_BxT: jax.Array,
  used_BxT: jax.Array,
  *,
  config: ModelConfig,
  settings: Settings,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Runs one step; returns the new state, and "loss", "kl" (nats per token) and "bits"."""

  def loss(routers):
    kl, bits = divergence(params, config, routers, tokens_BxT, used_BxT, trains=True)
    value = kl + settings.weight * (bits - settings.mean) ** 2
    return value, {"loss": value, "kl": kl, "bits": bits}

  (_, values), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
  updates, opt_state = settings.optimizer.update(gradient, state.opt_state)
  routers = optax.apply_updates(state.params, updates)
  return TrainState(state.step + 1, routers, opt_state), values


def train(
  params: Params,
  config: ModelConfig,
  batch: Callable[[int], tuple[jax.Array, jax.Array]],
  settings: Settings,
) -> Params:
  """Trains the bit routers of a model and returns it with them.

  Args:
    params: the model, with the first routers.
    config: its architecture.
    batch: returns the tokens of a step `[B, T]` int32, and which of them count, bool.
    settings: of the training.
  """
  state = start(params, settings)
  for step in range(settings.steps):
    state, _ = train_step(state, params, *batch(step), config=config, settings=settings)
  return with_routers(params, state.params)
