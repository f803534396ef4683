import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
import types

from absl import flags, logging
import fake_hub
import huggingface_hub.errors
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
import tokenizers

from checkpoints_convert import (
  ConversionError,
  cli,
  convert_from_hugging_face,
  convert_to_hugging_face,
  hub,
  outputs,
  safetensors_files,
  tensor_names,
)
from roe_jax import checkpoint
from roe_jax import params as params_lib
from roe_jax.presets import PRESETS

BF16 = np.dtype(ml_dtypes.bfloat16)
V, L, D, H, K, C, E, F = 40, 3, 16, 4, 2, 4, 4, 12
HF_CONFIGS = {
  "olmoe": dict(num_experts=E, norm_topk_prob=False),
  "mixtral": dict(num_local_experts=E, head_dim=C, rope_theta=1e6),
}


def hf_config(family, num_layers=L):
  return dict(
    model_type=family,
    vocab_size=V,
    hidden_size=D,
    intermediate_size=F,
    num_hidden_layers=num_layers,
    num_attention_heads=H,
    num_key_value_heads=K,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    eos_token_id=3,
    pad_token_id=1,
    torch_dtype="bfloat16",
    **HF_CONFIGS[family],
  )


def hub_tensors(family, dtype=BF16, num_layers=L, seed=0):
  """Random tensors under the hub's names, written out independently of the tables."""
  generator = np.random.default_rng(seed)
  make = lambda *shape: generator.standard_normal(shape, np.float32).astype(dtype)
  tensors = {
    "model.embed_tokens.weight": make(V, D),
    "model.norm.weight": make(D),
    "lm_head.weight": make(V, D),
  }
  for i in range(num_layers):
    at = f"model.layers.{i}."
    tensors |= {
      at + "input_layernorm.weight": make(D),
      at + "post_attention_layernorm.weight": make(D),
      at + "self_attn.q_proj.weight": make(H * C, D),
      at + "self_attn.k_proj.weight": make(K * C, D),
      at + "self_attn.v_proj.weight": make(K * C, D),
      at + "self_attn.o_proj.weight": make(D, H * C),
    }
    if family == "olmoe":
      tensors |= {
        at + "self_attn.q_norm.weight": make(H * C),
        at + "self_attn.k_norm.weight": make(K * C),
        at + "mlp.gate.weight": make(E, D),
      }
      names = "mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"
    else:
      tensors[at + "block_sparse_moe.gate.weight"] = make(E, D)
      names = tuple("block_sparse_moe.experts.{}." + w for w in ("w1", "w3", "w2"))
    for e in range(E):
      for name, shape in zip(names, ((F, D), (F, D), (D, F))):
        tensors[at + name.format(e) + ".weight"] = make(*shape)
  return tensors


def expected_params(family, tensors, num_layers=L):
  """What the tensors mean as parameters, by name, one element formula each."""
  t = lambda i, name: np.asarray(tensors[f"model.layers.{i}.{name}.weight"])
  moe = "mlp" if family == "olmoe" else "block_sparse_moe"
  gate, up, down = (
    ("gate_proj", "up_proj", "down_proj") if family == "olmoe" else ("w1", "w3", "w2")
  )
  expert = lambda i, e, name: t(i, f"{moe}.experts.{e}.{name}")
  layers = {
    "attention_norm": lambda i: t(i, "input_layernorm"),
    "attention.query": lambda i: t(i, "self_attn.q_proj").reshape(H, C, D),
    "attention.key": lambda i: t(i, "self_attn.k_proj").reshape(K, C, D),
    "attention.value": lambda i: t(i, "self_attn.v_proj").reshape(K, C, D),
    "attention.output": lambda i: t(i, "self_attn.o_proj").T.reshape(H, C, D),
    "moe_norm": lambda i: t(i, "post_attention_layernorm"),
    "router": lambda i: t(i, moe + ".gate"),
    "experts.gate_up": lambda i: np.stack(
      [np.stack([expert(i, e, gate), expert(i, e, up)], axis=1) for e in range(E)]
    ),
    "experts.down": lambda i: np.stack([expert(i, e, down).T for e in range(E)]),
  }
  if family == "olmoe":
    layers["attention.query_norm"] = lambda i: t(i, "self_attn.q_norm").reshape(H, C)
    layers["attention.key_norm"] = lambda i: t(i, "self_attn.k_norm").reshape(K, C)
  return {
    "embedding": tensors["model.embed_tokens.weight"],
    "final_norm": tensors["model.norm.weight"],
    "unembedding": tensors["lm_head.weight"],
  } | {
    f"layers.{name}": np.stack([make(i) for i in range(num_layers)])
    for name, make in layers.items()
  }


