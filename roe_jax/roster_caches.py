"""The cache modes: Clean Cache, the standard cache, and no cache."""

from collections.abc import Callable
import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp

from roe_jax import cache as kv_cache
from roe_jax import members as members_lib
from roe_jax import sharding
from roe_jax.cache import KVCache
from roe_jax.cache_modes import CACHES, CacheMode, Pass
from roe_jax.members import RosterOutputs, RosterPass
from roe_jax.transformer import BlockOutputs


@dataclasses.dataclass(frozen=True)
class CleanCache(CacheMode):
  """One KV cache, written by the clean member (arXiv 2509.17238).

  Every member attends to it and to its own key and value at its position. So the memory
  does not grow with the members, and as many as fit `Roster.memory_budget` run as one batch.
  """

  is_shared = True

  def empty(self, config, roster, batch_size, capacity, whole=False) -> KVCache:
    return kv_cache.empty(config, batch_size, capacity, whole=whole)

  def prefill(self, run: RosterPass, cache: KVCache) -> KVCache:
    return self._run_clean(run, cache)[1]

  def _run_clean(self, run, cache):
    """Runs the clean member and writes the cache; returns its states, and the cache."""
    return run.layers(run.embed(), (0, run.config.num_layers), cache, write=True)[:2]

  def states(self, run: RosterPass, cache: KVCache, keep=()):
    x, shared = self._run_shared(run, cache, keep)
    members = jnp.asarray(run.roster.members)
    x, outputs = self._run_members(run, cache, x, shared, members, keep)
    return x, cache, outputs

  def _run_shared(self, run, cache, keep=()):
    """Returns hidden states `[B, T, D]` before the first noise, and outputs up to there."""
    x, _, outputs = run.layers(run.embed(), (0, run.roster.noisy_layers[0]), cache, keep=keep)
    return x, outputs

  def _run_members(self, run, cache, x, shared, members, keep=()):
    """Runs the other layers for some members.

    Returns:
      Hidden states `[R, B, T, D]`, and outputs of all layers: the first member's `keys` and
      `values` `[L, B, T, K, C]`, and all members' `experts` and `router_logits`.
    """
    first, end = run.roster.noisy_layers
    noise = run.noise(members)

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
    for layers, own_noise in (((first, end), noise), ((end, run.config.num_layers), None)):
      if layers[0] < layers[1]:
        x, _, outputs = run.layers(x, layers, cache, own_noise, keep=keep, lift=lift)
        parts.append(outputs)
    return x, jax.tree.map(lambda *a: jnp.concatenate(a), *parts)

  def _distributions(self, run, cache, keep=()):
    """Returns the roster's outputs, in batches of members, and those of the clean member."""
    x, shared = self._run_shared(run, cache, keep)
    first, others = members_lib.batches(run.config, run.roster, run.tokens_BxT.size)
    states, outputs = self._run_members(run, cache, x, shared, first, keep)

    def more(members):
      return self._run_members(run, cache, x, BlockOutputs(), members)[0]

    return run.aggregate_batches(states, more, others), outputs

  def step(self, run: RosterPass, cache: KVCache) -> tuple[RosterOutputs, KVCache]:
    outputs, own = self._distributions(run, cache, keep=("keys", "values"))
    keys, values = own.keys, own.values
    if self.member_batches(run.config, run.roster, run.tokens_BxT.size)[1]:
      # Always true: XLA copies the cache for members that read it later, unless the
      # write depends on their results.
      last_B = outputs.log_probs[:, 0, 0]
      after_reading = ((last_B <= jnp.inf) | jnp.isnan(last_B))[:, None, None, None]
      keys, values = (jnp.where(after_reading, a, jnp.zeros_like(a)) for a in (keys, values))
    write = functools.partial(kv_cache.write_step, run.config)
    return outputs, sharding.write(write, cache, keys, values, run.positions_BxT[:, 0])

  def score(self, run: RosterPass, cache: KVCache) -> tuple[RosterOutputs, KVCache]:
    if self.fills_first(run.roster):
      return self._distributions(run, cache)[0], cache
    x, cache = self._run_clean(run, cache)
    return run.aggregate(x[None]), cache

  def fills_first(self, roster) -> bool:
    return not roster.is_baseline

  def member_batches(self, config, roster, tokens_per_member, platform=None):
    return members_lib.batch_sizes(config, roster, tokens_per_member, platform)


