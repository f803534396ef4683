"""Runs the members of a roster (arXiv 2509.17238) and aggregates their distributions.

Members are a vmapped axis of one forward pass; they differ only in the noise addressed
by their index. As many members as fit the roster's memory budget run as one batch, and
the batches run in sequence.
"""

import dataclasses
import functools
import math
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import attention, reference, sharding, transformer
from roe_jax import cache as kv_cache
from roe_jax import noise as noise_lib
from roe_jax.cache import KVCache
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster


class RosterOutputs(struct.PyTreeNode):
  """The aggregated outputs of the members.

  Attributes:
    log_probs: `[B, T, V]` float32.
    clean_tokens: `[B, T]` int32, the clean member's most probable token; -1 if that
      member is not computed.
  """

  log_probs: jax.Array
  clean_tokens: jax.Array


class StandardCache(struct.PyTreeNode):
  """The standard cache.

  Attributes:
    shared: the layers before the first noise, `[L, B, K, S, C]`, shared by all members.
    own: the other layers of each member, `[R, L, B, K, S, C]`.
  """

  shared: KVCache
  own: KVCache


def empty_cache(
  config: ModelConfig, roster: Roster, batch_size: int, capacity: int, whole: bool = False
) -> KVCache | StandardCache | None:
  """Returns the empty cache of a roster; the batch axis is -4 in every array.

  Args:
    config: the model's architecture.
    roster: the settings.
    batch_size: B.
    capacity: S, the number of positions it can hold.
    whole: whether sliding layers also keep all positions. Needed to run positions against
      a cache that already holds later ones (scoring, diagnostics).
  """
  if roster.recompute:
    return None
  if roster.cache == "clean":
    return kv_cache.empty(config, batch_size, capacity, whole=whole)
  first, members = roster.noisy_layers[0], len(roster.members)
  own = kv_cache.empty(config, batch_size, capacity, (first, config.num_layers), whole)
  return StandardCache(
    kv_cache.empty(config, batch_size, capacity, (0, first), whole),
    jax.tree.map(lambda c: jnp.tile(c, (members, *[1] * c.ndim)), own),
  )


def cache_bytes(
  config: ModelConfig, roster: Roster, batch_size: int, capacity: int, whole: bool = False
) -> int:
  """Returns the memory of `empty_cache` in bytes."""
  shapes = jax.eval_shape(lambda: empty_cache(config, roster, batch_size, capacity, whole))
  return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(shapes))


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
  return noise_lib.RoutingNoise(keys, roster.temperatures, member, roster.perturb)


def prefill_cache(
  params: Params,
  config: ModelConfig,
  roster: Roster,
  cache: Any,
  tokens_BxT: jax.Array,
  positions_BxT: jax.Array,
  request_ids_B: jax.Array,
  lengths_B: jax.Array | None = None,
) -> tuple[Any, jax.Array]:
  """Runs tokens of the history and writes their keys and values to the cache.

  With Clean Cache this runs the clean member; with the standard cache all members, with
  noise. `lengths_B` (see `transformer.run_layers`) matters if generation continues from
  here with sliding layers.

  Returns:
    The cache, and the hidden states after the last block, `[R, B, T, D]` (R = 1 with
    Clean Cache).
  """
  return _prefill_cache(
    params, config, roster, cache, tokens_BxT, positions_BxT, request_ids_B, lengths_B
  )[:2]


