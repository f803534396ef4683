"""Tells the processes of --distributed at once when one of them has ended, and which.

JAX notices a lost process by collectives that fail or hang, or by missing heartbeats, and does not
say which it was. So each process keeps a TCP connection to process 0, which also counts who has
arrived, and passes on who has left. A message is a line with a JSON object.
"""

from collections.abc import Callable, Iterator
import contextlib
import faulthandler
import json
import os
import re
import selectors
import socket
import sys
import threading
import time

from checkpoints_convert import interrupts

PERIOD = 10.0  # seconds between lines that say who is waited for
# What JAX's runtime logs when the service in process 0 is lost, before it aborts; then its details.
_NOISE = re.compile(rb"[EF]\d{4} .*(coordination_service|client\.h)")
_LOGGED = re.compile(rb"[IWEF]\d{4} ")
# Seconds that a process has to end by itself after another one has failed, with its own message.
PATIENCE = 2.0
_RERUN = "rerun all processes with the same flags to resume"


class Partners:
  """This process's view of the others, kept by a thread."""

  def __init__(self, number: int, count: int, timeout: float):
    """Starts nothing yet.

    Args:
      number: of this process.
      count: of all processes.
      timeout: seconds until all must have arrived.
    """
    self._number, self._count, self._timeout = number, count, timeout
    self._start = time.monotonic()
    self._connections: dict[socket.socket, bytes] = {}  # with what is read of a line
    self._numbers: dict[socket.socket, int] = {}
    self._left: set[int] = set()  # ended, or about to
    self._leaving = False
    self._complete, self._ended = threading.Event(), threading.Event()
    self._listener: socket.socket | None = None
    self._missing = sorted(set(range(count)) - {number})

  def listen(self, host: str = "", port: int = 0) -> int:
    """Accepts the others, in process 0; returns the port, which is free when all are there."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() and not host else socket.AF_INET
    self._listener = socket.create_server(
      (host, port), family=family, dualstack_ipv6=family == socket.AF_INET6
    )
    self._watch()
    return self._listener.getsockname()[1]

  def connect(self, host: str, port: int) -> None:
    """Connects to process 0.

    Raises:
      TimeoutError: it does not answer in time.
    """
    ticks = _ticker(self._start, self._timeout, lambda: f"process 0 at {host}:{port}")
    while True:
      error: Exception | None = None
      try:
        connection = socket.create_connection((host, port), timeout=5)
        self._send(connection, here=self._number)
        first = connection.recv(1)  # by what else may have this port it would be closed
        if first:
          connection.settimeout(None)
          self._connections[connection], self._numbers[connection] = first, 0
          self._watch()
          return
      except OSError as raised:
        error = raised
      if ticks():
        raise TimeoutError(str(error or "it is not process 0 that listens there"))
      time.sleep(0.2)

  def await_all(self) -> None:
    """Waits until all processes have arrived.

    Raises:
      TimeoutError: some did not in time; the message has their numbers.
    """
    ticks = _ticker(self._start, self._timeout, self._who)
    while not self._complete.wait(0.2):
      if ticks():
        raise TimeoutError(self._who())

  def await_port(self, host: str, port: int) -> None:
    """Waits until JAX answers in process 0; raises TimeoutError."""
    ticks = _ticker(self._start, self._timeout, lambda: "process 0")
    while True:
      try:
        socket.create_connection((host, port), timeout=5).close()
        return
      except OSError as error:
        if ticks():
          raise TimeoutError(str(error)) from error
      time.sleep(0.1)

  def leave(self, why: str | None = None) -> None:
    """Says that this process is about to end: in success, or `why` not.

    Process 0, without which JAX cannot go on, waits a moment for the others to end.
    """
    self._leaving = True
    for connection in list(self._connections):
      if why is None:
        self._send(connection, bye=self._number)
      else:
        self._send(connection, end=self._number, why=why)
    deadline = time.monotonic() + 2 * PATIENCE
    while why and not self._number and self._connections and time.monotonic() < deadline:
      time.sleep(0.01)

  def await_end(self, seconds: float) -> None:
    """Waits for the end of a process that would explain an error, which ends this one, too."""
    if self._ended.wait(seconds):
      time.sleep(2 * PATIENCE)

  def _who(self):
    return f"process{'es' * (len(self._missing) > 1)} " + ", ".join(map(str, self._missing))

  def _watch(self):
    threading.Thread(target=self._serve, daemon=True).start()

  def _serve(self):
    with selectors.DefaultSelector() as selector:
      for own in filter(None, (self._listener, *self._connections)):
        selector.register(own, selectors.EVENT_READ)
      while True:
        for key, _ in selector.select():
          if key.fileobj is self._listener:
            self._accept(selector, key.fileobj)
          else:
            self._receive(selector, key.fileobj)
        if self._listener and not self._missing:
          selector.unregister(self._listener)
          self._listener.close()
          self._listener = None
          self._tell(missing=[])
          self._complete.set()

  def _accept(self, selector, listener):
    connection, _ = listener.accept()
    self._connections[connection] = b""
    selector.register(connection, selectors.EVENT_READ)

  def _receive(self, selector, connection):
    try:
      data = connection.recv(1 << 16)
    except OSError:
      data = b""
    if data:
      self._handle(connection, data)
      return
    selector.unregister(connection)
    del self._connections[connection]
    number = self._numbers.pop(connection, None)
    if number is not None and number not in self._left:
      self._on_end(number, None)

  def _handle(self, connection, data):
    *lines, self._connections[connection] = (self._connections.get(connection, b"") + data).split(
      b"\n"
    )
    for line in lines:
      try:
        message = json.loads(line)
        self._on_message(connection, **message)
      except (ValueError, TypeError):  # not one of the processes
        continue

  def _on_message(self, connection, here=None, missing=None, bye=None, end=None, why=None):
    if here is not None and here in self._missing:
      self._missing.remove(here)
      self._numbers[connection] = here
      self._tell(missing=self._missing)
    elif here is not None:
      self._send(connection, end=0, why=f"several processes have --process_id={here}")
    if missing is not None:
      self._missing = missing
      if not missing:
        self._complete.set()
    if bye is not None:
      self._left.add(bye)
    if end is not None:
      self._on_end(end, why)

  def _on_end(self, number, why):
    """Ends this process because another one has ended."""
    self._left.add(number)
    self._tell(end=number, why=why)
    if why and not self._leaving:  # all may have the same reason
      time.sleep(PATIENCE)
    if self._leaving:
      return
    self._ended.set()
    what = f"failed ({why})" if why else "has ended"
    interrupts.say(f"error: process {number} of {self._count} {what}: {_RERUN}\n")
    interrupts.abandon(1)

  def _tell(self, **message):
    if not self._number:
      for connection in list(self._numbers):
        self._send(connection, **message)

  def _send(self, connection, **message):
    try:
      connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
      pass  # its end is read


@contextlib.contextmanager
def ticking(timeout: float) -> Iterator[None]:
  """Prints every `PERIOD` seconds that this process waits for unknown others."""
  done = threading.Event()
  tick = _ticker(time.monotonic(), timeout, lambda: "the other processes")

  def run():
    while not done.wait(0.2):
      tick()

  threading.Thread(target=run, daemon=True).start()
  try:
    yield
  finally:
    done.set()


def _ticker(start: float, timeout: float, who: Callable[[], str]) -> Callable[[], bool]:
  """Returns a function that prints for whom this process waits, and whether time is over."""
  last = [start]

  def tick():
    now = time.monotonic()
    if now - last[0] >= PERIOD:
      last[0] += PERIOD
      seconds = f"{now - start:.0f} of {timeout:.0f} s"
      print(f"[waiting for {who()}: {seconds}]", file=sys.stderr, flush=True)
    return now - start > timeout

  return tick


def hold_back_noise() -> None:
  """Holds back what JAX's runtime logs about a lost process, which this process is ended for."""
  reading, writing = os.pipe()
  interrupts.errors = os.dup(2)
  sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
  faulthandler.enable(interrupts.errors)
  os.dup2(writing, 2)
  os.close(writing)

  def forward():
    noisy = False
    with os.fdopen(reading, "rb") as lines:
      for line in lines:
        noisy = bool(_NOISE.match(line)) or (noisy and not _LOGGED.match(line))
        if noisy:
          time.sleep(PATIENCE)
        os.write(interrupts.errors, line)

  threading.Thread(target=forward, daemon=True).start()
