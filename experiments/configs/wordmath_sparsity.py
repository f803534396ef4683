"""Small over-trained models that differ in how many experts there are and how many run.

    python -m experiments.train --config=wordmath_sparsity:4of16 --output=DIR

`KofE`: each token goes through K of E experts, all of one width. 1,500 problems,
27 times each: 7 minutes on one core.
"""

import dataclasses

from experiments import configs
from experiments.configs import wordmath_control, wordmath_overtrained, wordmath_sizes

VARIANTS = {f"{k}of{num}": (k, num)
            for k, num in ((1, 16), (2, 16), (4, 16), (8, 16), (4, 8), (4, 32))}


def get_config(variant: str) -> configs.TrainingConfig:
  experts_per_token, num_experts = VARIANTS[variant]
  model = wordmath_sizes.resize(wordmath_control.MODEL, 64)
  config = wordmath_overtrained.get_config()
  return config.replace(
      num_problems=1500, settings=dataclasses.replace(config.settings, num_steps=2500),
      model=model.replace(num_experts=num_experts, experts_per_token=experts_per_token))