def _prefill_cache(
  params, config, roster, cache, tokens_BxT, positions_BxT, request_ids_B, lengths_B=None, keep=()
):
  """`prefill_cache` that also returns the `BlockOutputs` of ranges of layers, `[R, L, ...]`."""

  def run(x, cache, layers, noise=None, cache_offset=0) -> tuple[Any, Any, Any]:
    return transformer.run_layers(
      params,
      config,
      x,
      positions_BxT,
      cache,
      layers=layers,
      noise=noise,
      gate_weights=roster.gate_weights,
      write=True,
      cache_offset=cache_offset,
      keep=keep,
      strategy=roster.expert_strategy,
      lengths_B=lengths_B,
    )

  x = transformer.embed(params, config, tokens_BxT)
  if roster.cache == "clean":
    x, cache, outputs = run(x, cache, (0, config.num_layers))
    return cache, x[None], [jax.tree.map(lambda a: a[None], outputs)]
  first, end = roster.noisy_layers
  x, shared, outputs = run(x, cache.shared, (0, first))
  outputs = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(roster.members), *a.shape)), outputs)

  def run_member(member, own):
    noise = routing_noise(roster, request_ids_B, positions_BxT, member)
    x_m, own, noisy = run(x, own, (first, end), noise, first)
    x_m, own, after = run(x_m, own, (end, config.num_layers), cache_offset=first)
    return x_m, own, (noisy, after)

  x, own, others = jax.vmap(run_member)(jnp.asarray(roster.members), cache.own)
  return StandardCache(shared, own), x, [outputs, *others]


def states_and_outputs(
  params: Params,
  config: ModelConfig,
  roster: Roster,
  cache: Any,
  tokens_BxT: jax.Array,
  positions_BxT: jax.Array,
  request_ids_B: jax.Array,
  keep: tuple[str, ...] = (),
) -> tuple[jax.Array, transformer.BlockOutputs]:
  """Returns states and outputs of all members at T positions, as `member_states` does.

  A Clean Cache must hold the clean keys and values at earlier positions. A standard
  cache is written, at the positions that follow. See `member_states` for the arguments;
  `keep` is "experts", "router_logits" or both.
  """
  arguments = params, config, roster, cache, tokens_BxT, positions_BxT, request_ids_B
  if roster.cache == "clean":
    return member_states(*arguments, keep=keep)
  _, x, outputs = _prefill_cache(*arguments, keep=keep)
  outputs = [o for o in outputs if jax.tree.leaves(o)]
  if not outputs:
    return x, transformer.BlockOutputs()
  return x, jax.tree.map(lambda *a: jnp.concatenate(a, axis=1).swapaxes(0, 1), *outputs)


def member_states(
  params: Params,
  config: ModelConfig,
  roster: Roster,
  cache: KVCache,
  tokens_BxT: jax.Array,
  positions_BxT: jax.Array,
  request_ids_B: jax.Array,
  keep: tuple[str, ...] = (),
) -> tuple[jax.Array, transformer.BlockOutputs]:
  """Runs all members at T positions against the Clean Cache, as one batch.

  Args:
    params: the model's parameters.
    config: its architecture.
    roster: the settings.
    cache: holds the clean keys and values at earlier positions.
    tokens_BxT: int32.
    positions_BxT: int32.
    request_ids_B: uint32.
    keep: names of the `BlockOutputs` to return.

  Returns:
    Hidden states after the last block, `[R, B, T, D]`, and outputs stacked over layers:
    the clean member's `keys` and `values` `[L, B, T, K, C]`, and all members' `experts`
    `[L, R, B, T, A]` and `router_logits` `[L, R, B, T, E]`.
  """
  run = _CleanCachePass(params, config, roster, cache, positions_BxT, request_ids_B)
  x, shared = run.shared_layers(tokens_BxT, keep)
  return run.member_layers(x, shared, jnp.asarray(roster.members), keep)


