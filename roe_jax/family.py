"""What the library knows about a model family, as data; `family_table` has the families."""

from collections.abc import Callable
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
  """A model family.

  Attributes:
    architecture: its class in transformers.
    defaults: keys of `config.json` with the values that transformers assumes for missing ones.
    keys: the key of each `ModelConfig` field that is read, in addition to `COMMON_KEYS`.
    fixed: fields with the same value in all models of the family.
    supported: the only supported value of some `config.json` keys; also their default.
    has_window: whether the architecture has a `sliding_window`.
    needs_use_sliding_window: whether the window applies only with `use_sliding_window`.
    is_sliding: `(config.json, layer) -> bool`, which layers have the window by default
      (without `layer_types`); None if all have it.
    formats: expert quantization formats of its hub checkpoints.
    has_partial_rotary: whether the architecture has a `partial_rotary_factor`.
    other_types: further values of `model_type`, that of other architectures, too.
    read, write: where keys do not correspond to fields one by one, map `config.json` to one where
      they do, and back.
  """

  architecture: str
  defaults: dict[str, Any]
  keys: dict[str, str]
  fixed: dict[str, Any]
  supported: dict[str, Any] = dataclasses.field(default_factory=dict)
  has_window: bool = True
  needs_use_sliding_window: bool = False
  is_sliding: Callable[[dict[str, Any], int], bool] | None = None
  formats: tuple[str, ...] = ()
  has_partial_rotary: bool = False
  other_types: tuple[str, ...] = ()
  read: Callable[[dict[str, Any]], dict[str, Any]] = lambda hf: hf
  write: Callable[[dict[str, Any]], dict[str, Any]] = lambda hf: hf


# One key for both.
ATTENTION_BIAS = {"qkv_bias": "attention_bias", "output_bias": "attention_bias"}


def above_max_window_layers(hf: dict[str, Any], layer: int) -> bool:
  """Returns whether a layer has the window, where `max_window_layers` says so."""
  return layer >= hf["max_window_layers"]
