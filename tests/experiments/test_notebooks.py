"""The notebooks: those that need no accelerator run, and of all of them calls and commands exist."""

import os
import re
import shlex

import nbformat
import pytest

import command_lines
from experiments import notebooks

ROOT = notebooks.FOLDER.parents[1]


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_notebooks_are_as_they_should_be(name):
  assert list(notebooks.problems(name, notebooks.read(name))) == []


def test_all_commands_have_flags_that_exist():
  lines = [shlex.join([c[0], *c[1:]]) for name in notebooks.NAMES
           for c in notebooks.commands(notebooks.read(name))]
  assert len(lines) >= 10
  command_lines.check(lines)


@pytest.mark.parametrize("name", notebooks.ON_CPU)
def test_notebooks_that_need_no_accelerator_run_from_a_clean_kernel(name, tmp_path, monkeypatch):
  monkeypatch.delenv("XLA_FLAGS")  # eight devices are the tests' own
  paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in paths if p))
  stored = notebooks.read(name)
  executed = notebooks.execute(name, tmp_path)
  kinds = [sorted(key for output in cell.outputs for key in output.get("data", {}))
           for cell in executed.cells if cell.cell_type == "code"]
  assert any("image/png" in kind for kind in kinds)
  assert kinds == [sorted(key for output in cell.outputs for key in output.get("data", {}))
                   for cell in stored.cells if cell.cell_type == "code"]


def test_stored_outputs_name_no_folder_of_a_machine():
  for name in notebooks.NAMES:
    text = notebooks.path(name).read_text()
    assert not re.search(r"/(root|home|Users|work|tmp)/", text), name


@pytest.mark.parametrize("source,problem", [
    ("for i in range(3):\n  print(i)", r"has logic \(For\)"),
    ("[x for x in (1, 2)]", r"has logic \(ListComp\)"),
    ("def f():\n  pass", r"has logic \(FunctionDef\)"),
    ("roe_jax.generate_all()", "there is no roe_jax.generate_all"),
    ("roe_jax.load('x', datatype='float32')", "unexpected keyword argument 'datatype'"),
    ("from roe_jax import nothing_of_this_name", "nothing_of_this_name"),
    ("from experiments import drawing\ndrawing.zeros(1)", "there is no drawing.zeros"),
    ("print(", "does not compile"), ("!pip install x", "only the first code cell installs")])
def test_what_is_wrong_with_a_cell_is_found(source, problem):
  notebook = notebooks.read("quickstart")
  notebook.cells.append(nbformat.v4.new_code_cell(source))
  found = list(notebooks.problems("quickstart", notebook))
  assert len(found) >= 1 and any(re.search(problem, text) for text in found), found


def test_a_badge_and_an_install_line_of_another_version_are_found():
  notebook = notebooks.read("tpu")
  notebook.cells[0].source = notebook.cells[0].source.replace(notebooks.VERSION, "v0.0.1")
  notebook.cells[1].source = "%pip install roe_jax"
  assert len(list(notebooks.problems("tpu", notebook))) == 2


def test_outputs_that_are_not_stored_are_found():
  notebook = notebooks.read("quickstart")
  for cell in notebook.cells:
    if cell.cell_type == "code":
      cell.outputs = []
  assert ["--execute stores them" in p for p in notebooks.problems("quickstart", notebook)] == [True]


def test_an_unknown_notebook_is_refused():
  with pytest.raises(ValueError, match="there is no notebook 'x'; there are quickstart, "):
    notebooks.path("x")