def write_hub(folder, family, dtype=BF16, num_shards=3, num_layers=L, seed=0):
  """A folder as on the hub; tensors go round the shards, so experts are spread."""
  tensors = hub_tensors(family, dtype, num_layers, seed)
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(hf_config(family, num_layers)))
  if num_shards == 1:
    save_file(tensors, folder / "model.safetensors")
    return tensors
  shards = [{} for _ in range(num_shards)]
  for i, (name, tensor) in enumerate(tensors.items()):
    shards[i % num_shards][name] = tensor
  weight_map = {}
  for i, shard in enumerate(shards, 1):
    file = f"model-{i:05d}-of-{num_shards:05d}.safetensors"
    save_file(shard, folder / file)
    weight_map |= dict.fromkeys(shard, file)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  return tensors


def read_hub(folder):
  return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def assert_same_bits(got, want):
  assert set(got) == set(want)
  for name in want:
    assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape, name
    assert np.asarray(got[name]).tobytes() == np.asarray(want[name]).tobytes(), name


def load_leaves(path):
  params, config = checkpoint.load(path)
  params_lib.validate(params, config)
  return {n: np.asarray(x) for n, x in checkpoint.named_leaves(params).items()}, config


def run(capsys, **arguments):
  """Runs the command line; returns (exit code, stdout, stderr without progress)."""
  values = flags.FlagValues()
  cli.define_flags(values)
  values(["convert", *(f"--{name}={value}" for name, value in arguments.items())])
  code = cli.run(values)
  captured = capsys.readouterr()
  errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
  return code, captured.out, errors


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
@pytest.mark.parametrize("dtype,num_shards", [(BF16, 3), (np.dtype(np.float32), 1)])
def test_there_and_back_is_bit_exact(tmp_path, capsys, family, dtype, num_shards):
  tensors = write_hub(tmp_path / "hub", family, dtype, num_shards)
  (tmp_path / "hub" / "generation_config.json").write_text('{"eos_token_id": 3}')
  code, out, errors = run(capsys, source=tmp_path / "hub", target=tmp_path / "roe")
  assert (code, errors) == (0, [])
  leaves, config = load_leaves(tmp_path / "roe")
  assert config.family == family and config.dtype == dtype.name
  assert_same_bits(leaves, expected_params(family, tensors))
  assert checkpoint.load_provenance(tmp_path / "roe")["source"] == str(tmp_path / "hub")

  code, out, errors = run(
    capsys,
    source=tmp_path / "roe",
    target=tmp_path / "back",
    to_hugging_face=True,
    max_shard_size="4KB",
  )
  assert (code, errors) == (0, [])
  files = sorted((tmp_path / "back").glob("*.safetensors"))
  assert len(files) > 3
  tensor_bytes = {n: t.nbytes for n, t in tensors.items()}
  assert all(
    len(load_file(f)) == 1 or sum(tensor_bytes[n] for n in load_file(f)) <= 4000 for f in files
  )
  assert_same_bits(read_hub(tmp_path / "back"), tensors)
  assert (tmp_path / "back" / "generation_config.json").exists()
  index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(tensor_bytes.values())
  assert {
    f: sorted(n for n, g in index["weight_map"].items() if g == f)
    for f in set(index["weight_map"].values())
  } == {f.name: sorted(load_file(f)) for f in files}
  # And it can be converted again, which checks the config that was written.
  assert run(capsys, source=tmp_path / "back", target=tmp_path / "again")[0] == 0
  assert_same_bits(load_leaves(tmp_path / "again")[0], leaves)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "back", "hub", "roe"]


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_transformers_models_convert_there_and_back(tmp_path, capsys, family):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  values = {k: v for k, v in hf_config(family).items() if k not in ("model_type", "torch_dtype")}
  config = transformers.AutoConfig.for_model(family, **values)
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
  for parameter in model.parameters():
    torch.nn.init.normal_(parameter)  # norms start as ones, which hide mistakes
  model.save_pretrained(tmp_path / "hub", max_shard_size="8KB")
  assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 2
  assert run(capsys, source=tmp_path / "hub", target=tmp_path / "roe")[0] == 0
  assert_same_bits(
    load_leaves(tmp_path / "roe")[0], expected_params(family, read_hub(tmp_path / "hub"))
  )
  assert (
    run(
      capsys,
      source=tmp_path / "roe",
      target=tmp_path / "back",
      to_hugging_face=True,
      max_shard_size="20KB",
    )[0]
    == 0
  )
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
  assert again.dtype == torch.bfloat16
  for name, tensor in model.state_dict().items():
    assert torch.equal(tensor, again.state_dict()[name]), name
  for name in values:
    if name != "rope_theta":
      assert getattr(again.config, name) == getattr(model.config, name), name


