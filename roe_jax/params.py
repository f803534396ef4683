"""Model parameters: one description from which everything else is derived.

`describe(config)` returns a `Params` tree of `ParamSpec`s (shape, logical axes,
initializer). Abstract arrays, initial values and logical axes all come from it.
"""

import dataclasses
import functools
import math
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import numerics, quantization
from roe_jax.config import ModelConfig
from roe_jax.quantization import Quantized, group_size, typical_scales
from roe_jax.routers import ROUTERS

# Axis letters: L layers, D model width, H query heads, K key/value heads,
# C head width, E experts, F expert width, V vocabulary.


class AttentionParams(struct.PyTreeNode):
  """Attention of all layers; None for parameters that the model does not have."""

  query: Any  # [L, H, C, D]; this and the other projections are arrays or `Quantized`
  key: Any  # [L, K, C, D]
  value: Any  # [L, K, C, D]
  output: Any  # [L, H, C, D]
  query_norm: Any = None  # [L, H, C]; [L, C] if each head is normalized separately
  key_norm: Any = None  # [L, K, C]; [L, C]
  query_bias: Any = None  # [L, H, C]
  key_bias: Any = None  # [L, K, C]
  value_bias: Any = None  # [L, K, C]
  output_bias: Any = None  # [L, D]
  sinks: Any = None  # [L, H]

  @property
  def matrices(self) -> list[Any]:
    """The projections."""
    return [self.query, self.key, self.value, self.output]


class LatentAttentionParams(struct.PyTreeNode):
  """Multi-head latent attention of all layers; see `latent_attention`.

  The projections except `key_up` and `value_up` are arrays or `Quantized`.

  Axes: N a head's width without rotation, W `config.cached_head_dim`, X `v_head_dim`, Z
  `kv_lora_rank`, Q `q_lora_rank`, or the model width D without one.
  """

  query: Any  # [L, H, C, Q]
  key_down: Any  # [L, W, D]: the latent, then the rotary key
  key_norm: Any  # [L, Z]
  key_up: Any  # [L, H, N, Z]
  value_up: Any  # [L, H, X, Z]
  output: Any  # [L, H, X, D]
  query_down: Any = None  # [L, Q, D]
  query_norm: Any = None  # [L, Q]
  output_bias: None = None
  sinks: None = None

  @property
  def matrices(self) -> list[Any]:
    """The projections."""
    down = [] if self.query_down is None else [self.query_down]
    return [*down, self.query, self.key_down, self.key_up, self.value_up, self.output]


class ExpertParams(struct.PyTreeNode):
  """Experts of all layers; the matrices are arrays or `Quantized`.

  L and E are separate axes so that E can be sharded; the layer loop reshapes them to
  `[L·E, ...]` for free and indexes with `l·E + e`. A tile of F is contiguous in both
  matrices, so that an expert can be computed tile by tile.
  """

  gate_up: Any  # [L, E, F, 2, D]: gate and up projections interleaved along F
  down: Any  # [L, E, F, D]
  gate_up_bias: Any = None  # [L, E, F, 2]
  down_bias: Any = None  # [L, E, D]


class SharedExpertParams(struct.PyTreeNode):
  """The shared expert of every layer, which all tokens pass through; inner width G.

  Its matrices are arrays or `Quantized`.
  """

  gate_up: Any  # [L, G, 2, D]
  down: Any  # [L, G, D]
  gate: Any = None  # [L, 1, D]: its sigmoid weights the output


class LayerParams(struct.PyTreeNode):
  """Blocks, stacked on a leading layer axis."""

  attention_norm: Any  # [L, D]
  attention: AttentionParams | LatentAttentionParams
  moe_norm: Any  # [L, D]
  experts: Any  # ExpertParams; None in dense layers
  router: Any = None  # [L, E, D], or as its kind in `routers` says; None without a router
  router_projection: Any = None  # [L, q, D], of a recurrent router
  router_bias: Any = None  # [L, E]
  correction_bias: Any = None  # [L, E] float32
  gate_scales: Any = None  # [L, E]
  bit_router: Any = None  # [L, E, W, D]; see `bit_routing`
  shared_expert: Any = None  # SharedExpertParams
  attention_output_norm: Any = None  # [L, D]
  moe_output_norm: Any = None  # [L, D]


class RouterCell(struct.PyTreeNode):
  """The gated recurrent unit of a recurrent router: its gates r and z, and the candidate."""

  input: Any  # [3, q, q], input last
  state: Any  # [3, q, q], input last
  input_bias: Any  # [3, q]
  state_bias: Any  # [3, q]


