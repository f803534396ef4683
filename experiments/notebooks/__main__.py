"""Checks, rewrites and executes the notebooks; see `experiments.notebooks`."""

import pathlib
import tempfile

from absl import flags
import nbformat

from experiments import notebooks
from experiments.cli import app

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_list(
    "execute",
    [],
    "Notebooks to execute, whose outputs are stored: " + ", ".join(notebooks.ON_CPU) + ".",
  )
  flags.DEFINE_bool("rewrite", False, "Put links and install lines as they should be.")


def main(argv) -> None:
  del argv
  for name in FLAGS.execute:
    notebooks.path(name)
  if FLAGS.rewrite:
    for name in notebooks.NAMES:
      notebook = notebooks.read(name)
      notebooks.rewrite(notebook, name)
      nbformat.write(notebook, notebooks.path(name))
  for name in FLAGS.execute:
    with tempfile.TemporaryDirectory() as folder:
      notebook = notebooks.execute(name, pathlib.Path(folder))
    nbformat.write(notebook, notebooks.path(name))
  found = [
    f"{name}: {problem}"
    for name in notebooks.NAMES
    for problem in notebooks.problems(name, notebooks.read(name))
  ]
  print("\n".join(found) if found else f"{len(notebooks.NAMES)} notebooks are as they should be.")
  if found:
    raise ValueError(f"{len(found)} problems in notebooks, see above")


if __name__ == "__main__":
  define_flags()
  app.run(main, not_distributed="it looks at notebooks")
