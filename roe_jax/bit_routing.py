"""Bits by token and expert: a linear router of each expert chooses them (D2MoE, arXiv 2504.15299).

Experts in a nested format can be read at any number of bits from the base's to all: W widths. For a
token x, expert e has W logits `R_e x`, and is read at the width with the largest. A token's bits
depend on no other token: unlike the paper's training, there is no capacity.

The experts' sum is that of one pass per width over the (token, expert) pairs that have it, so it
runs with every strategy, on meshes and in rosters as it is. Members with bits of their own
(`Roster.member_bits`) do not ask the router.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import numerics, quantization
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.params import LayerParams, Params

# `compute(experts, indices_NxA=, gates_NxA=)`: the gate-weighted sum `[N, D]`.
Compute = Callable[..., jax.Array]


def add(params: Params, config: ModelConfig, key: jax.Array) -> tuple[Params, ModelConfig]:
  """Adds random bit routers to a model with nested experts; `key` is consumed.

  Returns:
    The parameters, with `[L, E, W, D]` routers, and the config.

  Raises:
    ValueError: the experts are not in a nested format.
  """
  config = config.replace(bit_router=True)
  spec: Any = params_lib.describe(config).layers.bit_router
  routers = config.initializer_range * jax.random.normal(key, spec.shape)
  layers = params.layers.replace(bit_router=routers.astype(config.dtype))
  return params.replace(layers=layers), config


def is_used(layers: LayerParams) -> bool:
  """Whether the experts' bits are chosen by the routers, as opposed to given."""
  return layers.bit_router is not None and layers.experts.gate_up.depth is None


def apply(
  layers: LayerParams,
  layer: jax.Array | int,
  x_NxD: jax.Array,
  indices_NxA: jax.Array,
  gates_NxA: jax.Array,
  compute: Compute,
  trains: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Computes a layer's experts at the bits that its bit routers choose.

  Args:
    layers: parameters with `bit_router`.
    layer: index of the layer; may be traced.
    x_NxD: inputs of the experts.
    indices_NxA: int32 chosen experts; E for none.
    gates_NxA: float32.
    compute: computes experts as they are given.
    trains: whether the gradient of the choice is that of its softmax (straight-through): then all
      widths are computed. Needs the strategy `dense`: others pass by experts with a gate of zero.

  Returns:
    The gate-weighted sum `[N, D]`, and float32 bits `[N, A]` with the gradient of the choice.
  """
  format = quantization.nested_format(layers.experts.gate_up.format)
  widths = range(format.base, format.bits + 1)
  num_experts = layers.bit_router.shape[1]
  logits = numerics.project(x_NxD, layers.bit_router, layer)  # [N, E, W]
  of_chosen = jnp.minimum(indices_NxA, num_experts - 1)[..., None]
  logits_NxAxW = jnp.take_along_axis(logits, of_chosen, axis=1)
  best = jnp.argmax(logits_NxAxW, axis=-1)
  weights = jax.nn.one_hot(best, len(widths), dtype=jnp.float32)
  if trains:
    soft = jax.nn.softmax(logits_NxAxW, axis=-1)
    weights += soft - jax.lax.stop_gradient(soft)
  total = jnp.zeros_like(x_NxD)
  for i, bits in enumerate(widths):
    used = jnp.ones_like(best, bool) if trains else best == i
    y = compute(
      quantization.at_bits(layers.experts, bits),
      indices_NxA=jnp.where(used, indices_NxA, num_experts),
      gates_NxA=gates_NxA * weights[..., i],
    )
    total = numerics.add(total, y)
  return total, weights @ jnp.asarray(np.array(widths, np.float32))
