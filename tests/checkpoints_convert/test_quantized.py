"""Conversions to and from experts of few bits."""

import json
import math
import re

import fake_hub
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_convert import assert_same_bits, edit_json, load_leaves, read_hub, run

from checkpoints_convert import convert_from_hugging_face, mxfp4, tensor_names
from roe_jax import checkpoint, families, quantization
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig

pytestmark = pytest.mark.slow

BF16 = np.dtype(ml_dtypes.bfloat16)
L, D, F, E = 2, 64, 32, 3
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def config(family, **changes):
  fixed = {"normalize_gates": False} | families.FAMILIES[family].fixed
  sizes = dict(d_shared_expert=16, qkv_bias=True) if family == "qwen2_moe" else {}
  if family == "emo":
    sizes = dict(d_shared_expert=changes.get("d_expert", F))
  if "first_dense_layers" in families.FAMILIES[family].keys:
    sizes = dict(
      d_shared_expert=changes.get("d_expert", F), first_dense_layers=1, d_dense=24, qk_norm=True
    )
  if "kv_lora_rank" in families.FAMILIES[family].keys:
    sizes |= dict(qk_norm=False, num_kv_heads=1, kv_lora_rank=8, v_head_dim=12, rotary_dim=8)
  if family == "gpt_oss":
    sizes = dict(swiglu_limit=7.0, swiglu_alpha=1.702, expert_format="mxfp4")
  return ModelConfig(
    **dict(
      family=family,
      vocab_size=40,
      num_layers=L,
      d_model=D,
      num_heads=4,
      num_kv_heads=2,
      head_dim=16,
      num_experts=E,
      experts_per_token=2,
      d_expert=F,
      context_length=64,
      eos_token_ids=(3,),
      dtype="bfloat16",
    )
    | sizes
    | fixed
    | changes
    | {name: fixed[name] for name in ("num_experts", "experts_per_token") if name in fixed}
  )


def write_hub(folder, config, dtype=BF16, seed=0):
  """Random tensors under the names of the family's table, and its config.json."""
  random = np.random.default_rng(seed)
  layers = checkpoint.Piece("", 0, config.num_expert_layers)
  tensors = {}
  for part in (
    *tensor_names.parts(config, checkpoint.Piece("top")),
    *tensor_names.parts(config, layers),
  ):
    if part.is_bytes:  # all codes; scales of about 2^-6
      low, high = (115, 127) if part.tensor.endswith("scales") else (0, 256)
      tensors[part.tensor] = random.integers(low, high, part.shape, np.uint8)
    else:
      tensors[part.tensor] = random.standard_normal(part.shape, np.float32).astype(dtype)
  folder.mkdir()
  save_file(tensors, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(families.to_hugging_face(config)))
  return tensors


def edit_tensors(folder, change):
  tensors = load_file(folder / "model.safetensors")
  change(tensors)
  save_file(tensors, folder / "model.safetensors")


