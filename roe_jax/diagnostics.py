"""What the members of a roster compute: logits, routing, agreement, unique active experts."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import batching, prefill, routing, sharding, transformer
from roe_jax import members as members_lib
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster


def next_token_distributions(
  params: Params,
  config: ModelConfig,
  sequences: Sequence[Sequence[int]],
  *,
  roster: Roster | None = None,
  request_ids: Sequence[int] | None = None,
  all_positions: bool = False,
) -> np.ndarray:
  """Computes the roster's distributions of the token that follows each sequence.

  Args:
    params: the model's parameters.
    config: its architecture.
    sequences: token ids, one batch.
    roster: the settings; the baseline by default.
    request_ids: see `decode.generate`.
    all_positions: whether to compute them at all positions, not only at the last.

  Returns:
    Log-probabilities, float32 `[B, V]`, or `[B, S, V]` at all positions: at t, those of token
    t + 1. S is the maximum length; values beyond a sequence's end are undefined.

  Raises:
    ValueError: a sequence is invalid.
  """
  arguments = params, config, sequences, roster, request_ids, all_positions
  return _logits(*arguments, of_members=False)[0]


def member_logits(
  params: Params,
  config: ModelConfig,
  sequences: Sequence[Sequence[int]],
  *,
  roster: Roster,
  request_ids: Sequence[int] | None = None,
  all_positions: bool = False,
) -> np.ndarray:
  """Computes each member's logits of the token that follows each sequence.

  The members are those of `roster.members`, the clean one (0) first. The arguments are those
  of `next_token_distributions`.

  Returns:
    Float32 `[R, B, V]`, or `[R, B, S, V]` at all positions.

  Raises:
    ValueError: a sequence is invalid.
  """
  arguments = params, config, sequences, roster, request_ids, all_positions
  return _logits(*arguments, of_members=True)


def last_member_logits(
  params: Params,
  config: ModelConfig,
  sequences: Sequence[Sequence[int]],
  rosters: Sequence[Roster],
  *,
  request_ids: Sequence[int] | None = None,
  num_positions: int = 1,
) -> Iterator[jax.Array]:
  """Computes the logits of each roster's members at the last positions of each sequence.

  The rosters attend to one Clean Cache, which is filled once: many rosters cost little more than
  the baseline. Results are those of `member_logits`, up to rounding.

  Args:
    params: the model's parameters.
    config: its architecture.
    sequences: token ids, one batch, each of at least `num_positions`.
    rosters: the settings; their cache is that of the clean member.
    request_ids: see `decode.generate`.
    num_positions: T, the number of positions.

  Yields:
    For each roster, float32 `[R, B, T, V]`: at t, the logits of the token that follows position
    t of the last T.

  Raises:
    ValueError: a sequence is invalid, or the rosters do not share a cache.
  """
  if not all(r.cache_mode.is_shared for r in rosters):
    raise ValueError("rosters with one cache for all members are needed: use the cache clean")
  if min(map(len, sequences)) < num_positions:
    raise ValueError(f"each sequence must have at least {num_positions} tokens")
  params = params_lib.in_storage_dtype(params)
  for roster in rosters:
    roster.check(config)
  tokens, ids, cache = _padded(params, config, rosters[0], sequences, request_ids, num_positions)
  starts, longest = np.zeros(len(ids), np.int32), max(map(len, sequences))
  starts[: len(sequences)] = [len(s) - num_positions for s in sequences]
  # A multiple of 32 instead of a power of two: the fewest positions in few shapes.
  filled = tokens[:, : -(-longest // 32) * 32]
  # Members read the T positions, too, from the cache: all but the last, which they compute.
  cache = prefill.fill_cache(params, config, rosters[0], cache, filled, longest - 1, ids)
  columns = jnp.asarray(starts[:, None] + np.arange(num_positions))
  last = jnp.take_along_axis(tokens, columns, axis=1)
  for roster in rosters:
    yield _last_logits(params, config, roster, cache, last, columns, ids)[:, : len(sequences)]


@functools.partial(jax.jit, static_argnames="config")
def _last_logits(params, config, roster, cache, tokens, positions, request_ids):
  """Returns members' logits `[R, B, T, V]` at T positions of each sequence."""
  run = members_lib.RosterPass(params, config, roster, tokens, positions, request_ids)
  found = run.unembed_members(roster.cache_mode.states(run, cache)[0])
  return sharding.with_sharding_constraint(params, found)


