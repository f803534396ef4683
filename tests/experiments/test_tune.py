import json
import os
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import programs
import pytest

from experiments import tasks, tune
from experiments.analysis import output_temperatures, paired_statistics
from experiments.cli import app
from experiments.evaluation.requests import RequestBuilder, request_id
from experiments.records import runs
from experiments.tasks import base
from experiments.tuning import confirm, objectives, tuning_configs
from experiments.tuning.trials import Search, Space
from roe_jax import checkpoint, decode, scoring, temperature_profiles
from roe_jax.roster import Roster
from roe_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

# All batches are of one size, so that each program compiles once.
SMALL = (
  "--task=wordmath",
  "--num_members=3",
  "--max_tau=0.15",
  "--num_trials=4",
  "--num_examples=6",
  "--num_confirm=3",
  "--num_seeds=2",
  "--batch_size=3",
  "--noprune",
)


def command(folder, output, *arguments):
  return [f"--checkpoint={folder}", f"--output={output}", *SMALL, *arguments]


def run(*arguments):
  return programs.call("experiments.tune", *command(*arguments))


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
  return *checkpoint.load(tiny_checkpoint), Tokenizer.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def tuned(tiny_checkpoint, tmp_path_factory):
  """A finished search, what it printed, and its folder."""
  output = tmp_path_factory.mktemp("tuned") / "output"
  done = run(tiny_checkpoint, output)
  assert done.returncode == 0, done.errors
  return done, output


def texts_of(model, split_examples):
  _, config, tokenizer = model
  prompts = [tokenizer.encode(e.prompt) for e in split_examples]
  texts = [
    p + tokenizer.encode(e.reference) + [config.eos_token_ids[0]]
    for p, e in zip(prompts, split_examples)
  ]
  return texts, [len(p) for p in prompts]


def nll_of(model, examples, roster):
  """Independent of `objectives`: one text at a time."""
  params, config, _ = model
  texts, starts = texts_of(model, examples)
  ids = [request_id(e.prompt) for e in examples]
  # One shape for all, so that it compiles once.
  shape = dict(batch_size=1, chunk_size=32, min_shape=(1, 128))
  scores = scoring.score(params, config, texts, starts, roster=roster, request_ids=ids, **shape)
  return np.array([-s.log_probs.sum(dtype=float) for s in scores.sequences])


def test_the_profile_is_that_of_the_best_trial_and_names_model_roster_data_and_cost(tuned, model):
  done, output = tuned
  params, config, _ = model
  profile = temperature_profiles.read(output / "profile.json")
  trials = lines(output / "trials.jsonl")
  assert [t["kind"] for t in trials] == 3 * ["sweep"] + ["tpe"]
  best = min(trials, key=lambda t: t["value"])
  assert list(profile.temperatures) == best["temperatures"]
  assert profile.objective["value"] == best["value"]
  assert profile.objective["trial"] == best["number"]
  assert profile.roster["num_members"] == 3 and profile.roster["gate_weights"] == "clean"
  profile.check_sizes(config)
  profile.check_routers(params)
  assert profile.seed == 0 and profile.data["searched"] == [
    f"wordmath/validation/{i}" for i in range(6)
  ]
  assert profile.cost["trials"] == 4 and profile.cost["seconds"] == pytest.approx(
    sum(t["seconds"] for t in trials)
  )
  assert "4 trials (0 pruned)" in done.output.splitlines()[-1]


def test_a_trials_value_is_the_perplexity_of_the_references_with_the_searchs_noise(tuned, model):
  examples = tasks.get("wordmath").examples("validation", limit=6)
  texts, starts = texts_of(model, examples)
  count = sum(map(len, texts)) - sum(starts)
  _, output = tuned
  for trial in lines(output / "trials.jsonl"):
    roster = Roster.create(model[1], 3, trial["temperatures"], seed=0)
    nll = nll_of(model, examples, roster)
    assert trial["value"] == pytest.approx(np.exp(nll.sum() / count), rel=1e-5)
    assert trial["tokens"] == count
    assert trial["forward_passes"] == sum(map(len, texts)) - 6 + 3 * count
  baseline = nll_of(model, examples, Roster.create(model[1]))
  objective = temperature_profiles.read(output / "profile.json").objective
  assert objective["baseline"] == pytest.approx(np.exp(baseline.sum() / count), rel=1e-5)