@pytest.mark.parametrize(
  "stored,asked,result",
  [
    (np.float32, "bfloat16", "bfloat16"),
    (BF16, "float32", "float32"),
    (np.float16, "source", "float32"),
  ],
)
def test_dtype_is_cast_as_numpy_does(tmp_path, capsys, stored, asked, result):
  tensors = write_hub(tmp_path / "hub", "olmoe", stored)
  assert run(capsys, source=tmp_path / "hub", target=tmp_path / "roe", dtype=asked)[0] == 0
  leaves, config = load_leaves(tmp_path / "roe")
  assert config.dtype == result
  cast = {n: t.astype(np.dtype(result)) for n, t in tensors.items()}
  assert_same_bits(leaves, expected_params("olmoe", cast))
  run(
    capsys, source=tmp_path / "roe", target=tmp_path / "back", to_hugging_face=True, dtype="float32"
  )
  assert_same_bits(read_hub(tmp_path / "back"), {n: t.astype(np.float32) for n, t in cast.items()})


def edit_json(path, **changes):
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rename_tensors(folder, old, new):
  for number in (1, 2, 3):
    path = folder / f"model-{number:05d}-of-00003.safetensors"
    save_file({re.sub(f"^{old}", new, n): t for n, t in load_file(path).items()}, path)
  edit_index(folder, lambda i: [i.update({re.sub(f"^{old}", new, n): i.pop(n)}) for n in list(i)])


def edit_index(folder, change):
  path = folder / "model.safetensors.index.json"
  index = json.loads(path.read_text())["weight_map"]
  change(index)
  path.write_text(json.dumps({"weight_map": index}))


def edit_shard(folder, change, number=2):
  path = folder / f"model-{number:05d}-of-00003.safetensors"
  tensors = dict(load_file(path))
  change(tensors)
  save_file(tensors, path)


def only_pickles(folder):
  for path in folder.glob("*.safetensors*"):
    path.unlink()
  (folder / "pytorch_model.bin").write_bytes(b"pickle")


def foreign_tokenizer(folder):
  vocabulary = {f"t{i}": i for i in range(V + 1)}
  tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0")).save(
    str(folder / "tokenizer.json")
  )


