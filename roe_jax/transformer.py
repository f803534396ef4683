"""The transformer as pure functions: embed, a stack of blocks, unembed."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from roe_jax import attention, bit_routing, collectives, experts, routing, sharding
from roe_jax import cache as kv_cache
from roe_jax.cache import KVCache
from roe_jax.config import ModelConfig
from roe_jax.experts import Activation
from roe_jax.layer_inputs import CacheAccess, LayerOptions, RouterInputs, TokenBatch
from roe_jax.noise import RoutingNoise
from roe_jax.numerics import add, add_bias, multiply, project, rms_norm, to_compute_dtype
from roe_jax.params import LayerParams, Params, RouterCell
from roe_jax.routers import ROUTERS, advance


class BlockOutputs(struct.PyTreeNode):
  """Optional outputs of a block; stacked to `[L, ...]` by `run_layers`.

  Attributes:
    keys, values: `[B, T, K, C]` of the tokens, to be written to a cache; values are None if they
      are the keys.
    experts: `[B, T, A]` int32, the chosen experts, E where one is left out; only of layers with
      experts.
    router_logits: `[B, T, E]` float32, without noise; only of layers with experts.
    bits: `[B, T, A]` float32, at how many bits a bit router reads the chosen experts.
  """

  keys: Any = None
  values: Any = None
  experts: Any = None
  router_logits: Any = None
  bits: Any = None

  @classmethod
  def join(cls, parts: Sequence["BlockOutputs"], axis: int) -> "BlockOutputs":
    """Concatenates the outputs of consecutive ranges of layers, of those that have them."""

    def joined(name):
      found = [a for part in parts if (a := getattr(part, name)) is not None]
      return jnp.concatenate(found, axis) if found else None

    return cls(**{field.name: joined(field.name) for field in dataclasses.fields(cls)})


_OF_ATTENTION = ("keys", "values")


@jax.named_scope("embed")
def embed(params: Params, config: ModelConfig, tokens_BxT: jax.Array) -> jax.Array:
  """Embeds tokens: hidden states `[B, T, D]` before the first block.

  Where a router is recurrent, its state follows each hidden state, which is then `[B, T, D + q]`
  until `unembed`: so it goes wherever a hidden state goes.
  """
  x = scale(_embed(params, tokens_BxT), config.embedding_multiplier)
  if not config.router_state:
    return x
  return _with_state(x, jnp.zeros((*x.shape[:-1], config.router_state), x.dtype))


def _with_state(x, state):
  """Appends the state of a recurrent router to hidden states."""
  return x if state is None else jnp.concatenate([x, state], axis=-1)


def _split_state(config, x):
  """Returns hidden states `[..., D]` and the state of a recurrent router, or None."""
  return (x[..., : config.d_model], x[..., config.d_model :]) if config.router_state else (x, None)


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

  x, _ = _split_state(config, x)

  def run(final_norm, unembedding, x):
    weights = jax.tree.map(lambda w: w[None], unembedding)
    logits = project(norm(config, x, final_norm), weights, 0)
    return logits if config.logits_scaling == 1 else logits / config.logits_scaling

  mesh = sharding.mesh_of(params.unembedding)
  if mesh is not None:
    lead = ("members_of_vocab", "batch_of_vocab", "positions")[-x.ndim + 1 :]
    table = sharding.parameter_specs(mesh, config).unembedding
    hidden = sharding.spec(mesh, (*lead, "embed"), x.shape)
    logits = sharding.spec(mesh, (*lead, "vocab"), (*x.shape[:-1], config.vocab_size))
    run = sharding.map_shards(run, mesh, (PartitionSpec(), table, hidden), logits)
  return run(params.final_norm, params.unembedding, x)


def norm(config: ModelConfig, x: jax.Array, weight: jax.Array) -> jax.Array:
  """Applies the RMSNorm of the residual stream, `[..., D]`."""
  return rms_norm(x, weight, config.rms_norm_eps, config.norm_weight_in_float32)


def add_to_residual(
  config: ModelConfig,
  x: jax.Array,
  y: jax.Array,
  weights: jax.Array | None = None,
  layer: jax.Array | int = 0,
) -> jax.Array:
  """Adds what attention or the MoE block computes to the residual stream.

  Args:
    config: the model's architecture.
    x: hidden states.
    y: what is added.
    weights: `[L, D]`, of an RMSNorm of y; None without one.
    layer: index in `weights`.
  """
  if weights is not None:
    y = norm(config, y, weights[layer])
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
  count: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Chooses the experts of a layer and computes their gates; see `routing.route`."""
  scales = None if layers.gate_scales is None else layers.gate_scales[layer]
  bias = correction_bias(layers, layer)
  return routing.route(config, logits, perturbed, gate_weights, scales, bias, count)


