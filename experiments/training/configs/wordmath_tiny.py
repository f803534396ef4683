"""A tiny model that learns little, to try the program.

    python -m experiments.train --config=wordmath_tiny --output=DIR

A minute on one core, compilation included; validation perplexity 6.6.
"""

from experiments.training import configs
from experiments.training.configs import wordmath_control
from roe_jax.training import TrainSettings


def get_config() -> configs.TrainingConfig:
  model = wordmath_control.MODEL.replace(
    num_layers=2,
    d_model=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    num_experts=4,
    experts_per_token=2,
    d_expert=16,
    initializer_range=0.2,
  )
  return configs.TrainingConfig(
    model=model,
    batch_size=4,
    data=configs.Wordmath(evaluation_problems=8),
    save_every=20,
    settings=TrainSettings(num_steps=200, learning_rate=1e-2, warmup_steps=20),
  )
