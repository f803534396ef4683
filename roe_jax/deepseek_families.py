"""Model families with DeepSeek's experts: routed and shared ones after a few dense layers.

DeepSeek's own have multi-head latent attention; the others took over the router of DeepSeek-V3.
"""

import functools
from typing import Any

from roe_jax.family import ATTENTION_BIAS, Family, above_max_window_layers
from roe_jax.routers import LINEAR_FLOAT32, SIGMOID


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

_LATENT_KEYS = {k: v for k, v in _DEEPSEEK_KEYS.items() if k != "head_dim"} | {
  "kv_lora_rank": "kv_lora_rank",
  "q_lora_rank": "q_lora_rank",
  "v_head_dim": "v_head_dim",
  "head_dim": "qk_head_dim",
  "rotary_dim": "qk_rope_head_dim",
  "rotary_interleaved": "rope_interleave",
}
_LATENT_FIXED = {"gates_in_model_dtype": False, "shared_expert_gate": False, "qk_norm": False}
_LATENT_SUPPORTED = {"attention_bias": False, "moe_layer_freq": 1}
# Fields that only DeepSeek-V3 has keys for.
_OF_V3 = ("normalize_gates", "expert_groups", "groups_per_token", "rotary_interleaved")


def _read_latent(hf):
  """Adds the width of a query, and the single head of the cached latents and rotary keys."""
  return _with_widths("n_shared_experts", hf) | {
    "qk_head_dim": hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"],
    "head_dim": hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"],
    "num_key_value_heads": 1,
    "q_lora_rank": hf["q_lora_rank"] or 0,
  }


def _write_latent(hf):
  hf = _with_counts("n_shared_experts", hf)
  return hf | {
    "qk_nope_head_dim": hf.pop("qk_head_dim") - hf["qk_rope_head_dim"],
    "num_key_value_heads": hf["num_attention_heads"],
    "q_lora_rank": hf["q_lora_rank"] or None,
  }


FAMILIES = {
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
    keys=_DEEPSEEK_KEYS | ATTENTION_BIAS,
    fixed=_DEEPSEEK_FIXED | {"qk_norm": True},
    is_sliding=above_max_window_layers,
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
  "deepseek_v2": Family(
    "DeepseekV2ForCausalLM",
    defaults={
      "vocab_size": 102400,
      "hidden_size": 4096,
      "intermediate_size": 11008,
      "moe_intermediate_size": 1407,
      "num_hidden_layers": 32,
      "num_attention_heads": 32,
      "max_position_embeddings": 2048,
      "n_routed_experts": 64,
      "n_shared_experts": 2,
      "routed_scaling_factor": 1.0,
      "first_k_dense_replace": 0,
      "kv_lora_rank": 512,
      "q_lora_rank": 1536,
      "qk_rope_head_dim": 64,
      "qk_nope_head_dim": 128,
      "v_head_dim": 128,
      "rms_norm_eps": 1e-6,
      "bos_token_id": 1,
      "eos_token_id": 2,
    },
    keys={k: v for k, v in _LATENT_KEYS.items() if k not in _OF_V3},
    fixed=_LATENT_FIXED
    | {"router": LINEAR_FLOAT32, "normalize_gates": False, "rotary_interleaved": True},
    # DeepSeek-V2 itself chooses the groups with the largest single score: not supported.
    supported=_LATENT_SUPPORTED
    | {
      "topk_method": "greedy",
      "scoring_func": "softmax",
      "mlp_bias": False,
      "norm_topk_prob": False,
    },
    has_window=False,
    read=_read_latent,
    write=_write_latent,
  ),
  "deepseek_v3": Family(
    "DeepseekV3ForCausalLM",
    defaults={
      "vocab_size": 129280,
      "hidden_size": 7168,
      "intermediate_size": 18432,
      "moe_intermediate_size": 2048,
      "num_hidden_layers": 61,
      "num_attention_heads": 128,
      "max_position_embeddings": 4096,
      "n_routed_experts": 256,
      "n_shared_experts": 1,
      "num_experts_per_tok": 8,
      "norm_topk_prob": True,
      "routed_scaling_factor": 2.5,
      "n_group": 8,
      "topk_group": 4,
      "first_k_dense_replace": 3,
      "kv_lora_rank": 512,
      "q_lora_rank": 1536,
      "qk_rope_head_dim": 64,
      "qk_nope_head_dim": 128,
      "v_head_dim": 128,
      "rope_interleave": True,
      "rms_norm_eps": 1e-6,
      "bos_token_id": 0,
      "eos_token_id": 1,
    },
    keys=_LATENT_KEYS,
    fixed=_LATENT_FIXED | {"router": SIGMOID, "correction_bias": True},
    supported=_LATENT_SUPPORTED | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    has_window=False,
    read=_read_latent,
    write=_write_latent,
  ),
}
