"""Compares methods on the same examples: quality, likelihood, calibration and cost.

  python -m experiments.compare --checkpoint=embedded:wordmath_overtrained \\
      --tau=0.3 --num_members=8 --num_examples=80

Writes one run per method to --output, which `experiments.report` turns into a page.
`experiments.evaluation.methods` documents the methods; the default ones use as many
forward passes as a roster of --num_members.

Methods take turns on each batch, in a shuffled order, so that other load on the machine
affects all alike. Costs (`experiments.records.cost`) are those of the answers; likelihoods are
computed separately, and unique active experts are counted on a task's first batch. Output
temperatures are fitted, and the best baseline settings selected, on validation examples with
the first noise seed.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import pathlib
import sys
import time
from typing import Any

from absl import flags
import numpy as np
from tqdm import tqdm

from experiments import tasks
from experiments.analysis import output_temperatures
from experiments.cli import app, text_files
from experiments.cli.extras import tabulate
from experiments.evaluation import methods as methods_lib
from experiments.evaluation.engine import Likelihood
from experiments.evaluation.measurer import Measurer
from experiments.evaluation.method import Method
from experiments.evaluation.methods import FittedBaseline
from experiments.evaluation.requests import RequestBuilder, TaskRequests
from experiments.records import runs, store
from roe_jax import temperature_profiles, typed

FLAGS = flags.FLAGS
TEMPERATURES = "output_temperatures.json"
SETTINGS = "baseline_settings.json"


def define_flags(checkpoint: str | None = None) -> None:
  app.define_model_flags(checkpoint)
  app.define_roster_flags(num_members=8)
  app.define_chat_flags()
  app.define_limit_flag()
  flags.DEFINE_string(
    "methods",
    None,
    'Methods, separated by semicolons, such as "baseline; roster:n=8,t=0.3; '
    'self_consistency:n=8"; see experiments/evaluation/methods.py. Default: methods with as many '
    "forward passes as a roster of --num_members.",
  )
  flags.DEFINE_list("tasks", ["wordmath"], "Tasks, from " + ", ".join(tasks.TASKS) + ".")
  flags.DEFINE_enum("split", "test", ["validation", "test", "all"], "Split of the tasks.")
  flags.DEFINE_integer("num_examples", None, "Number of examples per task. Default: all.")
  flags.DEFINE_integer(
    "num_validation", 80, "Number of validation examples that output temperatures are fitted on."
  )
  flags.DEFINE_string(
    "data_dir", None, "Folder with the tasks' data. Default: the Hugging Face hub."
  )
  flags.DEFINE_integer(
    "num_seeds", 1, "Number of noise seeds, from --seed on; deterministic methods run once."
  )
  flags.DEFINE_integer("batch_size", 16, "Number of examples per batch.")
  flags.DEFINE_bool("allow_code_execution", False, "Run model-written programs, in a sandbox.")
  flags.DEFINE_string("output", "results/compare", "Folder of the runs.")


def batches(examples: list[tasks.Example]) -> Iterator[list[tasks.Example]]:
  """Yields examples in batches."""
  for first in range(0, len(examples), FLAGS.batch_size):
    yield examples[first : first + FLAGS.batch_size]


def check_examples(task: tasks.Task, examples: list[tasks.Example]) -> None:
  """Checks that examples are of one kind.

  Raises:
    ValueError: there are none, or they differ in kind.
  """
  if not examples:
    raise ValueError(f"task {task.name} has no examples in this split")
  if len({e.kind for e in examples}) > 1:
    raise ValueError(f"the examples of task {task.name} differ in kind")


def check_methods(found: list[Method], examples: dict[str, list[tasks.Example]]) -> list[Method]:
  """Returns the methods that can answer all tasks; drops default methods that cannot.

  Raises:
    ValueError: one of --methods cannot.
  """
  kept = []
  for method in found:
    try:
      for name, some in examples.items():
        method.check_task(tasks.get(name), some[0].kind)
      kept.append(method)
    except ValueError as error:
      if FLAGS.methods is not None:
        raise
      print(f"[skipping {method.label}: {error}]", file=sys.stderr)
  return kept


def settings_of(method: Method, model: str, builder: RequestBuilder) -> dict:
  """Returns the settings of the method's run."""
  f = FLAGS
  return {
    "method": method.name,
    "spelled": method.text,
    "label": method.label,
    "forward_passes_per_token": method.passes_per_token,
    "stochastic": method.is_stochastic,
    "checkpoint": f.checkpoint,
    "model": model,
    "dtype": f.dtype,
    "experts_per_token": method.config.experts_per_token,
    "roster": method.roster.settings(),
    "sampler": method.sampler.settings(),
    "num_samples": method.num_samples,
    "tasks": f.tasks,
    "num_examples": f.num_examples,
    "split": f.split,
    **builder.settings,
    "max_new_tokens": f.max_new_tokens,
    "seeds": seeds_of(method),
    "batch_size": f.batch_size,
    "num_validation": f.num_validation,
    "likelihood": method.no_likelihood
    or "of the reference and its end-of-text token; for tasks with choices, of the right one",
    "calibration": "the most probable token at each position of the reference; for tasks with "
    "choices, the most probable choice",
    **({"data_dir": f.data_dir} if f.data_dir else {}),
  }


