"""Programs on a dense model."""

import json
import shutil

import programs
import pytest
import tiny

from roe_jax import assets, checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
  """A checkpoint of a dense model whose weights are missing."""
  folder = tmp_path_factory.mktemp("dense") / "checkpoint"
  embedded = assets.path("wordmath_d32")
  size = json.loads((embedded / "config.json").read_text())["vocab_size"]
  config = tiny.config(
    "llama", vocab_size=size, context_length=512, d_expert=32, eos_token_ids=(0,)
  )
  checkpoint.save(folder, tiny.params(config), config, files=embedded)
  shutil.rmtree(folder / "params")
  return folder


@pytest.mark.parametrize(
  "program",
  [
    "generate --prompt=1 --num_members=2 --tau=.3",
    "score --text=TEXT --num_members=2 --tau=.3",
    "evaluate --tasks=wordmath --output=OUT --num_members=2 --tau=.3",
    "compare --tasks=wordmath --output=OUT --methods=baseline;roster:n=4,t=0.3",
    "tune --task=wordmath --output=OUT",
    "quickstart --output=OUT",
    "quantization_study --output=OUT",
    "meshes --output=OUT",
    "reproduce --figure=fig4b --model=embedded --output=OUT",
  ],
)
def test_rosters_are_refused_before_weights_are_read(dense, tmp_path, program):
  name, *arguments = program.split()
  arguments = [a.replace("OUT", str(tmp_path / "out")) for a in arguments]
  flag = "checkpoints" if name in ("quickstart", "quantization_study", "meshes") else "checkpoint"
  done = programs.call(f"experiments.{name}", *arguments, f"--{flag}={dense}")
  assert done.returncode == 1
  (error,) = [line for line in done.errors.splitlines() if line.startswith("error:")]
  assert error.startswith("error: a llama model is dense: it has no router"), error
  assert not (tmp_path / "out").exists()
