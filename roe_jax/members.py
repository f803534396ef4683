"""Running the members of a roster (arXiv 2509.17238), and making one distribution of theirs.

The members are a mapped axis of the same forward pass: they differ in the noise
that their index addresses, and in what follows from it. As many as the roster's
memory budget holds are one batch, and the batches follow each other.
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
  """What the members made of each position.

  Attributes:
    log_probs: `[B, T, V]` float32, aggregated.
    clean_tokens: `[B, T]` int32, the clean member's most probable token; -1
      where that member is not computed.
  """

  log_probs: jax.Array
  clean_tokens: jax.Array


class StandardCache(struct.PyTreeNode):
  """The standard cache: what members share, and what is each one's own.

  Attributes:
    shared: of the layers before the first noise, `[L, B, K, S, C]`.
    own: of the others, `[R, L, B, K, S, C]`.
  """

  shared: KVCache
  own: KVCache


def empty_cache(
  config: ModelConfig, roster: Roster, batch_size: int, capacity: int, whole: bool = False
) -> KVCache | StandardCache | None:
  """The cache of a roster; the batch is the fourth axis from the end of every array.

  Args:
    config: the model's architecture.
    roster: the settings.
    batch_size: B.
    capacity: positions that it holds.
    whole: whether sliding layers, too, hold them all: needed where positions
      are run against a cache that holds later ones already (scoring,
      diagnostics). Else they hold the last ones, as many as a row sees.
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
  """Memory of `empty_cache` in bytes."""
  shapes = jax.eval_shape(lambda: empty_cache(config, roster, batch_size, capacity, whole))
  return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(shapes))


def tokens_within_budget(
  config: ModelConfig, memory_budget: int, platform: str | None = None
) -> int:
  """How many rows (members times positions) a memory budget holds, at least one.

  A row's activations are counted as its logits, the experts' outputs in and
  out of order, and the attention scores of one block of slots (of a platform;
  default: the backend).
  """
  per_row = 4 * (
    config.vocab_size
    + 2 * config.experts_per_token * config.d_model
    + config.num_heads * attention.block_slots(platform)
  )
  return max(1, memory_budget // per_row)


def routing_noise(
  roster: Roster, request_ids_B: jax.Array, positions_BxT: jax.Array, member: jax.Array
) -> noise_lib.RoutingNoise:
  """The noise of member(s) `member` at rows of the given addresses."""
  key = noise_lib.stream_key(roster.seed, noise_lib.ROUTING)
  keys = noise_lib.position_keys(key, request_ids_B, positions_BxT)
  return noise_lib.RoutingNoise(keys, roster.temperatures, member, roster.noise)


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
  """Runs tokens of the history and puts their keys and values into the cache.

  Under Clean Cache this is the clean member's pass; under the standard cache
  it is every member's, with noise. The rows' lengths (see
  `transformer.run_layers`) matter where sliding layers are to be run on from
  there.

  Returns:
    The cache, and the hidden states after the last block, `[R, B, T, D]`
    (R = 1 under Clean Cache).
  """
  return _prefill_cache(
    params, config, roster, cache, tokens_BxT, positions_BxT, request_ids_B, lengths_B
  )[:2]


def _prefill_cache(
  params, config, roster, cache, tokens_BxT, positions_BxT, request_ids_B, lengths_B=None, keep=()
):
  """What `prefill_cache` returns, and the `BlockOutputs` of stretches of layers, `[R, L, ...]`."""

  def run(x, cache, layers, noise=None, cache_offset=0):
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

  x = transformer.embed(params, tokens_BxT)
  if roster.cache == "clean":
    x, cache, outputs = run(x, cache, (0, config.num_layers))
    return cache, x[None], [jax.tree.map(lambda a: a[None], outputs)]
  first, end = roster.noisy_layers
  x, shared, outputs = run(x, cache.shared, (0, first))
  outputs = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(roster.members), *a.shape)), outputs)

  def of_member(member, own):
    noise = routing_noise(roster, request_ids_B, positions_BxT, member)
    x_m, own, noisy = run(x, own, (first, end), noise, first)
    x_m, own, after = run(x_m, own, (end, config.num_layers), cache_offset=first)
    return x_m, own, (noisy, after)

  x, own, others = jax.vmap(of_member)(jnp.asarray(roster.members), cache.own)
  return StandardCache(shared, own), x, [outputs, *others]