def seeds_of(method: Method) -> list[int]:
  return [FLAGS.seed + i for i in range(FLAGS.num_seeds if method.is_stochastic else 1)]


def fit(
  measurer: Measurer,
  method: Method,
  task: tasks.Task,
  folder: pathlib.Path,
  validation: list[tasks.Example],
) -> float | None:
  """Fits the output temperature that minimizes the NLL of validation examples.

  Saves it in the run's folder. Returns None if the method has no output temperature to fit, or
  no example has a reference.
  """
  if not method.fits_temperature:
    return None

  def compute():
    found = [
      one
      for batch in batches(validation)
      for one in measurer.likelihoods(method, FLAGS.seed, task, batch, output_temperatures.GRID)
      if one is not None
    ]
    if not found:
      return {"examples": 0, "temperature": None}
    nll = np.array([one.nll for one in found])
    return {
      "examples": len(found),
      "grid": output_temperatures.GRID.tolist(),
      "nll": nll.sum(axis=0).tolist(),
      "temperature": output_temperatures.fit(nll),
    }

  return _saved(folder / TEMPERATURES, task, compute)["temperature"]


def _saved(path, task, compute):
  """Returns the task's entry in a JSON file; computes and writes it if it is missing."""
  known = app.from_first_process(
    lambda: typed.read(path, dict[str, dict]) if path.is_file() else {}
  )
  if task.name not in known:
    known[task.name] = compute()
    app.write_atomically(path, text_files.to_json(known, indent=2) + "\n")
  return known[task.name]


def choose(
  measurer: Measurer,
  method: Method,
  task: tasks.Task,
  folder: pathlib.Path,
  validation: list[tasks.Example],
) -> Method:
  """Selects the best of `Method.candidates` by validation metric; no-op for other methods.

  Saves the selection in the run's folder.
  """
  if not method.candidates:
    return method
  settings, candidates = zip(*method.candidates)

  def compute():
    values = []
    for candidate in candidates:
      outputs = [
        output
        for batch in batches(validation)
        for output in measurer.answer(candidate, FLAGS.seed, task, batch).outputs
      ]
      values.append(float(np.mean(judge(task, validation, outputs))))
    return {
      "tried": [{**tried, task.metric: value} for tried, value in zip(settings, values)],
      "chosen": settings[int(np.argmax(values))],
    }

  chosen = candidates[settings.index(_saved(folder / SETTINGS, task, compute)["chosen"])]
  return dataclasses.replace(chosen, candidates=method.candidates)  # so it is known as tuned


def judge(task: tasks.Task, examples: list[tasks.Example], outputs: list) -> list[float]:
  """Returns the task's metric of each example's output."""
  metrics = app.from_first_process(
    lambda: task.score_all(examples, outputs, FLAGS.allow_code_execution)
  )
  return [m[task.metric] for m in metrics]


