"""The published sizes, for dry runs, benchmarks with random weights and memory arithmetic.

The numbers are those of the models' public `config.json` files.
"""

import math

from roe_jax.config import ModelConfig, Yarn
from roe_jax.families import FAMILIES


def _gpt_oss(num_layers, num_experts):
  return ModelConfig(
      family="gpt_oss", vocab_size=201088, num_layers=num_layers, d_model=2880, num_heads=64,
      num_kv_heads=8, head_dim=64, num_experts=num_experts, experts_per_token=4, d_expert=2880,
      context_length=131072, sliding_window=128, sliding_layers=tuple(range(0, num_layers, 2)),
      swiglu_limit=7.0, swiglu_alpha=1.702, rope_theta=150000.0,
      rope_scaling=Yarn(factor=32.0, original_context=4096, beta_fast=32.0, beta_slow=1.0,
                        truncate=False, attention_factor=0.1 * math.log(32) + 1),
      bos_token_id=199998, pad_token_id=199999, eos_token_ids=(200002,), dtype="bfloat16",
      expert_format="mxfp4", **FAMILIES["gpt_oss"].fixed)


def _qwen3(num_layers, d_model, num_heads, d_expert):
  return ModelConfig(
      family="qwen3_moe", vocab_size=151936, num_layers=num_layers, d_model=d_model,
      num_heads=num_heads, num_kv_heads=4, head_dim=128, num_experts=128, experts_per_token=8,
      d_expert=d_expert, context_length=40960, normalize_gates=True, rope_theta=1e6,
      rms_norm_eps=1e-6, bos_token_id=151643, eos_token_ids=(151645,), dtype="bfloat16",
      **FAMILIES["qwen3_moe"].fixed)


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
    "gpt-oss-20b": _gpt_oss(num_layers=24, num_experts=32),
    "gpt-oss-120b": _gpt_oss(num_layers=36, num_experts=128),
    "qwen1.5-moe-a2.7b": ModelConfig(
        family="qwen2_moe", vocab_size=151936, num_layers=24, d_model=2048, num_heads=16,
        num_kv_heads=16, head_dim=128, num_experts=60, experts_per_token=4, d_expert=1408,
        d_shared_expert=5632, context_length=8192, normalize_gates=False, qkv_bias=True,
        rope_theta=1e6, rms_norm_eps=1e-6, bos_token_id=151643, eos_token_ids=(151643,),
        dtype="bfloat16", **FAMILIES["qwen2_moe"].fixed),
    "qwen3-30b-a3b": _qwen3(num_layers=48, d_model=2048, num_heads=32, d_expert=768),
    "qwen3-235b-a22b": _qwen3(num_layers=94, d_model=4096, num_heads=64, d_expert=1536),
}