@dataclasses.dataclass(frozen=True)
class _CleanCachePass:
  """A forward pass of T positions against a Clean Cache."""

  params: Params
  config: ModelConfig
  roster: Roster
  cache: KVCache
  positions_BxT: jax.Array
  request_ids_B: jax.Array

  def shared_layers(self, tokens_BxT, keep=()):
    """Returns hidden states `[B, T, D]` before the first noise, and outputs up to there."""
    x, _, outputs = self._run(
      transformer.embed(self.params, self.config, tokens_BxT),
      (0, self.roster.noisy_layers[0]),
      keep=keep,
    )
    return x, outputs

  def member_layers(self, x, shared, members, keep=()):
    """Runs the other layers for some members; returns the same as `member_states`."""
    first, end = self.roster.noisy_layers
    noise = routing_noise(self.roster, self.request_ids_B, self.positions_BxT, members)

    def lift(block):
      def lifted(x_RxBxTxD, noise):
        axes = None if noise is None else noise.replace(keys=None, temperatures=None, member=0)
        x, _, outputs = jax.vmap(block, in_axes=(0, axes))(x_RxBxTxD, noise)
        keys, values = jax.tree.map(lambda a: a[0], (outputs.keys, outputs.values))
        return x, None, outputs.replace(keys=keys, values=values)

      return lifted

    x = jnp.broadcast_to(x, (len(members), *x.shape))
    parts = []
    if first:
      chosen, logits = jax.tree.map(
        lambda a: jnp.repeat(a[:, None], len(members), axis=1),
        (shared.experts, shared.router_logits),
      )
      parts.append(shared.replace(experts=chosen, router_logits=logits))
    for layers, own_noise in (((first, end), noise), ((end, self.config.num_layers), None)):
      if layers[0] < layers[1]:
        x, _, outputs = self._run(x, layers, own_noise, keep, lift)
        parts.append(outputs)
    return x, jax.tree.map(lambda *a: jnp.concatenate(a), *parts)

  def _run(self, x, layers, noise=None, keep=(), lift=lambda block: block):
    return transformer.run_layers(
      self.params,
      self.config,
      x,
      self.positions_BxT,
      self.cache,
      layers=layers,
      noise=noise,
      gate_weights=self.roster.gate_weights,
      keep=keep,
      lift=lift,
      strategy=self.roster.expert_strategy,
    )


def against_clean_cache(
  params: Params,
  config: ModelConfig,
  roster: Roster,
  cache: KVCache,
  tokens_BxT: jax.Array,
  positions_BxT: jax.Array,
  request_ids_B: jax.Array,
  keep: tuple[str, ...] = (),
) -> tuple[RosterOutputs, transformer.BlockOutputs]:
  """Computes the roster's distributions at T positions, in batches of members.

  The arguments are those of `member_states`. Memory does not grow with the number of
  members: each batch fits `roster.memory_budget`. Layers before the first noise are
  computed once.

  Returns:
    The outputs, and the clean member's `BlockOutputs` named in `keep`.
  """
  run = _CleanCachePass(params, config, roster, cache, positions_BxT, request_ids_B)
  x, shared = run.shared_layers(tokens_BxT, keep)
  first, others = _batches(config, roster, tokens_BxT.size)
  states, outputs = run.member_layers(x, shared, first, keep)
  add, total, clean_tokens = _start(params, config, roster, states)

  def more(total, members):
    states, _ = run.member_layers(x, transformer.BlockOutputs(), members)
    return add(total, states), None

  if len(others):
    total, _ = jax.lax.scan(more, total, others)
  return _finish(roster, total, clean_tokens), outputs


def aggregate(
  params: Params, config: ModelConfig, roster: Roster, x_RxBxTxD: jax.Array
) -> RosterOutputs:
  """Aggregates all members' final hidden states, in batches of members."""
  first, others = _batches(config, roster, math.prod(x_RxBxTxD.shape[1:3]))
  add, total, clean_tokens = _start(params, config, roster, x_RxBxTxD[: len(first)])
  if len(others):
    rest = x_RxBxTxD[len(first) :].reshape(*others.shape, *x_RxBxTxD.shape[1:])
    total, _ = jax.lax.scan(lambda total, x: (add(total, x), None), total, rest)
  return _finish(roster, total, clean_tokens)


