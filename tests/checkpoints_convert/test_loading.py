"""Parameters straight from a Hugging Face folder, against converting and then loading."""

import io
import itertools

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_quantized import BF16, write_hub
from test_quantized import config as small_config

import checkpoints_convert
from checkpoints_convert import convert_from_hugging_face, safetensors_files
from roe_jax import checkpoint, families, sharding
from roe_jax import params as params_lib

pytestmark = pytest.mark.slow

MESHES = {"expert": dict(expert=4), "all": dict(data=2, expert=2, tensor=2)}


def config(family, **changes):
  """Every mesh fits it in every format."""
  wide = {"qwen2_moe": dict(d_shared_expert=256), "deepseek_v3": dict(d_dense=256)}
  sizes = dict(num_experts=4, d_expert=256) | wide.get(family, {})
  return small_config(family, **sizes | changes)


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (name, a), b in zip(checkpoint.named_leaves(got).items(), jax.tree.leaves(want)):
    assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding), name
    for one, other in zip(a.addressable_shards, b.addressable_shards):
      assert one.device == other.device and one.index == other.index
      assert np.asarray(one.data).tobytes() == np.asarray(other.data).tobytes(), name


def shardings_of(config, mesh):
  sizes = MESHES[mesh] | (dict(expert=1, tensor=2) if config.num_experts == 1 else {})
  return sharding.parameter_shardings(sharding.make_mesh(config, **sizes), config)


CASES = [
  *itertools.product(families.FAMILIES, [BF16], [{}]),
  ("olmoe", np.dtype(np.float32), {}),
  ("mixtral", np.dtype(np.float16), {}),
  ("olmoe", np.dtype(np.float32), dict(dtype="bfloat16")),
  ("gpt_oss", BF16, dict(keep_mxfp4=True)),
  ("gpt_oss", BF16, dict(dtype="float32")),
  ("gpt_oss", BF16, dict(quantize_experts="int8")),
  ("qwen2_moe", BF16, dict(quantize_experts="int4", quantize_projections="int8")),
  ("olmoe", np.dtype(np.float32), dict(quantize_experts="int8", dtype="bfloat16")),
  ("deepseek_v3", BF16, dict(quantize_projections="int4")),
]


@pytest.mark.parametrize("family,dtype,arguments", CASES, ids=str)
def test_loading_gives_the_bits_of_converting_and_then_loading(
  tmp_path, monkeypatch, family, dtype, arguments
):
  arguments = {"keep_mxfp4": False} | arguments
  write_hub(tmp_path / "hub", config(family), dtype)
  convert_from_hugging_face(str(tmp_path / "hub"), str(tmp_path / "roe"), **arguments)
  want, found = checkpoint.load(tmp_path / "roe")
  assert checkpoints_convert.load_config(str(tmp_path / "hub"), **arguments) == found
  # Every run of bytes by itself, and tensors whole.
  ways = [(1, 1, "expert"), (10**9, 1, "all")]
  for shortest_run, piece_bytes, mesh in (
    *ways,
    *([(1, 2**30, "all")] if len(arguments) > 1 else ()),
  ):
    monkeypatch.setattr(safetensors_files, "SHORTEST_RUN", shortest_run)
    shardings = shardings_of(found, mesh)
    got, got_config = checkpoints_convert.load(
      str(tmp_path / "hub"), shardings=shardings, piece_bytes=piece_bytes, **arguments
    )
    assert got_config == found
    assert_same(got, jax.device_put(want, shardings))
  assert_same(checkpoints_convert.load(str(tmp_path / "hub"), **arguments)[0], want)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize(
  "arguments", [dict(keep_mxfp4=True), dict(quantize_experts="int8"), {}], ids=str
)
def test_any_sharding_will_do_that_keeps_the_layers_whole(tmp_path, axis, arguments):
  """Also such as split codes within a byte's neighbors, or groups of weights."""
  write_hub(tmp_path / "hub", config("gpt_oss"))
  load = lambda shardings: checkpoints_convert.load(
    str(tmp_path / "hub"), shardings=shardings, **{"keep_mxfp4": False} | arguments
  )
  want, found = load(None)
  mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))

  def split(leaf):
    names = [None] * leaf.ndim
    if leaf.ndim > 2 and leaf.shape[axis] % 4 == 0:
      names[axis] = "x"
    return NamedSharding(mesh, P(*names))

  shardings = jax.tree.map(split, params_lib.abstract(found))
  assert_same(load(shardings)[0], jax.device_put(want, shardings))
  everywhere = NamedSharding(mesh, P())
  assert_same(load(everywhere)[0], jax.device_put(want, everywhere))
  with pytest.raises(ValueError, match="splits the layer axis"):
    load(
      jax.tree.map(
        lambda x: NamedSharding(jax.make_mesh((2,), ("x",)), P("x")) if x.ndim > 2 else everywhere,
        want,
      )
    )


def test_parts_of_tensors_are_what_numpy_slices_and_their_bytes_alone_are_read(
  tmp_path, monkeypatch
):
  tensor = np.arange(4 * 6 * 5 * 8, dtype=np.float32).reshape(24, 40)
  save_file({"other": tensor[:3], "t": tensor}, tmp_path / "model.safetensors")
  info = safetensors_files.read_headers(tmp_path)["t"]
  counted = io_counter(monkeypatch)
  for spans in itertools.product(
    [(0, 4), (1, 3)], [(0, 6), (2, 3)], [(0, 5), (1, 5)], [(0, 8), (4, 7)]
  ):
    counted.clear()
    found = info.read((4, 6, 5, 8), spans)
    want = tensor.reshape(4, 6, 5, 8)[tuple(slice(*span) for span in spans)]
    np.testing.assert_array_equal(found, want)
    assert sum(counted) == want.nbytes
  # Runs of less than 100 bytes are not worth it: rows of 8 numbers have 32.
  monkeypatch.setattr(safetensors_files, "SHORTEST_RUN", 100)
  assert info.widened((4, 6, 5, 8), ((1, 3), (2, 3), (1, 4), (1, 8))) == (
    (1, 3),
    (2, 3),
    (0, 5),
    (0, 8),
  )
  assert info.widened((4, 6, 5, 8), ((1, 3), (2, 3), (1, 5), (0, 8))) == (
    (1, 3),
    (2, 3),
    (1, 5),
    (0, 8),
  )


def io_counter(monkeypatch):
  """A list that gets the count of every read of the module."""
  counts = []

  class Counting(io.FileIO):
    def readinto(self, target):
      count = super().readinto(target)
      counts.append(count)
      return count

  monkeypatch.setattr(
    safetensors_files, "open", lambda path, mode, buffering: Counting(path, mode), raising=False
  )
  return counts
