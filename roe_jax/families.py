"""Model families on the Hugging Face hub: `config.json` to `ModelConfig` and back.

`family_table` has what the library knows about each family; tensor names are in
`checkpoints_convert.tensor_rules`.
"""

import dataclasses
import math
from typing import Any

from roe_jax import config as config_lib
from roe_jax import rope, typed
from roe_jax.config import ModelConfig
from roe_jax.family_table import COMMON_KEYS, FAMILIES

_COMMON_DEFAULTS = {
  "rms_norm_eps": 1e-5,
  "rope_theta": 1e4,
  "initializer_range": 0.02,
  "bos_token_id": None,
  "pad_token_id": None,
  "eos_token_id": None,
  "sliding_window": None,
  "tie_word_embeddings": False,
}
# Keys whose value may be null; a null elsewhere counts as a missing key.
_NULLABLE = (
  "bos_token_id",
  "pad_token_id",
  "eos_token_id",
  "sliding_window",
  "num_key_value_heads",
  "head_dim",
  "q_lora_rank",
)
_EXPERT_COUNTS = ("num_experts", "num_local_experts")  # some files have the other name
_COMMON_SUPPORTED = {"hidden_act": "silu"}
_ROPE_KEYS = {"original_context": "original_max_position_embeddings"}
_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}
# Fields with their own code below.
_SPECIAL = (
  "family",
  "rope_scaling",
  "rotary_dim",
  "sliding_window",
  "sliding_layers",
  "eos_token_ids",
  "expert_format",
  "projection_format",
  "tiny_init",  # of initial weights only
  "dtype",
)


def from_hugging_face(hf: dict[str, Any], dtype: str | None = None) -> ModelConfig:
  """Converts the contents of a Hugging Face `config.json` to a `ModelConfig`.

  Reads both spellings of RoPE settings (`rope_theta` + `rope_scaling`, and the
  `rope_parameters` of transformers 5) and of `num_experts` / `num_local_experts`. Missing keys
  have the defaults of transformers. Tied embeddings become two equal arrays.

  Args:
    hf: the parsed `config.json`.
    dtype: dtype of the resulting config; by default the file's, with float16 (which this
      library does not compute in) replaced by float32.

  Raises:
    ValueError: an unknown architecture, an unsupported setting that would change results, or a
      value of a wrong type.
  """
  try:
    return _from_hugging_face(hf, dtype)
  except (TypeError, AttributeError, ArithmeticError) as error:
    raise ValueError(f"config.json has an impossible value: {error}") from error


