"""The paper's figures and tables, and those that its reviewers asked for: one module each.

A figure has

* `TITLE`, and `BACKGROUND`: in a sentence or two, what the paper reports or who asked what;
* `CONFIGS`: {model: its settings}, a frozen dataclass, for each model that it is made of;
* `commands(run)`, if other programs run first: see `figure_run.Command`;
* `NEEDS`, if it uses packages of optional extras: their names;
* `measure(run)`: their results, or its own measurements, as a list of JSON objects;
* `table(records)` in Markdown, `findings(records)` in sentences, and `draw(records)`: a
  picture, or None if the table is enough.

Minutes on the hardware in `figure_models`, without searches shared with fig7, fig8 and fig9
(which fig3, fig10, table1, search_cost and transfer use). The embedded models' are measured,
the others are estimated with `roe_jax.costs` (H100):

                    olmoe   mixtral   gpt_oss   embedded
    fig3               30        60        30          3
    fig4a, fig4b       15        25        20          2
    fig5a             100        80        40          6
    fig5b (+ fig5a)    15         -         -        0.5
    fig6               35        80        40          4
    fig7               20        20        10          3
    fig8               30        30        20          2
    fig9               15        25        15          1
    calibration         5        10         5          2
    iso_compute        25        50        30          8
    caches             10        20        10          4
    ceiling            35        40        20         11
    sparsity            5        10         5          5
    transfer           45       100        50          4
    noise_families     10        10         5          9
    shared_noise       10        15        10          6
    tau_units          40        90        50          8

smollm2's `shared_noise` took 47 minutes of two busy cores, and `last_words` 36 of one core (1,000
passages, n up to 64, three candidates for τ) and 23 for two more noise seeds. `main_table` took 2.6
hours of one core, an hour and a half of them for the 22 methods that read 1,000 passages.
`minimal_pairs` took about an hour of one core.

`merged_tasks` fine-tunes a small model four times; it took 70 minutes of one core that other jobs
shared. `deep_training` trains twelve models of 24 layers and `trained_routing` those that are not
embedded, each about five to ten minutes of one core. `bits` took about 40 minutes of a busy core.
`vision_sr` trains 24 small networks of 300 steps, and `vision_moe` 18 of 600.
"""

from collections.abc import Sequence
import dataclasses
import importlib
from types import ModuleType
from typing import Any

from experiments.figures.figure_run import Command, FigureRun

SEARCHES = ("fig7", "fig8", "fig9")
PAPER = ("fig3", "fig4a", "fig4b", "fig5a", "fig5b", "fig6", *SEARCHES, "fig10", "table1")
REVIEWERS = (
  "calibration",
  "iso_compute",
  "caches",
  "ceiling",
  "sparsity",
  "search_cost",
  "transfer",
  "noise_families",
  "shared_noise",
  "tau_units",
)
LANGUAGE = ("main_table", "last_words", "minimal_pairs")
VISION = ("vision_sr", "vision_moe")
SYSTEMS = ("merged_tasks", "bits")
TRAINING = ("trained_routing", "deep_training")
NAMES = PAPER + REVIEWERS + LANGUAGE + SYSTEMS + TRAINING + VISION
# Settings of a model that only some figures use.
BUDGETS = (
  "num_members",
  "tau",
  "num_seeds",
  "num_examples",
  "num_validation",
  "num_search_examples",
  "num_trials",
  "batch_size",
)


def of_model(names: Sequence[str], model: str) -> list[str]:
  """Returns the names of the figures that are made of a model."""
  return [name for name in names if model in get(name).CONFIGS]


def get(name: str) -> ModuleType | Any:
  """Returns the module of a figure, or an object with the same attributes.

  Raises:
    ValueError: unknown name.
  """
  if name not in NAMES:
    raise ValueError(f"unknown figure {name!r}: give one of {', '.join(NAMES)}")
  if name in SEARCHES:
    return importlib.import_module(f"{__name__}.searches").FIGURES[name]
  return importlib.import_module(f"{__name__}.{name}")


def commands(run: FigureRun) -> list[Command]:
  """Returns the programs that run before a figure is measured."""
  return getattr(get(run.figure), "commands", lambda run: [])(run)


def uses(run: FigureRun, name: str) -> bool:
  """Whether a figure depends on a setting: on any but a budget of the model that it ignores."""
  if name not in BUDGETS or name in {f.name for f in dataclasses.fields(run.config)}:
    return True
  if name in getattr(getattr(get(run.figure), "likelihoods", None), "BUDGETS", ()):
    return True
  try:
    model = dataclasses.replace(run.model, **{name: object()})
    return commands(dataclasses.replace(run, model=model)) != commands(run)
  except TypeError:  # `commands` computed with the object
    return True
