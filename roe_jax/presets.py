"""Published model sizes, for dry runs, benchmarks with random weights and memory estimates.

The numbers are those of the models' public `config.json` files.
"""

import math
from typing import Any

from roe_jax.config import ModelConfig
from roe_jax.family_table import FAMILIES
from roe_jax.rope import Llama3, Yarn


def _preset(family: str, **fields: Any) -> ModelConfig:
  fields = {"dtype": "bfloat16"} | FAMILIES[family].fixed | fields
  return ModelConfig(family=family, **fields)


def _mixtral(**fields: Any) -> ModelConfig:
  return _preset(
    "mixtral",
    num_kv_heads=8,
    head_dim=128,
    num_experts=8,
    experts_per_token=2,
    rope_theta=1e6,
    bos_token_id=1,
    eos_token_ids=(2,),
    **fields,
  )


def _gpt_oss(num_layers: int, num_experts: int) -> ModelConfig:
  return _preset(
    "gpt_oss",
    vocab_size=201088,
    num_layers=num_layers,
    d_model=2880,
    num_heads=64,
    num_kv_heads=8,
    head_dim=64,
    num_experts=num_experts,
    experts_per_token=4,
    d_expert=2880,
    context_length=131072,
    sliding_window=128,
    sliding_layers=tuple(range(0, num_layers, 2)),
    swiglu_limit=7.0,
    swiglu_alpha=1.702,
    rope_theta=150000.0,
    rope_scaling=Yarn(
      factor=32.0,
      original_context=4096,
      beta_fast=32.0,
      beta_slow=1.0,
      truncate=False,
      attention_factor=0.1 * math.log(32) + 1,
    ),
    bos_token_id=199998,
    pad_token_id=199999,
    eos_token_ids=(200002,),
    expert_format="mxfp4",
  )


def _qwen3(**fields: Any) -> ModelConfig:
  return _preset(
    "qwen3_moe",
    vocab_size=151936,
    num_kv_heads=4,
    head_dim=128,
    num_experts=128,
    experts_per_token=8,
    context_length=40960,
    normalize_gates=True,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    bos_token_id=151643,
    eos_token_ids=(151645,),
    **fields,
  )


def _granite(**fields: Any) -> ModelConfig:
  return _preset(
    "granitemoe",
    vocab_size=49155,
    num_kv_heads=8,
    head_dim=64,
    experts_per_token=8,
    d_expert=512,
    context_length=131072,
    embedding_multiplier=12.0,
    attention_multiplier=0.015625,
    residual_multiplier=0.22,
    logits_scaling=6.0,
    rms_norm_eps=1e-6,
    bos_token_id=0,
    pad_token_id=0,
    eos_token_ids=(0,),
    **fields,
  )


def _deepseek(family: str, **fields: Any) -> ModelConfig:
  """A model with experts of 128 wide heads after a dense layer, and one shared expert."""
  return _preset(
    family,
    head_dim=128,
    experts_per_token=8,
    d_shared_expert=fields["d_expert"],
    first_dense_layers=1,
    normalize_gates=True,
    **fields,
  )


# DeepSeek's own, and Moonlight's; arXiv 2405.04434 section 2.1.
_LATENT = dict(num_kv_heads=1, kv_lora_rank=512, head_dim=128 + 64, rotary_dim=64, v_head_dim=128)


def _deepseek_yarn(mscale_all_dim: float) -> Yarn:
  return Yarn(
    factor=40.0,
    original_context=4096,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=True,
    attention_factor=1.0,
    mscale_all_dim=mscale_all_dim,
  )


def _deepseek_v3(**fields: Any) -> ModelConfig:
  """A model of 61 layers with 256 experts, the first three dense."""
  return _preset(
    "deepseek_v3",
    **_LATENT,
    q_lora_rank=1536,
    rotary_interleaved=True,
    num_layers=61,
    num_heads=128,
    num_experts=256,
    experts_per_token=8,
    d_expert=2048,
    d_shared_expert=2048,
    first_dense_layers=3,
    d_dense=18432,
    normalize_gates=True,
    gate_multiplier=2.5,
    bos_token_id=0,
    eos_token_ids=(1,),
    **fields,
  )


