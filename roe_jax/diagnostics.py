"""What routing noise does inside the model."""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import batching, decode, members as members_lib, params as params_lib, sharding
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster


def routing_agreement(params: Params, config: ModelConfig, roster: Roster,
                      texts: Sequence[Sequence[int]], starts: Sequence[int] | None = None,
                      request_ids: Sequence[int] | None = None) -> np.ndarray:
  """How far the noisy members' experts agree with the clean member's, by layer.

  The share of a noisy member's A chosen experts that the clean member chose at
  the same position, averaged over noisy members and over the positions from
  which the tokens at `starts` and after are predicted.

  Args:
    params: the model's parameters.
    config: its architecture.
    roster: a Clean Cache roster with at least one noisy member.
    texts: token ids, one batch.
    starts: see `score.score`.
    request_ids: see `decode.generate`.

  Returns:
    `[L]` float64 in [0, 1].

  Raises:
    ValueError: the roster has no noisy member, or not a Clean Cache; a text
      cannot be scored.
  """
  if roster.cache != "clean" or roster.recompute or roster.members == (0,):
    raise ValueError("routing agreement needs a Clean Cache roster with a noisy member")
  params = params_lib.held(params)
  batching.check_tokens(config, texts, what="text")
  starts = [1] * len(texts) if starts is None else starts
  ids = np.zeros(batching.bucket(len(texts)), np.uint32)
  ids[:len(texts)] = batching.request_ids(request_ids, len(texts))
  ids = jnp.asarray(ids)
  longest = max(map(len, texts))
  capacity = batching.bucket(longest, decode.MIN_CAPACITY)
  tokens = batching.pad(texts, len(ids), capacity)
  cache = batching.made_beside(params, members_lib.empty_cache, config, roster,
                               batch_size=len(ids), capacity=capacity, whole=True)
  cache = decode.fill_cache(params, config, roster, cache, tokens, longest - 1, ids)
  shared_BxT = _shared_experts(params, config, roster, cache, tokens, ids)
  wanted = np.zeros((len(ids), capacity), bool)
  for row, text, start in zip(wanted, texts, starts):
    row[start - 1:len(text) - 1] = True
  return np.asarray(shared_BxT, np.float64)[:, wanted].mean(axis=1)


@functools.partial(jax.jit, static_argnames="config")
def _shared_experts(params, config, roster, cache, tokens, request_ids):
  """Mean share of the clean member's experts, `[L, B, T]`."""
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  _, outputs = members_lib.member_states(
      params, config, roster, cache, tokens, positions, request_ids, keep=("experts",))
  clean, noisy = outputs.experts[:, :1], outputs.experts[:, 1:]
  shared = (noisy[..., :, None] == clean[..., None, :]).any(-1)
  return sharding.in_place(params, shared.mean(axis=(1, -1)))
