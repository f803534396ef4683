"""Tunes a router temperature for each layer of a model, and tests whether it helps.

    python -m experiments.tune --checkpoint=olmoe --config=paper_math_olmoe --task=paper/gsm8k \\
        --output=results/tune/olmoe-gsm8k
    python -m experiments.generate --checkpoint=olmoe \\
        --tau=results/tune/olmoe-gsm8k/profile.json --prompt=...

Trials of temperature profiles are measured on the first --num_examples examples of the task's
validation split, always with the same noise: first one τ for all layers in steps of 0.05, then
TPE. --sampler=sweep runs only the first part. To rule out selection luck, the best trial, the
best τ of the sweep and the baseline are re-evaluated on --num_confirm fresh examples with
fresh noise seeds.

--parameter=beta tunes the β of SCMoE's contrast (arXiv 2405.14507) in place of τ, in the same way,
but each β compiles its own programs.

Several processes may share a search: those of --num_workers, or several runs of the same
command. (With --distributed, all processes run each trial together.) When rerun, it resumes.
The values of trials do not depend on interruptions or on the number of processes. Which trials
TPE suggests after the first sweep does: it learns from those that have ended by then.
--output contains

* `profile.json`, the best temperature profile (see `temperature_profiles`) so far. Its
  "objective" has "name", "value" (of the best trial), "baseline", "trial" and "confirmed":
  None until the end, then "examples", "seeds", "values", "differences" (see
  `confirm.compare`) and "cost". Its "cost" has "tokens", "forward_passes", "seconds",
  "trials", "pruned" and "failed" of the search;
* `trials.jsonl`, a line per trial (see `trials.Trial`);
* `confirm/baseline`, `confirm/tuned`, `confirm/uniform`: the confirmation as runs;
* `study.db`, the Optuna study, and `settings.json`.

Costs are those of `experiments.records.cost`. τ are traced: only the first trial compiles.
"""

import collections
import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
import threading
from typing import Any

from absl import flags
import numpy as np
from tqdm import tqdm

from checkpoints_convert import outputs
from experiments import tasks
from experiments.analysis import output_temperatures
from experiments.cli import app, overrides
from experiments.records import runs
from experiments.records.cost import Cost
from experiments.tuning import confirm, trials, tuning_configs
from experiments.tuning.objectives import OBJECTIVES, Objective, Perplexity
from experiments.tuning.trials import BetaSpace, Search, Space
from experiments.tuning.tuning_configs import TuningConfig
from roe_jax import makers, temperature_profiles
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster
from roe_jax.temperature_profiles import Profile

FLAGS = flags.FLAGS
PROFILE = "profile.json"
SPLIT = "validation"
PARAMETERS = ("tau", "beta")
_WORKER = "ROE_JAX_TUNE_WORKER"  # set in processes that `more_workers` starts


def define_flags() -> None:
  app.define_model_flags()
  app.define_roster_flags()
  app.define_chat_flags()
  app.define_limit_flag()
  default = TuningConfig()
  flags.DEFINE_string("task", None, f"Task to tune for: {', '.join(tasks.TASKS)}.", required=True)
  flags.DEFINE_string("output", None, "Folder of the search.", required=True)
  configs = ", ".join(tuning_configs.CONFIGS)
  flags.DEFINE_string("config", None, f"Named settings, which flags override: {configs}.")
  objective = "Perplexity of reference texts or the task's metric"
  default_is = lambda value: f"default: {value}, or that of --config"
  flags.DEFINE_enum(
    "objective", None, list(OBJECTIVES), f"{objective}; {default_is(default.objective)}."
  )
  helps = {
    "num_examples": "Validation examples that trials see",
    "num_trials": "Number of trials, including the sweep",
    "max_tau": "Largest τ tried; with --parameter=beta, τ of all layers",
    "fixed_layers": "Number of first and of last layers that keep τ = 0",
    "parameter": f"What is tuned: {' or '.join(PARAMETERS)}",
    "max_beta": "Largest β tried with --parameter=beta",
  }
  helps = {name: f"{text}; {default_is(getattr(default, name))}." for name, text in helps.items()}
  overrides.define_flags(TuningConfig, helps, defaults=False)
  flags.DEFINE_enum("sampler", "tpe", ["tpe", "sweep"], "TPE after a sweep, or only the sweep.")
  prune = "Whether to stop trials significantly worse than the best one; never in a sweep."
  flags.DEFINE_bool("prune", True, prune)
  confirms = "Fresh validation examples for the confirmation; default: as many as trials see, or"
  flags.DEFINE_integer("num_confirm", None, f"{confirms} half of a split too small for both.")
  flags.DEFINE_integer("num_seeds", 3, "Fresh noise seeds for the confirmation.")
  flags.DEFINE_integer("num_workers", 1, "Processes that run trials, each with its own model.")
  flags.DEFINE_integer("batch_size", 20, "Examples per batch.")
  flags.DEFINE_string("data_dir", None, "Folder with the task's files; default: the hub's.")
  flags.DEFINE_bool("allow_code_execution", False, "Allow tasks to run programs the model wrote.")


