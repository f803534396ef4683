"""The MoE transformer as pure functions: embed, a stack of blocks, unembed."""

from collections.abc import Callable
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from roe_jax import attention, collectives, experts, routing, sharding
from roe_jax import cache as kv_cache
from roe_jax.cache import KVCache
from roe_jax.config import ModelConfig
from roe_jax.experts import Activation
from roe_jax.noise import RoutingNoise
from roe_jax.numerics import add, add_bias, project, rms_norm, rounded, to_compute_dtype
from roe_jax.params import LayerParams, Params


class BlockOutputs(struct.PyTreeNode):
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
  mesh = sharding.mesh_of(params.embedding)
  if mesh is None:
    return to_compute_dtype(params.embedding[tokens_BxT])
  table = sharding.spec(mesh, ("vocab", "embed"), params.embedding.shape)
  rows = sharding.spec(mesh, ("batch_of_vocab", "positions"), tokens_BxT.shape)
  take = functools.partial(collectives.take_rows, axes=sharding.axes_of(table, 0))
  return to_compute_dtype(
    sharding.map_shards(take, mesh, (table, rows), rows)(params.embedding, tokens_BxT)
  )


def unembed(params: Params, config: ModelConfig, x: jax.Array) -> jax.Array:
  """Logits `[..., V]` float32 from hidden states `[..., D]` after the last block."""

  def run(final_norm, unembedding, x):
    return project(norm(config, x, final_norm), unembedding[None], 0)

  mesh = sharding.mesh_of(params.unembedding)
  if mesh is not None:
    lead = ("members_of_vocab", "batch_of_vocab", "positions")[-x.ndim + 1 :]
    shape = (*x.shape[:-1], config.vocab_size)
    run = sharding.map_shards(
      run,
      mesh,
      (
        PartitionSpec(),
        sharding.spec(mesh, ("vocab", "embed"), params.unembedding.shape),
        sharding.spec(mesh, (*lead, "embed"), x.shape),
      ),
      sharding.spec(mesh, (*lead, "vocab"), shape),
    )
  return run(params.final_norm, params.unembedding, x)


def norm(config: ModelConfig, x: jax.Array, weight: jax.Array) -> jax.Array:
  """The RMSNorm of the residual stream, `[..., D]`."""
  return rms_norm(x, weight, config.rms_norm_eps, config.norm_weight_in_float32)


def router_logits(
  config: ModelConfig, layers: LayerParams, layer: jax.Array | int, normed: jax.Array
) -> jax.Array:
  """`[..., E]` float32, rounded to the model's dtype as it was trained with."""
  logits = add_bias(project(normed, layers.router, layer), layers.router_bias, layer)
  return rounded(logits, jnp.dtype(config.dtype)).astype(jnp.float32)


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
  cache_offset: int = 0,
  keep: tuple[str, ...] = (),
  lift: Callable = lambda block: block,
  strategy: str | None = None,
  lengths_B: jax.Array | None = None,
  tokens_sharded: bool = False,
) -> tuple[jax.Array, KVCache | None, BlockOutputs]:
  """Runs a stretch of blocks on hidden states.

  A row at position t attends to the slots below t of its source, in sliding
  layers to the last of them, and to its own key and value. The source is

  * the cache as it stands, if `write` is off (decoding; the members of a
    roster; positions to be scored once the cache is filled);
  * the cache with this call's keys and values put in first, if `write` is on
    (prefill);
  * this call's keys and values alone, if there is no cache (training).

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
    cache_offset: the layer that the cache begins with.
    keep: names of the `BlockOutputs` to return.
    lift: transformation of each block's function `(x, noise) -> (x, slots,
      outputs)`, for example `vmap` over the members of a roster.
    strategy: see `experts.apply`.
    lengths_B: int32; what lies at or beyond a row's length is not put into the
      window of sliding layers. All is by default.
    tokens_sharded: see `experts.expert_parallel`; set where a mesh's devices run their parts.

  Returns:
    Hidden states after the stretch, the cache (written, if asked), and the
    asked-for outputs stacked over the stretch's layers.
  """
  first, end = layers or (0, config.num_layers)
  if first == end:
    return x, cache, BlockOutputs()
  mesh = sharding.mesh_of(params.layers)
  if mesh is not None:
    return _run_layers_sharded(
      mesh,
      params,
      config,
      x,
      positions_BxT,
      cache,
      noise,
      lengths_B,
      write,
      keep,
      layers=layers,
      gate_weights=gate_weights,
      cache_offset=cache_offset,
      lift=lift,
      strategy=strategy,
    )
  cos, sin = attention.rotation(config, positions_BxT)

  def step(carry, layer):
    x, written = carry
    place = kv_cache.layer_location(config, layer, (first, end), cache_offset)

    def block(x, noise):
      x, after, outputs = _block(
        config,
        params.layers,
        layer,
        x,
        written if write else cache,
        place,
        positions_BxT,
        cos,
        sin,
        noise,
        gate_weights,
        write,
        strategy,
        lengths_B,
        tokens_sharded,
      )
      return (
        x,
        after,
        outputs.replace(**{f: None for f in BlockOutputs.__dataclass_fields__ if f not in keep}),
      )

    x, after, outputs = lift(block)(x, noise)
    return (x, after), outputs

  # A cache that is only read stays out of the carry.
  (x, written), outputs = jax.lax.scan(step, (x, cache if write else None), jnp.arange(first, end))
  return x, written if write else cache, outputs


