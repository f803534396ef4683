"""Prefill: fills the KV cache in chunks of few shapes."""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import batching
from roe_jax import members as members_lib
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster

PREFILL_CHUNK = 256
# Memory is cheap and compilation is not: short sequences share one shape.
MIN_CAPACITY = 128


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill_chunk(
  params: Params,
  config: ModelConfig,
  roster: Roster,
  cache: Any,
  tokens_BxT: jax.Array,
  starts_B: jax.Array,
  request_ids_B: jax.Array,
  lengths_B: jax.Array | None = None,
) -> Any:
  """Writes T tokens at positions from `starts_B` on to the (donated) cache."""
  positions = starts_B[:, None] + jnp.arange(tokens_BxT.shape[1])[None]
  run = members_lib.RosterPass(
    params, config, roster, tokens_BxT, positions, request_ids_B, lengths_B
  )
  return roster.cache_mode.prefill(run, cache)


def fill_cache(
  params: Params,
  config: ModelConfig,
  roster: Roster,
  cache: Any,
  tokens_BxS: jax.Array,
  lengths: np.ndarray | int,
  request_ids_B: jax.Array,
) -> Any:
  """Prefills the positions below each sequence's length (or one length of all) in chunks."""
  batch_size, padded = tokens_BxS.shape
  start, longest = 0, int(np.max(lengths))
  lengths_B = jnp.asarray(np.broadcast_to(np.int32(lengths), batch_size))
  while start < longest:
    size = min(PREFILL_CHUNK, _chunk(longest - start), padded - start)
    tokens, starts = tokens_BxS[:, start : start + size], jnp.full(batch_size, start)
    cache = prefill_chunk(
      params, config, roster.history(), cache, tokens, starts, request_ids_B, lengths_B
    )
    start += size
  return cache


def _chunk(positions: int) -> int:
  """Returns a power of two; half of it if the rest then fits into a quarter: less padding."""
  size = batching.power_of_two(positions, 32)
  return size // 2 if size > 64 and positions <= size * 3 // 4 else size


def capacity_for(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
  """Returns the cache capacity for any of the prompts with its completion: one of few sizes."""
  longest = max(map(len, prompts), default=0)
  # One more than the longest sequence: slots that are done point to it.
  return batching.bucket(min(longest + max_new_tokens, config.context_length) + 1, MIN_CAPACITY)
