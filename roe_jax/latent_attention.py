"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 section 2.1).

A token's keys and values are linear functions of one latent c, `[L]` with L = `kv_lora_rank`, and
of a rotary key shared by all heads, `[P]` with P = `rotary_dim`. The cache holds these L + P
numbers for each token and layer, without values. With q and r the parts of a query without and
with rotation, N and P wide, and U_K and U_V the matrices of a head,

  score = q (U_K c) + r k = (U_K^T q) c + r k,    output = U_V (sum of weights times c).

The two sides are two ways to compute the same:

* absorbed: `absorb` multiplies U_K into the queries. What remains is multi-query attention with
  one key head of width L + P, in which the values are the keys, and `of_mixed` applies U_V to its
  results. What the last P numbers add to the mixed values is dropped: that costs P/(L + P) of the
  mixing, and saves a copy of the keys without them.
* expanded: `expand` computes each head's keys and values, N + P and V wide with V = `v_head_dim`.
  A query then takes fewer multiplications per key, and each key more, once for all queries.

`is_expanded` chooses by counting.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from roe_jax import numerics
from roe_jax.config import ModelConfig
from roe_jax.numerics import rms_norm, rounded
from roe_jax.params import LatentAttentionParams

# Of the norms of the latents, whatever `rms_norm_eps` is, as in the released models' code.
_EPSILON = 1e-6


def is_expanded(config: ModelConfig, queries: int, cached: bool = True) -> bool:
  """Returns whether expanded keys and values take fewer FLOPs than absorbed products.

  Per head, in multiply-adds: a pair of a query and a key takes 2 (L + P) absorbed and N + P + V
  expanded. To expand a key takes L (N + V), as much as the absorbed products take for a query. The
  keys of the queries' own tokens are in place of those; so only cached keys count, and queries
  against them are expanded from

    queries (2 (L + P) - (N + P) - V) > L (N + V)

  on, whatever the number of keys: from 158 on in DeepSeek-V2 and V3.

  Args:
    config: the model's architecture.
    queries: how many queries use an expanded key: positions of a sequence times members.
    cached: whether the keys are cached ones.
  """
  saved = 2 * config.cached_head_dim - config.head_dim - config.v_head_dim
  return queries * saved > (expansion_size(config) if cached else 0)


def expansion_size(config: ModelConfig) -> int:
  """Returns the multiply-adds per head that expand the key and value of a position."""
  return config.kv_lora_rank * (config.head_dim - (config.rotary_dim or 0) + config.v_head_dim)


def project(
  config: ModelConfig,
  weights: LatentAttentionParams,
  layer: jax.Array | int,
  x_BxTxD: jax.Array,
  rotate: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array, None]:
  """Returns queries, and what the cache holds of keys and values.

  Args:
    config: the model's architecture.
    weights: attention parameters of all layers.
    layer: may be traced.
    x_BxTxD: normalized hidden states.
    rotate: applies the rotary embedding to the halves of the last axis.

  Returns:
    Queries `[B, T, H, N + P]`, latents and rotary keys `[B, T, 1, L + P]`, and None in place of
    values; in the dtype of `x_BxTxD`.
  """
  dtype = x_BxTxD.dtype

  def turned(a):
    if config.rotary_interleaved:  # neighbors are a pair; the order of pairs drops out of scores
      a = a.reshape(*a.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(a.shape)
    return rotate(a)

  of_query = x_BxTxD
  if weights.query_down is not None:
    of_query = rounded(numerics.project(x_BxTxD, weights.query_down, layer), dtype)
    of_query = rms_norm(of_query, weights.query_norm[layer], _EPSILON)
  query = rounded(numerics.project(of_query, weights.query, layer), dtype)
  plain, turning = jnp.split(query, [weights.key_up.shape[-2]], axis=-1)
  query = jnp.concatenate([plain, turned(turning)], axis=-1)
  key = rounded(numerics.project(x_BxTxD, weights.key_down, layer), dtype)[:, :, None]
  latent, turning = jnp.split(key, [config.kv_lora_rank], axis=-1)
  latent = rms_norm(latent, weights.key_norm[layer], _EPSILON)
  return query, jnp.concatenate([latent, turned(turning)], axis=-1), None


def absorb(
  weights: LatentAttentionParams, layer: jax.Array | int, query_BxTxHxC: jax.Array
) -> jax.Array:
  """Returns the queries of the equivalent multi-query attention, `[B, T, H, L + P]`."""
  plain, turned = jnp.split(query_BxTxHxC, [weights.key_up.shape[-2]], axis=-1)
  # Heads lead: see `numerics.einsum`.
  absorbed = numerics.einsum("bthn,hnl->hbtl", plain, weights.key_up[layer])
  absorbed = rounded(absorbed, query_BxTxHxC.dtype).transpose(1, 2, 0, 3)
  return jnp.concatenate([absorbed, turned], axis=-1)


def of_mixed(
  weights: LatentAttentionParams, layer: jax.Array | int, mixed_BxTxHxC: jax.Array
) -> jax.Array:
  """Returns each head's output, `[B, T, H, V]`, from mixed latents and keys `[B, T, H, L + P]`."""
  mixed = mixed_BxTxHxC[..., : weights.value_up.shape[-1]]
  values = numerics.einsum("bthl,hvl->hbtv", mixed, weights.value_up[layer])
  return rounded(values, mixed.dtype).transpose(1, 2, 0, 3)


def expand(
  weights: LatentAttentionParams,
  layer: jax.Array | int,
  cached_Bx1xSxC: jax.Array,
  dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
  """Returns keys `[B, H, S, N + P]` and values `[B, H, S, V]` of cached latents, in `dtype`."""
  cached = numerics.to_compute_dtype(cached_Bx1xSxC)[:, 0]
  latent, turned = jnp.split(cached, [weights.key_up.shape[-1]], axis=-1)
  plain, values = (
    rounded(numerics.einsum("bsl,hnl->bshn", latent, w[layer]), dtype).swapaxes(1, 2)
    for w in (weights.key_up, weights.value_up)
  )
  turned = jnp.broadcast_to(turned[:, None].astype(dtype), (*plain.shape[:-1], turned.shape[-1]))
  return jnp.concatenate([plain, turned], axis=-1), values
