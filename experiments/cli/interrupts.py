"""Answers Ctrl-C at once, also while XLA compiles or computes.

Python raises KeyboardInterrupt only when the main thread runs Python again, which can take minutes.
So a thread reads signals as they arrive, and ends the process if the main thread does not. What
programs compute is in their files by then; `at_exit` adds what must still happen.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import os
import select
import signal
import sys
import threading
from typing import NoReturn

EXIT_CODE = 130
# Seconds in which the main thread may end the process itself.
PATIENCE = 2.0

_callbacks: list[Callable[[], None]] = []


@functools.cache
def watch() -> None:
  """Starts the thread, unless SIGINT is ignored or handled in another way; once per process."""
  if (
    signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    or threading.current_thread() is not threading.main_thread()
  ):
    return
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  threading.Thread(target=_wait, args=(reading,), daemon=True).start()


@contextlib.contextmanager
def at_exit(callback: Callable[[], None]) -> Iterator[None]:
  """Calls `callback` if the process is ended within this context while the main thread is busy."""
  _callbacks.append(callback)
  try:
    yield
  finally:
    _callbacks.remove(callback)


def end() -> NoReturn:
  """Ends the process."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(EXIT_CODE)


def _wait(reading):
  while signal.SIGINT not in os.read(reading, 1):
    pass
  print("\n[interrupted]", file=sys.stderr, flush=True)
  if not select.select([reading], [], [], PATIENCE)[0]:  # else a second Ctrl-C
    for callback in list(_callbacks):
      callback()
    end()
  os._exit(EXIT_CODE)
