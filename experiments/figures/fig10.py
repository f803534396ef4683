"""Figure 10: τ of each layer that searches found, as a heat map.

    python -m experiments.reproduce --figure=fig10 --model=olmoe --data_dir=data \\
        --allow_code_execution

A row for each task, from the searches of `fig7`, `fig8` and `fig9`; the L layers at either
end that searches keep at 0 are marked. The paper shows such maps of its tuned τ, which are
of a task and a model each.

    model      checkpoint (see models.py)              hardware               time
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       that of the searches
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    that of the searches
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     that of the searches
    embedded   ships with the package                  one CPU core           6 minutes (searches)
"""

import numpy as np

from experiments.analysis import pictures, report_page
from experiments.figures import searches
from experiments.figures.work import Command, Work

TITLE = "Temperatures by layer"
SAW = (
  "The paper shows the τ of each layer that its searches found, one profile for each task; "
  "not whether what differs between profiles is more than chance."
)
CONFIGS = searches.CONFIGS


def commands(work: Work) -> list[Command]:
  return searches.commands(work, work.model.tasks)


def measure(work: Work) -> list[searches.Record]:
  return [r | {"trials": []} for r in searches.records(work, work.model.tasks)]


def _fixed(record):
  """The layers that the search kept at 0."""
  layers, kept = len(record["profile"]["temperatures"]), record["settings"]["fixed_layers"]
  return {*range(kept), *range(layers - kept, layers)}


def table(records: list[searches.Record]) -> str:
  layers = len(records[0]["profile"]["temperatures"])
  rows = [
    [
      r["task"],
      r["profile"]["objective"]["kind"].replace("tpe", "TPE"),
      *(
        "fixed" if i in _fixed(r) else f"{t:.2f}"
        for i, t in enumerate(r["profile"]["temperatures"])
      ),
    ]
    for r in records
  ]
  return report_page.table(["task", "found by", *(f"layer {i}" for i in range(layers))], rows)


def findings(records: list[searches.Record]) -> str:
  free = sorted(
    set(range(len(records[0]["profile"]["temperatures"]))).difference(*map(_fixed, records))
  )
  grid = np.array([r["profile"]["temperatures"] for r in records])[:, free]
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
  return text + " That a profile differs does not say that it matters: see transfer."


def draw(records: list[searches.Record]):
  return pictures.temperatures(
    [searches.tuning(r) for r in records], [r["settings"]["fixed_layers"] for r in records]
  )
