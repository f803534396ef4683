"""Opening models by name."""

import importlib.metadata
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import roe_jax
from roe_jax import assets, checkpoint, model_formats, sharding
from roe_jax.model_formats import ModelFormat
from roe_jax.text.tokenizer import Tokenizer

HUB_FOLDER = assets.path("wordmath_d32")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A checkpoint of the model in `HUB_FOLDER`."""
  path = tmp_path_factory.mktemp("saved") / "model"
  roe_jax.save(path, *roe_jax.load_params(HUB_FOLDER), files=HUB_FOLDER)
  return path


def assert_equal(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def test_a_checkpoint_and_a_hugging_face_folder_open_alike(saved):
  want, stored = checkpoint.load(saved)
  for name in (saved, str(HUB_FOLDER)):
    params, config, tokenizer = roe_jax.open_model(name)
    assert config == stored == roe_jax.load_config(name)
    assert_equal(params, want)
    assert tokenizer.encode("3 pens") == Tokenizer.load(saved).encode("3 pens")
    mesh = sharding.make_mesh(config, expert=4)
    shardings = sharding.parameter_shardings(mesh, config)
    params, config, _ = roe_jax.open_model(name, "bfloat16", shardings)
    assert config.dtype == "bfloat16"
    assert_equal(params, checkpoint.load(saved, "bfloat16")[0])
    assert jax.tree.map(lambda x: x.sharding, params) == shardings


def test_embedded_models_open_by_name():
  params, config, tokenizer = roe_jax.open_model("embedded:wordmath_d32")
  assert config.d_model == 32 and params.embedding.dtype == "bfloat16"
  assert roe_jax.find_folder("embedded:wordmath_d32") == assets.path("wordmath_d32")
  assert tokenizer.vocab_size == config.vocab_size
  with pytest.raises(ValueError, match="unknown embedded model 'x'; there are wordmath_control"):
    roe_jax.open_model("embedded:x")


@pytest.mark.parametrize(
  "name, message",
  [
    ("nothing", r"there is no model 'nothing': give a roe_jax checkpoint folder, a Hugging Face "),
    ("allenai/OLMoE", r"no model 'allenai/OLMoE' \(did you mean hf:allenai/OLMoE\?\)"),
    ("allenai/OLMoE@main", r"did you mean hf:allenai/OLMoE@main\?"),
    ("allenai/OLMoE@refs/pr/3", r"did you mean hf:allenai/OLMoE@refs/pr/3\?"),
    ("empty", r"the folder empty has no model: give .*hf:org/name\[@revision\], or embedded:NAME"),
    ("killed", r"killed\.partial is an unfinished checkpoint"),
  ],
)
def test_an_unknown_name_gets_the_accepted_forms(tmp_path, monkeypatch, name, message):
  monkeypatch.chdir(tmp_path)
  pathlib.Path("empty").mkdir()
  pathlib.Path("killed.partial").mkdir()
  for function in (roe_jax.open_model, roe_jax.load_config, roe_jax.load_params):
    with pytest.raises(FileNotFoundError, match=message):
      function(name)


def test_a_format_can_be_added(saved, monkeypatch):
  monkeypatch.setattr(model_formats, "_FORMATS", dict(model_formats._FORMATS))
  model_formats.register(
    "twice",
    ModelFormat(
      "twice",
      lambda name: name == "twice",
      lambda name, weights: saved,
      lambda name: checkpoint.load_config(saved),
      lambda name, dtype, shardings: (
        jax.tree.map(lambda x: 2 * x, checkpoint.load(saved, dtype, shardings)[0]),
        checkpoint.load_config(saved),
      ),
    ),
  )
  want, stored = checkpoint.load(saved)
  params, config, tokenizer = roe_jax.open_model("twice")
  assert config == stored and tokenizer.vocab_size <= config.vocab_size
  assert_equal(params, jax.tree.map(lambda x: 2 * x, want))
  with pytest.raises(FileNotFoundError, match="hf:org/name.*, twice, or embedded:NAME"):
    roe_jax.load_config("thrice")


@pytest.mark.skipif(
  not importlib.metadata.entry_points(group=model_formats.ENTRY_POINTS),
  reason="roe_jax is not installed, or was before its entry points changed",
)
def test_an_entry_point_adds_hugging_face_models():
  program = """
import sys, roe_jax
assert "checkpoints_convert" not in sys.modules
print(roe_jax.load_config("embedded:wordmath_d32").d_model)
"""
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
  assert done.stdout == "32\n", done.stderr