def test_the_winner_is_confirmed_on_fresh_problems_with_fresh_noise_paired_with_plain(tuned, model):
  done, output = tuned
  profile = temperature_profiles.read(output / "profile.json")
  confirmed = profile.objective["confirmed"]
  assert confirmed["examples"] == 3 and confirmed["seeds"] == [1, 2]
  assert not set(profile.data["searched"]) & set(profile.data["confirmed"])
  examples = tasks.get("wordmath").examples("validation", limit=9)[6:]
  texts, starts = texts_of(model, examples)
  tokens = np.array([len(t) - s for t, s in zip(texts, starts)])
  baseline = nll_of(model, examples, Roster.create(model[1]))
  seeds = [
    nll_of(model, examples, Roster.create(model[1], 3, profile.temperatures, seed=seed))
    for seed in (1, 2)
  ]
  for seed, nll in zip((1, 2), seeds):
    records = runs.load(output / "confirm" / "tuned")[1]
    found = [r["metrics"]["nll"] for r in records if r["seed"] == seed]
    np.testing.assert_allclose(found, nll, rtol=1e-5)
  expected = paired_statistics.paired_perplexity(np.mean(seeds, axis=0), baseline, tokens)
  found = next(
    d
    for d in confirmed["differences"]
    if (d["of"], d["to"], d["fitted"]) == ("tuned", "baseline", False)
  )
  assert found["value"] == pytest.approx(expected.value, rel=1e-3, abs=1e-3)
  assert found["low"] == pytest.approx(expected.low, rel=1e-2, abs=1e-3)
  assert f"{found['value']:+.2f} [" in done.output
  settings, _, summary = runs.load(output / "confirm" / "baseline")
  assert settings["method"] == "baseline" and settings["model"] == profile.model["routers"]
  assert summary["costs"]["tokens"] == tokens.sum()


def test_fitted_output_temperatures_come_from_the_problems_of_the_search(tuned, model):
  params, config, _ = model
  examples = tasks.get("wordmath").examples("validation", limit=6)
  texts, starts = texts_of(model, examples)
  grid = output_temperatures.GRID
  scores = scoring.score(params, config, texts, starts, output_temperatures=grid)
  nll = np.array([-t.log_probs.sum(axis=0, dtype=float) for t in scores.sequences])
  settings, records, _ = runs.load(tuned[1] / "confirm" / "baseline")
  fitted = output_temperatures.fit(nll, grid)
  assert settings["output_temperature"] == pytest.approx(fitted, rel=1e-3)
  fresh = tasks.get("wordmath").examples("validation", limit=9)[6:]
  texts, starts = texts_of(model, fresh)
  scores = scoring.score(params, config, texts, starts, output_temperatures=[fitted])
  for record, text in zip(records, scores.sequences):
    assert record["metrics"]["fitted_nll"] == pytest.approx(-text.log_probs.sum(), rel=1e-3)


def test_other_programs_take_the_profile_with_its_roster(tuned, tiny_checkpoint, tmp_path):
  (tmp_path / "in.jsonl").write_text('{"prompt": "7", "continuation": " 8"}\n')
  done = programs.call(
    "experiments.score",
    f"--checkpoint={tiny_checkpoint}",
    f"--input={tmp_path / 'in.jsonl'}",
    f"--output={tmp_path / 'out.jsonl'}",
    f"--tau={tuned[1] / 'profile.json'}",
  )
  assert done.returncode == 0, done.errors
  roster = lines(tmp_path / "out.jsonl")[0]["settings"]["roster"]
  assert roster["num_members"] == 3
  assert roster["temperatures"] == pytest.approx(
    temperature_profiles.read(tuned[1] / "profile.json").temperatures, abs=1e-6
  )


