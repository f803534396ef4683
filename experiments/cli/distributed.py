"""Multi-host runs: one program as several processes.

With --distributed, start the same program with the same flags once on each host. All
processes run in lockstep over one mesh that spans their devices, so everything that
decides what is computed next must be equal in all of them. Only process 0 reads inputs,
writes results and prints; it broadcasts what it reads. Every process reads the
checkpoint, so every host must see it under the same path.

When a process dies, the others exit with an error that names it (see `partners`), at the latest
after --host_timeout; rerun them all.
"""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import traceback
from typing import Any

from absl import flags
import jax
from jax.experimental import multihost_utils
import numpy as np
from tqdm import tqdm

from checkpoints_convert import command_line, interrupts
from experiments.cli import partners
from experiments.cli.partners import Partners
from roe_jax import batching

FLAGS = flags.FLAGS
_EXPLICIT = ("coordinator_address", "num_processes", "process_id")
_MESSAGE_BYTES = 1024
_CONNECTING = 5  # seconds
_OF_JAX = re.compile("[A-Z_]+: ")  # how JAX's errors begin, whatever their class

_partners: Partners | None = None

flags.DEFINE_bool(
  "distributed",
  False,
  "Run as one of several processes. TPU pods, Slurm, Open MPI and Kubernetes are detected; "
  "elsewhere set --coordinator_address, --num_processes and --process_id.",
)
flags.DEFINE_string(
  "coordinator_address", None, "HOST:PORT of process 0. Default: detected with --distributed."
)
flags.DEFINE_integer(
  "num_processes", None, "Number of processes. Default: detected with --distributed.", lower_bound=1
)
flags.DEFINE_integer(
  "process_id",
  None,
  "Index of this process, from 0. Default: detected with --distributed.",
  lower_bound=0,
)
flags.DEFINE_integer(
  "start_timeout", 300, "Seconds to wait for the other processes to start.", lower_bound=1
)
flags.DEFINE_integer(
  "host_timeout", 30, "Seconds without heartbeat after which a process is dead.", lower_bound=1
)


def start(refusal: str | None = None) -> None:
  """Joins the processes of --distributed; call it before JAX initializes its devices.

  Args:
    refusal: why the program does not support --distributed; None if it does.

  Raises:
    ValueError: flags are missing, JAX detects no cluster, or the coordinator does not answer.
  """
  given = {n: getattr(FLAGS, n) for n in _EXPLICIT if getattr(FLAGS, n) is not None}
  if not FLAGS.distributed:
    if given:
      raise ValueError(
        f"--{next(iter(given))} applies to several processes only: add --distributed"
      )
    return
  if refusal:
    raise ValueError(f"this program does not support --distributed: {refusal}")
  address = _check(given) if given else None
  print(f"[waiting up to {FLAGS.start_timeout} s for the other processes]", file=sys.stderr)
  if address:
    _meet(*address, given["process_id"], given["num_processes"])
  timeouts = dict(
    initialization_timeout=FLAGS.start_timeout,
    heartbeat_timeout_seconds=FLAGS.host_timeout,
    shutdown_timeout_seconds=FLAGS.host_timeout,
  )
  # Every program can be killed at any time and resumed, so SIGTERM must end the process.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    with contextlib.nullcontext() if given else partners.ticking(FLAGS.start_timeout):
      jax.distributed.initialize(**given, **timeouts)
  except (ValueError, RuntimeError) as error:
    if given:
      raise ValueError(
        f"process {given['process_id']} cannot start with --coordinator_address="
        f"{given['coordinator_address']}: {error}"
      ) from error
    raise ValueError(
      f"--distributed detected no TPU pod, Slurm, Open MPI or Kubernetes job ({error}): set "
      "--coordinator_address, --num_processes and --process_id"
    ) from error
  # CPU collectives print to standard output, which is for results.
  sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  print(
    f"[process {jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of "
    f"{jax.device_count()} devices]",
    file=sys.stderr,
  )
  if not given:
    _meet_on_any_port()
  if _partners:
    partners.hold_back_noise()


def _check(given: dict[str, Any]) -> tuple[str, int]:
  """Validates explicit flags, and returns the coordinator's host and port."""
  missing = [name for name in _EXPLICIT if name not in given]
  if missing:
    raise ValueError(f"--{next(iter(given))} requires --{' and --'.join(missing)}")
  number, count = given["process_id"], given["num_processes"]
  if number >= count:
    raise ValueError(
      f"--process_id must lie in [0, {count - 1}] (--num_processes={count}), got {number}"
    )
  address = given["coordinator_address"]
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal():
    raise ValueError(f"--coordinator_address must be HOST:PORT, got {address!r}")
  return host.strip("[]"), int(port)


def _meet(host: str, port: int, number: int, count: int) -> None:
  """Waits until all processes are there; then the coordinator's port is JAX's."""
  global _partners
  address = f"--coordinator_address={host}:{port}"
  _partners = Partners(number, count, FLAGS.start_timeout)
  if number:
    wanting = f"process 0 did not answer at {address} within {FLAGS.start_timeout} s"
    with _timeout(
      f"{wanting} ({{}}): check that it runs and that this host can connect to that port"
    ):
      _partners.connect(host, port)
  else:
    try:
      _partners.listen(port=port)
    except OSError as error:
      raise ValueError(
        f"process 0 cannot listen at {address}: {error.strerror}: choose another port"
      ) from error
  with _timeout(
    f"{{}} did not start within --start_timeout={FLAGS.start_timeout} s: see their logs"
  ):
    _partners.await_all()
  if number:
    with _timeout(f"{wanting} ({{}})"):  # JAX would abort without an error message
      _partners.await_port(host, port)