def in_subfolder(folder):
  (folder / "checkpoint-500").mkdir()
  for path in folder.glob("*.*"):
    path.rename(folder / "checkpoint-500" / path.name)


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4790000000\n"
SHARD = "model-00002-of-00003.safetensors"
Q0 = "model.layers.0.self_attn.q_proj.weight"
REFUSALS = {
  "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
  "broken config": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
  "architecture": (
    lambda f: edit_json(f / "config.json", model_type="bloom"),
    "unsupported architecture.*'bloom'.*supported: olmoe, emo, mixtral",
  ),
  "bomb": (
    lambda f: edit_json(f / "config.json", num_hidden_layers=2000, num_experts=8192),
    "tensors, but the 2,000 layers and 8,192 experts of its config.json require more than",
  ),
  "rope": (
    lambda f: edit_json(f / "config.json", rope_scaling={"rope_type": "dynamic"}),
    "rope type = 'dynamic'",
  ),
  "pickles": (only_pickles, "pytorch_model.bin.*can run arbitrary code"),
  "nothing": (lambda f: [p.unlink() for p in f.glob("model*")], "has no safetensors files"),
  "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "but neither"),
  "bad index": (
    lambda f: (f / "model.safetensors.index.json").write_text("[]"),
    "is not a safetensors index",
  ),
  "missing shard": (lambda f: (f / SHARD).unlink(), f"lacks 1 of the 3 shards.*{SHARD}"),
  "truncated shard": (
    lambda f: os.truncate(f / SHARD, (f / SHARD).stat().st_size - 1),
    f"{SHARD} is not a complete .*not fully covered.*: download",
  ),
  "truncated header": (
    lambda f: os.truncate(f / SHARD, 50),
    f"{SHARD} is not a complete .*header length",
  ),
  "empty shard": (lambda f: os.truncate(f / SHARD, 0), f"{SHARD} is not a complete .*too small"),
  "longer shard": (
    lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes() + b"x"),
    f"{SHARD} is not a complete .*not fully covered",
  ),
  "not safetensors": (
    lambda f: (f / SHARD).write_text("<html>404</html>"),
    f"{SHARD} is not a complete",
  ),
  "index names a phantom": (
    lambda f: edit_index(f, lambda i: i.update(phantom=SHARD)),
    f"index.*lists tensors that {SHARD} does not have: phantom",
  ),
  "not in the index": (
    lambda f: edit_index(f, lambda i: i.pop(Q0)),
    f"tensors that the index does not list there: {Q0}",
  ),
  "missing tensor": (
    lambda f: (
      edit_index(f, lambda i: i.pop("model.norm.weight")),
      edit_shard(f, lambda t: t.pop("model.norm.weight")),
    ),
    r"lacks tensors .*olmoe, 3 layers.*: model\.norm\.weight",
  ),
  "extra tensor": (
    lambda f: (
      edit_index(f, lambda i: i.update(extra=SHARD)),
      edit_shard(f, lambda t: t.update(extra=t["model.norm.weight"])),
    ),
    "has tensors that a olmoe model .*: extra",
  ),
  "more layers": (
    lambda f: edit_json(f / "config.json", num_hidden_layers=4),
    "lacks tensors.*4 layers.*and [0-9]+ more",
  ),
  "wrong shape": (
    lambda f: edit_json(f / "config.json", intermediate_size=F + 1),
    rf"has shape \[{D}, {F}\], but config.json requires \[{D}, {F + 1}\]|"
    rf"has shape \[{F}, {D}\], but config.json requires \[{F + 1}, {D}\]",
  ),
  "integers": (
    lambda f: edit_shard(f, lambda t: t.update({"model.norm.weight": np.ones(D, np.int8)})),
    "model.norm.weight .*has dtype I8",
  ),
  "in two shards": (
    lambda f: edit_shard(f, lambda t: t.update({Q0: np.zeros((H * C, D), BF16)})),
    f"tensors that the index does not list there: {Q0}",
  ),
  "index of numbers": (
    lambda f: edit_index(f, lambda i: i.update({Q0: 1})),
    f"is not a safetensors index .'{Q0}' of weight_map of .* must be text, got 1",
  ),
  "index with paths": (
    lambda f: edit_index(f, lambda i: i.update({Q0: f"../{SHARD}"})),
    "is not a safetensors index .shards must be files in its folder",
  ),
  "nested index": (
    lambda f: (f / "model.safetensors.index.json").write_text("[" * 10**5),
    "is not a safetensors index .*nested too deeply",
  ),
  "pointer": (
    lambda f: (f / SHARD).write_text(POINTER),
    f"Git LFS pointers.*{SHARD}: run `git lfs",
  ),
  "tokenizer pointer": (
    lambda f: (f / "tokenizer.json").write_text(POINTER),
    "Git LFS pointers in place of the files tokenizer.json: run",
  ),
  "adapter": (
    lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}'),
    r"is a PEFT adapter .*of org/base, not a model: merge it .*merge_and_unload\(\)",
  ),
  "unmerged adapter": (
    lambda f: rename_tensors(f, Q0, Q0.replace("weight", "lora_A.default.weight")),
    "has a LoRA adapter that is not merged .*q_proj.lora_A",
  ),
  "peft names": (
    lambda f: rename_tensors(f, "", "base_model.model."),
    "saved from a PEFT model: save what its merge_and_unload",
  ),
  "parallel names": (lambda f: rename_tensors(f, "", "module."), "DistributedDataParallel.*module"),
  "compiled names": (lambda f: rename_tensors(f, "model.", "model._orig_mod."), "torch.compile"),
  "names of an outer model": (lambda f: rename_tensors(f, "", "language_model."), "within another"),
  "names without lm_head": (
    lambda f: rename_tensors(f, "model.", ""),
    "without its lm_head: save the ForCausalLM model",
  ),
  "checkpoints of a run": (in_subfolder, r"no config.json.* has such folders \(checkpoint-500\)"),
  "original files": (
    lambda f: (f / "config.json").rename(f / "params.json"),
    r"a model in its authors' format \(params.json\): use the safetensors",
  ),
  "gguf": (
    lambda f: (f / "config.json").rename(f / "q4.gguf"),
    r"a model in GGUF \(q4.gguf\): give that file",
  ),
  "tokenizer": (foreign_tokenizer, f"ids up to {V}, .* vocabulary has {V} tokens"),
}


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("damage,message", REFUSALS.values(), ids=REFUSALS)
def test_bad_folders_are_refused_in_a_sentence(tmp_path, capsys, damage, message, dry_run):
  write_hub(tmp_path / "hub", "olmoe")
  damage(tmp_path / "hub")
  code, out, errors = run(capsys, source=tmp_path / "hub", target=tmp_path / "roe", dry_run=dry_run)
  assert code == 1 and len(errors) == 1
  assert re.search(message, errors[0]), errors[0]
  assert [p.name for p in tmp_path.iterdir()] == ["hub"]


