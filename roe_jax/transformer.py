"""The MoE transformer as pure functions: embed, a stack of blocks, unembed."""

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from roe_jax import attention, experts, routing
from roe_jax.cache import KVCache, write_layer
from roe_jax.config import ModelConfig
from roe_jax.noise import RoutingNoise
from roe_jax.numerics import einsum, rms_norm
from roe_jax.params import LayerParams, Params


@struct.dataclass
class BlockOutputs:
  """What a block yields beside the hidden states; `[L, ...]` from `run_layers`.

  Attributes:
    keys, values: `[B, T, K, C]`, the rows' own, to be written to a cache.
    experts: `[B, T, A]` int32, the chosen experts.
    router_logits: `[B, T, E]` float32, without noise.
  """

  keys: Any = None
  values: Any = None
  experts: Any = None
  router_logits: Any = None


def embed(params: Params, tokens_BxT: jax.Array) -> jax.Array:
  """Hidden states `[B, T, D]` before the first block."""
  return params.embedding[tokens_BxT]


def unembed(params: Params, config: ModelConfig, x: jax.Array) -> jax.Array:
  """Logits `[..., V]` float32 from hidden states `[..., D]` after the last block."""
  x = rms_norm(x, params.final_norm, config.rms_norm_eps)
  return einsum("...d,dv->...v", x, params.unembedding)


def run_layers(
    params: Params,
    config: ModelConfig,
    x: jax.Array,
    positions_BxT: jax.Array,
    cache: KVCache | None = None,
    *,
    layers: tuple[int, int] | None = None,
    noise: RoutingNoise | None = None,
    gate_weights: str = routing.CLEAN,
    write: bool = False,
    keep: tuple[str, ...] = (),
    lift: Callable = lambda block: block,
    strategy: str | None = None,
) -> tuple[jax.Array, KVCache | None, BlockOutputs]:
  """Runs a stretch of blocks on hidden states.

  A row at position t attends to the slots below t of its source and to its own
  key and value. The source is

  * the cache as it stands, if `write` is off (decoding; the members of a
    roster; positions to be scored once the cache is filled);
  * the cache with this call's keys and values put in first, if `write` is on
    (prefill);
  * this call's keys and values alone, if there is no cache; `positions_BxT`
    then start at zero (training).

  Args:
    params: the model's parameters.
    config: its architecture.
    x: hidden states `[B, T, D]` (what `lift` says, if it is given).
    positions_BxT: int32, consecutive along T.
    cache: keys and values so far, or None.
    layers: `(first, end)` of the stretch; all by default.
    noise: on the routers, or None.
    gate_weights: see `routing.route`.
    write: whether to put this call's keys and values into the cache first.
    keep: names of the `BlockOutputs` to return.
    lift: transformation of each block's function `(x, noise) -> (x, slots,
      outputs)`, for example `vmap` over the members of a roster.
    strategy: see `experts.apply`.

  Returns:
    Hidden states after the stretch, the cache (written, if asked), and the
    asked-for outputs stacked over the stretch's layers.
  """
  first, end = layers or (0, config.num_layers)
  if first == end:
    return x, cache, BlockOutputs()
  cos, sin = attention.rotation(config, positions_BxT)
  small = params.layers.replace(experts=None)

  def step(carry, layer):
    x, written = carry
    weights = jax.tree.map(
        lambda w: jax.lax.dynamic_index_in_dim(w, layer, keepdims=False), small)
    slots = jax.tree.map(
        lambda c: jax.lax.dynamic_index_in_dim(c, layer, keepdims=False),
        written if write else cache)

    def block(x, noise):
      x, slots_after, outputs = _block(
          config, weights, params.layers.experts, layer, x, slots, positions_BxT,
          cos, sin, noise, gate_weights, write, strategy)
      return x, slots_after, outputs.replace(
          **{f: None for f in BlockOutputs.__dataclass_fields__ if f not in keep})

    x, slots, outputs = lift(block)(x, noise)
    if write:
      written = jax.tree.map(
          lambda c, s: jax.lax.dynamic_update_index_in_dim(c, s, layer, 0), written, slots)
    return (x, written), outputs

  # A cache that is only read stays out of the carry.
  (x, written), outputs = jax.lax.scan(
      step, (x, cache if write else None), jnp.arange(first, end))
  return x, written if write else cache, outputs


def _block(config, weights: LayerParams, all_experts, layer, x, slots, positions_BxT,
           cos, sin, noise, gate_weights, write, strategy):
  """Pre-norm attention and MoE; returns hidden states, cache slots and outputs."""
  normed = rms_norm(x, weights.attention_norm, config.rms_norm_eps)
  query, key, value = attention.project(config, weights.attention, normed, cos, sin)
  if slots is None:
    source = KVCache(key.swapaxes(1, 2), value.swapaxes(1, 2))
  elif write:
    starts_B = positions_BxT[:, 0]
    source = slots = KVCache(write_layer(slots.keys, key, starts_B),
                             write_layer(slots.values, value, starts_B))
  else:
    source = slots
  heads = attention.attend(query, key, value, source.keys, source.values, positions_BxT)
  x = x + attention.output(weights.attention, heads)

  normed = rms_norm(x, weights.moe_norm, config.rms_norm_eps)
  # Rounded to the model's dtype, as the model was trained with.
  logits = einsum("btd,de->bte", normed, weights.router).astype(x.dtype).astype(jnp.float32)
  drawn = None if noise is None else noise.draw(layer, config.num_experts)
  chosen, gates = routing.route(config, logits, drawn, gate_weights)
  b, t, d = x.shape
  y = experts.apply(all_experts, layer, normed.reshape(b * t, d),
                    chosen.reshape(b * t, -1), gates.reshape(b * t, -1), strategy)
  outputs = BlockOutputs(keys=key, values=value, experts=chosen, router_logits=logits)
  return x + y.reshape(b, t, d), slots if write else None, outputs


def forward(params: Params, config: ModelConfig, tokens_BxT: jax.Array,
            **options) -> tuple[jax.Array, BlockOutputs]:
  """Logits of the plain model for whole texts, without a cache.

  Args:
    params: the model's parameters.
    config: its architecture.
    tokens_BxT: int32 tokens from position 0 on; what follows a text's end does
      not influence it, so that padding goes to the right.
    **options: passed to `run_layers`.

  Returns:
    Logits `[B, T, V]` float32, and the outputs asked for with `keep`.
  """
  positions = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1]), tokens_BxT.shape)
  x, _, outputs = run_layers(params, config, embed(params, tokens_BxT), positions, **options)
  return unembed(params, config, x), outputs