def test_a_finished_search_is_told_again_and_other_settings_are_refused(tuned, tiny_checkpoint):
  done, output = tuned
  before = (output / "profile.json").read_text()
  again = run(tiny_checkpoint, output)
  assert again.returncode == 0 and again.output == done.output
  assert (output / "profile.json").read_text() == before
  other = run(tiny_checkpoint, output, "--num_examples=4", "--seed=1")
  assert other.returncode == 1 and "other settings (num_examples, seed)" in other.errors
  assert "Traceback" not in other.errors and not other.output


def test_two_workers_that_are_killed_leave_what_one_finishes_as_one_that_was_not(
  tuned, tiny_checkpoint, tmp_path
):
  output = tmp_path / "killed"
  arguments = command(tiny_checkpoint, output, "--num_workers=2")
  process = programs.Run("experiments.tune", arguments).process
  deadline = time.monotonic() + 240
  while not (output / "trials.jsonl").exists():
    assert time.monotonic() < deadline and process.is_alive()
    time.sleep(0.05)
  list_processes = ["ps", "-A", "-ww", "-o", "args="]
  running = lambda: (
    str(output) in subprocess.run(list_processes, capture_output=True, text=True).stdout
  )
  assert sys.platform != "linux" or running()
  os.kill(process.pid, signal.SIGKILL)  # the worker ends, too
  process.join()
  deadline = time.monotonic() + 10
  while running():
    assert time.monotonic() < deadline
    time.sleep(0.05)
  done = run(tiny_checkpoint, output)
  assert done.returncode == 0, done.errors
  expected = lines(tuned[1] / "trials.jsonl")
  found = [t for t in lines(output / "trials.jsonl") if t["state"] == "complete"]
  assert len(found) == len(expected) == 4
  by_sweep = lambda trials: {
    t["temperatures"][0]: t["value"] for t in trials if t["kind"] == "sweep"
  }
  assert by_sweep(found) == by_sweep(expected)
  profile = temperature_profiles.read(output / "profile.json")
  assert profile.objective["value"] == min(t["value"] for t in found)
  assert profile.objective["confirmed"]["examples"] == 3


@pytest.fixture(scope="module")
def perplexity(model):
  _, config, tokenizer = model
  task = tasks.get("wordmath")
  examples = task.examples("validation", limit=6)
  return objectives.Perplexity(config, RequestBuilder(config, tokenizer), task, examples, 3)


def test_equal_temperatures_have_equal_values_bit_for_bit(model, perplexity):
  params, config, _ = model
  measure = lambda t: perplexity.measure(
    params, Roster.create(config, 3, t, noisy_layers=(0, 2)), slice(0, 3)
  )[0]
  first, other, again = measure(0.3), measure(0.2), measure([0.3, 0.3])
  assert first.tolist() == again.tolist() and first.tolist() != other.tolist()


def test_an_examples_noise_does_not_depend_on_its_batch(model, perplexity):
  params, config, _ = model
  roster = Roster.create(config, 3, 0.4)
  whole = perplexity.measure(params, roster, slice(0, 6))[0]
  part = perplexity.measure(params, roster, slice(2, 5))[0]
  np.testing.assert_allclose(part, whole[2:5], rtol=1e-5)


def test_only_the_first_trial_compiles(model, perplexity, tmp_path):
  params, config, _ = model

  class Counting:
    name, maximize, value = "perplexity", False, staticmethod(perplexity.value)

    def measure(self, temperatures, part):
      roster = Roster.create(config, 3, temperatures, noisy_layers=(0, 2))
      return perplexity.measure(params, roster, part)

  jax.clear_caches()
  programs, counts = app.CompiledPrograms(), []
  search = Search(tmp_path, Space(2, 0, 0.2), 7, maximize=False)
  search.run(
    Counting(),
    [slice(0, 3), slice(3, 6)],
    prune=False,
    on_trial=lambda: counts.append(programs.count),
  )
  assert counts[0] > 0 and counts == 7 * counts[:1]


