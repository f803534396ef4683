"""The figures and tables of the paper, and those that its reviewers asked for: one file each.

A file has

* a docstring: what the paper saw or the reviewers asked, and for each model the
  checkpoint to convert, the hardware and the time it takes;
* `TITLE`, and `SAW`: in a sentence or two, what the paper saw, or who asked what;
* `CONFIGS`: {model: settings of its own}, a frozen dataclass;
* `commands(work)`: the programs to run first, see `work.Command`;
* `measure(work)`: what they came to, or own measurements, as a list of JSON objects;
* `table(records)`: Markdown, `findings(records)`: what the intervals say, in sentences,
  and `draw(records)`: a picture, or None where the table says all.
"""

import importlib
from types import ModuleType

PAPER = (
  "fig3",
  "fig4a",
  "fig4b",
  "fig5a",
  "fig5b",
  "fig6",
  "fig7",
  "fig8",
  "fig9",
  "fig10",
  "table1",
)
REVIEWERS = (
  "calibration",
  "iso_compute",
  "caches",
  "ceiling",
  "sparsity",
  "search_cost",
  "transfer",
  "noise_families",
)
NAMES = PAPER + REVIEWERS


def get(name: str) -> ModuleType:
  """The module of a figure.

  Raises:
    ValueError: there is none of that name.
  """
  if name not in NAMES:
    raise ValueError(f"there is no figure {name!r}; there are {', '.join(NAMES)}")
  return importlib.import_module(f"{__name__}.{name}")
