"""Packages of the `experiments` extra, imported at their first use: flags are checked before."""

import importlib
from importlib import util
from typing import TYPE_CHECKING, Any

INSTALL = 'pip install "roe_jax[experiments]"'
PACKAGES = ("lm_eval", "matplotlib", "optuna", "scipy", "tabulate")


def check(packages: tuple[str, ...]) -> None:
  """Checks, without importing them, that packages are installed.

  Raises:
    ModuleNotFoundError: one is not.
  """
  for name in packages:
    if util.find_spec(name) is None:
      raise ModuleNotFoundError(f"no module named {name!r}", name=name)


class _Lazy:
  """A module that is imported when one of its attributes is used."""

  def __init__(self, name: str):
    self._name = name

  def __getattr__(self, attribute: str) -> Any:
    return getattr(importlib.import_module(self._name), attribute)


if TYPE_CHECKING:
  import matplotlib
  import matplotlib.pyplot as plt
  import optuna
  import scipy
  import tabulate
else:
  matplotlib, optuna, scipy, tabulate = map(_Lazy, PACKAGES[1:])
  plt = _Lazy("matplotlib.pyplot")
