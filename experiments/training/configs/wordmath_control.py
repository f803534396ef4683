"""A small OLMoE-like model, well trained on problems that are all different.

    python -m experiments.train --config=wordmath_control --output=DIR

88,000 problems, 7.0 M tokens: 41 minutes on one core of a Xeon with AVX-512
(JAX_PLATFORMS=cpu; half as long again unless the C library keeps freed memory:
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=34359738368 MALLOC_TOP_PAD_=268435456).

Expected on 200 validation problems:

    steps   answer perplexity   solved greedily
     1000         1.454               2 %
     2000         1.153              26 %
     3000         1.065              59 %
     4000         1.033              76 %
     5500         1.012              92 %
"""

from experiments.training import configs
from roe_jax.config import ModelConfig
from roe_jax.training import TrainSettings

MODEL = ModelConfig(
  family="olmoe",
  vocab_size=514,
  num_layers=4,
  d_model=128,
  num_heads=4,
  num_kv_heads=4,
  head_dim=32,
  num_experts=16,
  experts_per_token=4,
  d_expert=64,
  context_length=256,
  normalize_gates=False,
  gates_in_model_dtype=True,
  qk_norm=True,
  initializer_range=0.05,
  pad_token_id=1,
  eos_token_ids=(0,),
  dtype="float32",
)


def get_config() -> configs.TrainingConfig:
  return configs.TrainingConfig(
    model=MODEL, settings=TrainSettings(num_steps=5500, learning_rate=2e-3)
  )
