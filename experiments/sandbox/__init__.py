"""Runs untrusted programs, such as model-written ones, in a sandbox.

Each program runs in a separate process that confines itself first (`confinement`):

* files: it can read Python and the system's libraries, and use regular files in an empty
  temporary folder, with limits on their size, number and total size; the folder is deleted
  afterwards. It can access nothing else, including /proc and other processes' environments.
* processes: it cannot create processes or threads, or signal others. It is killed at its time
  limit and when its parent dies.
* network: it cannot create sockets.
* memory and output are limited.
* environment: it does not inherit variables.

This requires Linux (x86-64 or AArch64) with Landlock (kernel 5.13 or later), and works for root
and ordinary users, in containers too. Without Landlock, root's programs run as the user
"nobody", cannot write files and can read world-readable ones; programs of ordinary users are
rejected. No program ever runs unconfined.

A program proves that it ran to the end with a token that is only in the frames of the runner's
code. This catches programs that exit before the tests, but not programs written to deceive
the scorer, which could also return objects that equal everything; no sandbox can prevent that
if tests run in the program's process.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import functools
import math
import os
import pathlib
import pickle
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time

_RUNNER = pathlib.Path(__file__).with_name("runner.py")
_TICK = 0.05  # seconds between checks of the folder
_START = 60.0  # seconds that a process may take to confine itself
_READ = 1 << 16
_TAIL = 4096  # bytes of a program's output that are returned
_BEGUN = b"confined\n"  # the process is about to run its program


@dataclasses.dataclass(frozen=True)
class Limits:
  """Resource limits of one program.

  Attributes:
    seconds: wall-clock time from the program's start.
    memory_bytes: address space of the process, including Python's own (about 20 MB).
    file_bytes: size of one file.
    folder_bytes: total size of files, checked every 0.05 seconds.
    files: number of files, checked every 0.05 seconds.
    output_bytes: standard output and standard error together.
    result_bytes: size of `__result__`.
  """

  seconds: float = 3.0
  memory_bytes: int = 4 << 30
  file_bytes: int = 16 << 20
  folder_bytes: int = 64 << 20
  files: int = 100
  output_bytes: int = 16 << 20
  result_bytes: int = 64 << 20


@dataclasses.dataclass(frozen=True)
class Program:
  """A program to run.

  Attributes:
    text: Python source.
    data: its variable `__data__`.
    limits: its resource limits.
  """

  text: str
  data: bytes = b""
  limits: Limits = Limits()


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The outcome of a program.

  Attributes:
    passed: whether it ran to the end without an exception.
    reason: "passed", or why it failed.
    output: the last 4096 bytes of its output, including a traceback.
    seconds: its running time.
    result: its variable `__result__` (bytes), empty if it failed. It is untrusted: unpickle it
      only in another sandbox.
  """

  passed: bool
  reason: str
  output: str
  seconds: float
  result: bytes = b""


def run_program(program: Program | str, *, landlock: bool = True) -> Outcome:
  """Runs a program in a sandbox with this Python and its packages.

  Args:
    program: the program; source text gets the default limits.
    landlock: whether to use Landlock; False is for tests.

  Raises:
    ValueError: programs cannot be confined on this machine.
  """
  if not hasattr(os, "pidfd_open"):
    raise ValueError(f"the sandbox requires Linux, got {sys.platform}")
  if isinstance(program, str):
    program = Program(program)
  folder = tempfile.mkdtemp(prefix="sandbox-")
  try:
    with tempfile.TemporaryFile() as job:
      token = secrets.token_bytes(16)
      limits = program.limits
      pickle.dump(
        {
          "program": program.text,
          "data": program.data,
          "begun": _BEGUN,
          "token": token,
          "landlock": landlock,
          "packages": [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))],
          "limits": {
            "cpu_seconds": math.ceil(limits.seconds) + 1,
            "open_files": 32,
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
          },
        },
        job,
      )
      job.seek(0)
      return _Run(program.limits, folder, token).run(job)
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def run_programs(
  programs: Sequence[Program | str],
  workers: int = 1,
  on_done: Callable[[int], None] = lambda index: None,
) -> list[Outcome]:
  """Runs programs in parallel; returns outcomes in their order.

  Args:
    programs: the programs.
    workers: number of programs that run in parallel, at least 1.
    on_done: called in this thread with the index of each finished program.

  Raises:
    ValueError: see `run_program`.
  """
  with futures.ThreadPoolExecutor(workers) as pool:
    running = {pool.submit(run_program, program): i for i, program in enumerate(programs)}
    try:
      for done in futures.as_completed(running):
        done.result()
        on_done(running[done])
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise
    return [run.result() for run in running]


