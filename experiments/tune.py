"""Finds a temperature for each layer of a model, and tells whether it helps.

    python -m experiments.tune --checkpoint=olmoe --config=paper_math_olmoe --task=gsm8k \\
        --output=results/tune/olmoe-gsm8k
    python -m experiments.generate --checkpoint=olmoe \\
        --temperature_profile=results/tune/olmoe-gsm8k/profile.json --prompt=...

Trials of profiles are measured on the first --num_samples examples of the task's
validation split, always with the same noise: first one τ for all layers in steps
of 0.05, then what TPE proposes. --sampler=sweep makes the first part alone. Of
the result, the best τ of the sweep and the plain model, those are compared that
were not lucky only: on --num_confirm more examples and with other noise seeds.

Several processes may share a search: those of --num_workers, or this command
started several times with the same flags. (With --distributed, all processes make
each trial together.) Killed and started again, it goes on.
--output then holds

* `profile.json`, the best profile (see `profiles`), during the search the best so
  far. Its "objective" has "name", "value" (of the best trial), "plain", "trial"
  and "confirmed": None before the end, then "examples", "seeds", "values",
  "differences" (see `confirm.compare`) and "cost". Its "cost" has "tokens", "forward_passes",
  "seconds", "trials", "pruned" and "failed" of the search;
* `trials.jsonl`, a line for every trial (see `trials.Trial`);
* `confirm/plain`, `confirm/tuned`, `confirm/uniform`: the confirmation as runs;
* `study.db`, the study of Optuna, and `settings.json`.

Times include compilation. τ are traced: only the first trial compiles.
"""

import collections
import contextlib
import dataclasses
import pathlib
import subprocess
import sys

from absl import flags
import numpy as np
from tqdm import tqdm

from experiments import tasks
from experiments.cli import app, temperature_profiles
from experiments.cli.temperature_profiles import Profile
from experiments.evaluation.prompts import PromptBuilder
from experiments.records import runs
from experiments.tuning import confirm, trials, tuning_configs
from experiments.tuning.objectives import OBJECTIVES, Cost, Objective
from experiments.tuning.trials import Search, Space
from experiments.tuning.tuning_configs import TuningConfig
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster

FLAGS = flags.FLAGS
PROFILE = "profile.json"
SPLIT = "validation"


def define_flags() -> None:
  app.define_model_flags()
  app.define_roster_flags()
  app.define_chat_flags()
  app.define_limit_flag()
  default = TuningConfig()
  flags.DEFINE_string(
    "task", None, "What is tuned for: " + ", ".join(tasks.TASKS) + ".", required=True
  )
  flags.DEFINE_string("output", None, "Folder of the search.", required=True)
  flags.DEFINE_string(
    "config",
    None,
    "Settings by name, which flags override: " + ", ".join(tuning_configs.CONFIGS) + ".",
  )
  flags.DEFINE_enum(
    "objective",
    None,
    list(OBJECTIVES),
    "What is optimized: the perplexity of "
    f"reference texts, or the task's metric; {default.objective} by default.",
  )
  flags.DEFINE_integer(
    "num_samples", None, f"Validation examples that trials see; {default.num_samples} by default."
  )
  flags.DEFINE_integer(
    "num_trials",
    None,
    f"Profiles that are tried, the sweep included; {default.num_trials} by default.",
  )
  flags.DEFINE_float(
    "max_temperature",
    None,
    f"T, the largest τ that is tried; {default.max_temperature} by default.",
  )
  flags.DEFINE_integer(
    "fixed_layers",
    None,
    "L, how many of the first and of the last layers "
    f"keep τ = 0; {default.fixed_layers} by default.",
  )
  flags.DEFINE_enum("sampler", "tpe", ["tpe", "sweep"], "TPE after a sweep, or the sweep alone.")
  flags.DEFINE_bool(
    "prune",
    True,
    "Whether trials that are clearly worse than the best one are given up; in a sweep none is.",
  )
  flags.DEFINE_integer(
    "num_confirm",
    None,
    "Fresh validation examples on which the result is "
    "confirmed; by default as many as trials see, and half of a split that is "
    "too small for both.",
  )
  flags.DEFINE_integer("num_seeds", 3, "Fresh noise seeds of the confirmation.")
  flags.DEFINE_integer("num_workers", 1, "Processes that make trials, each with the model.")
  flags.DEFINE_integer("batch_size", 20, "Examples measured together.")
  flags.DEFINE_string(
    "data_dir", None, "Folder with the task's files; its data set of the hub by default."
  )
  flags.DEFINE_bool(
    "allow_code_execution",
    False,
    "Whether programs that the model wrote may run, for tasks that need it.",
  )


