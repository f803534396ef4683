"""Makes the figures and tables of the paper, and those that its reviewers asked for.

    python -m experiments.reproduce --figure=fig6 --model=embedded
    python -m experiments.reproduce --figure=fig3,fig10 --model=olmoe
    python -m experiments.reproduce --figure=all --model=embedded --page=RESULTS.md

What a figure shows, what it needs and how long it takes is told in its file in
`experiments/figures`, and where its model comes from in `experiments/figures/figure_models.py`.
--output/MODEL/FIGURE then holds

* `records.jsonl`, what was found, one JSON object a line;
* `figure.png` and `figure.pdf`, readable in gray, and `table.md`, also printed;
* `about.json`: command, date, seeds, machine, versions and seconds.

Most of the work is done by other programs (`tune`, `compare`, ...), whose folders lie
in --output/MODEL, too, and are shared by figures; --dry_run prints their commands,
which may as well be run on other machines. Killed and started again, all goes on; a
figure that is complete is only drawn anew.
--set overrides settings of a model or of a figure, as in
--set=num_examples=20,num_members=4.
"""

from collections.abc import Iterable
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import shlex
import sys
import time

from absl import flags

from experiments import figures, tasks
from experiments.analysis import drawing
from experiments.benchmarks import machine
from experiments.cli import app
from experiments.figures import figure_models, results_page
from experiments.figures.work import ABOUT, RECORDS, Command, Work, read_records, write_records
from experiments.records import runs

FLAGS = flags.FLAGS


def define_flags(values: flags.FlagValues = FLAGS) -> None:
  flags.DEFINE_list(
    "figure",
    None,
    'Figures, or "all", "paper" or "reviewers": ' + ", ".join(figures.NAMES) + ".",
    required=True,
    flag_values=values,
  )
  flags.DEFINE_enum(
    "model",
    None,
    list(figure_models.MODELS),
    "What they are made of.",
    required=True,
    flag_values=values,
  )
  flags.DEFINE_list(
    "checkpoint",
    None,
    "Checkpoints in place of the model's, as other programs take them.",
    flag_values=values,
  )
  flags.DEFINE_list(
    "set",
    [],
    "NAME=VALUE: settings of the model or the figure that differ; "
    "values with commas take semicolons.",
    flag_values=values,
  )
  flags.DEFINE_integer("seed", 0, "The first noise seed.", flag_values=values)
  flags.DEFINE_string(
    "data_dir", None, "Folder with the tasks' files; see experiments/tasks.", flag_values=values
  )
  flags.DEFINE_bool(
    "allow_code_execution",
    False,
    "Let tasks run programs that the model wrote.",
    flag_values=values,
  )
  flags.DEFINE_bool(
    "dry_run", False, "Print the commands that would run, and do nothing.", flag_values=values
  )
  flags.DEFINE_string("output", "results/reproduce", "Folder of all figures.", flag_values=values)
  flags.DEFINE_string(
    "page",
    None,
    "Also write this Markdown page of all figures of the model "
    "that are there; their records and pictures go to docs/results beside it.",
    flag_values=values,
  )


def figure_names(wanted: list[str]) -> list[str]:
  """The figures that --figure names, in their order.

  Raises:
    ValueError: one of them does not exist.
  """
  groups = {"all": figures.NAMES, "paper": figures.PAPER, "reviewers": figures.REVIEWERS}
  found = [name for text in wanted for name in groups.get(text, (text,))]
  for name in found:
    figures.get(name)
  return sorted(set(found), key=figures.NAMES.index)


def overridden(settings: list[object], given: list[str]) -> list[object]:
  """Dataclasses with the values that --set gives, each wherever there is a field of its name.

  Raises:
    ValueError: no field is called so, or the value is not of its kind.
  """
  named = [{f.name for f in dataclasses.fields(s)} for s in settings]
  for text in given:
    name, equals, value = text.partition("=")
    known = set().union(*named)
    if not equals or name not in known:
      raise ValueError(
        f"--set={text}: it must be NAME=VALUE with one of {', '.join(sorted(known))}"
      )
    settings = [
      dataclasses.replace(s, **{name: _parse(text, value, getattr(s, name))})
      if name in names
      else s
      for s, names in zip(settings, named)
    ]
  return settings


def _parse(text, value, old):
  """`value` as what `old` is: numbers for numbers, tuples with semicolons."""
  try:
    if isinstance(old, tuple):
      kind = type(old[0]) if old else str
      return tuple(kind(part) for part in value.split(";"))
    if isinstance(old, bool):
      return {"true": True, "false": False}[value.lower()]
    if old is None or isinstance(old, int):
      return int(value)
    return type(old)(value)
  except (KeyError, ValueError):
    raise ValueError(f"--set={text}: the value must be like {old!r}") from None


def make_works() -> list[Work]:
  """The figures that flags ask for, checked.

  Raises:
    ValueError: a flag is wrong.
  """
  names = figure_names(FLAGS.figure)
  model = figure_models.get(FLAGS.model)
  if FLAGS.checkpoint:
    model = dataclasses.replace(model, checkpoints=tuple(FLAGS.checkpoint), prepare=())
  configs = [figures.get(name).CONFIGS[FLAGS.model] for name in names]
  model, *configs = overridden([model, *configs], FLAGS.set)
  return [
    Work(
      name,
      model,
      config,
      pathlib.Path(FLAGS.output) / FLAGS.model,
      FLAGS.seed,
      FLAGS.data_dir,
      FLAGS.allow_code_execution,
    )
    for name, config in zip(names, configs)
  ]