def test_accuracy_of_written_answers(model):
  params, config, tokenizer = model
  task = tasks.get("wordmath")
  examples = task.examples("validation", limit=3)
  # A task on which a random model is right now and then: long completions.
  judged = base.Task(
    "length", "math", "long", None, base.each(lambda e, output: {"long": float(len(output))}), ""
  )
  objective = objectives.Accuracy(config, RequestBuilder(config, tokenizer), judged, examples, 2)
  roster = Roster.create(config, 3, 0.5, seed=4)
  values, cost = objective.measure(params, roster, slice(1, 3))
  for value, example in zip(values, examples[1:]):
    prompt = tokenizer.encode(example.prompt)
    alone = decode.generate(
      params,
      config,
      [prompt],
      max_new_tokens=example.max_new_tokens,
      roster=roster,
      request_ids=[request_id(example.prompt)],
      decode=tokenizer.decode,
    )
    assert value == len(alone.completions[0].text)
  assert objective.value(values) == values.mean() and cost.forward_passes > 3 * cost.tokens > 0


def test_accuracy_of_chosen_answers(model):
  params, config, tokenizer = model
  examples = [
    base.Example(id=f"q/{i}", prompt=f"{i} pens", choices=(" a", " 12 boats.", " 7"), target=i % 3)
    for i in range(3)
  ]
  task = base.Task("choices", "commonsense", "acc", None, base.each(base.chosen), "")
  objective = objectives.Accuracy(config, RequestBuilder(config, tokenizer), task, examples, 4)
  roster = Roster.create(config, 3, 0.5)
  values, cost = objective.measure(params, roster, slice(0, 3))
  choices = [
    (e, tokenizer.encode(e.prompt), tokenizer.encode(c)) for e in examples for c in e.choices
  ]
  scores = scoring.score(
    params,
    config,
    [prompt + choice for _, prompt, choice in choices],
    [len(prompt) for _, prompt, _ in choices],
    roster=roster,
    request_ids=[request_id(e.prompt) for e, *_ in choices],
  )
  sums = np.reshape([s.log_probs.sum() for s in scores.sequences], (3, 3))
  expected = [float(np.argmax(own) == e.target) for own, e in zip(sums, examples)]
  assert values.tolist() == expected and cost.tokens == 3 * sum(
    len(tokenizer.encode(c)) for c in examples[0].choices
  )


def test_what_is_not_clear_is_not_called_better():
  def sentence(low, high, significant=True):
    difference = {
      "of": "tuned",
      "to": "baseline",
      "fitted": False,
      "value": (low + high) / 2,
      "low": low,
      "high": high,
      "p": 0.01 if significant else 0.2,
      "adjusted": 0.02 if significant else 0.4,
    }
    return confirm.format_confirmation(
      {
        "values": {"baseline": {"value": 0.5}, "tuned": {"value": 0.6}},
        "differences": [difference],
      },
      "accuracy",
    )

  assert "No significant difference in accuracy" in sentence(-1, 3)
  assert "significantly better than the baseline" in sentence(1, 3)
  assert "No significant difference in accuracy" in sentence(1, 3, significant=False)
  assert "significantly worse than the baseline" in sentence(-3, -1)


