"""What all programs share: complete --help, and a quiet end when their output is cut."""

from collections.abc import Callable
import os
import sys
from typing import Any

from absl import app, flags

# Flags of these packages are shown by --help; others only by --helpfull.
_PACKAGES = ("checkpoints_convert", "experiments")


def run(main: Callable[[list[str]], Any]) -> None:
  """Runs a program as `absl.app.run` does, whose --help shows all flags of this project.

  A closed standard output, as in `program | head`, ends it with the exit code of SIGPIPE.
  """
  for module, defined in flags.FLAGS.flags_by_module_dict().items():
    for flag in defined if module.split(".")[0] in _PACKAGES else ():
      flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  try:
    try:
      app.run(main)
    finally:
      sys.stdout.flush()
  except BrokenPipeError:
    # Python flushes standard output once more when it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    os._exit(141)
