"""Memory and collectives of a training step on one device of a mesh."""

from collections import Counter
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
import optax

from roe_jax import params as params_lib
from roe_jax import sharding, training
from roe_jax.config import ModelConfig
from roe_jax.costs.hlo import Collective
from roe_jax.costs.member_batches import num_shards, token_batch, vocabulary_axes
from roe_jax.sharding import AXES, EXPERT, TENSOR, AnyMesh
from roe_jax.training import Batch, TrainSettings, TrainState


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
  """Bytes on one device in a training step.

  Attributes:
    weights, moments, gradients: exact; moments and gradients are split like the weights.
    sums: the gradients of weights that several devices hold, while these are summed over them.
    activations: an estimate, see `training_memory`.
  """

  weights: int
  moments: int
  gradients: int
  sums: int
  activations: int

  @property
  def total(self) -> int:
    return sum(dataclasses.astuple(self))


def abstract_state(config: ModelConfig, settings: TrainSettings, mesh: AnyMesh) -> TrainState:
  """Returns the shapes and shardings of a training state; moments are split like parameters."""

  def on_mesh(array, spec=PartitionSpec()):
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))

  shapes, of_optimizer = _shapes(config, settings)
  params = jax.tree.map(on_mesh, shapes, sharding.parameter_specs(mesh, config))
  optimizer = training.optimizer(config, settings)
  moments = optax.tree_utils.tree_map_params(
    optimizer,
    lambda moment, of: on_mesh(moment, of.sharding.spec),
    of_optimizer,
    params,
    transform_non_params=on_mesh,
  )
  step: Any = on_mesh(jax.ShapeDtypeStruct((), jnp.int32))
  return TrainState(step, params, moments)


@functools.cache
def _shapes(config, settings):
  """Returns the shapes of parameters and of the optimizer's state."""
  params = params_lib.abstract(config)
  return params, jax.eval_shape(training.optimizer(config, settings).init, params)