def test_a_small_split_is_halved_and_repeated_questions_confirm_nothing(monkeypatch, capsys):
  questions = ["a", "b", "c", "d", "a", "e", "f"]
  task = base.Task(
    "few",
    "math",
    "acc",
    lambda split, folder, chat: (
      base.Example(id=f"{split}/{i}", prompt=q) for i, q in enumerate(questions)
    ),
    None,
    "",
  )
  given = types.SimpleNamespace(num_confirm=None, data_dir=None, chat=False, max_new_tokens=None)
  monkeypatch.setattr(tune, "FLAGS", given)
  count, examples, fresh = tune.choose_examples(task, 50)
  assert (count, len(examples), fresh) == (3, 7, [3, 5, 6])
  assert "7 examples: 3 are for the search" in capsys.readouterr().err
  assert tune.choose_examples(task, 2)[::2] == (2, [2, 3])
  given.num_confirm = 5
  assert tune.choose_examples(task, 2)[::2] == (2, [2, 3, 5, 6])
  with pytest.raises(ValueError, match="has 7 examples, 3 of them new"):
    tune.choose_examples(task, 3)


def test_the_papers_budgets():
  assert len(tuning_configs.CONFIGS) == 13
  c = tuning_configs.load("paper_commonsense_mixtral")
  assert (c.num_examples, c.num_trials, c.objective) == (300, 100, "accuracy")
  assert (c.num_members, c.max_tau, c.fixed_layers, c.cache) == (64, 0.3, 3, "standard")
  assert tuning_configs.load("paper_math_olmoe") == tuning_configs.TuningConfig(
    "perplexity", 100, 50, 32, 0.5, 1, "clean"
  )


REFUSED = {
  ("--max_tau=0",): "max_tau must be finite and above 0",
  ("--max_tau=nan",): "max_tau must be a finite number, got nan",
  ("--router_bias=b.json",): "--router_bias is not part of a temperature profile",
  ("--fixed_layers=1",): "give 0 to 0, got 1",
  ("--num_trials=2",): "num_trials must be at least 3",
  ("--config=paper_math_gpt5",): "unknown tuning config 'paper_math_gpt5'",
  ("--config=paper_math_olmoe",): "give 0 to 0, got 1",  # two layers are too few for L = 1
  ("--task=gsm9k",): "gsm9k",
  ("--num_members=1",): "the baseline alone has no temperatures",
  ("--num_examples=900", "--num_confirm=200"): "too few for --num_examples=900 and",
  ("--num_confirm=0",): "--num_confirm must be at least 1",
  ("--tau=0.3",): "it is tuned here: use --max_tau",
  ("--seed=4294967295",): "seed must be an integer in",
  ("--checkpoint=embedded:nothing",): "nothing",
  ("--parameter=alpha",): "--parameter must be one of tau, beta, got 'alpha'",
  ("--parameter=beta",): "tunes the beta of --aggregation=contrast or contrast(alpha=NUMBER), got",
  ("--parameter=beta", "--aggregation=contrast(beta=0.3)"): "does not fit contrast(alpha=0.1)",
  ("--parameter=beta", "--aggregation=contrast"): "needs --objective=accuracy",
}
MANY_RUNS = """
import json, sys
from absl import flags
from absl.testing import flagsaver
from experiments import tune
from experiments.cli import app
tune.define_flags()
for arguments in json.load(sys.stdin):
  with flagsaver.flagsaver():
    flags.FLAGS.unparse_flags()
    sys.argv = ["tune", *arguments]
    try:
      app.run(tune.main, output=app.outputs.SHARED)
    except SystemExit as exit:
      print(json.dumps(exit.code))
"""


def test_bad_settings_are_refused_before_any_work(tiny_checkpoint, tmp_path):
  given = [command(tiny_checkpoint, tmp_path / "output", *a) for a in REFUSED]
  done = programs.call(MANY_RUNS, stdin=json.dumps(given))
  assert done.returncode == 0, done.errors
  for line, sentence in zip(done.output.splitlines(), REFUSED.values(), strict=True):
    assert json.loads(line).startswith("error: ") and sentence in line
  assert not (tmp_path / "output").exists()


def test_a_torn_profile_says_how_to_write_it_again(tmp_path):
  assert tune.read_profile(tmp_path) is None
  (tmp_path / tune.PROFILE).write_text('{"temperatures": [0.1')
  with pytest.raises(ValueError, match=r"profile.json .* delete it and run the same command again"):
    tune.read_profile(tmp_path)
