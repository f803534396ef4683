"""Runs lm-evaluation-harness's own command line, with the model type `roe_jax` registered.

  python -m experiments.harness run --model roe_jax --tasks arc_easy \\
      --model_args checkpoint=olmoe,num_members=8,tau=0.3
"""

import sys

from checkpoints_convert import command_line
from experiments.cli import extras


def program() -> None:
  try:
    extras.check(("lm_eval", "scipy"))
  except ModuleNotFoundError as error:
    sys.exit(f"error: this program needs {error.name}: {extras.install(str(error.name))}")
  with command_line.reported():
    from lm_eval.__main__ import cli_evaluate

    from experiments.evaluation import lm_eval_model  # noqa: F401 - registers the model type

    cli_evaluate()


if __name__ == "__main__":
  program()
