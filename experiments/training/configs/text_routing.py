"""The variants of `wordmath_routing`, trained on natural text.

    python -m experiments.train --config=text_routing:noise_0.3 --seed=1 --output=DIR

Model, steps and settings are those of `wordmath_routing`, with a vocabulary of 1,024: 3,000 steps
of 12 windows of 128 tokens, less than one epoch of the 41,399 windows that Python 3.11 gives. After
a trial with `--steps=600`, `plain` had a perplexity of 50.6 and 19.7 % right tokens on 500
validation windows; the training tokens' frequencies have 401 and 2.4 %, their smoothed bigrams 60.5
and 13.4 %. What 3,000 steps reach has not been measured.
"""

from experiments.training import configs
from experiments.training.configs import wordmath_routing

VARIANTS = wordmath_routing.VARIANTS


def get_config(variant: str) -> configs.TrainingConfig:
  config = wordmath_routing.get_config(variant)
  return config.replace(
    data=configs.Text(), batch_size=12, model=config.model.replace(vocab_size=1024)
  )