def measure(
  measurer: Measurer,
  method: Method,
  run: runs.Run,
  seed: int,
  task: tasks.Task,
  batch: list[tasks.Example],
  fitted: float | None,
  count_experts: bool,
) -> None:
  """Measures a method on a batch and writes the records."""
  own = fitted if method.name == FittedBaseline.NAME and fitted else method.output_temperature
  at = [own, fitted or own]
  answers = measurer.answer(
    method, seed, task, batch, at, count_experts, functools.partial(judge, task, batch)
  )
  likelihoods: Sequence[Likelihood | None] = [None] * len(batch)
  if not method.no_likelihood:
    likelihoods = answers.likelihoods or measurer.likelihoods(method, seed, task, batch, at)
  scored = app.from_first_process(
    lambda: task.score_all(batch, answers.outputs, FLAGS.allow_code_execution)
  )
  records = []
  for example, metrics, details, likelihood in zip(batch, scored, answers.details, likelihoods):
    record = {"task": task.name, "example": example.id, "seed": seed, **details}
    has_fitted = fitted is not None and method.name != FittedBaseline.NAME
    record |= record_of(likelihood, has_fitted) if likelihood else {"metrics": {}}
    record["metrics"] |= metrics
    records.append(record)
  run.write(records, {"task": task.name, "seed": seed, **answers.cost.line()})


def record_of(likelihood: Likelihood, fitted: bool) -> dict[str, Any]:
  """Returns metrics and confidences at the first output temperature and, if fitted, the next."""
  record = {
    "metrics": {"nll": float(likelihood.nll[0]), "tokens": likelihood.tokens},
    "confidences": likelihood.confidences[0].round(6).tolist(),
    "correct": likelihood.correct.tolist(),
  }
  if fitted:
    record["metrics"]["fitted_nll"] = float(likelihood.nll[1])
    record["fitted_confidences"] = likelihood.confidences[1].round(6).tolist()
  return record


def table(found: list[Method], opened: dict[str, runs.Run], task: tasks.Task) -> str:
  """Formats the methods' results on a task."""
  lines = []
  for method in found:
    run = opened[method.text]
    metrics = runs.load(run.path)[2]["tasks"][task.name]["metrics"]
    parts = [c for c in store.read_lines(run.path / runs.COSTS) if c["task"] == task.name]
    counted = [c for c in parts if "steps" in c]

    def of_tokens(name):
      return sum(c[name] for c in parts) / sum(c["tokens"] for c in parts)

    def of_steps(name):
      known = [c for c in counted if name in c]
      return f"{sum(c[name] for c in known) / sum(c['steps'] for c in known):.2f}" if known else ""

    def nats(name):
      return f"{metrics[name]:.4f}" if name in metrics else ""

    lines.append(
      [
        method.label,
        "" if task.metric == tasks.PERPLEXITY else 100 * metrics[task.metric],
        "not defined" if method.no_likelihood else nats("perplexity"),
        nats("fitted_perplexity"),
        method.passes_per_token,
        of_tokens("flops") / 1e6,
        of_steps("unique_experts_read"),
        of_steps("experts_used"),
        float(np.median([c["tokens"] / c["seconds"] for c in parts])),
        max(c["peak_bytes"] for c in parts) / 2**20,
      ]
    )
  return tabulate.tabulate(
    lines,
    floatfmt=("", ".1f", "", "", "d", ".3g", "", "", ".0f", ".1f"),
    disable_numparse=[2, 3, 6, 7],
    colalign=("left", *9 * ("right",)),
    headers=[
      "",
      f"{task.metric}\n%",
      "perplexity",
      "at fitted\nT",
      "passes\nper token",
      "MFLOPs\nper token",
      "unique\nexperts",
      "experts per\nmember",
      "tokens\nper s",
      "memory\nMiB",
    ],
  )


