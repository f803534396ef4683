"""The table of model families: which keys of `config.json` each has, and what is fixed.

An entry of `FAMILIES` is all that the library knows about a family beyond its `ModelConfig`.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from roe_jax.routers import NONE, SIGMOID


@dataclasses.dataclass(frozen=True)
class Family:
  """A model family.

  Attributes:
    architecture: its class in transformers.
    defaults: keys of `config.json` with the values that transformers assumes for missing ones.
    keys: the key of each `ModelConfig` field that is read, in addition to `COMMON_KEYS`.
    fixed: fields with the same value in all models of the family.
    supported: the only supported value of some `config.json` keys; also their default.
    has_window: whether the architecture has a `sliding_window`.
    needs_use_sliding_window: whether the window applies only with `use_sliding_window`.
    is_sliding: `(config.json, layer) -> bool`, which layers have the window by default
      (without `layer_types`); None if all have it.
    formats: expert quantization formats of its hub checkpoints.
    has_partial_rotary: whether the architecture has a `partial_rotary_factor`.
    other_types: further values of `model_type`, that of other architectures, too.
    read, write: where keys do not correspond to fields one by one, map `config.json` to one where
      they do, and back.
  """

  architecture: str
  defaults: dict[str, Any]
  keys: dict[str, str]
  fixed: dict[str, Any]
  supported: dict[str, Any] = dataclasses.field(default_factory=dict)
  has_window: bool = True
  needs_use_sliding_window: bool = False
  is_sliding: Callable[[dict[str, Any], int], bool] | None = None
  formats: tuple[str, ...] = ()
  has_partial_rotary: bool = False
  other_types: tuple[str, ...] = ()
  read: Callable[[dict[str, Any]], dict[str, Any]] = lambda hf: hf
  write: Callable[[dict[str, Any]], dict[str, Any]] = lambda hf: hf


COMMON_KEYS = {
  "vocab_size": "vocab_size",
  "num_layers": "num_hidden_layers",
  "d_model": "hidden_size",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "context_length": "max_position_embeddings",
  "rms_norm_eps": "rms_norm_eps",
  "rope_theta": "rope_theta",
  "initializer_range": "initializer_range",
  "bos_token_id": "bos_token_id",
  "pad_token_id": "pad_token_id",
}
_EXPERTS = {"num_experts": "num_experts", "experts_per_token": "num_experts_per_tok"}
_LOCAL_EXPERTS = _EXPERTS | {"num_experts": "num_local_experts"}
# One key for both.
_ATTENTION_BIAS = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}
_ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}
# A dense model is one expert per layer.
_MULTIPLIERS = (
  "embedding_multiplier",
  "attention_multiplier",
  "residual_multiplier",
  "logits_scaling",
)
_DENSE = {
  "num_experts": 1,
  "experts_per_token": 1,
  "router": NONE,
  "unit_gates": True,
  "normalize_gates": False,
  "gates_in_model_dtype": False,
}

_QWEN_DEFAULTS = {
  "vocab_size": 151936,
  "hidden_size": 4096,
  "intermediate_size": 22016,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
  "num_key_value_heads": 32,
  "max_position_embeddings": 32768,
  "rms_norm_eps": 1e-6,
  "sliding_window": 4096,
  "max_window_layers": 28,
}


_GRANITE: dict[str, Any] = {
  "defaults": {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
  }
  | dict.fromkeys(_MULTIPLIERS, 1.0),
  "keys": {
    **_LOCAL_EXPERTS,
    **_ATTENTION_BIAS,
    **dict(zip(_MULTIPLIERS, _MULTIPLIERS)),
    "d_expert": "intermediate_size",
    "head_dim": "head_dim",
  },
  "fixed": {"normalize_gates": True, "gates_in_model_dtype": True, "qk_norm": False},
  "has_window": False,
}


def _above_max_window_layers(hf, layer):
  return layer >= hf["max_window_layers"]


def _without_shared_expert(hf):
  """Counts the experts of an EMO model without the shared one."""
  shared = hf["num_shared_experts"]
  if shared not in (0, 1):
    raise ValueError(
      f"unsupported setting in config.json: num_shared_experts = {shared!r}; supported: 0 and 1, "
      "since the weights of several are their own softmax"
    )
  return hf | {
    "num_experts": hf["num_experts"] - shared,
    "num_experts_per_tok": hf["num_experts_per_tok"] - shared,
    "shared_expert_intermediate_size": shared * hf["intermediate_size"],
  }


def _with_shared_expert(hf):
  width = hf.pop("shared_expert_intermediate_size")
  if width not in (0, hf["intermediate_size"]):
    raise ValueError(
      f"d_shared_expert = {width} has no Hugging Face form: that of emo models is 0 or d_expert "
      f"({hf['intermediate_size']})"
    )
  shared = int(width > 0)
  return hf | {
    "num_experts": hf["num_experts"] + shared,
    "num_experts_per_tok": hf["num_experts_per_tok"] + shared,
    "num_shared_experts": shared,
  }


def _with_widths(shared: str, hf: dict[str, Any]) -> dict[str, Any]:
  """Adds the widths that DeepSeek-V3's config gives by numbers; `shared` is that of experts."""
  return hf | {
    "shared_width": hf[shared] * hf["moe_intermediate_size"],
    "dense_width": hf["intermediate_size"] if hf["first_k_dense_replace"] else 0,
  }