@dataclasses.dataclass(frozen=True)
class SearchSetup:
  """A search as set by the flags.

  Attributes:
    output: its folder.
    config: the model's architecture.
    tuning: settings of --config and the flags.
    roster: settings of the roster.
    space: the search space.
    prompts: prompt settings, see `RequestBuilder.settings`.
    searched: the objective on the search examples.
    fresh: the objective on the confirmation's examples.
  """

  output: pathlib.Path
  config: ModelConfig
  tuning: TuningConfig
  roster: dict
  space: Space
  prompts: dict
  searched: Objective
  fresh: Objective

  def make_roster(self, temperatures, seed: int, **settings: Any) -> Roster:
    """Makes a roster; τ are traced, so all of the search share their programs."""
    return Roster.create(
      self.config,
      temperatures=temperatures,
      seed=seed,
      noisy_layers=self.space.noisy_layers,
      expert_strategy=FLAGS.expert_strategy,
      memory_budget=FLAGS.memory_budget_mb << 20,
      **self.roster | settings,
    )

  @property
  def settings(self) -> dict:
    """Everything that the results depend on."""
    return {
      "name": "tune",
      "checkpoint": FLAGS.checkpoint,
      "dtype": FLAGS.dtype,
      "mesh": FLAGS.mesh,
      "model": temperature_profiles.sizes_of(self.config),
      "task": FLAGS.task,
      "split": SPLIT,
      "data_dir": FLAGS.data_dir,
      **self.prompts,
      "max_new_tokens": FLAGS.max_new_tokens,
      **dataclasses.asdict(self.tuning),
      **self.roster,
      "sampler": FLAGS.sampler,
      "prune": FLAGS.prune,
      "seed": FLAGS.seed,
      "num_confirm": len(self.fresh.examples),
      "num_seeds": FLAGS.num_seeds,
      "batch_size": FLAGS.batch_size,
    }


def prepare() -> SearchSetup:
  """Prepares everything but parameters.

  Raises:
    ValueError: a wrong setting, or not enough examples.
    FileNotFoundError: no such checkpoint, or no data.
  """
  if FLAGS["tau"].present:
    raise ValueError("--tau cannot be given, since it is tuned here: use --max_tau")
  app.refuse_idle(True, ("router_bias",), "is not part of a temperature profile: leave it out")
  tuning = overrides.from_flags(tuning_configs.load(FLAGS.config))
  for name, value in (
    ("num_examples", tuning.num_examples),
    ("num_trials", tuning.num_trials),
    ("num_confirm", FLAGS.num_confirm),
    ("num_seeds", FLAGS.num_seeds),
    ("num_workers", FLAGS.num_workers),
    ("batch_size", FLAGS.batch_size),
  ):
    if value is not None and value < 1:
      raise ValueError(f"--{name} must be at least 1, got {value}")
  if tuning.num_members < 2 and FLAGS.include_clean:
    raise ValueError("--num_members must be at least 2: the baseline alone has no temperatures")
  if FLAGS.num_workers > 1 and FLAGS.distributed:
    raise ValueError(
      "--num_workers runs trials in parallel, and with --distributed all processes run each trial "
      "together: give one of them"
    )
  config = app.load_config(FLAGS.checkpoint)
  space = search_space(config, tuning)
  if FLAGS.sampler == "sweep":
    tuning = dataclasses.replace(tuning, num_trials=len(space.sweep()))
  trials.check_budget(space, tuning.num_trials)
  roster = {name: FLAGS[name].value for name in temperature_profiles.ROSTER_SETTINGS}
  roster |= {"num_members": tuning.num_members, "cache": tuning.cache}
  task = tasks.get(FLAGS.task)
  count, examples, fresh = choose_examples(task, tuning.num_examples)
  if tuning.objective == Perplexity.name:
    output_temperatures.warn(task.name, count)
  tuning = dataclasses.replace(tuning, num_examples=count)
  builder = app.request_builder(config, app.load_tokenizer(FLAGS.checkpoint))
  settings = FLAGS.batch_size, FLAGS.allow_code_execution
  make = OBJECTIVES[tuning.objective]
  searched, fresh = app.in_all_processes(
    lambda: [
      make(config, builder, task, some, *settings)
      for some in (examples[:count], [examples[i] for i in fresh])
    ]
  )
  builder.report_truncated()
  setup = SearchSetup(
    pathlib.Path(FLAGS.output), config, tuning, roster, space, builder.settings, searched, fresh
  )
  setup.make_roster(0.0, FLAGS.seed + FLAGS.num_seeds)
  largest = setup.make_roster(tuning.max_tau, FLAGS.seed)
  for objective in (searched, fresh):
    app.check_memory_of(config, largest, objective.requests, FLAGS.batch_size)
  return setup


