"""Reproduces the paper's figures and tables, and makes those that its reviewers asked for.

    python -m experiments.reproduce --figure=fig6 --model=embedded
    python -m experiments.reproduce --figure=fig3,fig10 --model=olmoe
    python -m experiments.reproduce --figure=all --model=embedded --page=RESULTS.md
    python -m experiments.reproduce --model=embedded --page=RESULTS.md  # only redraws
    python -m experiments.reproduce --figure=vision_moe  # of small networks that it trains

Each figure is described in its file in `experiments/figures`, times are in the package's
docstring, and models in `figure_models`. --output/MODEL/FIGURE contains

* `records.jsonl`: the results, one JSON object per line;
* `figure.png` and `figure.pdf`, readable in gray, and `table.md`, also printed;
* `about.json`: command, date, seeds, machine, versions and seconds.

Most of the work is done by other programs (`tune`, `compare`), whose folders are also in
--output/MODEL and shared by figures; --dry_run prints their commands, which may be run on other
machines. When rerun, the program resumes; complete figures are only redrawn. --set overrides
settings of a model or a figure: --set=num_examples=20,num_members=4.
"""

from collections.abc import Iterable
import contextlib
import dataclasses
import datetime
import os
import pathlib
import shlex
import sys
import time
from typing import Any

from absl import flags

from checkpoints_convert import outputs
from experiments import figures, tasks
from experiments.analysis import drawing
from experiments.benchmarks import machine
from experiments.cli import app, extras, overrides, text_files
from experiments.figures import figure_models, results_page
from experiments.figures.figure_run import (
  ABOUT,
  RECORDS,
  Command,
  FigureRun,
  read_records,
  write_records,
)
from experiments.records import runs
from roe_jax import typed
from roe_jax.roster import Roster

FLAGS = flags.FLAGS
GROUPS = {
  "all": figures.NAMES,
  "paper": figures.PAPER,
  "reviewers": figures.REVIEWERS,
  "language": figures.LANGUAGE,
  "systems": figures.SYSTEMS,
  "training": figures.TRAINING,
  "vision": figures.VISION,
}


def define_flags(values: flags.FlagValues = FLAGS) -> None:
  def define(kind, name, default, *args, **settings):
    getattr(flags, f"DEFINE_{kind}")(name, default, *args, flag_values=values, **settings)

  names = ", ".join(figures.NAMES)
  groups = ", ".join(f'"{group}"' for group in GROUPS)
  define("list", "figure", [], f"Figures to make: {groups}, or {names}.")
  models = list(figure_models.ALL)
  of = "Model to make figures of; may be left out for figures of one model only."
  define("enum", "model", None, models, of)
  define("list", "checkpoint", None, "Checkpoints to use instead of the model's.")
  settings = "Overrides of the model's or figure's settings, as NAME=VALUE; tuples use semicolons."
  define("list", "set", [], settings)
  define("integer", "seed", 0, "First noise seed.")
  define("string", "data_dir", None, "Folder with the tasks' files; see experiments/tasks.")
  define("bool", "allow_code_execution", False, "Allow tasks to run programs the model wrote.")
  define("bool", "dry_run", False, "Only print the commands that would run.")
  define("string", "output", "results/reproduce", "Folder for all figures.")
  page = "Markdown page to write from all of the model's records, which are kept in docs/results"
  define("string", "page", None, f"{page} next to it. Pictures are redrawn.")


def model_name(given: str | None, wanted: list[str]) -> str:
  """Returns the model given by --model, or the only one that the figures are made of.

  Raises:
    ValueError: no model is given, and the figures do not say which.
  """
  if given:
    return given
  names = [name for group in wanted for name in GROUPS.get(group, [group])]
  found = {model for name in names for model in figures.get(name).CONFIGS}
  if len(found) != 1:
    raise ValueError(f"give --model, one of {', '.join(sorted(found) or figure_models.ALL)}")
  return found.pop()


