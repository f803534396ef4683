"""The shapes that are measured, random weights for them, and what a step must read."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import params as params_lib, presets
from roe_jax.config import ModelConfig
from roe_jax.params import Params

_OLMOE = dict(family="olmoe", normalize_gates=False, gates_in_model_dtype=True, qk_norm=True,
              dtype="float32")
PRESETS = {
    "tiny": ModelConfig(
        vocab_size=97, num_layers=2, d_model=32, num_heads=4, num_kv_heads=4, head_dim=8,
        num_experts=16, experts_per_token=4, d_expert=16, context_length=4096,
        initializer_range=0.1, **_OLMOE),
    "laptop": ModelConfig(
        vocab_size=50304, num_layers=8, d_model=1024, num_heads=16, num_kv_heads=16, head_dim=64,
        num_experts=64, experts_per_token=8, d_expert=512, context_length=4096, **_OLMOE),
    **{name: presets.PRESETS[name] for name in ("olmoe-1b-7b", "mixtral-8x7b")},
}
# Prime, so that a matrix or an expert begins where no other one does.
_NUM_NORMALS = 1_000_003


def random_params(config: ModelConfig, seed: int = 0) -> Params:
  """Random weights, made on the device leaf by leaf, in the form that programs take.

  The same million normal values over and over, as drawing billions takes long
  on a CPU. Time depends on the values only through the choice of experts,
  which is as varied as with all different ones.
  """
  specs, treedef = jax.tree.flatten(params_lib.describe(config))
  normals = jax.random.normal(jax.random.key(seed), (_NUM_NORMALS,), jnp.float32)

  def value(spec):
    if spec.init == "ones":
      return jnp.ones(spec.shape, config.dtype)
    size = math.prod(spec.shape)
    scaled = (config.initializer_range * spec.scale * normals).astype(config.dtype)
    return jnp.tile(scaled, -(-size // _NUM_NORMALS))[:size].reshape(spec.shape)

  return params_lib.held(jax.tree.unflatten(
      treedef, [jax.jit(value, static_argnums=0)(s) for s in specs]))


def cache_bytes(config: ModelConfig, positions: int) -> int:
  """Keys and values of so many positions in all layers."""
  return (2 * config.num_layers * config.num_kv_heads * config.head_dim * positions
          * jnp.dtype(config.dtype).itemsize)


def step_bytes(config: ModelConfig, experts_hit: float, positions: int) -> float:
  """Bytes that a decode step cannot do without reading.

  The experts that some member of some text chose, once each; all attention
  matrices, routers and the head; the keys and values that are seen. Norms and
  rows of the embedding are left out: they are small.

  Args:
    config: the model's architecture.
    experts_hit: distinct experts, mean over layers.
    positions: whose keys and values are read, over all texts (and members, if
      each has its own).
  """
  layers = params_lib.describe(config).layers
  attention = sum(math.prod(w.shape) for w in (
      layers.attention.query, layers.attention.key, layers.attention.value,
      layers.attention.output))
  elements = (config.num_layers * experts_hit * 3 * config.d_model * config.d_expert + attention
              + math.prod(layers.router.shape) + config.vocab_size * config.d_model)
  return elements * jnp.dtype(config.dtype).itemsize + cache_bytes(config, positions)


def distinct_experts(experts_LxRxBxTxA: np.ndarray, num_members: int) -> float:
  """How many different experts the first members of all texts chose, mean over layers."""
  return float(np.mean([len(np.unique(layer[:num_members])) for layer in experts_LxRxBxTxA]))
