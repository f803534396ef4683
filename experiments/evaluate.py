"""Evaluates a roster, or the baseline, on benchmarks.

  python -m experiments.evaluate --checkpoint=olmoe --tasks=gsm8k,arc_easy,hellaswag \\
      --num_members=32 --tau=profile.json --output=results/olmoe-n32
  python -m experiments.evaluate --checkpoint=embedded:wordmath_overtrained --tasks=wordmath \\
      --num_members=8 --tau=0.3 --num_examples=100 --output=results/wordmath-n8

--tasks takes tasks, groups and tags of lm-evaluation-harness, and this project's tasks:
paper/NAME (paper/gsm8k, paper/svamp, ...) is a task with the prompts and scoring of the RoE
paper, and `wordmath` generates its problems.

Prints a table and writes a run to --output (see `experiments.records.runs`), which
`experiments.report` reads. Each answer is saved at once, in --request_cache, so that a
rerun resumes. The results of lm-evaluation-harness are in OUTPUT/harness.json.
"""

from __future__ import annotations

import logging
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from absl import flags
import jax
import numpy as np
from tqdm import tqdm

from experiments import tasks as tasks_lib
from experiments.cli import app, text_files
from experiments.cli.extras import scipy, tabulate
from experiments.evaluation.answers import Answers
from experiments.evaluation.engine import Engine
from experiments.evaluation.requests import RequestBuilder, TaskRequests
from experiments.records import runs
from experiments.tasks.base import PAPER, SPLITS, TEXT
from roe_jax import temperature_profiles

if TYPE_CHECKING:
  from experiments.evaluation.lm_eval_model import RosterLM

FLAGS = flags.FLAGS
OURS = tasks_lib.TASKS
HARNESS = "harness.json"
EXPERTS_OF = 4  # Number of requests per task on which unique active experts are counted.
_CONFIDENCE = (
  "probability of the selected choice among the choices, or of the generated text; one per example"
)


def define_flags() -> None:
  app.define_model_flags()
  app.define_roster_flags()
  app.define_dry_run_flags()
  app.define_chat_flags()
  flags.DEFINE_list(
    "tasks",
    None,
    "Tasks, groups and tags of lm-evaluation-harness, and this project's tasks: "
    f"{', '.join(OURS)}.",
    required=True,
  )
  flags.DEFINE_string("output", None, "Folder of the run.", required=True)
  flags.DEFINE_integer(
    "num_examples",
    None,
    "Number of examples per task, from the first. Default: all.",
    lower_bound=1,
  )
  flags.DEFINE_enum(
    "split", "test", SPLITS, "Split of this project's tasks; harness tasks define their own."
  )
  flags.DEFINE_string(
    "data_dir", None, "Folder with the data of this project's tasks. Default: the Hugging Face hub."
  )
  flags.DEFINE_string("include_path", None, "Folder with additional harness tasks.")
  flags.DEFINE_integer(
    "num_fewshot",
    None,
    "Number of few-shot examples for harness tasks. Default: set by each task.",
    lower_bound=0,
  )
  flags.DEFINE_integer("num_seeds", 1, "Number of noise seeds, from --seed on.", lower_bound=1)
  flags.DEFINE_integer("batch_size", 16, "Number of requests per batch.", lower_bound=1)
  app.define_limit_flag()
  flags.DEFINE_bool("allow_code_execution", False, "Run model-written programs, in a sandbox.")
  flags.DEFINE_integer(
    "workers", 1, "Number of model-written programs that run in parallel.", lower_bound=1
  )
  flags.DEFINE_string(
    "request_cache",
    None,
    "Folder of the model's answers, which runs can share. Default: OUTPUT/requests.",
  )


def check_flags() -> tuple[list[str], list[str]]:
  """Returns the names of this project's tasks and of the harness's.

  Raises:
    ValueError: flags contradict each other, or a task cannot run.
  """
  names = list(dict.fromkeys(name.strip() for name in FLAGS.tasks))
  ours = [name for name in names if name in OURS]
  theirs = [name for name in names if name not in OURS]
  for name in theirs:
    if name.startswith((PAPER, TEXT)):
      raise ValueError(f"unknown task {name!r}: choose from {', '.join(OURS)}")
  for name in ours:
    OURS[name].check_allowed(FLAGS.allow_code_execution)
  if theirs and FLAGS.split != "test":
    raise ValueError(
      f"--split={FLAGS.split} applies to this project's tasks, but {theirs[0]} is a harness task "
      "with one split: remove one of them"
    )
  for flag, whose, named in (
    ("num_fewshot", "harness tasks", theirs),
    ("include_path", "harness tasks", theirs),
    ("data_dir", "this project's tasks", ours),
  ):
    if FLAGS[flag].value is not None and not named:
      raise ValueError(f"--{flag} applies to {whose} only, and --tasks has none: remove it")
  return ours, theirs


def prepare(builder: RequestBuilder, name: str) -> TaskRequests:
  """Makes the requests of one of this project's tasks.

  Raises:
    ValueError: its data cannot be read, or a request does not fit the model.
  """
  examples = OURS[name].examples(FLAGS.split, FLAGS.data_dir, FLAGS.num_examples, FLAGS.chat)
  return TaskRequests.of(builder, OURS[name], examples)