@dataclasses.dataclass(frozen=True)
class Work:
  """A search as the flags ask for it, checked.

  Attributes:
    output: its folder.
    config: the model's architecture.
    settings: from the config and the flags.
    roster: settings of the roster.
    space: which τ are tried.
    asked: how the model is, see `PromptBuilder.settings`.
    searched: the objective on the examples that trials see.
    fresh: on those of the confirmation.
  """

  output: pathlib.Path
  config: ModelConfig
  settings: TuningConfig
  roster: dict
  space: Space
  asked: dict
  searched: Objective
  fresh: Objective

  def make_roster(self, temperatures, seed: int) -> Roster:
    """A roster whose τ are traced: all of the search share their programs."""
    return Roster.create(
      self.config,
      temperatures=temperatures,
      seed=seed,
      noisy_layers=self.space.noisy_layers,
      expert_strategy=FLAGS.expert_strategy,
      memory_budget=FLAGS.memory_budget_mb << 20,
      **self.roster,
    )

  @property
  def told(self) -> dict:
    """All that the results depend on."""
    return {
      "name": "tune",
      "checkpoint": FLAGS.checkpoint,
      "dtype": FLAGS.dtype,
      "mesh": FLAGS.mesh,
      "model": temperature_profiles.sizes_of(self.config),
      "task": FLAGS.task,
      "split": SPLIT,
      "data_dir": FLAGS.data_dir,
      **self.asked,
      "max_new_tokens": FLAGS.max_new_tokens,
      **dataclasses.asdict(self.settings),
      **self.roster,
      "sampler": FLAGS.sampler,
      "prune": FLAGS.prune,
      "seed": FLAGS.seed,
      "num_confirm": len(self.fresh.examples),
      "num_seeds": FLAGS.num_seeds,
      "batch_size": FLAGS.batch_size,
    }


