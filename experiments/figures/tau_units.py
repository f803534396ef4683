"""Does one τ fit all layers and models, if it is in units of the routers' own scale?

    python -m experiments.reproduce --figure=tau_units --model=embedded

In units of logits, of each layer's spread of router logits, and of the margin between the last
chosen and the next logit (see `experiments.scale_tau`). For each unit, each model's best τ of a
grid is chosen on some sequences, and used by all models on others. The price of a borrowed τ is
the rise of perplexity over a model's own best τ in logits; its own best τ in a unit shows what
varying τ between layers by that unit is worth.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from experiments.analysis import drawing, report_page
from experiments.figures import compared, figure_models, likelihoods
from experiments.figures.figure_run import FigureRun
from roe_jax import diagnostics
from roe_jax.roster import Roster

TITLE = "One τ for all layers and models?"
BACKGROUND = (
  "The paper tunes a τ for each layer, model and task, in units of router logits, whose scale "
  "differs between layers and models."
)
OWN, BORROWED = "its own τ", "τ of other models"


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    checkpoints: the models; empty: those of --model.
    task: whose references are scored.
    num_members: members.
    logits, spread, margin: candidates for τ in each unit.
    num_examples: to report on.
    num_seeds: noise seeds.
  """

  checkpoints: tuple[str, ...] = ()
  task: str = "paper/gsm8k"
  num_members: int = 8
  logits: tuple[float, ...] = (0.1, 0.2, 0.35, 0.6, 1.0)
  spread: tuple[float, ...] = (0.05, 0.1, 0.18, 0.3, 0.5, 0.9)
  margin: tuple[float, ...] = (0.15, 0.3, 0.6, 1.2, 2.5, 5.0)
  num_examples: int = 300
  num_seeds: int = 3


_EMBEDDED = tuple(
  f"embedded:wordmath_{name}" for name in ("control", "overtrained", "2of16", "4of32")
)
CONFIGS = figure_models.configs(
  Config(), embedded=Config(_EMBEDDED, task="wordmath", num_examples=80, num_seeds=1)
)


def measure(run: FigureRun) -> list[compared.Record]:
  config, keep = run.config, run.measurements()
  checkpoints = config.checkpoints or run.model.checkpoints
  grids = {unit: getattr(config, unit) for unit in diagnostics.UNITS}
  chosen, reported = {}, {}
  for checkpoint in checkpoints:
    opened: list = []

    def open_scorer(checkpoint=checkpoint, opened=opened):
      if not opened:
        opened.append(
          likelihoods.ReferenceScorer(run, checkpoint, config.task, config.num_examples)
        )
      return opened[0]

    def scales(open_scorer=open_scorer):
      scorer = open_scorer()
      requests = scorer.choose_on.requests
      found = diagnostics.router_scales(
        scorer.params,
        scorer.config,
        [r.sequence for r in requests],
        [len(r.context) for r in requests],
        run.model.batch_size,
      )
      return {unit: values.tolist() for unit, values in found.items()}

    sizes = keep.get(f"{checkpoint}, scales", scales)
    for unit, grid in grids.items():
      for tau in grid:

        def value(open_scorer=open_scorer, unit=unit, tau=tau, sizes=sizes):
          scorer = open_scorer()

          def roster(seed):
            return Roster.create(
              scorer.config,
              config.num_members,
              (tau * np.array(sizes[unit])).tolist(),
              seed=seed,
              cache=run.model.cache,
            )

          objective, tokens = scorer.report_on, scorer.report_on.tokens.sum()
          seeds = range(run.seed + 1, run.seed + 1 + config.num_seeds)
          nll = [objective.nll(scorer.params, roster(s), slice(None))[0].sum() for s in seeds]
          return [scorer.value(roster(run.seed)), float(np.mean(nll) / tokens)]

        key = checkpoint, unit, tau
        chosen[key], reported[key] = keep.get(f"{checkpoint}, {unit}, τ = {tau:g}", value)
  return _records(checkpoints, grids, chosen, reported)


def _records(checkpoints, grids, chosen, reported):
  """Returns a record per model and unit: perplexities at its own best τ and at others'."""
  best = {
    (c, unit): min(grid, key=lambda tau: chosen[c, unit, tau])
    for c in checkpoints
    for unit, grid in grids.items()
  }
  found = []
  for c in checkpoints:
    reference = reported[c, "logits", best[c, "logits"]]
    for unit, grid in grids.items():
      rise = lambda tau: 100 * (np.exp(reported[c, unit, tau] - reference) - 1)
      others = [rise(best[o, unit]) for o in checkpoints if o != c]
      found.append(
        {
          "model": c.rpartition(":")[2],
          "unit": unit,
          "τ": best[c, unit],
          "is_edge": best[c, unit] in (grid[0], grid[-1]),
          OWN: float(rise(best[c, unit])),
          BORROWED: float(np.mean(others)) if others else None,
          "worst": float(np.max(others)) if others else None,
        }
      )
  return found


def table(records: Sequence[compared.Record]) -> str:
  percent = lambda name: lambda r: "" if r[name] is None else f"{r[name]:+.3f}"
  columns = {
    "model": "model",
    "unit": "unit",
    "best τ": lambda r: f"{r['τ']:g}" + (" (edge of the grid)" if r["is_edge"] else ""),
    "perplexity at its own τ (%)": percent(OWN),
    "at other models' τ, mean (%)": percent(BORROWED),
    "at the worst of these (%)": percent("worst"),
  }
  return report_page.table_of(records, columns) + (
    "\n\nDifferences from the model's own best τ in logits, all on sequences that no τ was chosen "
    "on, at output temperature 1: what a larger τ gains may be calibration."
  )


def findings(records: Sequence[compared.Record]) -> str:
  parts = []
  for unit in compared.unique(records, "unit"):
    some = [r for r in records if r["unit"] == unit]
    borrowed = [r[BORROWED] for r in some if r[BORROWED] is not None]
    if borrowed:
      parts.append(
        f"{unit}: {np.mean(borrowed):+.3f} % on average with another model's τ (at worst "
        f"{max(r['worst'] for r in some):+.3f} %), {np.mean([r[OWN] for r in some]):+.3f} % with "
        "its own"
      )
  return f"Perplexity against each model's own best τ in logits, by unit: {'; '.join(parts)}."


def draw(records: Sequence[compared.Record]):
  figure, axes = drawing.axes(1, width=6.4, height=3.4)
  (axis,) = axes[0]
  models = compared.unique(records, "model")
  for index, unit in enumerate(compared.unique(records, "unit")):
    of = {r["model"]: r for r in records if r["unit"] == unit}
    x = np.arange(len(models)) + 0.2 * (index - 1)
    for offset, what in enumerate((BORROWED, OWN)):
      y = [of[m][what] for m in models]
      axis.errorbar(x, y, label=f"{unit}, {what}", **drawing.style(2 * index + offset))
  drawing.zero(axis)
  axis.set_xticks(range(len(models)), [m.removeprefix("wordmath_") for m in models])
  axis.set_ylabel("perplexity: difference from\nits own best τ in logits (%)")
  drawing.legend(figure, axis)
  return figure
