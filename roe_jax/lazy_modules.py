"""Modules that are slow to import, imported at their first use."""

import importlib
from typing import TYPE_CHECKING, Any


class LazyModule:
  """A module that is imported when one of its attributes is used."""

  def __init__(self, name: str):
    self._name = name

  def __getattr__(self, attribute: str) -> Any:
    return getattr(importlib.import_module(self._name), attribute)


def is_available(module: Any) -> bool:
  """Returns whether a `LazyModule` can be imported."""
  try:
    importlib.import_module(module._name)
  except ImportError:
    return False
  return True


# The languages of kernels, which CPUs do not use.
if TYPE_CHECKING:
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu
  from jax.experimental.pallas import triton as plgpu
else:
  pl, plgpu, pltpu = (
    LazyModule(f"jax.experimental.pallas{part}") for part in ("", ".triton", ".tpu")
  )