def search_space(config: ModelConfig, tuning: TuningConfig) -> Space:
  """Returns the space that a search of the flags and `tuning` has.

  Raises:
    ValueError: the settings do not fit together.
  """
  shape = config.num_layers, tuning.fixed_layers, tuning.max_tau
  if tuning.parameter not in PARAMETERS:
    raise ValueError(
      f"--parameter must be one of {', '.join(PARAMETERS)}, got {tuning.parameter!r}"
    )
  if tuning.parameter == "tau":
    return Space(*shape)
  if not FLAGS.aggregation.startswith("contrast"):
    raise ValueError(
      "--parameter=beta tunes the beta of --aggregation=contrast or contrast(alpha=NUMBER), got "
      f"--aggregation={FLAGS.aggregation}"
    )

  def contrast(alpha=0.1):
    return alpha

  alpha = makers.read(FLAGS.aggregation, {"contrast": contrast})
  if tuning.objective == Perplexity.name:
    raise ValueError(
      "--parameter=beta needs --objective=accuracy: a contrast gives many tokens probability zero"
    )
  return BetaSpace(*shape, contrast() if alpha is None else alpha, tuning.max_beta)


def choose_examples(
  task: tasks.Task, num_examples: int
) -> tuple[int, list[tasks.Example], list[int]]:
  """Splits examples of the validation split, those of the search first.

  If the split is too small for both and --num_confirm is not given, the search sees half of it.

  Returns:
    The number of search examples, all examples, and the indices of those of the
    confirmation, whose questions the search does not see.

  Raises:
    ValueError: not enough examples.
  """
  confirms = FLAGS.num_confirm or num_examples
  examples = app.in_all_processes(
    lambda: task.examples(SPLIT, FLAGS.data_dir, num_examples + confirms, FLAGS.chat)
  )
  app.check_same([[e.prompt, e.reference] for e in examples], tasks.OTHER_DATA)
  if FLAGS.num_confirm is None and len(examples) < 2 * num_examples:
    num_examples = len(examples) // 2
    print(
      f"[the validation split of {task.name} has {len(examples)} examples: {num_examples} are for "
      "the search, the others for the confirmation]",
      file=sys.stderr,
    )
    confirms = len(examples) - num_examples
  seen = {e.prompt for e in examples[:num_examples]}
  fresh = [i for i in range(num_examples, len(examples)) if examples[i].prompt not in seen]
  if num_examples < 1 or len(examples) < num_examples + confirms or not fresh:
    raise ValueError(
      f"the validation split of {task.name} has {len(examples)} examples, {len(fresh)} of them "
      f"new to the search: too few for --num_examples={num_examples} and --num_confirm={confirms}"
    )
  return num_examples, examples, fresh


def open_search(setup: SearchSetup) -> Search:
  """Opens the search in the folder, and claims it for these settings.

  Raises:
    ValueError: the folder has a search with other settings.
  """
  setup.output.mkdir(parents=True, exist_ok=True)
  with trials.lock_on(setup.output / "lock"):
    runs.claim(setup.output, setup.settings)
  return Search(
    setup.output, setup.space, setup.tuning.num_trials, setup.searched.maximize, FLAGS.seed
  )


class OnModel:
  """The objective as a function of temperatures alone, with the same noise for all of them.

  With several processes, the first one runs the search, and the others `follow` it.
  """

  def __init__(self, params: Params, setup: SearchSetup):
    self._params, self._setup = params, setup
    self.name, self.maximize = setup.searched.name, setup.searched.maximize
    self.value = setup.searched.value

  def measure(self, temperatures, part: slice, **settings: Any) -> tuple[np.ndarray, Cost]:
    app.broadcast([list(temperatures), part.start, part.stop, settings])
    return self._measure(temperatures, part, settings)

  def follow(self) -> None:
    """Measures the same as the first process until it calls `end`."""
    while (wanted := app.broadcast(None)) is not None:
      temperatures, start, stop, settings = wanted
      self._measure(temperatures, slice(start, stop), settings)

  def end(self) -> None:
    app.broadcast(None)

  def _measure(self, temperatures, part, settings):
    roster = self._setup.make_roster(temperatures, FLAGS.seed, **settings)
    return self._setup.searched.measure(self._params, roster, part)


