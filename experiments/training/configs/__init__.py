"""Training configs: one file each, whose `get_config` returns a `TrainingConfig`.

A file with `VARIANTS` holds several, named `FILE:VARIANT`; its `get_config` takes the variant.
"""

import dataclasses
import importlib
import pkgutil

from experiments.training.text_data import Text
from experiments.training.wordmath_data import Wordmath
from roe_jax.config import ModelConfig
from roe_jax.training import TrainSettings


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """A model, its training data and the training settings.

  Attributes:
    model: the architecture, with the dtype to train in.
    settings: settings of optimizer and loss.
    data: what is trained and evaluated on; its `load` returns an object with its origin, the
      tokenizer, the batch of each step, and an evaluation.
    batch_size: sequences per step.
    seed: seed for the initial parameters, and for what is trained on in which order.
    log_every, evaluate_every, save_every: steps between log lines, evaluations and saved states.
  """

  model: ModelConfig
  settings: TrainSettings
  data: Wordmath | Text = dataclasses.field(default_factory=Wordmath)
  batch_size: int = 16
  seed: int = 0
  log_every: int = 10
  evaluate_every: int = 500
  save_every: int = 500

  def __post_init__(self):
    for name in ("batch_size", "log_every", "evaluate_every", "save_every"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
    if self.seed < 0:
      raise ValueError(f"seed must not be negative, got {self.seed}")

  def replace(self, **changes) -> "TrainingConfig":
    return dataclasses.replace(self, **changes)


def names() -> list[str]:
  """Returns the names of all configs."""
  found = []
  for module in pkgutil.iter_modules(__path__):
    variants = getattr(_module(module.name), "VARIANTS", None)
    found += [f"{module.name}:{v}" for v in variants] if variants else [module.name]
  return sorted(found)


def load(name: str) -> TrainingConfig:
  """Returns the config of `experiments/training/configs/<name>.py`, or a variant in it.

  Raises:
    ValueError: there is no config of that name.
  """
  if name not in names():
    raise ValueError(f"unknown training config {name!r}: choose one of {', '.join(names())}")
  module, _, variant = name.partition(":")
  return _module(module).get_config(*[variant] if variant else [])


def _module(name: str):
  return importlib.import_module(f"{__name__}.{name}")
