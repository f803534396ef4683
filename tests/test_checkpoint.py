import json
import shutil

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from roe_jax import checkpoint, model_formats
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig

OLMOE = ModelConfig(
  family="olmoe",
  vocab_size=48,
  num_layers=5,
  d_model=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  num_experts=8,
  experts_per_token=2,
  d_expert=8,
  context_length=32,
  normalize_gates=False,
  gates_in_model_dtype=True,
  qk_norm=True,
  eos_token_ids=(3,),
  pad_token_id=1,
)
MIXTRAL = OLMOE.replace(
  family="mixtral",
  normalize_gates=True,
  gates_in_model_dtype=False,
  qk_norm=False,
  dtype="bfloat16",
)
LAYER_BYTES = params_lib.num_bytes(OLMOE.replace(num_layers=1))


def initialize(config):
  generator = np.random.default_rng(0)
  return jax.tree.map(
    lambda s: jnp.asarray(generator.standard_normal(s.shape), s.dtype), params_lib.abstract(config)
  )


def assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A checkpoint of several pieces, and its parameters; copy before breaking it."""
  path = tmp_path_factory.mktemp("checkpoint") / "model"
  params = initialize(OLMOE)
  checkpoint.save(path, params, OLMOE, piece_bytes=2 * LAYER_BYTES, provenance={"source": "here"})
  return path, params


@pytest.fixture
def broken(saved, tmp_path):
  return shutil.copytree(saved[0], tmp_path / "broken")


@pytest.mark.parametrize("num_layers", [1, 2, 7, 16])
@pytest.mark.parametrize("budget", [0, 1, 2.5, 3, 100])
def test_pieces_partition_the_layers_within_the_budget(num_layers, budget):
  config = OLMOE.replace(num_layers=num_layers)
  shapes = checkpoint.piece_shapes(config, checkpoint.Piece("", 0, 1))
  layer = sum(s.size * s.dtype.itemsize for s in shapes.values())
  top, *pieces = checkpoint.plan_pieces(config, int(budget * layer))
  assert (top.start, top.stop) == (0, 0)
  assert [i for p in pieces for i in range(p.start, p.stop)] == list(range(num_layers))
  assert all(p.num_layers == 1 or p.num_layers * layer <= budget * layer for p in pieces)


@pytest.mark.parametrize("config", [OLMOE, MIXTRAL])
@pytest.mark.parametrize("piece_bytes", [1, checkpoint.PIECE_BYTES])
def test_load_returns_what_was_saved(tmp_path, config, piece_bytes):
  params = initialize(config)
  (tmp_path / "tok").mkdir()
  (tmp_path / "tok" / "tokenizer.json").write_text("{}")
  checkpoint.save(
    tmp_path / "c",
    params,
    config,
    files=tmp_path / "tok",
    provenance={"source": "test"},
    piece_bytes=piece_bytes,
  )
  loaded, loaded_config = checkpoint.load(tmp_path / "c")
  assert loaded_config == config == checkpoint.load_config(tmp_path / "c")
  assert_equal(loaded, params)
  assert checkpoint.load_provenance(tmp_path / "c") == {"source": "test"}
  assert (tmp_path / "c" / "tokenizer.json").read_text() == "{}"
  assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "tok"]


def test_load_casts_like_numpy(saved):
  path, params = saved
  loaded, config = checkpoint.load(path, dtype="bfloat16")
  assert config == OLMOE.replace(dtype="bfloat16")
  assert_equal(loaded, jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), params))


def test_iterate_pieces_yields_host_arrays_in_order(saved):
  path, params = saved
  pieces = dict(checkpoint.iterate_pieces(path))
  assert tuple(pieces) == checkpoint.load_pieces(path)
  down = [a["experts.down"] for p, a in pieces.items() if p.num_layers]
  assert [len(d) for d in down] == [2, 2, 1]
  assert all(type(d) is np.ndarray for d in down)
  np.testing.assert_array_equal(np.concatenate(down), params.layers.experts.down)


@pytest.mark.parametrize("whole", [True, False])
def test_load_onto_a_mesh_reads_every_part_to_its_device(saved, whole):
  path, params = saved
  mesh = jax.make_mesh((4, 2), ("expert", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  rules = {"experts": "expert", "expert_mlp": "tensor", "heads": "expert", "vocab": "tensor"}
  is_axes = lambda x: isinstance(x, tuple)
  shardings = (
    NamedSharding(mesh, PartitionSpec())
    if whole
    else jax.tree.map(
      lambda axes: NamedSharding(mesh, PartitionSpec(*map(rules.get, axes))),
      params_lib.logical_axes(OLMOE),
      is_leaf=is_axes,
    )
  )
  loaded, _ = checkpoint.load(path, shardings=shardings)
  assert_equal(loaded, params)
  if not whole:
    jax.tree.map(
      lambda x, s: np.testing.assert_(x.sharding.is_equivalent_to(s, x.ndim)), loaded, shardings
    )
    shard = loaded.layers.experts.gate_up.addressable_shards[0].data
    assert shard.shape == (5, 2, 4, 2, 16)


def test_sharded_parameters_are_saved_whole(tmp_path):
  params = initialize(OLMOE)
  mesh = jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
  down = jax.device_put(
    params.layers.experts.down, NamedSharding(mesh, PartitionSpec(None, "expert"))
  )
  sharded = params.replace(
    layers=params.layers.replace(experts=params.layers.experts.replace(down=down))
  )
  checkpoint.save(tmp_path / "c", sharded, OLMOE, piece_bytes=1)
  assert_equal(checkpoint.load(tmp_path / "c")[0], params)


def test_sharding_must_not_split_the_layers(saved):
  mesh = jax.make_mesh(
    (5,), ("x",), devices=jax.devices()[:5], axis_types=(jax.sharding.AxisType.Auto,)
  )
  split = jax.tree.map(
    lambda s: NamedSharding(mesh, PartitionSpec("x" if s.shape[0] == 5 else None)),
    params_lib.describe(OLMOE),
  )
  with pytest.raises(ValueError, match="splits the layer axis"):
    checkpoint.load(saved[0], shardings=split)
  with pytest.raises(ValueError, match="Params tree"):
    checkpoint.load(saved[0], shardings={})


def test_an_interrupted_writer_goes_on_after_its_last_piece(tmp_path):
  params = initialize(OLMOE)
  layers = checkpoint.named_leaves(params.layers)
  arrays = lambda p: (
    {n: x[p.start : p.stop] for n, x in layers.items()}
    if p.num_layers
    else {
      "embedding": params.embedding,
      "final_norm": params.final_norm,
      "unembedding": params.unembedding,
    }
  )

  def writer(fingerprint):
    return checkpoint.Writer(tmp_path / "c", OLMOE, fingerprint=fingerprint, piece_bytes=1)

  with pytest.raises(RuntimeError, match="killed"):
    with writer("a") as w:
      w.write(w.pieces[0], arrays(w.pieces[0]))
      w.write(w.pieces[3], arrays(w.pieces[3]))
      raise RuntimeError("killed")
  for name, hint in (("c", "unfinished"), ("c.partial", "unfinished")):
    with pytest.raises(FileNotFoundError, match=hint):
      checkpoint.load(tmp_path / name)

  # What Orbax leaves of a piece that was being written.
  (tmp_path / "c.partial/params/layers_00001_00002").mkdir()
  (tmp_path / "c.partial/params/top.orbax-checkpoint-tmp-0").mkdir()
  with writer("a") as w:
    assert [p.name for p in w.pieces if w.is_written(p)] == ["top", "layers_00002_00003"]
    with pytest.raises(ValueError, match="already written"):
      w.write(w.pieces[0], arrays(w.pieces[0]))
    for piece in w.pieces:
      if not w.is_written(piece):
        w.write(piece, arrays(piece))
  assert_equal(checkpoint.load(tmp_path / "c")[0], params)
  assert not list((tmp_path / "c" / "params").glob("*tmp*"))


@pytest.mark.parametrize("second", ["other", ""])
def test_unfinished_work_of_another_origin_is_discarded(tmp_path, second):
  params = initialize(OLMOE)
  top = {
    "embedding": params.embedding,
    "final_norm": params.final_norm,
    "unembedding": params.unembedding,
  }
  for fingerprint in ("one" if second else "", second):
    w = checkpoint.Writer(tmp_path / "c", OLMOE, fingerprint=fingerprint)
    assert not any(map(w.is_written, w.pieces))
    w.write(w.pieces[0], top)
  with pytest.raises(ValueError, match="pieces not written: layers_00000_00005"):
    w.finish()


def test_writer_refuses_arrays_that_are_not_the_piece(tmp_path):
  w = checkpoint.Writer(tmp_path / "c", OLMOE)
  top = {"embedding": np.zeros((48, 16), np.float32), "final_norm": np.zeros(16, np.float32)}
  with pytest.raises(ValueError, match="lacks the parameters .'unembedding'"):
    w.write(w.pieces[0], top)
  with pytest.raises(
    ValueError, match=r"unembedding is float32\[16, 48\].*expects float32\[48, 16\]"
  ):
    w.write(w.pieces[0], {**top, "unembedding": top["embedding"].T})


def test_an_existing_target_is_replaced_only_if_asked_and_a_checkpoint(saved, tmp_path):
  target = shutil.copytree(saved[0], tmp_path / "c")
  other = jax.tree.map(lambda x: x + 1, saved[1])
  with pytest.raises(FileExistsError, match="--overwrite"):
    checkpoint.save(target, other, OLMOE)
  checkpoint.save(target, other, OLMOE, overwrite=True)
  assert_equal(checkpoint.load(target)[0], other)
  assert [p.name for p in tmp_path.iterdir()] == ["c"]

  (tmp_path / "link").symlink_to("c")
  checkpoint.save(tmp_path / "link", saved[1], OLMOE, overwrite=True)
  assert (tmp_path / "link").is_symlink()
  assert_equal(checkpoint.load(target)[0], saved[1])
  assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "link"]

  (tmp_path / "thesis").mkdir()
  (tmp_path / "thesis" / "text").write_text("precious")
  with pytest.raises(FileExistsError, match="this program did not write it"):
    checkpoint.save(tmp_path / "thesis", other, OLMOE, overwrite=True)
  (tmp_path / "thesis").rename(tmp_path / "d.partial")
  with pytest.raises(FileExistsError, match="move it away"):
    checkpoint.save(tmp_path / "d", other, OLMOE)
  assert (tmp_path / "d.partial" / "text").read_text() == "precious"


def edit_json(path, **changes):
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate_data(path):
  data = max((path / "params/layers_00002_00004").rglob("d/*"), key=lambda p: p.stat().st_size)
  data.write_bytes(data.read_bytes()[:100])


def flip_bit(path, array):
  """Flips a bit of an array in the file that holds it."""
  data = np.asarray(array).tobytes()[:16]
  file = next(f for f in path.rglob("d/*") if data in f.read_bytes())
  file.write_bytes(file.read_bytes().replace(data, bytes([data[0] ^ 1]) + data[1:]))


def flip_bit_of_small_arrays(path):
  """Flips a bit where Orbax keeps arrays of less than 1 KiB: in a node of its index."""
  (node,) = (path / "params/layers_00004_00005/state/d").iterdir()
  data = node.read_bytes()
  node.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])


@pytest.mark.parametrize(
  "damage,error,message",
  [
    (shutil.rmtree, FileNotFoundError, "there is no checkpoint folder"),
    (
      lambda p: (p / "model_config.json").unlink(),
      FileNotFoundError,
      "has no model_config.json: it is not",
    ),
    (
      lambda p: (p / "model_config.json").rename(p / "config.json"),
      FileNotFoundError,
      "is a Hugging Face folder.*checkpoints_convert --source=",
    ),
    (lambda p: (p / "manifest.json").unlink(), FileNotFoundError, "has no manifest.json"),
    (lambda p: (p / "manifest.json").write_text("[]"), ValueError, "manifest.json must be a JSON"),
    (lambda p: (p / "manifest.json").write_text("{}"), ValueError, "manifest.json has no format"),
    (
      lambda p: edit_json(p / "manifest.json", pieces=[{"name": "top", "start": 0, "stop": True}]),
      ValueError,
      "stop of a piece in .*manifest.json must be an integer, got True",
    ),
    (
      lambda p: edit_json(p / "manifest.json", pieces=[{"name": "../x", "start": 0, "stop": 5}]),
      ValueError,
      r"the pieces of .* are \['../x'\], not",
    ),
    (
      lambda p: edit_json(p / "manifest.json", pieces={}),
      ValueError,
      "pieces of .* must be a list",
    ),
    (
      lambda p: (p / "model_config.json").write_text("[" * 10**5),
      ValueError,
      "the model config is nested too deeply",
    ),
    (lambda p: edit_json(p / "manifest.json", format=99), ValueError, "format 99"),
    (
      lambda p: shutil.rmtree(p / "params/layers_00002_00004"),
      FileNotFoundError,
      "has no piece params/layers_00002_00004",
    ),
    (
      lambda p: edit_json(p / "model_config.json", d_expert=9),
      ValueError,
      r"params/layers_00000_00002.*gate_up is float32\[2, 8, 8, 2, 16\].*\[2, 8, 9, 2, 16\]",
    ),
    (
      lambda p: edit_json(p / "model_config.json", qk_norm=False),
      ValueError,
      "unknown parameters .'attention.key_norm'",
    ),
    (lambda p: edit_json(p / "model_config.json", num_layers=6), ValueError, "6 layers"),
    (lambda p: edit_json(p / "model_config.json", num_heads="x"), ValueError, "num_heads"),
    (truncate_data, ValueError, "params/layers_00002_00004.*is damaged"),
    (
      lambda p: flip_bit(p, initialize(OLMOE).embedding),
      ValueError,
      "params/top.*the checksum of embedding is wrong",
    ),
    (
      lambda p: flip_bit(p, initialize(OLMOE).layers.attention.query[2]),
      ValueError,
      "params/layers_00002_00004.*the checksum of attention.query is wrong",
    ),
    (flip_bit_of_small_arrays, ValueError, "params/layers_00004_00005.*is damaged"),
    (
      lambda p: next((p / "params/top").rglob("_METADATA")).unlink(),
      (ValueError, FileNotFoundError),
      "params/top.*is damaged",
    ),
    (
      lambda p: next((p / "params/top").rglob("manifest.ocdbt")).unlink(),
      ValueError,
      "params/top.*is damaged",
    ),
  ],
)
def test_bad_folders_get_a_sentence(broken, damage, error, message):
  damage(broken)
  with pytest.raises(error, match=message) as info:
    checkpoint.load(broken)
  assert "\n" not in str(info.value)


def test_sharded_and_partial_reads_detect_a_flipped_bit_too(saved, broken, capfd):
  flip_bit(broken, saved[1].layers.experts.gate_up[3, 5])
  mesh = jax.make_mesh((4, 2), ("expert", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  placed = lambda rules: jax.tree.map(
    lambda axes: NamedSharding(mesh, PartitionSpec(*map(rules.get, axes))),
    params_lib.logical_axes(OLMOE),
    is_leaf=lambda x: isinstance(x, tuple),
  )
  piece = "layers_00002_00004"
  wrong = rf"params/{piece} of .*damaged.*\(the checksum of experts.gate_up is wrong\)$"
  for rules in ({"experts": "expert"}, {"experts": "expert", "expert_mlp": "tensor"}):
    with pytest.raises(ValueError, match=wrong):
      checkpoint.load(broken, shardings=placed(rules))
  with pytest.raises(ValueError, match=wrong):
    list(checkpoint.iterate_pieces(broken, [piece]))
  assert capfd.readouterr().err == ""  # the sentence is all
  (first,) = checkpoint.iterate_pieces(broken, ["layers_00000_00002"])
  assert first[0].stop == 2
  for digests in broken.rglob("digests_*.npz"):
    digests.unlink()
  checkpoint.load(broken)  # as what older versions wrote, which cannot be checked


def test_a_saved_checkpoint_has_the_tokenizer_or_a_warning_says_that_it_lacks_one(tmp_path):
  params, config, tokenizer = model_formats.open_model("embedded:wordmath_control")
  checkpoint.save(tmp_path / "with", params, config, tokenizer)
  text = "Tom has 3 apples."
  assert model_formats.load_tokenizer(tmp_path / "with").encode(text) == tokenizer.encode(text)
  with pytest.warns(UserWarning, match="without a tokenizer"):
    checkpoint.save(tmp_path / "without", params, config)
