"""The transformer as pure functions: embed, a stack of blocks, unembed."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from roe_jax import attention, collectives, experts, routing, sharding
from roe_jax import cache as kv_cache
from roe_jax.cache import KVCache
from roe_jax.config import ModelConfig
from roe_jax.experts import Activation
from roe_jax.noise import RoutingNoise
from roe_jax.numerics import add, multiply, project, rms_norm, to_compute_dtype
from roe_jax.params import LayerParams, Params
from roe_jax.routers import ROUTERS


class BlockOutputs(struct.PyTreeNode):
  """Optional outputs of a block; stacked to `[L, ...]` by `run_layers`.

  Attributes:
    keys, values: `[B, T, K, C]` of the tokens, to be written to a cache.
    experts: `[B, T, A]` int32, the chosen experts.
    router_logits: `[B, T, E]` float32, without noise.
  """

  keys: Any = None
  values: Any = None
  experts: Any = None
  router_logits: Any = None


@jax.named_scope("embed")
def embed(params: Params, config: ModelConfig, tokens_BxT: jax.Array) -> jax.Array:
  """Embeds tokens: hidden states `[B, T, D]` before the first block."""
  return scale(_embed(params, tokens_BxT), config.embedding_multiplier)


def scale(x: jax.Array, factor: float) -> jax.Array:
  """Returns `factor * x` in the dtype of `x`."""
  return x if factor == 1 else multiply(x, jnp.float32(factor))


def _embed(params, tokens_BxT):
  mesh = sharding.mesh_of(params.embedding)
  if mesh is None:
    return to_compute_dtype(params.embedding[tokens_BxT])
  table = sharding.spec(mesh, ("vocab", "embed"), params.embedding.shape)
  tokens = sharding.spec(mesh, ("batch_of_vocab", "positions"), tokens_BxT.shape)
  take = functools.partial(collectives.take_rows, axes=sharding.axes_of(table, 0))
  take = sharding.map_shards(take, mesh, (table, tokens), tokens)
  return to_compute_dtype(take(params.embedding, tokens_BxT))


@jax.named_scope("unembed")
def unembed(params: Params, config: ModelConfig, x: jax.Array) -> jax.Array:
  """Computes float32 logits `[..., V]` from hidden states `[..., D]` after the last block."""

  def run(final_norm, unembedding, x):
    logits = project(norm(config, x, final_norm), unembedding[None], 0)
    return logits if config.logits_scaling == 1 else logits / config.logits_scaling

  mesh = sharding.mesh_of(params.unembedding)
  if mesh is not None:
    lead = ("members_of_vocab", "batch_of_vocab", "positions")[-x.ndim + 1 :]
    table = sharding.spec(mesh, ("vocab", "embed"), params.unembedding.shape)
    hidden = sharding.spec(mesh, (*lead, "embed"), x.shape)
    logits = sharding.spec(mesh, (*lead, "vocab"), (*x.shape[:-1], config.vocab_size))
    run = sharding.map_shards(run, mesh, (PartitionSpec(), table, hidden), logits)
  return run(params.final_norm, params.unembedding, x)


def norm(config: ModelConfig, x: jax.Array, weight: jax.Array) -> jax.Array:
  """Applies the RMSNorm of the residual stream, `[..., D]`."""
  return rms_norm(x, weight, config.rms_norm_eps, config.norm_weight_in_float32)


def add_to_residual(config: ModelConfig, x: jax.Array, y: jax.Array) -> jax.Array:
  """Adds what attention or the MoE block computes to the residual stream."""
  return add(x, scale(y, config.residual_multiplier))


@jax.named_scope("router")
def router_logits(
  config: ModelConfig, layers: LayerParams, layer: jax.Array | int, normed: jax.Array
) -> jax.Array:
  """Computes router logits, float32 `[..., E]`; see `routers.Router.logits`."""
  return ROUTERS[config.router].logits(layers.router, layers.router_bias, layer, normed)


def route(
  config: ModelConfig,
  layers: LayerParams,
  layer: jax.Array | int,
  logits: jax.Array,
  perturbed: jax.Array | None,
  gate_weights: str,
) -> tuple[jax.Array, jax.Array]:
  """Chooses the experts of a layer and computes their gates; see `routing.route`."""
  scales = None if layers.gate_scales is None else layers.gate_scales[layer]
  return routing.route(config, logits, perturbed, gate_weights, scales)


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
  """Runs a range of blocks on hidden states.

  The token at position t attends to positions < t (the last `sliding_window` of them in
  sliding layers, including t) and to its own key and value. The earlier positions are in

  * the cache as given, if `write` is off (decoding; a roster's members; scoring against a
    filled cache);
  * the cache after writing this call's keys and values, if `write` is on (prefill);
  * this call's keys and values, without a cache (training).

  Args:
    params: the model's parameters.
    config: its architecture.
    x: hidden states `[B, T, D]`, or with more leading axes if `lift` maps over them.
    positions_BxT: int32, consecutive along T.
    cache: keys and values so far, or None.
    layers: `(first, end)` of the range; all layers by default.
    noise: the routing noise, or None.
    gate_weights: see `routing.route`.
    write: whether to write this call's keys and values to the cache first.
    cache_offset: the first layer in the cache.
    keep: names of the `BlockOutputs` to return.
    lift: transforms each block's function `(x, noise) -> (x, cache, outputs)`, for example
      with `vmap` over the members of a roster.
    strategy: see `experts.apply`.
    lengths_B: int32; positions at or beyond a sequence's length are not written to the
      cache of sliding layers. By default all are.
    tokens_sharded: see `experts.apply`; set inside a `shard_map`.

  Returns:
    The hidden states, the cache (written if `write`), and the outputs in `keep`, stacked
    over the range of layers.
  """
  first, end = layers or (0, config.num_layers)
  if first == end:
    return x, cache, BlockOutputs()
  mesh = sharding.mesh_of(params.layers)
  if mesh is not None:
    options = dict(layers=layers, gate_weights=gate_weights, cache_offset=cache_offset)
    options |= dict(write=write, keep=keep, lift=lift, strategy=strategy)
    return _run_layers_sharded(
      mesh, params, config, x, positions_BxT, cache, noise, lengths_B, options
    )
  block_of = _Block(
    config,
    params.layers,
    positions_BxT,
    attention.rotation(config, positions_BxT),
    gate_weights,
    write,
    strategy,
    lengths_B,
    tokens_sharded,
  )
  dropped = dict.fromkeys({f.name for f in dataclasses.fields(BlockOutputs)} - set(keep))

  def step(carry, layer):
    x, written = carry
    location = kv_cache.layer_location(config, layer, (first, end), cache_offset)

    def block(x, noise):
      x, after, outputs = block_of(layer, location, x, written if write else cache, noise)
      return x, after, outputs.replace(**dropped)

    x, after, outputs = lift(block)(x, noise)
    return (x, after), outputs

  # A read-only cache stays out of the carry.
  (x, written), outputs = jax.lax.scan(step, (x, cache if write else None), jnp.arange(first, end))
  return x, written if write else cache, outputs


def _run_layers_sharded(mesh, params, config, x, positions_BxT, cache, noise, lengths_B, options):
  """Runs `run_layers` on a mesh: each device on its shards."""
  hidden = sharding.spec(mesh, ("members", "batch", "positions", "embed")[-x.ndim :], x.shape)
  *members, batch, _, _ = hidden
  member_axes = sharding.axes_of(members)
  sequences, caches = PartitionSpec(batch), sharding.state_specs(mesh, cache)
  heads = sharding.spec(mesh, ("kv_heads",), (config.num_kv_heads,))
  own = PartitionSpec(None, batch, None, *heads)
  chosen = PartitionSpec(None, *hidden[:-1])
  outputs = {"keys": own, "values": own, "experts": chosen, "router_logits": chosen}
  outputs = BlockOutputs(**{name: outputs[name] for name in options["keep"]})
  tokens_sharded = sharding.EXPERT in sharding.axes_of(hidden)

  def part(layers, x, positions_BxT, cache, noise, lengths_B):
    layers = layers.replace(experts=experts.expert_parallel.bias_on_one_device(layers.experts))
    x, written, outputs = run_layers(
      Params(None, layers, None, None),
      config,
      x,
      positions_BxT,
      cache,
      noise=noise,
      lengths_B=lengths_B,
      tokens_sharded=tokens_sharded,
      **options,
    )
    # Keys and values are those of the first member, which the first device runs.
    keys, values = jax.tree.map(
      lambda a: collectives.broadcast_from_first(a, *member_axes), (outputs.keys, outputs.values)
    )
    return x, written if options["write"] else None, outputs.replace(keys=keys, values=values)

  noises = noise and noise.replace(
    keys=sequences, temperatures=PartitionSpec(), member=PartitionSpec(*members)
  )
  layers = sharding.parameter_specs(mesh, config).layers
  lengths = None if lengths_B is None else sequences
  x, written, found = sharding.map_shards(
    part,
    mesh,
    (layers, hidden, sequences, caches, noises, lengths),
    (hidden, caches if options["write"] else None, outputs),
  )(params.layers, x, positions_BxT, cache, noise, lengths_B)
  return x, written if options["write"] else cache, found


@dataclasses.dataclass(frozen=True)
class _Block:
  """Pre-norm attention and MoE of any layer; see `run_layers` for the attributes."""

  config: ModelConfig
  layers: LayerParams
  positions_BxT: jax.Array
  rotation: tuple[jax.Array, jax.Array]
  gate_weights: str
  write: bool
  strategy: str | None
  lengths_B: jax.Array | None
  tokens_sharded: bool

  def __call__(self, layer, location, x, cache, noise):
    """Returns the hidden states, the cache if written, and all outputs."""
    config, layers = self.config, self.layers
    normed = norm(config, x, layers.attention_norm[layer])
    new = attention.project(config, layers.attention, layer, normed, *self.rotation)
    heads, cache = attention.attend_in_layer(
      config,
      layers.attention,
      layer,
      *new,
      self.positions_BxT,
      cache,
      location,
      self.write,
      self.lengths_B,
    )
    x = add_to_residual(config, x, attention.output(layers.attention, layer, heads))
    x, chosen, logits = feed_forward(
      config, layers, layer, x, noise, self.gate_weights, self.strategy, self.tokens_sharded
    )
    _, key, value = new
    outputs = BlockOutputs(keys=key, values=value, experts=chosen, router_logits=logits)
    return x, cache if self.write else None, outputs


def feed_forward(
  config: ModelConfig,
  layers: LayerParams,
  layer: jax.Array | int,
  x: jax.Array,
  noise: RoutingNoise | None = None,
  gate_weights: str = routing.CLEAN,
  strategy: str | None = None,
  tokens_sharded: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Runs the MoE half of a block on hidden states `[B, T, D]`; see `run_layers` for the arguments.

  Returns:
    The hidden states, the chosen experts `[B, T, A]`, and the router logits `[B, T, E]`.
  """
  normed = norm(config, x, layers.moe_norm[layer])
  logits = router_logits(config, layers, layer, normed)
  perturbed = None if noise is None else noise.perturb(layer, logits, config.experts_per_token)
  chosen, gates = route(config, layers, layer, logits, perturbed, gate_weights)
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
  return add_to_residual(config, x, y), chosen, logits


