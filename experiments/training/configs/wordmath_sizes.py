"""`wordmath_control` in smaller sizes, for a scaling law.

    python -m experiments.train --config=wordmath_sizes:d32 --output=DIR

The recipe is that of `wordmath_control`, which is the largest of the three; all widths shrink
together. Expected on 200 validation problems, with minutes on one core of an AMD EPYC:

            answer perplexity   solved greedily   minutes
    d32           1.149              27 %            5
    d64           1.034              75 %           15
    control       1.012              92 %
"""

from experiments.training import configs
from experiments.training.configs import wordmath_control
from roe_jax.config import ModelConfig

VARIANTS = {"d32": 32, "d64": 64}  # The model's width.


def resize(model: ModelConfig, d_model: int) -> ModelConfig:
  """Returns the model in another width, with the same head, layer and vocabulary sizes."""
  num_heads = d_model // model.head_dim
  return model.replace(
    d_model=d_model,
    num_heads=num_heads,
    num_kv_heads=num_heads,
    d_expert=model.d_expert * d_model // model.d_model,
  )


def get_config(variant: str) -> configs.TrainingConfig:
  config = wordmath_control.get_config()
  return config.replace(model=resize(config.model, VARIANTS[variant]))
