"""Training configs: one small file each, whose `get_config` returns a `TrainingConfig`.

A file with `VARIANTS` holds several, named `FILE:VARIANT`, and its `get_config`
takes the variant.
"""

import dataclasses
import importlib
import pkgutil

from roe_jax.config import ModelConfig
from roe_jax.training import TrainSettings


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """A model, the `wordmath` problems that it sees, and how it learns from them.

  Attributes:
    model: what is trained; its dtype is that of training.
    settings: of the optimizer and the loss.
    num_problems: size of the fixed set of training problems that is gone
      through epoch after epoch, or None for fresh problems without end.
    batch_size: problems in a step.
    question_weight: weight of the question's tokens in the loss; those of the
      answer have 1.
    seed: of the initial parameters, the training problems and their order.
    log_every, evaluate_every, save_every: steps between two lines of metrics,
      evaluations, and states saved for resumption.
    evaluation_problems: validation problems in an evaluation.
  """

  model: ModelConfig
  settings: TrainSettings
  num_problems: int | None = None
  batch_size: int = 16
  question_weight: float = 0.25
  seed: int = 0
  log_every: int = 10
  evaluate_every: int = 500
  save_every: int = 500
  evaluation_problems: int = 200

  def __post_init__(self):
    for name in ("batch_size", "log_every", "evaluate_every", "save_every", "evaluation_problems"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
    if self.num_problems is not None and self.num_problems < 1:
      raise ValueError(f"num_problems must be at least 1, got {self.num_problems}")
    if self.seed < 0:
      raise ValueError(f"seed must not be negative, got {self.seed}")

  def replace(self, **changes) -> "TrainingConfig":
    return dataclasses.replace(self, **changes)


def names() -> list[str]:
  """The configs that `load` knows."""
  found = []
  for module in pkgutil.iter_modules(__path__):
    variants = getattr(_module(module.name), "VARIANTS", None)
    found += [f"{module.name}:{v}" for v in variants] if variants else [module.name]
  return sorted(found)


def load(name: str) -> TrainingConfig:
  """The config `experiments/training/configs/<name>.py`, or a variant that this file has.

  Raises:
    ValueError: there is none of that name.
  """
  if name not in names():
    raise ValueError(f"unknown training config {name!r}; there are {', '.join(names())}")
  module, _, variant = name.partition(":")
  return _module(module).get_config(*[variant] if variant else [])


def _module(name: str):
  return importlib.import_module(f"{__name__}.{name}")
