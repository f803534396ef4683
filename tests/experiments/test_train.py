"""Training runs: their data, their resumption and what they leave behind."""

import dataclasses
import json
import re
import time

import jax
import numpy as np
import programs
import pytest
import tokenizers

from checkpoints_convert import outputs
from experiments import train
from experiments.tasks import wordmath, wordmath_tokenizer
from experiments.training import configs, training_batches, training_loop
import roe_jax
from roe_jax import assets

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer():
  return wordmath_tokenizer.build_tokenizer(num_problems=200)


@pytest.fixture(scope="module")
def config(tokenizer):
  """25 steps, a state every 10; the fixed set of problems is seen several times."""
  config = configs.load("wordmath_tiny")
  return config.replace(
    model=config.model.replace(vocab_size=tokenizer.get_vocab_size()),
    settings=dataclasses.replace(config.settings, num_steps=25),
    num_problems=30,
    log_every=5,
    save_every=10,
    evaluate_every=15,
    evaluation_problems=4,
  )


def records(folder, *without):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [{k: v for k, v in json.loads(line).items() if k not in without} for line in lines]


def equal(first, second):
  return jax.tree.all(jax.tree.map(np.array_equal, first, second))


def test_a_batch_holds_the_problems_of_its_places(tokenizer):
  make = training_batches.TrainingBatches(tokenizer, batch_size=3, seed=5, pad_id=1)
  seen = []
  for step in range(training_batches.WINDOW):
    batch = make(step)
    assert batch.tokens.shape[1] % training_batches.MULTIPLE == 0
    for tokens, weights, place in zip(batch.tokens, batch.weights, batch.ids):
      problem = wordmath.problem("train", int(place), 5)
      end = int((weights > 0).sum())
      start = int((weights == 0.25).sum())
      assert tokenizer.decode(tokens[:start]) == wordmath.prompt(problem)
      assert tokenizer.decode(tokens[start:end]) == wordmath.completion(problem)
      assert tokens[end - 1] == tokenizer.token_to_id("<|endoftext|>")
      assert np.all(weights[start:end] == 1) and np.all(tokens[end:] == 1)
      seen.append(int(place))
  assert sorted(seen) == list(range(3 * training_batches.WINDOW))
  # Any step on its own is what it is in a run.
  alone = training_batches.TrainingBatches(tokenizer, batch_size=3, seed=5, pad_id=1)(7)
  assert equal(alone, make(7))


def test_every_epoch_has_each_problem_once_in_its_own_order(tokenizer):
  make = training_batches.TrainingBatches(tokenizer, batch_size=3, num_problems=10, seed=5)
  epochs = [[make.problem_index(10 * e + i) for i in range(10)] for e in range(3)]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert epochs[0] != epochs[1] != epochs[2]


def _make_fast(monkeypatch):
  """One shape of batches to compile for, and no evaluation."""
  monkeypatch.setattr(training_batches, "MULTIPLE", 128)
  monkeypatch.setattr(
    train, "validate", lambda params, *_: {"score": float(np.abs(params.final_norm).sum())}
  )


@pytest.fixture(scope="module")
def whole_run(config, tokenizer, tmp_path_factory):
  """Folder, state and last metrics of a run that nothing disturbed."""
  folder = tmp_path_factory.mktemp("whole")
  with pytest.MonkeyPatch.context() as monkeypatch:
    _make_fast(monkeypatch)
    return folder, *train.run(config, folder, tokenizer)


def test_a_killed_run_ends_as_one_that_was_not(config, tokenizer, whole_run, tmp_path, monkeypatch):
  _make_fast(monkeypatch)
  folder, whole, _ = whole_run
  take_step, calls = train.training.train_step, []

  def dying(*args, **kwargs):
    calls.append(1)
    if len(calls) == 18:
      raise KeyboardInterrupt
    return take_step(*args, **kwargs)

  monkeypatch.setattr(train.training, "train_step", dying)
  with pytest.raises(KeyboardInterrupt):
    train.run(config, tmp_path, tokenizer)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 20, "ki')
  resumed, last = train.run(config, tmp_path, tokenizer)
  assert len(calls) == 18 + 15
  assert equal(resumed, whole)

  timings = ("seconds", "tokens_per_second")
  expected = records(folder, *timings)
  assert [(r["step"], r["kind"]) for r in expected] == [
    (5, "training"),
    (10, "training"),
    (15, "training"),
    (15, "evaluation"),
    (20, "training"),
    (25, "training"),
    (25, "evaluation"),
  ]
  assert records(tmp_path, *timings) == expected
  assert last["tokens"] == expected[-2]["tokens"]
  assert sorted(p.name for p in (tmp_path / "states").iterdir()) == ["20", "25"]

  file = max((tmp_path / "states" / "25").rglob("d/*"), key=lambda p: p.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  with pytest.raises(ValueError, match=r"states/25 is damaged .*: delete it .*\(the checksum of"):
    train.run(config, tmp_path, tokenizer)


def _train(config, folder, tokenizer_file, cache):
  jax.config.update("jax_compilation_cache_dir", cache)
  with pytest.MonkeyPatch.context() as monkeypatch:
    _make_fast(monkeypatch)
    train.run(config, folder, tokenizers.Tokenizer.from_file(tokenizer_file))


def test_a_run_killed_for_real_at_random_moments_ends_as_one_that_was_not(
  config, tokenizer, whole_run, tmp_path
):
  folder, whole, _ = whole_run
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  run = tmp_path / "run"
  run.mkdir()
  metrics, rng = run / "metrics.jsonl", np.random.default_rng(0)

  def start():
    process = programs.context.Process(
      target=_train,
      args=(config, run, str(tmp_path / "tokenizer.json"), jax.config.jax_compilation_cache_dir),
    )
    process.start()
    return process

  for _ in range(2):
    process = start()
    there = metrics.stat().st_size if metrics.exists() else 0
    while process.is_alive() and (metrics.stat().st_size if metrics.exists() else 0) <= there:
      time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.2))
    process.kill()
    process.join()
  last = start()
  last.join()
  assert last.exitcode == 0
  with pytest.MonkeyPatch.context() as monkeypatch:
    _make_fast(monkeypatch)
    assert equal(train.run(config, run, tokenizer)[0], whole)
  timings = ("seconds", "tokens_per_second")
  assert records(run, *timings) == records(folder, *timings)