def _logits(params, config, sequences, roster, request_ids, all_positions, of_members):
  roster = roster or Roster.create(config)
  batching.check_tokens(config, sequences, what="sequence")
  last = np.zeros(batching.bucket(len(sequences)), np.int32)
  last[: len(sequences)] = [len(s) - 1 for s in sequences]
  compute = functools.partial(
    _logits_at, last_B=None if all_positions else jnp.asarray(last), of_members=of_members
  )
  found = at_all_positions(compute, params, config, roster, sequences, request_ids)
  found = found[:, : len(sequences), : max(map(len, sequences))]
  return found if all_positions else found[:, :, 0]


class Trace(NamedTuple):
  """The logits and routing of all members at all positions.

  Values beyond a sequence's end are undefined.

  Attributes:
    logits: `[R, B, S, V]` float32.
    experts: `[L, R, B, S, A]` int32, the chosen experts, best first; E where one is left out.
    gates: `[L, R, B, S, A]` float32, their gates.
    router_logits: `[L, R, B, S, E]` float32, without noise.
  """

  logits: np.ndarray
  experts: np.ndarray
  gates: np.ndarray
  router_logits: np.ndarray


def trace(
  params: Params,
  config: ModelConfig,
  sequences: Sequence[Sequence[int]],
  *,
  roster: Roster | None = None,
  request_ids: Sequence[int] | None = None,
) -> Trace:
  """Computes each member's logits, and which experts it chooses in each layer, with which gates.

  Args:
    params: the model's parameters.
    config: its architecture.
    sequences: token ids, one batch.
    roster: the settings; the baseline by default.
    request_ids: see `decode.generate`.

  Raises:
    ValueError: a sequence is invalid.
  """
  roster = roster or Roster.create(config)
  found = at_all_positions(_trace, params, config, roster, sequences, request_ids)
  cut = np.s_[..., : len(sequences), : max(map(len, sequences)), :]
  return Trace(*(a[cut] for a in found))


def routing_agreement(
  params: Params,
  config: ModelConfig,
  roster: Roster,
  sequences: Sequence[Sequence[int]],
  starts: Sequence[int] | None = None,
  request_ids: Sequence[int] | None = None,
) -> np.ndarray:
  """Measures how often the noisy members choose the clean member's experts, by layer.

  The fraction of a noisy member's experts that the clean member chose at the same
  position, averaged over noisy members and over the positions that predict the tokens
  from `starts` on.

  Args:
    params: the model's parameters.
    config: its architecture.
    roster: one with a shared history (Clean Cache) and at least one noisy member.
    sequences: token ids, one batch.
    starts: see `scoring.score`.
    request_ids: see `decode.generate`.

  Returns:
    `[L]` float64 in [0, 1].

  Raises:
    ValueError: the roster has no noisy member or no Clean Cache, or a sequence is invalid.
  """
  if not roster.cache_mode.is_shared or roster.members == (0,):
    raise ValueError("routing agreement needs a Clean Cache roster with a noisy member")
  starts = [1] * len(sequences) if starts is None else starts
  shared_BxT = at_all_positions(_shared_experts, params, config, roster, sequences, request_ids)
  wanted = np.zeros(shared_BxT.shape[1:], bool)
  for row, sequence, start in zip(wanted, sequences, starts):
    row[start - 1 : len(sequence) - 1] = True
  return shared_BxT.astype(np.float64)[:, wanted].mean(axis=1)


def routing_margins(
  params: Params,
  config: ModelConfig,
  roster: Roster,
  sequences: Sequence[Sequence[int]],
  request_ids: Sequence[int] | None = None,
) -> np.ndarray:
  """Measures how close each member's choice of experts is to a different one.

  The difference between the scores (see `routing.scores`; usually the perturbed router logits) of
  the last expert chosen and the first one not chosen, of the chosen groups. If it is as small as
  the rounding error of the logits, another order of summation may change the choice.

  Args:
    params: the model's parameters.
    config: its architecture, with E > A.
    roster: the settings.
    sequences: token ids, one batch.
    request_ids: see `decode.generate`.

  Returns:
    `[L, R, B, S]` float32, not negative; S is the maximum length. Values beyond a
    sequence's end are undefined.

  Raises:
    ValueError: a sequence is invalid.
  """
  margins = at_all_positions(_margins, params, config, roster, sequences, request_ids)
  return margins[:, :, : len(sequences), : max(map(len, sequences))]


UNITS = ("logits", "spread", "margin")


