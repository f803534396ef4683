"""Runs programs that a model wrote, or anybody, so that they can do no harm.

Each runs in a process of its own that has confined itself (`confine`):

* files: it can read Python and the system's libraries, and have plain files in an
  empty temporary folder, which is removed afterwards: so large, so many, and so many
  bytes together. Everything else, /proc with other processes' environments
  included, is shut.
* processes: one. It can make no other and no thread, signal none but itself, and so
  leaves none behind. It is killed at its limit of time, and when its parent dies.
* network: it can make no socket.
* memory: limited, as is what is kept of what it prints.
* environment: made anew.

That holds on Linux (x86-64, AArch64) for root and for ordinary users, in containers
too, where the kernel has Landlock (5.13 and later). Elsewhere root's programs run as
the user "nobody", can write no file at all, and can read what is readable for all;
ordinary users are refused. So is everything else, rather than run unconfined.

Whether a program ran to its end is told by a token that it would have to look for in
the frames of the code that runs it. This keeps out exits before the tests; it is no
proof against a program that was written to deceive its scorer, which could as well
return objects that equal everything. No sandbox around tests that run in the
program's own process is.
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
_TICK = 0.05  # seconds between looks at the folder
_START = 60.0  # seconds that a process may take to confine itself
_READ = 1 << 16
_KEPT = 4096  # bytes of a program's output
_BEGUN = b"confined\n"  # a process says that it is about to run its program


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one program may use.

  Attributes:
    seconds: wall-clock time, counted from when the program starts.
    memory_bytes: address space of its process, Python's own (about 20 MB) included.
    file_bytes: of one file.
    folder_bytes: of all files together, looked at every 0.05 seconds.
    files: their number, likewise.
    output_bytes: of standard output and standard error together.
    result_bytes: of its `__result__`.
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
    data: what it finds as `__data__`.
    limits: what it may use.
  """

  text: str
  data: bytes = b""
  limits: Limits = Limits()


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What became of a program.

  Attributes:
    passed: whether it ran to its end without an exception.
    reason: "passed", or in a few words why not.
    output: the end of what it printed, traceback included, at most 4096 bytes.
    seconds: how long it ran.
    result: what it left as `__result__` (bytes), empty if it did not pass. It comes
      from the program: not to be unpickled outside of another sandbox.
  """

  passed: bool
  reason: str
  output: str
  seconds: float
  result: bytes = b""


def run_program(program: Program | str, *, landlock: bool = True) -> Outcome:
  """Runs a program in a sandbox, by this Python and with the packages that it has.

  Args:
    program: what to run; a text alone under the usual limits.
    landlock: whether the kernel's Landlock may be used; for tests of the other way.

  Raises:
    ValueError: programs cannot be confined here.
  """
  if not hasattr(os, "pidfd_open"):
    raise ValueError(f"programs can be confined on Linux only, here it is {sys.platform}")
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
  """Runs programs, `workers` at a time; outcomes in the order of the programs.

  Args:
    programs: what to run.
    workers: at least 1.
    on_done: called in this thread with the index of each program that has ended.

  Raises:
    ValueError: as `run_program`.
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
  """Runs a program that needs no more than NumPy.

  Raises:
    ValueError: programs cannot be confined here, or do not run then.
  """
  outcome = run_program(Program("import numpy", limits=Limits(seconds=60.0)))
  if not outcome.passed:
    raise ValueError(
      "a program that imports NumPy does not run in the sandbox "
      f"({outcome.reason}): {outcome.output}"
    )


class _Run:
  """One process, watched by its parent."""

  def __init__(self, limits: Limits, folder: str, token: bytes):
    self._limits, self._folder, self._token = limits, folder, token
    self._printed, self._tail, self._answer = 0, b"", bytearray()
    self._began = None  # when the program started

  def run(self, job) -> Outcome:
    output, output_end = os.pipe()
    results, results_end = os.pipe()
    try:
      process = subprocess.Popen(
        [
          sys.executable,
          "-s",
          "-P",
          "-B",
          str(_RUNNER),
          self._folder,
          str(os.getpid()),
          str(results_end),
        ],
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
    """Reads what comes until the process ends or breaks a limit, which is returned."""
    started, ended = time.monotonic(), False
    while not ended:
      events = selector.select(_TICK)
      ended = any(key.fd == exited for key, _ in events)
      broken = self._read(selector, events) or (None if ended else self._broken(started))
      if broken:
        return broken
    # What is left in the pipes; nobody else holds their other ends.
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
    self._tail = (self._tail + data)[-_KEPT:]
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
          continue  # just removed
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
