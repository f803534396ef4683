"""Plans of bits: rules, exact means and bytes, and checkpoints with a plan."""

import json
import math
import re

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest
from test_convert import load_leaves, run
import tiny

from checkpoints_convert import quantize_checkpoint
from roe_jax import bit_plans, checkpoint, compensation, native, quantization, sharding
from roe_jax import experts as experts_lib
from roe_jax import params as params_lib
from roe_jax.nested import Nested
from roe_jax.params import ExpertParams
from roe_jax.quantization import dequantize_on_host

FORMAT = Nested(2, 4)
CONFIG = tiny.config("olmoe")
L, E = CONFIG.num_layers, CONFIG.num_experts


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("plans") / "source"
  checkpoint.save(folder, tiny.params(CONFIG), CONFIG, piece_bytes=1)
  return folder


def evidence(params=None):
  return bit_plans.Evidence(params or tiny.params(CONFIG), CONFIG, tiny.texts([9, 5]))


@pytest.mark.parametrize("mean", [2, 2.4, 3, 3.5, 4])
@pytest.mark.parametrize("size", [(3, 8), (1, 7)])
def test_the_mean_is_met_to_one_plane(size, mean):
  scores = np.random.default_rng(0).random(size)
  plan = bit_plans.allocate(scores, mean, FORMAT)
  assert abs(plan.sum() - mean * plan.size) <= 0.5
  order = np.argsort(-scores.ravel())
  assert np.all(np.diff(plan.ravel()[order]) <= 0) and np.sum(plan == 3) <= 1


