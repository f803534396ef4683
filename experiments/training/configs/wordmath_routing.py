"""Small models that differ only in how their routers are trained.

    python -m experiments.train --config=wordmath_routing:noise_0.3 --seed=1 --output=DIR

`plain` is `wordmath_sizes:d32` with fewer steps and a higher learning rate. `noise_0.3` and
`noise_1` have Gumbel noise of this τ on all routers during training; `matryoshka` draws in each
step how many experts each layer uses (1 to 4), and `two_experts` always uses 2; `mass_0.4` uses the
fewest experts that have 40 % of the router probability (XMoE), at most 4; `members` has two members
with half of the experts each (E3), at twice the cost; `recurrent` and `detached` have a recurrent
router (RMoE), the latter without gradients from one layer's state to the next. The first three took
7 to 13 minutes on one core of a busy AMD EPYC; with two members a step does twice the work.
"""

import dataclasses
from typing import Any

from experiments.training import configs
from experiments.training.configs import wordmath_sizes
from roe_jax.routers import RECURRENT

_RECURRENT = {"router": RECURRENT, "router_state": 16}
# Settings of training, and of the model.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
  "plain": ({}, {}),
  "noise_0.3": ({"noise_temperature": 0.3}, {}),
  "noise_1": ({"noise_temperature": 1.0}, {}),
  "matryoshka": ({"min_experts": 1}, {}),
  "two_experts": ({}, {"experts_per_token": 2}),
  "mass_0.4": ({}, {"expert_mass": 0.4}),
  "members": ({"members": 2}, {}),
  "recurrent": ({}, _RECURRENT),
  "detached": ({"detach_router_state": True}, _RECURRENT),
}


def get_config(variant: str) -> configs.TrainingConfig:
  of_training, of_model = VARIANTS[variant]
  config = wordmath_sizes.get_config("d32")
  return config.replace(
    model=config.model.replace(**of_model),
    settings=dataclasses.replace(
      config.settings, num_steps=3000, learning_rate=1e-2, **of_training
    ),
    evaluate_every=3000,
  )
