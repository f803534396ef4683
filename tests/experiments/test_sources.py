"""Hugging Face models as --checkpoint, without conversion."""

import json

import fake_hub
import jax
import numpy as np
import programs
import pytest

from checkpoints_convert import convert_to_hugging_face
from experiments.cli import app
from roe_jax import assets, checkpoint, decode, presets
from roe_jax.text.chat import Chat
from roe_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub_folder(tiny_checkpoint, tmp_path_factory):
  folder = tmp_path_factory.mktemp("hub") / "model"
  convert_to_hugging_face(str(tiny_checkpoint), str(folder))
  return folder


def assert_equal(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_folder_opens_as_the_checkpoint_does(tiny_checkpoint, hub_folder, capsys):
  want = checkpoint.load(tiny_checkpoint)
  params, config, tokenizer = app.open_model(str(hub_folder))
  assert config == want[1] == app.load_config(str(hub_folder))
  assert_equal(params, want[0])
  assert tokenizer.encode("3 pens") == Tokenizer.load(tiny_checkpoint).encode("3 pens")
  assert f"--source={hub_folder} --target=" in capsys.readouterr().err
  params, config = app.load_params(str(hub_folder), "bfloat16", "expert:2,tensor:2")
  assert config.dtype == "bfloat16"
  assert_equal(params, checkpoint.load(tiny_checkpoint, "bfloat16")[0])
  down = params.layers.experts.down
  assert down.addressable_shards[0].data.shape[1:3] == (down.shape[1] // 2, down.shape[2] // 2)


def test_a_hub_name_is_downloaded_in_two_steps(tiny_checkpoint, hub_folder, tmp_path, monkeypatch):
  """What settings are checked with comes first, then the weights."""
  arrived = tmp_path / "arrived"

  fake_hub.serve(monkeypatch, hub_folder, arrived)
  monkeypatch.chdir(tmp_path)
  want, config = checkpoint.load(tiny_checkpoint)
  assert app.load_config("hf:some/model") == config
  app.load_tokenizer("hf:some/model")
  (arrived / "chat_template.jinja").write_text("{{ messages[0].content }}")
  assert Chat.load(app.checkpoint_path("hf:some/model"), Tokenizer.load(arrived))
  assert not list(arrived.glob("*.safetensors"))
  params, found = app.load_params("hf:some/model", mesh="expert:4")
  assert found == config
  assert_equal(params, want)


def test_what_is_no_model_gets_a_sentence(tmp_path, monkeypatch):
  assert app.checkpoint_path("embedded:wordmath_control") == assets.path("wordmath_control")
  with pytest.raises(
    ValueError, match="'hf:nothing' is neither a folder, .* nor a hub name like org"
  ):
    app.load_config("hf:nothing")
  (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
  with pytest.raises(ValueError, match="unsupported architecture.*'bloom'"):
    app.load_config(str(tmp_path))
  (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
  with pytest.raises(ValueError, match="is a PEFT adapter .* not a model: merge it"):
    app.load_config(str(tmp_path))
  with pytest.raises(FileNotFoundError, match=r"did you mean hf:org/name@refs/pr/1\?"):
    app.load_config("org/name@refs/pr/1")
  with pytest.raises(
    FileNotFoundError,
    match="there is no model .*absent'.*: give a roe_jax checkpoint folder, a Hugging",
  ):
    app.load_config(str(tmp_path / "absent"))
  assert app.load_config("preset:olmoe-1b-7b") == presets.PRESETS["olmoe-1b-7b"]
  with pytest.raises(ValueError, match="unknown preset 'olmo'; choose one of .*olmoe-1b-7b"):
    app.load_config("preset:olmo")
  with pytest.raises(ValueError, match="no parameters: give --dry_run"):
    app.load_params("preset:olmoe-1b-7b")


def test_a_program_continues_texts_with_it(tiny_checkpoint, hub_folder):
  done = programs.call(
    "experiments.generate",
    f"--checkpoint={hub_folder}",
    "--max_new_tokens=6",
    "--mesh=expert:2",
    stdin='{"prompt": "Tom has 3 pens."}\n',
  )
  assert done.returncode == 0, done.errors
  assert f"[read {hub_folder} in " in done.errors
  params, config = checkpoint.load(tiny_checkpoint)
  tokenizer = Tokenizer.load(tiny_checkpoint)
  want = decode.generate(params, config, [tokenizer.encode("Tom has 3 pens.")], max_new_tokens=6)
  assert json.loads(done.output)["tokens"] == list(want.completions[0].tokens)
