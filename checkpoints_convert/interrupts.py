"""Answers Ctrl-C and SIGTERM at once, also while a program starts and while XLA computes.

Until its main function runs, a signal ends a program in the handler: an exception could be
swallowed by a module that is being imported. Later it raises `Interrupt` in the main thread. Python
does so only when that thread runs Python again, which can take minutes. So another thread reads
signals as they arrive, and ends the process if the main thread does not. What programs compute is
in their files by then; `at_exit` adds what must still happen.

This module is the first that programs import.
"""

from collections.abc import Callable, Iterator
import contextlib
import os
import select
import signal
import sys
import threading
from typing import Any, NoReturn

# Seconds in which the main thread may end the process itself.
PATIENCE = 2.0
# Of each signal, what is printed, and the handlers that are replaced.
_SIGNALS = {
  signal.SIGINT: ("[interrupted]", (signal.default_int_handler,)),
  signal.SIGTERM: ("[terminated]", (signal.SIG_DFL,)),
}

errors = 2  # file descriptor of standard error
_callbacks: list[Callable[[], None]] = []
_announced = threading.Lock()  # held from the first signal
_raises = False


class Interrupt(KeyboardInterrupt):
  """Ctrl-C or SIGTERM.

  Attributes:
    number: of the signal.
  """

  def __init__(self, number: int):
    super().__init__(number)
    self.number = number


def watch() -> dict[int, Any]:
  """Handles the signals that have Python's own handlers; in the main thread only.

  Returns:
    The handlers that were replaced.
  """
  replaced = {}
  if threading.current_thread() is threading.main_thread():
    for number, (_, defaults) in _SIGNALS.items():
      if signal.getsignal(number) in defaults:
        replaced[number] = signal.signal(number, _on_signal)
  return replaced


@contextlib.contextmanager
def raised() -> Iterator[None]:
  """Raises `Interrupt` on a signal within this context, and ends the process if that fails."""
  global _raises
  replaced = watch()
  ours = any(signal.getsignal(number) is _on_signal for number in _SIGNALS)
  if _raises or not ours or threading.current_thread() is not threading.main_thread():
    yield
    return
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  thread = threading.Thread(target=_wait, args=(reading,), daemon=True)
  thread.start()
  _raises = True
  try:
    yield
  finally:
    _raises = False
    signal.set_wakeup_fd(before)
    os.close(writing)  # which ends the thread
    for number, handler in replaced.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def at_exit(callback: Callable[[], None]) -> Iterator[None]:
  """Calls `callback` if the process is ended within this context while the main thread is busy."""
  _callbacks.append(callback)
  try:
    yield
  finally:
    _callbacks.remove(callback)


def end(number: int) -> NoReturn:
  """Ends the process as the signal of this number does in shells, with a message."""
  _announce(number)
  _leave(128 + number)


def abandon(code: int) -> NoReturn:
  """Ends the process although its main thread may be busy, after the callbacks of `at_exit`."""
  for callback in list(_callbacks):
    callback()
  _leave(code)


def _leave(code) -> NoReturn:
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or its reader is gone
      stream.flush()
  os._exit(code)


def say(text: str) -> None:
  """Prints to standard error, not by sys.stderr, whose lock an interrupted thread may hold."""
  with contextlib.suppress(OSError):
    os.write(errors, text.encode())


def _announce(number):
  if _announced.acquire(blocking=False):
    say(f"\n{_SIGNALS[number][0]}\n")


def _on_signal(number, frame):
  del frame
  if _raises:
    raise Interrupt(number)
  end(number)


def _wait(reading):
  with os.fdopen(reading, "rb", buffering=0) as pipe:
    while (number := pipe.read(1)) and number[0] not in _SIGNALS:
      pass
    if not number:
      return
    _announce(number[0])
    if not select.select([pipe], [], [], PATIENCE)[0]:  # else a second signal
      abandon(128 + number[0])
    os._exit(128 + number[0])


def _forget_in_child():
  """Gives a forked process the default handlers: its signals must not reach its parent's thread."""
  for number, (_, defaults) in _SIGNALS.items():
    if signal.getsignal(number) is _on_signal:
      signal.set_wakeup_fd(-1)
      signal.signal(number, defaults[0])
  _unblock()


def _block():
  signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _unblock():
  signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_forget_in_child)

# `python -m checkpoints_convert`, `python -m experiments.NAME`, or an installed command; other
# processes that import this package, such as notebooks and workers, keep their handlers.
if (
  sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0] if sys.argv else "").startswith("roe-")
) and "--multiprocessing-fork" not in sys.orig_argv:
  watch()
