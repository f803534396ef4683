"""Parameters straight from a Hugging Face folder, against converting and then loading."""

import itertools

import jax
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import pytest

import checkpoints_convert
from checkpoints_convert import convert_from_hugging_face, rules, safetensors_files
from roe_jax import checkpoint, families, sharding
from test_quantized import BF16, config as small_config, write_hub

MESHES = {"expert": dict(expert=4), "all": dict(data=2, expert=2, tensor=2)}


def config(family, **changes):
  """Every mesh fits it in every format."""
  return small_config(family, **dict(num_experts=4, d_expert=256) | changes)


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (name, a), b in zip(checkpoint.named_leaves(got).items(), jax.tree.leaves(want)):
    assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding), name
    for one, other in zip(a.addressable_shards, b.addressable_shards):
      assert one.device == other.device and one.index == other.index
      assert np.asarray(one.data).tobytes() == np.asarray(other.data).tobytes(), name


def shardings_of(config, mesh):
  return sharding.parameter_shardings(sharding.make_mesh(config, **MESHES[mesh]), config)


CASES = [
    *itertools.product(families.FAMILIES, [BF16], [{}]),
    ("olmoe", np.dtype(np.float32), {}), ("mixtral", np.dtype(np.float16), {}),
    ("olmoe", np.dtype(np.float32), dict(dtype="bfloat16")),
    ("gpt_oss", BF16, dict(keep_mxfp4=True)), ("gpt_oss", BF16, dict(dtype="float32")),
    ("gpt_oss", BF16, dict(quantize_experts="int8")),
    ("qwen2_moe", BF16, dict(quantize_experts="int4")),
    ("olmoe", np.dtype(np.float32), dict(quantize_experts="int8", dtype="bfloat16"))]


@pytest.mark.parametrize("family,dtype,arguments", CASES, ids=str)
def test_loading_gives_the_bits_of_converting_and_then_loading(
    tmp_path, monkeypatch, family, dtype, arguments):
  arguments = {"keep_mxfp4": False} | arguments
  write_hub(tmp_path / "hub", config(family), dtype)
  convert_from_hugging_face(str(tmp_path / "hub"), str(tmp_path / "roe"), **arguments)
  want, found = checkpoint.load(tmp_path / "roe")
  assert checkpoints_convert.load_config(str(tmp_path / "hub"), **arguments) == found
  # In the files' own order of bytes everything is one short run: both ways of reading.
  for shortest_run, piece_bytes, mesh in ((1, 1, "expert"), (1, 2**30, "all"), (10**9, 1, "all")):
    monkeypatch.setattr(safetensors_files, "SHORTEST_RUN", shortest_run)
    shardings = shardings_of(found, mesh)
    got, got_config = checkpoints_convert.load(
        str(tmp_path / "hub"), shardings=shardings, piece_bytes=piece_bytes, **arguments)
    assert got_config == found
    assert_same(got, jax.device_put(want, shardings))
  assert_same(checkpoints_convert.load(str(tmp_path / "hub"), **arguments)[0], want)