def _meet_on_any_port() -> None:
  """Connects the processes of a detected cluster, if their hosts can."""
  global _partners
  number = jax.process_index()
  meeting = Partners(number, jax.process_count(), _CONNECTING)
  host, port = broadcast([socket.gethostname(), None if number else meeting.listen()])
  with contextlib.suppress(TimeoutError):
    if number:
      meeting.connect(host, port)
    _partners = meeting


@contextlib.contextmanager
def _timeout(message):
  """Makes a ValueError of TimeoutError, and tells the others."""
  try:
    yield
  except TimeoutError as error:
    message = message.format(error)
    assert _partners  # they are set where this is used
    _partners.leave(message)
    raise ValueError(message) from error


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Tells the other processes why this one ends, and ends as soon as another one does."""
  if _partners is None:
    yield
    return
  try:
    yield
    broadcast(None)
    _partners.leave()
  except (Exception, SystemExit) as error:
    of_jax = isinstance(error, ValueError) and _OF_JAX.match(str(error))
    if of_jax or isinstance(error, jax.errors.JaxRuntimeError):
      _partners.await_end(FLAGS.host_timeout)
    expected = isinstance(error, command_line.EXPECTED)
    if not expected and not isinstance(error, SystemExit):
      traceback.print_exc()
    why = command_line.describe(error)
    print(f"error: {why}" if expected else why, file=sys.stderr, flush=True)
    _partners.leave(why)
    interrupts.abandon(1)  # JAX would wait for the others


def check_flags() -> None:
  """Checks that all processes have the same flags; call it where they end together.

  Raises:
    ValueError: a flag of this process differs from process 0's.
  """
  own = {
    name: repr(value) for name, value in FLAGS.flag_values_dict().items() if name != "process_id"
  }
  first = broadcast(own)
  for name in own:
    if own[name] != first.get(name):
      raise ValueError(
        f"--{name} is {own[name]} here but {first.get(name)} in process 0: start all "
        "processes with the same flags"
      )


def is_first_process() -> bool:
  """Returns whether this process reads, writes and prints: process 0, or the only one."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def num_processes() -> int:
  """Returns the number of processes."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def broadcast(value: Any) -> Any:
  """Returns process 0's `value`, a JSON value, in all processes."""
  return json.loads(_sent(json.dumps(value))) if num_processes() > 1 else value


def from_first_process(function: Callable[[], Any]) -> Any:
  """Calls `function` in process 0 and returns its result, a JSON value, in all processes.

  Raises:
    ValueError: it raised in process 0 (which raises the original exception).
  """
  if num_processes() == 1:
    return function()
  value = error = None
  if is_first_process():
    try:
      value = function()
    except Exception as raised:
      error = raised
  value, message = broadcast([value, command_line.describe(error) if error else None])
  if error:
    raise error
  if message is not None:
    raise ValueError(message)
  return value


def in_all_processes(function: Callable[[], Any]) -> Any:
  """Calls `function` in every process and returns its own result; raises in all if one fails.

  Raises:
    ValueError: it raised in another process; a process that failed raises the original exception.
  """
  if num_processes() == 1:
    return function()
  value = error = None
  try:
    value = function()
  except (ValueError, OSError) as raised:
    error = raised
  text = (command_line.describe(error) if error else "").encode()[:_MESSAGE_BYTES]
  texts = multihost_utils.process_allgather(
    np.frombuffer(text.ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
  )
  if error:
    raise error
  for process, text in enumerate(texts):
    if text.any():
      message = text.tobytes().rstrip(b"\0").decode(errors="replace")
      raise ValueError(f"process {process}: {message}")
  return value


def check_same(value: Any, what: str) -> None:
  """Checks that all processes have the same value.

  Args:
    value: a JSON value.
    what: the error message, which gets the prefix "process N: ".

  Raises:
    ValueError: in all processes, if the value of one differs from process 0's.
  """
  digest = hashlib.sha256(json.dumps(value).encode()).hexdigest() if num_processes() > 1 else ""

  def check():
    if broadcast(digest) != digest:
      raise ValueError(what)

  in_all_processes(check)


def _sent(text: str) -> str:
  """Returns the string of process 0 in all processes."""
  data = np.frombuffer(text.encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  room = np.zeros(batching.power_of_two(size, _MESSAGE_BYTES), np.uint8)  # few shapes to compile
  if is_first_process():
    room[:size] = data
  return multihost_utils.broadcast_one_to_all(room)[:size].tobytes().decode()


def progress(**arguments: Any) -> tqdm:
  """Returns a tqdm bar on standard error, shown by process 0 only."""
  return tqdm(file=sys.stderr, disable=not is_first_process(), **arguments)


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
  """Discards the output of all processes except process 0; errors print outside this context."""
  if is_first_process():
    yield
    return
  with (
    open(os.devnull, "w", encoding="utf-8") as nowhere,
    contextlib.redirect_stdout(nowhere),
    contextlib.redirect_stderr(nowhere),
  ):
    yield