def test_targets_and_arguments_are_refused_in_a_sentence(tmp_path, capsys):
  write_hub(tmp_path / "hub", "mixtral")
  source, target = tmp_path / "hub", tmp_path / "roe"
  assert run(capsys, source=source, target=target)[0] == 0
  before = load_leaves(target)[0]
  for arguments, message in (
    (dict(source=source, target=target), "exists and is complete: choose.*--overwrite"),
    (dict(source=source), "--target is missing"),
    (dict(source=target, target=tmp_path / "x"), "already a .*--to_hugging_face"),
    (dict(source=source, target=tmp_path / "x", to_hugging_face=True), "is a Hugging Face folder"),
    (dict(source=target, target=source, to_hugging_face=True), "--overwrite"),
    (dict(source=source, target=source, overwrite=True), "no manifest.json"),
    (
      dict(source=tmp_path / "absent", target=tmp_path / "x"),
      "neither a folder, a .gguf file nor a hub",
    ),
    (dict(source=target, target=tmp_path / "x", max_shard_size="5 apples"), "like 5GB"),
  ):
    code, _, errors = run(capsys, **arguments)
    assert code == 1 and re.search(message, errors[0]), errors
  with outputs.held(str(target), outputs.WHOLE_FOLDER):
    code, _, errors = run(capsys, source=source, target=target, overwrite=True)
    assert code == 1 and f"is being written by process {os.getpid()}" in errors[0]
  # A target that contains the source.
  source.rename(target / "hub")
  code, _, errors = run(capsys, source=target / "hub", target=target, overwrite=True)
  assert code == 1 and "has the source" in errors[0]
  (target / "hub").rename(source)
  shutil.rmtree(source)
  other = write_hub(source, "mixtral", seed=1)
  assert run(capsys, source=source, target=target, overwrite=True)[0] == 0
  assert_same_bits(load_leaves(target)[0], expected_params("mixtral", other))
  assert not np.array_equal(before["embedding"], other["model.embed_tokens.weight"])


