"""Rotary embeddings and attention to a cache beside a row's own key and value."""

import jax
import jax.numpy as jnp

from roe_jax.config import ModelConfig
from roe_jax.numerics import einsum, rms_norm
from roe_jax.params import AttentionParams


def rotation(config: ModelConfig, positions_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of the rotary embedding, `[B, T, 1, C/2]` in `config.dtype`."""
  exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
  frequencies = 1.0 / (config.rope_theta ** exponents)
  angles = positions_BxT[..., None, None].astype(jnp.float32) * frequencies[None, None, None]
  return jnp.cos(angles).astype(config.dtype), jnp.sin(angles).astype(config.dtype)


def rotate(x_BxTxHxC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the two halves of each head against each other."""
  first, second = jnp.split(x_BxTxHxC, 2, axis=-1)
  return jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1)


def project(config: ModelConfig, weights: AttentionParams, x_BxTxD: jax.Array,
            cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Rotated queries `[B, T, H, C]`, rotated keys and values `[B, T, K, C]`."""
  query, key, value = (
      einsum("btd,dhc->bthc", x_BxTxD, w).astype(x_BxTxD.dtype)
      for w in (weights.query, weights.key, weights.value))
  if config.qk_norm:
    query = rms_norm(query, weights.query_norm, config.rms_norm_eps)
    key = rms_norm(key, weights.key_norm, config.rms_norm_eps)
  if config.clip_qkv is not None:
    query, key, value = (
        jnp.clip(a, -config.clip_qkv, config.clip_qkv) for a in (query, key, value))
  return rotate(query, cos, sin), rotate(key, cos, sin), value


def attend(query_BxTxHxC: jax.Array, own_key_BxTxKxC: jax.Array,
           own_value_BxTxKxC: jax.Array, keys_BxKxSxC: jax.Array,
           values_BxKxSxC: jax.Array, positions_BxT: jax.Array) -> jax.Array:
  """Attention of each row to slots below its position, and to itself.

  A row at position t sees the cached slots s < t and its own key and value:
  two parts of one softmax, so that a cache shared by all members of a roster
  is contracted with all their queries at once and never copied to them.

  Returns:
    `[B, T, H, C]`, dtype of `query`.
  """
  dtype = query_BxTxHxC.dtype
  b, t, h, c = query_BxTxHxC.shape
  k = own_key_BxTxKxC.shape[2]
  query = query_BxTxHxC.reshape(b, t, k, h // k, c)
  scale = c ** -0.5
  slots = jnp.arange(keys_BxKxSxC.shape[2])
  visible = (slots[None, None] < positions_BxT[..., None])[:, None, None]  # [B, 1, 1, T, S]
  scores = einsum("btkgc,bksc->bkgts", query, keys_BxKxSxC) * scale
  scores = jnp.where(visible, scores, -jnp.inf)
  own = einsum("btkgc,btkc->bkgt", query, own_key_BxTxKxC)[..., None] * scale
  # `own` is finite, so a row that sees no slot at all is no special case.
  peak = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), own))
  weights, own_weight = jnp.exp(scores - peak), jnp.exp(own - peak)
  total = weights.sum(-1, keepdims=True) + own_weight
  weights, own_weight = (weights / total).astype(dtype), (own_weight / total).astype(dtype)
  cached = einsum("bkgts,bksc->bkgtc", weights, values_BxKxSxC).transpose(0, 3, 1, 2, 4)
  own_part = einsum("bkgt,btkc->btkgc", own_weight[..., 0], own_value_BxTxKxC)
  return (cached + own_part).astype(dtype).reshape(b, t, h, c)


def output(weights: AttentionParams, heads_BxTxHxC: jax.Array) -> jax.Array:
  """The attention block's contribution to the residual stream, `[B, T, D]`."""
  return einsum("bthc,hcd->btd", heads_BxTxHxC, weights.output).astype(heads_BxTxHxC.dtype)