def test_bytes_are_those_of_the_planes_that_are_used():
  plan = bit_plans.allocate(np.arange(L * E, dtype=float).reshape(L, E), 2.5, FORMAT)
  of_bits = [params_lib.num_bytes(CONFIG.replace(expert_format=f"nested:2-{b}")) for b in (2, 4)]
  plain = params_lib.num_bytes(CONFIG) - 4 * 3 * L * E * CONFIG.d_expert * CONFIG.d_model
  expected = sum((of_bits[b // 4] - plain) / (L * E) for b in plan.ravel())
  assert bit_plans.num_bytes(plan, CONFIG, FORMAT) == expected


def test_an_expert_with_a_plan_is_the_expert_of_so_many_bits():
  array = np.random.RandomState(0).standard_normal((1, 3, 64, 32)).astype(np.float32)
  matrix = quantization.quantize(array, "nested:2-4", -2)
  found = dequantize_on_host(bit_plans.apply(matrix, np.array([[2, 4, 3]])))
  for expert, bits in enumerate((2, 4, 3)):
    own = dequantize_on_host(quantization.first_planes(matrix, bits))
    np.testing.assert_array_equal(found[0, expert], own[0, expert])


def test_rules_rank_by_what_they_are_named_for():
  params = tiny.params(CONFIG)
  down = np.array(params.layers.experts.down)
  down[1, 2, 0, 0] = 1000
  experts = params.layers.experts.replace(down=down)
  of = evidence(params.replace(layers=params.layers.replace(experts=experts)))
  assert np.argmax(bit_plans.find("outlier").scores(of)) == 1 * E + 2
  assert bit_plans.find("first_blocks").scores(of).argmax(0).tolist() == [0] * E
  one, other = (bit_plans.find(f"random(seed={s})").scores(of) for s in (0, 1))
  assert one.shape == (L, E) and np.any(one != other)


@pytest.mark.slow
def test_rules_that_look_at_text():
  of = evidence()
  clean, roster = (bit_plans.find(n).scores(of) for n in ("frequency", "roster_frequency(n=3)"))
  per_layer = sum(map(len, of.sequences)) * CONFIG.experts_per_token
  assert clean.sum(1).tolist() == [per_layer] * L
  assert roster.sum(1).tolist() == [3 * per_layer] * L and np.any(roster != 3 * clean)
  # A layer without effect turns nothing.
  experts = of.params.layers.experts
  silent = experts.replace(down=experts.down.at[1].set(0))
  layers = of.params.layers.replace(experts=silent)
  turns = bit_plans.find("cosine").scores(of._replace(params=of.params.replace(layers=layers)))
  np.testing.assert_allclose(turns[1], 0, atol=1e-6)
  assert np.all(turns[[0, 2]] > 0.01)


def convert(capsys, source, target, **arguments):
  arguments = {"quantize_experts": "nested:2-4"} | arguments
  given = {name: value for name, value in arguments.items() if value is not None}
  return run(capsys, source=source, target=target, **given)


def contents(folder):
  """All bytes of the parameters' files, and the manifest."""
  leaves, config = load_leaves(folder)
  values = {name: np.asarray(x).tobytes() for name, x in leaves.items()}
  return values, config, json.loads((folder / checkpoint.MANIFEST_FILE).read_text())


def bytes_of_planes(folder):
  """Of the planes and scales in the pieces of a checkpoint."""
  found = 0
  for piece in (folder / "params").glob("layers_*"):
    arrays = traverse_util.flatten_dict(ocp.metadata(str(piece)).metadata, sep=".")
    found += sum(
      math.prod(a.shape) * a.dtype.itemsize for n, a in arrays.items() if n.startswith("planes.")
    )
    assert not any(n.endswith((".codes", ".scales")) for n in arrays if n.startswith("experts."))
  return found


def test_a_checkpoint_with_a_plan_on_a_mesh(tmp_path, capsys):
  wide = tiny.config("olmoe", d_expert=256, num_layers=2)  # two groups, for the axis tensor
  checkpoint.save(tmp_path / "source", tiny.params(wide), wide, piece_bytes=1)
  arguments = dict(bits_plan="random(mean=2.5)")
  assert convert(capsys, tmp_path / "source", tmp_path / "roe", **arguments)[0] == 0
  params, config = checkpoint.load(tmp_path / "roe")
  mesh = sharding.make_mesh(config, expert=2, tensor=2)
  placed, _ = checkpoint.load(
    tmp_path / "roe", shardings=sharding.parameter_shardings(mesh, config)
  )
  for found, expected in zip(jax.tree.leaves(placed), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(found, expected)
  experts = placed.layers.experts
  assert experts.down.codes.sharding.shard_shape(experts.down.codes.shape)[1] == E // 2


@pytest.mark.parametrize("bits", [None, 3, 2])
def test_experts_with_a_plan_read_their_own_planes(bits):
  """Also where the others' scales are not zero: the native kernel does not look at them."""
  rng = np.random.RandomState(0)
  plan = np.array([[2, 4, 3, 4], [3, 2, 4, 2]])
  shapes = {"gate_up": (2, 4, 24, 2, 64), "down": (2, 4, 24, 64)}
  whole, masked = {}, {}
  for name, shape in shapes.items():
    axis = quantization.CONTRACTED[name]
    matrix = quantization.quantize(
      rng.standard_normal(shape).astype(np.float32), "nested:2-4", axis
    )
    matrix = matrix.replace(depth=bits)
    whole[name] = matrix.replace(plan=tuple(map(tuple, plan.tolist())))
    masked[name] = bit_plans.apply(matrix, plan)
  x = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)
  indices, gates = jnp.array([[0, 1], [2, 3], [1, 2]]), jnp.ones((3, 2))
  apply = jax.jit(
    lambda of, layer, strategy: experts_lib.apply(of, layer, x, indices, gates, strategy),
    static_argnums=2,
  )
  for layer in (0, 1):
    run = lambda of, strategy: apply(ExpertParams(**of), layer, strategy)
    expected = run(masked, "dense")
    zeros = {n: bit_plans.apply(m, plan) for n, m in whole.items()}
    cases = [(zeros, strategy) for strategy in ("native", "tiled_loop", "padded")]
    for of, strategy in [*cases, (whole, "native")] if native.is_available() else cases[1:]:
      error = np.abs(run(of, strategy) - expected).max()
      assert error <= 1e-5 * np.abs(expected).max(), (layer, strategy)


def test_a_plan_of_one_format_is_the_checkpoint_without_a_plan(tmp_path, capsys, source):
  (tmp_path / "plan.json").write_text(bit_plans.to_json(np.full((L, E), 3)))
  assert convert(capsys, source, tmp_path / "without", quantize_experts="nested:2-3")[0] == 0
  for name, plan in (("rule", "uniform(mean=3)"), ("file", tmp_path / "plan.json")):
    assert convert(capsys, source, tmp_path / name, bits_plan=plan)[0] == 0
    assert contents(tmp_path / name) == contents(tmp_path / "without")


def test_a_checkpoint_with_a_plan(tmp_path, capsys, source):
  code, out, _ = convert(capsys, source, tmp_path / "roe", bits_plan="first_blocks(mean=2.5)")
  assert code == 0 and "2 to 4, mean 2.5;" in out
  provenance = checkpoint.load_provenance(tmp_path / "roe")
  plan = np.array(provenance["bits"])
  assert provenance["mean_bits"] == 2.5
  assert np.sort(plan.ravel()).tolist() == [2] * 18 + [4] * 6 and plan[1:].max() == 2
  stored, whole = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:bytes|without)", out))
  assert stored == bit_plans.num_bytes(plan, CONFIG, FORMAT) < whole
  assert bytes_of_planes(tmp_path / "roe") == stored
  params, config = checkpoint.load(tmp_path / "roe")
  whole, _ = params_lib.quantize(*checkpoint.load(source), "nested:2-4")
  expected = bit_plans.apply(jax.tree.map(np.asarray, whole.layers.experts.down), plan)
  np.testing.assert_array_equal(params.layers.experts.down.codes, expected.codes)
  np.testing.assert_array_equal(params.layers.experts.down.scales, expected.scales)
  assert config.expert_format == "nested:2-4" and config.expert_bits == tuple(map(tuple, plan))
  checkpoint.save(tmp_path / "saved", params, config, files=tmp_path / "roe", piece_bytes=1)
  assert contents(tmp_path / "saved")[:2] == contents(tmp_path / "roe")[:2]
  assert bytes_of_planes(tmp_path / "saved") == stored
  code, out, _ = run(
    capsys, source=source, dry_run=True, quantize_experts="nested:2-4", bits_plan="random(mean=3)"
  )
  assert code == 0 and "mean 3;" in out


def test_a_checkpoint_with_compensation(tmp_path, capsys, source, monkeypatch):
  texts = np.array(tiny.texts([8, 8]))
  monkeypatch.setattr(quantize_checkpoint, "_sequences", lambda *given: texts.tolist())
  more = dict(compensate=True, calibration="TEXT.txt", bits_plan="uniform(mean=3)")
  assert convert(capsys, source, tmp_path / "roe", **more)[0] == 0
  assert checkpoint.load_provenance(tmp_path / "roe")["compensated"] is True
  params, config = checkpoint.load(tmp_path / "roe")
  original = tiny.params(CONFIG)
  moments = compensation.second_moments(original, CONFIG, texts)
  for name, axis in quantization.CONTRACTED.items():
    array = np.asarray(getattr(original.layers.experts, name))
    expected = compensation.quantize(array, config.expert_format, axis, moments[name])
    found = getattr(params.layers.experts, name)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scales, expected.scales)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(quantize_experts="int4", bits_plan="uniform"), "only experts in a nested format"),
    (dict(bits_plan="best"), "unknown plan of bits 'best': give a JSON file"),
    (dict(bits_plan="random(mean=5)"), "has a mean of 2 to 4, got 5"),
    (dict(bits_plan="frequency"), "looks at text: give --calibration"),
    (dict(bits_plan="PLAN"), r"3 lists \(layers\) of 8 whole numbers"),
    (dict(bits_plan="uniform", quantize_experts=None), "needs --quantize_experts=nested"),
    (dict(compensate=True, quantize_experts=None), "compensate needs --quantize_experts=nested"),
    (dict(compensate=True, quantize_experts="int4"), "only experts in a nested format"),
    (dict(compensate=True), "compensate looks at text: give --calibration"),
  ],
)
def test_plans_that_cannot_be_are_refused(tmp_path, capsys, source, arguments, message):
  if arguments.get("bits_plan") == "PLAN":
    (tmp_path / "plan.json").write_text('{"bits": [[2, 3]]}')
    arguments = dict(bits_plan=tmp_path / "plan.json")
  code, _, errors = convert(capsys, source, tmp_path / "x", **arguments)
  assert code == 1 and re.search(message, errors[0]), errors
