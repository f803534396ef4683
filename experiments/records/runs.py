"""Runs: what one method made of examples, as a folder that other programs read.

    RUN/settings.json    all that the results depend on, what the run is called, and the
                         command that began it
    RUN/examples.jsonl   one line for each (task, example, seed), in that order when complete
    RUN/costs.jsonl      what each stretch of work cost
    RUN/summary.json     means and costs; written last

A line of `examples.jsonl` has "task", "example" (an id that is the same in every
run, so that runs are paired by it), "seed" (of the routing noise) and "metrics"
({name: number}), beside whatever else a program keeps. A line of `costs.jsonl` has
"task", "seed" and numbers that are summed ("tokens", "forward_passes", "flops",
"seconds", ...). A killed run goes on where it stopped. Of several processes the
first one reads and writes; all know what is done.
"""

from collections.abc import Iterable
import json
import pathlib
import shlex
import sys
from typing import Any

import numpy as np

from experiments.cli import app

SETTINGS, EXAMPLES, COSTS, SUMMARY = (
  "settings.json",
  "examples.jsonl",
  "costs.jsonl",
  "summary.json",
)
COMMAND = "command"
# (task, example, seed): what a line is known by.
Key = tuple[str, str, int]


def key(record: dict[str, Any]) -> Key:
  """What a line of `examples.jsonl` is known by."""
  return record["task"], str(record["example"]), int(record["seed"])


def claim(path: pathlib.Path, settings: dict[str, Any]) -> None:
  """Writes the settings of a run into its folder, or finds them there.

  Raises:
    ValueError: the folder holds a run with other settings.
  """
  wanted = json.loads(json.dumps(settings))
  found = path / SETTINGS
  if not found.is_file():
    command = shlex.join(
      ["python", "-m", f"experiments.{pathlib.Path(sys.argv[0]).stem}", *sys.argv[1:]]
    )
    app.write_atomically(found, json.dumps(wanted | {COMMAND: command}, indent=2) + "\n")
    return
  held = json.loads(found.read_text())
  held.pop(COMMAND, None)
  differing = sorted(k for k in held.keys() | wanted.keys() if held.get(k) != wanted.get(k))
  if differing:
    raise ValueError(
      f"{path} holds a run with other settings ({', '.join(differing)}): name "
      "another folder, or remove it"
    )


class Run:
  """A run that is being made, or made further.

  Attributes:
    path: its folder.
    name: what the run is called in tables.
    done: keys of the examples whose lines are there.
  """

  def __init__(self, path: str | pathlib.Path, name: str, settings: dict[str, Any]):
    """Opens a folder, or begins one.

    Raises:
      ValueError: the folder holds a run of another name or with other settings.
    """
    self.path, self.name = pathlib.Path(path), name

    def opened():
      claim(self.path, {"name": name, **settings})
      read_lines(self.path / COSTS, mend=True)
      return [key(record) for record in read_lines(self.path / EXAMPLES, mend=True)]

    self.done = {tuple(k) for k in app.from_first_process(opened)}

  def write(self, records: Iterable[dict[str, Any]], costs: dict[str, Any] | None = None) -> None:
    """Appends lines of examples, and one of what they cost."""
    lines = []
    for record in records:
      self.done.add(key(record))
      lines.append(record)
    if costs is not None:  # first: what was paid for stays counted if the rest is lost
      _append(self.path / COSTS, [costs])
    _append(self.path / EXAMPLES, lines)

  def finish(self) -> dict[str, Any]:
    """Puts the lines in order, and writes and returns the summary."""

    def summary():
      records = sorted(read_lines(self.path / EXAMPLES), key=key)
      app.write_atomically(self.path / EXAMPLES, "".join(json.dumps(r) + "\n" for r in records))
      found = {"name": self.name, "tasks": means(records), "costs": self.costs()}
      app.write_atomically(self.path / SUMMARY, json.dumps(found, indent=2) + "\n")
      return found

    return app.from_first_process(summary)

  def costs(self) -> dict[str, float]:
    """The numbers of all lines of `costs.jsonl`, summed; of "peak_..." the largest."""
    total: dict[str, float] = {}
    for line in read_lines(self.path / COSTS):
      for name, value in line.items():
        if name in ("task", "seed") or isinstance(value, (str, bool, type(None))):
          continue
        largest = name.startswith("peak_")
        total[name] = max(total.get(name, value), value) if largest else total.get(name, 0) + value
    return total


def means(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """{task: {"examples", "seeds", "metrics": {name: mean over examples and seeds}}}."""
  by_task: dict[str, list[dict[str, Any]]] = {}
  for record in records:
    by_task.setdefault(record["task"], []).append(record)
  return {
    task: {
      "examples": len({str(r["example"]) for r in lines}),
      "seeds": len({r["seed"] for r in lines}),
      "metrics": {
        name: float(np.mean([r["metrics"][name] for r in lines if name in r["metrics"]]))
        for name in sorted(set().union(*(r["metrics"] for r in lines)))
      },
    }
    for task, lines in sorted(by_task.items())
  }


def load(path: str | pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
  """Settings, lines of examples, and summary of a finished run.

  Raises:
    FileNotFoundError: it is not the folder of a finished run.
  """
  path = pathlib.Path(path)
  for name in (SETTINGS, EXAMPLES, SUMMARY):
    if not (path / name).is_file():
      raise FileNotFoundError(
        f"{path} has no {name}: it is not a finished run; start the program that writes it again"
      )
  return (
    json.loads((path / SETTINGS).read_text()),
    read_lines(path / EXAMPLES),
    json.loads((path / SUMMARY).read_text()),
  )


def read_lines(path: pathlib.Path, mend: bool = False) -> list[dict[str, Any]]:
  """The JSON objects of a file, none if it is not there.

  Args:
    path: the file.
    mend: whether a last line that a killed run left torn is cut off.
  """
  if not path.is_file():
    return []
  whole, _, torn = path.read_text().rpartition("\n")
  if torn and mend:
    app.write_atomically(path, whole + "\n" if whole else "")
  return [json.loads(line) for line in whole.splitlines()]


def _append(path, records):
  if not app.is_first_process():
    return
  with open(path, "a") as file:
    file.write("".join(json.dumps(record) + "\n" for record in records))
