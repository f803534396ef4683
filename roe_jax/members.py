"""Runs the members of a roster (arXiv 2509.17238) and aggregates their distributions.

Members are a vmapped axis of one forward pass; they differ only in the noise addressed
by their index. As many members as fit the roster's memory budget run as one batch, and
the batches run in sequence.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
import numpy as np

from roe_jax import attention, merging, sharding, transformer
from roe_jax import noise as noise_lib
from roe_jax.config import ModelConfig
from roe_jax.layer_inputs import LayerOptions, RouterInputs, TokenBatch
from roe_jax.params import Params
from roe_jax.quantization import CONTRACTED, first_planes
from roe_jax.roster import Roster
from roe_jax.roster_settings import Weights


class RosterOutputs(struct.PyTreeNode):
  """The aggregated outputs of the members.

  Attributes:
    log_probs: `[B, T, V]` float32.
    clean_tokens: `[B, T]` int32, the clean member's most probable token; -1 if that
      member is not computed.
    members: `[B, T]` int32, how many members were computed.
  """

  log_probs: jax.Array
  clean_tokens: jax.Array
  members: jax.Array


def empty_cache(
  config: ModelConfig, roster: Roster, batch_size: int, capacity: int, rerun: int = 0
) -> Any:
  """Returns the empty cache of a roster; see `CacheMode.empty` for the arguments."""
  return roster.cache_mode.empty(config, roster, batch_size, capacity, rerun)


def tokens_within_budget(
  config: ModelConfig, memory_budget: int, platform: str | None = None
) -> int:
  """Returns how many tokens (members x positions) fit a memory budget, at least one.

  Counts a token's logits, the experts' outputs before and after reordering, and the
  attention scores of one cache block (of `platform`; default: the backend).
  """
  per_token = 4 * (
    config.vocab_size
    + 2 * config.experts_per_token * config.d_model
    + config.num_heads * attention.block_size(platform)
  )
  return max(1, memory_budget // per_token)


def routing_noise(
  roster: Roster, request_ids_B: jax.Array, positions_BxT: jax.Array, member: jax.Array
) -> noise_lib.RoutingNoise:
  """Returns the noise of member(s) `member` at the given addresses."""
  key = noise_lib.stream_key(roster.seed, noise_lib.ROUTING)
  keys = noise_lib.position_keys(key, request_ids_B, positions_BxT)
  return noise_lib.RoutingNoise(keys, roster.temperatures, member, roster.perturb, roster.num_noisy)


class RosterPass(struct.PyTreeNode):
  """A forward pass of a roster over T tokens of each sequence.

  Attributes:
    params: the model's parameters.
    config: its architecture.
    roster: the settings.
    tokens_BxT: int32.
    positions_BxT: int32, consecutive along T.
    request_ids_B: uint32.
    lengths_B: see `TokenBatch`; matters if generation continues from here with
      sliding layers.
    needed_BxT: bool, whether the outputs are used, or None if all are. An adaptive roster runs no
      members elsewhere.
    starts_anew: whether the weights differ from the clean member's also before the first noise.
  """

  params: Params
  config: ModelConfig = struct.field(pytree_node=False)
  roster: Roster
  tokens_BxT: jax.Array
  positions_BxT: jax.Array
  request_ids_B: jax.Array
  lengths_B: jax.Array | None = None
  needed_BxT: jax.Array | None = None
  starts_anew: bool = struct.field(pytree_node=False, default=False)

  @classmethod
  def of_step(
    cls,
    params: Params,
    config: ModelConfig,
    roster: Roster,
    tokens_B: jax.Array,
    positions_B: jax.Array,
    request_ids_B: jax.Array,
  ) -> "RosterPass":
    """Returns a pass over one token of each sequence."""
    return cls(params, config, roster, tokens_B[:, None], positions_B[:, None], request_ids_B)

  @property
  def mesh(self) -> AbstractMesh | None:
    """The mesh that the parameters are on."""
    return sharding.mesh_of(self.params.layers)

  def noise(self, member: jax.Array) -> noise_lib.RoutingNoise:
    """Returns the noise of member(s) `member` at these addresses."""
    return routing_noise(self.roster, self.request_ids_B, self.positions_BxT, member)

  def with_weights(self, weights: Weights) -> "RosterPass":
    """Returns the pass of members that compute with these weights."""
    run = self
    if weights.task is not None:
      run = run.replace(params=merging.params_of_task(run.params, weights.task), starts_anew=True)
    if weights.bits is not None:
      experts = run.params.layers.experts
      read = {name: first_planes(getattr(experts, name), weights.bits) for name in CONTRACTED}
      layers = run.params.layers.replace(experts=experts.replace(**read))
      run = run.replace(params=run.params.replace(layers=layers))
    return run

  def embed(self) -> jax.Array:
    """Returns hidden states `[B, T, D]` before the first block."""
    return transformer.embed(self.params, self.config, self.tokens_BxT)

  @property
  def layers(self) -> Callable:
    """`transformer.run_layers` with these parameters."""
    return functools.partial(transformer.layer_runner(self.params), self.params, self.config)

  def token_batch(self, noise: noise_lib.RoutingNoise | None = None) -> TokenBatch:
    """Returns the tokens as `layers` takes them."""
    router = RouterInputs(self.roster.router_bias, self.roster.experts_by_layer)
    return TokenBatch(self.positions_BxT, noise, self.lengths_B, router)

  def options(
    self, layers: tuple[int, int] | None = None, keep: tuple[str, ...] = ()
  ) -> LayerOptions:
    """Returns the roster's settings of a range of layers (default: all)."""
    return LayerOptions(layers, self.roster.gate_weights, self.roster.expert_strategy, keep)

  def unembed(self, x: jax.Array) -> jax.Array:
    """Computes float32 logits `[..., V]` from hidden states after the last block."""
    return transformer.unembed(self.params, self.config, x)

  def unembed_members(self, x_RxBxTxD: jax.Array) -> jax.Array:
    """Computes float32 logits `[R, B, T, V]` from all members' states after the last block."""
    if self.roster.member_tasks is None:
      return self.unembed(x_RxBxTxD)
    found = {}
    for weights, group in self.roster.groups(self.roster.members):
      run = self.with_weights(weights)
      found |= {m: run.unembed(x_RxBxTxD[self.roster.members.index(m)]) for m in group}
    return jnp.stack([found[m] for m in self.roster.members])

  def aggregate(self, x_RxBxTxD: jax.Array) -> RosterOutputs:
    """Aggregates all members' final hidden states, in batches of members."""
    if self.roster.member_tasks is not None:
      return self.aggregate_batches(self.unembed_members(x_RxBxTxD), self.unembed, x_RxBxTxD[:0])
    first, others = batches(self.config, self.roster, x_RxBxTxD.shape[1:3], self.mesh)
    rest = x_RxBxTxD[len(first) :].reshape(*others.shape, *x_RxBxTxD.shape[1:])
    return self.aggregate_batches(self.unembed(x_RxBxTxD[: len(first)]), self.unembed, rest)

  def aggregate_batches(
    self, logits_RxBxTxV: jax.Array, logits: Callable[[jax.Array], jax.Array], others: jax.Array
  ) -> RosterOutputs:
    """Aggregates the logits of a first batch of members and `logits(batch)` of others.

    Args:
      logits_RxBxTxV: float32, those of the first members.
      logits: computes those of a batch.
      others: other batches, stacked; may be none.
    """
    found = averaged = logits_RxBxTxV
    has_clean = self.roster.members[0] == 0
    if has_clean and not self.roster.include_clean:
      averaged = found[1:]
    total = self.roster.aggregate_with.add(None, averaged)
    total = self._add_batches(total, logits, others)
    return self._finish(total, found[0] if has_clean else None)

  def aggregate_after(
    self, clean_BxTxV: jax.Array, logits: Callable[..., jax.Array]
  ) -> RosterOutputs:
    """Aggregates the clean member's logits, float32, and those of the others.

    Args:
      clean_BxTxV: the clean member's.
      logits: `logits(run, members)` of this pass, or of it `with_weights`.
    """
    roster, shape = self.roster, clean_BxTxV.shape[:2]
    add = roster.aggregate_with.add
    total = add(None, clean_BxTxV[None]) if roster.include_clean else None
    for weights, members in roster.groups(roster.members[1:]):
      of_group = functools.partial(logits, self.with_weights(weights))
      sizes = _split(self.config, roster, shape, self.mesh, len(members))
      first, others = _in_batches(members, *sizes)
      total = self._add_batches(add(total, of_group(first)), of_group, others)
    return self._finish(total, clean_BxTxV)

  def _add_batches(self, total, logits, others):
    """Adds batches of members to the state of the aggregation."""
    if not len(others):
      return total
    add = self.roster.aggregate_with.add
    return jax.lax.scan(lambda total, batch: (add(total, logits(batch)), None), total, others)[0]

  def _finish(self, total, clean_BxTxV):
    """Finishes the aggregation."""
    roster, aggregation = self.roster, self.roster.aggregate_with
    log_probs = aggregation.finish(total, roster.num_members)
    clean_tokens = jnp.full(log_probs.shape[:2], -1, jnp.int32)
    if clean_BxTxV is not None:
      clean_tokens = jnp.argmax(clean_BxTxV, axis=-1).astype(jnp.int32)
    members = jnp.full_like(clean_tokens, len(roster.members))
    return RosterOutputs(log_probs, clean_tokens, members)


