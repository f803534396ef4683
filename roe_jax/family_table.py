"""The table of model families: which keys of `config.json` each has, and what is fixed.

An entry of `FAMILIES` is all that the library knows about a family beyond its `ModelConfig`.
"""

from typing import Any

from roe_jax import deepseek_families
from roe_jax.family import ATTENTION_BIAS, Family, above_max_window_layers
from roe_jax.routers import NONE

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
    **ATTENTION_BIAS,
    **dict(zip(_MULTIPLIERS, _MULTIPLIERS)),
    "d_expert": "intermediate_size",
    "head_dim": "head_dim",
  },
  "fixed": {"normalize_gates": True, "gates_in_model_dtype": True, "qk_norm": False},
  "has_window": False,
}


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
      **ATTENTION_BIAS,
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
      **ATTENTION_BIAS,
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
    is_sliding=above_max_window_layers,
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    defaults=_QWEN_DEFAULTS | {"head_dim": 128, "attention_bias": False},
    keys={"d_expert": "intermediate_size", "head_dim": "head_dim", **ATTENTION_BIAS},
    fixed=_DENSE | {"qk_norm": True, "qk_norm_per_head": True},
    needs_use_sliding_window=True,
    is_sliding=above_max_window_layers,
  ),
} | deepseek_families.FAMILIES