def chosen_experts(
  params: Params,
  config: ModelConfig,
  roster: Roster,
  cache: Any,
  tokens_BxT: jax.Array,
  positions_BxT: jax.Array,
  request_ids_B: jax.Array,
) -> jax.Array:
  """The experts of all members at T positions, `[L, R, B, T, A]`.

  The cache holds the clean keys and values below each position if it is a
  Clean Cache; a standard cache is written, and the positions are those that
  follow what it holds. See `member_states` for the arguments.
  """
  if roster.cache == "clean":
    return member_states(
      params, config, roster, cache, tokens_BxT, positions_BxT, request_ids_B, keep=("experts",)
    )[1].experts
  outputs = _prefill_cache(
    params, config, roster, cache, tokens_BxT, positions_BxT, request_ids_B, keep=("experts",)
  )[2]
  return jnp.concatenate([o.experts for o in outputs if o.experts is not None], axis=1).swapaxes(
    0, 1
  )


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
  """All members at T positions against the Clean Cache, as one batch.

  Args:
    params: the model's parameters.
    config: its architecture.
    roster: the settings.
    cache: holds the clean keys and values below each row's position.
    tokens_BxT: int32 tokens at the rows' positions.
    positions_BxT: int32.
    request_ids_B: uint32.
    keep: names of the `BlockOutputs` wanted.

  Returns:
    Hidden states after the last block, `[R, B, T, D]`, and outputs stacked
    over layers: `keys` and `values` of the clean member `[L, B, T, K, C]`,
    `experts` `[L, R, B, T, A]` and `router_logits` `[L, R, B, T, E]` of all.
  """
  rows = _CleanCachePass(params, config, roster, cache, positions_BxT, request_ids_B)
  x, shared = rows.shared_layers(tokens_BxT, keep)
  return rows.member_layers(x, shared, jnp.asarray(roster.members), keep)


@dataclasses.dataclass(frozen=True)
class _CleanCachePass:
  """Positions to be run against a Clean Cache."""

  params: Params
  config: ModelConfig
  roster: Roster
  cache: KVCache
  positions_BxT: jax.Array
  request_ids_B: jax.Array

  def shared_layers(self, tokens_BxT, keep=()):
    """Hidden states `[B, T, D]` at the first noise, and outputs of the layers before."""
    x, _, outputs = self._run(
      transformer.embed(self.params, tokens_BxT), (0, self.roster.noisy_layers[0]), keep=keep
    )
    return x, outputs

  def member_layers(self, x, shared, members, keep=()):
    """The other layers for some members; returns what `member_states` does."""
    first, end = self.roster.noisy_layers
    noise = routing_noise(self.roster, self.request_ids_B, self.positions_BxT, members)

    def lift(block):
      def lifted(x_RxBxTxD, noise):
        axes = None if noise is None else noise.replace(keys=None, temperatures=None, member=0)
        x, _, outputs = jax.vmap(block, in_axes=(0, axes))(x_RxBxTxD, noise)
        of_first = {
          name: jax.tree.map(lambda a: a[0], getattr(outputs, name)) for name in ("keys", "values")
        }
        return x, None, outputs.replace(**of_first)

      return lifted

    x = jnp.broadcast_to(x, (len(members), *x.shape))
    parts = []
    if first:
      parts.append(
        shared.replace(
          **{
            name: jax.tree.map(
              lambda a: jnp.repeat(a[:, None], len(members), axis=1), getattr(shared, name)
            )
            for name in ("experts", "router_logits")
          }
        )
      )
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
  """The roster's distributions at T positions, a few members at a time.

  The arguments are those of `member_states`. Memory does not grow with the
  members: as many as `roster.memory_budget` holds are one batch, and the
  batches follow each other. The layers before the first noise are computed
  once for all of them.

  Returns:
    The outputs, and those of the clean member's `BlockOutputs` asked for.
  """
  rows = _CleanCachePass(params, config, roster, cache, positions_BxT, request_ids_B)
  x, shared = rows.shared_layers(tokens_BxT, keep)
  first, others = _batches(config, roster, tokens_BxT.size)
  states, outputs = rows.member_layers(x, shared, first, keep)
  add, total, clean_tokens = _start(params, config, roster, states)

  def more(total, members):
    states, _ = rows.member_layers(x, transformer.BlockOutputs(), members)
    return add(total, states), None

  if len(others):
    total, _ = jax.lax.scan(more, total, others)
  return _finish(roster, total, clean_tokens), outputs


