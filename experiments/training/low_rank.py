"""Low-rank adapters (LoRA, arXiv 2106.09685) of a model's matrices.

The model width D is the last axis of every matrix, so an adapter of any matrix `[L, ..., D]` is a
pair `[L, ..., r]` and `[L, r, D]` whose product is added to it. Other parameters of the layers can
be tuned as they are.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

from roe_jax import params as params_lib
from roe_jax import training, transformer
from roe_jax.checkpoint_folder import named_leaves
from roe_jax.config import ModelConfig
from roe_jax.layer_inputs import LayerOptions, TokenBatch
from roe_jax.params import LayerParams, Params
from roe_jax.training import TrainSettings, TrainState

GATE_SCALES = "gate_scales"


class Tuned(struct.PyTreeNode):
  """What fine-tuning changes, by the names of `LayerParams` ("attention.query").

  Attributes:
    left, right: float32 `[L, ..., r]` and `[L, r, D]` of each matrix `[L, ..., D]`.
    whole: parameters that are replaced, float32.
  """

  left: dict[str, Any]
  right: dict[str, Any]
  whole: dict[str, Any]


def matrices(config: ModelConfig) -> list[str]:
  """Returns the names of the matrices that get adapters: all in layers but the router's."""
  return [
    name
    for name, spec in named_leaves(params_lib.describe(config).layers).items()
    if spec.axes[-1] == "embed"
    and len(spec.axes) > 2
    and name.split("_")[-1] != "bias"
    and not name.startswith("router")
  ]


def init(
  params: Params, config: ModelConfig, rank: int, whole: Sequence[str], key: jax.Array
) -> Tuned:
  """Returns adapters that leave the model unchanged: `left` is zero.

  Args:
    params: the model's parameters.
    config: its architecture.
    rank: r; 0 for no adapters.
    whole: names of the parameters that are tuned as they are.
    key: is consumed.
  """
  leaves = named_leaves(params.layers)
  names = matrices(config) if rank else []
  deviation = config.d_model**-0.5
  return Tuned(
    {name: jnp.zeros((*leaves[name].shape[:-1], rank)) for name in names},
    {
      name: deviation * jax.random.normal(k, (config.num_expert_layers, rank, config.d_model))
      for name, k in zip(names, jax.random.split(key, len(names) or 1))
    },
    {name: leaves[name].astype(jnp.float32) for name in whole},
  )


def merge(layers: LayerParams, tuned: Tuned) -> LayerParams:
  """Returns float32 layers with the adapters added to their matrices."""

  def merged(name, leaf):
    if name in tuned.whole:
      return tuned.whole[name]
    if name not in tuned.left:
      return leaf
    product = jnp.einsum(
      "l...r,lrd->l...d", tuned.left[name], tuned.right[name], precision=jax.lax.Precision.HIGHEST
    )
    return leaf + product

  leaves = [merged(name, leaf) for name, leaf in named_leaves(layers).items()]
  return jax.tree.unflatten(jax.tree.structure(layers), leaves)


def forward(
  params: Params, config: ModelConfig, tuned: Tuned, tokens_BxT: jax.Array, strategy: str
) -> jax.Array:
  """Computes logits `[B, T, V]` with adapters, which are added layer by layer.

  So the derivative by a whole matrix exists for one layer at a time. For the derivative, merged
  matrices, attention scores and what is between products are computed again.

  Args:
    params: float32 parameters.
    config: the architecture; T is at most its sliding window.
    tuned: the adapters.
    tokens_BxT: int32.
    strategy: a differentiable one of `experts.apply`.
  """
  one_layer = config.replace(
    num_layers=1, sliding_window=None, sliding_layers=(), first_dense_layers=0, d_dense=0
  )
  batch = TokenBatch(jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1]), tokens_BxT.shape))
  options = LayerOptions(strategy=strategy)

  def block(x, layer):
    layers, tuned = jax.tree.map(lambda a: a[None], layer)
    merged = merge(layers, tuned)
    of_layer = Params(None, merged, None, None, router_cell=params.router_cell)
    x, _, _ = transformer.run_layers(of_layer, one_layer, x, batch, options=options)
    return x, None

  x = transformer.embed(params, config, tokens_BxT)
  dense = LayerOptions((0, config.first_dense_layers), strategy=strategy)
  x, _, _ = transformer.run_layers(params, config, x, batch, options=dense)
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  x, _ = jax.lax.scan(jax.checkpoint(block, policy=policy), x, (params.layers, tuned))
  return transformer.unembed(params, config, x)


def optimizer(settings: TrainSettings, gate_learning_rate: float) -> optax.GradientTransformation:
  """Returns AdamW with clipping by global norm, and another peak learning rate of gate scales."""

  def adamw(rate):
    schedule = training.schedule(dataclasses.replace(settings, learning_rate=rate))
    return optax.adamw(schedule, settings.beta1, settings.beta2, weight_decay=settings.weight_decay)

  def labels(tuned):
    others = lambda values: dict.fromkeys(values, "others")
    gates = {name: "gates" for name in tuned.whole if name == GATE_SCALES}
    return Tuned(others(tuned.left), others(tuned.right), others(tuned.whole) | gates)

  rates = {"others": settings.learning_rate, "gates": gate_learning_rate}
  return optax.chain(
    optax.clip_by_global_norm(settings.max_grad_norm),
    optax.partition({label: adamw(rate) for label, rate in rates.items()}, labels),
  )


@functools.partial(
  jax.jit, static_argnames=("config", "settings", "gate_learning_rate"), donate_argnames="state"
)
def train_step(
  state: TrainState,
  params: Params,
  tokens_BxT: jax.Array,
  *,
  config: ModelConfig,
  settings: TrainSettings,
  gate_learning_rate: float,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Runs one step of predicting each token from those before it; `state` is consumed.

  Args:
    state: its `params` are a `Tuned`.
    params: the model's own float32 parameters.
    tokens_BxT: int32 sequences of one length.
    config: the architecture.
    settings: settings of the optimizer.
    gate_learning_rate: peak learning rate of the gates' scales.

  Returns:
    The new state, and a dict of float32 scalars: `loss`, and `grad_norm` before clipping.
  """

  def loss(tuned):
    logits = forward(params, config, tuned, tokens_BxT, settings.strategy)
    return training.cross_entropy(logits, tokens_BxT).mean()

  tuned: Any = state.params
  value, grads = jax.value_and_grad(loss)(tuned)
  step = optimizer(settings, gate_learning_rate)
  updates, opt_state = step.update(grads, state.opt_state, tuned)
  state = TrainState(state.step + 1, optax.apply_updates(tuned, updates), opt_state)
  return state, {"loss": value, "grad_norm": optax.tree.norm(grads)}
