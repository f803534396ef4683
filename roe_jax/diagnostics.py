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
  starts = [1] * len(texts) if starts is None else starts
  arguments = tokens, *_ = _against_cache(params, config, roster, texts, request_ids)
  wanted = np.zeros(tokens.shape, bool)
  for row, text, start in zip(wanted, texts, starts):
    row[start - 1:len(text) - 1] = True
  shared_BxT = _shared_experts(params_lib.held(params), config, roster, *arguments)
  return np.asarray(shared_BxT, np.float64)[:, wanted].mean(axis=1)


def routing_margins(params: Params, config: ModelConfig, roster: Roster,
                    texts: Sequence[Sequence[int]],
                    request_ids: Sequence[int] | None = None) -> np.ndarray:
  """How far each member's choice of experts is from another one.

  The distance between the perturbed router logits of the last expert that is chosen
  and of the first that is not. Where it is as small as the rounding of the logits,
  the choice may be another one with another order of summation.

  Args:
    params: the model's parameters.
    config: its architecture, with more experts than are chosen.
    roster: a Clean Cache roster.
    texts: token ids, one batch.
    request_ids: see `decode.generate`.

  Returns:
    `[L, R, B, S]` float32, not negative; S is the longest text's length, and what
    lies behind the end of a text means nothing.

  Raises:
    ValueError: the roster has no Clean Cache; a text cannot be scored.
  """
  if roster.cache != "clean" or roster.recompute:
    raise ValueError("routing margins need a Clean Cache roster")
  arguments = _against_cache(params, config, roster, texts, request_ids)
  margins = _margins(params_lib.held(params), config, roster, *arguments)
  return np.asarray(margins)[:, :, :len(texts), :max(map(len, texts))]


def _against_cache(params, config, roster, texts, request_ids):
  """Tokens, request ids and a cache that holds all positions, padded."""
  params = params_lib.held(params)
  batching.check_tokens(config, texts, what="text")
  ids = np.zeros(batching.bucket(len(texts)), np.uint32)
  ids[:len(texts)] = batching.request_ids(request_ids, len(texts))
  ids = jnp.asarray(ids)
  longest = max(map(len, texts))
  capacity = batching.bucket(longest, decode.MIN_CAPACITY)
  tokens = batching.pad(texts, len(ids), capacity)
  cache = batching.made_beside(params, members_lib.empty_cache, config, roster,
                               batch_size=len(ids), capacity=capacity, whole=True)
  cache = decode.fill_cache(params, config, roster, cache, tokens, longest - 1, ids)
  return tokens, ids, cache


def _positions(tokens):
  return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


@functools.partial(jax.jit, static_argnames="config")
def _shared_experts(params, config, roster, tokens, request_ids, cache):
  """Mean share of the clean member's experts, `[L, B, T]`."""
  _, outputs = members_lib.member_states(
      params, config, roster, cache, tokens, _positions(tokens), request_ids, keep=("experts",))
  clean, noisy = outputs.experts[:, :1], outputs.experts[:, 1:]
  shared = (noisy[..., :, None] == clean[..., None, :]).any(-1)
  return sharding.in_place(params, shared.mean(axis=(1, -1)))


@functools.partial(jax.jit, static_argnames="config")
def _margins(params, config, roster, tokens, request_ids, cache):
  """`[L, R, B, T]`."""
  positions = _positions(tokens)
  _, outputs = members_lib.member_states(
      params, config, roster, cache, tokens, positions, request_ids, keep=("router_logits",))

  def margin(layer, member, logits_BxTxE):
    noise = members_lib.routing_noise(roster, request_ids, positions, member)
    perturbed = logits_BxTxE + noise.draw(layer, config.num_experts)
    best, _ = jax.lax.top_k(perturbed, config.experts_per_token + 1)
    return best[..., -2] - best[..., -1]

  of_members = jax.vmap(margin, in_axes=(None, 0, 0))
  return sharding.in_place(params, jax.lax.map(
      lambda a: of_members(a[0], jnp.asarray(roster.members), a[1]),
      (jnp.arange(config.num_layers), outputs.router_logits)))
