"""What all programs share: complete --help, paths with ~, a quiet end when their output is cut.

Error messages may quote foreign files; their control characters never reach the terminal.
"""

from collections.abc import Callable
import os
import sys
from typing import Any

from absl import app, flags

# Flags of these packages are shown by --help; others only by --helpfull.
_PACKAGES = ("checkpoints_convert", "experiments")
_TEXTS = ("prompt", "stop", "system")  # flags whose values are never paths


def printable(message: str) -> str:
  r"""Returns a message with escape sequences (`\x1b`) in place of characters that do not print."""
  return "".join(
    c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode()
    for c in message
  )


def run(main: Callable[[list[str]], Any]) -> None:
  """Runs a program as `absl.app.run` does, whose --help shows all flags of this project.

  A closed standard output, as in `program | head`, ends it with the exit code of SIGPIPE.
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

  try:
    try:
      app.run(expanded)
    except SystemExit as end:
      end.code = printable(end.code) if isinstance(end.code, str) else end.code
      raise
    finally:
      sys.stdout.flush()
  except BrokenPipeError:
    # Python flushes standard output once more when it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    os._exit(141)
