"""Models small enough for tests, with weights large enough to matter."""

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import params as params_lib
from roe_jax.config import ModelConfig, Yarn
from roe_jax.families import FAMILIES

# What a model of each family has beyond what the family fixes. The windows, the
# original context and the limit are such that short texts go beyond them.
RULES = {
    "olmoe": dict(normalize_gates=False),
    "mixtral": dict(),
    "gpt_oss": dict(
        sliding_window=4, sliding_layers=(0, 2), swiglu_limit=1.5, swiglu_alpha=1.702,
        rope_scaling=Yarn(factor=8.0, original_context=6, beta_fast=32.0, beta_slow=1.0,
                          truncate=False, attention_factor=1.2)),
    "qwen2_moe": dict(normalize_gates=False, qkv_bias=True, d_shared_expert=20),
    "qwen3_moe": dict(normalize_gates=True),
}


def config(family, **changes):
  """A model with grouped query attention and room for 48 tokens."""
  sizes = dict(
      vocab_size=61, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2,
      head_dim=8, num_experts=8, experts_per_token=3, d_expert=16,
      context_length=48)
  return ModelConfig(family=family, **(
      sizes | FAMILIES[family].fixed | RULES[family] | changes))


def params(config, seed=0, scale=0.3):
  """Random parameters: no norm is one, and logits and routing vary widely."""
  random = np.random.RandomState(seed)

  def value(spec):
    array = (random.uniform(0.5, 1.5, spec.shape) if spec.init == "ones"
             else scale * random.standard_normal(spec.shape))
    return jnp.asarray(array, config.dtype)

  return jax.tree.map(value, params_lib.describe(config))


def texts(lengths, vocab_size=61, seed=0):
  """Random token ids, one list for each length."""
  random = np.random.RandomState(seed)
  return [random.randint(0, vocab_size, length).tolist() for length in lengths]