def _with_counts(shared: str, hf: dict[str, Any]) -> dict[str, Any]:
  """Undoes `_with_widths`."""
  count, rest = divmod(hf.pop("shared_width"), hf["moe_intermediate_size"])
  if rest:
    raise ValueError(
      "d_shared_expert has no Hugging Face form: it must be a multiple of d_expert "
      f"({hf['moe_intermediate_size']})"
    )
  dense = hf.pop("dense_width") or hf["moe_intermediate_size"]
  return hf | {shared: count, "intermediate_size": dense}


def _read_bailing(hf):
  width = hf["moe_intermediate_size"]
  if hf.get("moe_shared_expert_intermediate_size") not in (None, width):
    raise ValueError(
      "unsupported setting in config.json: moe_shared_expert_intermediate_size = "
      f"{hf['moe_shared_expert_intermediate_size']!r}; supported: moe_intermediate_size ({width})"
    )
  # A single expert's gate is not normalized, whatever norm_topk_prob says.
  return _with_widths("num_shared_experts", hf) | {"norm_topk_prob": hf["num_experts_per_tok"] > 1}


_DEEPSEEK_KEYS = {
  "num_experts": "n_routed_experts",
  "experts_per_token": "num_experts_per_tok",
  "d_expert": "moe_intermediate_size",
  "d_shared_expert": "shared_width",
  "first_dense_layers": "first_k_dense_replace",
  "d_dense": "dense_width",
  "normalize_gates": "norm_topk_prob",
  "gate_multiplier": "routed_scaling_factor",
  "expert_groups": "n_group",
  "groups_per_token": "topk_group",
  "head_dim": "head_dim",
}
_DEEPSEEK_FIXED = {
  "router": SIGMOID,
  "correction_bias": True,
  "gates_in_model_dtype": False,
  "shared_expert_gate": False,
  "qk_norm_per_head": True,
}
_DEEPSEEK_SHARED: dict[str, Any] = {
  "read": functools.partial(_with_widths, "n_shared_experts"),
  "write": functools.partial(_with_counts, "n_shared_experts"),
}

