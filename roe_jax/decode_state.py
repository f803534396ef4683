"""The state of generation on the device, and a jitted loop of decode steps over batch slots."""

from collections.abc import Sequence
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import batching, drafting, prefill, sampling, sharding
from roe_jax import members as members_lib
from roe_jax.config import ModelConfig
from roe_jax.members import RosterPass
from roe_jax.params import Params
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler


class DecodeState(struct.PyTreeNode):
  """The sequences in B slots.

  Attributes:
    tokens: `[B, S]` int32, prompts and generated tokens.
    log_probs: `[B, S]` float32 of each generated token.
    clean_tokens: `[B, S]` int32, the clean member's choice at each generated position.
    members: `[B, S]` int32, how many members were computed for each generated token.
    passes: `[B, S]` int32, sum of these over the step that generated it, drafted tokens that were
      not kept included; at the first token of the step.
    lengths: `[B]` int32, tokens so far.
    limits: `[B]` int32, length at which a sequence ends.
    done: `[B]` bool; True also in an empty slot.
    request_ids: `[B]` uint32.
    cache: see `CacheMode.empty`; holds positions < `lengths - 1`.
  """

  tokens: jax.Array
  log_probs: jax.Array
  clean_tokens: jax.Array
  members: jax.Array
  passes: jax.Array
  lengths: jax.Array
  limits: jax.Array
  done: jax.Array
  request_ids: jax.Array
  cache: Any


@functools.partial(jax.jit, static_argnames=("config", "draft_tokens"), donate_argnames="state")
def decode_steps(
  params: Params,
  config: ModelConfig,
  roster: Roster,
  sampler: Sampler,
  state: DecodeState,
  stop_tokens: jax.Array,
  num_steps: jax.Array,
  draft_tokens: int = 1,
) -> tuple[DecodeState, jax.Array]:
  """Decodes all running sequences until one of them ends.

  Args:
    params: the model's parameters.
    config: its architecture.
    roster: the settings.
    sampler: how tokens are chosen.
    state: donated.
    stop_tokens: `[X]` int32, padded with -1.
    num_steps: int32 scalar, traced: the maximum number of steps.
    draft_tokens: J, static: a step adds one to J tokens to each sequence.

  Returns:
    The state, and the number of steps taken.
  """
  done_before = state.done
  slots = jnp.arange(state.tokens.shape[0])

  def step(carry):
    count, state = carry
    last = state.lengths - 1
    tokens, request_ids = state.tokens[slots, last], state.request_ids
    if draft_tokens == 1:
      run = RosterPass.of_step(params, config, roster, tokens, last, request_ids)
      run = run.replace(needed_BxT=~state.done[:, None])
      outputs, cache = roster.cache_mode.step(run, state.cache)
      drafted = outputs.clean_tokens
    else:
      outputs, drafted, cache = drafting.draft_and_verify(
        params,
        config,
        roster,
        sampler,
        tokens,
        last,
        request_ids,
        ~state.done,
        state.cache,
        draft_tokens,
      )
    indices = state.lengths[:, None] + jnp.arange(draft_tokens)[None]
    first = indices == state.lengths[:, None]
    chosen = sampling.choose(
      sampler,
      roster.seed,
      outputs.log_probs.reshape(-1, config.vocab_size),
      jnp.repeat(request_ids, draft_tokens),
      (indices - 1).reshape(-1),
    ).reshape(indices.shape)
    log_probs = jnp.take_along_axis(outputs.log_probs, chosen[..., None], axis=-1)[..., 0]
    ends = jnp.isin(chosen, stop_tokens) | (indices + 1 >= state.limits[:, None])
    goes_on = (chosen == drafted) & ~ends
    holds = jnp.cumprod(goes_on[:, :-1], axis=1, dtype=jnp.int32)
    holds = jnp.pad(holds, ((0, 0), (1, 0)), constant_values=1) == 1
    holds &= ~state.done[:, None]
    indices = jnp.where(holds, indices, state.tokens.shape[1])

    def put(array, values):
      return array.at[slots[:, None], indices].set(values, mode="drop")

    return count + 1, state.replace(
      tokens=put(state.tokens, chosen),
      log_probs=put(state.log_probs, log_probs),
      clean_tokens=put(state.clean_tokens, outputs.clean_tokens),
      members=put(state.members, outputs.members),
      passes=put(state.passes, jnp.where(first, outputs.members.sum(axis=1, keepdims=True), 0)),
      lengths=state.lengths + holds.sum(axis=1),
      done=state.done | jnp.any(holds & ends, axis=1),
      cache=cache,
    )

  def none_ended(carry):
    count, state = carry
    return (count < num_steps) & jnp.all(state.done == done_before)

  count, state = jax.lax.while_loop(none_ended, step, (jnp.int32(0), state))
  return sharding.with_sharding_constraint(params, state), count


def start(
  params: Params,
  config: ModelConfig,
  roster: Roster,
  prompts: Sequence[Sequence[int]],
  request_ids: Sequence[int],
  max_new_tokens: int,
  num_slots: int,
  capacity: int,
) -> DecodeState:
  """Prefills the prompts, one per slot from the first on.

  The last token of each prompt is left for the first step.
  """
  lengths, ids = np.ones(num_slots, np.int32), np.zeros(num_slots, np.uint32)
  lengths[: len(prompts)] = [len(p) for p in prompts]
  ids[: len(prompts)] = request_ids
  tokens, ids = batching.pad(prompts, num_slots, capacity), jnp.asarray(ids)
  cache = batching.init_sharded(
    params,
    members_lib.empty_cache,
    config,
    roster,
    batch_size=num_slots,
    capacity=capacity,
    rerun=roster.draft_tokens,
  )
  cache = prefill.fill_cache(params, config, roster, cache, tokens, lengths - 1, ids)
  state = DecodeState(
    tokens=tokens,
    log_probs=jnp.zeros(tokens.shape, jnp.float32),
    clean_tokens=jnp.full(tokens.shape, -1, jnp.int32),
    members=jnp.zeros(tokens.shape, jnp.int32),
    passes=jnp.zeros(tokens.shape, jnp.int32),
    lengths=jnp.asarray(lengths),
    limits=jnp.asarray(np.minimum(lengths + max_new_tokens, config.context_length)),
    done=jnp.arange(num_slots) >= len(prompts),
    request_ids=ids,
    cache=cache,
  )
  return batching.device_put_like(params, state)


@functools.partial(jax.jit, donate_argnames="state")
def insert_sequence(
  state: DecodeState, slot: jax.Array, other: DecodeState, other_slot: jax.Array
) -> DecodeState:
  """Copies the sequence in a slot of another state to a slot of the (donated) state."""

  def put(axis):
    return lambda into, source: sharding.copy_slot(into, source, axis, slot, other_slot)

  cache = jax.tree.map(put(-4), state.cache, other.cache)
  rest = jax.tree.map(put(0), state.replace(cache=None), other.replace(cache=None))
  return rest.replace(cache=cache)