def check_checkpoints(model: figure_models.Model) -> None:
  """Refuses a model that is not there.

  Raises:
    FileNotFoundError: with the command that makes it.
  """
  for checkpoint in model.checkpoints:
    try:
      app.load_config(checkpoint)
    except FileNotFoundError as error:
      raise FileNotFoundError(
        f"{error}; {model.title} is made by `{'` and `'.join(model.prepare)}`, or name a folder "
        "with --checkpoint"
        if model.prepare
        else str(error)
      ) from error


def check_tasks(works: list[Work], commands: list[Command]) -> None:
  """Refuses tasks whose data cannot be had, or that run programs without leave.

  Raises:
    ValueError, FileNotFoundError: as `tasks.Task.examples` and `check_allowed`.
  """
  names = {
    name
    for command in commands
    for flag, value in command.flags
    if flag in ("task", "tasks")
    for name in ([value] if isinstance(value, str) else value)
  }
  names |= {work.config.task for work in works if hasattr(work.config, "task")}
  for name in sorted(names):
    task = tasks.get(name)
    task.check_allowed(FLAGS.allow_code_execution)
    for split in ("validation", "test"):
      task.examples(split, FLAGS.data_dir, 1)


def all_commands(works: list[Work]) -> list[Command]:
  """The programs that figures need, those that several need once."""
  found = {}
  for work in works:
    for command in figures.get(work.figure).commands(work):
      first = found.setdefault(command.output, command)
      if first != command:
        raise ValueError(f"two figures want {command.output} of different commands")
  return list(found.values())


class Stopwatch:
  """Seconds that programs and figures took, kept in a file; of what is cut off, too."""

  def __init__(self, path: pathlib.Path):
    self._path = path

  @contextlib.contextmanager
  def __call__(self, name: str):
    """Times what is done inside, and adds it to what `name` took before."""
    begin = time.perf_counter()
    try:
      yield
    finally:
      spent = self.total([name]) + time.perf_counter() - begin
      app.write_atomically(self._path, json.dumps(self._read() | {name: spent}, indent=2) + "\n")

  def total(self, names: Iterable[str]) -> float:
    known = self._read()
    return sum(known.get(name, 0.0) for name in names)

  def _read(self):
    return json.loads(self._path.read_text()) if self._path.is_file() else {}


def finish(work: Work, stopwatch: Stopwatch) -> str:
  """Measures, tells and draws a figure; returns its table."""
  module = figures.get(work.figure)
  work.folder.mkdir(parents=True, exist_ok=True)
  runs.claim(work.folder, work.settings)
  about = work.folder / ABOUT
  if about.is_file():  # to be drawn anew: what is measured is there
    records = read_records(work.folder / RECORDS)
  else:
    with stopwatch(work.figure):
      records = module.measure(work)
    write_records(work.folder / RECORDS, records)
  text = module.table(records)
  app.write_atomically(work.folder / "table.md", text + "\n")
  picture = module.draw(records)
  if picture is not None:
    drawing.save(picture, work.folder / "figure")
  known = (
    json.loads(about.read_text())
    if about.is_file()
    else {
      "figure": work.figure,
      "model": work.model.title,
      "command": _command(work),
      "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
      "machine": machine.describe(num_cores()),
      "seconds": stopwatch.total([work.figure, *(c.name for c in module.commands(work))]),
    }
  )
  app.write_atomically(
    about,
    json.dumps(known | {"seeds": work.seeds, "findings": module.findings(records)}, indent=2)
    + "\n",
  )
  return text


def num_cores() -> int:
  """How many this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _command(work):
  """What makes this figure alone."""
  given = {
    name: FLAGS[name].value
    for name in ("checkpoint", "set", "seed", "data_dir", "allow_code_execution", "output")
    if FLAGS[name].present
  }
  told = [
    f"--{name}={','.join(value) if isinstance(value, list) else value}"
    for name, value in given.items()
  ]
  return shlex.join(
    [
      "python",
      "-m",
      "experiments.reproduce",
      f"--figure={work.figure}",
      f"--model={FLAGS.model}",
      *told,
    ]
  )


def main(argv) -> None:
  del argv
  works = make_works()
  commands = all_commands(works)
  if FLAGS.dry_run:
    for command in commands:
      print(command)
    return
  model = works[0].model
  check_checkpoints(model)
  check_tasks(works, [c for c in commands if not c.is_done])
  root = works[0].root
  root.mkdir(parents=True, exist_ok=True)
  settings = {k: v for k, v in works[0].settings.items() if k not in ("figure", "config")}
  runs.claim(root, settings)
  stopwatch = Stopwatch(root / "seconds.json")
  for number, command in enumerate(commands, 1):
    if command.is_done:
      continue
    print(f"[{number}/{len(commands)}] {command}", file=sys.stderr)
    with stopwatch(command.name):
      command.run()
  for work in works:
    text = finish(work, stopwatch)
    print(f"\n{figures.get(work.figure).TITLE}\n\n{text}\n")
  print(f"Saved {', '.join(work.figure for work in works)} in {root}.")
  if FLAGS.page:
    print(results_page.write(pathlib.Path(FLAGS.page), root, model))


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(
    main,
    not_distributed="it starts other programs: --dry_run prints their commands, which "
    "take --distributed",
  )


if __name__ == "__main__":
  program()
