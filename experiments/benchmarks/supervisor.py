"""Runs stages of cases within a time budget, in child processes that are killed if they hang.

A compiler that hangs cannot be interrupted from inside its process, and a JAX process keeps the
device's memory until it ends. So the parent never initializes a device: one child at a time opens
a stage and runs its cases. A case that takes too long, crashes the child or raises is a record
with the reason, and a new child continues with the next case.
"""

from collections.abc import Callable, Mapping, Sequence
import ctypes
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
from typing import Any

from experiments.cli import app
from experiments.records import store

# JAX starts afresh in a spawned process, where a forked one would inherit its threads.
_processes = multiprocessing.get_context("spawn")
_SET_PDEATHSIG = 1
FAILED = "failed"  # in a record: why there is no result
OPENING = "opening"  # the name of a failure before the first case


@dataclasses.dataclass(frozen=True)
class Case:
  """A measurement.

  Attributes:
    name: unique within the stage.
    run: maps what the stage's `open` returns to a JSON object; can be pickled, as `open`.
    seconds: after which it is killed.
  """

  name: str
  run: Callable[[Any], dict[str, Any]]
  seconds: float = 30.0


@dataclasses.dataclass(frozen=True)
class Stage:
  """Cases that share a child process, most valuable first.

  Attributes:
    name: prefix of the names of its records.
    title: of its table.
    seconds: time limit in the first pass; what other stages leave is used in a second pass.
    open: makes what the cases need.
    cases: the cases.
    opening: seconds after which `open` is killed.
    environment: variables of the child process.
  """

  name: str
  title: str
  seconds: float
  open: Callable[[], Any]
  cases: Sequence[Case]
  opening: float = 60.0
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def scaled(self, factor: float, patience: float = 1.0) -> "Stage":
    """Returns the stage with its limit scaled, and by `patience` those of opening and cases."""
    return dataclasses.replace(
      self,
      seconds=self.seconds * factor,
      opening=self.opening * patience,
      cases=[dataclasses.replace(c, seconds=c.seconds * patience) for c in self.cases],
    )

  def todo(self, saved: store.SavedValues) -> list[Case]:
    """Returns the cases without a record."""
    if f"{self.name}/{OPENING}" in saved:
      return []
    return [case for case in self.cases if f"{self.name}/{case.name}" not in saved]


def run(
  stages: Sequence[Stage],
  saved: store.SavedValues,
  deadline: float,
  on_stage: Callable[[], object] = lambda: None,
) -> None:
  """Runs all stages up to their limits, and then the unfinished ones, those without records first.

  Args:
    stages: most valuable first.
    saved: gets each record at once; cases that have one are skipped.
    deadline: `time.monotonic()` at which everything ends.
    on_stage: called after each stage.
  """
  for stage in stages:
    run_stage(stage, saved, min(deadline, time.monotonic() + stage.seconds))
    on_stage()
  for stage in sorted(stages, key=lambda s: len(s.todo(saved)) < len(s.cases)):
    run_stage(stage, saved, deadline)
    on_stage()


def run_stage(stage: Stage, saved: store.SavedValues, deadline: float) -> None:
  """Runs the cases of a stage that have no record, up to a deadline.

  A case that the deadline cuts off gets no record, so that a rerun measures it.
  """
  while (todo := stage.todo(saved)) and time.monotonic() < deadline:
    _run_child(stage, todo, saved, deadline)


def _run_child(stage, todo, saved, deadline):
  """Runs cases in one child until all are done, the deadline passes, or one ends the child."""
  print(f"[{stage.name}: {len(todo)} cases]", file=sys.stderr)
  connection, theirs = _processes.Pipe()
  child = _processes.Process(
    target=_work, args=(theirs, os.getpid(), stage.open, todo, dict(stage.environment)), daemon=True
  )
  child.start()
  theirs.close()
  try:
    for case in [Case(OPENING, stage.open, stage.opening), *todo]:
      name, begin = f"{stage.name}/{case.name}", time.monotonic()
      ends = min(deadline, begin + case.seconds)
      try:
        if connection.poll(max(0.0, ends - begin)):
          record = connection.recv()
        elif ends == deadline:
          return
        else:
          record = {FAILED: f"killed after {case.seconds:.0f} s"}
      except EOFError:
        child.join()
        record = {FAILED: f"its process ended with exit code {child.exitcode}"}
      if case.name == OPENING and FAILED not in record:
        continue
      saved.put(name, record | {"took": round(time.monotonic() - begin, 1)})
      print(f"[{name}: {record.get(FAILED, 'done')}]", file=sys.stderr)
      if not child.is_alive() or case.name == OPENING or "killed" in record.get(FAILED, ""):
        return
    child.join(5)
  finally:
    child.kill()
    child.join()
    connection.close()


def _work(connection, parent, open_stage, cases, environment):
  """The child: sends a record for opening the stage, and one for each case."""
  os.environ.update(environment)
  if sys.platform == "linux":  # do not hold the device when the parent is killed
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
      os._exit(1)
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
  os.dup2(2, 1)  # standard output is the parent's tables
  app.use_compilation_cache()
  opened: list[Any] = []

  def record(measure):
    try:
      return measure()
    except Exception as error:  # of a compiler, the device or its memory
      lines = str(error).strip().splitlines() or [""]
      return {FAILED: f"{type(error).__name__}: {lines[0][:300]}"}

  connection.send(record(lambda: opened.append(open_stage()) or {}))
  if opened:
    for case in cases:
      connection.send(record(lambda: case.run(opened[0])))
