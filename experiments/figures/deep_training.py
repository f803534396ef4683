"""Deep thin models at a high learning rate, with and without sandwich norm and TinyInit.

    python -m experiments.reproduce --figure=deep_training --model=embedded

The models are the configs of `wordmath_deep`, each trained from several seeds on the same problems.
A step's gradient norm (before clipping) is a spike if it is above a multiple of the median of the
steps before it; the first steps, in which the learning rate rises, do not count.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np
import scipy.stats

from experiments.analysis import drawing, report_page
from experiments.analysis.paired_statistics import CONFIDENCE, Difference
from experiments.figures import compared
from experiments.figures.figure_run import Command, FigureRun
from experiments.records import store
from experiments.training.configs import wordmath_deep

TITLE = "Deep models: sandwich norm and TinyInit"
BACKGROUND = (
  "Pangu Ultra MoE (arXiv 2505.04519) trains 61 layers with depth-scaled sandwich norm and "
  "TinyInit, and reports half as many gradient spikes and better results."
)
PLAIN = "plain"
# An effect of the 2 x 2 design: the mean over the other factor.
EFFECTS = {
  "sandwich norm": (("sandwich", "sandwich_tiny"), (PLAIN, "tiny")),
  "TinyInit": (("tiny", "sandwich_tiny"), (PLAIN, "sandwich")),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """The trainings, and what a spike is.

  Attributes:
    training_seeds: seeds of initial weights and training problems.
    steps: of each training.
    factors: multiples of the median above which a gradient norm is a spike.
    window: steps before it that the median is of, and those that do not count.
  """

  training_seeds: tuple[int, ...] = (1, 2, 3)
  steps: int = 500
  factors: tuple[float, ...] = (1.5, 2.0, 3.0)
  window: int = 50
  num_seeds: ClassVar[int] = 1


CONFIGS = {"embedded": Config()}


def _training(run: FigureRun, name: str, seed: int) -> Command:
  return Command(
    "train",
    run.root / "train" / f"deep_{name}-{seed}",
    (("config", f"wordmath_deep:{name}"), ("seed", seed), ("steps", run.config.steps)),
    "model/manifest.json",
  )


def commands(run: FigureRun) -> list[Command]:
  seeds = run.config.training_seeds
  return [_training(run, name, seed) for seed in seeds for name in wordmath_deep.VARIANTS]


def spike_ratio(norms: np.ndarray, factor: float, window: int) -> float:
  """Returns the share of steps whose gradient norm is a spike.

  Args:
    norms: `[S]` gradient norm of each step.
    factor: multiple of the median above which a norm is a spike.
    window: number of steps before it that the median is of; the first ones do not count.

  Raises:
    ValueError: there are no more than `window` steps.
  """
  if len(norms) <= window:
    raise ValueError(f"spikes after {window} steps need more steps, got {len(norms)}")
  medians = np.median(np.lib.stride_tricks.sliding_window_view(norms[:-1], window), axis=-1)
  return float(np.mean(norms[window:] > factor * medians))


def _over_seeds(values) -> Difference:
  """Returns the mean with the interval of Student's t over seeds."""
  values = np.asarray(values, float)
  mean = values.mean()
  if len(values) < 2 or not values.std():
    return Difference(mean, mean, mean)
  bounds = scipy.stats.t.interval(CONFIDENCE, len(values) - 1, mean, scipy.stats.sem(values))
  return Difference(float(mean), *map(float, bounds))


def measure(run: FigureRun) -> list[compared.Record]:
  own, found = run.config, {}
  for name in wordmath_deep.VARIANTS:
    norms, perplexities, losses = [], [], []
    for seed in own.training_seeds:
      lines = store.read_lines(_training(run, name, seed).output / "metrics.jsonl")
      steps = [r for r in lines if r["kind"] == "training"]
      norms.append(np.array([r["grad_norm"] for r in steps]))
      losses.append(np.mean([r["cross_entropy"] for r in steps[-own.window :]]))
      perplexities.append([r for r in lines if r["kind"] == "evaluation"][-1])
    found[name] = {
      "losses": [float(f"{loss:.6g}") for loss in losses],
      "perplexities": [float(f"{p['validation_perplexity']:.6g}") for p in perplexities],
      "spikes": {
        f"{factor:g}": [100 * spike_ratio(n, factor, own.window) for n in norms]
        for factor in own.factors
      },
      "grad_norm": [[float(f"{v:.3g}") for v in of] for of in norms],
    }
  records: list[compared.Record] = [
    {"kind": "model", "label": name, "seeds": list(own.training_seeds), **of}
    for name, of in found.items()
  ]
  quantities = {"loss (nats)": lambda of: np.array(of["losses"])}
  for factor in own.factors:
    quantities[f"spikes at {factor:g} × (points)"] = lambda of, f=f"{factor:g}": np.array(
      of["spikes"][f]
    )
  for label, (with_it, without) in EFFECTS.items():
    mean = lambda names, of: np.mean([of(found[name]) for name in names], axis=0)
    effects = {
      q: _over_seeds(mean(with_it, of) - mean(without, of)) for q, of in quantities.items()
    }
    records.append({"kind": "effect", "label": label, **effects})
  return records


def table(records: list[compared.Record]) -> str:
  models = [r for r in records if r["kind"] == "model"]
  effects = [r for r in records if r["kind"] == "effect"]
  by_seed = lambda values, places: ", ".join(f"{v:.{places}f}" for v in values)
  columns: dict[str, Any] = {
    "model": "label",
    "loss of the last steps (nats)": lambda r: by_seed(r["losses"], 3),
    "validation perplexity of answers": lambda r: by_seed(r["perplexities"], 2),
  }
  for factor in models[0]["spikes"]:
    columns[f"gradient spikes at {factor} × (%)"] = lambda r, f=factor: by_seed(r["spikes"][f], 1)
  names = [name for name in effects[0] if name not in ("kind", "label")]
  of_effects = {"effect of": "label"} | {
    name: lambda r, n=name: compared.cell(r[n], 3 if n.startswith("loss") else 1, True)
    for name in names
  }
  note = (
    f"One value per seed of training ({report_page.count(len(models[0]['seeds']), 'seed')}). "
    "Effects are means over the other factor; brackets: 95 % intervals of Student's t over seeds, "
    "paired by seed, without correction for their number."
  )
  tables = report_page.table_of(models, columns), report_page.table_of(effects, of_effects)
  return "\n\n".join([*tables, note])


def findings(records: list[compared.Record]) -> str:
  effects = [r for r in records if r["kind"] == "effect"]
  sentences = []
  for r in effects:
    of = [
      f"{name} {report_page.difference(value, 3 if name.startswith('loss') else 1)}"
      for name, value in r.items()
      if isinstance(value, Difference)
    ]
    sentences.append(f"Effect of {r['label']}: {'; '.join(of)}.")
  return " ".join(sentences)


def draw(records: list[compared.Record]):
  models = [r for r in records if r["kind"] == "model"]
  figure, axes = drawing.panels([r["label"] for r in models], columns=2, width=3.8, height=2.4)
  for axis, r in zip(axes, models):
    for i, (seed, norms) in enumerate(zip(r["seeds"], r["grad_norm"])):
      axis.plot(norms, linewidth=0.6, color=drawing.SHADES[i % 3], label=f"seed {seed}")
    axis.set_yscale("log")
    axis.set_ylim(0.05, 1.2 * max(max(of) for m in models for of in m["grad_norm"]))
    axis.set_xlabel("step")
    axis.set_ylabel("gradient norm")
    axis.legend(fontsize=7, frameon=False)
  return figure