def router_scales(
  params: Params,
  config: ModelConfig,
  sequences: Sequence[Sequence[int]],
  starts: Sequence[int] | None = None,
  batch_size: int = 16,
) -> dict[str, np.ndarray]:
  """Measures the scales of each layer's router logits, as units of τ.

  Args:
    params: the model's parameters.
    config: its architecture, with E > A.
    sequences: token ids.
    starts: see `scoring.score`; counts the positions that predict the tokens from there on.
    batch_size: sequences computed together; affects results by rounding only.

  Returns:
    `[L]` float64 for each of `UNITS`, in router logits: "logits", one; "spread", the standard
    deviation of a token's logits over experts; "margin", the difference between its A-th and next
    largest one; means over positions, and zero in layers without experts.

  Raises:
    ValueError: the model has no router or A = E, a sequence is invalid, or no token is predicted.
  """
  if config.experts_per_token >= config.num_experts:
    raise ValueError(
      f"τ has no unit in a model that uses all of its {config.num_experts} experts: its choices "
      "have no margin"
    )
  starts = [1] * len(sequences) if starts is None else list(starts)
  found: list[np.ndarray] = []
  for first in range(0, len(sequences), batch_size):
    batch = slice(first, first + batch_size)
    baseline = Roster.create(config)
    both = at_all_positions(_scales, params, config, baseline, sequences[batch], None)
    for i, (sequence, start) in enumerate(zip(sequences[batch], starts[batch])):
      found.append(both[:, :, i, start - 1 : len(sequence) - 1].astype(np.float64))
  values = np.concatenate(found, axis=-1) if found else np.zeros((2, 1, 0))
  if not values.size:
    raise ValueError("no token is predicted: a sequence must be longer than its start")
  dense = np.zeros(config.first_dense_layers)
  spread, margin = (np.concatenate([dense, scale]) for scale in values.mean(axis=-1))
  return dict(zip(UNITS, (np.ones_like(spread), spread, margin)))


def last_gates(
  params: Params,
  config: ModelConfig,
  roster: Roster,
  sequences: Sequence[Sequence[int]],
  request_ids: Sequence[int] | None = None,
) -> np.ndarray:
  """Computes the gates of the roster's last member at the last position of each sequence.

  Args:
    params: the model's parameters.
    config: its architecture.
    roster: the settings.
    sequences: token ids, one batch.
    request_ids: see `decode.generate`.

  Returns:
    `[B, L, E]` float32, of the layers with experts; zero for experts that are not chosen.

  Raises:
    ValueError: a sequence is invalid.
  """
  last = np.zeros(batching.bucket(len(sequences)), np.int32)
  last[: len(sequences)] = [len(s) - 1 for s in sequences]
  compute = functools.partial(_gates_at, last_B=jnp.asarray(last))
  return at_all_positions(compute, params, config, roster, sequences, request_ids)[: len(sequences)]


@dataclasses.dataclass(frozen=True)
class UniqueExperts:
  """The number of unique active experts by layer, which a step must read.

  Attributes:
    by_position: `[L]` float64, over all members at one position; mean over positions.
    by_step: `[L]` float64, over all members of all sequences that decode together; mean
      over steps.
    per_member: `[L]` float64, experts of one member at one position; mean over both. A, unless
      some are left out (see `routing.route`).
    num_steps: number of steps.
  """

  by_position: np.ndarray
  by_step: np.ndarray
  per_member: np.ndarray
  num_steps: int


def unique_experts(
  params: Params,
  config: ModelConfig,
  roster: Roster,
  sequences: Sequence[Sequence[int]],
  starts: Sequence[int] | None = None,
  request_ids: Sequence[int] | None = None,
  batch_size: int = 16,
) -> UniqueExperts:
  """Counts the unique active experts.

  Counts the positions that predict the tokens from `starts` on, and all experts computed
  there, including those of a clean member that only writes the cache. The first such
  positions of all sequences are the first step, and so on, as if all sequences were decoded
  together.

  Args:
    params: the model's parameters.
    config: its architecture.
    roster: a roster with a cache.
    sequences: token ids.
    starts: see `scoring.score`.
    request_ids: see `decode.generate`.
    batch_size: sequences computed together; does not affect the counts.

  Raises:
    ValueError: the roster has no cache, a sequence is invalid, or no token is predicted.
  """
  if not roster.cache_mode.keeps_history:
    raise ValueError("unique experts are counted for rosters with a cache, not with cache='none'")
  starts = [1] * len(sequences) if starts is None else list(starts)
  num_steps = max(len(t) - s for t, s in zip(sequences, starts))
  if num_steps < 1:
    raise ValueError("no token is predicted: a sequence must be longer than its start")
  ids = batching.request_ids(request_ids, len(sequences))
  steps = np.zeros((config.num_expert_layers, num_steps, config.num_experts), bool)
  positions, counts = [], []
  for first in range(0, len(sequences), batch_size):
    batch = slice(first, first + batch_size)
    active, used = at_all_positions(
      _active_experts, params, config, roster, sequences[batch], ids[batch]
    )
    for i, (sequence, start) in enumerate(zip(sequences[batch], starts[batch])):
      own = np.s_[:, i, start - 1 : len(sequence) - 1]
      steps[:, : active[own].shape[1]] |= active[own]
      positions.append(active[own].sum(axis=-1))
      counts.append(used[own])
  by_position, per_member = (np.concatenate(a, axis=1).mean(axis=1) for a in (positions, counts))
  return UniqueExperts(by_position, steps.sum(axis=-1).mean(axis=1), per_member, num_steps)