def aggregate(
  params: Params, config: ModelConfig, roster: Roster, x_RxBxTxD: jax.Array
) -> RosterOutputs:
  """Distributions from all members' final hidden states, a few members at a time."""
  first, others = _batches(config, roster, math.prod(x_RxBxTxD.shape[1:3]))
  add, total, clean_tokens = _start(params, config, roster, x_RxBxTxD[: len(first)])
  if len(others):
    rest = x_RxBxTxD[len(first) :].reshape(*others.shape, *x_RxBxTxD.shape[1:])
    total, _ = jax.lax.scan(lambda total, x: (add(total, x), None), total, rest)
  return _finish(roster, total, clean_tokens)


def _batches(config, roster, tokens_per_member):
  """Members `[R1]` that come first, and batches of equally many others `[X, R2]`."""
  members = np.asarray(roster.members)
  first, *others = batch_sizes(config, roster, tokens_per_member)
  return jnp.asarray(members[:first]), jnp.asarray(members[first:].reshape(others))


def batch_sizes(
  config: ModelConfig, roster: Roster, tokens_per_member: int, platform: str | None = None
) -> tuple[int, int, int]:
  """How the members are computed against a Clean Cache: so many of them first,
  then so many batches of so many others.

  Args:
    config: the model's architecture.
    roster: the settings.
    tokens_per_member: texts times positions.
    platform: see `tokens_within_budget`.
  """
  members = roster.members
  most = max(1, tokens_within_budget(config, roster.memory_budget, platform) // tokens_per_member)
  count = -(-len(members) // most)
  size = -(-len(members) // count)
  first = len(members) - (count - 1) * size
  if first == 1 and count > 1 and members[0] == 0 and not roster.include_clean:
    count, first = count - 1, first + size  # there must be one to be averaged
  return first, count - 1, size


def _start(params, config, roster, x):
  """Aggregates the first members.

  Returns:
    A function `(state, states [R, B, T, D]) -> state` for the others, the
    aggregation's state, and the clean member's tokens.
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
  texts_BxS: jax.Array | None = None,
) -> tuple[RosterOutputs, Any]:
  """One position of every text: the roster's next-token distribution.

  Args:
    params: the model's parameters.
    config: its architecture.
    roster: the settings.
    cache: filled below `positions_B`; None if the roster recomputes.
    tokens_B: int32 tokens at those positions.
    positions_B: int32.
    request_ids_B: uint32.
    texts_BxS: all tokens up to those positions; needed to recompute.

  Returns:
    Outputs with T = 1, and the cache with this position written.
  """
  tokens, positions = tokens_B[:, None], positions_B[:, None]
  if roster.recompute:
    x = reference.member_states(params, config, roster, texts_BxS, request_ids_B)
    x = jnp.take_along_axis(x, positions[None, ..., None], axis=2)
  elif roster.cache == "clean":
    outputs, own = against_clean_cache(
      params, config, roster, cache, tokens, positions, request_ids_B, keep=("keys", "values")
    )
    keys, values = own.keys, own.values
    if batch_sizes(config, roster, tokens.size)[1]:
      # Always true: XLA copies the cache for the members that read it later, unless
      # the write depends on what has been computed from them.
      last_B = outputs.log_probs[:, 0, 0]
      after_reading = ((last_B <= jnp.inf) | jnp.isnan(last_B))[:, None, None, None]
      keys, values = (jnp.where(after_reading, a, jnp.zeros_like(a)) for a in (keys, values))
    write = functools.partial(kv_cache.write_step, config)
    return outputs, sharding.write(write, cache, keys, values, positions_B)
  else:
    cache, x = prefill_cache(params, config, roster, cache, tokens, positions, request_ids_B)
  return aggregate(params, config, roster, x), cache
