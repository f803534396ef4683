"""Temperature profiles: JSON files with a router temperature τ for each layer of one model.

    {"temperatures": [0.0, 0.25, ...],
     "model": {"name": ..., "family": ..., "num_layers": ..., ..., "routers": SHA-256},
     "roster": {"num_members": ..., "cache": ..., ...},
     "objective": {...}, "data": {...}, "seed": ..., "cost": {...},
     "units": {"unit": "spread", "tau": 0.3, "scales": [1.8, ...]}}

Only "temperatures" is required. A profile with "model" is valid for that model only: programs
compare its sizes before they load parameters, and its routers afterwards. "roster" holds
defaults for `Roster.from_profile` and the roster flags. The other entries are provenance.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import typed
from roe_jax.checkpoint_folder import PathLike
from roe_jax.config import ModelConfig
from roe_jax.params import Params

# Roster settings that a profile is tuned for, and their types.
ROSTER_SETTINGS = {
  "num_members": int,
  "gate_weights": str,
  "noise": str,
  "cache": str,
  "aggregation": str,
  "include_clean": bool,
  "unsure": str | None,
  "member_stop": str | float | None,
  "member_bits": str | None,
  "member_tasks": str | None,
}
# Properties of a model that its temperatures depend on and that no dtype or quantization changes.
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
  """A temperature profile.

  Attributes:
    temperatures: τ of each layer, in units of router logits.
    model: name, sizes and router fingerprint of the model; empty if it fits any.
    roster: settings among `ROSTER_SETTINGS`.
    objective: what was optimized, and its value.
    data: the examples that were used.
    seed: noise seed of the search, or None.
    cost: cost of the search.
    units: if the temperatures are one τ in another unit, that unit, τ, and the unit's size in each
      layer in router logits; see `diagnostics.router_scales`.
  """

  temperatures: tuple[float, ...]
  model: dict[str, Any] = dataclasses.field(default_factory=dict)
  roster: dict[str, Any] = dataclasses.field(default_factory=dict)
  objective: dict[str, Any] = dataclasses.field(default_factory=dict)
  data: dict[str, Any] = dataclasses.field(default_factory=dict)
  seed: int | None = None
  cost: dict[str, Any] = dataclasses.field(default_factory=dict)
  units: dict[str, Any] = dataclasses.field(default_factory=dict)

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

  def check_sizes(self, config: ModelConfig) -> None:
    """Checks that the profile fits a model's sizes.

    Raises:
      ValueError: it is for a different model.
    """
    given = sizes_of(config)
    if self.model and any(self.model[name] != given[name] for name in SIZES):
      raise ValueError(
        f"the temperature profile is for {_describe(self.model)}, but the model is "
        f"{_describe(given)}: tune this model, or pass τ as numbers"
      )
    if len(self.temperatures) != config.num_layers:
      raise ValueError(
        f"the temperature profile has {len(self.temperatures)} layers, but the model has "
        f"{config.num_layers}: tune this model, or pass τ as numbers"
      )

  def check_routers(self, params: Params) -> None:
    """Checks that the profile was made for these routers.

    Raises:
      ValueError: it is for a different model of the same sizes.
    """
    if self.model and self.model[ROUTERS] != (found := fingerprint(params)):
      raise ValueError(
        f"the temperature profile is for {_describe(self.model)} with routers "
        f"{self.model[ROUTERS][:12]}, but this model of the same sizes has routers "
        f"{found[:12]}: tune this model, or pass τ as numbers"
      )


def read(path: PathLike) -> Profile:
  """Reads a profile from a file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is not a complete profile.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"there is no temperature profile {path}")
  expected = (
    f"{path} is not a temperature profile: expected a JSON object with a list of non-negative, "
    'finite numbers under "temperatures"'
  )
  try:
    values = typed.read(path, {"temperatures": list[float]})
  except ValueError as error:
    raise ValueError(f"{expected} ({error})") from error
  temperatures = tuple(map(float, values["temperatures"]))
  if min(temperatures, default=0) < 0:
    raise ValueError(expected)
  known = {f.name for f in dataclasses.fields(Profile)} - {"temperatures"}
  profile = Profile(temperatures, **{k: v for k, v in values.items() if k in known})
  if isinstance(profile.roster, dict) and profile.roster.get("recompute") is False:
    del profile.roster["recompute"]  # earlier versions wrote it
  try:
    typed.check_fields(profile)
    of_model = {name: typed.hints(ModelConfig)[name] for name in SIZES} | {ROUTERS: str}
    typed.check_keys("model", profile.model, of_model if profile.model else {}, others=True)
    typed.check_keys("roster", profile.roster, ROSTER_SETTINGS, required=False)
  except ValueError as error:
    raise ValueError(
      f"the temperature profile {path} is damaged or from another version: {error}"
    ) from error
  return profile


def sizes_of(config: ModelConfig) -> dict[str, Any]:
  """Returns the sizes that a profile is bound to."""
  return {name: getattr(config, name) for name in SIZES}


def model_of(name: str, config: ModelConfig, params: Params) -> dict[str, Any]:
  """Returns a profile's "model" entry."""
  return {"name": name, **sizes_of(config), ROUTERS: fingerprint(params)}


def roster_of(settings: dict[str, Any]) -> dict[str, Any]:
  """Returns a profile's "roster" entry, given `Roster.settings()`."""
  return {name: settings[name] for name in ROSTER_SETTINGS if name in settings}


def fingerprint(params: Params) -> str:
  """Returns the SHA-256 of all weights and biases of routers as bfloat16.

  It is independent of the model's dtype, the format of its experts and its sharding.
  """
  digest = hashlib.sha256()
  layers = params.layers
  of_routers = layers.router, layers.router_bias, layers.correction_bias
  for array in (*of_routers, *jax.tree.leaves((layers.router_projection, params.router_cell))):
    if array is not None:
      digest.update(np.asarray(jnp.asarray(array, jnp.bfloat16)).tobytes())
  return digest.hexdigest()


def _describe(model):
  name = f"{model['name']}, " if "name" in model else ""
  return (
    f"{name}{model['family']} with {model['num_layers']} layers of {model['num_experts']} "
    f"experts ({model['experts_per_token']} active, expert width {model['d_expert']}), width "
    f"{model['d_model']}, vocabulary {model['vocab_size']}"
  )
