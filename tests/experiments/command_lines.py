"""Whether command lines have flags that exist, with values that these take."""

import programs

# Reads command lines, those of a program together, and parses each with the flags of its program.
PARSE = """
import importlib, itertools, shlex, sys
from absl import flags
import experiments.cli.app  # with the flags that all programs have
lines = sorted(shlex.split(line) for line in sys.stdin)
for program, commands in itertools.groupby(lines, key=lambda words: words[0]):
  before = set(flags.FLAGS)
  values = flags.FLAGS
  if program == "checkpoints_convert":
    from checkpoints_convert import cli
    values = flags.FlagValues()
    cli.define_flags(values)
  else:
    importlib.import_module(program).define_flags()
  for command in commands:
    values.unparse_flags()
    try:
      rest = values(command)
    except flags.Error as error:
      sys.exit(f"{shlex.join(command)}: {error}")
    assert rest == [program], rest
  for name in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, name)
"""


def check(lines):
  """Parses `experiments.PROGRAM --flag=value ...` or `checkpoints_convert --flag=value ...`."""
  done = programs.call(PARSE, stdin="\n".join(lines))
  assert done.returncode == 0, done.errors
