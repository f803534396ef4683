"""The embedded models are Hugging Face folders."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import roe_jax
from roe_jax import assets, transformer

FILES = [
  "config.json",
  "manifest.json",
  "model.safetensors",
  "tokenizer.json",
  "tokenizer_config.json",
]


@pytest.mark.parametrize("name", assets.NAMES)
def test_folders_hold_these_files(name):
  assert sorted(path.name for path in assets.path(name).iterdir()) == FILES
  config = json.loads((assets.path(name) / "config.json").read_text())
  assert config["architectures"] == ["OlmoeForCausalLM"]


@pytest.mark.parametrize("name", ["wordmath_control", "wordmath_overtrained", "wordmath_4of32"])
def test_transformers_computes_the_same_logits(name):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  folder = assets.path(name)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
  )
  params, config, tokenizer = roe_jax.open_model(f"embedded:{name}", "float32")
  text = "Tom has 3 pens and buys 14 more. How many pens does Tom have now?"
  tokens = tokenizer.encode(text)
  assert transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == tokens
  with torch.no_grad():
    want = model(torch.tensor([tokens])).logits.numpy()
  got, _ = transformer.forward(params, config, jnp.asarray([tokens]))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