def _run_layers_sharded(
  mesh, params, config, x, positions_BxT, cache, noise, lengths_B, write, keep, **options
):
  """`run_layers` on a mesh, by each device on its parts."""
  hidden = sharding.spec(mesh, ("members", "batch", "positions", "embed")[-x.ndim :], x.shape)
  *of_members, of_batch, _, _ = hidden
  split_members = sharding.axes_of(of_members)
  of_rows, of_slots = PartitionSpec(of_batch), sharding.state_specs(mesh, cache)
  of_heads = sharding.spec(mesh, ("kv_heads",), (config.num_kv_heads,))
  own = PartitionSpec(None, of_batch, None, *of_heads)
  chosen = PartitionSpec(None, *hidden[:-1])
  of_outputs = {"keys": own, "values": own, "experts": chosen, "router_logits": chosen}

  def part(layers, x, positions_BxT, cache, noise, lengths_B):
    layers = layers.replace(experts=experts.expert_parallel.bias_on_one_device(layers.experts))
    x, written, outputs = run_layers(
      Params(None, layers, None, None),
      config,
      x,
      positions_BxT,
      cache,
      noise=noise,
      write=write,
      keep=keep,
      lengths_B=lengths_B,
      tokens_sharded=sharding.EXPERT in sharding.axes_of(hidden),
      **options,
    )
    # Keys and values are wanted of the first member, which the first device has.
    keys, values = jax.tree.map(
      lambda a: collectives.broadcast_from_first(a, *split_members), (outputs.keys, outputs.values)
    )
    return x, written if write else None, outputs.replace(keys=keys, values=values)

  x, written, outputs = sharding.map_shards(
    part,
    mesh,
    (
      sharding.parameter_specs(mesh, config).layers,
      hidden,
      of_rows,
      of_slots,
      None
      if noise is None
      else noise.replace(
        keys=of_rows, temperatures=PartitionSpec(), member=PartitionSpec(*of_members)
      ),
      None if lengths_B is None else of_rows,
    ),
    (
      hidden,
      of_slots if write else None,
      BlockOutputs(**{name: of_outputs[name] for name in keep}),
    ),
  )(params.layers, x, positions_BxT, cache, noise, lengths_B)
  return x, written if write else cache, outputs


def _block(
  config,
  layers: LayerParams,
  layer,
  x,
  cache,
  place,
  positions_BxT,
  cos,
  sin,
  noise,
  gate_weights,
  write,
  strategy,
  lengths_B,
  tokens_sharded,
):
  """Pre-norm attention and MoE; returns hidden states, written cache and outputs."""
  normed = norm(config, x, layers.attention_norm[layer])
  query, key, value = attention.project(config, layers.attention, layer, normed, cos, sin)
  heads, cache = attention.attend_in_layer(
    config,
    layers.attention,
    layer,
    query,
    key,
    value,
    positions_BxT,
    cache,
    place,
    write,
    lengths_B,
  )
  x = add(x, attention.output(layers.attention, layer, heads))

  normed = norm(config, x, layers.moe_norm[layer])
  logits = router_logits(config, layers, layer, normed)
  perturbed = None if noise is None else noise.perturb(layer, logits, config.experts_per_token)
  chosen, gates = routing.route(config, logits, perturbed, gate_weights)
  b, t, d = x.shape
  y = experts.apply(
    layers.experts,
    layer,
    normed.reshape(b * t, d),
    chosen.reshape(b * t, -1),
    gates.reshape(b * t, -1),
    strategy,
    Activation(config.swiglu_limit, config.swiglu_alpha),
    tokens_sharded,
  ).reshape(b, t, d)
  if layers.shared_expert is not None:
    y = add(y, experts.shared(layers.shared_expert, layer, normed))
  outputs = BlockOutputs(keys=key, values=value, experts=chosen, router_logits=logits)
  return add(x, y), cache if write else None, outputs


def forward(
  params: Params, config: ModelConfig, tokens_BxT: jax.Array, **options
) -> tuple[jax.Array, BlockOutputs]:
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