PRESETS = {
  "olmoe-1b-7b": _preset(
    "olmoe",
    vocab_size=50304,
    num_layers=16,
    d_model=2048,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    num_experts=64,
    experts_per_token=8,
    d_expert=1024,
    context_length=4096,
    normalize_gates=False,
    pad_token_id=1,
    eos_token_ids=(50279,),
  ),
  "mixtral-8x7b": _mixtral(
    vocab_size=32000,
    num_layers=32,
    d_model=4096,
    num_heads=32,
    d_expert=14336,
    context_length=32768,
  ),
  "mixtral-8x22b": _mixtral(
    vocab_size=32768,
    num_layers=56,
    d_model=6144,
    num_heads=48,
    d_expert=16384,
    context_length=65536,
  ),
  "gpt-oss-20b": _gpt_oss(num_layers=24, num_experts=32),
  "gpt-oss-120b": _gpt_oss(num_layers=36, num_experts=128),
  "qwen1.5-moe-a2.7b": _preset(
    "qwen2_moe",
    vocab_size=151936,
    num_layers=24,
    d_model=2048,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    num_experts=60,
    experts_per_token=4,
    d_expert=1408,
    d_shared_expert=5632,
    context_length=8192,
    normalize_gates=False,
    qkv_bias=True,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    bos_token_id=151643,
    eos_token_ids=(151643,),
  ),
  "granite-3.1-1b-a400m": _granite(
    num_layers=24, d_model=1024, num_heads=16, num_experts=32, rope_theta=1.5e6
  ),
  "granite-3.1-3b-a800m": _granite(
    num_layers=32, d_model=1536, num_heads=24, num_experts=40, rope_theta=1e7
  ),
  "ling-mini-2.0": _deepseek(
    "bailing_moe_v2",
    vocab_size=157184,
    num_layers=20,
    d_model=2048,
    num_heads=16,
    num_kv_heads=4,
    num_experts=256,
    d_expert=512,
    d_dense=5120,
    expert_groups=8,
    groups_per_token=4,
    gate_multiplier=2.5,
    qk_norm=True,
    context_length=32768,
    rope_theta=6e5,
    rotary_dim=64,
    rms_norm_eps=1e-6,
    pad_token_id=156892,
    eos_token_ids=(156892,),
  ),
  "deepseek-v2-lite": _preset(
    "deepseek_v2",
    **_LATENT,
    vocab_size=102400,
    num_layers=27,
    d_model=2048,
    num_heads=16,
    num_experts=64,
    experts_per_token=6,
    d_expert=1408,
    d_shared_expert=2 * 1408,
    first_dense_layers=1,
    d_dense=10944,
    context_length=163840,
    rope_scaling=_deepseek_yarn(0.707),
    rms_norm_eps=1e-6,
    bos_token_id=100000,
    eos_token_ids=(100001,),
  ),
  "moonlight-16b-a3b": _preset(
    "deepseek_v3",
    **_LATENT,
    rotary_interleaved=True,
    vocab_size=163840,
    num_layers=27,
    d_model=2048,
    num_heads=16,
    num_experts=64,
    experts_per_token=6,
    d_expert=1408,
    d_shared_expert=2 * 1408,
    first_dense_layers=1,
    d_dense=11264,
    normalize_gates=True,
    gate_multiplier=2.446,
    context_length=8192,
    rope_theta=5e4,
    rms_norm_eps=1e-5,
    bos_token_id=163584,
    eos_token_ids=(163585,),
  ),
  "deepseek-v3": _deepseek_v3(
    vocab_size=129280,
    d_model=7168,
    expert_groups=8,
    groups_per_token=4,
    context_length=163840,
    rope_scaling=_deepseek_yarn(1.0),
    rms_norm_eps=1e-6,
  ),
  # A shape for dry runs (arXiv 2505.04519): its checkpoints have tensor names of their own. The
  # paper's sizes; the others, with three dense layers, as in the published configuration code.
  "pangu-ultra-moe": _deepseek_v3(
    vocab_size=153600,
    d_model=7680,
    sandwich_norm=True,
    tiny_init=True,
    context_length=131072,
    rope_theta=2.56e7,
    rms_norm_eps=1e-5,
  ),
  "glm-4.5-air": _deepseek(
    "glm4_moe",
    vocab_size=151552,
    num_layers=46,
    d_model=4096,
    num_heads=96,
    num_kv_heads=8,
    num_experts=128,
    d_expert=1408,
    d_dense=10944,
    qk_norm=False,
    qkv_bias=True,
    context_length=131072,
    rope_theta=1e6,
    rotary_dim=64,
    pad_token_id=151329,
    eos_token_ids=(151329, 151336, 151338),
  ),
  "smollm2-135m": _preset(
    "llama",
    vocab_size=49152,
    num_layers=30,
    d_model=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    d_expert=1536,
    context_length=8192,
    rope_theta=1e5,
    bos_token_id=1,
    pad_token_id=2,
    eos_token_ids=(2,),
  ),
  "llama-3.2-1b": _preset(
    "llama",
    vocab_size=128256,
    num_layers=16,
    d_model=2048,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    d_expert=8192,
    context_length=131072,
    rope_theta=5e5,
    rope_scaling=Llama3(
      factor=32.0, original_context=8192, low_freq_factor=1.0, high_freq_factor=4.0
    ),
    bos_token_id=128000,
    eos_token_ids=(128001,),
  ),
  "qwen3-0.6b": _preset(
    "qwen3",
    vocab_size=151936,
    num_layers=28,
    d_model=1024,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    d_expert=3072,
    context_length=40960,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    bos_token_id=151643,
    eos_token_ids=(151645,),
  ),
  "qwen3-30b-a3b": _qwen3(num_layers=48, d_model=2048, num_heads=32, d_expert=768),
  "qwen3-235b-a22b": _qwen3(num_layers=94, d_model=4096, num_heads=64, d_expert=1536),
}