def prepare() -> Work:
  """Everything but parameters.

  Raises:
    ValueError: a setting is wrong, or there are not enough examples.
    FileNotFoundError: there is no such checkpoint, or no data.
  """
  if FLAGS["temperature_profile"].present:
    raise ValueError(
      "--temperature_profile is what is looked for here: leave it out, or give --max_temperature"
    )
  settings = tuning_configs.load(FLAGS.config)
  given = {
    f.name: FLAGS[f.name].value for f in dataclasses.fields(settings) if FLAGS[f.name].present
  }
  settings = dataclasses.replace(settings, **given)
  for name, value in (
    ("num_samples", settings.num_samples),
    ("num_trials", settings.num_trials),
    ("num_confirm", FLAGS.num_confirm),
    ("num_seeds", FLAGS.num_seeds),
    ("num_workers", FLAGS.num_workers),
    ("batch_size", FLAGS.batch_size),
  ):
    if value is not None and value < 1:
      raise ValueError(f"--{name} must be at least 1, got {value}")
  if settings.num_members < 2 and FLAGS.include_clean:
    raise ValueError("--num_members must be at least 2: the plain model alone has no temperatures")
  if FLAGS.num_workers > 1 and FLAGS.distributed:
    raise ValueError(
      "--num_workers is about trials side by side, and with --distributed all "
      "processes make each trial together: give one of them"
    )
  config = app.load_config(FLAGS.checkpoint)
  space = Space(config.num_layers, settings.fixed_layers, settings.max_temperature)
  if FLAGS.sampler == "sweep":
    settings = dataclasses.replace(settings, num_trials=len(space.sweep()))
  trials.check_budget(space, settings.num_trials)
  roster = {name: FLAGS[name].value for name in temperature_profiles.ROSTER_SETTINGS}
  roster |= {"num_members": settings.num_members, "cache": settings.cache}
  task = tasks.get(FLAGS.task)
  count, examples, fresh = choose_examples(task, settings.num_samples)
  settings = dataclasses.replace(settings, num_samples=count)
  prompt_builder = app.prompt_builder(config, app.load_tokenizer(FLAGS.checkpoint))
  searched, fresh = (
    OBJECTIVES[settings.objective](
      config,
      prompt_builder,
      task,
      [examples[i] for i in ids],
      ids,
      FLAGS.batch_size,
      FLAGS.allow_code_execution,
    )
    for ids in (range(count), fresh)
  )
  work = Work(
    pathlib.Path(FLAGS.output),
    config,
    settings,
    roster,
    space,
    prompt_builder.settings,
    searched,
    fresh,
  )
  work.make_roster(0.0, FLAGS.seed + FLAGS.num_seeds)
  return work


def choose_examples(
  task: tasks.Task, num_samples: int
) -> tuple[int, list[tasks.Example], list[int]]:
  """Examples of the validation split, those of the search first.

  Where the split is too small for both, and --num_confirm does not say how to part
  it, the search sees half of it.

  Returns:
    How many are for the search, the examples, and the indices of those that
    confirm, whose questions the search does not see.

  Raises:
    ValueError: there are not enough of them.
  """
  confirms = FLAGS.num_confirm or num_samples
  examples = app.in_all_processes(
    lambda: PromptBuilder.limited(
      task.examples(SPLIT, FLAGS.data_dir, num_samples + confirms, FLAGS.chat), FLAGS.max_new_tokens
    )
  )
  app.check_same([[e.prompt, e.reference] for e in examples], tasks.OTHER_DATA)
  if FLAGS.num_confirm is None and len(examples) < 2 * num_samples:
    num_samples = len(examples) // 2
    print(
      f"[the validation split of {task.name} has {len(examples)} examples: the search sees "
      f"{num_samples} of them, and the others confirm]",
      file=sys.stderr,
    )
    confirms = len(examples) - num_samples
  seen = {e.prompt for e in examples[:num_samples]}
  fresh = [i for i in range(num_samples, len(examples)) if examples[i].prompt not in seen]
  if num_samples < 1 or len(examples) < num_samples + confirms or not fresh:
    raise ValueError(
      f"the validation split of {task.name} has {len(examples)} examples, {len(fresh)} of them "
      f"new to the search: too few for --num_samples={num_samples} and --num_confirm={confirms}"
    )
  return num_samples, examples, fresh


def open_search(work: Work) -> Search:
  """The search in the folder, which is claimed for these settings.

  Raises:
    ValueError: the folder holds a search with other settings.
  """
  work.output.mkdir(parents=True, exist_ok=True)
  with trials.lock_on(work.output / "lock"):
    runs.claim(work.output, work.told)
  return Search(
    work.output, work.space, work.settings.num_trials, work.searched.maximize, FLAGS.seed
  )


