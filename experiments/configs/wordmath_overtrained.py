"""The same model, over-trained: few problems, seen again and again.

    python -m experiments.train --config=wordmath_overtrained --output=DIR
"""

from experiments import configs
from experiments.configs import wordmath_control
from roe_jax.training import TrainSettings


def get_config() -> configs.TrainingConfig:
  return configs.TrainingConfig(
      model=wordmath_control.MODEL, num_problems=4000, evaluate_every=250,
      settings=TrainSettings(num_steps=3500, learning_rate=2e-3, final_learning_rate=2e-4,
                             weight_decay=0.0))
