"""Merged fine-tunes and rosters of them: what one vector and a bit per weight keep of each task.

    python -m experiments.reproduce --figure=merged_tasks --model=embedded

An embedded model is fine-tuned on each of its four sub-tasks. Their merge (EMR-Merging, arXiv
2405.17461) with each of its scales is compared with the fine-tunes themselves, with the average of
their weights and with task arithmetic (arXiv 2212.04089, the base plus a multiple of the sum of all
changes), and with rosters whose members compute with the tasks' weights, without being given the
task. τ, the multiple and output temperatures are chosen on validation problems, with other noise.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert import merge_checkpoints
from experiments import tasks
from experiments.analysis import (
  comparisons,
  drawing,
  output_temperatures,
  paired_statistics,
  report_page,
)
from experiments.cli import app
from experiments.evaluation.requests import RequestBuilder
from experiments.figures import compared
from experiments.figures.figure_run import FigureRun, Measurements
from experiments.tasks import wordmath, wordmath_task, wordmath_tokenizer
from experiments.training import training_batches, training_loop
from experiments.tuning.objectives import Accuracy, Perplexity
from roe_jax import checkpoint, merging, training
from roe_jax.params import Params
from roe_jax.roster import Roster

TITLE = "Merged fine-tunes, and a roster of them"
BACKGROUND = (
  "EMR-Merging (arXiv 2405.17461) keeps fine-tunes of one base in one vector and a bit per weight "
  "and task, and reports accuracies close to those of the separate models."
)
TASKS = ("sums", "products", "quotients", "choice")
BASE, SEPARATE, AVERAGE = "base", "separate fine-tunes", "average of weights"
MERGED, OF_TASKS = "merged, task given", "roster of the four tasks"
# The scales of rosters: the paper's, and the one with the smallest error of the weights.
SCALES = ("sums", "least_squares")


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    checkpoint: the base.
    steps, batch_size, learning_rate: of each fine-tuning.
    multiples: candidates for the multiple of task arithmetic.
    temperatures: candidates for τ.
    num_examples: test examples of each sub-task.
    num_seeds: noise seeds.
  """

  checkpoint: str = app.EMBEDDED + "wordmath_4of16"
  steps: int = 400
  batch_size: int = 16
  learning_rate: float = 1e-3
  multiples: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
  temperatures: tuple[float, ...] = (0.1, 0.3, 1.0)
  num_examples: int = 500
  num_seeds: int = 1


CONFIGS = {"embedded": Config()}


def _problem(kind: str, index: int, seed: int) -> wordmath.Problem:
  """Returns a problem of the train split for a sub-task: the index-th that fits or one after it."""
  while True:
    problem = wordmath.problem("train", index, seed)
    if kind in ("choice", wordmath_task.kind_of(problem)):
      return problem
    index += 1_000_000  # other problems than those of the next indices


def _encode(tokenizer, kind: str, problem: wordmath.Problem) -> tuple[list[int], list[int]]:
  """Returns the tokens before the answer, and those of the answer."""
  if kind != "choice":
    return training_batches.encode(tokenizer, problem)
  steps, mark, result = wordmath.completion(problem).rpartition("=")
  before, answer = tokenizer.encode_batch([wordmath.prompt(problem) + steps + mark, result])
  return before.ids, answer.ids


