"""Small over-trained models that differ in how many experts there are and how many run.

    python -m experiments.train --config=wordmath_sparsity:4of16 --output=DIR

`KofE`: each token goes through K of E experts, all of one width. 1,500 problems,
27 epochs. Expected on 200 validation problems and on 200 training problems, with minutes on
one core of an AMD EPYC:

             answer perplexity   trained on   minutes
    1of16         1.666            1.058          5
    2of16         1.522            1.026          6
    4of16         1.827            1.030          7
    8of16         1.713            1.042         10
    4of8          1.463            1.018          7
    4of32         1.478            1.037          8

They are over-trained deliberately: validation perplexity was lowest, 1.31 to 1.46, at steps
1,500 to 1,750.
"""

import dataclasses

from experiments.training import configs
from experiments.training.configs import wordmath_control, wordmath_overtrained, wordmath_sizes

VARIANTS = {
  f"{k}of{num}": (k, num) for k, num in ((1, 16), (2, 16), (4, 16), (8, 16), (4, 8), (4, 32))
}


def get_config(variant: str) -> configs.TrainingConfig:
  experts_per_token, num_experts = VARIANTS[variant]
  model = wordmath_sizes.resize(wordmath_control.MODEL, 64)
  config = wordmath_overtrained.get_config()
  return config.replace(
    data=configs.Wordmath(num_problems=1500),
    settings=dataclasses.replace(config.settings, num_steps=2500),
    model=model.replace(num_experts=num_experts, experts_per_token=experts_per_token),
  )