def figure_names(wanted: list[str], model: str) -> list[str]:
  """Returns the figures given by --figure, in their order; of groups, those made of the model.

  Raises:
    ValueError: a name is unknown, or the figure is not made of the model.
  """
  found = []
  for name in wanted:
    if name in GROUPS:
      found += figures.of_model(GROUPS[name], model)
    elif figures.of_model([name], model):
      found.append(name)
    else:
      raise ValueError(
        f"{name} is not made of {model}: choose a --model of {', '.join(figures.get(name).CONFIGS)}"
      )
  return sorted(set(found), key=figures.NAMES.index)


def overridden(settings: list[Any], given: list[str]) -> list[Any]:
  """Overrides the fields of dataclasses by --set, wherever there is a field of that name.

  Raises:
    ValueError: no field has that name, or the value has the wrong type or is out of range.
  """
  named = [{f.name for f in dataclasses.fields(s)} for s in settings]
  for text in given:
    name, equals, value = text.partition("=")
    known = set().union(*named)
    if not equals or name not in known:
      raise ValueError(
        f"--set={text}: it must be NAME=VALUE with one of {', '.join(sorted(known))}"
      )
    try:
      settings = [
        overrides.changed(s, {name: value}, figures.BUDGETS) if name in names else s
        for s, names in zip(settings, named)
      ]
    except ValueError as error:
      raise ValueError(f"--set={text}: {error}") from error
  return settings


def make_figure_runs(names: list[str], model: str) -> list[FigureRun]:
  """Returns the figures of these names, of the model of that name, as the flags set them.

  Raises:
    ValueError: wrong flags.
  """
  chosen = figure_models.get(model)
  if FLAGS.checkpoint:
    chosen = dataclasses.replace(chosen, checkpoints=tuple(FLAGS.checkpoint), prepare=())
  configs = [figures.get(name).CONFIGS[chosen.name] for name in names]
  chosen, *configs = overridden([chosen, *configs], FLAGS.set)
  root = pathlib.Path(FLAGS.output) / chosen.name
  data = FLAGS.seed, FLAGS.data_dir, FLAGS.allow_code_execution
  made = [FigureRun(name, chosen, config, root, *data) for name, config in zip(names, configs)]
  for text in FLAGS.set:
    if not any(figures.uses(run, text.partition("=")[0]) for run in made):
      raise ValueError(f"--set={text}: {', '.join(names)} would not use it: remove it")
  return made


def check_checkpoints(model: figure_models.Model) -> None:
  """Checks that the model exists and can run as a roster.

  Raises:
    ValueError: it cannot.
    FileNotFoundError: it does not; the message has the command that makes it.
  """
  for checkpoint in model.checkpoints:
    try:
      Roster.create(app.load_config(checkpoint), 2, 1.0)
    except FileNotFoundError as error:
      raise FileNotFoundError(
        f"{error}; make {model.title} with `{'` and `'.join(model.prepare)}`, or give a folder "
        "with --checkpoint"
        if model.prepare
        else str(error)
      ) from error


def check_tasks(figure_runs: list[FigureRun], commands: list[Command]) -> None:
  """Checks that tasks have data, and may run programs if they need to.

  Raises:
    ValueError, FileNotFoundError: see `tasks.Task.examples` and `check_allowed`.
  """
  names = {
    name
    for command in commands
    for flag, value in command.flags
    if flag in ("task", "tasks")
    for name in ([value] if isinstance(value, str) else value)
  }
  names |= {run.config.task for run in figure_runs if hasattr(run.config, "task")}
  for name in sorted(names):
    task = tasks.get(name)
    task.check_allowed(FLAGS.allow_code_execution)
    for split in ("validation", "test"):
      task.examples(split, FLAGS.data_dir, 1)


def all_commands(figure_runs: list[FigureRun]) -> list[Command]:
  """Returns the programs that figures need, without repetitions."""
  found = {}
  for run in figure_runs:
    for command in figures.commands(run):
      first = found.setdefault(command.output, command)
      if first != command:
        raise ValueError(
          f"two figures need {command.output} from different commands: run each alone"
        )
  return list(found.values())


