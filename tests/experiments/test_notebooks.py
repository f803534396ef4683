"""Notebooks: links, install lines and commands are right; they run, or their Python cells do.

Notebooks that need an accelerator or the hub are not executed as a whole: their Python cells run on
a small model. The others are executed from a clean kernel.
"""

import configparser
import os
import pathlib
import re

import chat_formats
import command_lines
import jax
import nbformat
import pytest

from experiments.notebooks import store_outputs
from roe_jax import checkpoint, params
from roe_jax.config import ModelConfig

ROOT = pathlib.Path(__file__).parents[2]
# JAX 0.10.2 keeps Colab's numpy 2.1.3, so the runtime need not restart; 0.12 needs numpy 2.2.
JAX = {
  "quickstart": "jax>=0.10.2,<0.11",
  "reproduce_figures": "jax>=0.10.2,<0.11",
  "any_model": "jax>=0.10.2,<0.11",
  "olmoe_colab": "jax[cuda12]>=0.10.2,<0.11",
  "tpu": "jax[tpu]>=0.10.2,<0.11",
}
ON_CPU = ("quickstart", "reproduce_figures")
STORED = (*ON_CPU, "any_model")  # executed once with a copy of the model in the hub's cache


def read(name):
  return nbformat.read(store_outputs.FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown(notebook):
  return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def url():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  return setup["metadata"]["url"]


def programs(notebook):
  """The lines `!python -m PROGRAM --flag=value ...`, without redirections."""
  source = "\n".join(cell.source for cell in code(notebook)).replace("\\\n", " ")
  return re.findall(r"^!python -m (.+?)(?: 2> .*)?$", source, re.M)


def python(cell):
  """The Python lines of a cell; shell and magic commands are whole cells."""
  return "" if cell.source.startswith(("!", "%")) else cell.source


def test_every_notebook_is_tested():
  assert {path.stem for path in store_outputs.FOLDER.glob("*.ipynb")} == set(JAX)


@pytest.mark.parametrize("name", JAX)
def test_the_first_cells_open_in_colab_and_install_from_main(name):
  title, install = read(name).cells[:2]
  notebook = f"{url().removeprefix('https://')}/blob/main/experiments/notebooks/{name}.ipynb"
  assert f"(https://colab.research.google.com/{notebook.replace('.com', '')})" in title.source
  assert (
    install.source == f'%pip install -q "roe_jax[experiments] @ git+{url()}@main" "{JAX[name]}"'
  )
  assert install.metadata.tags == ["skip-execution"]


@pytest.mark.parametrize("name", JAX)
def test_links_to_this_repository_lead_to_files_on_main(name):
  links = re.findall(
    r"https://(?:colab\.research\.google\.com/)?(github(?:\.com)?/[^)\s]+/roe_jax[^)\s]*)",
    markdown(read(name)),
  )
  assert links
  for link in links:
    repository, _, path = re.split(r"/(blob|tree)/main/", link.replace("github.com", "github"))
    assert "https://" + repository.replace("github", "github.com") == url()
    assert (ROOT / path).exists(), link


@pytest.mark.slow
def test_commands_have_flags_that_exist():
  lines = [line for name in JAX for line in programs(read(name))]
  assert len(lines) >= 10
  command_lines.check(lines)
  with pytest.raises(AssertionError, match="members"):
    command_lines.check(["experiments.generate --checkpoint=x --members=8"])


@pytest.mark.parametrize("name", sorted(set(JAX) - set(ON_CPU)))
def test_programs_come_before_the_notebooks_own_process_takes_the_accelerator(name):
  cells = [cell.source for cell in code(read(name))]
  takes = next(i for i, source in enumerate(cells) if "import roe_jax" in source)
  assert not any(source.startswith("!") for source in cells[takes:])


@pytest.mark.parametrize("name", JAX)
def test_outputs_are_stored_of_notebooks_for_cpus_and_name_no_folder(name):
  assert any(cell.outputs for cell in code(read(name))) == (name in STORED)
  text = (store_outputs.FOLDER / f"{name}.ipynb").read_text()
  assert not re.search(r"/(root|home|Users|work|tmp)/", text)


def test_of_progress_bars_the_end_is_stored():
  stream = lambda text: nbformat.v4.new_output("stream", text=text)
  found = store_outputs.as_shown([stream("a\r\n0 %\r50"), stream(" %\r100 %\nb\n")])
  assert [output.text for output in found] == ["a\n100 %\nb\n"]


def kinds(notebook):
  """The types of each cell's outputs."""
  return [
    sorted({kind for output in cell.outputs for kind in output.get("data", {"text": 0})})
    for cell in code(notebook)
  ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_CPU)
def test_notebooks_for_cpus_run_from_a_clean_kernel(name, tmp_path, monkeypatch):
  options = os.environ["XLA_FLAGS"].split()
  options = [o for o in options if "device_count" not in o]  # eight devices are the tests' own
  monkeypatch.setenv("XLA_FLAGS", " ".join(options))
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ.get("ROE_JAX_CACHE", ""))
  executed = kinds(store_outputs.execute(read(name), tmp_path))
  assert executed == kinds(read(name))
  assert ["image/png", "text/plain"] in executed


@pytest.mark.slow
def test_a_program_that_fails_is_a_cell_that_fails(tmp_path):
  notebook = read("quickstart")
  notebook.cells = [nbformat.v4.new_code_cell("!python -m experiments.no_such_program 2> log.txt")]
  with pytest.raises(store_outputs.nbclient.exceptions.CellExecutionError, match="no_such_program"):
    store_outputs.execute(notebook, tmp_path)


@pytest.fixture
def small_olmoe(tmp_path, monkeypatch):
  """A random model of OLMoE's family as ./olmoe and ./carved, with a chat template."""
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
  (tmp_path / "carved").symlink_to("olmoe")
  (tmp_path / "results/report").mkdir(parents=True)  # what a program before left
  (tmp_path / "results/report/report.md").write_text("# Report")
  monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(JAX) - set(ON_CPU)))
def test_python_cells_of_the_others_run_on_a_small_model(name, small_olmoe):
  del small_olmoe
  names = {}
  for cell in code(read(name)):
    exec(python(cell), names)
  assert names["result"].completions[0].tokens
  assert name != "tpu" or names["mesh"].shape == {"data": 1, "expert": 8, "tensor": 1}
