"""The cache modes: Clean Cache, the standard cache, and no cache."""

from collections.abc import Callable
import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import cache as kv_cache
from roe_jax import members as members_lib
from roe_jax import settling, sharding
from roe_jax.cache import KVCache
from roe_jax.cache_modes import CACHES, CacheMode, Draft, Pass
from roe_jax.layer_inputs import CacheAccess
from roe_jax.members import RosterOutputs, RosterPass
from roe_jax.transformer import BlockOutputs


@dataclasses.dataclass(frozen=True)
class CleanCache(CacheMode):
  """One KV cache, written by the clean member (arXiv 2509.17238).

  Every member attends to it and to its own key and value at its position. So the memory
  does not grow with the members, and as many as fit `Roster.memory_budget` run as one batch.
  """

  is_shared = True
  can_draft = True

  def empty(self, config, roster, batch_size, capacity, rerun=0) -> KVCache:
    return kv_cache.empty(config, batch_size, capacity, rerun=rerun)

  def prefill(self, run: RosterPass, cache: KVCache) -> KVCache:
    return self._run_clean(run, cache)[1]

  def _run_clean(self, run, cache):
    """Runs the clean member and writes the cache; returns its states, and the cache."""
    access = CacheAccess(cache, write=True)
    return run.layers(run.embed(), run.token_batch(), access, run.options())[:2]

  def states(self, run: RosterPass, cache: KVCache, keep=()):
    x, shared = self._run_shared(run, cache, keep)
    found = [
      self._run_members(
        run.with_weights(weights), CacheAccess(cache), x, shared, jnp.asarray(members), keep
      )
      for weights, members in run.roster.groups(run.roster.members)
    ]
    states, outputs = zip(*found)
    order = np.argsort([m for _, group in run.roster.groups(run.roster.members) for m in group])
    join = lambda arrays, axis: jnp.concatenate(arrays, axis).take(order, axis)
    if len(found) == 1:
      return states[0], cache, outputs[0]
    outputs = jax.tree.map(lambda *arrays: join(arrays, 1), *outputs)
    return join(states, 0), cache, outputs

  def _run_shared(self, run, cache, keep=()):
    """Returns hidden states `[B, T, D]` before the first noise, and outputs up to there."""
    options = run.options((0, run.roster.noisy_layers[0]), keep)
    x, _, outputs = run.layers(run.embed(), run.token_batch(), CacheAccess(cache), options)
    return x, outputs

  def _run_members(self, run, access, x, shared, members, keep=()):
    """Runs the other layers for some members.

    Returns:
      Hidden states `[R, B, T, D]`, and outputs of all layers: the first member's `keys` and
      `values` `[L, B, T, K, C]`, and all members' `experts` and `router_logits`.
    """
    first, end = run.roster.noisy_layers
    if run.starts_anew:
      x = run.embed()
    x = jnp.broadcast_to(x, (len(members), *x.shape))
    chosen, logits = jax.tree.map(
      lambda a: jnp.repeat(a[:, None], len(members), axis=1), (shared.experts, shared.router_logits)
    )
    parts = [shared.replace(experts=chosen, router_logits=logits)]
    noisy, clean = run.token_batch(run.noise(members)), run.token_batch()
    for layers, tokens in (((first, end), noisy), ((end, run.config.num_layers), clean)):
      x, _, outputs = run.layers(x, tokens, access, run.options(layers, keep))
      parts.append(outputs)
    return x, BlockOutputs.join(parts, axis=0)

  def step(
    self, run: RosterPass, cache: KVCache, write: bool = True
  ) -> tuple[RosterOutputs, KVCache]:
    """Runs the members in batches that fit the memory budget, and writes the cache."""
    if run.roster.clean_runs_first:
      draft, cache = self.draft(run, cache, write)
      return self.verify(run, cache, draft), cache
    keep = ("keys", "values") if write else ()
    access = CacheAccess(cache)
    x, shared = self._run_shared(run, cache, keep)
    first, others = members_lib.batches(run.config, run.roster, run.tokens_BxT.shape, run.mesh)
    states, own = self._run_members(run, access, x, shared, first, keep)

    def more(members):
      return run.unembed(self._run_members(run, access, x, BlockOutputs(), members)[0])

    outputs = run.aggregate_batches(run.unembed(states), more, others)
    if not write:
      return outputs, cache
    last = outputs.log_probs[:, 0, 0] if len(others) else None  # the other members read it later
    return outputs, self._write(run, cache, own, last)

  def _write(self, run, cache, own, read_later=None):
    """Writes one position of each sequence: `own`'s keys and values of all layers."""
    keys, values = own.keys, own.values
    if read_later is not None:
      after = functools.partial(kv_cache.after_reading, read_later[:, None, None, None])
      keys, values = jax.tree.map(after, (keys, values))
    put = functools.partial(kv_cache.write_step, run.config)
    return sharding.write(put, cache, keys, values, run.positions_BxT[:, 0])

  def draft(self, run: RosterPass, cache: KVCache, write: bool = True) -> tuple[Draft, KVCache]:
    keep = ("keys", "values") if write else ()
    x, before = self._run_shared(run, cache, keep)
    options = run.options((run.roster.noisy_layers[0], run.config.num_layers), keep)
    last, _, after = run.layers(x, run.token_batch(), CacheAccess(cache), options)
    draft = Draft(x, run.unembed(last))
    if write:
      cache = self._write(run, cache, BlockOutputs.join((before, after), axis=0))
    return draft, cache

  def verify(self, run: RosterPass, cache: KVCache, draft: Draft) -> RosterOutputs:
    def logits(run, draft, rows, members):
      access = CacheAccess(cache, rows=rows)
      return run.unembed(self._run_members(run, access, draft.x, BlockOutputs(), members)[0])

    if run.roster.is_adaptive:
      return settling.complete(run, draft, logits)
    if run.mesh is not None and not run.roster.has_own_weights:
      return self.step(run, cache, write=False)[0]  # all members: their number fits the mesh
    return run.aggregate_after(draft.logits, lambda run, m: logits(run, draft, None, m))

  def score(self, run: RosterPass, cache: KVCache) -> tuple[RosterOutputs, KVCache]:
    if self.fills_first(run.roster):
      return self.step(run, cache, write=False)
    x, cache = self._run_clean(run, cache)
    return run.aggregate(x[None]), cache

  def fills_first(self, roster) -> bool:
    return not roster.is_baseline

  def member_batches(self, config, roster, shape, mesh=None, platform=None):
    return members_lib.batch_sizes(config, roster, shape, mesh, platform)


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
  """A KV cache for each member, which is its own sequence, noisy at every position.

  Attributes:
    over_members: maps a function of a member and its cache over members.
  """

  over_members = staticmethod(jax.vmap)

  def empty(self, config, roster, batch_size, capacity, rerun=0) -> OwnHistories:
    first, members = roster.noisy_layers[0], len(roster.members)
    own = kv_cache.empty(config, batch_size, capacity, (first, config.num_layers), rerun)
    return OwnHistories(
      kv_cache.empty(config, batch_size, capacity, (0, first), rerun),
      jax.tree.map(lambda c: jnp.tile(c, (members, *[1] * c.ndim)), own),
    )

  def states(self, run: RosterPass, cache: OwnHistories, keep=()):
    (first, end), num_layers = run.roster.noisy_layers, run.config.num_layers
    members, write = jnp.asarray(run.roster.members), cache.own is not None

    def inputs(cache, layers, noise=None, offset=0):
      access = CacheAccess(cache, write, offset)
      return run.token_batch(noise), access, run.options(layers, keep)

    x, shared, outputs = run.layers(run.embed(), *inputs(cache.shared, (0, first)))

    def run_member(member, own):
      x_m, own, noisy = run.layers(x, *inputs(own, (first, end), run.noise(member), first))
      x_m, own, after = run.layers(x_m, *inputs(own, (end, num_layers), offset=first))
      return x_m, own, (noisy, after)

    x_RxBxTxD, own, others = self.over_members(run_member)(members, cache.own)
    of_all = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(members), *a.shape)), outputs)
    outputs = jax.tree.map(lambda a: a.swapaxes(0, 1), BlockOutputs.join((of_all, *others), axis=1))
    return x_RxBxTxD, OwnHistories(shared, own), outputs


def _one_by_one(function: Callable) -> Callable:
  """Maps a function over members one at a time, to hold the activations of one."""
  return lambda members, own: jax.lax.map(lambda member: function(member, own), members)


@dataclasses.dataclass(frozen=True)
class NoCache(StandardCache):
  """No keys and values are kept: each step runs every member on the whole sequence again.

  Members compute what they do with the standard cache. What is kept are the tokens, int32
  `[B, 1, S, 1]`.
  """

  keeps_history = False
  over_members = staticmethod(_one_by_one)

  def empty(self, config, roster, batch_size, capacity, rerun=0) -> jax.Array:
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

  def histories(self, num_members: int) -> int:
    return 0

  def member_batches(self, config, roster, shape, mesh=None, platform=None):
    return 1, len(roster.members) - 1, 1

  def generation(self, roster, prompt_length: int, num_new_tokens: int) -> list[Pass]:
    return [Pass(roster, range(prompt_length + i), 1) for i in range(num_new_tokens)]

  def scoring(self, roster, length: int, start: int = 1) -> list[Pass]:
    return [Pass(roster, range(length - 1), length - start)]


CACHES |= {"clean": CleanCache(), "standard": StandardCache(), "none": NoCache()}