def at_all_positions(compute, params, config, roster, sequences, request_ids):
  """Runs `compute` on a filled cache at all positions; returns numpy arrays."""
  params = params_lib.in_storage_dtype(params)
  roster.check(config)
  tokens, ids, cache = _padded(params, config, roster, sequences, request_ids)
  if roster.cache_mode.is_shared:
    longest = max(map(len, sequences))
    cache = prefill.fill_cache(params, config, roster, cache, tokens, longest - 1, ids)
  return jax.tree.map(np.asarray, compute(params, config, roster, cache, tokens, ids))


def _padded(params, config, roster, sequences, request_ids, rerun=None):
  """Returns tokens `[B, S]`, request ids `[B]`, and an empty cache for `rerun` (S) positions."""
  batching.check_tokens(config, sequences, what="sequence")
  ids = np.zeros(batching.bucket(len(sequences)), np.uint32)
  ids[: len(sequences)] = batching.request_ids(request_ids, len(sequences))
  capacity = batching.bucket(max(map(len, sequences)), prefill.MIN_CAPACITY)
  tokens = batching.pad(sequences, len(ids), capacity)
  cache = batching.init_sharded(
    params,
    members_lib.empty_cache,
    config,
    roster,
    batch_size=len(ids),
    capacity=capacity,
    rerun=rerun or capacity,
  )
  return tokens, jnp.asarray(ids), cache


def run_of(params, config, roster, tokens, request_ids):
  """Returns the pass over all positions."""
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return members_lib.RosterPass(params, config, roster, tokens, positions, request_ids)


def states(params, config, roster, cache, tokens, request_ids, keep=()):
  """Returns all members' states and outputs at all positions; see `CacheMode.states`."""
  run = run_of(params, config, roster, tokens, request_ids)
  x, _, outputs = roster.cache_mode.states(run, cache, keep)
  return x, outputs


@functools.partial(jax.jit, static_argnames="config")
def _active_experts(params, config, roster, cache, tokens, request_ids):
  """Returns whether any member chose each expert, bool `[L, B, T, E]`, and their mean number."""
  _, outputs = states(params, config, roster, cache, tokens, request_ids, ("experts",))
  chosen = outputs.experts
  active = jax.nn.one_hot(chosen, config.num_experts, dtype=bool).any(axis=(1, -2))
  used = (chosen < config.num_experts).sum(axis=-1).mean(axis=1)
  return sharding.with_sharding_constraint(params, (active, used))


@functools.partial(jax.jit, static_argnames="config")
def _shared_experts(params, config, roster, cache, tokens, request_ids):
  """Returns the mean fraction of experts shared with the clean member, `[L, B, T]`."""
  _, outputs = states(params, config, roster, cache, tokens, request_ids, ("experts",))
  chosen = outputs.experts
  clean, noisy = chosen[:, :1], chosen[:, 1:]
  used = noisy < config.num_experts
  shared = (noisy[..., :, None] == clean[..., None, :]).any(-1) & used
  fraction = shared.sum(-1) / used.sum(-1)
  return sharding.with_sharding_constraint(params, fraction.mean(axis=1))


@functools.partial(jax.jit, static_argnames="config")
def _margins(params, config, roster, cache, tokens, request_ids):
  """Returns the margins `[L, R, B, T]`."""

  def margin(layer, count, logits_BxTxE, perturbed_BxTxE):
    del logits_BxTxE
    bias = transformer.correction_bias(params.layers, layer)
    scores = routing.scores(config, perturbed_BxTxE, bias)
    best, _ = jax.lax.top_k(scores, config.experts_per_token + 1)
    count = config.experts_per_token if count is None else count
    return best[..., count - 1] - best[..., count]

  return _of_router_logits(margin, params, config, roster, cache, tokens, request_ids)[0]