@pytest.mark.parametrize(
  "spans", [[(0, 8), (4, 12)], [(0, 8), (0, 8)], [(0, 8), (12, 20)], [(4, 8)]]
)
def test_tensors_that_overlap_or_leave_holes_are_refused(tmp_path, spans):
  header = {
    f"t{i}": {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": [start, stop]}
    for i, (start, stop) in enumerate(spans)
  }
  text = json.dumps(header).encode()
  data = len(text).to_bytes(8, "little") + text + bytes(max(stop for _, stop in spans))
  (tmp_path / "model.safetensors").write_bytes(data)
  with pytest.raises(ConversionError, match="is not a complete safetensors file .*invalid offset"):
    safetensors_files.read_headers(tmp_path)


def test_sizes_are_parsed():
  for text, size in (("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("7", 7), ("20kb", 20000)):
    assert cli.parse_size(text) == size


def convert_by_layer(source, target):
  return convert_from_hugging_face(str(source), str(target), piece_bytes=1)


@pytest.mark.parametrize("changed", [False, True])
def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch, changed):
  tensors = write_hub(tmp_path / "hub", "olmoe")
  written, write = [], checkpoint.Writer.write

  def dying_write(self, piece, arrays):
    if len(written) == 2:
      raise KeyboardInterrupt
    write(self, piece, arrays)
    written.append(piece.name)

  monkeypatch.setattr(checkpoint.Writer, "write", dying_write)
  with pytest.raises(KeyboardInterrupt):
    convert_by_layer(tmp_path / "hub", tmp_path / "roe")
  for name in ("roe", "roe.partial"):
    with pytest.raises(FileNotFoundError, match="unfinished"):
      checkpoint.load(tmp_path / name)

  if changed:
    tensors = write_hub(tmp_path / "hub", "olmoe", seed=1)
    os.utime(tmp_path / "hub" / SHARD, (0, 0))
  second = []
  monkeypatch.setattr(
    checkpoint.Writer,
    "write",
    lambda self, piece, arrays: (second.append(piece.name), write(self, piece, arrays)),
  )
  convert_by_layer(tmp_path / "hub", tmp_path / "roe")
  assert written == ["top", "layers_00000_00001"]
  assert second == (written if changed else []) + ["layers_00001_00002", "layers_00002_00003"]
  assert_same_bits(load_leaves(tmp_path / "roe")[0], expected_params("olmoe", tensors))


def test_an_interrupted_export_goes_on_after_its_last_file(tmp_path, monkeypatch):
  write_hub(tmp_path / "hub", "olmoe")
  convert_by_layer(tmp_path / "hub", tmp_path / "roe")

  def export(name):
    convert_to_hugging_face(str(tmp_path / "roe"), str(tmp_path / name), max_shard_bytes=4000)

  export("whole")
  taken, take, limit = [], tensor_names.Part.take, 21

  def dying_take(self, array):
    if len(taken) == limit:
      raise KeyboardInterrupt
    taken.append(self.tensor)
    return take(self, array)

  monkeypatch.setattr(tensor_names.Part, "take", dying_take)
  with pytest.raises(KeyboardInterrupt):
    export("killed")
  there = {
    name for path in (tmp_path / "killed.partial").glob("*.safetensors") for name in load_file(path)
  }
  assert 0 < len(there) < limit and there <= set(taken)
  taken, limit = [], None
  export("killed")
  assert taken and not there & set(taken)
  files = sorted(p.name for p in (tmp_path / "whole").iterdir())
  assert files == sorted(p.name for p in (tmp_path / "killed").iterdir())
  for name in files:
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_memory_is_that_of_one_layer_not_of_the_model(tmp_path, monkeypatch):
  num_layers = 24
  tensors = write_hub(tmp_path / "hub", "mixtral", np.float32, num_layers=num_layers)
  layer = sum(t.nbytes for t in tensors.values()) / num_layers
  del tensors
  held = []
  # Orbax's own bookkeeping is larger than these layers: what is traced is the
  # arrays that are alive when a piece is handed over, and none may stay. Small
  # cycles would, until they are looked for: all that was there before is left out.
  monkeypatch.setattr(
    checkpoint.Writer,
    "write",
    lambda self, piece, arrays: (
      gc.collect(),
      held.append(tracemalloc.get_traced_memory()),
      self._written.add(piece.name),
    ),
  )
  gc.freeze()
  tracemalloc.start()
  try:
    convert_by_layer(tmp_path / "hub", tmp_path / "roe")
  finally:
    tracemalloc.stop()
    gc.unfreeze()
  assert len(held) == num_layers + 1
  growth = np.array([current for current, _ in held]) - held[0][0]
  assert np.ptp(growth[1:]) < layer
  assert max(growth) < 3 * layer < num_layers * layer / 4


def test_dry_run_reports_and_writes_nothing(tmp_path, capsys):
  write_hub(tmp_path / "hub", "olmoe")
  target = tmp_path / "roe"
  code, out, _ = run(capsys, source=tmp_path / "hub", target=target, dry_run=True)
  assert code == 0 and [p.name for p in tmp_path.iterdir()] == ["hub"]
  for text in (
    "layers.experts.gate_up",
    f"[{L}, {E}, {F}, 2, {D}]",
    "bfloat16",
    "pieces: 2",
    f"{L * E * D * 2 * F * 2:,}",
    "on disk and in memory",
    "devices:",
    "cpu 7",
  ):
    assert text in out
  run(capsys, source=tmp_path / "hub", target=target)
  code, out, _ = run(capsys, source=target, dry_run=True, to_hugging_face=True, dtype="float32")
  assert code == 0 and f"{L * E * D * 2 * F * 4:,}" in out


@pytest.mark.parametrize("twice", [False, True])
def test_of_a_hub_model_only_the_files_that_are_read_are_downloaded(
  tmp_path, capsys, monkeypatch, twice
):
  """Shards have the names of the index; before the weights, their headers decide the dtype."""
  tensors = write_hub(tmp_path / "hub", "mixtral")
  hub_config = json.loads((tmp_path / "hub" / "config.json").read_text())
  del hub_config["torch_dtype"]
  (tmp_path / "hub" / "config.json").write_text(json.dumps(hub_config))
  rename = lambda name: "model.safetensors-" + name.removeprefix("model-").split(".")[0]
  edit_index(tmp_path / "hub", lambda i: i.update({n: rename(f) for n, f in i.items()}))
  for path in tmp_path.glob("hub/model-*.safetensors"):
    path.rename(path.with_name(rename(path.name)))
  for name in ("pytorch_model.bin", "consolidated.safetensors", "README.md"):
    (tmp_path / "hub" / name).write_text("foreign")
  weights = sorted({rename(f"model-{i:05d}-of-00003.safetensors") for i in (1, 2, 3)})
  if twice:
    tensors = hub_tensors("mixtral", np.float16, seed=1)
    save_file(tensors, tmp_path / "hub" / "model.safetensors")
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    weights = ["model.safetensors"]
  calls = fake_hub.serve(monkeypatch, tmp_path / "hub", tmp_path / "snapshot")
  monkeypatch.chdir(tmp_path)
  code, out, _ = run(capsys, source="some/model", dry_run=True)
  dtypes = ("float16", "float32") if twice else ("bfloat16", "bfloat16")
  assert code == 0 and f"dtypes in its files: {dtypes[0]}" in out
  assert f"parameters in {dtypes[1]}" in out
  assert hub.load_config("hf:some/model").dtype == dtypes[1]
  assert calls == [(None, ["config.json", "model.safetensors.index.json"])] * 2
  del calls[:]
  assert run(capsys, source="some/model", target="roe", revision="main")[0] == 0
  assert_same_bits(load_leaves(tmp_path / "roe")[0], expected_params("mixtral", tensors))
  assert calls == [("main", ["config.json", "model.safetensors.index.json"]), ("main", weights)]


def test_a_hub_model_that_cannot_be_read_is_refused_before_its_weights_arrive(
  tmp_path, monkeypatch
):
  write_hub(tmp_path / "hub", "olmoe")
  rename_tensors(tmp_path / "hub", "", "module.")
  fake_hub.serve(monkeypatch, tmp_path / "hub", tmp_path / "snapshot")
  with pytest.raises(ConversionError, match="DistributedDataParallel"):
    hub.find("some/model")
  assert not list((tmp_path / "snapshot").glob("*.safetensors"))


@pytest.mark.parametrize(
  "source,revision,want",
  [
    ("some/model", None, None),
    ("some/model", "v1", "v1"),
    ("some/model@v1", None, "v1"),
    ("some/model@refs/pr/3", None, "refs/pr/3"),
    ("some/model@v1", "v1", "v1"),
  ],
)
def test_a_hub_name_may_have_a_revision(source, revision, want, tmp_path, monkeypatch):
  write_hub(tmp_path, "mixtral")
  calls = []

  def snapshot_download(name, *, revision, allow_patterns):
    calls.append((name, revision))
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  assert hub.find(source, revision) == tmp_path
  assert hub.load_config(source, revision=revision).family == "mixtral"
  assert calls == [("some/model", want)] * 2


def test_a_hub_name_with_two_revisions_or_an_empty_one_is_refused():
  with pytest.raises(
    ConversionError, match="some/model@v1 names a revision and so does --revision=v2"
  ):
    hub.find("some/model@v1", "v2")
  with pytest.raises(ConversionError, match="neither a folder, .* nor a hub name"):
    hub.find("some/model@")


def hub_error(kind, status=None, cause=None):
  """An exception of the hub's library; `cause` is why it then looked into the cache."""
  response = types.SimpleNamespace(headers={}, request=None, status_code=status)
  error = kind("Client Error.\nmore", **({} if status is None else {"response": response}))
  error.__cause__ = cause
  return error


errors = huggingface_hub.errors
LIMITED = hub_error(errors.HfHubHTTPError, 429)
DENIED = hub_error(errors.HfHubHTTPError, 403)
LOG_IN = "`hf auth login` or set HF_TOKEN"


@pytest.mark.parametrize(
  "error, message",
  [
    (
      hub_error(errors.GatedRepoError, 401),
      f"gated: accept its terms on .*/some/model, .*{LOG_IN}",
    ),
    (hub_error(errors.RepositoryNotFoundError, 401), f"no such model, or it is private.*{LOG_IN}"),
    (hub_error(errors.RevisionNotFoundError, 404), "has no revision 'v9': .*/some/model/tree/main"),
    (LIMITED, f"limits the number of requests.*wait .*{LOG_IN}"),
    (hub_error(errors.LocalEntryNotFoundError, cause=LIMITED), "limits the number of requests"),
    (hub_error(errors.LocalEntryNotFoundError, cause=DENIED), rf"denied \(403\): .*{LOG_IN}"),
    (hub_error(errors.LocalEntryNotFoundError, cause=OSError()), "the hub cannot be reached"),
    (
      hub_error(errors.LocalEntryNotFoundError, cause=errors.OfflineModeIsEnabled()),
      "not in the cache: unset HF_HUB_OFFLINE",
    ),
    (RuntimeError("no route to the hub\nmore"), "downloaded from the hub: no route to the hub$"),
  ],
)
def test_what_the_hub_refuses_gets_advice(monkeypatch, error, message):
  def snapshot_download(name, **kwargs):
    raise error

  monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
  with pytest.raises(ConversionError, match=message) as info:
    hub.find("some/model@v9")
  assert "\n" not in str(info.value)


def test_a_hub_model_without_safetensors_is_refused(tmp_path, monkeypatch):
  write_hub(tmp_path / "hub", "olmoe")
  fake_hub.serve(monkeypatch, tmp_path / "hub", tmp_path / "snapshot")

  def get_safetensors_metadata(*args, **kwargs):
    raise errors.NotASafetensorsRepoError("not a safetensors repo")

  monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", get_safetensors_metadata)
  with pytest.raises(ConversionError, match="some/model .*: it has no safetensors files"):
    hub.load_config("some/model")


@pytest.mark.parametrize("shards", ["whole", "gone", "one gone"])
def test_a_single_file_has_precedence_over_shards_as_in_transformers(tmp_path, caplog, shards):
  transformers = pytest.importorskip("transformers")
  write_hub(tmp_path / "hub", "olmoe")
  single = hub_tensors("olmoe", seed=1)
  save_file(single, tmp_path / "hub" / "model.safetensors")
  for path in sorted(tmp_path.glob("hub/model-*"))[
    : {"whole": 0, "gone": 3, "one gone": 1}[shards]
  ]:
    path.unlink()
  convert_by_layer(tmp_path / "hub", tmp_path / "roe")
  leaves = load_leaves(tmp_path / "roe")[0]
  assert_same_bits(leaves, expected_params("olmoe", single))
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype="float32")
  np.testing.assert_array_equal(
    model.lm_head.weight.detach(), leaves["unembedding"].astype(np.float32)
  )
  assert "model.safetensors is read, as transformers does" in caplog.text


def test_shards_that_the_index_does_not_name_are_ignored_aloud(tmp_path, caplog):
  tensors = write_hub(tmp_path / "hub", "olmoe")
  save_file({"x": np.zeros(1, BF16)}, tmp_path / "hub" / "model-00001-of-00002.safetensors")
  convert_by_layer(tmp_path / "hub", tmp_path / "roe")
  assert_same_bits(load_leaves(tmp_path / "roe")[0], expected_params("olmoe", tensors))
  assert "model-00001-of-00002.safetensors ignored" in caplog.text


@pytest.mark.parametrize("stored", ["embedding", "unembedding", "both"])
def test_tied_embeddings_and_buffers(tmp_path, caplog, stored):
  """Buffers are skipped, also where the dtype is found; both arrays differ only if both are there,
  as in transformers."""
  transformers = pytest.importorskip("transformers")
  tensors = write_hub(tmp_path / "hub", "olmoe", num_shards=1)
  edit_json(tmp_path / "hub" / "config.json", tie_word_embeddings=True)
  if stored != "both":
    del tensors["lm_head.weight" if stored == "embedding" else "model.embed_tokens.weight"]
  buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(L)}
  save_file(
    tensors | dict.fromkeys(buffers, np.ones(C // 2, np.float32)),
    tmp_path / "hub" / "model.safetensors",
  )
  convert_by_layer(tmp_path / "hub", tmp_path / "roe")
  leaves, config = load_leaves(tmp_path / "roe")
  assert config.dtype == "bfloat16" and "inv_freq" in caplog.text
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype="float32")
  want = model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()
  assert np.array_equal(*want) == (stored != "both")
  for name, weight in zip(("embedding", "unembedding"), want):
    np.testing.assert_array_equal(leaves[name].astype(np.float32), weight)


def test_the_progress_bar_is_alone(tmp_path, capsys, caplog):
  """Programs log at INFO, as Orbax does for every step."""
  write_hub(tmp_path / "hub", "olmoe", num_layers=1)
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.INFO)
  try:
    assert run(capsys, source=tmp_path / "hub", target=tmp_path / "roe")[0] == 0
    assert [r.getMessage() for r in caplog.records if r.levelname in ("INFO", "DEBUG")] == []
  finally:
    logging.set_verbosity(verbosity)


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"pangu-ultra-moe"}))  # it has no table
def test_tables_fill_every_parameter_of_the_published_models(name):
  config = PRESETS[name]
  tensor_names.check_table(config)
  names = [
    (part.tensor, part.parameter)
    for piece in checkpoint.plan_pieces(config)
    for part in tensor_names.parts(config, piece)
  ]
  assert len(names) == len(set(names))


