"""Runs the noisy members of an adaptive roster where they are needed; see `adaptive`."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from roe_jax import members as members_lib
from roe_jax.adaptive import Stop
from roe_jax.aggregation import MEAN_LOGIT
from roe_jax.cache_modes import Draft
from roe_jax.config import ModelConfig
from roe_jax.members import RosterOutputs, RosterPass
from roe_jax.roster import Roster

# Tokens x members that run together: with more, weights are read less often, and more rows of the
# last piece are empty. A CPU is bound by arithmetic from about there on.
_ROWS = {"cpu": 128}
_OTHER_ROWS = 1024

# `logits(run, draft, rows, members)`: float32 logits `[R, B, T, V]` of some members. The sequences
# of `run` are those of `rows`, int32 `[B]`, in the cache; None if they are all.
Logits = Callable[[RosterPass, Draft, jax.Array | None, jax.Array], jax.Array]


def complete(run: RosterPass, draft: Draft, logits: Logits) -> RosterOutputs:
  """Runs the noisy members at the positions where the clean one is unsure.

  These positions of all sequences are gathered, the most doubtful first, and run in pieces of one
  size, as many as are needed; on a CPU, a rest of less than half a piece runs in smaller ones. On a
  mesh, where rows are sharded, all run if any is unsure.

  Args:
    run: T tokens of each sequence.
    draft: what the clean member computed there.
    logits: runs members.
  """
  roster, clean = run.roster, draft.logits
  doubt = jnp.ones(clean.shape[:2]) if roster.unsure is None else roster.unsure.doubt(clean)
  is_unsure = doubt > 0
  if run.needed_BxT is not None:
    is_unsure &= run.needed_BxT
    doubt = jnp.where(is_unsure, doubt, 0.0)
  if run.mesh is not None:
    return _settle(run, draft, is_unsure, lambda run, members: logits(run, draft, None, members))
  num_rows, (_, t) = clean[..., 0].size, clean.shape[:2]
  size = piece_size(run.config, run.roster, num_rows)
  order = jnp.pad(jnp.argsort(-doubt.reshape(-1)), (0, size))
  count = is_unsure.sum()
  # Of the clean member alone; where others run, it is overwritten.
  found = jax.tree.map(lambda a: a.reshape(num_rows, *a.shape[2:]), _of_clean(clean))

  def piece(first, size, found):
    index = jax.lax.dynamic_slice_in_dim(order, first, size)
    rows = index // t

    def take(a):
      return a.reshape(num_rows, 1, *a.shape[2:])[index]

    at_rows = run.replace(
      tokens_BxT=take(run.tokens_BxT),
      positions_BxT=take(run.positions_BxT),
      request_ids_B=run.request_ids_B[rows],
      lengths_B=None,
      needed_BxT=None,
    )
    part = jax.tree.map(take, draft)
    is_used = first + jnp.arange(size) < count
    run_members = lambda run, members: logits(run, part, rows, members)
    outputs = _settle(at_rows, part, is_used[:, None], run_members)
    target = jnp.where(is_used, index, num_rows)
    return jax.tree.map(lambda a, new: a.at[target].set(new[:, 0], mode="drop"), found, outputs)

  def pieces(first, number, size, found):
    return jax.lax.fori_loop(
      0, number, lambda i, found: piece(first + i * size, size, found), found
    )

  small = _size_of_rest(size)
  if small == size:
    found = pieces(0, -(-count // size), size, found)
  else:
    number = (count + size // 2) // size
    found = pieces(0, number, size, found)
    found = pieces(number * size, -(-(count - number * size) // small), small, found)
  return jax.tree.map(lambda a: a.reshape(*clean.shape[:2], *a.shape[1:]), found)


def piece_size(
  config: ModelConfig, roster: Roster, num_rows: int, platform: str | None = None
) -> int:
  """Returns how many of all rows (positions of sequences) run together.

  Args:
    config: the model's architecture.
    roster: an adaptive one.
    num_rows: positions of all sequences.
    platform: JAX's name of the devices' platform; by default the backend's.
  """
  within = members_lib.tokens_within_budget(config, roster.memory_budget, platform)
  rows = min(within, _ROWS.get(platform or jax.default_backend(), _OTHER_ROWS))
  return min(num_rows, max(1, rows // _batch_size(roster)))


def _size_of_rest(size):
  """Returns the size of the last pieces: where arithmetic takes the time, empty rows cost as much
  as others; elsewhere, each piece costs a read of the weights."""
  return size // 4 if jax.default_backend() == "cpu" and size >= 8 else size


def _batch_size(roster):
  """Returns how many members run together, if memory allows."""
  noisy = roster.num_members - roster.include_clean
  return noisy if roster.member_stop is None else -(-noisy // Stop.CHECKS)


def _of_clean(clean):
  """Returns the outputs of the clean member alone."""
  log_probs = MEAN_LOGIT(clean[None])
  tokens = jnp.argmax(clean, axis=-1).astype(jnp.int32)
  return RosterOutputs(log_probs, tokens, jnp.full_like(tokens, 1))


def _settle(run, draft, is_open, logits):
  """Runs members in batches while rows are open; others keep the clean member's distribution.

  Args:
    run: the tokens.
    draft: what the clean member computed.
    is_open: `[B, T]` bool.
    logits: `logits(run, members)`, float32 `[R, B, T, V]`, with `run` or it `with_weights`.
  """
  of_clean = _of_clean(draft.logits)

  def run_members():
    if run.roster.member_stop is None:
      return run.aggregate_after(draft.logits, logits)
    return _until_settled(run, draft.logits, is_open, logits)

  found = jax.lax.cond(is_open.any(), run_members, lambda: of_clean)
  return _where(is_open, found, of_clean)


def _until_settled(run, clean, is_open, logits):
  """Runs members in batches while any row is open; see `_settle`."""
  roster, aggregation, stop = run.roster, run.roster.aggregate_with, run.roster.member_stop
  n, noisy = roster.num_members, jnp.asarray(roster.members[1:])
  ((weights, _),) = roster.groups(roster.members[1:])  # see Roster
  logits = functools.partial(logits, run.with_weights(weights))
  size = _batch_size(roster)
  first = len(noisy) - (len(noisy) - 1) // size * size
  batches = noisy[first:].reshape(-1, size)
  scores = aggregation.scores

  def add(carry, members, is_open):
    """Adds a batch of members to the rows that are open."""
    total, (sums, squares), count = carry
    found = logits(members)
    new = aggregation.add(total, found)
    total = new if total is None else _where(is_open, new, total)
    if stop.error_rate:
      each = jax.vmap(lambda a: scores(aggregation.add(None, a[None]), n))(found)
      moments = sums + each.sum(axis=0), squares + (each**2).sum(axis=0)
      sums, squares = _where(is_open, moments, (sums, squares))
    return total, (sums, squares), jnp.where(is_open, count + len(members), count)

  def settled(carry, index):
    total, moments, _ = carry
    added = first + index * size
    return stop.settled(scores(total, n), *moments, added, len(noisy) - added)

  def step(carry):
    index, is_open, state = carry
    state = add(state, batches[index], is_open)
    return index + 1, is_open & ~settled(state, index + 1), state

  zeros = (jnp.zeros_like(clean),) * 2 if stop.error_rate else (jnp.zeros(()),) * 2
  total = aggregation.add(None, clean[None]) if roster.include_clean else None
  count = jnp.zeros(is_open.shape, jnp.int32)
  state = add((total, zeros, count), noisy[:first], jnp.ones_like(is_open))
  still_open = is_open & ~settled(state, 0)
  more = lambda carry: (carry[0] < len(batches)) & carry[1].any()
  _, _, (total, _, count) = jax.lax.while_loop(more, step, (jnp.int32(0), still_open, state))
  log_probs = aggregation.finish(total, count[..., None] + roster.include_clean)
  return RosterOutputs(log_probs, jnp.argmax(clean, axis=-1).astype(jnp.int32), count + 1)


def _where(mask, new: Any, old: Any):
  """Returns, for each row of pytrees of arrays `[B, T, ...]`, one or the other."""

  def choose(new, old):
    return jnp.where(mask.reshape(*mask.shape, *[1] * (new.ndim - 2)), new, old)

  return jax.tree.map(choose, new, old)