def batches(count: int) -> list[slice]:
  """Splits `count` examples into slices of --batch_size."""
  size = FLAGS.batch_size
  return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def baseline_values(params: Params, setup: SearchSetup) -> np.ndarray:
  """Returns `[X]` numbers of the baseline on the search examples."""
  roster = Roster.create(setup.config)
  parts = batches(len(setup.searched.examples))
  return np.concatenate([setup.searched.measure(params, roster, part)[0] for part in parts])


def profile_of(
  search: Search, setup: SearchSetup, model: dict, baseline: float, confirmed: dict | None = None
) -> Profile:
  """Returns the best temperature profile of a search."""
  best, made = search.best(), search.trials()
  assert best
  count = lambda state: sum(t.state == state for t in made)
  total = lambda name: sum(getattr(t, name) for t in made)
  return Profile(
    tuple(best.temperatures),
    model,
    temperature_profiles.roster_of(
      setup.make_roster(best.temperatures, FLAGS.seed, **best.settings).settings()
    ),
    {
      "name": setup.searched.name,
      "value": best.value,
      "baseline": baseline,
      "trial": best.number,
      "kind": best.kind,
      "confirmed": confirmed,
    },
    {
      "task": FLAGS.task,
      "split": SPLIT,
      "data_dir": FLAGS.data_dir,
      "searched": [e.id for e in setup.searched.examples],
      "confirmed": [e.id for e in setup.fresh.examples],
    },
    FLAGS.seed,
    {
      "tokens": total("tokens"),
      "forward_passes": total("forward_passes"),
      "seconds": total("seconds"),
      "trials": count("complete") + count("pruned"),
      "pruned": count("pruned"),
      "failed": count("failed"),
    },
  )


def confirm_best(params: Params, search: Search | None, setup: SearchSetup, model: dict) -> dict:
  """Evaluates the best trial, the best of the sweep and the baseline on fresh examples."""
  best, uniform = app.from_first_process(
    lambda: (
      search and [t and [t.temperatures, t.settings] for t in (search.best(), search.best("sweep"))]
    )
  )
  seeds = range(FLAGS.seed + 1, FLAGS.seed + 1 + FLAGS.num_seeds)
  baseline = lambda seed: Roster.create(setup.config, seed=seed)
  candidates = [confirm.Candidate(confirm.BASELINE, baseline, seeds[:1])]
  for name, trial in ((confirm.TUNED, best), (confirm.UNIFORM, uniform)):
    if name == confirm.TUNED or trial not in (None, best):
      make = lambda seed, t=trial: setup.make_roster(t[0], seed, **t[1])
      candidates.append(confirm.Candidate(name, make, seeds))
  parts = batches(len(setup.fresh.examples))
  settings = {
    "checkpoint": FLAGS.checkpoint,
    "model": model[temperature_profiles.ROUTERS],
    "tasks": [FLAGS.task],
    "split": SPLIT,
    "limit": None,
  }
  metrics, costs = {}, collections.Counter()
  with tqdm(
    total=sum(len(c.seeds) for c in candidates) * len(parts),
    desc="confirm",
    unit="batch",
    file=sys.stderr,
  ) as bar:
    for c in candidates:
      objectives, folder = (setup.searched, setup.fresh), setup.output / "confirm"
      metrics[c.name], of_run = confirm.measure(
        params, c, *objectives, parts, FLAGS.task, folder, dict(settings), bar.update
      )
      costs.update(of_run)
  if not app.is_first_process():
    return {}
  return {
    "examples": len(setup.fresh.examples),
    "seeds": list(seeds),
    "values": confirm.values(metrics, setup.fresh),
    "differences": [c.to_json() for c in confirm.compare(metrics, setup.fresh)],
    "cost": dict(costs),
  }


