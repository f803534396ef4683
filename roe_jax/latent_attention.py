"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 section 2.1) with absorbed products.

A token's keys and values are linear functions of one latent c, `[L]` with L = `kv_lora_rank`, and
of a rotary key shared by all heads, `[P]` with P = `rotary_dim`. With q and r the parts of a query
without and with rotation, and U_K and U_V the matrices of a head,

  score = q (U_K c) + r k = (U_K^T q) c + r k,    output = U_V (sum of weights times c).

So attention is multi-query attention with one key head of width L + P, in which the values are the
keys: `project` and `expand` map to it and back, and the cache holds L + P numbers for each token
and layer, without values. What the last P numbers add to the mixed values is dropped by `expand`:
that costs P/(L + P) of the mixing, and saves a copy of the keys without them.
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


def project(
  config: ModelConfig,
  weights: LatentAttentionParams,
  layer: jax.Array | int,
  x_BxTxD: jax.Array,
  rotate: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, jax.Array, None]:
  """Returns queries and keys of the equivalent multi-query attention.

  Args:
    config: the model's architecture.
    weights: attention parameters of all layers.
    layer: may be traced.
    x_BxTxD: normalized hidden states.
    rotate: applies the rotary embedding to the halves of the last axis.

  Returns:
    Queries `[B, T, H, L + P]`, keys `[B, T, 1, L + P]`, and None in place of values, which are the
    keys; in the dtype of `x_BxTxD`.
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
  # Heads lead: see `numerics.einsum`.
  absorbed = numerics.einsum("bthn,hnl->hbtl", plain, weights.key_up[layer])
  absorbed = rounded(absorbed, dtype).transpose(1, 2, 0, 3)
  query = jnp.concatenate([absorbed, turned(turning)], axis=-1)
  key = rounded(numerics.project(x_BxTxD, weights.key_down, layer), dtype)[:, :, None]
  latent, turning = jnp.split(key, [config.kv_lora_rank], axis=-1)
  latent = rms_norm(latent, weights.key_norm[layer], _EPSILON)
  return query, jnp.concatenate([latent, turned(turning)], axis=-1), None


def expand(
  weights: LatentAttentionParams, layer: jax.Array | int, heads_BxTxHxW: jax.Array
) -> jax.Array:
  """Returns each head's output, `[B, T, H, v_head_dim]`, from mixed keys `[B, T, H, L + P]`."""
  mixed = heads_BxTxHxW[..., : weights.value_up.shape[-1]]
  values = numerics.einsum("bthl,hvl->hbtv", mixed, weights.value_up[layer])
  return rounded(values, mixed.dtype).transpose(1, 2, 0, 3)