def forward(
  params: Params, config: ModelConfig, tokens_BxT: jax.Array, **options
) -> tuple[jax.Array, BlockOutputs]:
  """Computes the baseline's logits for whole sequences, without a cache.

  Args:
    params: the model's parameters.
    config: its architecture.
    tokens_BxT: int32 tokens from position 0 on, padded on the right; an array or lists of
      one length.
    **options: passed to `run_layers`.

  Returns:
    Logits `[B, T, V]` float32, and the outputs in `keep`.

  Raises:
    ValueError: the tokens are not integers `[B, T]`.
  """
  if not isinstance(tokens_BxT, jax.Array):
    try:
      tokens_BxT = jnp.asarray(np.asarray(tokens_BxT))
    except (TypeError, ValueError):  # text, or lists of different lengths
      tokens_BxT = jnp.zeros(())
  if tokens_BxT.ndim != 2 or not jnp.issubdtype(tokens_BxT.dtype, jnp.integer):
    raise ValueError(
      "forward takes integer token ids [B, T], sequences of one length: pad them on the right, "
      "and pass jnp.array([tokens]) for one sequence"
    )
  positions = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1]), tokens_BxT.shape)
  x, _, outputs = run_layers(
    params, config, embed(params, config, tokens_BxT), positions, **options
  )
  return unembed(params, config, x), outputs
