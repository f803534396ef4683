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
from experiments.training import (
  configs,
  python_corpus,
  text_data,
  training_batches,
  training_loop,
  wordmath_data,
)
import roe_jax
from roe_jax import assets, transformer

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
    data=configs.Wordmath(num_problems=30, evaluation_problems=4),
    log_every=5,
    save_every=10,
    evaluate_every=15,
  )


@pytest.fixture(scope="module")
def data(config, tokenizer):
  data = wordmath_data.WordmathData(config.data, config.model)
  data.tokenizer = tokenizer
  return data


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


LICENSE_OF = {
  "fair": "License-Expression: MIT AND (Apache-2.0 OR BSD-3-Clause)",
  "old": "Classifier: License :: OSI Approved :: BSD License",
  "strict": "License-Expression: MIT AND GPL-3.0-only",
}


@pytest.fixture
def packages(tmp_path):
  """Folders of a standard library and of packages, with sentences that name their file."""
  sentences = lambda name: "".join(f"{name} says {i} to {i * i}.\n" for i in range(200))
  library, site = tmp_path / "lib", tmp_path / "site"
  files = [
    library / f"{m}.py" for m in ("io", "_io", "logging", "json/scanner", "calendar", "copy")
  ]
  files += [library / "json/tests/mine.py", library / "nothing_of_python.py"]
  for name, license_text in LICENSE_OF.items():
    own = [f"{name}/one.py", f"{name}/two.md", f"{name}/data.csv", f"{name}-1.0.dist-info/a.txt"]
    files += [site / file for file in own]
    (site / f"{name}-1.0.dist-info").mkdir(parents=True)
    metadata = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{license_text}\n"
    (site / f"{name}-1.0.dist-info" / "METADATA").write_text(metadata)
    (site / f"{name}-1.0.dist-info" / "RECORD").write_text("".join(f"{f},,\n" for f in own))
  for file in files:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(sentences(file.stem))
  (library / "copy.py").write_text("small = 1\n")
  (site / "old" / "two.md").write_text(sentences("one") * 9)  # longer than what is read of a file
  return library, site


def collect(packages, **distributions):
  distributions = distributions or {"fair": "train", "old": "test"}
  return python_corpus.collect(packages[0], distributions, [str(packages[1])])


def test_a_corpus_has_each_file_in_the_split_of_its_package(packages):
  corpus = collect(packages)
  places = {d.path: (split, d) for split, of in corpus.documents.items() for d in of}
  expected = {"io.py", "_io.py", "logging.py", "json/scanner.py", "calendar.py"}
  # What several packages have is in one split only: fair/one.py is old/one.py.
  assert places.keys() == expected | {"fair/two.md", "old/one.py", "old/two.md"}
  assert places["io.py"][0] == places["_io.py"][0]
  assert [places[f][0] for f in ("logging.py", "calendar.py", "json/scanner.py")] == [
    "test",
    "validation",
    "train",
  ]
  assert places["fair/two.md"][0] == "train" and places["old/one.py"][0] == "test"
  assert len(places["old/two.md"][1].text) == python_corpus.MOST_CHARACTERS
  assert corpus.versions.keys() == {"python", "fair", "old"} and corpus.versions["old"] == "1.0"
  assert collect(packages).digest == corpus.digest
  (packages[0] / "logging.py").write_text((packages[0] / "logging.py").read_text() + "more\n")
  assert collect(packages).digest != corpus.digest
  with pytest.raises(ValueError, match="strict states 'GPL-3.0-only', which is not among"):
    collect(packages, strict="train")
  with pytest.raises(ValueError, match="the text corpus needs the package absent: install it"):
    collect(packages, absent="train")


