"""One program over several hosts.

With --distributed the same program is started with the same flags once on each
host. All its processes do the same work in lock-step over one mesh, which spans
their devices: whatever decides what is computed next is equal in all of them.
Process 0 alone reads inputs, writes results and prints; what it has read is
sent to the others. A checkpoint is read by each process, so every host must see
it under the same path.

Where a process ends, the others cannot go on: they end with an error after
--host_timeout, and all are started again.
"""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import json
import os
import socket
import sys
import time
from typing import Any

from absl import flags
import jax
from jax.experimental import multihost_utils
import numpy as np
from tqdm import tqdm

from roe_jax import batching

FLAGS = flags.FLAGS
_EXPLICIT = ("coordinator_address", "num_processes", "process_id")
_MESSAGE_BYTES = 1024

flags.DEFINE_bool(
  "distributed",
  False,
  "Whether this is one of several processes that do the work together; "
  "TPU pods, Slurm, Open MPI and Kubernetes are recognized, elsewhere give the next three.",
)
flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, with --distributed.")
flags.DEFINE_integer(
  "num_processes", None, "How many there are, with --distributed.", lower_bound=1
)
flags.DEFINE_integer(
  "process_id", None, "Which of them this is, from 0, with --distributed.", lower_bound=0
)
flags.DEFINE_integer(
  "start_timeout", 300, "Seconds to wait for the other processes to start.", lower_bound=1
)
flags.DEFINE_integer(
  "host_timeout",
  30,
  "Seconds without a sign of life after which a process is taken for dead, and the others end.",
  lower_bound=1,
)


def start(refusal: str | None = None) -> None:
  """Joins the processes of --distributed, before JAX looks for devices.

  Args:
    refusal: why a program cannot be distributed, if it cannot.

  Raises:
    ValueError: flags are missing, or differ between processes; there is no
      cluster that JAX knows; the coordinator does not answer.
  """
  given = {name: FLAGS[name].value for name in _EXPLICIT if FLAGS[name].value is not None}
  if not FLAGS.distributed:
    if given:
      raise ValueError(
        f"--{next(iter(given))} is about several processes: give --distributed with it"
      )
    return
  if refusal:
    raise ValueError(f"--distributed is not for this program: {refusal}")
  if given:
    _check(given)
  timeouts = dict(
    initialization_timeout=FLAGS.start_timeout,
    heartbeat_timeout_seconds=FLAGS.host_timeout,
    shutdown_timeout_seconds=FLAGS.host_timeout,
  )
  # Work can be killed at any moment: SIGTERM shall end a process, not only tell it.
  jax.config.update("jax_enable_preemption_service", False)
  print(f"[waiting up to {FLAGS.start_timeout} s for the other processes]", file=sys.stderr)
  try:
    jax.distributed.initialize(**given, **timeouts)
  except (ValueError, RuntimeError) as error:
    if given:
      raise ValueError(
        f"process {given['process_id']} cannot start with --coordinator_address="
        f"{given['coordinator_address']}: {error}"
      ) from error
    raise ValueError(
      "--distributed found no TPU pod, Slurm, Open MPI or Kubernetes job that says which "
      f"process this is ({error}): give --coordinator_address, --num_processes and "
      "--process_id"
    ) from error
  # Collectives between CPUs print to the standard output, where results belong.
  sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  print(
    f"[process {jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of "
    f"{jax.device_count()} devices]",
    file=sys.stderr,
  )
  in_all_processes(_check_flags)


def _check(given: dict[str, Any]) -> None:
  """Refuses explicit flags that cannot work; waits for a coordinator elsewhere."""
  missing = [name for name in _EXPLICIT if name not in given]
  if missing:
    raise ValueError(f"--{next(iter(given))} needs --{' and --'.join(missing)} with it")
  number, count = given["process_id"], given["num_processes"]
  if number >= count:
    raise ValueError(
      f"--process_id must lie in [0, {count - 1}] (--num_processes={count}), got {number}"
    )
  address = given["coordinator_address"]
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal():
    raise ValueError(f"--coordinator_address must be HOST:PORT, got {address!r}")
  # JAX would abort without a sentence.
  deadline = time.monotonic() + FLAGS.start_timeout
  while number:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise ValueError(
          f"no process 0 answers at --coordinator_address={address} within "
          f"{FLAGS.start_timeout} s ({error}): is it running, and may this host "
          "connect to that port?"
        ) from error
    time.sleep(0.2)


def _check_flags() -> None:
  own = {
    name: repr(value) for name, value in FLAGS.flag_values_dict().items() if name != "process_id"
  }
  first = broadcast(own)
  for name in own:
    if own[name] != first.get(name):
      raise ValueError(
        f"--{name} is {own[name]} here and {first.get(name)} in process 0: all "
        "processes must be given the same flags"
      )


def is_first_process() -> bool:
  """Whether this process reads, writes and prints; so does one that is alone."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def num_processes() -> int:
  """How many processes do the work together."""
  return jax.process_count() if jax.distributed.is_initialized() else 1


def broadcast(value: Any) -> Any:
  """The JSON value that process 0 calls this with, in all processes."""
  return json.loads(_sent(json.dumps(value))) if num_processes() > 1 else value


def from_first_process(function: Callable[[], Any]) -> Any:
  """`function()`, a JSON value, called in process 0 alone; all get what it returns.

  Raises:
    ValueError: what it raised in process 0, which itself raises the same as there.
  """
  if num_processes() == 1:
    return function()
  value = error = None
  if is_first_process():
    try:
      value = function()
    except Exception as raised:
      error = raised
  value, message = broadcast([value, str(error) if error else None])
  if error:
    raise error
  if message is not None:
    raise ValueError(message)
  return value


def in_all_processes(function: Callable[[], Any]) -> Any:
  """Each process's own `function()`; where it fails in one, it fails in all.

  Raises:
    ValueError: what it raised in another process; in this one, the same as here.
  """
  if num_processes() == 1:
    return function()
  value = error = None
  try:
    value = function()
  except (ValueError, OSError) as raised:
    error = raised
  text = str(error or "").encode()[:_MESSAGE_BYTES]
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
  """Refuses to go on where processes would do different work.

  Args:
    value: a JSON value.
    what: a sentence that begins with "process N: ", for where it is not process 0's.

  Raises:
    ValueError: in all processes, with that sentence.
  """
  digest = hashlib.sha256(json.dumps(value).encode()).hexdigest() if num_processes() > 1 else ""

  def check():
    if broadcast(digest) != digest:
      raise ValueError(what)

  in_all_processes(check)


def _sent(text: str) -> str:
  """The text of process 0, in all processes."""
  data = np.frombuffer(text.encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  room = np.zeros(batching.power_of_two(size, _MESSAGE_BYTES), np.uint8)  # few shapes to compile
  if is_first_process():
    room[:size] = data
  return multihost_utils.broadcast_one_to_all(room)[:size].tobytes().decode()


def progress(**arguments: Any) -> tqdm:
  """A tqdm bar on standard error, shown by process 0."""
  return tqdm(file=sys.stderr, disable=not is_first_process(), **arguments)


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
  """What processes other than the first one print is thrown away; errors come after it."""
  if is_first_process():
    yield
    return
  with (
    open(os.devnull, "w") as nowhere,
    contextlib.redirect_stdout(nowhere),
    contextlib.redirect_stderr(nowhere),
  ):
    yield


def finish() -> None:
  """Waits until all processes have come to their end."""
  broadcast(None)
