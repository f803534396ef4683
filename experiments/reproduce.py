"""Makes the figures and tables of the paper, and those that its reviewers asked for.

    python -m experiments.reproduce --figure=fig6 --model=embedded
    python -m experiments.reproduce --figure=fig3,fig10 --model=olmoe
    python -m experiments.reproduce --figure=all --model=embedded --page=RESULTS.md

What a figure shows, what it needs and how long it takes is told in its file in
`experiments/figures`, and where its model comes from in `experiments/figures/models.py`.
--output/MODEL/FIGURE then holds

* `records.jsonl`, what was found, one JSON object a line;
* `figure.png` and `figure.pdf`, readable in grey, and `table.md`, also printed;
* `about.json`: command, date, seeds, machine, versions and seconds.

Most of the work is done by other programs (`tune`, `compare`, ...), whose folders lie
in --output/MODEL, too, and are shared by figures; --dry_run prints their commands,
which may as well be run on other machines. Killed and started again, all goes on.
--set overrides settings of a model or of a figure, as in
--set=num_examples=20,num_members=4.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import shlex
import sys
import time

from absl import flags

from experiments import app, drawing, figures, runs
from experiments.benchmarks import machine
from experiments.figures import models, page
from experiments.figures.work import Command, Work, write_records

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_list("figure", None, "Figures, or \"all\", \"paper\" or \"reviewers\": "
                    + ", ".join(figures.NAMES) + ".", required=True)
  flags.DEFINE_enum("model", None, list(models.MODELS), "What they are made of.", required=True)
  flags.DEFINE_list("checkpoint", None, "Checkpoints in place of the model's, as other programs "
                    "take them.")
  flags.DEFINE_list("set", [], "NAME=VALUE: settings of the model or the figure that differ; "
                    "values with commas take semicolons.")
  flags.DEFINE_integer("seed", 0, "The first noise seed.")
  flags.DEFINE_string("data_dir", None, "Folder with the tasks' files; see experiments/tasks.")
  flags.DEFINE_bool("allow_code_execution", False, "Let tasks run programs that the model wrote.")
  flags.DEFINE_bool("dry_run", False, "Print the commands that would run, and do nothing.")
  flags.DEFINE_string("output", "results/reproduce", "Folder of all figures.")
  flags.DEFINE_string("page", None, "Also write this Markdown page of all figures of the model "
                      "that are there; pictures go to docs/results beside it.")


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
  for text in given:
    name, equals, value = text.partition("=")
    fields = {f.name for s in settings for f in dataclasses.fields(s)}
    if not equals or name not in fields:
      raise ValueError(f"--set={text}: it must be NAME=VALUE with one of {', '.join(sorted(fields))}")
    settings = [dataclasses.replace(s, **{name: _parse(text, value, getattr(s, name))})
                if hasattr(s, name) else s for s in settings]
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
  model = models.get(FLAGS.model)
  if FLAGS.checkpoint:
    model = dataclasses.replace(model, checkpoints=tuple(FLAGS.checkpoint), prepare=())
  configs = [figures.get(name).CONFIGS[FLAGS.model] for name in names]
  model, *configs = overridden([model, *configs], FLAGS.set)
  return [Work(name, model, config, pathlib.Path(FLAGS.output) / FLAGS.model, FLAGS.seed,
               FLAGS.data_dir, FLAGS.allow_code_execution)
          for name, config in zip(names, configs)]


def check_checkpoints(model: models.Model) -> None:
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
          "with --checkpoint" if model.prepare else str(error)) from error


def all_commands(works: list[Work]) -> list[Command]:
  """The programs that figures need, those that several need once."""
  found = {}
  for work in works:
    for command in figures.get(work.figure).commands(work):
      first = found.setdefault(command.output, command)
      if first != command:
        raise ValueError(f"two figures want {command.output} of different commands")
  return list(found.values())


def finish(work: Work, seconds: float) -> str:
  """Measures and draws a figure; returns its table."""
  module = figures.get(work.figure)
  work.folder.mkdir(parents=True, exist_ok=True)
  runs.claim(work.folder, work.settings)
  begin = time.perf_counter()
  records = module.measure(work)
  write_records(work.folder / "records.jsonl", records)
  text = module.table(records)
  app.write_atomically(work.folder / "table.md", text + "\n")
  picture = module.draw(records)
  if picture is not None:
    drawing.save(picture, work.folder / "figure")
  seconds += time.perf_counter() - begin
  _write_about(work, module.findings(records), seconds)
  return text


def _write_about(work, findings, seconds):
  """Seconds add up over runs that were cut off; a run that found all done changes nothing."""
  path = work.folder / "about.json"
  known = json.loads(path.read_text()) if path.is_file() else {}
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  now = datetime.datetime.now(datetime.timezone.utc)
  seeds = [work.seed + i for i in range(work.model.num_seeds)]
  about = {
      "figure": work.figure, "model": work.model.title, "findings": findings,
      "command": shlex.join(["python", "-m", "experiments.reproduce", *(
          a for a in sys.argv[1:] if not a.startswith(("--figure", "--page"))),
                             f"--figure={work.figure}"]),
      "date": known.get("date") or now.strftime("%Y-%m-%d %H:%M UTC"), "seeds": seeds,
      "machine": known.get("machine") or machine.describe(cores),
      "seconds": max(seconds, known.get("seconds", 0.0))}
  app.write_atomically(path, json.dumps(about, indent=2) + "\n")


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
  root = works[0].root
  root.mkdir(parents=True, exist_ok=True)
  settings = {k: v for k, v in works[0].settings.items() if k not in ("figure", "config")}
  runs.claim(root, settings)
  took = {}
  for number, command in enumerate(commands, 1):
    if command.is_done:
      continue
    print(f"[{number}/{len(commands)}] {command}", file=sys.stderr)
    begin = time.perf_counter()
    command.run()
    took[command.output] = time.perf_counter() - begin
  for work in works:
    needed = [c.output for c in figures.get(work.figure).commands(work)]
    text = finish(work, sum(took.get(output, 0.0) for output in needed))
    print(f"\n{figures.get(work.figure).TITLE}\n\n{text}\n")
  print(f"Saved {', '.join(work.figure for work in works)} in {root}.")
  if FLAGS.page:
    print(page.write(pathlib.Path(FLAGS.page), root, model))


if __name__ == "__main__":
  define_flags()
  app.run(main, not_distributed="it starts other programs: --dry_run prints their commands, which "
          "take --distributed")
