"""The architecture of a Mixture-of-Experts transformer as data.

`ModelConfig` says everything that the forward function needs to know about a
model; a Hugging Face `config.json` of a supported family is read into one with
`from_hugging_face`, and written from one with `to_hugging_face`.
"""

import dataclasses
import json
from typing import Any

FAMILIES = ("olmoe", "mixtral")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only MoE transformer.

  Sizes carry the axis letters used in shapes throughout the library.

  Attributes:
    family: which hub architecture this is, one of `FAMILIES`.
    vocab_size: V.
    num_layers: L; every layer has attention and an MoE block.
    d_model: D.
    num_heads: H, query heads.
    num_kv_heads: K, key/value heads; divides H.
    head_dim: C; even, for rotary embeddings.
    num_experts: E, per layer.
    experts_per_token: A, active experts per token.
    d_expert: F, inner width of one expert.
    context_length: longest sequence the model was made for, in tokens.
    normalize_gates: whether the gates of the chosen experts are scaled to sum
      to one (Mixtral; `norm_topk_prob`), or stay a softmax over all experts.
    gates_in_model_dtype: whether gates are rounded to `dtype` before use
      (OLMoE) or kept in float32 (Mixtral).
    qk_norm: RMSNorm over all heads of the queries and of the keys (OLMoE).
    clip_qkv: bound on the absolute value of queries, keys and values, or None.
    rope_theta: base of the rotary embedding.
    rms_norm_eps: added to the mean square in every RMSNorm.
    initializer_range: standard deviation of the initial weights.
    bos_token_id, pad_token_id: token ids, or None where the model has none.
    eos_token_ids: tokens that end a text.
    dtype: of parameters and activations, one of `DTYPES`.
  """

  family: str
  vocab_size: int
  num_layers: int
  d_model: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  num_experts: int
  experts_per_token: int
  d_expert: int
  context_length: int
  normalize_gates: bool
  gates_in_model_dtype: bool
  qk_norm: bool
  clip_qkv: float | None = None
  rope_theta: float = 10000.0
  rms_norm_eps: float = 1e-5
  initializer_range: float = 0.02
  bos_token_id: int | None = None
  pad_token_id: int | None = None
  eos_token_ids: tuple[int, ...] = ()
  dtype: str = "float32"

  def __post_init__(self):
    object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
    if self.family not in FAMILIES:
      raise ValueError(
          f"unknown model family {self.family!r}; supported: {', '.join(FAMILIES)}")
    if self.dtype not in DTYPES:
      raise ValueError(
          f"unsupported dtype {self.dtype!r}; choose one of {', '.join(DTYPES)}")
    for name in ("vocab_size", "num_layers", "d_model", "num_heads",
                 "num_kv_heads", "head_dim", "num_experts",
                 "experts_per_token", "d_expert", "context_length"):
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
          f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
          f"({self.num_kv_heads})")
    if self.head_dim % 2:
      raise ValueError(
          f"head_dim must be even for rotary embeddings, got {self.head_dim}")
    if self.experts_per_token > self.num_experts:
      raise ValueError(
          f"experts_per_token ({self.experts_per_token}) exceeds num_experts "
          f"({self.num_experts})")

  def replace(self, **changes) -> "ModelConfig":
    return dataclasses.replace(self, **changes)

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

  @classmethod
  def from_json(cls, text: str) -> "ModelConfig":
    """The config written by `to_json`.

    Raises:
      ValueError: not JSON, or keys missing or unknown.
    """
    try:
      values = json.loads(text)
    except json.JSONDecodeError as error:
      raise ValueError(f"the model config is not valid JSON: {error}") from error
    if not isinstance(values, dict):
      raise ValueError("the model config must be a JSON object")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    missing = sorted(
        name for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING)
    if unknown or missing:
      raise ValueError(
          f"the model config has unknown keys {unknown} and lacks {missing}")
    return cls(**values)


# What a family fixes beyond its config.json, with the config class's defaults
# for keys that hub files leave out.
_FAMILY_RULES = {
    "olmoe": dict(gates_in_model_dtype=True, qk_norm=True),
    "mixtral": dict(gates_in_model_dtype=False, qk_norm=False),
}
_HF_ARCHITECTURES = {
    "olmoe": "OlmoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
_HF_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}


def from_hugging_face(hf: dict[str, Any], dtype: str | None = None) -> ModelConfig:
  """A `ModelConfig` from the contents of a Hugging Face `config.json`.

  Both spellings of the RoPE settings are read (`rope_theta` + `rope_scaling`,
  and the `rope_parameters` of transformers 5), and the aliases
  `num_experts` / `num_local_experts`.

  Args:
    hf: the parsed `config.json`.
    dtype: of the resulting config; by default what the file names (float16,
      which this library does not compute in, becomes float32).

  Raises:
    ValueError: an unknown architecture, a missing key, or a setting that
      changes results and is not supported.
  """
  family = hf.get("model_type")
  if family not in FAMILIES:
    raise ValueError(
        f"unsupported architecture: config.json has model_type {family!r}; "
        f"supported: {', '.join(FAMILIES)}")

  def need(*names):
    for name in names:
      if hf.get(name) is not None:
        return hf[name]
    raise ValueError(f"config.json of a {family} model lacks {' / '.join(names)}")

  def refuse(name, value, supported):
    raise ValueError(
        f"unsupported setting in config.json: {name} = {value!r}; "
        f"supported: {supported}")

  rope = {"rope_theta": hf.get("rope_theta"), **(hf.get("rope_scaling") or {}),
          **(hf.get("rope_parameters") or {})}
  rope_type = rope.get("rope_type", rope.get("type", "default"))
  if rope_type != "default":
    refuse("rope type", rope_type, "default (unscaled) rotary embeddings")
  for name, supported in (("hidden_act", "silu"), ("tie_word_embeddings", False),
                          ("attention_bias", False), ("quantization_config", None)):
    if hf.get(name, supported) != supported:
      refuse(name, hf[name], supported)
  if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor")) not in (None, 1, 1.0):
    refuse("partial_rotary_factor", rope.get("partial_rotary_factor"), 1.0)

  context_length = need("max_position_embeddings")
  window = hf.get("sliding_window")
  if window is not None and window < context_length:
    refuse("sliding_window", window, "null, or at least max_position_embeddings")
  num_heads = need("num_attention_heads")
  d_model = need("hidden_size")
  eos = hf.get("eos_token_id")
  eos = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
  if dtype is None:
    name = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    if name not in _HF_DTYPES:
      refuse("dtype", name, ", ".join(_HF_DTYPES))
    dtype = _HF_DTYPES[name]
  return ModelConfig(
      family=family,
      vocab_size=need("vocab_size"),
      num_layers=need("num_hidden_layers"),
      d_model=d_model,
      num_heads=num_heads,
      num_kv_heads=hf.get("num_key_value_heads") or num_heads,
      head_dim=hf.get("head_dim") or d_model // num_heads,
      num_experts=need("num_experts", "num_local_experts"),
      experts_per_token=need("num_experts_per_tok"),
      d_expert=need("intermediate_size"),
      context_length=context_length,
      normalize_gates=family == "mixtral" or bool(hf.get("norm_topk_prob", False)),
      clip_qkv=hf.get("clip_qkv") if family == "olmoe" else None,
      rope_theta=float(rope["rope_theta"] or 1e4),
      rms_norm_eps=float(hf.get("rms_norm_eps") or 1e-5),
      initializer_range=float(hf.get("initializer_range") or 0.02),
      bos_token_id=hf.get("bos_token_id"),
      pad_token_id=hf.get("pad_token_id"),
      eos_token_ids=eos,
      dtype=dtype,
      **_FAMILY_RULES[family],
  )


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
  """The contents of a `config.json` that transformers reads as this model.

  Raises:
    ValueError: the config differs from what its family can express.
  """
  for name, value in _FAMILY_RULES[config.family].items():
    if getattr(config, name) != value:
      raise ValueError(
          f"a {config.family} model has {name} = {value}, this config has "
          f"{getattr(config, name)}: it has no Hugging Face form")
  hf = {
      "architectures": [_HF_ARCHITECTURES[config.family]],
      "model_type": config.family,
      "vocab_size": config.vocab_size,
      "hidden_size": config.d_model,
      "intermediate_size": config.d_expert,
      "num_hidden_layers": config.num_layers,
      "num_attention_heads": config.num_heads,
      "num_key_value_heads": config.num_kv_heads,
      "num_experts_per_tok": config.experts_per_token,
      "max_position_embeddings": config.context_length,
      "rms_norm_eps": config.rms_norm_eps,
      "initializer_range": config.initializer_range,
      "rope_theta": config.rope_theta,
      "hidden_act": "silu",
      "tie_word_embeddings": False,
      "bos_token_id": config.bos_token_id,
      "pad_token_id": config.pad_token_id,
      "eos_token_id": (config.eos_token_ids[0] if len(config.eos_token_ids) == 1
                       else list(config.eos_token_ids) or None),
      "torch_dtype": config.dtype,
  }
  if config.family == "olmoe":
    if config.head_dim * config.num_heads != config.d_model:
      raise ValueError("an olmoe config.json has no head_dim: it must be d_model / num_heads")
    hf |= {"num_experts": config.num_experts, "norm_topk_prob": config.normalize_gates,
           "clip_qkv": config.clip_qkv, "attention_bias": False}
  else:
    if not config.normalize_gates or config.clip_qkv is not None:
      raise ValueError("a mixtral model normalises its gates and has no clip_qkv")
    hf |= {"num_local_experts": config.num_experts, "head_dim": config.head_dim,
           "sliding_window": None}
  return hf


# The published sizes, for dry runs, benchmarks with random weights and memory
# arithmetic; the numbers are those of the models' public config.json files.
PRESETS = {
    "olmoe-1b-7b": ModelConfig(
        family="olmoe", vocab_size=50304, num_layers=16, d_model=2048,
        num_heads=16, num_kv_heads=16, head_dim=128, num_experts=64,
        experts_per_token=8, d_expert=1024, context_length=4096,
        normalize_gates=False, gates_in_model_dtype=True, qk_norm=True,
        pad_token_id=1, eos_token_ids=(50279,), dtype="bfloat16"),
    "mixtral-8x7b": ModelConfig(
        family="mixtral", vocab_size=32000, num_layers=32, d_model=4096,
        num_heads=32, num_kv_heads=8, head_dim=128, num_experts=8,
        experts_per_token=2, d_expert=14336, context_length=32768,
        normalize_gates=True, gates_in_model_dtype=False, qk_norm=False,
        rope_theta=1e6, bos_token_id=1, eos_token_ids=(2,), dtype="bfloat16"),
    "mixtral-8x22b": ModelConfig(
        family="mixtral", vocab_size=32768, num_layers=56, d_model=6144,
        num_heads=48, num_kv_heads=8, head_dim=128, num_experts=8,
        experts_per_token=2, d_expert=16384, context_length=65536,
        normalize_gates=True, gates_in_model_dtype=False, qk_norm=False,
        rope_theta=1e6, bos_token_id=1, eos_token_ids=(2,), dtype="bfloat16"),
}