def provenance_of(folder):
  return json.loads((folder / "manifest.json").read_text())["provenance"]


def test_the_checkpoint_holds_rounded_weights_and_their_scores(
  config, tokenizer, whole_run, tmp_path, monkeypatch
):
  monkeypatch.setattr(training_batches, "MULTIPLE", 128)
  _, state, last = whole_run
  train.finish(config, tmp_path, tokenizer, state, last, "the command")

  params, loaded, saved_tokenizer = roe_jax.open_model(tmp_path / "model", dtype="float32")
  assert roe_jax.load_config(tmp_path / "model").dtype == "bfloat16"
  assert equal(
    params, jax.tree.map(lambda w: np.asarray(w.astype("bfloat16").astype("float32")), state.params)
  )
  provenance = provenance_of(tmp_path / "model")
  scores = train.validate(params, config.replace(model=loaded), tokenizer)
  assert 1 < scores["validation_perplexity"] < config.model.vocab_size
  assert 0 <= scores["validation_exact_match"] <= 1
  assert {k: provenance["scores"][k] for k in scores} == scores
  assert provenance["command"] == "the command"
  assert provenance["steps"] == 25 and provenance["tokens"] == last["tokens"] > 0
  text = wordmath.prompt(wordmath.problem("test", 0))
  assert saved_tokenizer.encode(text) == tokenizer.encode(text).ids

  # Hugging Face folders have no threshold of router probability.
  monkeypatch.setattr(train, "validate", lambda *_: {"validation_perplexity": 2.0})
  other = config.replace(model=config.model.replace(expert_mass=0.4))
  train.finish(other, tmp_path / "other", tokenizer, state, last, "the command")
  params_of_other, of_other, _ = roe_jax.open_model(tmp_path / "other" / "model", dtype="float32")
  assert of_other.expert_mass == 0.4 and equal(params_of_other, params)
  assert provenance_of(tmp_path / "other" / "model")["scores"]["validation_perplexity"] == 2.0


def test_a_folder_belongs_to_one_config(config, tmp_path):
  with outputs.held(str(tmp_path / "run")):  # as a program does
    training_loop.check_output(tmp_path / "run", dataclasses.asdict(config))
  training_loop.check_output(tmp_path / "run", dataclasses.asdict(config))
  with pytest.raises(ValueError, match=r"another config \(it differs in seed\)"):
    training_loop.check_output(tmp_path / "run", dataclasses.asdict(config.replace(seed=1)))
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "thesis.tex").touch()
  with pytest.raises(ValueError, match="holds no training run"):
    training_loop.check_output(tmp_path / "other", dataclasses.asdict(config))


@pytest.mark.parametrize(
  "arguments, sentence",
  [
    (["--config=nothing"], "unknown training config 'nothing': choose one of wordmath_control"),
    (["--config=wordmath_tiny", "--steps=0"], "num_steps must be at least 1, got 0"),
  ],
)
def test_errors_are_one_sentence(arguments, sentence, tmp_path):
  done = programs.call("experiments.train", f"--output={tmp_path / 'run'}", *arguments)
  assert done.returncode == 1
  assert sentence in done.errors and "Traceback" not in done.errors
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "changes", [dict(batch_size=0), dict(save_every=0), dict(num_problems=0), dict(seed=-1)]
)
def test_configs_out_of_range(config, changes):
  with pytest.raises(ValueError, match=next(iter(changes))):
    config.replace(**changes)


def test_every_config_loads():
  for name in configs.names():
    assert isinstance(configs.load(name), configs.TrainingConfig)


@pytest.mark.parametrize("name", assets.NAMES)
def test_embedded_models_are_what_their_configs_make(name):
  provenance = provenance_of(assets.path(name))
  config = re.search(r"--config=(\S+)", provenance["command"])[1]
  seed = re.search(r"--seed=(\d+)", provenance["command"])
  expected = configs.load(config).replace(seed=int(seed[1]) if seed else 0)
  made = json.loads(json.dumps(dataclasses.asdict(expected)))
  for part in ("model", "settings"):
    made[part] = {k: made[part][k] for k in provenance["config"][part]}  # those it had then
  assert made == provenance["config"]
  assert roe_jax.load_config(f"embedded:{name}") == expected.model.replace(dtype="bfloat16")


def test_embedded_models_have_a_folder_each():
  assert {assets.path(name).name for name in assets.NAMES} == set(assets.NAMES)
  with pytest.raises(ValueError, match="unknown embedded model 'x'; there are wordmath_control"):
    assets.path("x")