def _from_hugging_face(hf, dtype):
  name = given = hf.get("model_type")
  for family, entry in FAMILIES.items():
    if given in entry.other_types and [entry.architecture] == hf.get("architectures"):
      name = family
  if not isinstance(name, str) or name not in FAMILIES:
    raise ValueError(
      f"unsupported architecture: config.json has model_type {name!r}; "
      f"supported: {', '.join(FAMILIES)}"
    )
  family = FAMILIES[name]
  keys = COMMON_KEYS | family.keys
  if count := keys.get("num_experts"):
    counts = [hf[key] for key in (count, *_EXPERT_COUNTS) if hf.get(key) is not None]
    hf = hf | {count: counts[0]} if counts else hf
  given = {key: value for key, value in hf.items() if value is not None or key in _NULLABLE}
  hf = _COMMON_DEFAULTS | family.defaults | given
  for key, value in (_COMMON_SUPPORTED | family.supported).items():
    if hf.get(key, value) != value:
      _refuse(key, hf[key], value)
  hf = family.read(hf)
  values: dict[str, Any] = {field: hf.get(key) for field, key in keys.items()}
  for field, key in keys.items():
    if values[field] is not None or key not in _NULLABLE:
      hint = typed.hints(ModelConfig)[field]
      typed.check(f"config.json: {key}", values[field], hint)
      values[field] = float(values[field]) if hint is float else values[field]
    if field in config_lib.MAXIMUM and values[field] > config_lib.MAXIMUM[field]:
      raise ValueError(
        f"config.json: {key} must be at most {config_lib.MAXIMUM[field]}, got {values[field]}"
      )
  if (values["pad_token_id"] or 0) < 0:  # old configs mean that there is none
    values["pad_token_id"] = None
  values |= family.fixed
  typed.check("config.json: head_dim", hf.get("head_dim"), int | None)
  values["head_dim"] = hf.get("head_dim") or values["d_model"] // max(values["num_heads"], 1)
  if values["num_kv_heads"] is None:
    values["num_kv_heads"] = values["num_heads"]
  for key in ("tie_word_embeddings", "use_sliding_window"):
    typed.check(f"config.json: {key}", hf.get(key), bool | None)
  window, layers = _window(family, hf, values["num_layers"], values["context_length"])
  values["rope_theta"], scaling = _rope(name, hf)
  if "rotary_dim" not in keys:
    values["rotary_dim"] = _rotary_dim(family, hf, values["head_dim"])
  eos = hf["eos_token_id"]
  return ModelConfig(
    family=name,
    sliding_window=window,
    sliding_layers=layers,
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
  if config.projection_format is not None:
    raise ValueError(
      f"projections in {config.projection_format} have no Hugging Face form: convert from the "
      "unquantized checkpoint"
    )
  hf = {"architectures": [family.architecture], "model_type": config.family}
  for field, key in keys.items():
    value = getattr(config, field)
    if field == "attention_multiplier" and value is None:
      value = config.head_dim**-0.5
    if hf.setdefault(key, value) != value:
      raise ValueError(
        f"{field} = {value} has no Hugging Face form: {config.family} models have one {key}, and "
        f"another field is {hf[key]}"
      )
  if config.rotary_dim is not None and not (family.has_partial_rotary or "rotary_dim" in keys):
    raise ValueError(
      f"rotary_dim = {config.rotary_dim} has no Hugging Face form: {config.family} models rotate "
      "all dimensions of a head"
    )
  if family.has_partial_rotary:
    hf["partial_rotary_factor"] = (config.rotary_dim or config.head_dim) / config.head_dim
  eos = config.eos_token_ids
  hf |= {
    "tie_word_embeddings": False,
    "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
    "torch_dtype": config.dtype,
  }
  hf |= _COMMON_SUPPORTED | family.supported
  if config.rope_scaling is None:
    # The family's default may be a scaling.
    hf["rope_scaling"] = {"rope_type": "default"} if "rope_parameters" in family.defaults else None
  else:
    fields = dataclasses.asdict(config.rope_scaling)
    named = {
      _ROPE_KEYS.get(name, name): value
      for name, value in fields.items()
      if name != "mscale_all_dim" or value
    }
    hf["rope_scaling"] = {"rope_type": config.rope_scaling.kind} | named
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
  return family.write(hf)


def _refuse(name, value, supported):
  raise ValueError(
    f"unsupported setting in config.json: {name} = {value!r}; supported: {supported}"
  )


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
  window = hf["sliding_window"]
  typed.check("config.json: sliding_window", window, int | None)
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


def _rope(family, hf):
  """Returns the RoPE base and scaling, from the keys that transformers uses if there are several.

  transformers ignores `rope_parameters` if there is `rope_scaling`, and
  `original_max_position_embeddings` in either if the same key is outside, too.
  """
  settings = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
  typed.check("config.json: its RoPE settings", settings, dict)
  if any(isinstance(value, dict) for value in settings.values()):
    _refuse("rope_parameters", settings, "the same for all layers")
  theta = settings.get("rope_theta")
  theta = hf["rope_theta"] if theta is None else theta
  typed.check("config.json: rope_theta", theta, float)
  theta = float(theta)
  kind = settings.get("rope_type") or settings.get("type", "default")
  if kind == "default":
    return theta, None
  if kind not in rope.SCALINGS:
    _refuse("rope type", kind, f"default (unscaled), {', '.join(rope.SCALINGS)}")
  names = [field.name for field in dataclasses.fields(rope.SCALINGS[kind])]
  context = hf["max_position_embeddings"]
  original = (
    hf.get("original_max_position_embeddings")
    or settings.get("original_max_position_embeddings")
    or context
  )
  values = {"original_context": original} | settings
  if kind == rope.Yarn.kind and "factor" in settings:
    values |= _yarn(settings, context / original)
    # Other families take only the factor on cosines and sines from it.
    scale = settings.get("mscale_all_dim") if "kv_lora_rank" in FAMILIES[family].keys else None
    values["mscale_all_dim"] = scale or 0.0
  if missing := [name for name in names if values.get(name) is None]:
    raise ValueError(
      f"config.json of a {family} model has rope type {kind} and no {', '.join(missing)}"
    )
  fields: dict[str, Any] = {}
  for field, hint in typed.hints(rope.SCALINGS[kind]).items():
    if field in names:
      typed.check(f"config.json: {field} of its RoPE settings", values[field], hint)
      fields[field] = float(values[field]) if hint is float else values[field]
  return theta, rope.SCALINGS[kind](**fields)


def _rotary_dim(family, hf, head_dim):
  """Returns how many dimensions of a head are rotated, or None for all."""
  settings = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
  partial = settings.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
  typed.check("config.json: partial_rotary_factor", partial, float | None)
  if partial in (None, 1):
    return None
  if not family.has_partial_rotary:
    _refuse("partial_rotary_factor", partial, 1.0)
  return int(head_dim * partial)


def _yarn(settings, implied_factor):
  """Returns the fields of YaRN that have defaults."""
  numbers = ("factor", "attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
  for name in numbers:
    typed.check(f"config.json: {name} of its RoPE settings", settings.get(name), float | None)
  factor = float(implied_factor if settings["factor"] is None else settings["factor"])

  def magnitude(scale):
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

  attention_factor = settings.get("attention_factor")
  if attention_factor is None:
    mscale, mscale_all = settings.get("mscale"), settings.get("mscale_all_dim")
    attention_factor = (
      magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
    )
  return {
    "factor": factor,
    "beta_fast": settings.get("beta_fast") or 32,
    "beta_slow": settings.get("beta_slow") or 1,
    "truncate": settings.get("truncate", True),
    "attention_factor": attention_factor,
  }