@functools.partial(jax.jit, static_argnames="config")
def _scales(params, config, roster, cache, tokens, request_ids):
  """Returns the spread and the margin of the clean logits, `[2, L, B, T]`."""
  _, outputs = states(params, config, roster, cache, tokens, request_ids, ("router_logits",))
  logits = outputs.router_logits[:, 0]
  best, _ = jax.lax.top_k(logits, config.experts_per_token + 1)
  found = jnp.stack([jnp.std(logits, axis=-1), best[..., -2] - best[..., -1]])
  return sharding.with_sharding_constraint(params, found)


@functools.partial(jax.jit, static_argnames=("config", "of_members"))
def _logits_at(params, config, roster, cache, tokens, request_ids, *, last_B, of_members):
  """Returns members' logits `[R, B, T, V]`, or the roster's log-probabilities with R = 1."""
  x, _ = states(params, config, roster, cache, tokens, request_ids)
  if last_B is not None:
    x = jnp.take_along_axis(x, last_B[None, :, None, None], axis=2)
  run = run_of(params, config, roster, tokens, request_ids)
  found = run.unembed_members(x) if of_members else run.aggregate(x).log_probs[None]
  return sharding.with_sharding_constraint(params, found)


def _route(params, config, roster, cache, tokens, request_ids):
  """Returns `_of_router_logits` of the chosen experts and their gates."""

  def route(layer, count, logits_BxTxE, perturbed_BxTxE):
    return transformer.route(
      config, params.layers, layer, logits_BxTxE, perturbed_BxTxE, roster.gate_weights, count
    )

  return _of_router_logits(route, params, config, roster, cache, tokens, request_ids)


@functools.partial(jax.jit, static_argnames="config")
def _gates_at(params, config, roster, cache, tokens, request_ids, *, last_B):
  """Returns the last member's gates `[B, L, E]` at one position of each sequence."""
  (chosen, gates), _, _ = _route(params, config, roster, cache, tokens, request_ids)
  at = last_B[None, :, None, None]
  chosen, gates = (jnp.take_along_axis(a[:, -1], at, axis=2)[:, :, 0] for a in (chosen, gates))
  by_expert = jax.nn.one_hot(chosen, config.num_experts) * gates[..., None]
  return sharding.with_sharding_constraint(params, by_expert.sum(axis=2).swapaxes(0, 1))


@functools.partial(jax.jit, static_argnames="config")
def _trace(params, config, roster, cache, tokens, request_ids):
  """Returns the fields of `Trace`."""
  (chosen, gates), router_logits, x = _route(params, config, roster, cache, tokens, request_ids)
  logits = sharding.with_sharding_constraint(params, transformer.unembed(params, config, x))
  return logits, chosen, gates, router_logits


def _of_router_logits(compute, params, config, roster, cache, tokens, request_ids):
  """Applies `compute` to each layer and member.

  Args:
    compute: takes the layer's index in `params.layers`, how many experts the member uses (None:
      all A), and router logits `[B, T, E]` without and with noise.
    params, config, roster, cache, tokens, request_ids: the pass.

  Returns:
    Its results `[L, R, ...]`, the logits without noise `[L, R, B, T, E]`, and the members' states.
  """
  if roster.member_tasks is not None:
    raise ValueError("gates, margins and traces are of members that share a model's own weights")
  run = run_of(params, config, roster, tokens, request_ids)
  x, outputs = states(params, config, roster, cache, tokens, request_ids, ("router_logits",))

  def of_member(layer, member, logits_BxTxE):
    noise = run.noise(member)
    in_model = config.first_dense_layers + layer
    perturbed_BxTxE = noise.perturb(in_model, logits_BxTxE, config.experts_per_token)
    count = run.token_batch().router.count(member, in_model)
    return compute(layer, count, logits_BxTxE, perturbed_BxTxE)

  of_members = jax.vmap(of_member, in_axes=(None, 0, 0))
  found = jax.lax.map(
    lambda a: of_members(a[0], jnp.asarray(roster.members), a[1]),
    (jnp.arange(config.num_expert_layers), outputs.router_logits),
  )
  return *sharding.with_sharding_constraint(params, (found, outputs.router_logits)), x