class Stopwatch:
  """Seconds spent on programs and figures, saved to a file, including interrupted ones."""

  def __init__(self, path: pathlib.Path):
    self._path = path

  @contextlib.contextmanager
  def __call__(self, name: str):
    """Times the context and adds it to the time of `name` so far."""
    begin = time.perf_counter()
    try:
      yield
    finally:
      spent = self.total([name]) + time.perf_counter() - begin
      app.write_atomically(
        self._path, text_files.to_json(self._read() | {name: spent}, indent=2) + "\n"
      )

  def total(self, names: Iterable[str]) -> float:
    known = self._read()
    return sum(known.get(name, 0.0) for name in names)

  def _read(self):
    return typed.read(self._path, dict[str, float]) if self._path.is_file() else {}


def finish(run: FigureRun, stopwatch: Stopwatch) -> str:
  """Measures a figure if needed, writes and draws it, and returns its table."""
  figure = figures.get(run.figure)
  run.folder.mkdir(parents=True, exist_ok=True)
  runs.claim(run.folder, run.settings)
  path = run.folder / ABOUT
  if path.is_file():
    about, records = typed.read(path), read_records(run.folder / RECORDS)
  else:
    with stopwatch(run.figure):
      records = figure.measure(run)
    write_records(run.folder / RECORDS, records)
    about = {
      "figure": run.figure,
      "model": run.model.title,
      "command": _command(run),
      "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
      "machine": machine.describe(num_cores()),
      "seconds": stopwatch.total([run.figure, *(c.name for c in figures.commands(run))]),
    }
  table = figure.table(records)
  app.write_atomically(run.folder / "table.md", table + "\n")
  picture = figure.draw(records)
  if picture is not None:
    drawing.save(picture, run.folder / "figure")
  about |= {"seeds": run.seeds, "findings": figure.findings(records)}
  app.write_atomically(path, text_files.to_json(about, indent=2) + "\n")
  return table


def num_cores() -> int:
  """Returns the number of cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _command(run):
  """Returns the command that makes this figure alone."""
  given = {
    name: FLAGS[name].value
    for name in ("checkpoint", "set", "seed", "data_dir", "allow_code_execution", "output")
    if FLAGS[name].present
  }
  given = {"figure": run.figure, "model": run.model.name} | given
  return shlex.join(
    ["python", "-m", "experiments.reproduce"]
    + [f"--{k}={','.join(v) if isinstance(v, list) else v}" for k, v in given.items()]
  )


def main(argv) -> None:
  del argv
  if not FLAGS.figure and not FLAGS.page:
    raise ValueError("there is nothing to make: give --figure, --page or both")
  model = model_name(FLAGS.model, FLAGS.figure)
  if names := figure_names(FLAGS.figure, model):
    make_figures(make_figure_runs(names, model))
  if FLAGS.page and not FLAGS.dry_run:
    root = pathlib.Path(FLAGS.output) / model
    print(results_page.write(pathlib.Path(FLAGS.page), root, figure_models.get(model)))


def make_figures(figure_runs: list[FigureRun]) -> None:
  """Runs the programs that figures need, and finishes the figures."""
  commands = all_commands(figure_runs)
  if FLAGS.dry_run:
    print("\n".join(map(str, commands)))
    return
  for run in figure_runs:
    extras.check(getattr(figures.get(run.figure), "NEEDS", ()))
  check_checkpoints(figure_runs[0].model)
  check_tasks(figure_runs, [c for c in commands if not c.is_done])
  root, settings = figure_runs[0].root, figure_runs[0].settings
  root.mkdir(parents=True, exist_ok=True)
  runs.claim(root, {k: v for k, v in settings.items() if k not in ("figure", "config")})
  stopwatch = Stopwatch(root / "seconds.json")
  for number, command in enumerate(commands, 1):
    if command.is_done:
      continue
    print(f"[{number}/{len(commands)}] {command}", file=sys.stderr)
    with stopwatch(command.name):
      command.run()
  for run in figure_runs:
    with outputs.held(str(run.folder)):
      table = finish(run, stopwatch)
    print(f"\n{figures.get(run.figure).TITLE}\n\n{table}\n")
  print(f"Saved {', '.join(run.figure for run in figure_runs)} in {root}.")


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  reason = "it starts other programs: --dry_run prints their commands, which take --distributed"
  app.run(
    main,
    not_distributed=reason,
    needs=("matplotlib", "optuna", "scipy", "tabulate"),
    output=outputs.SHARED,
  )


if __name__ == "__main__":
  program()
