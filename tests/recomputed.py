"""A reference implementation of a roster as a cache mode, slow and simple, to test others against.

It recomputes everything from the tokens: full attention matrices, every expert for
every token, one member at a time. It shares with the fast path only the noise's
addresses, the routing rule and the elementary parts of a block.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import attention, latent_attention, routers, transformer
from roe_jax import noise as noise_lib
from roe_jax.config import ModelConfig
from roe_jax.experts import Activation, shared
from roe_jax.numerics import add, einsum, rounded, to_compute_dtype
from roe_jax.params import Params
from roe_jax.quantization import dequantize, is_quantized
from roe_jax.roster import Roster
from roe_jax.roster_caches import NoCache
from roe_jax.transformer import BlockOutputs


@dataclasses.dataclass(frozen=True)
class Recomputed(NoCache):
  """No cache: members attend to the clean member's recomputed history, or to their own."""

  is_shared: bool = False

  def run_whole(self, run, keep=()):
    assert not keep
    arguments = run.params, run.config, run.roster, run.tokens_BxT, run.request_ids_B
    return member_states(*arguments), BlockOutputs()


# The history of each cache.
RECOMPUTED = {"clean": Recomputed(True), "standard": Recomputed(False)}


def member_states(
  params: Params,
  config: ModelConfig,
  roster: Roster,
  tokens_BxT: jax.Array,
  request_ids_B: jax.Array,
) -> jax.Array:
  """Returns every member's hidden states after the last block.

  With a shared history a member attends to the clean member's keys and values at earlier
  positions and to its own at the current one; otherwise to its own.

  Args:
    params: the model's parameters.
    config: its architecture.
    roster: the settings.
    tokens_BxT: int32 sequences from position 0 on, padded on the right.
    request_ids_B: uint32.

  Returns:
    `[R, B, T, D]` for `roster.members`.
  """
  positions = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1]), tokens_BxT.shape)
  stream = noise_lib.stream_key(roster.seed, noise_lib.ROUTING)
  keys = noise_lib.position_keys(stream, request_ids_B, positions)

  def run(member, history):
    noise = noise_lib.RoutingNoise(keys, roster.temperatures, member, roster.perturb)
    first, num_layers = config.first_dense_layers, config.num_layers
    x, own_history = transformer.embed(params, config, tokens_BxT), []
    for layers, begin, end in ((params.dense_layers, 0, first), (params.layers, first, num_layers)):
      if begin == end:
        continue

      def step(x, layer_and_past, layers=layers, begin=begin):
        layer, past = layer_and_past
        block = params.router_cell, layers, layer - begin, layer
        return _block(config, *block, x, positions, noise, roster.gate_weights, past)

      past = jax.tree.map(lambda a: a[begin:end], history)
      x, own = jax.lax.scan(step, x, (jnp.arange(begin, end), past))
      own_history.append(own)
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *own_history)

  history = run(jnp.int32(0), None)[1] if roster.cache_mode.is_shared else None
  return jax.lax.map(lambda member: run(member, history)[0], jnp.asarray(roster.members))


