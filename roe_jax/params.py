"""The parameters: one description, from which all else follows.

`describe(config)` is a `Params` tree whose leaves are `ParamSpec`s (shape,
logical axes, initialiser). Abstract arrays, initial values and logical axes
are read off it, so that none of them can disagree.
"""

import dataclasses
import math
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import numerics
from roe_jax.config import ModelConfig

# Axis letters: L layers, D model width, H query heads, K key/value heads,
# C head width, E experts, F expert width, V vocabulary.


@struct.dataclass
class AttentionParams:
  """Attention of all layers; absent norms are None."""

  query: Any  # [L, H, C, D]
  key: Any  # [L, K, C, D]
  value: Any  # [L, K, C, D]
  output: Any  # [L, H, C, D]
  query_norm: Any = None  # [L, H, C]
  key_norm: Any = None  # [L, K, C]


@struct.dataclass
class ExpertParams:
  """Experts of all layers.

  The two leading axes stay apart so that E can be sharded; as `[L·E, ...]`,
  which the layer loop indexes with `l·E + e`, they are a free reshape. A
  stretch of F is contiguous in both arrays, so that an expert can be computed
  tile by tile.
  """

  gate_up: Any  # [L, E, F, 2, D]: a row of the gate projection, then of the up projection
  down: Any  # [L, E, F, D]


@struct.dataclass
class LayerParams:
  """All blocks, stacked on a leading layer axis."""

  attention_norm: Any  # [L, D]
  attention: AttentionParams
  moe_norm: Any  # [L, D]
  router: Any  # [L, E, D]
  experts: ExpertParams


@struct.dataclass
class Params:
  embedding: Any  # [V, D]
  layers: LayerParams
  final_norm: Any  # [D]
  unembedding: Any  # [V, D]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """Shape, logical axis names (one for each dimension) and initialiser.

  Attributes:
    shape: the array's shape.
    axes: logical axis names, as long as `shape`.
    init: "ones", or "normal" scaled by `scale`.
    scale: factor on the config's `initializer_range`.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  init: str = "normal"
  scale: float = 1.0

  def __post_init__(self):
    if len(self.shape) != len(self.axes):
      raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")


def describe(config: ModelConfig) -> Params:
  """A `Params` tree of `ParamSpec`s for `config`."""
  sizes = {
      "layers": config.num_layers, "embed": config.d_model,
      "heads": config.num_heads, "kv_heads": config.num_kv_heads,
      "head_dim": config.head_dim, "experts": config.num_experts,
      "gate_up": 2, "expert_mlp": config.d_expert, "vocab": config.vocab_size,
  }

  def spec(*axes, init="normal", scale=1.0):
    return ParamSpec(tuple(sizes[a] for a in axes), axes, init, scale)

  # Projections that write to the residual stream start smaller, so that its
  # variance does not grow with depth.
  residual = 1.0 / math.sqrt(2.0 * config.num_layers)
  return Params(
      embedding=spec("vocab", "embed"),
      layers=LayerParams(
          attention_norm=spec("layers", "embed", init="ones"),
          attention=AttentionParams(
              query=spec("layers", "heads", "head_dim", "embed"),
              key=spec("layers", "kv_heads", "head_dim", "embed"),
              value=spec("layers", "kv_heads", "head_dim", "embed"),
              output=spec("layers", "heads", "head_dim", "embed", scale=residual),
              query_norm=(spec("layers", "heads", "head_dim", init="ones")
                          if config.qk_norm else None),
              key_norm=(spec("layers", "kv_heads", "head_dim", init="ones")
                        if config.qk_norm else None),
          ),
          moe_norm=spec("layers", "embed", init="ones"),
          router=spec("layers", "experts", "embed"),
          experts=ExpertParams(
              gate_up=spec("layers", "experts", "expert_mlp", "gate_up", "embed"),
              down=spec("layers", "experts", "expert_mlp", "embed", scale=residual),
          ),
      ),
      final_norm=spec("embed", init="ones"),
      unembedding=spec("vocab", "embed"),
  )


def abstract(config: ModelConfig) -> Params:
  """`jax.ShapeDtypeStruct` leaves in `config.dtype`: what a checkpoint holds."""
  dtype = jnp.dtype(config.dtype)
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), describe(config))


def logical_axes(config: ModelConfig) -> Params:
  """A `Params` tree of tuples of logical axis names."""
  return jax.tree.map(lambda s: s.axes, describe(config))


def initialize(config: ModelConfig, key: jax.Array) -> Params:
  """Random parameters in `config.dtype`; `key` is consumed."""
  specs, treedef = jax.tree.flatten(describe(config))
  dtype = jnp.dtype(config.dtype)

  def value(spec, key):
    if spec.init == "ones":
      return jnp.ones(spec.shape, dtype)
    stddev = config.initializer_range * spec.scale
    return (stddev * jax.random.normal(key, spec.shape, jnp.float32)).astype(dtype)

  keys = jax.random.split(key, len(specs))
  return jax.tree.unflatten(treedef, [value(s, k) for s, k in zip(specs, keys)])


def held(params: Params) -> Params:
  """The parameters in the form that programs take on this platform.

  On CPUs bfloat16 arrays as uint16 arrays of their bits, without a copy (see
  `numerics.storage_dtype`); all else as it is.
  """
  return jax.tree.map(_held, params)


def _held(array):
  dtype = numerics.storage_dtype(str(array.dtype))
  if dtype == array.dtype:
    return array
  shards = [jax.device_put(np.asarray(s.data).view(dtype), s.device, may_alias=True)
            for s in array.addressable_shards]
  return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def count(config: ModelConfig) -> int:
  """Number of parameters."""
  return sum(math.prod(s.shape) for s in jax.tree.leaves(describe(config)))


def num_bytes(config: ModelConfig) -> int:
  """Bytes of the parameters in `config.dtype`."""
  return count(config) * jnp.dtype(config.dtype).itemsize


def validate(params: Params, config: ModelConfig) -> None:
  """Checks every leaf against `config`.

  Raises:
    ValueError: a leaf is missing, superfluous, or of another shape or dtype.
  """
  expected = abstract(config)
  if jax.tree.structure(params) != jax.tree.structure(expected):
    raise ValueError(
        f"the parameters do not have the structure of a {config.family} model: "
        f"got {jax.tree.structure(params)}, expected {jax.tree.structure(expected)}")

  def check(path, leaf, want):
    if leaf.shape != want.shape or leaf.dtype != want.dtype:
      raise ValueError(
          f"parameter {jax.tree_util.keystr(path)} is {leaf.dtype}{list(leaf.shape)}, "
          f"the config expects {want.dtype}{list(want.shape)}")

  jax.tree_util.tree_map_with_path(check, params, expected)
