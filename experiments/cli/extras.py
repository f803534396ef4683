"""Packages of the `experiments` extra, imported at their first use: flags are checked before."""

from importlib import util
from typing import TYPE_CHECKING

from roe_jax.lazy_modules import LazyModule

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


if TYPE_CHECKING:
  import matplotlib
  import matplotlib.pyplot as plt
  import optuna
  import scipy
  import tabulate
else:
  matplotlib, optuna, scipy, tabulate = map(LazyModule, PACKAGES[1:])
  plt = LazyModule("matplotlib.pyplot")