@functools.cache
def check_support() -> None:
  """Checks that a program that imports NumPy runs in the sandbox.

  Raises:
    ValueError: programs cannot be confined on this machine, or fail there.
  """
  outcome = run_program(Program("import numpy", limits=Limits(seconds=60.0)))
  if not outcome.passed:
    raise ValueError(
      f"a program that imports NumPy fails in the sandbox ({outcome.reason}): {outcome.output}"
    )


class _Run:
  """One process, monitored by its parent."""

  def __init__(self, limits: Limits, folder: str, token: bytes):
    self._limits, self._folder, self._token = limits, folder, token
    self._printed, self._tail, self._answer = 0, b"", bytearray()
    self._began = None  # start time of the program

  def run(self, job) -> Outcome:
    output, output_end = os.pipe()
    results, results_end = os.pipe()
    try:
      arguments = str(_RUNNER), self._folder, str(os.getpid()), str(results_end)
      process = subprocess.Popen(
        [sys.executable, "-s", "-P", "-B", *arguments],
        stdin=job,
        stdout=output_end,
        stderr=subprocess.STDOUT,
        pass_fds=(results_end,),
        env=_environment(self._folder),
        start_new_session=True,
      )
    finally:
      os.close(output_end)
      os.close(results_end)
    try:
      with selectors.DefaultSelector() as selector:
        exited = os.pidfd_open(process.pid)
        try:
          selector.register(exited, selectors.EVENT_READ, None)
          selector.register(output, selectors.EVENT_READ, self._print)
          selector.register(results, selectors.EVENT_READ, self._take)
          broken = self._watch(selector, exited)
        finally:
          os.close(exited)
    finally:
      process.kill()
      process.wait()
      os.close(output)
      os.close(results)
    return self._outcome(broken, process.returncode)

  def _watch(self, selector, exited) -> str | None:
    """Reads output until the process ends (returns None) or exceeds a limit (returns which)."""
    started, ended = time.monotonic(), False
    while not ended:
      events = selector.select(_TICK)
      ended = any(key.fd == exited for key, _ in events)
      broken = self._read(selector, events) or (None if ended else self._broken(started))
      if broken:
        return broken
    # Drain the pipes, whose other ends are closed.
    while events := [e for e in selector.select(0) if e[0].fd != exited]:
      if broken := self._read(selector, events):
        return broken
    return None

  def _read(self, selector, events) -> str | None:
    for key, _ in events:
      if key.data is None:
        continue
      data = os.read(key.fd, _READ)
      if not data:
        selector.unregister(key.fd)
      elif broken := key.data(data):
        return broken
    return None

  def _print(self, data) -> str | None:
    self._printed += len(data)
    self._tail = (self._tail + data)[-_TAIL:]
    return "output limit" if self._printed > self._limits.output_bytes else None

  def _take(self, data) -> str | None:
    self._answer += data
    if self._began is None and self._answer.startswith(_BEGUN):
      self._began = time.monotonic()
    return "result limit" if len(self._answer) > self._limits.result_bytes else None

  def _broken(self, started) -> str | None:
    now = time.monotonic()
    if self._began is None:
      return f"it was not ready after {_START} s" if now > started + _START else None
    if now > self._began + self._limits.seconds:
      return "time limit"
    with os.scandir(self._folder) as entries:
      count = size = 0
      for entry in entries:
        try:
          size += entry.stat(follow_symlinks=False).st_blocks * 512
        except FileNotFoundError:
          continue  # just deleted
        count += 1
        if count > self._limits.files or size > self._limits.folder_bytes:
          return "file limit"
    return None

  def _outcome(self, broken, code) -> Outcome:
    output = self._tail.decode(errors="replace")
    if self._began is None:
      why = broken or self._answer.decode(errors="replace") or output or f"it ended with {code}"
      raise ValueError(f"programs cannot be confined on this machine: {why}")
    seconds = time.monotonic() - self._began
    end = _BEGUN + self._token
    if broken is None and code == 0 and self._answer.startswith(end):
      return Outcome(True, "passed", output, seconds, bytes(self._answer[len(end) :]))
    if broken is None and code == -signal.SIGXCPU:
      broken = "time limit"
    elif broken is None and code < 0:
      broken = f"killed by signal {-code}"
    elif broken is None:
      broken = "exception" if code == 1 else "exit before its end"
    return Outcome(False, broken, output, seconds)


def _environment(folder):
  one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
  kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
  return (
    one_thread
    | kept
    | {
      "PATH": "/usr/bin:/bin",
      "LANG": "C.UTF-8",
      "HOME": folder,
      "TMPDIR": folder,
      "PYTHONHASHSEED": "0",
      "PYTHONWARNINGS": "ignore",
    }
  )