def correction_bias(layers: LayerParams, layer: jax.Array | int) -> jax.Array | None:
  """Returns the correction bias of a layer's router, `[E]` float32, or None without one."""
  return None if layers.correction_bias is None else layers.correction_bias[layer]


def run_layers(
  params: Params,
  config: ModelConfig,
  x: jax.Array,
  tokens: TokenBatch,
  access: CacheAccess = CacheAccess(),
  options: LayerOptions = LayerOptions(),
) -> tuple[jax.Array, KVCache | None, BlockOutputs]:
  """Runs a range of blocks on hidden states, on one device; see `layer_runner` for meshes.

  The token at position t attends to positions < t (the last `sliding_window` of them in
  sliding layers, including t) and to its own key and value. The earlier positions are in

  * the cache as given, without `access.write` (decoding; a roster's members; scoring against
    a filled cache);
  * the cache after writing this call's keys and values, with it (prefill);
  * this call's keys and values, without a cache (training).

  Args:
    params: the model's parameters.
    config: its architecture.
    x: hidden states `[B, T, D]`; `[R, B, T, D]` of roster members that share a cache, which is
      not written, with `tokens.noise.member` `[R]`.
    tokens: their positions and noise.
    access: the cache.
    options: the layers, and settings.

  Returns:
    The hidden states, the cache (written if `access.write`), and the outputs in
    `options.keep`, stacked over the range of layers: `keys` and `values` of the first member,
    `experts` and `router_logits` of all.
  """
  layers = range(*(options.layers or (0, config.num_layers)))
  cache, found, first = access.cache, [], 0
  for stack, own in zip((params.dense_layers, params.layers), config.split(layers)):
    if own:
      rotation = attention.rotation(config, tokens.positions_BxT)
      members = len(x) if x.ndim == 4 else 1
      block = _Block(config, stack, first, params.router_cell, tokens, rotation, members)
      x, cache, outputs = _run_stack(block, own, x, access.replace(cache=cache), options)
      found.append(outputs)
    first = config.first_dense_layers
  return x, cache, found[0] if len(found) == 1 else BlockOutputs.join(found, axis=0)


def _run_stack(block, layers, x, access, options):
  """Runs a range of layers of one stack; see `run_layers`."""
  first, end = layers.start, layers.stop
  noise, of_members = block.tokens.noise, x.ndim == 4
  member_axes = noise and noise.replace(keys=None, temperatures=None, member=0)

  def step(carry, layer):
    x, cache = carry
    location = kv_cache.layer_location(block.config, layer, (first, end), access.offset)
    used = access.replace(cache=cache) if access.write else access
    run = functools.partial(block, layer, location, used, options)
    if of_members:
      run = jax.vmap(run, in_axes=(0, member_axes))
    x, cache, outputs = run(x, noise)
    if of_members:
      keys, values = jax.tree.map(lambda a: a[0], (outputs.keys, outputs.values))
      outputs = outputs.replace(keys=keys, values=values)
    return (x, cache), outputs

  if options.rematerialize:
    step = jax.checkpoint(step)
  # A read-only cache stays out of the carry.
  carry = x, access.cache if access.write else None
  (x, written), outputs = jax.lax.scan(step, carry, jnp.arange(first, end))
  return x, written if access.write else access.cache, outputs