def _batches(config, roster, tokens_per_member):
  """Returns the first batch of members `[R1]`, and batches `[X, R2]` of the others."""
  members = np.asarray(roster.members)
  first, *others = batch_sizes(config, roster, tokens_per_member)
  return jnp.asarray(members[:first]), jnp.asarray(members[first:].reshape(others))


def batch_sizes(
  config: ModelConfig, roster: Roster, tokens_per_member: int, platform: str | None = None
) -> tuple[int, int, int]:
  """Splits the members into batches that fit the memory budget.

  Args:
    config: the model's architecture.
    roster: the settings.
    tokens_per_member: sequences x positions.
    platform: see `tokens_within_budget`.

  Returns:
    The size of the first batch, the number of other batches, and their common size.
  """
  members = roster.members
  most = max(1, tokens_within_budget(config, roster.memory_budget, platform) // tokens_per_member)
  count = -(-len(members) // most)
  size = -(-len(members) // count)
  first = len(members) - (count - 1) * size
  if first == 1 and count > 1 and members[0] == 0 and not roster.include_clean:
    count, first = count - 1, first + size  # the first batch must contain an averaged member
  return first, count - 1, size


def _start(params, config, roster, x):
  """Aggregates the first members.

  Returns:
    A function `(state, x [R, B, T, D]) -> state` that adds the others, the aggregation's
    state, and the clean member's tokens.
  """
  aggregation = roster.aggregate_with

  def add(total, x):
    return aggregation.add(total, transformer.unembed(params, config, x))

  logits = transformer.unembed(params, config, x)
  if roster.members[0] != 0:
    return add, aggregation.add(None, logits), jnp.full(x.shape[1:3], -1, jnp.int32)
  clean_tokens = jnp.argmax(logits[0], axis=-1).astype(jnp.int32)
  averaged = logits if roster.include_clean else logits[1:]
  return add, aggregation.add(None, averaged), clean_tokens


def _finish(roster, total, clean_tokens):
  return RosterOutputs(roster.aggregate_with.finish(total, roster.num_members), clean_tokens)


def step(
  params: Params,
  config: ModelConfig,
  roster: Roster,
  cache: Any,
  tokens_B: jax.Array,
  positions_B: jax.Array,
  request_ids_B: jax.Array,
  sequences_BxS: jax.Array | None = None,
) -> tuple[RosterOutputs, Any]:
  """Computes the roster's next-token distribution of every sequence.

  Args:
    params: the model's parameters.
    config: its architecture.
    roster: the settings.
    cache: filled at positions < `positions_B`; None if the roster recomputes.
    tokens_B: int32 tokens at `positions_B`.
    positions_B: int32.
    request_ids_B: uint32.
    sequences_BxS: all tokens up to `positions_B`; needed to recompute.

  Returns:
    Outputs with T = 1, and the cache with this position written.
  """
  tokens, positions = tokens_B[:, None], positions_B[:, None]
  if roster.recompute:
    assert sequences_BxS is not None
    x = reference.member_states(params, config, roster, sequences_BxS, request_ids_B)
    x = jnp.take_along_axis(x, positions[None, ..., None], axis=2)
  elif roster.cache == "clean":
    outputs, own = against_clean_cache(
      params, config, roster, cache, tokens, positions, request_ids_B, keep=("keys", "values")
    )
    keys, values = own.keys, own.values
    if batch_sizes(config, roster, tokens.size)[1]:
      # Always true: XLA copies the cache for members that read it later, unless the
      # write depends on their results.
      last_B = outputs.log_probs[:, 0, 0]
      after_reading = ((last_B <= jnp.inf) | jnp.isnan(last_B))[:, None, None, None]
      keys, values = (jnp.where(after_reading, a, jnp.zeros_like(a)) for a in (keys, values))
    write = functools.partial(kv_cache.write_step, config)
    return outputs, sharding.write(write, cache, keys, values, positions_B)
  else:
    cache, x = prefill_cache(params, config, roster, cache, tokens, positions, request_ids_B)
  return aggregate(params, config, roster, x), cache
