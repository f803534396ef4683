"""Figure 10: heat map of the τ of each layer found by searches.

    python -m experiments.reproduce --figure=fig10 --model=olmoe --data_dir=data \\
        --allow_code_execution

A row per task, from the searches of fig7, fig8 and fig9; the L layers at either end that
searches keep at 0 are hatched.
"""

import numpy as np

from experiments.analysis import pictures, report_page
from experiments.figures import searches

TITLE = "Temperatures by layer"
BACKGROUND = (
  "The paper shows the τ of each layer found by its searches, one temperature profile per task, "
  "but not whether differences between profiles are more than chance."
)
CONFIGS, commands, measure = searches.CONFIGS, searches.commands, searches.measure


def _temperatures(record):
  return record["profile"]["temperatures"]


def _fixed(record):
  """Returns the layers that the search kept at 0."""
  layers, kept = len(_temperatures(record)), record["settings"]["fixed_layers"]
  return {*range(kept), *range(layers - kept, layers)}


def table(records: list[searches.Record]) -> str:
  columns = {
    "task": "task",
    "found by": lambda r: r["profile"]["objective"]["kind"].replace("tpe", "TPE"),
  }
  for i in range(len(_temperatures(records[0]))):
    columns[f"layer {i}"] = lambda r, i=i: (
      "fixed" if i in _fixed(r) else f"{_temperatures(r)[i]:.2f}"
    )
  return report_page.table_of(records, columns)


def findings(records: list[searches.Record]) -> str:
  layers = set(range(len(_temperatures(records[0]))))
  free = sorted(layers.difference(*map(_fixed, records)))
  grid = np.array([_temperatures(r) for r in records])[:, free]
  text = (
    f"Mean τ of layers {free[0]} to {free[-1]}, which no search kept at 0, over "
    f"{report_page.count(len(records), 'task')}: "
    + ", ".join(f"{m:.2f}" for m in grid.mean(axis=0))
    + "."
  )
  if len(records) > 1 and len(free) > 1:
    text += (
      f" Standard deviation between tasks {grid.std(axis=0, ddof=1).mean():.2f} on average, "
      f"between layers {grid.std(axis=1, ddof=1).mean():.2f}."
    )
  return text + " Different temperature profiles need not make a difference: see transfer."


def draw(records: list[searches.Record]):
  fixed = [r["settings"]["fixed_layers"] for r in records]
  return pictures.temperatures([searches.tuning(r) for r in records], fixed)