def decoded(tensors, layer, name):
  """A GPT-OSS matrix `[E, out, in]` of blocks and scales, element by element."""
  prefix = f"model.layers.{layer}.mlp.experts.{name}_"
  blocks, scales = tensors[prefix + "blocks"], tensors[prefix + "scales"]
  e, out, groups, _ = blocks.shape
  result = np.zeros((e, out, 32 * groups), np.float32)
  for index in np.ndindex(result.shape):
    *row, i = index
    byte = int(blocks[(*row, i // 32, i % 32 // 2)])
    nibble = byte >> 4 if i % 2 else byte & 15
    result[index] = FP4[nibble] * 2.0 ** (int(scales[(*row, i // 32)]) - 127)
  return result


def expected_experts(tensors):
  """Both matrices in the library's order, float32."""
  gate_up = np.stack([decoded(tensors, l, "gate_up_proj") for l in range(L)])
  down = np.stack([decoded(tensors, l, "down_proj") for l in range(L)])
  return gate_up.reshape(L, E, F, 2, D), down.swapaxes(2, 3)


def test_the_hubs_blocks_are_even_and_odd_neighbors():
  blocks = np.zeros((2, 3, 16), np.uint8)
  blocks[1, 2, 5] = 0xA7
  codes = mxfp4.from_blocks(blocks)
  assert codes.shape == (2, 96) and codes[1, 2 * 32 + 10] == 7 and codes[1, 2 * 32 + 11] == 10
  assert np.count_nonzero(codes) == 2
  np.testing.assert_array_equal(mxfp4.to_blocks(codes), blocks)


def test_kept_mxfp4_is_the_same_model_and_comes_back_bit_exact(tmp_path, capsys):
  tensors = write_hub(tmp_path / "hub", config("gpt_oss"))
  code, out, errors = run(capsys, source=tmp_path / "hub", target=tmp_path / "roe", keep_mxfp4=True)
  assert (code, errors) == (0, []) and "bfloat16, experts in mxfp4" in out
  leaves, found = load_leaves(tmp_path / "roe")
  assert found == config("gpt_oss") and leaves["layers.experts.down.codes"].dtype == np.uint8
  experts = checkpoint.load(tmp_path / "roe")[0].layers.experts
  for matrix, want in zip((experts.gate_up, experts.down), expected_experts(tensors)):
    np.testing.assert_array_equal(quantization.dequantize(matrix), want)
    np.testing.assert_array_equal(
      quantization.dequantize_on_host(jax.tree.map(np.asarray, matrix)), want
    )
  for dtype in ("source", "float32"):
    back = tmp_path / f"back_{dtype}"
    assert (
      run(
        capsys,
        source=tmp_path / "roe",
        target=back,
        to_hugging_face=True,
        max_shard_size="20KB",
        dtype=dtype,
      )[0]
      == 0
    )
    cast = lambda t: t if dtype == "source" or t.dtype == np.uint8 else t.astype(np.float32)
    assert_same_bits(read_hub(back), {n: cast(t) for n, t in tensors.items()})
    assert (
      json.loads((back / "config.json").read_text())["quantization_config"]["quant_method"]
      == "mxfp4"
    )
  assert (
    run(capsys, source=tmp_path / "back_source", target=tmp_path / "again", keep_mxfp4=True)[0] == 0
  )
  assert_same_bits(load_leaves(tmp_path / "again")[0], leaves)


def test_scales_of_any_bits_are_kept(tmp_path, capsys):
  tensors = write_hub(tmp_path / "hub", config("gpt_oss"))
  name = "model.layers.1.mlp.experts.down_proj_scales"
  tensors[name] = np.random.default_rng(1).integers(0, 256, tensors[name].shape, np.uint8)
  edit_tensors(tmp_path / "hub", lambda t: t.update({name: tensors[name]}))
  run(capsys, source=tmp_path / "hub", target=tmp_path / "roe", keep_mxfp4=True)
  run(capsys, source=tmp_path / "roe", target=tmp_path / "back", to_hugging_face=True)
  assert_same_bits(read_hub(tmp_path / "back"), tensors)


@pytest.mark.parametrize("dtype", ["source", "float32"])
def test_mxfp4_is_decoded_exactly(tmp_path, capsys, dtype):
  tensors = write_hub(tmp_path / "hub", config("gpt_oss"))
  assert run(capsys, source=tmp_path / "hub", target=tmp_path / "roe", dtype=dtype)[0] == 0
  leaves, found = load_leaves(tmp_path / "roe")
  name = "bfloat16" if dtype == "source" else dtype
  assert found == config("gpt_oss", expert_format=None, dtype=name)
  gate_up, down = expected_experts(tensors)
  for leaf, want in (("gate_up", gate_up), ("down", down)):
    got = leaves[f"layers.experts.{leaf}"]
    assert got.dtype.name == name
    np.testing.assert_array_equal(got.astype(np.float32), want)
  transformers = pytest.importorskip("transformers.integrations.mxfp4")
  torch = pytest.importorskip("torch")
  prefix = "model.layers.1.mlp.experts.down_proj_"
  theirs = transformers._convert_moe_packed_tensors(
    *(torch.tensor(tensors[prefix + n]) for n in ("blocks", "scales"))
  )
  np.testing.assert_array_equal(theirs.float().numpy(), down[1])


@pytest.mark.parametrize("named", [False, True])
def test_the_tensors_decide_and_not_what_config_json_says(tmp_path, capsys, named):
  """A re-save in bfloat16 whose config.json may still name MXFP4, and the reverse."""
  packed, plain = config("gpt_oss"), config("gpt_oss", expert_format=None)
  tensors = write_hub(tmp_path / "hub", plain)
  if named:
    edit_json(tmp_path / "hub/config.json", quantization_config={"quant_method": "mxfp4"})
  assert run(capsys, source=tmp_path / "hub", target=tmp_path / "roe")[0] == 0
  leaves, found = load_leaves(tmp_path / "roe")
  assert found == plain
  prefix = "model.layers.1.mlp.experts."
  gate_up = tensors[prefix + "gate_up_proj"]
  np.testing.assert_array_equal(
    leaves["layers.experts.gate_up"][1, :, :, 0], gate_up[..., 0::2].swapaxes(1, 2)
  )
  np.testing.assert_array_equal(
    leaves["layers.experts.gate_up"][1, :, :, 1], gate_up[..., 1::2].swapaxes(1, 2)
  )
  np.testing.assert_array_equal(leaves["layers.experts.down"][1], tensors[prefix + "down_proj"])
  code, _, errors = run(capsys, source=tmp_path / "hub", target=tmp_path / "x", keep_mxfp4=True)
  assert code == 1 and re.search(
    "--keep_mxfp4 is for experts in MXFP4, but the experts of .* are not", errors[0]
  )
  write_hub(tmp_path / "blocks", packed)
  if not named:
    edit_json(tmp_path / "blocks/config.json", quantization_config=None)
  assert run(capsys, source=tmp_path / "blocks", target=tmp_path / "y", keep_mxfp4=True)[0] == 0
  assert checkpoint.load_config(tmp_path / "y") == packed


@pytest.mark.parametrize(
  "family,format,dtype,asked",
  [
    (family, *(("int8", BF16, "source"), ("int4", np.dtype(np.float32), "bfloat16"))[i % 2])
    # One family for each form of the experts' tensors, and packed ones in both formats.
    for i, family in enumerate(
      ["gpt_oss", "gpt_oss", "mixtral", "granitemoe", "deepseek_v3", "qwen2_moe", "llama"]
    )
  ]
  + [("olmoe", "nested:2-4", BF16, "source")],
)
def test_quantized_experts_are_those_of_the_parameters(
  tmp_path, capsys, family, format, dtype, asked
):
  write_hub(tmp_path / "hub", config(family), dtype)
  # The other matrices, too, in every other case.
  projections = "int8" if format == "int4" else None
  formats = dict(quantize_experts=format)
  formats |= dict(quantize_projections=projections) if projections else {}
  for name, arguments in (("plain", {}), ("few", formats | dict(dtype=asked))):
    code, _, errors = run(capsys, source=tmp_path / "hub", target=tmp_path / name, **arguments)
    assert (code, errors) == (0, [])
  wanted, wanted_config = params_lib.quantize(
    *checkpoint.load(tmp_path / "plain"), format, projections
  )
  leaves, found = load_leaves(tmp_path / "few")
  assert found == wanted_config.replace(dtype="bfloat16")
  cast = lambda name, x: np.asarray(
    x.astype("bfloat16") if x.dtype == np.float32 and "correction" not in name else x
  )
  assert_same_bits(leaves, {n: cast(n, x) for n, x in checkpoint.named_leaves(wanted).items()})
  assert checkpoint.load_provenance(tmp_path / "few")["expert_format"] == format
  code, _, errors = run(
    capsys, source=tmp_path / "few", target=tmp_path / "x", to_hugging_face=True
  )
  assert code == 1 and re.search(f"experts in {format} have no Hugging Face form", errors[0])
  # The same from the checkpoint that was converted before.
  if dtype == BF16:
    assert run(capsys, source=tmp_path / "plain", target=tmp_path / "again", **formats)[0] == 0
    assert checkpoint.load_config(tmp_path / "again") == found
    assert_same_bits(load_leaves(tmp_path / "again")[0], leaves)


def test_a_kept_checkpoint_is_quantized_from_its_values(tmp_path, capsys):
  write_hub(tmp_path / "hub", config("gpt_oss"))
  run(capsys, source=tmp_path / "hub", target=tmp_path / "kept", keep_mxfp4=True)
  for source, target in (("hub", "one"), ("kept", "two")):
    assert (
      run(
        capsys,
        source=tmp_path / source,
        target=tmp_path / target,
        quantize_experts="int8",
        dtype="float32",
      )[0]
      == 0
    )
  one, two = (load_leaves(tmp_path / n) for n in ("one", "two"))
  assert one[1] == two[1]
  assert_same_bits(one[0], two[0])


@pytest.mark.parametrize("from_checkpoint", [False, True])
@pytest.mark.parametrize("second", ["int4", "int8"])
def test_an_interrupted_conversion_goes_on_in_the_same_format_only(
  tmp_path, capsys, monkeypatch, from_checkpoint, second
):
  write_hub(tmp_path / "hub", config("olmoe"))
  source = tmp_path / "hub"
  if from_checkpoint:
    source = tmp_path / "plain"
    convert_from_hugging_face(str(tmp_path / "hub"), str(source), piece_bytes=1)
  write, written = checkpoint.Writer.write, []

  def dying_write(self, piece, arrays):
    if written:
      raise KeyboardInterrupt
    written.append(piece.name)
    write(self, piece, arrays)

  monkeypatch.setattr(checkpoint.Writer, "write", dying_write)
  arguments = dict(source=source, target=tmp_path / "roe")
  with pytest.raises(KeyboardInterrupt):
    run(capsys, **arguments, quantize_experts="int4")
  later = []
  monkeypatch.setattr(
    checkpoint.Writer,
    "write",
    lambda self, piece, arrays: (later.append(piece.name), write(self, piece, arrays)),
  )
  assert run(capsys, **arguments, quantize_experts=second)[0] == 0
  assert written == ["top"] and ("top" in later) == (second == "int8")
  wanted, _ = params_lib.quantize(
    *checkpoint.load(source) if from_checkpoint else plain_model(tmp_path), second
  )
  assert_same_bits(
    load_leaves(tmp_path / "roe")[0],
    {n: np.asarray(x) for n, x in checkpoint.named_leaves(wanted).items()},
  )


def plain_model(folder):
  convert_from_hugging_face(str(folder / "hub"), str(folder / "plain"))
  return checkpoint.load(folder / "plain")


EXPERTS = "model.layers.1.mlp.experts."
REFUSALS = {
  "blocks without scales": (
    lambda f: edit_tensors(f, lambda t: t.pop(EXPERTS + "down_proj_scales")),
    {},
    "lacks tensors .*gpt_oss, 2 layers, experts in mxfp4.*: .*down_proj_scales",
  ),
  "scales without blocks": (
    lambda f: edit_tensors(f, lambda t: t.pop(EXPERTS + "gate_up_proj_blocks")),
    {},
    "lacks tensors .*: .*layers.1.*gate_up_proj_blocks",
  ),
  "two forms": (
    lambda f: edit_tensors(
      f, lambda t: t.update({EXPERTS + "down_proj": np.zeros((E, F, D), BF16)})
    ),
    {},
    "experts in two forms .*down_proj and .*_proj_blocks",
  ),
  "numbers for blocks": (
    lambda f: edit_tensors(
      f,
      lambda t: t.update(
        {EXPERTS + "down_proj_scales": t[EXPERTS + "down_proj_scales"].astype(BF16)}
      ),
    ),
    {},
    "down_proj_scales .*has dtype bfloat16, but a gpt_oss model requires uint8",
  ),
  "bytes for numbers": (
    lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": np.ones(D, np.uint8)})),
    {},
    "model.norm.weight .*has dtype uint8, .* requires floating-point numbers",
  ),
  "other quantization": (
    lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq"}),
    {},
    "quantization_config = 'gptq'; supported: mxfp4",
  ),
  "both": (
    lambda f: None,
    dict(keep_mxfp4=True, quantize_experts="int8"),
    "--keep_mxfp4 and --quantize_experts=int8 exclude each other",
  ),
}


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("damage,arguments,message", REFUSALS.values(), ids=REFUSALS)
def test_bad_folders_are_refused_in_a_sentence(
  tmp_path, capsys, damage, arguments, message, dry_run
):
  write_hub(tmp_path / "hub", config("gpt_oss"))
  damage(tmp_path / "hub")
  code, _, errors = run(
    capsys, source=tmp_path / "hub", target=tmp_path / "roe", dry_run=dry_run, **arguments
  )
  assert code == 1 and len(errors) == 1 and re.search(message, errors[0]), errors
  assert [p.name for p in tmp_path.iterdir()] == ["hub"]


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes"])
def test_other_quantizations_are_refused(tmp_path, capsys, method):
  write_hub(tmp_path / "hub", config("olmoe"))
  edit_json(tmp_path / "hub/config.json", quantization_config={"quant_method": method})
  code, _, errors = run(capsys, source=tmp_path / "hub", target=tmp_path / "roe")
  assert code == 1 and re.search(f"quantization_config = '{method}'; supported: none", errors[0])


def test_formats_that_cannot_be_are_refused_in_a_sentence(tmp_path, capsys):
  write_hub(tmp_path / "hub", config("mixtral"))
  write_hub(tmp_path / "odd", config("mixtral", d_model=51))
  hub, few = tmp_path / "hub", tmp_path / "few"
  assert run(capsys, source=hub, target=few, quantize_experts="int4")[0] == 0
  for arguments, message in (
    (dict(source=tmp_path / "odd", quantize_experts="int4"), "even d_model, got 51: use int8"),
    (dict(source=hub, keep_mxfp4=True), "--keep_mxfp4 is for experts in MXFP4"),
    (dict(source=few, quantize_experts="int8"), r"is quantized already \(experts in int4\)"),
    (dict(source=few, quantize_projections="int8"), r"is quantized already \(experts in int4\)"),
    (dict(source=tmp_path / "odd", quantize_projections="int4"), "even d_model, got 51: use int8"),
    (dict(source=hub, to_hugging_face=True, quantize_projections="int8"), "leave them out"),
    (
      dict(source=hub, quantize_experts="int3"),
      "'int3'; choose one of int8, int4, mxfp4, or nested",
    ),
    (dict(source=hub, quantize_experts="mxfp4"), "MXFP4 is kept with --keep_mxfp4"),
    (dict(source=few, to_hugging_face=True, quantize_experts="int8"), "leave them out"),
    (dict(source=few, to_hugging_face=True, keep_mxfp4=True), "leave them out"),
  ):
    code, _, errors = run(capsys, target=tmp_path / "x", **arguments)
    assert code == 1 and re.search(message, errors[0]), errors


@pytest.mark.parametrize(
  "arguments,itemsize,scale_bytes",
  [
    (dict(keep_mxfp4=True), 0.5, 1 / 32),
    (dict(quantize_experts="int4", quantize_projections="int8"), 0.5, 2 / 32),
    (dict(quantize_experts="int8"), 1, 2 / 32),
    (dict(quantize_experts="nested:2-4"), 0.5, 4 * 2 / 32),
    ({}, 2, 0),
  ],
)
def test_dry_run_reports_bytes_of_codes_and_scales(
  tmp_path, capsys, arguments, itemsize, scale_bytes
):
  write_hub(tmp_path / "hub", config("gpt_oss"))
  code, out, errors = run(capsys, source=tmp_path / "hub", dry_run=True, **arguments)
  assert (code, errors) == (0, [])
  size = L * E * F * D
  if scale_bytes:
    row = re.search(r"layers\.experts\.down\.codes .* u?int8 +([0-9,]+)", out)
    assert row[1] == f"{int(size * itemsize):,}"
    row = re.search(r"layers\.experts\.down\.scales .* ([0-9,]+)\n", out)
    assert row[1] == f"{int(size * scale_bytes):,}"
  else:
    assert f"{size * 2:,}" in out
  run(capsys, source=tmp_path / "hub", target=tmp_path / "roe", **arguments)
  assert sum(x.nbytes for x in load_leaves(tmp_path / "roe")[0].values()) == sum(
    int(n.replace(",", ""))
    for n in re.findall(r"^(?:layers|embed|final|unemb)\S* .* ([0-9,]+)$", out, re.M)
  )
  if not arguments:
    code, out, _ = run(capsys, source=tmp_path / "roe", dry_run=True, quantize_experts="int8")
    assert code == 0 and "a roe_jax checkpoint" in out and "experts in int8" in out


def test_large_transposes_are_made_by_blocks():
  """What is copied at a time has few rows, also within each of several experts."""
  big = config("gpt_oss", expert_format=None, d_model=256, d_expert=96)
  for part in tensor_names.parts(big, checkpoint.Piece("", 0, 1)):
    if part.parameter == "experts.gate_up":
      tensor = np.arange(math.prod(part.shape), dtype=np.float32).reshape(part.shape)
      parameter = np.zeros((1, E, 96, 2, 256), np.float32)
      part.fill(parameter, tensor)
      np.testing.assert_array_equal(
        parameter[0], tensor.reshape(E, 256, 96, 2).transpose(0, 2, 3, 1)
      )
      np.testing.assert_array_equal(part.take(parameter), tensor)


@pytest.mark.parametrize(
  "arguments,experts",
  [({}, None), (dict(keep_mxfp4=True), "mxfp4"), (dict(quantize_experts="int4"), "int4")],
)
def test_a_dry_run_on_the_hub_believes_the_files(tmp_path, capsys, monkeypatch, arguments, experts):
  """Also where config.json names neither a dtype nor a quantization."""
  write_hub(tmp_path / "hub", config("gpt_oss"))
  edit_json(tmp_path / "hub/config.json", torch_dtype=None, quantization_config=None)
  fake_hub.serve(monkeypatch, tmp_path / "hub", tmp_path / "snapshot")
  code, out, errors = run(capsys, source="some/model", dry_run=True, **arguments)
  assert (code, errors) == (0, []) and "parameters in bfloat16" in out
  assert not list(tmp_path.glob("snapshot/*.safetensors"))
  assert (f"experts in {experts}" in out) if experts else "experts in" not in out
