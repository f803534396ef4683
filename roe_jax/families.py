"""Model families on the Hugging Face hub: one table maps `config.json` to `ModelConfig`.

An entry of `FAMILIES` is all that the library knows about a family beyond its
`ModelConfig`; tensor names are in `checkpoints_convert.tensor_names`.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

from roe_jax.config import ModelConfig, Yarn

_REQUIRED = object()


class Key:
  """The `config.json` key of a `ModelConfig` field.

  Attributes:
    names: the key that is written, then alternative spellings that are also read.
    default: the value that transformers assumes if the key is missing or null.
  """

  def __init__(self, *names: str, default: Any = _REQUIRED):
    self.names, self.default = names, default


@dataclasses.dataclass(frozen=True)
class Family:
  """A model family.

  Attributes:
    architecture: its class in transformers.
    keys: fields read from `config.json`, in addition to `COMMON_KEYS`.
    fixed: fields with the same value in all models of the family.
    supported: the only supported value of some `config.json` keys; also their default.
    has_window: whether the architecture has a `sliding_window`.
    needs_use_sliding_window: whether the window applies only with `use_sliding_window`.
    is_sliding: `(config.json, layer) -> bool`, which layers have the window by default
      (without `layer_types`); None if all have it.
    formats: expert quantization formats of its hub checkpoints.
    default_theta: RoPE base if `config.json` has none.
    requires_rope_scaling: whether `config.json` must specify RoPE scaling (because
      transformers scales by default).
  """

  architecture: str
  keys: dict[str, Key]
  fixed: dict[str, Any]
  supported: dict[str, Any] = dataclasses.field(default_factory=dict)
  has_window: bool = True
  needs_use_sliding_window: bool = False
  is_sliding: Callable[[dict[str, Any], int], bool] | None = None
  formats: tuple[str, ...] = ()
  default_theta: float = 1e4
  requires_rope_scaling: bool = False


COMMON_KEYS = {
  "vocab_size": Key("vocab_size"),
  "num_layers": Key("num_hidden_layers"),
  "d_model": Key("hidden_size"),
  "num_heads": Key("num_attention_heads"),
  "experts_per_token": Key("num_experts_per_tok"),
  "context_length": Key("max_position_embeddings"),
  "initializer_range": Key("initializer_range", default=0.02),
  "bos_token_id": Key("bos_token_id", default=None),
  "pad_token_id": Key("pad_token_id", default=None),
}
_EPSILON_5 = Key("rms_norm_eps", default=1e-5)
_EPSILON_6 = Key("rms_norm_eps", default=1e-6)
_EXPERTS = Key("num_experts", "num_local_experts")
_LOCAL_EXPERTS = Key("num_local_experts", "num_experts")
_HEAD_DIM = Key("head_dim", default=None)  # default: d_model / num_heads
_NORMALIZE = Key("norm_topk_prob", default=False)
_ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}

FAMILIES = {
  "olmoe": Family(
    "OlmoeForCausalLM",
    keys={
      "num_experts": _EXPERTS,
      "d_expert": Key("intermediate_size"),
      "normalize_gates": _NORMALIZE,
      "clip_qkv": Key("clip_qkv", default=None),
      "rms_norm_eps": _EPSILON_5,
    },
    fixed={"gates_in_model_dtype": True, "qk_norm": True},
    supported={"attention_bias": False},
    has_window=False,
  ),
  "mixtral": Family(
    "MixtralForCausalLM",
    keys={
      "num_experts": _LOCAL_EXPERTS,
      "d_expert": Key("intermediate_size"),
      "head_dim": _HEAD_DIM,
      "rms_norm_eps": _EPSILON_5,
    },
    fixed={"normalize_gates": True, "gates_in_model_dtype": False, "qk_norm": False},
    supported={"attention_bias": False},
    default_theta=1e6,
  ),
  "gpt_oss": Family(
    "GptOssForCausalLM",
    keys={
      "num_experts": _LOCAL_EXPERTS,
      "d_expert": Key("intermediate_size"),
      "head_dim": _HEAD_DIM,
      "rms_norm_eps": _EPSILON_5,
      "swiglu_limit": Key("swiglu_limit", default=7.0),
      "swiglu_alpha": Key("swiglu_alpha", default=1.702),
    },
    fixed={
      "normalize_gates": True,
      "gates_in_model_dtype": True,
      "qk_norm": False,
      "qkv_bias": True,
      "output_bias": True,
      "attention_sinks": True,
      "router_bias": True,
      "expert_bias": True,
      "norm_weight_in_float32": True,
    },
    supported={"attention_bias": True},
    is_sliding=lambda hf, layer: layer % 2 == 0,
    formats=("mxfp4",),
    default_theta=150000.0,
    requires_rope_scaling=True,
  ),
  "qwen2_moe": Family(
    "Qwen2MoeForCausalLM",
    keys={
      "num_experts": _EXPERTS,
      "d_expert": Key("moe_intermediate_size"),
      "d_shared_expert": Key("shared_expert_intermediate_size"),
      "normalize_gates": _NORMALIZE,
      "qkv_bias": Key("qkv_bias", default=True),
      "head_dim": _HEAD_DIM,
      "rms_norm_eps": _EPSILON_6,
    },
    fixed={"gates_in_model_dtype": True, "qk_norm": False},
    supported=_ALL_SPARSE,
    needs_use_sliding_window=True,
    is_sliding=lambda hf, layer: layer % 2 == 0 and layer < hf.get("max_window_layers", 28),
  ),
  "qwen3_moe": Family(
    "Qwen3MoeForCausalLM",
    keys={
      "num_experts": _EXPERTS,
      "d_expert": Key("moe_intermediate_size"),
      "normalize_gates": _NORMALIZE,
      "head_dim": _HEAD_DIM,
      "rms_norm_eps": _EPSILON_6,
    },
    fixed={"gates_in_model_dtype": True, "qk_norm": True, "qk_norm_per_head": True},
    supported={"attention_bias": False} | _ALL_SPARSE,
    needs_use_sliding_window=True,
  ),
}
_COMMON_SUPPORTED = {"hidden_act": "silu", "tie_word_embeddings": False}
_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}
# Fields with their own code below.
_SPECIAL = (
  "family",
  "num_kv_heads",
  "rope_theta",
  "rope_scaling",
  "sliding_window",
  "sliding_layers",
  "eos_token_ids",
  "expert_format",
  "dtype",
)


def from_hugging_face(hf: dict[str, Any], dtype: str | None = None) -> ModelConfig:
  """Converts the contents of a Hugging Face `config.json` to a `ModelConfig`.

  Reads both spellings of RoPE settings (`rope_theta` + `rope_scaling`, and the
  `rope_parameters` of transformers 5) and of `num_experts` / `num_local_experts`.

  Args:
    hf: the parsed `config.json`.
    dtype: dtype of the resulting config; by default the file's, with float16 (which this
      library does not compute in) replaced by float32.

  Raises:
    ValueError: an unknown architecture, a missing key, or an unsupported setting that
      would change results.
  """
  name = hf.get("model_type")
  if name not in FAMILIES:
    raise ValueError(
      f"unsupported architecture: config.json has model_type {name!r}; "
      f"supported: {', '.join(FAMILIES)}"
    )
  family = FAMILIES[name]
  for key, value in (_COMMON_SUPPORTED | family.supported).items():
    if hf.get(key) not in (None, value):
      _refuse(key, hf[key], value)
  values = {field: _read(name, hf, key) for field, key in (COMMON_KEYS | family.keys).items()}
  values |= {name: float(values[name]) for name in ("rms_norm_eps", "initializer_range")}
  values |= family.fixed
  if values.get("head_dim") is None:
    values["head_dim"] = hf.get("head_dim") or values["d_model"] // values["num_heads"]
  window, layers = _window(family, hf, values["num_layers"], values["context_length"])
  theta, scaling = _rope(name, hf, values["context_length"])
  eos = hf.get("eos_token_id")
  return ModelConfig(
    family=name,
    num_kv_heads=hf.get("num_key_value_heads") or values["num_heads"],
    sliding_window=window,
    sliding_layers=layers,
    rope_theta=theta,
    rope_scaling=scaling,
    eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,),
    expert_format=_expert_format(family, hf),
    dtype=dtype or _dtype(hf),
    **values,
  )


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
  """Returns the contents of a `config.json` with which transformers loads this model.

  Raises:
    ValueError: the family's `config.json` cannot express the config.
  """
  if config.family not in FAMILIES:
    raise ValueError(f"unknown model family {config.family!r}; known: {', '.join(FAMILIES)}")
  family = FAMILIES[config.family]
  keys = COMMON_KEYS | family.keys
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    fixed = family.fixed.get(field.name, field.default)
    if field.name == "head_dim" and "head_dim" not in keys:
      fixed = config.d_model // config.num_heads
    if field.name not in keys and field.name not in _SPECIAL and value != fixed:
      raise ValueError(
        f"{field.name} = {value} has no Hugging Face form: {config.family} models have {fixed}"
      )
  layers = range(config.num_layers)
  if config.sliding_window is not None and not (
    family.has_window and (family.is_sliding or config.sliding_layers == tuple(layers))
  ):
    raise ValueError(
      f"a sliding_window in layers {list(config.sliding_layers)} has no Hugging Face form: "
      f"{config.family} models have {'the same' if family.has_window else 'no'} sliding_window "
      "in all layers"
    )
  if config.expert_format is not None and config.expert_format not in family.formats:
    raise ValueError(
      f"experts in {config.expert_format} have no Hugging Face form in a {config.family} "
      "model: convert from the unquantized checkpoint"
    )
  hf = {"architectures": [family.architecture], "model_type": config.family}
  hf |= {key.names[0]: getattr(config, field) for field, key in keys.items()}
  eos = config.eos_token_ids
  hf |= {
    "num_key_value_heads": config.num_kv_heads,
    "rope_theta": config.rope_theta,
    "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
    "torch_dtype": config.dtype,
  }
  hf |= _COMMON_SUPPORTED | family.supported
  if config.rope_scaling is None:
    hf["rope_scaling"] = {"rope_type": "default"} if family.requires_rope_scaling else None
  else:
    yarn = config.rope_scaling
    hf["rope_scaling"] = {
      "rope_type": "yarn",
      "factor": yarn.factor,
      "original_max_position_embeddings": yarn.original_context,
      "beta_fast": yarn.beta_fast,
      "beta_slow": yarn.beta_slow,
      "truncate": yarn.truncate,
      "attention_factor": yarn.attention_factor,
    }
  if family.has_window:
    hf["sliding_window"] = config.sliding_window
    if family.needs_use_sliding_window:
      hf["use_sliding_window"] = config.sliding_window is not None
    if family.is_sliding:
      hf["layer_types"] = [
        "sliding_attention" if layer in config.sliding_layers else "full_attention"
        for layer in layers
      ]
  if config.expert_format == "mxfp4":
    hf["quantization_config"] = {
      "quant_method": "mxfp4",
      "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
      ],
    }
  return hf


def _refuse(name, value, supported):
  raise ValueError(
    f"unsupported setting in config.json: {name} = {value!r}; supported: {supported}"
  )


def _read(family, hf, key):
  for name in key.names:
    if hf.get(name) is not None:
      return hf[name]
  if key.default is _REQUIRED:
    raise ValueError(f"config.json of a {family} model lacks {' / '.join(key.names)}")
  return key.default


def _dtype(hf):
  name = hf.get("dtype") or hf.get("torch_dtype") or "float32"
  if name not in _DTYPES:
    _refuse("dtype", name, ", ".join(_DTYPES))
  return _DTYPES[name]


def _expert_format(family, hf):
  quantization = hf.get("quantization_config")
  if quantization is None:
    return None
  method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
  if method not in family.formats:
    _refuse(
      "quantization_config",
      method,
      ", ".join(family.formats) or "none: use the repository with unquantized weights",
    )
  return method


def _window(family, hf, num_layers, context_length):
  """Returns the window and the layers that have it."""
  window = hf.get("sliding_window")
  if (
    not window
    or window >= context_length
    or (family.needs_use_sliding_window and not hf.get("use_sliding_window", False))
  ):
    return None, ()
  if not family.has_window:
    _refuse("sliding_window", window, "null, or at least max_position_embeddings")
  layers, types = range(num_layers), hf.get("layer_types")
  if family.is_sliding and types is None:
    layers = [layer for layer in layers if family.is_sliding(hf, layer)]
  elif family.is_sliding:
    if len(types) != num_layers or set(types) - {"sliding_attention", "full_attention"}:
      _refuse("layer_types", types, f"{num_layers} times sliding_attention or full_attention")
    layers = [layer for layer, kind in enumerate(types) if kind == "sliding_attention"]
  return (window, tuple(layers)) if layers else (None, ())


def _rope(family, hf, context_length):
  """Returns the RoPE base and scaling."""
  rope = {
    "rope_theta": hf.get("rope_theta"),
    **(hf.get("rope_scaling") or {}),
    **(hf.get("rope_parameters") or {}),
  }
  if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor")) not in (None, 1, 1.0):
    _refuse("partial_rotary_factor", rope.get("partial_rotary_factor"), 1.0)
  if FAMILIES[family].requires_rope_scaling and len(rope) == 1:
    raise ValueError(f"config.json of a {family} model lacks rope_scaling / rope_parameters")
  theta = float(rope["rope_theta"] or FAMILIES[family].default_theta)
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return theta, None
  if kind != "yarn":
    _refuse("rope type", kind, "default (unscaled) and yarn")
  if not rope.get("factor"):
    raise ValueError(f"config.json of a {family} model has rope type yarn and no factor")
  factor = float(rope["factor"])

  def magnitude(scale):
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

  attention_factor = rope.get("attention_factor")
  if attention_factor is None:
    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    attention_factor = (
      magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
    )
  return theta, Yarn(
    factor=factor,
    original_context=rope.get("original_max_position_embeddings") or context_length,
    beta_fast=float(rope.get("beta_fast") or 32),
    beta_slow=float(rope.get("beta_slow") or 1),
    truncate=rope.get("truncate", True),
    attention_factor=float(attention_factor),
  )
