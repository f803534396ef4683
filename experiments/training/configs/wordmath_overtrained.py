"""The model of `wordmath_control`, over-trained on few problems in many epochs.

    python -m experiments.train --config=wordmath_overtrained --output=DIR

3,000 problems for 21 epochs, 5.1 M tokens: 31 minutes on one core, as in
`wordmath_control`.

Expected on 200 validation problems and on 200 training problems:

    steps   answer perplexity   trained on   solved greedily
     1000         1.463            1.411           2 %
     2000         1.252            1.157          16 %
     3000         1.163            1.037          32 %
     3500         1.181            1.012          32 %
     4000         1.219            1.004          36 %
"""

from experiments.training import configs
from experiments.training.configs import wordmath_control
from roe_jax.training import TrainSettings


def get_config() -> configs.TrainingConfig:
  return configs.TrainingConfig(
    model=wordmath_control.MODEL,
    data=configs.Wordmath(num_problems=3000),
    evaluate_every=250,
    settings=TrainSettings(
      num_steps=4000, learning_rate=2e-3, final_learning_rate=2e-4, weight_decay=0.0
    ),
  )