@pytest.mark.parametrize(
  "change,message",
  [
    (lambda table: table[:-1], "does not fill exactly: experts.down"),
    (lambda table: (*table, table[0]), "does not fill exactly: embedding"),
    (lambda table: (*table, tensor_names.Rule("x", "bias", "D -> D")), "fills bias"),
  ],
)
def test_a_table_with_a_mistake_is_found_before_any_work(monkeypatch, change, message):
  monkeypatch.setitem(tensor_names.FAMILIES, "olmoe", change(tensor_names.FAMILIES["olmoe"]))
  with pytest.raises(ConversionError, match=message):
    tensor_names.check_table(PRESETS["olmoe-1b-7b"])


def test_the_module_runs_and_fails_without_a_traceback(tmp_path):
  result = subprocess.run(
    [sys.executable, "-m", "checkpoints_convert", f"--source={tmp_path}", "--target=x"],
    capture_output=True,
    text=True,
  )
  assert result.returncode == 1
  assert result.stderr.strip() == (
    f"error: {tmp_path} has no config.json: it is not a Hugging Face model folder"
  )


def test_a_conversion_keeps_the_chat_template_and_says_what_it_cannot_read(tmp_path, caplog):
  write_hub(tmp_path / "hub", "olmoe", num_layers=1)
  for name in ("tokenizer.model", "chat_template.json", "added_tokens.json"):
    (tmp_path / "hub" / name).write_text("{}")
  convert_by_layer(tmp_path / "hub", tmp_path / "roe")
  assert "has tokenizer.model but no tokenizer.json" in caplog.text
  assert (tmp_path / "roe" / "chat_template.json").read_text() == "{}"
  assert (tmp_path / "roe" / "added_tokens.json").is_file()
