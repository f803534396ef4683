"""Fine-tuning: adapters that start as nothing, merge exactly, and survive an interruption."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpy_roster
import pytest
import tiny
import tokenizers
from tokenizers import models, pre_tokenizers

from checkpoints_convert import carve_checkpoint, carving, quantize_checkpoint
from experiments import fine_tune, train_bit_router
from experiments.training import low_rank
from roe_jax import checkpoint, diagnostics, transformer
from roe_jax.roster import Roster

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def carved(tmp_path_factory):
  """A model with the config of a carved one, its tokenizer, and a text with a simple rule."""
  folder = tmp_path_factory.mktemp("carved")
  dense = tiny.config("llama", num_layers=2, d_expert=16)
  config = carve_checkpoint.carved_config(dense, carving.Plan(1, 2, 4))
  words = models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0")
  tokenizer = tokenizers.Tokenizer(words)
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer.save(str(folder / "tokenizer.json"))
  checkpoint.save(folder / "model", tiny.params(config), config, files=folder)
  numbers, rng = [1], np.random.default_rng(0)
  while len(numbers) < 500:
    numbers.append((numbers[-1] * 3 + rng.integers(2)) % 61)
  (folder / "text.txt").write_text(" ".join(f"w{i}" for i in numbers))
  return folder


def settings(carved, output, **changes):
  values = dict(
    checkpoint=str(carved / "model"),
    text=str(carved / "text.txt"),
    output=str(output),
    steps=8,
    rank=2,
    learning_rate=0.05,
    gate_learning_rate=0.5,
    window=16,
    batch_size=4,
    held_out_tokens=64,
    evaluate_every=4,
    save_every=3,
  )
  return fine_tune.Settings(**(values | changes))


@pytest.fixture(scope="module")
def tuned(carved):
  """The folder of an uninterrupted run."""
  fine_tune.run(settings(carved, carved / "tuned"))
  return carved / "tuned"


def metrics(folder):
  lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
  timings = ("seconds", "tokens_per_second")
  return [{k: v for k, v in line.items() if k not in timings} for line in lines]


def test_adapters_start_as_nothing_and_merge_exactly(carved):
  params, config = fine_tune.load(settings(carved, carved))
  whole = ["gate_scales", "router", "router_bias"]
  start = low_rank.init(params, config, 2, whole, jax.random.key(0))
  tokens = jnp.asarray(tiny.texts([12, 12]))
  forward = jax.jit(low_rank.forward, static_argnums=(1, 4))
  plain = jax.jit(transformer.forward, static_argnums=1)
  original, stored = checkpoint.load(carved / "model")
  expected = plain(original, stored, tokens)[0]
  np.testing.assert_allclose(forward(params, config, start, tokens, "dense"), expected, atol=2e-5)
  assert set(start.left) == {
    *(f"attention.{name}" for name in ("query", "key", "value", "output")),
    *(f"{kind}.{name}" for kind in ("experts", "shared_expert") for name in ("gate_up", "down")),
  }

  rng = np.random.default_rng(1)
  moved = jax.tree.map(lambda a: a + 0.2 * rng.standard_normal(a.shape).astype("f4"), start)
  merged = params.replace(layers=low_rank.merge(params.layers, moved))
  found = forward(params, config, moved, tokens, "dense")
  np.testing.assert_allclose(plain(merged, config, tokens)[0], found, atol=2e-5)
  assert np.abs(found - expected).max() > 0.1
  bare = low_rank.init(params, config, 0, whole, jax.random.key(0))
  assert not bare.left and not bare.right and set(bare.whole) == set(whole)
  down = np.asarray(params.layers.experts.down[1, 2], np.float64)
  down += moved.left["experts.down"][1, 2] @ moved.right["experts.down"][1]
  np.testing.assert_allclose(merged.layers.experts.down[1, 2], down, atol=1e-5)


def test_an_interrupted_run_ends_as_one_that_was_not(carved, tuned, tmp_path, monkeypatch):
  take_step, calls = low_rank.train_step, []

  def dying(*args, **kwargs):
    calls.append(1)
    if len(calls) == 6:
      raise KeyboardInterrupt
    return take_step(*args, **kwargs)

  monkeypatch.setattr(low_rank, "train_step", dying)
  given = settings(carved, tmp_path / "run")
  with pytest.raises(KeyboardInterrupt):
    fine_tune.run(given)
  fine_tune.run(given)
  assert len(calls) == 6 + 5
  (params, config), (expected, _) = (
    checkpoint.load(f / "model") for f in (tmp_path / "run", tuned)
  )
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  assert metrics(tmp_path / "run") == metrics(tuned)


def test_training_lowers_held_out_perplexity_and_leaves_an_ordinary_checkpoint(carved, tuned):
  found = [r for r in metrics(tuned) if r["kind"] == "evaluation"]
  assert [r["step"] for r in found] == [0, 4, 8]
  assert found[-1]["perplexity"] < 0.95 * found[0]["perplexity"]
  params, config = checkpoint.load(tuned / "model")
  before, own = checkpoint.load(carved / "model")
  assert config == own.replace(gate_scales=True)
  changed = jax.tree.map(
    lambda a, b: not np.array_equal(a, b), params.layers.replace(gate_scales=None), before.layers
  )
  assert changed.router and changed.router_bias and changed.experts.down
  assert not changed.moe_norm and not changed.attention_norm
  np.testing.assert_array_equal(params.embedding, before.embedding)
  assert (np.abs(params.layers.gate_scales) > 0.05).any()
  provenance = checkpoint.load_provenance(tuned / "model")["fine_tuning"]
  assert provenance["held_out_perplexity"]["after"] == found[-1]["perplexity"]
  # A roster on it is that of the definition.
  roster = Roster.create(config, 3, 0.7, seed=9, gate_weights="noisy")
  [text] = tiny.texts([7])
  logits = diagnostics.member_logits(
    params, config, [text], all_positions=True, roster=roster, request_ids=[3]
  )[:, 0]
  expected = numpy_roster.member_logits(params, config, roster, text, 3)
  np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
  "changes, sentence",
  [
    (dict(rank=-1), "--rank must be between 0 and 32, got -1"),
    (dict(steps=0), "--steps must be at least 1"),
    (dict(window=49), "--window must be between 2 and 48"),
    (dict(learning_rate=0.0), "--learning_rate must be positive"),
    (dict(held_out_tokens=480), "has 500 tokens, but --held_out_tokens and one batch take 544"),
    (dict(rank=0, train_router=False, gate_scales=False), "trains nothing"),
    (dict(evaluate_every=0), "--evaluate_every must be at least 1, got 0"),
    (dict(output="."), "within each other"),
    (dict(checkpoint="dense"), "dense: carve experts out of it first"),
    (dict(checkpoint="softmax", gate_scales=True), "come from its router|router's softmax"),
    (dict(checkpoint="int8"), r"is quantized \(experts in int8\) and cannot be trained"),
    (dict(output="other"), "holds no training run"),
  ],
  ids=lambda x: str(x)[:40],
)
def test_wrong_input_gets_one_sentence(carved, tmp_path, monkeypatch, changes, sentence):
  configs = {
    "dense": tiny.config("llama"),
    "softmax": tiny.config("olmoe"),
    "int8": tiny.config("olmoe", expert_format="int8"),
  }
  if name := changes.get("checkpoint"):
    monkeypatch.setattr(fine_tune.app, "load_config", lambda _: configs[name])
  output = tmp_path / "run"
  if changes.get("output") == ".":
    changes = {"output": str(carved)}
  elif changes.get("output"):
    output.mkdir()
    (output / "thesis.tex").touch()
    changes = {}
  monkeypatch.setattr(fine_tune, "load", lambda _: pytest.fail("loaded the weights"))
  with pytest.raises(ValueError, match=sentence):
    fine_tune.run(dataclasses.replace(settings(carved, output), **changes))


def test_bit_routers_are_trained_and_kept(carved, tmp_path, capsys):
  source = str(tmp_path / "nested")
  quantize_checkpoint.convert(str(carved / "model"), source, quantize_experts="nested:2-4")
  given = train_bit_router.Settings(
    source,
    str(carved / "text.txt"),
    str(tmp_path / "routed"),
    steps=6,
    learning_rate=0.03,
    window=16,
    held_out_tokens=32,
  )
  train_bit_router.run(given)
  assert re.search(r"KL [\d.]+ nats at [\d.]+ bits before .*, [\d.]+ at ", capsys.readouterr().out)
  params, config = checkpoint.load(tmp_path / "routed" / "model")
  before, after = checkpoint.load_provenance(tmp_path / "routed" / "model")["bit_router"].values()
  assert config.bit_router and params.layers.bit_router.shape == (2, config.num_experts, 3, 32)
  assert abs(after["bits"] - 3) < 0.25 and after["kl"] < before["kl"]
  train_bit_router.run(given)
  assert "is already complete" in capsys.readouterr().out
  for changes, sentence in (
    (dict(mean=4.0), "--mean=4 must lie between the 2 and 4 bits"),
    (dict(checkpoint=str(carved / "model")), "only experts in a nested format"),
    (dict(checkpoint=str(tmp_path / "routed" / "model")), "has bit routers already"),
    (dict(checkpoint="embedded:wordmath_d64"), "must be the folder of a checkpoint"),
    (dict(window=1), "--window must be between 2 and"),
    (dict(output=source), "are within each other"),
  ):
    with pytest.raises(ValueError, match=sentence):
      train_bit_router.run(dataclasses.replace(given, **changes))
