"""Thin models of 24 layers at a high learning rate, with and without what Pangu Ultra MoE adds.

    python -m experiments.train --config=wordmath_deep:sandwich_tiny --seed=1 --output=DIR

`plain` has the initial weights that the paper compares with, sqrt(2 / (5 D)); `sandwich` has
depth-scaled sandwich norm, `tiny` TinyInit and `sandwich_tiny` both (arXiv 2505.04519). Each step's
gradient norm is in `metrics.jsonl`; `experiments.reproduce --figure=deep_training` compares them.
"""

import math

from experiments.training import configs
from experiments.training.configs import wordmath_control, wordmath_sizes
from roe_jax.training import TrainSettings

VARIANTS = {"plain": {}, "sandwich": {"sandwich_norm": True}, "tiny": {"tiny_init": True}}
VARIANTS["sandwich_tiny"] = VARIANTS["sandwich"] | VARIANTS["tiny"]


def get_config(variant: str) -> configs.TrainingConfig:
  model = wordmath_sizes.resize(wordmath_control.MODEL, 32)
  return configs.TrainingConfig(
    model=model.replace(
      num_layers=24, initializer_range=math.sqrt(2 / (5 * 32)), **VARIANTS[variant]
    ),
    settings=TrainSettings(num_steps=500, learning_rate=1e-2, warmup_steps=50),
    batch_size=8,
    log_every=1,
    evaluate_every=500,
  )