def _block(config, cell, layers, layer, model_layer, x, positions, noise, gate_weights, history):
  """Runs a block: number `layer` of `layers`, `model_layer` of the model."""
  x, state = jnp.split(x, [config.d_model], axis=-1)
  experts = jax.tree.map(lambda w: w[layer], layers.experts)
  experts = jax.tree.map(
    lambda w: dequantize(w) if is_quantized(w) else to_compute_dtype(w),
    experts,
    is_leaf=is_quantized,
  )
  cos, sin = attention.rotation(config, positions)
  normed = transformer.norm(config, x, layers.attention_norm[layer])
  query, key, value = attention.project(config, layers.attention, layer, normed, cos, sin)
  window = None
  if config.sliding_layers:
    slides = np.isin(np.arange(config.num_layers), config.sliding_layers)
    window = jnp.where(jnp.asarray(slides)[model_layer], config.sliding_window, x.shape[1])
  sinks = layers.attention.sinks
  sinks = None if sinks is None else to_compute_dtype(sinks[layer])
  if value is None:
    expanded = latent_attention.expand(layers.attention, layer, key.swapaxes(1, 2), x.dtype)
    key, value = (a.swapaxes(1, 2) for a in expanded)
  keys, values = history or (key, value)
  heads = _attend(query, key, value, keys, values, sinks, window, config.attention_scale)
  y = attention.output(layers.attention, layer, heads)
  x = transformer.add_to_residual(config, x, y, layers.attention_output_norm, layer)
  normed = transformer.norm(config, x, layers.moe_norm[layer])
  if layers.experts is None:
    y = shared(layers.shared_expert, layer, normed)
    x = transformer.add_to_residual(config, x, y, layers.moe_output_norm, layer)
    return jnp.concatenate([x, state], axis=-1), (key, value)
  if config.router_state:
    state = routers.advance(cell, layers.router_projection, layer, normed, state)
    state = noise.perturb_state(model_layer, state)
  of_router = state if config.router_state else normed
  logits = transformer.router_logits(config, layers, layer, of_router)
  perturbed = noise.perturb(model_layer, logits, config.experts_per_token)
  chosen, gates = transformer.route(config, layers, layer, logits, perturbed, gate_weights)
  by_expert = jnp.sum(jax.nn.one_hot(chosen, config.num_experts) * gates[..., None], axis=-2)
  projected = einsum("btd,efcd->btecf", normed, experts.gate_up)
  if config.expert_bias:
    projected += experts.gate_up_bias.swapaxes(1, 2)[None, None]
  activation = Activation(config.swiglu_limit, config.swiglu_alpha)
  hidden = rounded(activation(projected[..., 0, :], projected[..., 1, :]), x.dtype)
  outputs = einsum("btef,efd->ebtd", hidden, experts.down)
  if config.expert_bias:
    outputs += experts.down_bias[:, None, None]
  y = jnp.einsum("ebtd,bte->btd", outputs, by_expert, precision="highest")
  y = rounded(y, x.dtype)
  if config.d_shared_expert:
    y = add(y, shared(layers.shared_expert, layer, normed))
  x = transformer.add_to_residual(config, x, y, layers.moe_output_norm, layer)
  return jnp.concatenate([x, state], axis=-1), (key, value)


def _attend(query, own_key, own_value, keys, values, sinks, window, scale):
  """Computes causal attention whose diagonal uses the token's own key and value.

  Sinks `[H]` are one more column without a value. `window` is the attention window,
  including the current position.
  """
  _, t, h, _ = query.shape
  groups = h // own_key.shape[2]
  own_key, own_value, keys, values = (
    jnp.repeat(a, groups, axis=2) for a in (own_key, own_value, keys, values)
  )
  scores = einsum("bthc,bshc->bhts", query, keys)
  own = jnp.einsum(
    "bthc,bthc->bht", query, own_key, preferred_element_type=jnp.float32, precision="highest"
  )
  diagonal, earlier = jnp.eye(t, dtype=bool), jnp.tri(t, k=-1, dtype=bool)
  if window is not None:
    earlier &= jnp.arange(t)[None] > jnp.arange(t)[:, None] - window
  scores = jnp.where(diagonal, own[..., None], scores) * scale
  scores = jnp.where(diagonal | earlier, scores, -jnp.inf)
  if sinks is not None:
    column = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, None, None], (len(query), h, t, 1))
    scores = jnp.concatenate([scores, column], axis=-1)
  weights = rounded(jax.nn.softmax(scores, axis=-1)[..., :t], query.dtype)
  mixed = einsum("bhts,bshc->bhtc", jnp.where(diagonal, 0, weights), values).swapaxes(1, 2)
  own_weight = jnp.einsum("bhtt->bth", weights)
  return rounded(mixed + own_weight[..., None] * own_value, query.dtype)