def end_with_parent() -> None:
  """Ends this process at once when its standard input, a pipe, has lost its other end."""

  def wait():
    sys.stdin.read()
    os._exit(1)  # a search resumes however its processes end

  threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def more_workers(output: pathlib.Path):
  """Starts the other workers, which end with the search or this process; each has its own log."""
  command = [sys.executable, "-m", "experiments.tune", *sys.argv[1:], "--num_workers=1"]
  logs = [output / f"worker-{i}.log" for i in range(1, FLAGS.num_workers)]
  workers = []
  try:
    for log in logs:
      with open(log, "w", encoding="utf-8") as file:
        worker = subprocess.Popen(
          command,
          stdin=subprocess.PIPE,
          stdout=subprocess.DEVNULL,
          stderr=file,
          env=os.environ | {_WORKER: "1"},
        )
        workers.append(worker)
    yield
    for worker, log in zip(workers, logs):
      if worker.wait():
        print(f"[a worker failed, and others ran its trials: see {log}]", file=sys.stderr)
  finally:
    for worker in workers:
      if worker.poll() is None:
        worker.terminate()
        worker.wait()


def run_search(params: Params, setup: SearchSetup, search: Search | None) -> None:
  """Runs the rest of a search, which only the first process has, and writes its profile."""
  model = temperature_profiles.model_of(FLAGS.checkpoint, setup.config, params)
  path = setup.output / PROFILE

  def check():
    if profile := read_profile(setup.output) if search else None:
      profile.check_routers(params)

  app.in_all_processes(check)
  baseline = setup.searched.value(baseline_values(params, setup))
  on_model = OnModel(params, setup)

  def write(search: Search, confirmed=None):
    profile = profile_of(search, setup, model, baseline, confirmed)
    app.write_atomically(path, profile.to_json())
    return profile

  def run_trials(search: Search):
    with tqdm(
      total=search.num_trials, initial=search.num_finished, unit="trial", file=sys.stderr
    ) as bar:

      def on_trial():
        bar.update(search.num_finished - bar.n)
        with search.locked():
          if search.best() and not finished(setup):
            bar.set_postfix(
              baseline=f"{baseline:.4f}", best=f"{write(search).objective['value']:.4f}"
            )

      search.run(
        on_model,
        batches(len(setup.searched.examples)),
        FLAGS.prune and FLAGS.sampler != "sweep",
        on_trial,
      )
    on_model.end()

  if search:
    run_trials(search)
  else:
    on_model.follow()
  with search.locked() if search else contextlib.nullcontext():  # only one worker confirms
    if app.from_first_process(lambda: finished(setup) is None):
      confirmed = confirm_best(params, search, setup, model)
      if search:
        write(search, confirmed)


def finished(setup: SearchSetup) -> Profile | None:
  """Returns the confirmed profile if the search is finished."""
  profile = read_profile(setup.output)
  return profile if profile and profile.objective.get("confirmed") else None


def read_profile(output: pathlib.Path) -> Profile | None:
  """Reads the profile of a search, if there is one.

  Raises:
    ValueError: it is damaged; the message says how to write it again.
  """
  path = output / PROFILE
  try:
    return temperature_profiles.read(path) if path.is_file() else None
  except ValueError as error:
    raise ValueError(
      f"{error}; delete it and run the same command again, which writes it from study.db"
    ) from error


def print_report(profile: Profile, setup: SearchSetup) -> None:
  """Prints the result."""
  objective, cost, confirmed = profile.objective, profile.cost, profile.objective["confirmed"]
  print(f"τ by layer: {', '.join(f'{t:.3f}' for t in profile.temperatures)}")
  if setup.tuning.parameter == "beta":
    print(f"aggregation: {profile.roster['aggregation']}")
  print(
    f"On the {len(profile.data['searched'])} search examples: {objective['name']} "
    f"{objective['value']:.4f}, baseline {objective['baseline']:.4f}. On "
    f"{confirmed['examples']} fresh examples, noise seeds "
    f"{', '.join(map(str, confirmed['seeds']))} (95 % intervals; *: significant after Holm's "
    "correction):\n"
  )
  print(confirm.format_confirmation(confirmed, objective["name"]) + "\n")
  print(
    f"{cost['trials']} trials ({cost['pruned']} pruned) cost {cost['tokens']:,} tokens, "
    f"{cost['forward_passes']:,} forward passes and {cost['seconds']:.0f} s; saved "
    f"{setup.output / PROFILE}."
  )


def main(argv) -> None:
  del argv
  if os.environ.get(_WORKER):
    end_with_parent()
  setup = prepare()
  search = app.in_all_processes(lambda: open_search(setup) if app.is_first_process() else None)
  if app.from_first_process(lambda: finished(setup) is None):
    with more_workers(setup.output):
      params, _ = app.load_params(FLAGS.checkpoint, FLAGS.dtype, FLAGS.mesh)
      run_search(params, setup, search)
  if app.is_first_process() and (profile := finished(setup)):
    print_report(profile, setup)


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main, needs=("optuna", "scipy", "tabulate"), output=outputs.SHARED)


if __name__ == "__main__":
  program()
