"""Shapes of the benchmark, random weights for them, and the bytes a step must read."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import params as params_lib
from roe_jax import presets, quantization
from roe_jax.config import ModelConfig
from roe_jax.params import Params

_OLMOE: dict[str, Any] = dict(
  family="olmoe", normalize_gates=False, gates_in_model_dtype=True, qk_norm=True, dtype="float32"
)
PRESETS = {
  "tiny": ModelConfig(
    vocab_size=97,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    num_experts=16,
    experts_per_token=4,
    d_expert=16,
    context_length=4096,
    initializer_range=0.1,
    **_OLMOE,
  ),
  "laptop": ModelConfig(
    vocab_size=50304,
    num_layers=8,
    d_model=1024,
    num_heads=16,
    num_kv_heads=16,
    head_dim=64,
    num_experts=64,
    experts_per_token=8,
    d_expert=512,
    context_length=4096,
    **_OLMOE,
  ),
  # Its output layer costs more than its blocks, as in models trained to try things out.
  "vocabulary": ModelConfig(
    vocab_size=50304,
    num_layers=2,
    d_model=128,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    num_experts=8,
    experts_per_token=2,
    d_expert=128,
    context_length=4096,
    initializer_range=0.4,  # logits as peaked as those of trained models
    **_OLMOE,
  ),
  **presets.PRESETS,
}
# Prime, so that no two matrices or experts start at the same value.
_NUM_NORMALS = 1_000_003


def random_params(config: ModelConfig, seed: int = 0) -> Params:
  """Returns random weights in their storage dtype, made on the device array by array.

  Repeats the same million normal values, since drawing billions takes long on a CPU. Timings
  depend on the values only through the choice of experts, which varies as much.
  """
  return params_lib.in_storage_dtype(random_arrays(params_lib.describe(config), config, seed))


def random_arrays(tree: Any, config: ModelConfig, seed: int = 0) -> Any:
  """Returns random arrays for a tree of `ParamSpec`s; see `random_params`."""
  specs, treedef = jax.tree.flatten(tree)
  of_normals, of_codes = jax.random.split(jax.random.key(seed))
  normals = jax.random.normal(of_normals, (_NUM_NORMALS,), jnp.float32)
  codes = jax.random.bits(of_codes, (_NUM_NORMALS,), jnp.uint8)

  def value(spec):
    dtype = jnp.dtype(spec.dtype or config.dtype)
    deviation = config.initializer_range * spec.scale
    if spec.init == "ones":
      return jnp.ones(spec.shape, dtype)
    if spec.format is not None:
      scales = quantization.typical_scales(spec.format, deviation, spec.shape[-1])
      return jnp.broadcast_to(jnp.asarray(scales, dtype), spec.shape)
    size = math.prod(spec.shape)
    values = codes if spec.init == "codes" else deviation * normals
    return jnp.tile(values.astype(dtype), -(-size // _NUM_NORMALS))[:size].reshape(spec.shape)

  return jax.tree.unflatten(treedef, [jax.jit(value, static_argnums=0)(s) for s in specs])


def cache_bytes(config: ModelConfig, context: int) -> int:
  """Returns the bytes of keys and values that a token at this position attends to."""
  sliding = len(config.sliding_layers)
  seen = (config.num_layers - sliding) * context
  if config.sliding_window:
    seen += sliding * min(context, config.sliding_window - 1)
  return seen * config.cached_size * jnp.dtype(config.dtype).itemsize


def step_bytes(
  config: ModelConfig, unique_experts: float, context: int, num_histories: int = 1
) -> float:
  """Returns the bytes that a decode step must read at least.

  Unique active experts, attention, routers, shared experts and the output head once each, and the
  keys and values attended to. Norms, biases and embeddings are small and left out.

  Args:
    config: the model's architecture.
    unique_experts: unique active experts, mean over layers.
    context: positions before the step.
    num_histories: sequences, times members if each member has its own history.
  """
  params = params_lib.abstract(config)
  layers, attention = params.layers, params.layers.attention

  def size(*trees):
    return sum(math.prod(w.shape) * w.dtype.itemsize for w in jax.tree.leaves(trees))

  return (
    size(layers.experts.gate_up, layers.experts.down) * unique_experts / config.num_experts
    + size(attention.matrices, layers.router, layers.shared_expert, params.unembedding)
    + num_histories * cache_bytes(config, context)
  )


def count_unique_experts(experts_LxRxBxTxA: np.ndarray, num_members: int) -> float:
  """Counts the unique experts of the first members of all sequences, mean over layers."""
  return float(np.mean([len(np.unique(layer[:num_members])) for layer in experts_LxRxBxTxA]))
