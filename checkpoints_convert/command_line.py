"""What all programs share: complete --help, paths with ~, and how they end when something fails."""

from collections.abc import Callable, Iterator
import contextlib
import errno
import os
import sys
from typing import Any

from absl import app, flags

from checkpoints_convert import interrupts

# Flags of these packages are shown by --help; others only by --helpfull.
_PACKAGES = ("checkpoints_convert", "experiments")
_TEXTS = ("prompt", "stop", "system")  # flags whose values are never paths
_MESSAGE = 800  # characters
_CLOSED_PIPE = 141  # the exit code of SIGPIPE
# Errors that are no mistakes in a program.
EXPECTED = (ValueError, FloatingPointError, OSError, MemoryError)
# What an error of the system calls for.
_REMEDIES = {
  errno.EACCES: "change its permissions, or choose another path",
  errno.EPERM: "change its permissions, or choose another path",
  errno.EROFS: "choose a path that can be written",
  errno.ENOSPC: "free some space, and run the same command again",
  errno.EDQUOT: "free some space, and run the same command again",
  errno.EFBIG: "choose a file system that allows larger files, or raise ulimit -f",
  errno.EISDIR: "give a file",
  errno.ENOTDIR: "give a path whose parts are folders",
  errno.ENAMETOOLONG: "give a shorter path",
  errno.ELOOP: "give a path without links that point to each other",
  errno.EMFILE: "raise the limit of open files, such as with ulimit -n 4096",
  errno.ENFILE: "close other programs, or raise the system's limit of open files",
  errno.ENOENT: "check the path",
  errno.EIO: "check the disk, and run the same command again",
  errno.ESTALE: "check the network file system, and run the same command again",
  errno.ENOMEM: "free some memory, and run the same command again",
}


def run(main: Callable[[list[str]], Any]) -> None:
  """Runs a program as `absl.app.run` does, whose --help shows all flags of this project.

  It ends as `reported` says.
  """
  ours = [
    flag
    for module, defined in flags.FLAGS.flags_by_module_dict().items()
    for flag in defined
    if module.split(".")[0] in _PACKAGES
  ]
  for flag in ours:
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)

  def expanded(argv):
    # Shells do not expand the ~ of --target=~/model.
    for flag in ours:
      if flag.name not in _TEXTS and isinstance(flag.value, str) and flag.value.startswith("~/"):
        flag.value = os.path.expanduser(flag.value)
    return main(argv)

  with reported():
    app.run(expanded)


@contextlib.contextmanager
def reported() -> Iterator[None]:
  """Ends the process with one sentence and exit code 1 if the input or the system is at fault.

  A closed standard output, as in `program | head`, ends it with the exit code of SIGPIPE and no
  message, Ctrl-C and SIGTERM with 130 and 143.
  """
  with interrupts.raised():
    try:
      try:
        yield
      finally:
        if sys.stdout:  # it may be closed
          sys.stdout.flush()
    except BrokenPipeError:
      _drop_output()
      os._exit(_CLOSED_PIPE)
    except KeyboardInterrupt as error:
      # sys.exit would wait for computations.
      interrupts.end(getattr(error, "number", interrupts.signal.SIGINT))
    except EXPECTED as error:
      _drop_output()
      sys.exit(f"error: {describe(error)}")


def _drop_output():
  """Drops what cannot be written to standard output: Python would try again when it exits."""
  try:
    if sys.stdout:
      sys.stdout.flush()
  except OSError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe(error: BaseException) -> str:
  """Returns the sentence of an error: one line of printable characters."""
  text = str(error)
  if isinstance(error, MemoryError):
    text = f"out of memory: {text or 'use smaller settings, or a larger machine'}"
  if isinstance(error, OSError) and error.strerror is not None:
    named = [
      os.fsdecode(f) for f in (error.filename, error.filename2) if isinstance(f, str | bytes)
    ]
    remedy = _REMEDIES.get(error.errno or 0, "")
    text = f"{' -> '.join(named) or _output()}: {error.strerror}{remedy and f': {remedy}'}"
  line = " ".join(part.strip() for part in text.splitlines() if part.strip())
  line = printable(line)
  if len(line) > _MESSAGE:  # the end says what to do
    line = f"{line[: _MESSAGE - 300]} ... {line[-300:]}"
  return line


def _output():
  """Names what was probably written when an error has no file name."""
  names = [n for n in ("output", "target") if n in flags.FLAGS and flags.FLAGS[n].value]
  return f"--{names[0]}={flags.FLAGS[names[0]].value}" if names else "standard output"


def printable(text: str) -> str:
  r"""Returns a text with escape sequences, such as `\x1b`, in place of control characters."""
  return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
