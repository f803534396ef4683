"""Executes notebooks from a clean kernel and stores their outputs.

python -m experiments.notebooks.store_outputs quickstart reproduce_figures

The install cell has the tag `skip-execution`, which nbclient respects: notebooks run with the
current interpreter and checkout.
"""

import os
import pathlib
import sys
import tempfile

import nbclient
import nbformat

FOLDER = pathlib.Path(__file__).resolve().parent


def execute(
  notebook: nbformat.NotebookNode, folder: pathlib.Path, timeout: int = 300
) -> nbformat.NotebookNode:
  """Executes a notebook in `folder` and returns it with outputs, without stderr and times.

  Args:
    notebook: the notebook, which is changed.
    folder: the working folder. A model in `folder/org/name` stands for that name on the hub.
    timeout: seconds per cell.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell fails, or a program that it starts.
  """
  paths = {"PATH": pathlib.Path(sys.executable).parent, "PYTHONPATH": FOLDER.parents[1]}
  paths = {name: f"{path}{os.pathsep}{os.environ.get(name, '')}" for name, path in paths.items()}
  client = nbclient.NotebookClient(
    notebook,
    timeout=timeout,
    record_timing=False,
    kernel_name="python3",
    extra_arguments=["--InteractiveShell.system_raise_on_error=True"],
    resources={"metadata": {"path": str(folder)}},
  )
  client.execute(env=os.environ | paths)
  for cell in notebook.cells:
    if cell.cell_type == "code":
      cell.outputs = as_shown([o for o in cell.outputs if o.get("name") != "stderr"])
  notebook.metadata.pop("language_info", None)
  return notebook


def as_shown(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
  """Joins adjacent streams, and leaves of a progress bar what a terminal shows in the end."""
  found: list[nbformat.NotebookNode] = []
  for output in outputs:
    if found and output.output_type == found[-1].output_type == "stream":
      found[-1].text += output.text
    else:
      found.append(output)
  for output in found:
    if output.output_type == "stream":
      lines = output.text.replace("\r\n", "\n").split("\n")
      output.text = "\n".join(line.rstrip("\r ").rpartition("\r")[2] for line in lines)
  return found


def main(names: list[str]) -> None:
  for name in names:
    path = FOLDER / f"{name}.ipynb"
    with tempfile.TemporaryDirectory() as folder:
      nbformat.write(execute(nbformat.read(path, as_version=4), pathlib.Path(folder)), path)


if __name__ == "__main__":
  main(sys.argv[1:])