class OnModel:
  """The objective as a function of temperatures alone: same noise for all of them.

  Of several processes the first one has the search, and the others `follow` it.
  """

  def __init__(self, params: Params, work: Work):
    self._params, self._work = params, work
    self.name, self.maximize = work.searched.name, work.searched.maximize
    self.value = work.searched.value

  def measure(self, temperatures, part: slice) -> tuple[np.ndarray, Cost]:
    app.broadcast([list(temperatures), part.start, part.stop])
    return self._measure(temperatures, part)

  def follow(self) -> None:
    """Measures what the first process does, until that calls `end`."""
    while (wanted := app.broadcast(None)) is not None:
      temperatures, start, stop = wanted
      self._measure(temperatures, slice(start, stop))

  def end(self) -> None:
    app.broadcast(None)

  def _measure(self, temperatures, part):
    return self._work.searched.measure(
      self._params, self._work.make_roster(temperatures, FLAGS.seed), part
    )


def batches(count: int) -> list[slice]:
  """`count` examples in stretches of --batch_size."""
  size = FLAGS.batch_size
  return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def plain_values(params: Params, work: Work) -> np.ndarray:
  """`[X]` numbers of the plain model on the examples that trials see."""
  roster = Roster.create(work.config)
  return np.concatenate(
    [
      work.searched.measure(params, roster, part)[0]
      for part in batches(len(work.searched.examples))
    ]
  )


def profile_of(
  search: Search, work: Work, model: dict, plain: float, confirmed: dict | None = None
) -> Profile:
  """The best profile of a search."""
  best, made = search.best(), search.trials()
  count = lambda state: sum(t.state == state for t in made)
  total = lambda name: sum(getattr(t, name) for t in made)
  return Profile(
    tuple(best.temperatures),
    model,
    temperature_profiles.roster_of(work.make_roster(best.temperatures, FLAGS.seed)),
    {
      "name": work.searched.name,
      "value": best.value,
      "plain": plain,
      "trial": best.number,
      "kind": best.kind,
      "confirmed": confirmed,
    },
    {
      "task": FLAGS.task,
      "split": SPLIT,
      "data_dir": FLAGS.data_dir,
      "searched": [e.id for e in work.searched.examples],
      "confirmed": [e.id for e in work.fresh.examples],
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


def confirm_best(params: Params, search: Search | None, work: Work, model: dict) -> dict:
  """Measures the best profile, the best uniform τ and the plain model on fresh examples."""
  best, uniform = app.from_first_process(
    lambda: [t and t.temperatures for t in (search.best(), search.best("sweep"))]
  )
  seeds = range(FLAGS.seed + 1, FLAGS.seed + 1 + FLAGS.num_seeds)
  candidates = [
    confirm.Candidate(confirm.PLAIN, lambda seed: Roster.create(work.config, seed=seed), seeds[:1])
  ]
  for name, temperatures in ((confirm.TUNED, best), (confirm.UNIFORM, uniform)):
    if name == confirm.TUNED or temperatures not in (None, best):
      candidates.append(
        confirm.Candidate(name, lambda seed, t=temperatures: work.make_roster(t, seed), seeds)
      )
  parts = batches(len(work.fresh.examples))
  settings = {
    "checkpoint": FLAGS.checkpoint,
    "model": model[temperature_profiles.ROUTERS],
    "tasks": [FLAGS.task],
    "split": SPLIT,
    "limit": None,
  }
  measured, costs = {}, collections.Counter()
  with tqdm(
    total=sum(len(c.seeds) for c in candidates) * len(parts),
    desc="confirm",
    unit="batch",
    file=sys.stderr,
  ) as bar:
    for c in candidates:
      measured[c.name] = confirm.measure(
        params,
        c,
        work.searched,
        work.fresh,
        parts,
        FLAGS.task,
        work.output / "confirm",
        dict(settings),
        bar.update,
      )
      costs.update(measured[c.name].costs)
  if not app.is_first_process():
    return {}
  measured = {name: m.metrics for name, m in measured.items()}
  return {
    "examples": len(work.fresh.examples),
    "seeds": list(seeds),
    "values": confirm.values(measured, work.fresh),
    "differences": confirm.compare(measured, work.fresh),
    "cost": dict(costs),
  }


@contextlib.contextmanager
def more_workers(output: pathlib.Path):
  """Starts the other workers; each writes to a log of its own and ends with the search."""
  command = [sys.executable, "-m", "experiments.tune", *sys.argv[1:], "--num_workers=1"]
  logs = [output / f"worker-{i}.log" for i in range(1, FLAGS.num_workers)]
  workers = []
  try:
    for log in logs:
      with open(log, "w") as file:
        workers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file))
    yield
    for worker, log in zip(workers, logs):
      if worker.wait():
        print(
          f"[a worker ended with an error, and others made its trials: see {log}]", file=sys.stderr
        )
  finally:
    for worker in workers:
      if worker.poll() is None:
        worker.terminate()
        worker.wait()


