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

This requires Linux (x86-64 or AArch64) with Landlock, and works for root and ordinary users, in
containers too. On kernels before 6.2 programs cannot write files, because Landlock does not
protect other files from truncation there. Without Landlock (before 5.13, or turned off), root's
programs run as the user "nobody", cannot write files and can read world-readable ones; programs
of ordinary users are rejected. No program ever runs unconfined.

A program proves that it ran to the end with a token that is only in the frames of the runner's
code. This catches programs that exit before their end, but a program that looks for the token
finds it. Tests of untrusted code therefore run in a process of their own (`Program.peer`): expected
answers and the verdict stay there, and only plain data crosses.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import contextlib
import dataclasses
import fcntl
import functools
import math
import os
import pathlib
import pickle
import secrets
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time

_RUNNER = pathlib.Path(__file__).with_name("runner.py")
_FOLDER = "sandbox-"  # how names of temporary folders begin
_TICK = 0.05  # seconds between checks of the folder
_PATIENCE = 1.0  # seconds that a peer may take to end by itself
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
    peer: another program, which runs at the same time in another sandbox until this one ends. In
      both programs the variable `__peer__` is a `peer.Peer`, which calls functions of the other.
  """

  text: str
  data: bytes = b""
  limits: Limits = Limits()
  peer: "Program | None" = None


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


def run_program(program: Program | str, *, landlock: int | None = None) -> Outcome:
  """Runs a program in a sandbox with this Python and its packages.

  Args:
    program: the program; source text gets the default limits.
    landlock: the newest version of Landlock to use, 0 for none; for tests.

  Returns:
    The outcome. If the program fails after its peer has failed, the reason is the peer's, and the
    output that of both.

  Raises:
    ValueError: programs cannot be confined on this machine.
  """
  if not hasattr(os, "pidfd_open"):
    raise ValueError(f"the sandbox requires Linux, got {sys.platform}")
  if isinstance(program, str):
    program = Program(program)
  _remove_abandoned_folders()
  if program.peer is None:
    with _Run(program, landlock) as run:
      return run.finish()
  # The program's own limit ends its peer, which starts first.
  limits = program.peer.limits
  limits = dataclasses.replace(limits, seconds=limits.seconds + _START)
  peer = dataclasses.replace(program.peer, limits=limits)
  ends = [*os.pipe(), *os.pipe()]
  calls_out, calls_in, answers_out, answers_in = ends
  with contextlib.ExitStack() as stack:
    close = stack.enter_context(contextlib.ExitStack())
    for end in ends:
      close.callback(os.close, end)
    pool = stack.enter_context(futures.ThreadPoolExecutor(1))
    served = stack.enter_context(_Run(peer, landlock, (calls_out, answers_in)))
    serving = pool.submit(served.finish)
    served.begun.wait()
    run = stack.enter_context(_Run(program, landlock, (answers_out, calls_in)))
    close.close()
    outcome = run.finish()
    try:  # one that has failed has ended, and one that served ends with its calls
      of_peer = serving.result(_PATIENCE)
    except TimeoutError:
      return outcome
  if outcome.passed or of_peer.passed:
    return outcome
  output = (of_peer.output + outcome.output)[-_TAIL:]
  return dataclasses.replace(outcome, reason=of_peer.reason, output=output)


def run_programs(
  programs: Sequence[Program | str],
  workers: int = 1,
  on_done: Callable[[int], object] = lambda index: None,
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


def _remove_abandoned_folders() -> None:
  """Removes the folders of programs whose parent was killed; a living parent has locked its own."""
  old = time.time() - 3600  # younger ones may not be locked yet
  for folder in pathlib.Path(tempfile.gettempdir()).glob(_FOLDER + "*"):
    with contextlib.suppress(OSError):  # another user's, or in use
      if folder.stat().st_mtime < old and not folder.is_symlink():
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
          fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
          shutil.rmtree(folder, ignore_errors=True)
        finally:
          os.close(lock)


class _Run:
  """One process in its folder, monitored by its parent; a context manager."""

  def __init__(self, program: Program, landlock: int | None, pipes: tuple[int, ...] = ()):
    self._limits, self._token = program.limits, secrets.token_bytes(16)
    self._printed, self._tail, self._answer = 0, b"", bytearray()
    self._began = None  # start time of the program
    self.begun = threading.Event()  # set when the program has begun, or cannot begin
    with contextlib.ExitStack() as stack:
      self._folder = tempfile.mkdtemp(prefix=_FOLDER)
      stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
      lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
      stack.callback(os.close, lock)
      fcntl.flock(lock, fcntl.LOCK_EX)
      job = stack.enter_context(tempfile.TemporaryFile())
      limits = {
        "cpu_seconds": math.ceil(self._limits.seconds) + 1,
        "open_files": 32,
        "memory_bytes": self._limits.memory_bytes,
        "file_bytes": self._limits.file_bytes,
      }
      settings = {
        "program": program.text,
        "data": program.data,
        "begun": _BEGUN,
        "token": self._token,
        "pipes": pipes,
        "landlock": landlock,
        "packages": [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))],
        "limits": limits,
      }
      pickle.dump(settings, job)
      job.seek(0)
      self._output, output_end = os.pipe()
      stack.callback(os.close, self._output)
      self._results, results_end = os.pipe()
      stack.callback(os.close, self._results)
      try:
        arguments = str(_RUNNER), self._folder, str(os.getpid()), str(results_end)
        self._process = subprocess.Popen(
          [sys.executable, "-s", "-P", "-B", *arguments],
          stdin=job,
          stdout=output_end,
          stderr=subprocess.STDOUT,
          pass_fds=(results_end, *pipes),
          env=_environment(self._folder),
          start_new_session=True,
        )
      finally:
        os.close(output_end)
        os.close(results_end)
      stack.callback(self.kill)
      self._stack = stack.pop_all()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._stack.close()

  def kill(self) -> None:
    self._process.kill()
    self._process.wait()

  def finish(self) -> Outcome:
    """Waits until the process has ended or exceeded a limit."""
    try:
      with selectors.DefaultSelector() as selector:
        exited = os.pidfd_open(self._process.pid)
        try:
          selector.register(exited, selectors.EVENT_READ, None)
          selector.register(self._output, selectors.EVENT_READ, self._print)
          selector.register(self._results, selectors.EVENT_READ, self._take)
          broken = self._watch(selector, exited)
        finally:
          os.close(exited)
    finally:
      self.kill()
      self.begun.set()
    return self._outcome(broken, self._process.returncode)

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
      self.begun.set()
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
    return "file limit" if size + self._removed_bytes() > self._limits.folder_bytes else None

  def _removed_bytes(self) -> int:
    """Returns the size of removed files that the process still uses; mapped ones count in full."""
    sizes: dict[int, int] = {}  # by inode
    process = pathlib.Path("/proc", str(self._process.pid))
    with contextlib.suppress(OSError):  # it has just ended, or this user may not look
      for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
          status = descriptor.stat()
          if stat.S_ISREG(status.st_mode) and not status.st_nlink:
            sizes[status.st_ino] = status.st_blocks * 512
      for line in (process / "maps").read_text("utf-8", errors="replace").splitlines():
        *_, inode, path = line.split(maxsplit=5) if line.count(" ") > 5 else ("0", "")
        if path.startswith(self._folder) and path.endswith(" (deleted)"):
          sizes.setdefault(int(inode), self._limits.file_bytes)
    return sum(sizes.values())

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