def _fine_tune(run: FigureRun, kind: str) -> str:
  """Trains on a sub-task, and returns the checkpoint; a killed training resumes."""
  own, folder = run.config, run.folder / "fine_tunes" / kind
  target = folder / "model"
  if target.exists():
    return str(target)
  params, config = app.load_params(own.checkpoint, "float32")
  settings = training.TrainSettings(own.steps, own.learning_rate, warmup_steps=own.steps // 20)
  facts = {"checkpoint": own.checkpoint, "kind": kind, "batch_size": own.batch_size}
  training_loop.check_output(folder, facts | dataclasses.asdict(settings))
  tokenizer = wordmath_tokenizer.build_tokenizer()

  def step(state, index):
    ids = [index * own.batch_size + i for i in range(own.batch_size)]
    some = [_encode(tokenizer, kind, _problem(kind, i, run.seed + 1)) for i in ids]
    batch = training_batches.pack(some, ids, 0.25, config.pad_token_id or 0, multiple=128)
    state, values = training.train_step(state, batch, config=config, settings=settings)
    return state, values, int((batch.weights > 0).sum())

  def start():
    weights: Any = params  # optax types pytrees as containers of its own
    started = training.optimizer(config, settings).init(weights)
    return training.TrainState(jnp.zeros((), jnp.int32), weights, started)

  state, _ = training_loop.run(
    folder,
    start,
    step,
    lambda state: {},
    num_steps=own.steps,
    log_every=50,
    save_every=100,
    evaluate_every=own.steps,
  )
  checkpoint.save(target, state.params, config, files=app.checkpoint_path(own.checkpoint))
  return str(target)


def _merged(run: FigureRun, fine_tunes: list[str]) -> str:
  """Merges the fine-tunes, and returns the checkpoint."""
  base, target = run.folder / "base", run.folder / "merged"
  if not base.exists():
    params, config = app.load_params(run.config.checkpoint, "float32")
    checkpoint.save(base, params, config, files=app.checkpoint_path(run.config.checkpoint))
  if not target.exists():
    merge_checkpoints.convert(fine_tunes, str(base), str(target))
  return str(target)


class _Problems:
  """The sub-tasks: test problems, and validation problems to choose on."""

  def __init__(self, run: FigureRun):
    self.config = app.load_config(run.config.checkpoint).replace(dtype="float32")
    builder = RequestBuilder(self.config, app.load_tokenizer(run.config.checkpoint))

    def objective(kind, of, split, count):
      task = tasks.get(f"wordmath_{kind}")
      examples = task.examples(split, run.data_dir, count)
      return of(self.config, builder, task, examples, run.model.batch_size)

    count, few = run.config.num_examples, run.model.num_validation
    self._answers = [objective(kind, Accuracy, "test", count) for kind in TASKS]
    self._texts = [objective(kind, Perplexity, "test", count) for kind in TASKS[:3]]
    self._choose_on = [objective(kind, Perplexity, "validation", few) for kind in TASKS[:3]]
    self.tokens = np.concatenate([t.tokens for t in self._texts])

  def value(self, system: "System", seed: int) -> float:
    """Returns the nats per validation token."""
    every = slice(None)
    nll = [
      o.nll(*system(i, seed), every, output_temperatures.padded([1.0]))[0][:, 0]
      for i, o in enumerate(self._choose_on)
    ]
    tokens = sum(int(o.tokens.sum()) for o in self._choose_on)
    return float(sum(n.sum() for n in nll) / tokens)

  def measure(self, system: "System", seed: int) -> dict[str, Any]:
    """Returns the metric of each test problem, and nats of each text at T = 1 and fitted T."""
    every, nll, fitted, correct = slice(None), [], [], []
    for i, answers in enumerate(self._answers):
      correct.append(answers.measure(*system(i, seed), every)[0].tolist())
    for i, (chosen, texts) in enumerate(zip(self._choose_on, self._texts)):
      on_grid = chosen.nll(*system(i, seed), every, output_temperatures.GRID)[0]
      both = output_temperatures.padded([1.0, output_temperatures.fit(on_grid)])
      found = texts.nll(*system(i, seed), every, both)[0]
      nll += found[:, 0].tolist()
      fitted += found[:, 1].tolist()
    return {"correct": correct, "nll": nll, "fitted_nll": fitted}


# Parameters and roster for the sub-task of this index, with a noise seed.
System = Callable[[int, int], tuple[Params, Roster]]


def _systems(
  run: FigureRun, problems: _Problems, keep: Measurements
) -> dict[str, tuple[System, int]]:
  """Returns what is compared: the system, and the bytes of what it keeps."""
  config = problems.config
  fine_tunes = [_fine_tune(run, kind) for kind in TASKS]
  merged = _merged(run, fine_tunes)
  of_merged, separate_bytes = merge_checkpoints.num_bytes(merged)
  one = separate_bytes // len(TASKS)
  base = checkpoint.load(run.folder / "base")[0]
  separate = [checkpoint.load(path)[0] for path in fine_tunes]
  everything = {kind: checkpoint.load(merged, task=merging.ALL, scale=kind)[0] for kind in SCALES}

  def given(kind):
    return [checkpoint.load(merged, task=i, scale=kind)[0] for i in range(len(TASKS))]

  def shared(params, *settings, **more):
    """One model for all sub-tasks."""
    return lambda task, seed: (params, Roster.create(config, *settings, seed=seed, **more))

  def of_each(several, *settings):
    """The model of the sub-task that is given."""
    return lambda task, seed: (several[task], Roster.create(config, *settings, seed=seed))

  def arithmetic(multiple):
    added = lambda w, *tasks: w + multiple * sum(task - w for task in tasks)
    return jax.tree.map(added, base, *separate)

  def best(name, candidates, make):
    """Returns the candidate with the best likelihood on validation problems, and its system."""
    value = lambda c: keep.get(f"{name} {c:g}", lambda: problems.value(make(c), run.seed))
    chosen = min(candidates, key=value)
    return chosen, make(chosen)

  n, own = len(TASKS), run.config
  tasks_alone = {"member_tasks": range(n), "include_clean": False}
  together = lambda kind: lambda tau: shared(everything[kind], n, tau, **tasks_alone)
  by_kind = {kind: given(kind) for kind in merging.SCALES}
  multiple, added = best("task arithmetic", own.multiples, lambda m: shared(arithmetic(m)))
  tau, of_base = best("base, τ =", own.temperatures, lambda t: shared(base, n, t))
  of_tasks, of_given = {}, {}
  for kind in SCALES:
    of_tasks[f"{OF_TASKS}, scale {kind}"] = (together(kind)(0.0), of_merged)
    tau_of_tasks, noisy = best(f"roster of tasks, {kind}, τ =", own.temperatures, together(kind))
    of_tasks[f"{OF_TASKS}, scale {kind}, τ = {tau_of_tasks:g}"] = (noisy, of_merged)
    tau_of_one, noisy = best(
      f"merged, {kind}, τ =", own.temperatures, lambda t, k=kind: of_each(by_kind[k], n, t)
    )
    of_given[f"{MERGED}, scale {kind}, roster of {n}, τ = {tau_of_one:g}"] = (noisy, of_merged)
  return {
    BASE: (shared(base), one),
    f"{BASE}, roster of {n}, τ = {tau:g}": (of_base, one),
    SEPARATE: (of_each(separate), separate_bytes),
    AVERAGE: (shared(arithmetic(1 / n)), one),
    f"task arithmetic, {multiple:g}": (added, one),
    **{f"{MERGED}, scale {k}": (of_each(several), of_merged) for k, several in by_kind.items()},
    **of_given,
    **of_tasks,
  }


def measure(run: FigureRun) -> list[compared.Record]:
  problems, keep = _Problems(run), run.measurements()
  found, sizes = {}, {}
  for name, (system, size) in _systems(run, problems, keep).items():
    of_seed = [
      keep.get(f"{name}, seed {seed}", functools.partial(problems.measure, system, seed))
      for seed in (run.seed + 1 + i for i in range(run.config.num_seeds))
    ]
    joined = lambda key, several=of_seed: np.stack([np.ravel(m[key]) for m in several], axis=1)
    found[name] = {key: joined(key) for key in ("correct", "nll", "fitted_nll")}
    sizes[name] = size
  records = []
  for name, of in found.items():
    against = {}
    for other, label in ((BASE, "quality_difference"), (SEPARATE, "from_separate")):
      if name != other:
        pair = of["correct"], found[other]["correct"]
        against[label] = paired_statistics.tested(
          paired_statistics.paired_accuracy(*pair), paired_statistics.paired_test(*pair)
        )
    by_task = np.split(100 * of["correct"].mean(axis=1), len(TASKS))
    comparison = name != BASE and comparisons.compare_perplexities(
      name, BASE, "text", of["fitted_nll"], found[BASE]["fitted_nll"], problems.tokens
    )
    records.append(
      {
        "label": name,
        "task": "the sub-tasks",
        "examples": len(of["correct"]),
        "bytes": sizes[name],
        "by_task": [float(values.mean()) for values in by_task],
        "quality": paired_statistics.accuracy(of["correct"]),
        "quality_difference": against.get("quality_difference"),
        "from_separate": against.get("from_separate"),
        "perplexity": paired_statistics.perplexity(of["nll"], problems.tokens),
        "fitted": paired_statistics.perplexity(of["fitted_nll"], problems.tokens),
        "fitted_difference": comparison.difference if comparison else None,
      }
    )
  separate = paired_statistics.corrected([r["from_separate"] for r in records])
  records = [r | {"from_separate": d} for r, d in zip(records, separate)]
  return compared.corrected(records)


def table(records: list[compared.Record]) -> str:
  columns: dict[str, Any] = {
    "system": "label",
    "MB": lambda r: f"{r['bytes'] / 1e6:.2f}",
    **{kind: lambda r, i=i: f"{r['by_task'][i]:.1f}" for i, kind in enumerate(TASKS)},
    "all (%)": lambda r: compared.cell(r["quality"], 1),
    "from the base (points)": lambda r: compared.cell(r["quality_difference"], 1, True),
    "from separate fine-tunes (points)": lambda r: compared.cell(r["from_separate"], 1, True),
    "perplexity": lambda r: compared.cell(r["perplexity"], 4),
    "perplexity at fitted T": lambda r: compared.cell(r["fitted"], 4),
    "from the base at fitted T (%)": lambda r: compared.cell(r["fitted_difference"], 2, True),
  }
  note = (
    f"{records[0]['examples']} test problems, as many of each sub-task; perplexities are of the "
    "solutions of all but `choice`. MB: of the float32 arrays that are kept. Brackets: 95 % "
    "bootstrap intervals over problems, differences paired by problem; *: significant after Holm's "
    "correction over the column."
  )
  return report_page.table_of(records, columns) + "\n\n" + note


def findings(records: list[compared.Record]) -> str:
  left_out = ("τ", *(f"{MERGED}, scale {kind}" for kind in merging.SCALES if kind not in SCALES))
  some = [r for r in records[1:] if not any(name in r["label"] for name in left_out)]

  def text(name, unit):
    return "; ".join(f"{r['label']} {report_page.difference(r[name], 1, unit)}" for r in some)

  return (
    f"Accuracy against the base: {text('quality_difference', ' points')}. Perplexity at fitted T: "
    f"{text('fitted_difference', ' %')}."
  )


def draw(records: list[compared.Record]):
  figure, axes = drawing.axes(2, width=3.8, height=3.4, sharey=True)
  rows = np.arange(len(records))[::-1]
  panels = (("quality", "accuracy, four sub-tasks (%)"), ("fitted", "perplexity at fitted T"))
  for axis, (name, title) in zip(np.ravel(axes), panels):
    values, errors = drawing.bars([r[name] for r in records])
    axis.errorbar(values, rows, xerr=errors, **(drawing.style(0) | {"linestyle": "none"}))
    axis.set_xlabel(title)
    axis.locator_params(axis="x", nbins=4)
    axis.set_yticks(rows, [r["label"] for r in records], fontsize=7)
  return figure