def evaluate_ours(lm: RosterLM, asked: TaskRequests, run: runs.Run, seed: int) -> None:
  """Answers and scores the examples of one of this project's tasks; writes the records."""
  task, examples = asked.task, asked.examples
  if all((task.name, e.id, seed) in run.done for e in examples):
    return
  label = f"{task.name}, seed {seed}"
  answers = list(asked.by_example(lm.answers(label, asked.all_answering)))
  wanted = asked.all_references
  referred = iter(lm.answers(f"{label}, references", wanted) if wanted else ())
  of_kind = {
    "generate": lambda found: found[0]["text"],
    "choose": lambda found: [a["log_prob"] for a in found],
    "read": lambda found: found[0]["is_greedy"],
  }
  outputs = [of_kind[example.kind](found) for example, found in zip(examples, answers)]

  def score():  # in one process, since time limits could differ between processes
    with tqdm(
      total=len(outputs), desc=f"{label}, scoring", file=sys.stderr, disable=not task.runs_code
    ) as bar:
      return task.score_all(
        examples, outputs, FLAGS.allow_code_execution, FLAGS.workers, bar.update
      )

  metrics = app.from_first_process(score)
  records = []
  for i, (example, output) in enumerate(zip(examples, outputs)):
    if asked.references[i] is not None:
      found = next(referred)
      metrics[i] |= {"nll": -found["log_prob"], "tokens": found["tokens"]}
    record = {"task": task.name, "example": example.id, "seed": seed, "metrics": metrics[i]}
    confidence = None
    if example.kind == "generate":
      confidence = np.exp(answers[i][0]["log_prob"])
      record |= {"output": output, "finish_reason": answers[i][0]["finish_reason"]}
    elif example.kind == "choose":
      confidence = scipy.special.softmax(output).max()
      record["log_probs"] = output
    if confidence is not None:
      record |= {"confidences": [float(confidence)], "correct": [metrics[i][task.metric] == 1]}
    records.append(record)
  write(lm, run, seed, task.name, label, records)
  if wanted and examples[0].kind != "read":  # whose references are its answers
    write(lm, run, seed, f"{task.name}, references", f"{label}, references", [])


def write(
  lm: RosterLM, run: runs.Run, seed: int, task: str, label: str, records: list[dict[str, Any]]
) -> None:
  """Adds missing records and their costs to a run."""
  cost = None
  if not any((c["task"], c["seed"]) == (task, seed) for c in run.cost_lines):
    requests = list(dict.fromkeys(lm.requests[label]))
    counted = lm.saved.experts_read(lm.engine, requests[:EXPERTS_OF])
    cost = {"task": task, "seed": seed, **(lm.saved.cost(requests) + counted).line()}
  run.write([r for r in records if runs.key(r) not in run.done], cost)


def evaluate_theirs(
  lm: RosterLM, loaded: dict[str, Any], run: runs.Run, seed: int
) -> dict[str, Any]:
  """Runs the harness's tasks, writes their records, and returns the harness's results."""
  from experiments.evaluation import lm_eval_tasks

  results = lm_eval_tasks.run(lm, loaded, FLAGS.num_examples, FLAGS.chat, FLAGS.system)
  for name, samples in results.pop("samples").items():
    records = list(lm_eval_tasks.records(lm, name, loaded["tasks"][name], samples, seed))
    write(lm, run, seed, name, name, records)
  return {
    kind: results[kind] for kind in ("results", "groups", "n-shot", "versions") if kind in results
  }


def rows_of_ours(summary: dict[str, Any], asked: TaskRequests) -> list[list[Any]]:
  """Returns table rows: metric, value, its standard error, standard deviation over seeds, examples.

  Args:
    summary: the task's entry in summary.json.
    asked: the task's requests.
  """
  perplexity, metrics = "perplexity", summary["metrics"]
  order = lambda m: (m == perplexity, m != asked.task.metric)
  counts = {perplexity: len(asked.all_references)}
  return [
    [
      asked.task.name,
      metric,
      metrics[metric],
      summary["standard_errors"].get(metric),
      summary["std_over_seeds"].get(metric),
      counts.get(metric, summary["examples"]),
    ]
    for metric in sorted(metrics.keys() - {"nll", "tokens", "words"}, key=lambda m: (*order(m), m))
  ]


def rows_of_theirs(
  by_seed: dict[str, dict[str, Any]], run_means: dict[str, Any]
) -> list[list[Any]]:
  """Returns the rows of `rows_of_ours` from the harness's values and standard errors."""
  rows = []
  results = [found["results"] | found.get("groups", {}) for found in by_seed.values()]
  for name in results[0] if results else ():
    for key in results[0][name]:
      metric, _, filter_name = key.partition(",")
      value = results[0][name][key]
      if not filter_name or metric.endswith("_stderr") or not isinstance(value, (int, float)):
        continue
      values = [r[name][key] for r in results]
      errors = [r[name].get(f"{metric}_stderr,{filter_name}") for r in results]
      known = [e for e in errors if isinstance(e, (int, float))]
      rows.append(
        [
          name,
          metric if filter_name == "none" else key,
          float(np.mean(values)),
          float(np.mean(known)) if known else None,
          float(np.std(values, ddof=1)) if len(values) > 1 else None,
          run_means.get(name, {}).get("examples"),
        ]
      )
  return rows