def abstract_batch(mesh: AnyMesh, batch_size: int, length: int) -> Batch:
  """Returns the shapes of a batch, whose sequences are split as their hidden states."""

  def array(dtype, *shape) -> Any:
    spec = sharding.spec(mesh, ("batch", "positions")[: len(shape)], shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  sizes = batch_size, length
  return Batch(array(jnp.int32, *sizes), array(jnp.float32, *sizes), array(jnp.uint32, batch_size))


def training_memory(
  config: ModelConfig, settings: TrainSettings, mesh: AbstractMesh, batch_size: int, length: int
) -> TrainingMemory:
  """Returns the memory of one device of a mesh in `training.train_step`.

  Activations are estimated as what is kept of all layers until their gradients are computed, and
  the larger of two sums, all of these in float32: in the layer whose gradients are computed, for
  each of its tokens eight arrays of hidden states, the queries and keys of all heads with their
  scores, and what the experts of this device compute for the tokens of all devices along `expert`;
  or four arrays of logits. What is kept is the input of a layer with `rematerialize`, and without
  it half as much again as that layer takes. Temporaries of steps compiled for CPUs in float32 were
  0.8 to 1.2 times the sum of gradients, sums and activations.

  Args:
    config: the model's architecture; its dtype is that of parameters, moments and gradients.
    settings: the training settings.
    mesh: the mesh.
    batch_size: sequences per step, on all devices.
    length: T, tokens per sequence.
  """
  state = abstract_state(config, settings, mesh)
  weights = _bytes(state.params)
  batch = token_batch(config, mesh, batch_size, length)
  shards, item = mesh.shape[TENSOR], jnp.dtype(config.dtype).itemsize
  width = config.head_dim + (config.v_head_dim or config.head_dim)
  of_attention = config.num_heads // shards * (2 * width + 3 * length)
  layer = batch.tokens * (8 * config.d_model + of_attention)
  dense = batch.tokens * 4 * config.d_dense // shards
  of_experts = _expert_values(config, settings, mesh, batch)
  vocab = config.vocab_size // num_shards(mesh, vocabulary_axes(config, mesh))
  head = 4 * batch.head_tokens * vocab + 2 * batch.head_tokens * config.d_model
  if settings.rematerialize:
    kept = config.num_layers * batch.tokens * config.d_model * item
  else:
    kept = 6 * config.num_expert_layers * (layer + of_experts)
    kept += 6 * config.first_dense_layers * (layer + dense)
  return TrainingMemory(
    weights,
    _bytes(state.opt_state),
    weights,
    sum(_bytes(leaf) for leaf in jax.tree.leaves(state.params) if _shared_axes(mesh, leaf)),
    kept + 4 * max(layer + max(dense, of_experts), head),
  )


def _expert_values(config, settings, mesh, batch):
  """Numbers that the experts of a layer compute on one device, and their gradients."""
  if not config.num_experts:
    return 0
  tokens = batch.group_tokens
  if settings.strategy == "dense":
    own = config.num_experts // mesh.shape[EXPERT]
    return tokens * (4 * config.d_model + own * 4 * config.d_expert // mesh.shape[TENSOR])
  # Each block of up to 128 choices has a copy of its expert's weights; the larger matrix counts.
  choices = tokens * config.experts_per_token
  of_block = 2 * config.d_expert // mesh.shape[TENSOR] * config.d_model
  return choices * config.d_model + choices // 128 * of_block


def training_collectives(
  config: ModelConfig, settings: TrainSettings, mesh: AbstractMesh, batch_size: int, length: int
) -> dict[str, Counter[Collective]]:
  """Returns how often each collective of a training step runs, by what is sent.

  With `rematerialize` the collectives of a layer's forward pass run twice. Sums of a few numbers
  (loads, losses, norms) are left out.
  """
  batch = token_batch(config, mesh, batch_size, length)
  state, vocab = abstract_state(config, settings, mesh), vocabulary_axes(config, mesh)
  item, d = jnp.dtype(config.dtype).itemsize, config.d_model
  forward = 2 if settings.rematerialize else 1
  gradients = Counter()
  for leaf in jax.tree.leaves(state.params):
    gradients += _count(mesh, 1, "all-reduce", _bytes(leaf), _shared_axes(mesh, leaf))
  sums = batch.tokens * d * 4
  layers = Counter()
  of_shared = bool(config.d_shared_expert)
  for number, is_dense in ((config.first_dense_layers, True), (config.num_expert_layers, False)):
    of_tensor = 1 + (is_dense or of_shared)
    if not is_dense and batch.tokens_sharded:
      of_tensor += 1
      gathered = batch.group_tokens * d
      for size, times in ((item, forward), (4, 1)):  # tokens, and gradients of their outputs
        layers += _count(mesh, number * times, "all-gather", gathered * size, (EXPERT,))
      for size, times in ((4, forward), (item, 1)):
        layers += _count(mesh, number * times, "reduce-scatter", gathered * size, (EXPERT,))
    elif not is_dense:
      layers += _count(mesh, number * (forward + 1), "all-reduce", sums, (EXPERT, TENSOR))
    layers += _count(mesh, number * of_tensor * (forward + 1), "all-reduce", sums, (TENSOR,))
  # Tokens are embedded on all shards of the vocabulary, and logits are distributed by tokens.
  hidden, parts = batch.head_tokens * d, num_shards(mesh, vocab)
  of_vocabulary = _count(mesh, 2, "all-reduce", hidden * item, vocab)
  of_vocabulary += _count(mesh, 1, "all-reduce", hidden * 4, vocab)
  of_vocabulary += _count(mesh, 2, "all-gather", hidden * item, batch.head_gather_axes)
  logits = 4 * batch.head_tokens * config.vocab_size // parts
  of_vocabulary += _count(mesh, 1, "all-to-all", logits, batch.head_gather_axes)
  return {"gradients": gradients, "layers": layers, "embedding and logits": of_vocabulary}


def _count(mesh, times, kind, num_bytes, axes):
  devices = num_shards(mesh, axes)
  return Counter({Collective(kind, int(num_bytes), devices): times} if devices > 1 else {})


def _shared_axes(mesh, leaf):
  """Mesh axes of devices that hold the same part of an array."""
  split = sharding.axes_of(leaf.sharding.spec)
  return tuple(a for a in AXES if a not in split and mesh.shape[a] > 1)


def _bytes(tree: Any) -> int:
  """Bytes of one device's parts."""
  return sum(
    math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
  )


def lower_step(
  config: ModelConfig, settings: TrainSettings, mesh: Any, batch_size: int, length: int
) -> jax.stages.Lowered:
  """Lowers `training.train_step` on a mesh of devices, without arrays."""
  state = abstract_state(config, settings, mesh)
  batch = abstract_batch(mesh, batch_size, length)
  return training.train_step.lower(state, batch, config=config, settings=settings)