def layer_runner(params: Params) -> Callable:
  """Returns `run_layers`; for parameters on a mesh, a function that runs it on all shards."""
  mesh = sharding.mesh_of(params.layers)
  return run_layers if mesh is None else functools.partial(_run_layers_on_mesh, mesh)


def _run_layers_on_mesh(
  mesh, params, config, x, tokens, access=CacheAccess(), options=LayerOptions()
):
  """Runs `run_layers` on a mesh: each device on its shards."""
  layers = range(*(options.layers or (0, config.num_layers)))
  if not layers:
    return x, access.cache, BlockOutputs()
  hidden = sharding.spec(mesh, ("members", "batch", "positions", "embed")[-x.ndim :], x.shape)
  *members, batch, _, _ = hidden
  member_axes = sharding.axes_of(members)
  sequences, caches = PartitionSpec(batch), sharding.state_specs(mesh, access)
  heads = sharding.spec(mesh, (sharding.cached_heads(config.num_kv_heads),), (config.num_kv_heads,))
  own = PartitionSpec(None, batch, None, *heads)
  chosen = PartitionSpec(None, *hidden[:-1])
  outputs = {"keys": own, "values": own, "experts": chosen, "router_logits": chosen, "bits": chosen}
  kept = options.keep if config.split(layers)[1] else _OF_ATTENTION
  outputs = BlockOutputs(**{name: outputs[name] for name in options.keep if name in kept})
  sharded = sharding.EXPERT in sharding.axes_of(hidden)

  def part(layers, dense_layers, cell, x, tokens, access):
    layers = layers.replace(experts=experts.expert_parallel.bias_on_one_device(layers.experts))
    x, written, outputs = run_layers(
      Params(None, layers, None, None, dense_layers, cell),
      config,
      x,
      tokens,
      access,
      dataclasses.replace(options, tokens_sharded=sharded),
    )
    # Keys and values are those of the first member, which the first device runs.
    keys, values = jax.tree.map(
      lambda a: collectives.broadcast_from_first(a, *member_axes), (outputs.keys, outputs.values)
    )
    return x, written if access.write else None, outputs.replace(keys=keys, values=values)

  of_tokens = tokens.replace(
    positions_BxT=sequences,
    noise=tokens.noise
    and tokens.noise.replace(
      keys=sequences, temperatures=PartitionSpec(), member=PartitionSpec(*members)
    ),
    lengths_B=None if tokens.lengths_B is None else sequences,
    router=jax.tree.map(lambda _: PartitionSpec(), tokens.router),
  )
  specs = sharding.parameter_specs(mesh, config)
  # In the structure of the parameters, which says how many bits are read.
  of_layers = jax.tree.unflatten(jax.tree.structure(params.layers), jax.tree.leaves(specs.layers))
  x, written, found = sharding.map_shards(
    part,
    mesh,
    (of_layers, specs.dense_layers, specs.router_cell, hidden, of_tokens, caches),
    (hidden, caches.cache if access.write else None, outputs),
  )(params.layers, params.dense_layers, params.router_cell, x, tokens, access)
  return x, written if access.write else access.cache, found


@dataclasses.dataclass(frozen=True)
class _Block:
  """Attention and MoE of any layer of a stack; see `run_layers` for the attributes.

  `first` is the index in the model of the first layer of the stack; `members` run it in a `vmap`.
  """

  config: ModelConfig
  layers: LayerParams
  first: int
  cell: RouterCell | None
  tokens: TokenBatch
  rotation: tuple[jax.Array, jax.Array]
  members: int

  def __call__(self, layer, location, access, options, x, noise):
    """Returns the hidden states, the cache if written, and the outputs that are kept."""
    config, layers, row = self.config, self.layers, layer - self.first
    x, state = _split_state(config, x)
    normed = norm(config, x, layers.attention_norm[row])
    new = attention.project(config, layers.attention, row, normed, *self.rotation)
    heads, cache = attention.attend_in_layer(
      config, layers.attention, row, new, self.tokens, access, location, self.members
    )
    y = attention.output(layers.attention, row, heads)
    x = add_to_residual(config, x, y, layers.attention_output_norm, row)
    router = self.tokens.router
    x, state, chosen, logits, read = feed_forward(
      config, layers, row, x, noise, options, router, self.first, self.cell, state
    )
    outputs = {"keys": new[1], "values": new[2], "experts": chosen, "router_logits": logits}
    outputs["bits"] = read
    outputs = BlockOutputs(**{name: outputs[name] for name in options.keep})
    return _with_state(x, state), cache if access.write else None, outputs


