"""Every family: from the hub's tensor names to logits, and back bit by bit."""

import json
import re
import shutil

from absl import flags
import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import checkpoints_convert
from checkpoints_convert import (
  cli,
  convert_from_hugging_face,
  convert_to_hugging_face,
  tensor_names,
)
from checkpoints_convert.common import ConversionError
from roe_jax import assets, checkpoint, sharding, transformer
from roe_jax import params as params_lib

pytestmark = pytest.mark.slow


def write_hub(folder, family, **changes):
  """A hub folder of random weights; returns its config.json and its tensors."""
  hf_config = hf.config_json(family, torch_dtype="float32", **changes)
  tensors = hf.hub_state(hf_config, hf.random_state(hf_config, seed=2))
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(hf_config))
  save_file(tensors, folder / "model.safetensors")
  return hf_config, tensors


def logits(params, config, tokens):
  return np.asarray(transformer.forward(params, config, jnp.asarray(tokens))[0])


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_there_and_back(tmp_path, family):
  hf_config, tensors = write_hub(tmp_path / "hub", family)
  convert_from_hugging_face(str(tmp_path / "hub"), str(tmp_path / "roe"))
  params, config = checkpoint.load(tmp_path / "roe")
  params_lib.validate(params, config)
  expected = hf.to_params(hf_config, hf.random_state(hf_config, seed=2))
  for name, leaf in checkpoint.named_leaves(expected).items():
    np.testing.assert_array_equal(checkpoint.named_leaves(params)[name], leaf, err_msg=name)
  convert_to_hugging_face(str(tmp_path / "roe"), str(tmp_path / "back"))
  back = load_file(tmp_path / "back" / "model.safetensors")
  assert set(back) == set(tensors)
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_folders_written_by_transformers(tmp_path, family):
  """Its names are the ones above; what is converted computes the same logits, and
  it reads what is converted back."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  hf_config = hf.config_json(family)
  state = hf.random_state(hf_config, seed=2)
  model = hf.to_model(hf_config, state)
  model.save_pretrained(tmp_path / "hub", max_shard_size="20KB")
  written = {name for file in (tmp_path / "hub").glob("*.safetensors") for name in load_file(file)}
  assert written == set(hf.hub_state(hf_config, state))
  convert_from_hugging_face(str(tmp_path / "hub"), str(tmp_path / "roe"))
  params, config = checkpoint.load(tmp_path / "roe")
  # In the arrays that it holds in memory, the experts of a layer are one.
  model.save_pretrained(tmp_path / "fused", save_original_format=False)
  mesh = sharding.make_mesh(config, **({"tensor": 2} if family in hf.DENSE else {"expert": 4}))
  shardings = sharding.parameter_shardings(mesh, config)
  for given in (None, shardings):
    fused, found = checkpoints_convert.load(str(tmp_path / "fused"), shardings=given)
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, fused, params)
  tokens = np.random.RandomState(0).randint(0, hf.SMALL["vocab_size"], (2, 20))
  expected = hf.logits(model, tokens)
  assert np.abs(logits(params, config, tokens) - expected).max() < 1e-5 * np.abs(expected).max()
  convert_to_hugging_face(str(tmp_path / "roe"), str(tmp_path / "back"))
  again = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "back",
    dtype=torch.float32,
    attn_implementation="eager",
    experts_implementation="eager",
  ).eval()
  np.testing.assert_array_equal(hf.logits(again, tokens), expected)


@pytest.mark.parametrize(
  "family, missing",
  [
    ("qwen2_moe", "mlp.shared_expert.up_proj.weight"),
    ("qwen2_moe", "mlp.shared_expert_gate.weight"),
    ("qwen2_moe", "self_attn.k_proj.bias"),
    ("gpt_oss", "self_attn.sinks"),
    ("gpt_oss", "mlp.experts.down_proj_bias"),
    ("qwen3_moe", "self_attn.q_norm.weight"),
  ],
)
def test_a_missing_tensor_is_named(tmp_path, family, missing):
  _, tensors = write_hub(tmp_path / "hub", family)
  del tensors[f"model.layers.1.{missing}"]
  save_file(tensors, tmp_path / "hub" / "model.safetensors")
  with pytest.raises(ConversionError, match=f"lacks tensors that .*model.layers.1.{missing}"):
    convert_from_hugging_face(str(tmp_path / "hub"), str(tmp_path / "roe"))
  assert not (tmp_path / "roe").exists() and not (tmp_path / "roe.partial").exists()


def test_biases_without_a_place_are_named(tmp_path):
  _, tensors = write_hub(tmp_path / "hub", "qwen2_moe")
  path = tmp_path / "hub" / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"qkv_bias": False}))
  with pytest.raises(ConversionError, match="does not have: .*k_proj.bias"):
    convert_from_hugging_face(str(tmp_path / "hub"), str(tmp_path / "roe"))


def converted(capsys, folder, **arguments):
  """Runs the converter; returns its exit code and all that it prints."""
  values = flags.FlagValues()
  cli.define_flags(values)
  given = {"source": folder / "hub", "target": folder / "roe", "verify": 20} | arguments
  values(["convert", *(f"--{name}={value}" for name, value in given.items())])
  code = cli.run(values)
  printed = capsys.readouterr()
  return code, printed.out + printed.err


def test_verifying_finds_a_wrong_tensor(tmp_path, capsys, monkeypatch):
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  embedded = assets.path("wordmath_d32")
  size = json.loads((embedded / "config.json").read_text())["vocab_size"]
  write_hub(tmp_path / "hub", "llama", vocab_size=size)
  for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(embedded / name, tmp_path / "hub")
  (tmp_path / "text").write_text("0 1 2 3 4 5 6 7 8 9 " * 4)
  code, printed = converted(capsys, tmp_path, verify=200, verify_text=tmp_path / "text")
  assert code == 1 and "tokens, but --verify wants 200" in printed
  assert not (tmp_path / "roe").exists()
  code, printed = converted(capsys, tmp_path)
  assert code == 0, printed
  assert "against transformers on 20 tokens: largest relative difference" in printed
  fill = tensor_names.Part.fill

  def wrong(self, parameter, tensor, window=None):
    fill(self, parameter, tensor[::-1] if self.parameter == "experts.down" else tensor, window)

  monkeypatch.setattr(tensor_names.Part, "fill", wrong)
  code, printed = converted(capsys, tmp_path, overwrite=True)
  assert code == 1 and "roe is complete, but its logits are not those of transformers" in printed
  assert checkpoint.load_config(tmp_path / "roe").family == "llama"


@pytest.mark.parametrize(
  "arguments, sentence",
  [
    (dict(verify=0), "at least 1 token"),
    (dict(verify_text="no_such_file"), "there is no text file no_such_file"),
    (dict(dry_run=True), "applies to converting a Hugging Face model"),
    ({}, r"not installed: pip install \"roe_jax\[parity\]\""),
  ],
)
def test_what_cannot_be_verified_is_refused_before_converting(
  tmp_path, capsys, monkeypatch, arguments, sentence
):
  write_hub(tmp_path / "hub", "llama")
  if not arguments:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  code, printed = converted(capsys, tmp_path, **arguments)
  assert code == 1 and re.search(sentence, printed), printed
  assert not (tmp_path / "roe").exists()


def emo_logits(torch, hf_config, tensors, tokens):
  """The model of github.com/allenai/EMO (src/vllm_plugin/emo_plugin.py) in plain PyTorch."""
  functional, weights = torch.nn.functional, {n: torch.tensor(w) for n, w in tensors.items()}
  heads, width = hf_config["num_attention_heads"], hf_config["hidden_size"]
  c, size = width // heads, len(tokens)
  groups = heads // hf_config["num_key_value_heads"]
  frequencies = hf_config["rope_theta"] ** (-torch.arange(0, c, 2) / c)
  angles = torch.outer(torch.arange(size), torch.cat([frequencies, frequencies]))

  def norm(x, name):
    return functional.rms_norm(x, (width,), weights[name + ".weight"], hf_config["rms_norm_eps"])

  def turned(x):
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

  def mlp(x, name):
    gate, up, down = (weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

  x = weights["model.embed_tokens.weight"][tokens]
  for layer in range(hf_config["num_hidden_layers"]):
    name = f"model.layers.{layer}"
    h = norm(x, name + ".pre_attention_layernorm")
    q, k, v = (
      (h @ weights[f"{name}.self_attn.{p}_proj.weight"].T).view(size, -1, c).transpose(0, 1)
      for p in "qkv"
    )
    k, v = (part.repeat_interleave(groups, 0) for part in (turned(k), v))
    h = functional.scaled_dot_product_attention(turned(q), k, v, is_causal=True)
    x = x + h.transpose(0, 1).reshape(size, -1) @ weights[name + ".self_attn.o_proj.weight"].T
    h = norm(x, name + ".pre_feedforward_layernorm")
    scores = h @ weights[name + ".mlp.gate.weight"].T
    shared = hf_config["num_shared_experts"]
    split = hf_config["num_experts"] - shared
    parts = [(scores[:, :split], hf_config["num_experts_per_tok"] - shared, 0)]
    parts += [(scores[:, split:], shared, split)] if shared else []
    for logits, count, first in parts:  # each with its own softmax over all of its experts
      gates, chosen = logits.softmax(-1).topk(count)
      for token, slot in np.ndindex(size, count):
        expert = f"{name}.mlp.experts.{first + chosen[token, slot]}"
        x[token] += gates[token, slot] * mlp(h[token], expert)
  return (norm(x, "model.norm") @ weights["lm_head.weight"].T).numpy()


def test_ling_computes_what_glm_does_with_its_weights(tmp_path):
  """BailingMoeV2 is GLM-4.5's architecture with its own names, and one tensor for q, k and v."""
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  glm_config = hf.config_json("glm4_moe")
  state = hf.random_state(glm_config, seed=2)
  tensors = {}
  for name, weight in hf.hub_state(glm_config, state).items():
    for old, new in (
      ("embed_tokens", "word_embeddings"),
      ("self_attn.o_proj", "attention.dense"),
      ("self_attn.q_norm", "attention.query_layernorm"),
      ("self_attn.k_norm", "attention.key_layernorm"),
      ("gate.e_score_correction_bias", "gate.expert_bias"),
    ):
      name = name.replace(old, new)
    tensors[name] = weight
  for layer, kind in ((i, kind) for i in range(3) for kind in ("weight", "bias")):
    at = f"model.layers.{layer}."
    three = [tensors.pop(f"{at}self_attn.{p}_proj.{kind}") for p in "qkv"]
    tensors[f"{at}attention.query_key_value.{kind}"] = np.concatenate(three)
  later = {"model.layers.3.eh_proj.weight": np.zeros((2, 2), np.float32)}  # predicts more tokens
  hf_config = hf.config_json("bailing_moe_v2", torch_dtype="float32", num_nextn_predict_layers=1)
  hf_config |= dict(model_type="bailing_moe", architectures=["BailingMoeV2ForCausalLM"])
  (tmp_path / "hub").mkdir()
  (tmp_path / "hub" / "config.json").write_text(json.dumps(hf_config))
  save_file(tensors | later, tmp_path / "hub" / "model.safetensors")
  convert_from_hugging_face(str(tmp_path / "hub"), str(tmp_path / "roe"))
  params, config = checkpoint.load(tmp_path / "roe")
  tokens = np.random.RandomState(0).randint(0, hf.SMALL["vocab_size"], (2, 20))
  expected = hf.logits(hf.to_model(glm_config, state), tokens)
  assert np.abs(logits(params, config, tokens) - expected).max() < 1e-5 * np.abs(expected).max()
  convert_to_hugging_face(str(tmp_path / "roe"), str(tmp_path / "back"))
  back = load_file(tmp_path / "back" / "model.safetensors")
  assert set(back) == set(tensors)
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(back[name], tensor, err_msg=name)
  # Files in bfloat16 have biases in float32, and stay so.
  half = {n: w if "expert_bias" in n else w.astype(jnp.bfloat16) for n, w in tensors.items()}
  save_file(half, tmp_path / "hub" / "model.safetensors")
  params, config = checkpoints_convert.load(str(tmp_path / "hub"))
  assert config.dtype == "bfloat16"
  bias = [tensors[f"model.layers.{i}.mlp.gate.expert_bias"] for i in (1, 2)]
  np.testing.assert_array_equal(params.layers.correction_bias, bias)
  checkpoints_convert.save_hugging_face(tmp_path / "again", params, config)
  again = load_file(tmp_path / "again" / "model.safetensors")
  assert {n: w.dtype for n, w in again.items()} == {n: w.dtype for n, w in half.items()}


