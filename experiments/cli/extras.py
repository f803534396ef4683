"""Packages of optional extras, imported at their first use: flags are checked before."""

from importlib import util
from typing import TYPE_CHECKING

from roe_jax.lazy_modules import LazyModule

EXTRAS = {
  "experiments": ("lm_eval", "matplotlib", "optuna", "scipy", "tabulate"),
  "vision": ("skimage", "sklearn"),
  "llama_cpp": ("gguf", "llama_cpp"),
}
PACKAGES = tuple(name for names in EXTRAS.values() for name in names)


def install(package: str) -> str:
  """Returns the command that installs a package of an extra, with all others of the extra."""
  extra = next(extra for extra, names in EXTRAS.items() if package in names)
  return f'pip install "roe_jax[{extra}]"'


def check(packages: tuple[str, ...]) -> None:
  """Checks, without importing them, that packages are installed.

  Raises:
    ModuleNotFoundError: one is not.
  """
  for name in packages:
    if util.find_spec(name) is None:
      raise ModuleNotFoundError(f"no module named {name!r}", name=name)


if TYPE_CHECKING:
  import gguf
  import llama_cpp  # pyright: ignore[reportMissingImports]  # may not be installed
  import matplotlib.axes
  import matplotlib.figure
  import matplotlib.markers
  import matplotlib.patches
  import matplotlib.pyplot as plt
  import matplotlib.ticker
  import matplotlib.transforms
  import optuna
  import scipy
  import skimage  # pyright: ignore[reportMissingImports]  # may not be installed
  import sklearn  # pyright: ignore[reportMissingImports]  # may not be installed
  import tabulate
else:
  matplotlib, optuna, scipy, tabulate, skimage, sklearn, gguf, llama_cpp = map(
    LazyModule, PACKAGES[1:]
  )
  plt = LazyModule("matplotlib.pyplot")