def feed_forward(
  config: ModelConfig,
  layers: LayerParams,
  layer: jax.Array | int,
  x: jax.Array,
  noise: RoutingNoise | None = None,
  options: LayerOptions = LayerOptions(),
  router: RouterInputs = RouterInputs(),
  first: int = 0,
  cell: RouterCell | None = None,
  state: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, *tuple[jax.Array | None, ...]]:
  """Runs the MoE half of a block, or the MLP of a dense one, on hidden states `[B, T, D]`.

  See `run_layers` for the arguments; `layer` is an index in `layers`, whose first is layer
  `first` of the model. `cell` and `state` are those of a recurrent router.

  Returns:
    The hidden states, the new state of a recurrent router, the chosen experts `[B, T, A]`, the
    router logits `[B, T, E]`, and the bits `[B, T, A]` that a bit router chose; None for what the
    layer does not have.
  """
  normed = norm(config, x, layers.moe_norm[layer])
  if layers.experts is None:
    y = experts.shared(layers.shared_expert, layer, normed)
    return add_to_residual(config, x, y, layers.moe_output_norm, layer), state, None, None, None
  of_router, in_model = normed, first + layer
  if state is not None:
    if options.detach_router_state:
      state = jax.lax.stop_gradient(state)
    state = advance(cell, layers.router_projection, layer, normed, state)
    if noise is not None:
      state = noise.perturb_state(in_model, state)
    of_router = state
  logits = router_logits(config, layers, layer, of_router)
  logits = add_bias(logits, router.bias, in_model)
  perturbed = None
  if noise is not None:
    perturbed = noise.perturb(in_model, logits, config.experts_per_token)
  count = router.count(0 if noise is None else noise.member, in_model)
  chosen, gates = route(config, layers, layer, logits, perturbed, options.gate_weights, count)
  b, t, d = x.shape
  rows = normed.reshape(b * t, d)
  indices_NxA, gates_NxA = chosen.reshape(b * t, -1), gates.reshape(b * t, -1)
  compute = functools.partial(
    experts.apply,
    layer=layer,
    x_NxD=rows,
    strategy=options.strategy,
    activation=Activation(config.swiglu_limit, config.swiglu_alpha),
    tokens_sharded=options.tokens_sharded,
  )
  if bit_routing.is_used(layers):
    y, bits = bit_routing.apply(
      layers, layer, rows, indices_NxA, gates_NxA, compute, options.trains_bits
    )
    bits = bits.reshape(chosen.shape)
  else:
    y, bits = compute(layers.experts, indices_NxA=indices_NxA, gates_NxA=gates_NxA), None
  y = y.reshape(b, t, d)
  if layers.shared_expert is not None:
    y = add(y, experts.shared(layers.shared_expert, layer, normed))
  x = add_to_residual(config, x, y, layers.moe_output_norm, layer)
  return x, state, chosen, logits, bits


def forward(
  params: Params,
  config: ModelConfig,
  tokens_BxT: jax.Array,
  noise: RoutingNoise | None = None,
  router: RouterInputs = RouterInputs(),
  **options: Any,
) -> tuple[jax.Array, BlockOutputs]:
  """Computes the baseline's logits for whole sequences, without a cache.

  Args:
    params: the model's parameters.
    config: its architecture.
    tokens_BxT: int32 tokens from position 0 on, padded on the right; an array or lists of
      one length.
    noise: the routing noise of one roster member, or None.
    router: what is added to the routers.
    **options: see `LayerOptions`.

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
  inputs = embed(params, config, tokens_BxT), TokenBatch(positions, noise, router=router)
  run = layer_runner(params)
  x, _, outputs = run(params, config, *inputs, options=LayerOptions(**options))
  return unembed(params, config, x), outputs