@pytest.mark.parametrize("shared", [1, 0])
def test_emo_computes_what_its_published_code_does(tmp_path, shared):
  torch = pytest.importorskip("torch")
  hf_config = hf.config_json("emo", num_shared_experts=shared, torch_dtype="float32")
  hf_config |= dict(architectures=["EmoForCausalLM"])
  random = np.random.default_rng(3)
  d, f, kv = 32, 16, 16
  shapes = {"model.embed_tokens": (48, d), "model.norm": (d,), "lm_head": (48, d)}
  for layer in range(2):
    block = {"pre_attention_layernorm": (d,), "pre_feedforward_layernorm": (d,)}
    block |= {"self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
    block |= {"self_attn.o_proj": (d, d), "mlp.gate": (9, d)}
    for expert in range(9):
      expert = f"mlp.experts.{expert}"
      block |= {f"{expert}.gate_proj": (f, d), f"{expert}.up_proj": (f, d)}
      block |= {f"{expert}.down_proj": (d, f)}
    shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
  tensors = {
    name + ".weight": (
      random.uniform(0.5, 1.5, s) if "norm" in name else random.normal(0, 0.3, s)
    ).astype(np.float32)
    for name, s in shapes.items()
  }
  (tmp_path / "hub").mkdir()
  (tmp_path / "hub" / "config.json").write_text(json.dumps(hf_config))
  save_file(tensors, tmp_path / "hub" / "model.safetensors")
  tokens = random.integers(48, size=12)
  params, config = checkpoints_convert.load(str(tmp_path / "hub"))
  assert (config.num_experts, config.experts_per_token) == (9 - shared, 3 - shared)
  want = emo_logits(torch, hf_config, tensors, tokens)
  np.testing.assert_allclose(logits(params, config, tokens[None])[0], want, rtol=1e-4, atol=1e-4)
  convert_from_hugging_face(str(tmp_path / "hub"), str(tmp_path / "roe"))
  convert_to_hugging_face(str(tmp_path / "roe"), str(tmp_path / "back"))
  written = json.loads((tmp_path / "back" / "config.json").read_text())
  names = (
    "model_type",
    "architectures",
    "num_experts",
    "num_experts_per_tok",
    "num_shared_experts",
  )
  assert {n: written[n] for n in names} == {n: hf_config[n] for n in names}
  back = load_file(tmp_path / "back" / "model.safetensors")
  assert set(back) == set(tensors)
  for name, tensor in tensors.items():
    if name.endswith("mlp.gate.weight") and shared:
      tensor = np.concatenate([tensor[:8], np.zeros((1, d), np.float32)])  # it has no effect
    np.testing.assert_array_equal(back[name], tensor, err_msg=name)