class Params(struct.PyTreeNode):
  """All parameters; L of `layers` is `ModelConfig.num_expert_layers`."""

  embedding: Any  # [V, D]
  layers: LayerParams
  final_norm: Any  # [D]
  unembedding: Any  # [V, D], or `Quantized`
  dense_layers: Any = None  # LayerParams of the first layers, whose MLP is `shared_expert`
  router_cell: Any = None  # RouterCell
  tasks: Any = None  # merging.TaskParams of merged fine-tunes, next to their base


# The config's fields of axes along which codes are packed.
_WIDTHS = {"embed": "d_model", "query_latent": "q_lora_rank"}


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """Description of one parameter array.

  Attributes:
    shape: the array's shape.
    axes: logical axis names, one per dimension.
    init: "ones", "zeros", "normal", "codes" (random bits), or "scales" (such that random codes
      of `format` have the standard deviation of "normal").
    scale: factor on ones, or on the config's `initializer_range`.
    dtype: dtype name; None for the config's dtype.
    format: of "scales", that of the matrix whose codes they scale; None of others.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  init: str = "normal"
  scale: float = 1.0
  dtype: str | None = None
  format: str | None = None

  def __post_init__(self):
    if len(self.shape) != len(self.axes):
      raise ValueError(f"shape {self.shape} and axes {self.axes} must have equal lengths")


def describe(config: ModelConfig) -> Params:
  """Returns a `Params` tree of `ParamSpec`s.

  Raises:
    ValueError: the config's formats cannot hold matrices of its sizes.
  """
  if config.expert_format is not None:
    quantization.check_sizes(config.expert_format, config.d_model, config.d_expert)
  sizes = {
    "layers": config.num_expert_layers,
    "embed": config.d_model,
    "heads": config.num_heads,
    "kv_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "plain_head_dim": config.head_dim - (config.rotary_dim or 0),
    "value_head_dim": config.v_head_dim,
    "cached_head_dim": config.cached_head_dim,
    "latent": config.kv_lora_rank,
    "query_latent": config.q_lora_rank,
    "experts": config.num_experts,
    "routed_experts": config.num_experts,
    "gate_up": 2,
    "expert_mlp": config.d_expert,
    "vocab": config.vocab_size,
    "shared_gate": 1,
    "router_state": config.router_state,
    "router_gates": 3,
  }
  if config.bit_router:
    nested = quantization.nested_format(config.expert_format)
    sizes["bit_widths"] = nested.bits - nested.base + 1

  # Projections into the residual stream are initialized smaller, so that its variance does
  # not grow with depth.
  usual, residual, embedding = 1.0, 1.0 / math.sqrt(2.0 * config.num_layers), 1.0
  if config.tiny_init:
    usual = math.sqrt(0.5 / (config.d_model * config.num_layers)) / config.initializer_range
    residual, embedding = usual, 0.5 / config.initializer_range

  def spec(*axes, init="normal", scale=None, dtype=None, format=None):
    if scale is None:
      scale = usual if init == "normal" else 1.0
    return ParamSpec(tuple(sizes[a] for a in axes), axes, init, scale, dtype, format)

  def spec_if(present, *axes, init="normal"):
    return spec(*axes, init=init) if present else None

  def matrix(*axes, contracted, format, scale=usual, plan=None):
    """Describes a matrix of experts, or another one, in its format."""
    if format is None:
      return spec(*axes, scale=scale)
    kind, packed = quantization.find(format), axes[-1] + "_packed"
    quantization.check_width(format, sizes[axes[-1]], _WIDTHS[axes[-1]])
    sizes[packed] = kind.code_width(sizes[axes[-1]])
    groups = contracted + "_groups"
    sizes[groups] = sizes[contracted] // group_size(format, sizes[contracted])
    scale_axes = [groups if a == contracted else a for a in axes]
    if kind.num_scales > 1:
      sizes["embed_scales"] = kind.num_scales * sizes[scale_axes[-1]]
      scale_axes[-1] = "embed_scales"
    return Quantized(
      spec(*axes[:-1], packed, init="codes", dtype=kind.codes_dtype),
      spec(*scale_axes, init="scales", scale=scale, dtype=kind.scales_dtype, format=format),
      format,
      plan=plan,
    )

  of_experts = functools.partial(matrix, format=config.expert_format, plan=config.expert_bits)
  projection = functools.partial(matrix, format=config.projection_format)

  def normed(heads):
    return ("head_dim",) if config.qk_norm_per_head else (heads, "head_dim")

  def output_norm(scale):
    """Describes the norm of what a block adds; initial scales of arXiv 2504.07866, section 3."""
    if not config.sandwich_norm:
      return None
    return spec("layers", "embed", init="ones", scale=scale / math.sqrt(config.num_layers))

  def standard_attention():
    return AttentionParams(
      query=projection("layers", "heads", "head_dim", "embed", contracted="embed"),
      key=projection("layers", "kv_heads", "head_dim", "embed", contracted="embed"),
      value=projection("layers", "kv_heads", "head_dim", "embed", contracted="embed"),
      output=projection(
        "layers", "heads", "head_dim", "embed", contracted="head_dim", scale=residual
      ),
      query_norm=spec_if(config.qk_norm, "layers", *normed("heads"), init="ones"),
      key_norm=spec_if(config.qk_norm, "layers", *normed("kv_heads"), init="ones"),
      query_bias=spec_if(config.qkv_bias, "layers", "heads", "head_dim"),
      key_bias=spec_if(config.qkv_bias, "layers", "kv_heads", "head_dim"),
      value_bias=spec_if(config.qkv_bias, "layers", "kv_heads", "head_dim"),
      output_bias=spec_if(config.output_bias, "layers", "embed"),
      sinks=spec_if(config.attention_sinks, "layers", "heads"),
    )

  def latent_attention():
    compressed = config.q_lora_rank > 0
    of_query = "query_latent" if compressed else "embed"
    return LatentAttentionParams(
      query=projection("layers", "heads", "head_dim", of_query, contracted=of_query),
      key_down=projection("layers", "cached_head_dim", "embed", contracted="embed"),
      key_norm=spec("layers", "latent", init="ones"),
      key_up=spec("layers", "heads", "plain_head_dim", "latent"),
      value_up=spec("layers", "heads", "value_head_dim", "latent"),
      output=projection(
        "layers", "heads", "value_head_dim", "embed", contracted="value_head_dim", scale=residual
      ),
      query_down=projection("layers", "query_latent", "embed", contracted="embed")
      if compressed
      else None,
      query_norm=spec_if(compressed, "layers", "query_latent", init="ones"),
    )

  attention = latent_attention if config.kv_lora_rank else standard_attention
  router = ROUTERS[config.router].axes

  def layers(width, has_gate, **parts):
    """Describes blocks; `width` is that of the MLP that all tokens pass through."""
    sizes["shared_mlp"] = width
    shared_expert = None
    if width:
      shared_expert = SharedExpertParams(
        gate_up=projection("layers", "shared_mlp", "gate_up", "embed", contracted="embed"),
        down=projection("layers", "shared_mlp", "embed", contracted="shared_mlp", scale=residual),
        gate=spec_if(has_gate, "layers", "shared_gate", "embed"),
      )
    return LayerParams(
      attention_norm=spec("layers", "embed", init="ones"),
      attention=attention(),
      moe_norm=spec("layers", "embed", init="ones"),
      attention_output_norm=output_norm(0.283),
      moe_output_norm=output_norm(0.432),
      shared_expert=shared_expert,
      **parts,
    )

  dense_layers = None
  if config.first_dense_layers:
    sizes["layers"] = config.first_dense_layers
    dense_layers = layers(config.d_dense, False, experts=None)
    sizes["layers"] = config.num_expert_layers
  return Params(
    embedding=spec("vocab", "embed", scale=embedding),
    layers=layers(
      config.d_shared_expert,
      config.shared_expert_gate,
      router=spec_if(router is not None, "layers", *(router or ())),
      router_projection=spec_if(config.router_state, "layers", "router_state", "embed"),
      experts=ExpertParams(
        gate_up=of_experts(
          "layers", "experts", "expert_mlp", "gate_up", "embed", contracted="embed"
        ),
        down=of_experts(
          "layers", "experts", "expert_mlp", "embed", contracted="expert_mlp", scale=residual
        ),
        gate_up_bias=spec_if(config.expert_bias, "layers", "experts", "expert_mlp", "gate_up"),
        down_bias=spec_if(config.expert_bias, "layers", "experts", "embed"),
      ),
      router_bias=spec_if(config.router_bias, "layers", "routed_experts"),
      correction_bias=spec("layers", "routed_experts", init="zeros", dtype="float32")
      if config.correction_bias
      else None,
      gate_scales=spec_if(config.gate_scales, "layers", "routed_experts", init="zeros"),
      bit_router=spec_if(config.bit_router, "layers", "routed_experts", "bit_widths", "embed"),
    ),
    final_norm=spec("embed", init="ones"),
    unembedding=projection("vocab", "embed", contracted="embed"),
    dense_layers=dense_layers,
    router_cell=RouterCell(
      input=spec("router_gates", "router_state", "router_state"),
      state=spec("router_gates", "router_state", "router_state"),
      input_bias=spec("router_gates", "router_state", init="zeros"),
      state_bias=spec("router_gates", "router_state", init="zeros"),
    )
    if config.router_state
    else None,
  )


def abstract(config: ModelConfig) -> Params:
  """Returns a `Params` tree of `jax.ShapeDtypeStruct`s, as stored in a checkpoint."""
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, _dtype(config, s)), describe(config))


def _dtype(config, spec):
  return jnp.dtype(spec.dtype or config.dtype)


def logical_axes(config: ModelConfig) -> Params:
  """Returns a `Params` tree of tuples of logical axis names."""
  return jax.tree.map(lambda s: s.axes, describe(config))


def initialize(config: ModelConfig, key: jax.Array) -> Params:
  """Returns random parameters; `key` is consumed."""
  specs, treedef = jax.tree.flatten(describe(config))

  def value(spec, key):
    dtype = _dtype(config, spec)
    if spec.init == "ones":
      return jnp.full(spec.shape, spec.scale, dtype)
    if spec.init == "zeros":
      return jnp.zeros(spec.shape, dtype)
    if spec.init == "codes":
      return jax.lax.bitcast_convert_type(jax.random.bits(key, spec.shape, jnp.uint8), dtype)
    stddev = config.initializer_range * spec.scale
    if spec.format is not None:
      scales = typical_scales(spec.format, stddev, spec.shape[-1])
      return jnp.broadcast_to(jnp.asarray(scales, dtype), spec.shape)
    return (stddev * jax.random.normal(key, spec.shape, jnp.float32)).astype(dtype)

  keys = jax.random.split(key, len(specs))
  return jax.tree.unflatten(treedef, [value(s, k) for s, k in zip(specs, keys)])


def quantize(
  params: Params, config: ModelConfig, format: str | None, projection_format: str | None = None
) -> tuple[Params, ModelConfig]:
  """Quantizes matrices and returns the new parameters and config.

  Args:
    params: unquantized parameters.
    config: the model's config.
    format: the experts', a name that `quantization.find` knows, or None.
    projection_format: that of the other matrices, or None; see `ModelConfig.projection_format`.

  Raises:
    ValueError: the parameters are already quantized, or a format cannot hold their sizes.
  """
  if config.formats:
    raise ValueError(f"{config.formats} already: quantize the original parameters")
  config = config.replace(expert_format=format, projection_format=projection_format)

  def value(path, spec, array):
    if not quantization.is_quantized(spec):
      return array
    axis = quantization.contracted_axis(jax.tree_util.keystr(path, simple=True, separator="."))
    matrix = quantization.quantize(np.asarray(array), spec.format, axis)
    return jax.tree.map(jnp.asarray, matrix)

  quantized = jax.tree_util.tree_map_with_path(
    value, describe(config), params.replace(tasks=None), is_leaf=quantization.is_quantized
  )
  return quantized.replace(tasks=params.tasks), config


def in_storage_dtype(params: Params) -> Params:
  """Returns the parameters in the storage dtype of this platform, without copying.

  On CPUs bfloat16 arrays become uint16 arrays of their bits (see
  `numerics.storage_dtype`); everything else is unchanged.
  """
  return jax.tree.map(_in_storage_dtype, params)


def _in_storage_dtype(array):
  dtype = numerics.storage_dtype(str(array.dtype))
  if dtype == array.dtype:
    return array
  shards = [
    jax.device_put(np.asarray(s.data).view(dtype), s.device, may_alias=True)
    for s in array.addressable_shards
  ]
  return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def count(config: ModelConfig) -> int:
  """Returns the number of parameters, regardless of quantization."""
  return sum(math.prod(s.shape) for s in jax.tree.leaves(describe(config.unquantized())))


def num_bytes(config: ModelConfig) -> int:
  """Returns the size of the parameters in bytes."""
  return sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(abstract(config)))


def validate(params: Params, config: ModelConfig) -> None:
  """Checks every leaf against `config`, except merged tasks.

  Raises:
    ValueError: a leaf is missing or unexpected, or has the wrong shape or dtype.
  """
  expected, params = abstract(config), params.replace(tasks=None)
  if jax.tree.structure(params) != jax.tree.structure(expected):
    raise ValueError(
      f"the parameters do not have the structure of a {config.family} model: "
      f"got {jax.tree.structure(params)}, expected {jax.tree.structure(expected)}"
    )

  def check(path, leaf, want):
    if leaf.shape != want.shape or leaf.dtype != want.dtype:
      raise ValueError(
        f"parameter {jax.tree_util.keystr(path)} is {leaf.dtype}{list(leaf.shape)}, "
        f"the config expects {want.dtype}{list(want.shape)}"
      )

  jax.tree_util.tree_map_with_path(check, params, expected)