FAMILIES = {
  "olmoe": Family(
    "OlmoeForCausalLM",
    defaults={
      "vocab_size": 50304,
      "hidden_size": 2048,
      "intermediate_size": 2048,
      "num_hidden_layers": 16,
      "num_attention_heads": 16,
      "max_position_embeddings": 4096,
      "num_experts": 64,
      "num_experts_per_tok": 8,
      "norm_topk_prob": False,
      "clip_qkv": None,
      "pad_token_id": 1,
      "eos_token_id": 50279,
    },
    keys={
      **_EXPERTS,
      "d_expert": "intermediate_size",
      "normalize_gates": "norm_topk_prob",
      "clip_qkv": "clip_qkv",
    },
    fixed={"gates_in_model_dtype": True, "qk_norm": True},
    supported={"attention_bias": False},
    has_window=False,
  ),
  # As published in github.com/allenai/EMO (src/vllm_plugin/emo_plugin.py); not in transformers.
  "emo": Family(
    "EmoForCausalLM",
    defaults={
      "vocab_size": 100352,
      "hidden_size": 2048,
      "intermediate_size": 1024,
      "num_hidden_layers": 16,
      "num_attention_heads": 16,
      "max_position_embeddings": 4096,
      "num_experts": 128,
      "num_experts_per_tok": 8,
      "num_shared_experts": 0,
      "attention_bias": False,
      "rms_norm_eps": 1e-6,
      "rope_theta": 5e5,
      "pad_token_id": 100277,
      "eos_token_id": 100257,
    },
    keys={
      **_EXPERTS,
      **_ATTENTION_BIAS,
      "d_expert": "intermediate_size",
      "d_shared_expert": "shared_expert_intermediate_size",
    },
    fixed={
      "normalize_gates": False,
      "gates_in_model_dtype": False,
      "qk_norm": False,
      "shared_expert_gate": False,
    },
    supported={"norm_topk_prob": False}
    | dict.fromkeys(
      (
        "always_active_experts",
        "dense_intermediate_size",
        "num_experts_per_layer",
        "num_shared_experts_per_layer",
      )
    ),
    has_window=False,
    read=_without_shared_expert,
    write=_with_shared_expert,
  ),
  "mixtral": Family(
    "MixtralForCausalLM",
    defaults={
      "vocab_size": 32000,
      "hidden_size": 4096,
      "intermediate_size": 14336,
      "num_hidden_layers": 32,
      "num_attention_heads": 32,
      "num_key_value_heads": 8,
      "max_position_embeddings": 131072,
      "num_local_experts": 8,
      "num_experts_per_tok": 2,
      "rope_theta": 1e6,
      "bos_token_id": 1,
      "eos_token_id": 2,
    },
    keys={**_LOCAL_EXPERTS, "d_expert": "intermediate_size", "head_dim": "head_dim"},
    fixed={"normalize_gates": True, "gates_in_model_dtype": False, "qk_norm": False},
    supported={"attention_bias": False},
  ),
  "gpt_oss": Family(
    "GptOssForCausalLM",
    defaults={
      "vocab_size": 201088,
      "hidden_size": 2880,
      "intermediate_size": 2880,
      "num_hidden_layers": 36,
      "num_attention_heads": 64,
      "num_key_value_heads": 8,
      "head_dim": 64,
      "max_position_embeddings": 131072,
      "num_local_experts": 128,
      "num_experts_per_tok": 4,
      "swiglu_limit": 7.0,
      "swiglu_alpha": 1.702,
      "sliding_window": 128,
      "rope_theta": 150000.0,
      "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
      },
    },
    keys={
      **_LOCAL_EXPERTS,
      "d_expert": "intermediate_size",
      "head_dim": "head_dim",
      "swiglu_limit": "swiglu_limit",
      "swiglu_alpha": "swiglu_alpha",
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
  ),
  "qwen2_moe": Family(
    "Qwen2MoeForCausalLM",
    defaults={
      "vocab_size": 151936,
      "hidden_size": 2048,
      "moe_intermediate_size": 1408,
      "shared_expert_intermediate_size": 5632,
      "num_hidden_layers": 24,
      "num_attention_heads": 16,
      "num_key_value_heads": 16,
      "max_position_embeddings": 32768,
      "num_experts": 60,
      "num_experts_per_tok": 4,
      "norm_topk_prob": False,
      "qkv_bias": True,
      "rms_norm_eps": 1e-6,
      "sliding_window": 4096,
      "max_window_layers": 28,
    },
    keys={
      **_EXPERTS,
      "d_expert": "moe_intermediate_size",
      "d_shared_expert": "shared_expert_intermediate_size",
      "normalize_gates": "norm_topk_prob",
      "qkv_bias": "qkv_bias",
      "head_dim": "head_dim",
    },
    fixed={"gates_in_model_dtype": True, "qk_norm": False},
    supported=_ALL_SPARSE,
    needs_use_sliding_window=True,
    is_sliding=lambda hf, layer: layer % 2 == 0 and layer < hf["max_window_layers"],
  ),
  "qwen3_moe": Family(
    "Qwen3MoeForCausalLM",
    defaults={
      "vocab_size": 151936,
      "hidden_size": 2048,
      "moe_intermediate_size": 768,
      "num_hidden_layers": 24,
      "num_attention_heads": 32,
      "num_key_value_heads": 4,
      "max_position_embeddings": 32768,
      "num_experts": 128,
      "num_experts_per_tok": 8,
      "norm_topk_prob": False,
      "rms_norm_eps": 1e-6,
      "sliding_window": 4096,
    },
    keys={
      **_EXPERTS,
      "d_expert": "moe_intermediate_size",
      "normalize_gates": "norm_topk_prob",
      "head_dim": "head_dim",
    },
    fixed={"gates_in_model_dtype": True, "qk_norm": True, "qk_norm_per_head": True},
    supported={"attention_bias": False} | _ALL_SPARSE,
    needs_use_sliding_window=True,
  ),
  "glm4_moe": Family(
    "Glm4MoeForCausalLM",
    defaults={
      "vocab_size": 151552,
      "hidden_size": 4096,
      "intermediate_size": 10944,
      "moe_intermediate_size": 1408,
      "num_hidden_layers": 46,
      "num_attention_heads": 96,
      "num_key_value_heads": 8,
      "max_position_embeddings": 131072,
      "n_routed_experts": 128,
      "n_shared_experts": 1,
      "num_experts_per_tok": 8,
      "norm_topk_prob": True,
      "routed_scaling_factor": 1.0,
      "n_group": 1,
      "topk_group": 1,
      "first_k_dense_replace": 1,
      "use_qk_norm": False,
      "attention_bias": False,
      "partial_rotary_factor": 0.5,
    },
    keys=_DEEPSEEK_KEYS | {"qkv_bias": "attention_bias", "qk_norm": "use_qk_norm"},
    fixed=_DEEPSEEK_FIXED,
    has_window=False,
    has_partial_rotary=True,
    **_DEEPSEEK_SHARED,
  ),
  "dots1": Family(
    "Dots1ForCausalLM",
    defaults={
      "vocab_size": 152064,
      "hidden_size": 4608,
      "intermediate_size": 10944,
      "moe_intermediate_size": 1408,
      "num_hidden_layers": 62,
      "num_attention_heads": 32,
      "num_key_value_heads": 32,
      "max_position_embeddings": 2048,
      "n_shared_experts": 0,
      "norm_topk_prob": False,
      "routed_scaling_factor": 1.0,
      "n_group": 1,
      "topk_group": 1,
      "first_k_dense_replace": 0,
      "attention_bias": False,
      "rms_norm_eps": 1e-6,
      "sliding_window": 4096,
      "max_window_layers": 62,
    },
    keys=_DEEPSEEK_KEYS | _ATTENTION_BIAS,
    fixed=_DEEPSEEK_FIXED | {"qk_norm": True},
    is_sliding=_above_max_window_layers,
    **_DEEPSEEK_SHARED,
  ),
  # As published in github.com/inclusionAI/Ling-V2 (models/); not in transformers.
  "bailing_moe_v2": Family(
    "BailingMoeV2ForCausalLM",
    defaults={
      "vocab_size": 157184,
      "hidden_size": 2048,
      "intermediate_size": 5120,
      "moe_intermediate_size": 512,
      "num_hidden_layers": 20,
      "num_attention_heads": 16,
      "num_key_value_heads": 4,
      "head_dim": 128,
      "max_position_embeddings": 32768,
      "num_experts": 256,
      "num_shared_experts": 1,
      "num_experts_per_tok": 8,
      "routed_scaling_factor": 1.0,
      "n_group": 8,
      "topk_group": 4,
      "first_k_dense_replace": 1,
      "use_qk_norm": True,
      "use_qkv_bias": False,
      "use_bias": False,
      "rms_norm_eps": 1e-6,
      "rope_theta": 6e5,
      "pad_token_id": 156892,
      "eos_token_id": 156892,
    },
    keys=_DEEPSEEK_KEYS
    | {
      "num_experts": "num_experts",
      "qk_norm": "use_qk_norm",
      "qkv_bias": "use_qkv_bias",
      "output_bias": "use_bias",
    },
    fixed=_DEEPSEEK_FIXED,
    supported={"score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    has_window=False,
    has_partial_rotary=True,
    other_types=("bailing_moe",),  # Ling-mini-2.0's own, and that of the first Ling models
    read=_read_bailing,
    write=functools.partial(_with_counts, "num_shared_experts"),
  ),
  "granitemoe": Family("GraniteMoeForCausalLM", **_GRANITE),
  "granitemoeshared": Family(
    "GraniteMoeSharedForCausalLM",
    defaults=_GRANITE["defaults"] | {"shared_intermediate_size": 0},
    keys=_GRANITE["keys"] | {"d_shared_expert": "shared_intermediate_size"},
    fixed=_GRANITE["fixed"] | {"shared_expert_gate": False},
    has_window=False,
  ),
  "llama": Family(
    "LlamaForCausalLM",
    defaults={
      "vocab_size": 32000,
      "hidden_size": 4096,
      "intermediate_size": 11008,
      "num_hidden_layers": 32,
      "num_attention_heads": 32,
      "max_position_embeddings": 2048,
      "rms_norm_eps": 1e-6,
      "attention_bias": False,
      "mlp_bias": False,
      "bos_token_id": 1,
      "eos_token_id": 2,
    },
    keys={
      "d_expert": "intermediate_size",
      "head_dim": "head_dim",
      **_ATTENTION_BIAS,
      "expert_bias": "mlp_bias",
    },
    fixed=_DENSE | {"qk_norm": False},
    has_window=False,
  ),
  "mistral": Family(
    "MistralForCausalLM",
    defaults={
      "vocab_size": 32000,
      "hidden_size": 4096,
      "intermediate_size": 14336,
      "num_hidden_layers": 32,
      "num_attention_heads": 32,
      "num_key_value_heads": 8,
      "max_position_embeddings": 131072,
      "rms_norm_eps": 1e-6,
      "sliding_window": 4096,
      "bos_token_id": 1,
      "eos_token_id": 2,
    },
    keys={"d_expert": "intermediate_size", "head_dim": "head_dim"},
    fixed=_DENSE | {"qk_norm": False},
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM",
    defaults=_QWEN_DEFAULTS,
    keys={"d_expert": "intermediate_size", "head_dim": "head_dim"},
    fixed=_DENSE | {"qk_norm": False, "qkv_bias": True},
    needs_use_sliding_window=True,
    is_sliding=_above_max_window_layers,
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    defaults=_QWEN_DEFAULTS | {"head_dim": 128, "attention_bias": False},
    keys={"d_expert": "intermediate_size", "head_dim": "head_dim", **_ATTENTION_BIAS},
    fixed=_DENSE | {"qk_norm": True, "qk_norm_per_head": True},
    needs_use_sliding_window=True,
    is_sliding=_above_max_window_layers,
  ),
}