def batches(
  config: ModelConfig, roster: Roster, shape: Sequence[int], mesh: sharding.AnyMesh | None = None
) -> tuple[jax.Array, jax.Array]:
  """Returns the first batch of members `[R1]`, and batches `[X, R2]` of the others.

  Args:
    config: the model's architecture.
    roster: the settings.
    shape: sequences and positions.
    mesh: the mesh that they run on, if any.
  """
  return _in_batches(roster.members, *batch_sizes(config, roster, shape, mesh))


def _in_batches(members, first, *others):
  """Returns members as `batches` does, in batches of the sizes of `batch_sizes`."""
  members = np.asarray(members)
  return jnp.asarray(members[:first]), jnp.asarray(members[first:].reshape(others))


def batch_sizes(
  config: ModelConfig,
  roster: Roster,
  shape: Sequence[int],
  mesh: sharding.AnyMesh | None = None,
  platform: str | None = None,
) -> tuple[int, int, int]:
  """Splits the members into batches that fit the memory budget of a device.

  Args:
    config: the model's architecture.
    roster: the settings.
    shape: sequences and positions.
    mesh: the mesh that they run on, if any.
    platform: see `tokens_within_budget`.

  Returns:
    The size of the first batch, the number of other batches, and their common size.
  """
  members = roster.members
  first, count, size = _split(config, roster, shape, mesh, len(members), platform)
  if first == 1 and count and members[0] == 0 and not roster.include_clean:
    count, first = count - 1, first + size  # the first batch must contain an averaged member
  return first, count, size


def _split(config, roster, shape, mesh, num_members, platform=None):
  """Splits so many members as `batch_sizes` does."""
  of_members, of_sequences = token_shards(mesh, num_members, shape[0])
  within = tokens_within_budget(config, roster.memory_budget, platform) * of_members * of_sequences
  count = -(-num_members // max(1, within // math.prod(shape)))
  size = -(-num_members // (count * of_members)) * of_members  # so that devices split each batch
  count = -(-num_members // size)
  return num_members - (count - 1) * size, count - 1, size


def token_shards(
  mesh: sharding.AnyMesh | None, num_members: int, batch_size: int
) -> tuple[int, int]:
  """Returns over how many devices of a mesh members and sequences are split."""
  if mesh is None:
    return 1, 1
  of_members, of_sequences = sharding.spec(mesh, ("members", "batch"), (num_members, batch_size))
  return (
    math.prod(mesh.shape[a] for a in sharding.axes_of([of_members])),
    math.prod(mesh.shape[a] for a in sharding.axes_of([of_sequences])),
  )