class OwnHistories(struct.PyTreeNode):
  """The standard cache.

  Attributes:
    shared: the layers before the first noise, `[L, B, K, S, C]`, shared by all members.
    own: the other layers of each member, `[R, L, B, K, S, C]`.
  """

  shared: KVCache | None = None
  own: KVCache | None = None


@dataclasses.dataclass(frozen=True)
class StandardCache(CacheMode):
  """A KV cache for each member, which is its own sequence, noisy at every position."""

  def empty(self, config, roster, batch_size, capacity, whole=False) -> OwnHistories:
    first, members = roster.noisy_layers[0], len(roster.members)
    own = kv_cache.empty(config, batch_size, capacity, (first, config.num_layers), whole)
    return OwnHistories(
      kv_cache.empty(config, batch_size, capacity, (0, first), whole),
      jax.tree.map(lambda c: jnp.tile(c, (members, *[1] * c.ndim)), own),
    )

  def states(self, run: RosterPass, cache: OwnHistories, keep=()):
    (first, end), num_layers = run.roster.noisy_layers, run.config.num_layers
    layers = functools.partial(run.layers, write=cache.own is not None, keep=keep)
    x, shared, outputs = layers(run.embed(), (0, first), cache.shared)
    members = jnp.asarray(run.roster.members)

    def run_member(member, own):
      x_m, own, noisy = layers(x, (first, end), own, run.noise(member), cache_offset=first)
      x_m, own, after = layers(x_m, (end, num_layers), own, cache_offset=first)
      return x_m, own, (noisy, after)

    x_RxBxTxD, own, others = self.map_members(run_member, members, cache.own)
    of_all = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(members), *a.shape)), outputs)
    parts = [o for o in (of_all, *others) if jax.tree.leaves(o)] or [BlockOutputs()]
    outputs = jax.tree.map(lambda *a: jnp.concatenate(a, axis=1).swapaxes(0, 1), *parts)
    return x_RxBxTxD, OwnHistories(shared, own), outputs

  def map_members(self, function: Callable, members: jax.Array, own: KVCache | None) -> tuple:
    """Maps a function of a member and its history over members."""
    return jax.vmap(function)(members, own)


@dataclasses.dataclass(frozen=True)
class NoCache(StandardCache):
  """No keys and values are kept: each step runs every member on the whole sequence again.

  Members compute what they do with the standard cache. What is kept are the tokens, int32
  `[B, 1, S, 1]`.
  """

  keeps_history = False

  def empty(self, config, roster, batch_size, capacity, whole=False) -> jax.Array:
    return jnp.zeros((batch_size, 1, capacity, 1), jnp.int32)

  def prefill(self, run: RosterPass, cache: jax.Array) -> jax.Array:
    batch = jnp.arange(len(cache))[:, None]
    return cache.at[batch, 0, run.positions_BxT, 0].set(run.tokens_BxT, mode="drop")

  def states(self, run: RosterPass, cache: jax.Array, keep=()):
    cache = self.prefill(run, cache)
    tokens = cache[:, 0, :, 0]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x, outputs = self.run_whole(run.replace(tokens_BxT=tokens, positions_BxT=positions), keep)

    def at_positions(a):  # [..., B, S, X]
      indices = run.positions_BxT.reshape(*[1] * (a.ndim - 3), *run.positions_BxT.shape, 1)
      return jnp.take_along_axis(a, indices, axis=-2, mode="clip")

    return at_positions(x), cache, jax.tree.map(at_positions, outputs)

  def run_whole(self, run: RosterPass, keep=()) -> tuple[jax.Array, BlockOutputs]:
    """Runs all members on whole sequences; returns states and outputs as `states` does."""
    x, _, outputs = super().states(run, OwnHistories(), keep)
    return x, outputs

  def map_members(self, function, members, own):
    return jax.lax.map(lambda member: function(member, own), members)  # so few activations

  def histories(self, num_members: int) -> int:
    return 0

  def member_batches(self, config, roster, tokens_per_member, platform=None):
    return 1, len(roster.members) - 1, 1

  def generation(self, roster, prompt_length: int, num_new_tokens: int) -> list[Pass]:
    return [Pass(roster, range(prompt_length + i), 1) for i in range(num_new_tokens)]

  def scoring(self, roster, length: int, start: int = 1) -> list[Pass]:
    return [Pass(roster, range(length - 1), length - start)]


CACHES |= {"clean": CleanCache(), "standard": StandardCache(), "none": NoCache()}