def test_windows_of_text_hold_each_token_once_and_belong_to_a_corpus(
  packages, config, tmp_path, monkeypatch
):
  monkeypatch.setattr(text_data, "TOKENIZER_STRIDE", 1)
  model = config.model.replace(vocab_size=300)
  settings = configs.Text(length=16, evaluation_windows=8)
  open_data = lambda folder: text_data.TextData(settings, model, folder, collect(packages))
  data, corpus = open_data(tmp_path / "a"), collect(packages)
  again = open_data(tmp_path / "b")
  assert data.tokenizer.to_str() == again.tokenizer.to_str()
  assert open_data(tmp_path / "a").tokenizer.to_str() == data.tokenizer.to_str()  # from its file
  assert data.tokenizer.get_vocab_size() == 300
  windows = data.windows("train")
  for i, document in enumerate(corpus.documents["train"]):
    own = windows.documents == i
    tokens = windows.tokens[own][windows.weights[own] > 0]
    assert data.tokenizer.decode(tokens[:-1].tolist()) == document.text and tokens[-1] == 0
  assert (windows.tokens[windows.weights == 0] == model.pad_token_id).all()

  batch, size = data.batches(3, seed=5), len(windows.tokens)
  epoch = np.concatenate([batch(i).tokens for i in range(size // 3)])
  rows = lambda tokens: sorted(map(tuple, tokens.tolist()))
  assert len(epoch) > size - 3 and not set(rows(epoch)) - set(rows(windows.tokens))
  if size % 3 == 0:
    assert rows(epoch) == rows(windows.tokens)
  assert equal(again.batches(3, seed=5)(7), batch(7)) and batch(7).ids.tolist() == [21, 22, 23]
  assert not np.array_equal(data.batches(3, seed=6)(7).tokens, batch(7).tokens)

  spread = data.windows("test").spread(5)
  number = len(corpus.documents["test"])
  assert sorted(spread.documents[:number]) == list(range(number))

  few = config.replace(
    model=model, data=settings, settings=dataclasses.replace(config.settings, num_steps=4)
  )
  state, last = train.run(few, tmp_path / "run", data)
  used = data.batches(few.batch_size, few.seed)
  assert last["tokens"] == sum((used(i).weights > 0).sum() for i in range(4))
  scores, some = data.evaluate(state.params, model, 0), data.windows("validation").spread(8)
  log_p = jax.nn.log_softmax(transformer.forward(state.params, model, some.tokens)[0][:, :-1])
  scored, next_ones = some.weights[:, 1:] > 0, some.tokens[:, 1:]
  nll = -np.take_along_axis(np.asarray(log_p), next_ones[..., None], -1)[..., 0][scored]
  assert scores["validation_perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-4)
  right = (np.argmax(log_p, -1) == next_ones)[scored]
  assert scores["validation_accuracy"] == pytest.approx(right.mean())

  check = lambda data: training_loop.check_output(tmp_path / "of", {"seed": 1} | data.origin)
  check(data)
  (packages[0] / "logging.py").write_text((packages[0] / "logging.py").read_text() + "more\n")
  with pytest.raises(ValueError, match=r"another config \(it differs in corpus.digest\)"):
    check(open_data(tmp_path / "c"))


def _make_fast(monkeypatch):
  """One shape of batches to compile for, and no evaluation."""
  monkeypatch.setattr(training_batches, "MULTIPLE", 128)
  score = lambda self, params, *_: {"score": float(np.abs(params.final_norm).sum())}
  monkeypatch.setattr(wordmath_data.WordmathData, "evaluate", score)


@pytest.fixture(scope="module")
def whole_run(config, data, tmp_path_factory):
  """Folder, state and last metrics of a run that nothing disturbed."""
  folder = tmp_path_factory.mktemp("whole")
  with pytest.MonkeyPatch.context() as monkeypatch:
    _make_fast(monkeypatch)
    return folder, *train.run(config, folder, data)


def test_a_killed_run_ends_as_one_that_was_not(config, data, whole_run, tmp_path, monkeypatch):
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
    train.run(config, tmp_path, data)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 20, "ki')
  resumed, last = train.run(config, tmp_path, data)
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
  contents = bytearray(file.read_bytes())
  contents[len(contents) // 2] ^= 1
  file.write_bytes(contents)
  with pytest.raises(ValueError, match=r"states/25 is damaged .*: delete it .*\(the checksum of"):
    train.run(config, tmp_path, data)


def _train(config, folder, tokenizer_file, cache):
  jax.config.update("jax_compilation_cache_dir", cache)
  with pytest.MonkeyPatch.context() as monkeypatch:
    _make_fast(monkeypatch)
    data = wordmath_data.WordmathData(config.data, config.model)
    data.tokenizer = tokenizers.Tokenizer.from_file(tokenizer_file)
    train.run(config, folder, data)


def test_a_run_killed_for_real_at_a_random_moment_ends_as_one_that_was_not(
  config, data, whole_run, tmp_path
):
  folder, whole, _ = whole_run
  data.tokenizer.save(str(tmp_path / "tokenizer.json"))
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

  process = start()
  while process.is_alive() and not (metrics.exists() and metrics.stat().st_size):
    time.sleep(0.005)
  time.sleep(rng.uniform(0, 0.2))
  process.kill()
  process.join()
  last = start()
  last.join()
  assert last.exitcode == 0
  with pytest.MonkeyPatch.context() as monkeypatch:
    _make_fast(monkeypatch)
    assert equal(train.run(config, run, data)[0], whole)
  timings = ("seconds", "tokens_per_second")
  assert records(run, *timings) == records(folder, *timings)


def provenance_of(folder):
  return json.loads((folder / "manifest.json").read_text())["provenance"]


def test_the_checkpoint_holds_rounded_weights_and_their_scores(
  config, data, whole_run, tmp_path, monkeypatch
):
  monkeypatch.setattr(training_batches, "MULTIPLE", 128)
  _, state, last = whole_run
  train.finish(config, tmp_path, data, state, last, "the command")

  params, loaded, saved_tokenizer = roe_jax.open_model(tmp_path / "model", dtype="float32")
  assert roe_jax.load_config(tmp_path / "model").dtype == "bfloat16"
  assert equal(
    params, jax.tree.map(lambda w: np.asarray(w.astype("bfloat16").astype("float32")), state.params)
  )
  provenance = provenance_of(tmp_path / "model")
  scores = data.evaluate(params, loaded, config.seed)
  assert 1 < scores["validation_perplexity"] < config.model.vocab_size
  assert 0 <= scores["validation_exact_match"] <= 1
  assert {k: provenance["scores"][k] for k in scores} == scores
  assert provenance["command"] == "the command"
  assert provenance["steps"] == 25 and provenance["tokens"] == last["tokens"] > 0
  text = wordmath.prompt(wordmath.problem("test", 0))
  assert saved_tokenizer.encode(text) == data.tokenizer.encode(text).ids

  # Hugging Face folders have no threshold of router probability.
  monkeypatch.setattr(data, "evaluate", lambda *_: {"validation_perplexity": 2.0})
  other = config.replace(model=config.model.replace(expert_mass=0.4))
  train.finish(other, tmp_path / "other", data, state, last, "the command")
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
    (["--config=nothing"], "unknown training config 'nothing': choose one of text_routing:"),
    (["--config=wordmath_tiny", "--steps=0"], "num_steps must be at least 1, got 0"),
    (
      ["--config=text_routing:plain", "--problems=9"],
      "unknown setting 'num_problems': choose from",
    ),
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
  of = config.data if "num_problems" in changes else config
  with pytest.raises(ValueError, match=next(iter(changes))):
    dataclasses.replace(of, **changes)


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
  if "data" not in provenance["config"]:
    made |= made.pop("data")  # their place then
  for part in ("model", "settings"):
    made[part] = {k: made[part][k] for k in provenance["config"][part]}  # those it had then
  assert made == provenance["config"]
  assert roe_jax.load_config(f"embedded:{name}") == expected.model.replace(dtype="bfloat16")


def test_embedded_models_have_a_folder_each():
  assert {assets.path(name).name for name in assets.NAMES} == set(assets.NAMES)
  with pytest.raises(ValueError, match="unknown embedded model 'x'; there are wordmath_control"):
    assets.path("x")
