"""Carving: the division of neurons, the fitted router, and carved checkpoints."""

import itertools
import json
import re
import shutil
import types

from absl import flags as flags_lib
import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy import optimize
import tokenizers
from tokenizers import models, pre_tokenizers

from checkpoints_convert import (
  carve_checkpoint,
  carving,
  cli,
  convert_to_hugging_face,
  load,
  verification,
)
from checkpoints_convert.common import ConversionError
from experiments import carving_study
from roe_jax import checkpoint, routing, scoring, transformer
from roe_jax.checkpoint_folder import CARVING_FILE
from roe_jax.families import from_hugging_face
from roe_jax.layer_inputs import LayerOptions, TokenBatch
from roe_jax.roster import Roster
from roe_jax.text.tokenizer import Tokenizer


def _planted(seed=0, tokens=96, groups=3, width=4, shared=4):
  """Returns contributions whose groups of neurons are active in disjoint sets of tokens.

  The first `shared` neurons are always active and the largest. One neuron of each group is also
  active in a few tokens of other groups, from which its cluster starts. All are then permuted.
  """
  rng = np.random.default_rng(seed)
  c = rng.uniform(0.01, 0.02, (tokens, shared + groups * width))
  c[:, :shared] += 5
  group = np.arange(tokens) % groups
  for j in range(groups):
    own = slice(shared + j * width, shared + (j + 1) * width)
    c[group == j, own] += 1
    c[np.flatnonzero(group == (j + 1) % groups)[:8], own.start] += 0.5
  c *= rng.choice([-1, 1], c.shape)
  order = rng.permutation(c.shape[1])
  expected = {frozenset(np.flatnonzero((order - shared) // width == j)) for j in range(groups)}
  return c[:, order].astype(np.float32), np.flatnonzero(order < shared), expected


def test_planted_groups_are_recovered():
  contributions, shared, groups = _planted()
  division = carving.divide(contributions, carving.Plan(1, 1, 4), marked=9)
  np.testing.assert_array_equal(division.shared, shared)
  assert {frozenset(e) for e in division.experts} == groups
  assert sorted(division.order) == list(range(contributions.shape[1]))
  assert all(r in e for r, e in zip(division.representatives, division.experts))
  # The target of the router names the group that is active in each token.
  best = carving.expert_contributions(contributions, division.experts).argmax(axis=1)
  active = np.abs(contributions) > 0.5
  for token, expert in enumerate(best):
    assert active[token, division.experts[expert]].all()


def test_the_largest_contributions_are_marked_also_where_some_are_equal():
  random = np.random.default_rng(0)
  size = np.concatenate(
    [random.normal(size=(20, 64)), random.integers(-2, 3, (20, 64)), [[0] * 64]]
  )
  marks = carving.activation_marks(size.astype(np.float32), 5)
  assert (marks.sum(axis=1) == 5).all()
  least = np.where(marks, abs(size), np.inf).min(axis=1)
  assert (least >= np.where(marks, 0, abs(size)).max(axis=1)).all()


def test_clusters_minimize_the_total_distance():
  rng = np.random.default_rng(1)
  marks = rng.random((20, 6)) < 0.4
  clusters, nearest = carving.balanced_clusters(marks, 2)
  starts = np.argsort(-marks.sum(0), kind="stable")[:2]
  distance = np.abs(marks[:, :, None].astype(int) - marks[:, None, starts]).sum(0)

  def cost(first):
    others = [i for i in range(6) if i not in first]
    return distance[list(first), 0].sum() + distance[others, 1].sum()

  assert cost(tuple(clusters[0])) == min(map(cost, itertools.combinations(range(6), 3)))
  for columns, column in zip(clusters, nearest):
    mean = marks[:, columns].mean(axis=1, keepdims=True)
    gaps = np.abs(marks[:, columns] - mean).sum(0)
    assert gaps[list(columns).index(column)] == gaps.min()


def test_clusters_equal_the_transport_problem():
  """Balanced assignment is a linear program, which another solver gives the same cost."""
  rng = np.random.default_rng(2)
  marks = rng.random((64, 24)) < rng.random(24)
  clusters, _ = carving.balanced_clusters(marks, 4)
  starts = np.argsort(-marks.sum(0), kind="stable")[:4]
  distance = (marks[:, :, None] != marks[:, None, starts]).sum(0)
  each_neuron = np.kron(np.eye(24), np.ones(4))
  each_cluster = np.kron(np.ones(24), np.eye(4))
  best = optimize.linprog(
    distance.ravel(), A_eq=np.vstack([each_neuron, each_cluster]), b_eq=[1] * 24 + [6] * 4
  )
  assert sum(distance[c, j].sum() for j, c in enumerate(clusters)) == round(best.fun)


def test_fitted_router_is_the_least_squares_solution():
  rng = np.random.default_rng(3)
  x, weights, bias = rng.normal(size=(50, 5)), rng.normal(size=(3, 5)), rng.normal(size=3)
  found = carving.fit_linear(x, x @ weights.T + bias, ridge=0)
  np.testing.assert_allclose(found[0], weights, atol=1e-5)
  np.testing.assert_allclose(found[1], bias, atol=1e-5)


@pytest.mark.parametrize(
  "text, message",
  [("4A8E16", "like S4A8E16"), ("S4A13E16", "no more than 16"), ("S0A0E16", "at least one active")],
)
def test_plans_are_refused(text, message):
  with pytest.raises(ConversionError, match=message):
    carving.Plan.parse(text)


def test_uneven_experts_are_refused():
  with pytest.raises(ConversionError, match="divisor of 1536"):
    carving.Plan.parse("S1A2E7").width(1536)


WORDS = 48


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def source(request, tmp_path_factory):
  """A small dense Hugging Face folder with a tokenizer, and a calibration text."""
  folder = tmp_path_factory.mktemp("dense")
  config = hf.config_json("qwen3", torch_dtype=request.param)
  state = hf.random_state(config)
  dtype = np.dtype(request.param)
  save_file({n: w.astype(dtype) for n, w in state.items()}, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(config))
  words = models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0")
  tokenizer = tokenizers.Tokenizer(words)
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.save(str(folder / "tokenizer.json"))
  numbers = np.random.default_rng(0).integers(WORDS, size=300)
  (folder / "text.txt").write_text(" ".join(f"w{i}" for i in numbers))
  return folder


def _carve(source, target, carve="S1A2E4", **options):
  return carve_checkpoint.convert(
    str(source),
    str(target),
    plan=carving.Plan.parse(carve),
    calibration=source / "text.txt",
    num_tokens=256,
    **options,
  )


@pytest.fixture(scope="module")
def carved(source, tmp_path_factory):
  target = tmp_path_factory.mktemp("carved") / "model"
  _carve(source, target, piece_bytes=1)
  return target


TOKENS = np.random.default_rng(1).integers(WORDS, size=(2, 24))


@pytest.mark.parametrize("carve, router", [("S1A3E4", "linear"), ("S0A2E2", "neurons")])
def test_with_all_experts_active_it_is_the_dense_model(source, tmp_path, carve, router):
  _carve(source, tmp_path / "all", carve, router=router)
  expected = transformer.forward(*load(str(source)), TOKENS)[0]
  params, config = checkpoint.load(tmp_path / "all")
  assert config.router == router and config.unit_gates
  found = transformer.forward(params, config, TOKENS)[0]
  tolerance = 1e-5 if config.dtype == "float32" else 3e-2
  np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


def test_dense_files_come_back_bit_for_bit(source, carved, tmp_path):
  convert_to_hugging_face(str(carved), str(tmp_path / "dense"))
  before, after = (load_file(f / "model.safetensors") for f in (source, tmp_path / "dense"))
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    assert tensor.dtype == after[name].dtype
    np.testing.assert_array_equal(tensor, after[name], err_msg=name)
  assert not (tmp_path / "dense" / CARVING_FILE).exists()
  assert json.loads((tmp_path / "dense" / "config.json").read_text())["model_type"] == "qwen3"


def test_layers_are_calibrated_on_carved_outputs_and_runs_are_equal(source, carved, tmp_path):
  _carve(source, tmp_path / "again")  # in other pieces
  assert (tmp_path / "again" / CARVING_FILE).read_text() == (carved / CARVING_FILE).read_text()
  params, config = checkpoint.load(carved)
  again, _ = checkpoint.load(tmp_path / "again")
  jax.tree.map(np.testing.assert_array_equal, params, again)
  if config.dtype != "float32":
    return
  # An independent calculation of the last layer's division and router.
  tokenizer = Tokenizer.load(source)
  tokens = np.reshape(tokenizer.encode((source / "text.txt").read_text())[:256], (-1, 64))
  layers = params.layers
  batch = TokenBatch(jnp.broadcast_to(jnp.arange(64), tokens.shape))
  x = transformer.embed(params, config, tokens)
  x, _, _ = transformer.run_layers(params, config, x, batch, options=LayerOptions((0, 1)))
  silent = layers.replace(
    experts=layers.experts.replace(down=0 * layers.experts.down),
    shared_expert=layers.shared_expert.replace(down=0 * layers.shared_expert.down),
  )
  params = params.replace(layers=silent)
  x, _, _ = transformer.run_layers(params, config, x, batch, options=LayerOptions((1, 2)))
  normed = np.asarray(transformer.norm(config, x, layers.moe_norm[1])).reshape(256, -1)
  at = "model.layers.1.mlp.{}_proj.weight"
  gate, up, down = (
    load_file(source / "model.safetensors")[at.format(n)] for n in ("gate", "up", "down")
  )
  gate, up = normed @ gate.T, normed @ up.T
  hidden = gate / (1 + np.exp(-gate)) * up * np.linalg.norm(down, axis=0)
  division = carving.divide(hidden, carving.Plan(1, 2, 4))
  stored = json.loads((carved / CARVING_FILE).read_text())["neurons"][1]
  np.testing.assert_array_equal(division.order, stored)
  logs = np.log(np.linalg.norm(hidden[:, division.experts], axis=-1))
  found = np.asarray(transformer.router_logits(config, layers, 1, jnp.asarray(normed)))
  # Ridge regression: on average exact, and closer to the target than a constant.
  np.testing.assert_allclose(found.mean(0), logs.mean(0), atol=1e-4)
  assert np.square(found - logs).mean() < 0.8 * np.square(logs - logs.mean(0)).mean()


def test_neuron_router_scores_are_the_log_of_a_neuron(source, tmp_path):
  _carve(source, tmp_path / "neurons", router="neurons")
  params, config = checkpoint.load(tmp_path / "neurons")
  x = jax.random.normal(jax.random.key(0), (5, config.d_model), config.dtype)
  gate, up = np.moveaxis(np.asarray(params.layers.router[1], np.float32), 1, 0)
  gate, up = (np.asarray(x, np.float32) @ w.T for w in (gate, up))
  expected = np.log(np.abs(gate / (1 + np.exp(-gate)) * up))
  found = transformer.router_logits(config, params.layers, 1, x)
  np.testing.assert_allclose(found, expected, rtol=1e-4 if config.dtype == "float32" else 1e-2)
  neurons = np.asarray(params.layers.experts.gate_up[1])
  for expert, neuron in enumerate(np.asarray(params.layers.router[1])):
    assert (neurons[expert] == neuron).all(axis=(1, 2)).any()


def test_a_roster_runs_on_it(carved):
  params, config = checkpoint.load(carved)
  roster = Roster.create(config, num_members=2, temperatures=0.5)
  found = scoring.score(params, config, TOKENS.tolist(), [1, 1], roster=roster).sequences[0]
  alone = scoring.score(params, config, TOKENS.tolist(), [1, 1]).sequences[0]
  assert np.isfinite(found.log_probs).all()
  assert not np.allclose(found.log_probs, alone.log_probs, atol=1e-3)
  # The noise changes which experts are chosen, not their gates, which are one.
  logits, perturbed = jax.random.normal(jax.random.key(0), (2, 7, 3))
  _, gates = routing.route(config, logits, perturbed, "noisy")
  np.testing.assert_array_equal(gates, np.ones((7, 2)))


def test_the_study_measures_what_the_checkpoint_does(source, carved):
  params, config = load(str(source))
  if config.dtype != "float32":
    return
  tokenizer = Tokenizer.load(source)
  calibration = carve_checkpoint.calibration_tokens(tokenizer, source / "text.txt", 256, config)
  text = np.random.default_rng(2).integers(WORDS, size=(2, 64))
  for plan, model in (("S1A2E4", checkpoint.load(carved)), ("S1A3E4", (params, config))):
    found = carving_study.perplexity_of_variant(
      params, config, calibration, text, carving.Plan.parse(plan), "active", "linear"
    )
    log_probs = jax.nn.log_softmax(transformer.forward(*model, text)[0][:, :-1])
    nll = -np.take_along_axis(np.asarray(log_probs), text[:, 1:, None], axis=-1).mean()
    assert found == pytest.approx(np.exp(nll), rel=1e-3)


def test_rosters_are_compared_with_the_baseline_by_window(monkeypatch):
  """Three seeds' gains of 0.1, 0.2 and 0.6 nats per token average to 0.3 in each window."""
  config = from_hugging_face({"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 2})
  flags = dict(active=["8"], sweep=["0.3"], members=["4"], seed=5, seeds=3)
  monkeypatch.setattr(carving_study, "FLAGS", types.SimpleNamespace(**flags))
  gains = {5: 0.1, 6: 0.2, 7: 0.6}

  def score(params, model, sequences, *, roster, output_temperatures, batch_size):
    gain = gains[int(roster.seed)] if roster.num_members > 1 else 0.0
    at = -(np.log(output_temperatures) ** 2)
    nll = [np.linspace(2, 3, len(s) - 1) + i for i, s in enumerate(sequences)]
    found = [types.SimpleNamespace(log_probs=at - n[:, None] + gain) for n in nll]
    return types.SimpleNamespace(sequences=found)

  monkeypatch.setattr(carving_study.scoring, "score", score)
  asked = []

  def keep(name, compute):
    asked.append(name)
    return compute()

  rows = carving_study.roster_rows(None, config, np.zeros((3, 9), int), keep)
  assert [row[:4] for row in rows] == [
    ["2 of 8", "25 %", 1, ""],
    ["8 of 8", "100 %", 1, ""],
    ["2 of 8", "100 %", 4, 0.3],
  ]
  assert rows[0][5] == "" and rows[1][5] == "+0.0 % [+0.0, +0.0]"
  assert [row[7] for row in rows] == ["1.00"] * 3 and rows[2][8] == rows[2][5]
  change = 100 * np.expm1(-0.3)
  assert rows[2][5] == f"{change:+.1f} % [{change:+.1f}, {change:+.1f}]"
  assert float(rows[2][4]) == pytest.approx(np.exp(3.5 - 0.3), abs=0.01)
  assert len(asked) == 5 and len(set(asked)) == 5  # each seed is saved on its own


def test_texts_are_read_as_they_are(tmp_path, monkeypatch):
  file = tmp_path / "text.txt"
  file.write_bytes("\ufeffé\r\nb\rc\n".encode())
  want = [ord(c) for c in "é\r\nb\rc\n"]
  tokenizer = types.SimpleNamespace(encode=lambda text, **_: [ord(c) for c in text])
  config = types.SimpleNamespace(context_length=len(want))
  found = carve_checkpoint.calibration_tokens(tokenizer, file, len(want), config)
  assert found.tolist() == [want]
  monkeypatch.setattr(Tokenizer, "load", lambda _: tokenizer)
  assert verification._encode(tmp_path, len(want), file).tolist() == want
  monkeypatch.setattr(carving_study, "FLAGS", types.SimpleNamespace(window=len(want)))
  assert carving_study.windows(tokenizer, file, len(want)).tolist() == [want]


@pytest.mark.parametrize(
  "flags, message",
  [
    ({"carve": "S1A2E5"}, "divisor of 16"),
    ({"carve": "S3A0E4"}, "no active routed expert"),
    ({"calibration_tokens": "1000"}, "has 300 tokens, fewer than"),
    ({"calibration_tokens": "10"}, "at least 64"),
    ({"calibration": None}, "--carve needs --calibration"),
    ({"calibration": "missing.txt"}, "must be a text file"),
    ({"quantize_experts": "int8"}, "--carve and --quantize_experts exclude"),
    ({"quantize_projections": "int8"}, "--carve and --quantize_projections exclude"),
    ({"carve": None}, "--calibration applies to --carve only"),
  ],
)
def test_wrong_input_is_refused(source, tmp_path, capsys, flags, message):
  given = dict(
    source=str(source),
    target=str(tmp_path / "target"),
    carve="S1A2E4",
    calibration=str(source / "text.txt"),
    calibration_tokens="256",
  )
  assert _run(**(given | flags)) == 1
  assert message in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_carved_checkpoints_are_verified_with_all_experts(source, tmp_path, capsys):
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  if json.loads((source / "config.json").read_text())["torch_dtype"] != "float32":
    return
  given = dict(source=source, carve="S1A2E4", calibration=source / "text.txt")
  assert _run(**given, target=tmp_path / "carved", calibration_tokens="256", verify=20) == 0
  assert "on 20 tokens, with all experts active: largest relative" in capsys.readouterr().out


def test_fine_tuned_checkpoints_are_not_the_dense_model(carved, tmp_path, caplog):
  """Their gates are not one; without scales, the weights are exported, but not the source's."""
  params, config = checkpoint.load(carved)
  provenance = checkpoint.load_provenance(carved) | {"fine_tuning": {}}
  checkpoint.save(tmp_path / "tuned", params, config, files=carved, provenance=provenance)
  convert_to_hugging_face(str(tmp_path / "tuned"), str(tmp_path / "dense"))
  assert "tuned was fine-tuned, so its dense form is not the model" in caplog.text
  config = config.replace(gate_scales=True)
  scales = jnp.zeros((config.num_layers, config.num_experts), config.dtype)
  params = params.replace(layers=params.layers.replace(gate_scales=scales))
  checkpoint.save(tmp_path / "scaled", params, config, files=carved, provenance=provenance)
  with pytest.raises(ConversionError, match="has learned scales of its gates"):
    convert_to_hugging_face(str(tmp_path / "scaled"), str(tmp_path / "target"))
  assert not (tmp_path / "target").exists()


def test_missing_scipy_and_experts_are_refused(source, tmp_path, monkeypatch):
  sparse = from_hugging_face(hf.config_json("mixtral"))
  with pytest.raises(ConversionError, match="mixtral model has 8 experts per layer already"):
    carve_checkpoint.carved_config(sparse, carving.Plan(1, 2, 4))
  monkeypatch.setattr(carve_checkpoint.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConversionError, match="needs scipy"):
    _carve(source, tmp_path / "target")


def test_dry_run_describes_the_carved_model(source, tmp_path, capsys):
  assert _run(source=str(source), carve="S1A2E4", dry_run=True) == 0
  printed = capsys.readouterr().out
  assert re.search(r"layers\.router +\[2, 3, 32\]", printed)
  assert re.search(r"layers\.shared_expert\.down +\[2, 4, 32\]", printed)


def test_damaged_carving_file_is_refused(carved, tmp_path):
  shutil.copytree(carved, tmp_path / "damaged")
  whole = json.loads((carved / CARVING_FILE).read_text())["neurons"]
  as_floats = [[float(i) for i in layer] for layer in whole]
  for damage in ('{"neurons": [[0, 1]]}', "[" * 10**5, json.dumps({"neurons": as_floats})):
    (tmp_path / "damaged" / CARVING_FILE).write_text(damage)
    with pytest.raises(ConversionError, match="its carving.json cannot be used"):
      convert_to_hugging_face(str(tmp_path / "damaged"), str(tmp_path / "dense"))


def _run(**given):
  values = flags_lib.FlagValues()
  cli.define_flags(values)
  values(["program", *(f"--{n}={v}" for n, v in given.items() if v is not None)])
  return cli.run(values)