def run(
  count_experts: bool = True,
) -> tuple[list[Method], dict[str, runs.Run], dict[str, list[tasks.Example]]]:
  """Measures what the flags ask for.

  Args:
    count_experts: whether to count the unique active experts of each task's first batch.

  Returns:
    Methods, their finished runs by `Method.text`, and the examples by task.
  """
  for name in ("num_seeds", "batch_size", "num_validation"):
    if getattr(FLAGS, name) < 1:
      raise ValueError(f"--{name} must be at least 1, got {getattr(FLAGS, name)}")
  wanted = [tasks.get(name) for name in FLAGS.tasks]
  for task in wanted:
    task.check_allowed(FLAGS.allow_code_execution)
  config = app.load_config(FLAGS.checkpoint)
  if FLAGS.dtype:
    config = config.replace(dtype=FLAGS.dtype)
  base = app.roster_from_flags(config, check_idle=False)  # of methods with their own settings
  builder = app.request_builder(config, app.load_tokenizer(FLAGS.checkpoint))
  texts = (
    methods_lib.default_texts(config, base.num_members)
    if FLAGS.methods is None
    else [t for t in FLAGS.methods.split(";") if t.strip()]
  )
  found = methods_lib.parse_all(texts, config, base)
  for method in found:
    if not method.roster.cache_mode.keeps_history:
      raise ValueError(
        f"method {method.text!r} has no cache, so its costs cannot be compared: choose a cache"
      )

  def read(split, limit):
    examples = {t.name: t.examples(split, FLAGS.data_dir, limit, FLAGS.chat) for t in wanted}
    for task in wanted:
      check_examples(task, examples[task.name])
    return examples

  examples = app.in_all_processes(lambda: read(FLAGS.split, FLAGS.num_examples))
  validation = app.in_all_processes(lambda: read("validation", FLAGS.num_validation))
  app.check_same(
    [
      [e.prompt, e.reference]
      for part in (examples, validation)
      for task in wanted
      for e in part[task.name]
    ],
    tasks.OTHER_DATA,
  )
  found = check_methods(found, examples)
  if any(method.fits_temperature for method in found):
    for name, some in validation.items():
      output_temperatures.warn(name, sum(bool(e.reference or e.choices) for e in some))
  asked = app.in_all_processes(
    lambda: [
      TaskRequests.of(builder, task, part[task.name])
      for part in (examples, validation)
      for task in wanted
    ]
  )
  for method in found:
    size = method.num_samples * FLAGS.batch_size
    for one in asked:
      requests = one.all_answering * method.num_samples
      app.check_memory_of(method.config, method.roster, requests, size)
  params, _ = app.load_params(FLAGS.checkpoint, FLAGS.dtype, FLAGS.mesh)
  for method in found:
    if method.profile:
      method.profile.check_routers(params)
  measurer = Measurer(params, builder, FLAGS.batch_size)
  model, output = temperature_profiles.fingerprint(params), pathlib.Path(FLAGS.output)
  opened = {
    m.text: runs.Run(output / m.folder, m.text, settings_of(m, model, builder)) for m in found
  }
  total = sum(len(seeds_of(m)) for m in found) * sum(map(len, examples.values()))
  with tqdm(total=total, unit="example", file=sys.stderr) as bar:
    for task in wanted:
      bar.set_description(f"{task.name}: fit")
      of_task = [choose(measurer, m, task, output / m.folder, validation[task.name]) for m in found]
      fitted = {
        m.text: fit(measurer, m, task, output / m.folder, validation[task.name]) for m in of_task
      }
      for number, batch in enumerate(batches(examples[task.name])):
        turns = [(m, seed) for m in of_task for seed in seeds_of(m)]
        for i in np.random.default_rng(number).permutation(len(turns)):
          method, seed = turns[i]
          bar.set_description(f"{task.name}: {method.text}")
          keys = {(task.name, e.id, seed) for e in batch}
          if not keys <= opened[method.text].done:
            measure(
              measurer,
              method,
              opened[method.text],
              seed,
              task,
              batch,
              fitted[method.text],
              count_experts=count_experts and number == 0 and seed == FLAGS.seed,
            )
          bar.update(len(batch))
  builder.report_truncated()
  for one in opened.values():
    one.finish()
  return found, opened, examples


def main(argv) -> None:
  del argv
  begin = time.perf_counter()
  found, opened, examples = run()
  for name, some in examples.items() if app.is_first_process() else ():
    print(f"\n{name}, {len(some)} examples\n\n{table(found, opened, tasks.get(name))}")
  print(f"\nSaved {len(found)} runs in {FLAGS.output}; {time.perf_counter() - begin:.0f} s.")


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main, needs=("scipy", "tabulate"))


if __name__ == "__main__":
  program()
