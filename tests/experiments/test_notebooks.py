"""The notebooks: those that need no accelerator run, of the others what is not a program does.

And of all of them calls and commands exist.
"""

import re
import shlex

import chat_formats
import command_lines
import jax
import nbclient
import nbformat
import pytest

from experiments import notebooks
from roe_jax import checkpoint, params
from roe_jax.config import ModelConfig


def with_cell(name, source):
  """A notebook with one code cell more."""
  notebook = notebooks.read(name)
  notebook.cells.append(nbformat.v4.new_code_cell(source))
  return notebook


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_notebooks_are_as_they_should_be(name):
  assert list(notebooks.problems(name, notebooks.read(name))) == []


def test_all_commands_have_flags_that_exist():
  lines = [
    shlex.join([c[0], *c[1:]])
    for name in notebooks.NAMES
    for c in notebooks.commands(notebooks.read(name))
  ]
  assert len(lines) >= 10
  command_lines.check(lines)


def test_a_command_with_a_flag_that_does_not_exist_is_found():
  notebook = with_cell(
    "tpu", "!python -m experiments.generate --checkpoint=x \\\n  --members=8 2> log.txt"
  )
  lines = [shlex.join(c) for c in notebooks.commands(notebook)[-1:]]
  with pytest.raises(AssertionError, match="members"):
    command_lines.check(lines)


@pytest.mark.parametrize("name", notebooks.ON_CPU)
def test_notebooks_that_need_no_accelerator_run_from_a_clean_kernel(name, tmp_path, monkeypatch):
  monkeypatch.delenv("XLA_FLAGS")  # eight devices are the tests' own
  stored = notebooks.read(name)
  executed = notebooks.execute(name, tmp_path)
  kinds = [
    sorted(key for output in cell.outputs for key in output.get("data", {}))
    for cell in executed.cells
    if cell.cell_type == "code"
  ]
  assert any("image/png" in kind for kind in kinds)
  assert kinds == [
    sorted(key for output in cell.outputs for key in output.get("data", {}))
    for cell in stored.cells
    if cell.cell_type == "code"
  ]


@pytest.fixture
def small_olmoe(tmp_path, monkeypatch):
  """A random model of OLMoE's kind as ./olmoe, with a chat template."""
  files = chat_formats.write(tmp_path / "files", "olmoe")
  config = ModelConfig(
    family="olmoe",
    vocab_size=chat_formats.tokenizer("olmoe").get_vocab_size(),
    num_layers=2,
    d_model=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    num_experts=8,
    experts_per_token=2,
    d_expert=8,
    context_length=128,
    normalize_gates=False,
    gates_in_model_dtype=True,
    qk_norm=True,
    initializer_range=0.3,
    eos_token_ids=(256,),
  )
  checkpoint.save(
    tmp_path / "olmoe", params.initialize(config, jax.random.key(0)), config, files=files
  )
  (tmp_path / "results/report").mkdir(parents=True)  # what a program before left
  (tmp_path / "results/report/report.md").write_text("# Report")
  monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", sorted(set(notebooks.NAMES) - set(notebooks.ON_CPU)))
def test_python_cells_of_the_others_run_on_a_small_model(name, small_olmoe):
  del small_olmoe
  names = {}
  for cell in notebooks.read(name).cells:
    if cell.cell_type == "code":
      exec(notebooks.python(cell), names)
  assert names["result"].completions[0].tokens
  assert name != "tpu" or names["mesh"].shape == {"data": 1, "expert": 8, "tensor": 1}


def test_a_program_that_fails_is_a_cell_that_fails(tmp_path, monkeypatch):
  notebook = with_cell("quickstart", "!python -m experiments.no_such_program 2> log.txt")
  del notebook.cells[2:-1]
  monkeypatch.setattr(notebooks, "read", lambda name: notebook)
  with pytest.raises(nbclient.exceptions.CellExecutionError, match="no_such_program"):
    notebooks.execute("quickstart", tmp_path)


def test_stored_outputs_name_no_folder_of_a_machine():
  for name in notebooks.NAMES:
    text = notebooks.path(name).read_text()
    assert not re.search(r"/(root|home|Users|work|tmp)/", text), name


@pytest.mark.parametrize(
  "source,problem",
  [
    ("for i in range(3):\n  print(i)", r"has logic \(For\)"),
    ("[x for x in (1, 2)]", r"has logic \(ListComp\)"),
    ("def f():\n  pass", r"has logic \(FunctionDef\)"),
    ("roe_jax.generate_all()", "there is no roe_jax.generate_all"),
    ("roe_jax.open_model('x', datatype='float32')", "unexpected keyword argument 'datatype'"),
    ("from roe_jax import nothing_of_this_name", "nothing_of_this_name"),
    ("from experiments.analysis import drawing\ndrawing.zeros(1)", "there is no drawing.zeros"),
    ("print(", "does not compile"),
    ("import no.module.of.this.name; from roe_jax.no_module import x", "no_module"),
    ("!pip install x", "a line is none of"),
    ("%run x.py", "a line is none of"),
  ],
)
def test_what_is_wrong_with_a_cell_is_found(source, problem):
  found = list(notebooks.problems("quickstart", with_cell("quickstart", source)))
  assert len(found) >= 1 and any(re.search(problem, text) for text in found), found


def test_a_program_after_the_notebook_has_taken_the_accelerator_is_found():
  source = "!python -m experiments.quickstart"
  found = list(notebooks.problems("olmoe_colab", with_cell("olmoe_colab", source)))
  assert len(found) == 1 and "has the accelerator" in found[0], found
  assert not list(notebooks.problems("quickstart", with_cell("quickstart", source)))


def test_links_and_install_lines_of_another_version_are_found_and_rewritten():
  notebook = notebooks.read("tpu")
  right = [cell.source for cell in notebook.cells]
  for cell in notebook.cells[:1] + notebook.cells[-4:]:
    cell.source = cell.source.replace(f"/{notebooks.REF}/", "/v0.0.1/").replace(
      notebooks.REPOSITORY, "else/roe_jax"
    )
  notebook.cells[1].source = "%pip install roe_jax"
  found = list(notebooks.problems("tpu", notebook))
  assert len(found) == 2 + len(notebooks.links(notebook)), found
  notebooks.rewrite(notebook, "tpu")
  assert [cell.source for cell in notebook.cells] == right


def test_a_link_to_a_file_that_is_not_there_is_found():
  notebook = notebooks.read("tpu")
  notebook.cells[-3].source = notebook.cells[-3].source.replace("scaling.md", "no.md")
  assert ["not there: docs/no.md" in p for p in notebooks.problems("tpu", notebook)] == [True]


def test_outputs_that_are_not_stored_are_found():
  notebook = notebooks.read("quickstart")
  for cell in notebook.cells:
    if cell.cell_type == "code":
      cell.outputs = []
  assert ["--execute stores them" in p for p in notebooks.problems("quickstart", notebook)] == [
    True
  ]


def test_an_unknown_notebook_is_refused():
  with pytest.raises(ValueError, match="there is no notebook 'x'; there are quickstart, "):
    notebooks.path("x")
