"""Temperature profiles: the τ of each layer that was found for one model, as a JSON file.

    {"temperatures": [0.0, 0.25, ...],
     "model": {"name": ..., "family": ..., "num_layers": ..., ..., "routers": SHA-256},
     "roster": {"num_members": ..., "cache": ..., ...},
     "objective": {...}, "data": {...}, "seed": ..., "cost": {...}}

Only "temperatures" is required. With "model" the profile holds for that model
alone: its sizes are compared before parameters are read, and afterwards its
routers. Whoever gives the profile to a program gets the settings under "roster"
with it, except where a flag says otherwise. The rest tells where it comes from.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster

# What of a roster is tuned for, and so belongs to a profile.
ROSTER_SETTINGS = (
  "num_members",
  "gate_weights",
  "noise",
  "cache",
  "recompute",
  "aggregation",
  "include_clean",
)
# What the temperatures of a model depend on and no dtype or format of its experts changes.
SIZES = (
  "family",
  "num_layers",
  "d_model",
  "num_experts",
  "experts_per_token",
  "d_expert",
  "vocab_size",
)
ROUTERS = "routers"


@dataclasses.dataclass(frozen=True)
class Profile:
  """A temperature for each layer, and what it was found for.

  Attributes:
    temperatures: τ of each layer, in units of router logits.
    model: "name", sizes and fingerprint of the model; empty: it may be any.
    roster: settings among `ROSTER_SETTINGS`.
    objective: what was optimized, and what it came to.
    data: the examples that were used.
    seed: of the noise in tuning, or None.
    cost: what tuning took.
  """

  temperatures: tuple[float, ...]
  model: dict[str, Any] = dataclasses.field(default_factory=dict)
  roster: dict[str, Any] = dataclasses.field(default_factory=dict)
  objective: dict[str, Any] = dataclasses.field(default_factory=dict)
  data: dict[str, Any] = dataclasses.field(default_factory=dict)
  seed: int | None = None
  cost: dict[str, Any] = dataclasses.field(default_factory=dict)

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

  def check_sizes(self, config: ModelConfig) -> None:
    """Refuses a model of other sizes.

    Raises:
      ValueError: it is another model's profile.
    """
    given = sizes_of(config)
    if self.model and any(self.model[name] != given[name] for name in SIZES):
      raise ValueError(
        f"the temperature profile is for {_told(self.model)}, and the model given "
        f"is {_told(given)}: tune this model, or give τ as numbers"
      )
    if len(self.temperatures) != config.num_layers:
      raise ValueError(
        f"the temperature profile is for {len(self.temperatures)} layers, and the "
        f"model given has {config.num_layers}"
      )

  def check_routers(self, params: Params) -> None:
    """Refuses a model of the same sizes whose routers are others.

    Raises:
      ValueError: it is another model's profile.
    """
    if self.model and self.model[ROUTERS] != (found := fingerprint(params)):
      raise ValueError(
        f"the temperature profile is for {_told(self.model)} with routers "
        f"{self.model[ROUTERS][:12]}, and those of the model given, though of the same sizes, "
        f"are {found[:12]}: tune this model, or give τ as numbers"
      )


def read(path: pathlib.Path) -> Profile:
  """The profile in a file.

  Raises:
    ValueError: there is none in it, or not a whole one.
  """
  expected = (
    f"{path} is not a temperature profile: a JSON object with a list of numbers under "
    '"temperatures" is expected'
  )
  try:
    values = json.loads(path.read_text())
    temperatures = tuple(float(t) for t in values["temperatures"])
  except (KeyError, TypeError, ValueError) as error:  # Of JSON and of its encoding, too.
    raise ValueError(expected) from error
  if not isinstance(values["temperatures"], list) or not all(
    math.isfinite(t) and t >= 0 for t in temperatures
  ):
    raise ValueError(f"{expected}, finite and not negative")
  known = {f.name for f in dataclasses.fields(Profile)} - {"temperatures"}
  profile = Profile(temperatures, **{k: v for k, v in values.items() if k in known})
  damaged = [name for name in known - {"seed"} if not isinstance(getattr(profile, name), dict)]
  if not damaged and profile.model:
    damaged += sorted({*SIZES, ROUTERS} - set(profile.model))
  if not damaged:
    damaged += sorted(set(profile.roster) - set(ROSTER_SETTINGS))
  if damaged:
    raise ValueError(
      f"the temperature profile {path} is damaged or not of this version: see its "
      f"{', '.join(damaged)}"
    )
  return profile


def sizes_of(config: ModelConfig) -> dict[str, Any]:
  """The sizes that a profile is bound to."""
  return {name: getattr(config, name) for name in SIZES}


def model_of(name: str, config: ModelConfig, params: Params) -> dict[str, Any]:
  """What a profile says of the model it is for."""
  return {"name": name, **sizes_of(config), ROUTERS: fingerprint(params)}


def roster_of(roster: Roster) -> dict[str, Any]:
  """What a profile says of the roster it was found with."""
  settings = roster.settings()
  return {name: settings[name] for name in ROSTER_SETTINGS}


def fingerprint(params: Params) -> str:
  """SHA-256 of all routers' weights and biases as bfloat16.

  The model's dtype, the format of its experts and the devices it lies on do not
  matter: a profile of bfloat16 weights holds for the same weights in float32.
  """
  digest = hashlib.sha256()
  for array in (params.layers.router, params.layers.router_bias):
    if array is not None:
      digest.update(np.asarray(jnp.asarray(array, jnp.bfloat16)).tobytes())
  return digest.hexdigest()


def _told(model):
  name = f"{model['name']}, " if "name" in model else ""
  return (
    f"{name}{model['family']} with {model['num_layers']} layers of {model['num_experts']} "
    f"experts ({model['experts_per_token']} active, inner width {model['d_expert']}), width "
    f"{model['d_model']}, vocabulary {model['vocab_size']}"
  )
