"""Converts between Hugging Face folders and roe_jax checkpoints.

python -m checkpoints_convert --source=allenai/OLMoE-1B-7B-0924 --target=olmoe
python -m checkpoints_convert --source=olmoe --target=olmoe_hf --to_hugging_face
"""

import sys

from absl import app, flags

from checkpoints_convert import cli, command_line


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  sys.exit(cli.run(flags.FLAGS))


def program() -> None:
  """Runs the converter with the command line's flags."""
  cli.define_flags()
  command_line.run(main)


if __name__ == "__main__":
  program()