def main(argv) -> None:
  del argv
  logging.getLogger("lm_eval").setLevel(logging.ERROR)
  ours, theirs = check_flags()
  # Validate everything else before loading the parameters.
  config = app.load_config(FLAGS.checkpoint)
  roster = app.roster_from_flags(config)
  if FLAGS.dry_run:
    app.print_dry_run(config, roster, batch_size=FLAGS.batch_size)
    return
  tokenizer = app.load_tokenizer(FLAGS.checkpoint)
  builder = app.request_builder(config, tokenizer)
  # Takes seconds, so not before the flags are checked.
  from experiments.evaluation import lm_eval_model, lm_eval_tasks

  lm = lm_eval_model.RosterLM(FLAGS.checkpoint, builder)

  def load():
    if not theirs:
      return None
    loaded = lm_eval_tasks.load(
      theirs, FLAGS.include_path, FLAGS.num_fewshot, FLAGS.allow_code_execution, others=list(OURS)
    )
    lm_eval_tasks.check(lm, loaded, FLAGS.chat, FLAGS.system)
    return loaded

  loaded = app.in_all_processes(load)
  asked = app.in_all_processes(lambda: [prepare(builder, name) for name in ours])
  # The harness makes its requests later.
  app.check_memory_of(
    config,
    roster,
    [r for one in asked for r in (*one.all_answering, *one.all_references)],
    FLAGS.batch_size,
  )

  params, config = app.load_params(FLAGS.checkpoint, FLAGS.dtype, FLAGS.mesh)
  output = pathlib.Path(FLAGS.output)
  seeds = list(range(FLAGS.seed, FLAGS.seed + FLAGS.num_seeds))
  model = {
    "model": temperature_profiles.model_of(FLAGS.checkpoint, config, params),
    "dtype": config.dtype,
  }
  is_baseline = roster.is_baseline and roster.router_bias is None
  method = "baseline" if is_baseline else "roster"
  run = runs.Run(
    output,
    None,
    {
      "method": method,
      "label": method if is_baseline else f"roster, n = {roster.num_members}",
      "checkpoint": FLAGS.checkpoint,
      **model,
      "roster": roster.settings(),
      "seeds": seeds,
      "forward_passes_per_token": len(roster.members),
      "stochastic": roster.noisy_layers[0] < config.num_layers,
      "confidence": _CONFIDENCE,
      **builder.settings,
      **{
        name: FLAGS[name].value
        for name in (
          "tasks",
          "num_examples",
          "split",
          "data_dir",
          "include_path",
          "num_fewshot",
          "max_new_tokens",
        )
      },
    },
  )
  cache = pathlib.Path(FLAGS.request_cache) if FLAGS.request_cache else output / "requests"
  by_seed = {}
  for seed in seeds:
    seeded = roster.replace(seed=jax.numpy.uint32(seed))
    lm.engine = Engine(params, config, tokenizer, seeded, FLAGS.batch_size)
    lm.saved = Answers.of(cache, {**model, "roster": seeded.settings()})
    lm.requests.clear()
    for one in asked:
      evaluate_ours(lm, one, run, seed)
    if loaded:
      by_seed[str(seed)] = evaluate_theirs(lm, loaded, run, seed)
      app.write_atomically(
        output / HARNESS, text_files.to_json(by_seed, indent=2, default=str) + "\n"
      )
  print_report(run, asked, by_seed)
  builder.report_truncated()


def print_report(run: runs.Run, asked: list[TaskRequests], by_seed: dict[str, Any]) -> None:
  """Finishes a run; prints its table and a one-line summary."""
  summary = run.finish()
  if not app.is_first_process():
    return
  rows = [row for one in asked for row in rows_of_ours(summary["tasks"][one.task.name], one)]
  rows += rows_of_theirs(by_seed, summary["tasks"])
  print(
    tabulate.tabulate(
      rows,
      headers=["task", "metric", "value", "standard\nerror", "std over\nseeds", "examples"],
      floatfmt=("", "", ".4f", ".4f", ".4f", ".0f"),
      missingval="",
    )
  )
  cost = summary["costs"]
  examples = sum(task["examples"] for task in summary["tasks"].values())
  seeds = max(task["seeds"] for task in summary["tasks"].values())
  print(
    f"Saved {run.path}: {len(summary['tasks'])} tasks, {examples} examples"
    f"{f' x {seeds} seeds' if seeds > 1 else ''}; "
    f"{cost['tokens']:.0f} tokens in {cost['seconds']:.1f} s without compilation, "
    f"{cost['forward_passes']:.0f} forward passes, {cost['flops']:.3g} FLOPs"
  )


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main, needs=("lm_eval", "scipy", "tabulate"))


if __name__ == "__main__":
  program()