def run_search(params: Params, work: Work, search: Search | None) -> None:
  """Makes what is missing of a search, which the first process has, and writes its profile."""
  model = temperature_profiles.model_of(FLAGS.checkpoint, work.config, params)
  path = work.output / PROFILE

  def check():
    if search and path.is_file():
      temperature_profiles.read(path).check_routers(params)

  app.in_all_processes(check)
  plain = work.searched.value(plain_values(params, work))
  on_model = OnModel(params, work)

  def write(confirmed=None):
    profile = profile_of(search, work, model, plain, confirmed)
    app.write_atomically(path, profile.to_json())
    return profile

  def make_trials():
    with tqdm(
      total=search.num_trials, initial=search.num_finished, unit="trial", file=sys.stderr
    ) as bar:

      def on_trial():
        bar.update(search.num_finished - bar.n)
        with search.locked():
          if search.best() and not finished(work):
            bar.set_postfix(plain=f"{plain:.4f}", best=f"{write().objective['value']:.4f}")

      search.run(
        on_model,
        batches(len(work.searched.examples)),
        FLAGS.prune and FLAGS.sampler != "sweep",
        on_trial,
      )
    on_model.end()

  if search:
    make_trials()
  else:
    on_model.follow()
  with search.locked() if search else contextlib.nullcontext():  # one worker confirms
    if app.from_first_process(lambda: finished(work) is None):
      confirmed = confirm_best(params, search, work, model)
      if search:
        write(confirmed)


def finished(work: Work) -> Profile | None:
  """The confirmed profile, if the search is finished."""
  path = work.output / PROFILE
  profile = temperature_profiles.read(path) if path.is_file() else None
  return profile if profile and profile.objective["confirmed"] else None


def print_report(profile: Profile, work: Work) -> None:
  """Prints what was found, and one line in the end."""
  objective, cost, confirmed = profile.objective, profile.cost, profile.objective["confirmed"]
  print(f"τ by layer: {', '.join(f'{t:.3f}' for t in profile.temperatures)}")
  print(
    f"On the {len(profile.data['searched'])} examples of the search: {objective['name']} "
    f"{objective['value']:.4f}, plain model {objective['plain']:.4f}. On "
    f"{confirmed['examples']} fresh examples, noise seeds "
    f"{', '.join(map(str, confirmed['seeds']))} (95 % intervals; * leaves out zero):\n"
  )
  print(confirm.told(confirmed, objective["name"]) + "\n")
  print(
    f"{cost['trials']} trials ({cost['pruned']} pruned) cost {cost['tokens']:,} tokens, "
    f"{cost['forward_passes']:,} forward rows and {cost['seconds']:.0f} s; saved "
    f"{work.output / PROFILE}."
  )


def main(argv) -> None:
  del argv
  work = prepare()
  search = app.in_all_processes(lambda: open_search(work) if app.is_first_process() else None)
  if app.from_first_process(lambda: finished(work) is None):
    with more_workers(work.output):
      params, _ = app.load_params(FLAGS.checkpoint, FLAGS.dtype, FLAGS.mesh)
      run_search(params, work, search)
  if app.is_first_process():
    print_report(finished(work), work)


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main)


if __name__ == "__main__":
  program()
