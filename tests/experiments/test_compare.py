"""The program that compares methods, on a small random model."""

import json
import types

import numpy as np
import programs
import pytest
import scipy.special

from experiments import compare as program
from experiments import tasks
from experiments.analysis import output_temperatures
from experiments.cli import app
from experiments.evaluation import measurer, method_specs, methods
from experiments.evaluation.engine import Generated
from experiments.evaluation.measurer import Measurer
from experiments.evaluation.requests import RequestBuilder, request_id
from experiments.records import runs, store
from experiments.records.cost import Cost
from experiments.tuning import objectives
from roe_jax import decode, diagnostics, scoring
from roe_jax.completion import Completion
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler

pytestmark = pytest.mark.slow

METHODS = "baseline; baseline+temperature; roster:n=3; self_consistency:n=3; scmoe"
LIMIT, BATCH = 6, 3  # of one size, so that each program compiles once


def compare(checkpoint, output, *arguments):
  return programs.call(
    "experiments.compare",
    f"--checkpoint={checkpoint}",
    "--tau=0.5",
    f"--num_examples={LIMIT}",
    f"--batch_size={BATCH}",
    "--num_validation=3",
    f"--output={output}",
    *arguments,
  )


@pytest.fixture(scope="module")
def output(tiny_checkpoint, tmp_path_factory):
  """The folder of a comparison with two noise seeds."""
  folder = tmp_path_factory.mktemp("compare")
  done = compare(tiny_checkpoint, folder, f"--methods={METHODS}", "--num_seeds=2")
  assert done.returncode == 0, done.errors
  assert "Saved 5 runs" in done.output and "not defined" in done.output
  assert "[wordmath: output temperatures are fitted on 3 examples, fewer than 40" in done.errors
  return folder


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
  return app.open_model(str(tiny_checkpoint))


def of(output, name):
  """Settings, {(example, seed): line} and costs of a method's run."""
  settings, lines, _ = runs.load(output / name)
  return (
    settings,
    {(r["example"], r["seed"]): r for r in lines},
    store.read_lines(output / name / runs.COSTS),
  )


def test_every_method_is_a_run_with_what_a_report_needs(output):
  names = {
    "baseline": ("baseline", 1, 1),
    "baseline+temperature": ("baseline+temperature", 1, 1),
    "roster_n=3": ("roster", 3, 2),
    "self_consistency_n=3": ("self_consistency", 3, 2),
    "scmoe": ("scmoe", 2, 1),
  }
  assert {p.name for p in output.iterdir()} == set(names)
  for name, (method, rows, num_seeds) in names.items():
    settings, lines, costs = of(output, name)
    assert settings["method"] == method and settings["label"]
    assert settings["forward_passes_per_token"] == rows
    assert settings["stochastic"] == (num_seeds > 1) and settings["seeds"] == [0, 1][:num_seeds]
    assert set(lines) == {(f"wordmath/test/{i}", s) for i in range(LIMIT) for s in range(num_seeds)}
    assert all("exact_match" in line["metrics"] for line in lines.values())
    assert len(costs) == 2 * num_seeds
    assert all(c["seconds"] > 0 and c["peak_bytes"] > 0 and c["flops"] > 0 for c in costs)


def test_answers_are_those_of_the_method(output, model):
  params, config, tokenizer = model
  examples = tasks.get("wordmath").examples("test", limit=LIMIT)
  prompts = [tokenizer.encode(e.prompt) for e in examples]
  _, lines, _ = of(output, "roster_n=3")
  for seed in (0, 1):
    texts = decode.generate(
      params,
      config,
      prompts,
      max_new_tokens=96,
      batch_size=BATCH,
      request_ids=[request_id(e.prompt) for e in examples],
      decode=tokenizer.decode,
      roster=Roster.create(config, 3, 0.5, seed=seed),
    ).completions
    assert [lines[e.id, seed]["output"] for e in examples] == [c.text for c in texts]
  _, lines, _ = of(output, "self_consistency_n=3")
  # The second sample of the last example, alone.
  alone = decode.generate(
    params,
    config,
    prompts[5:],
    max_new_tokens=96,
    request_ids=[request_id(examples[5].prompt, 1)],
    decode=tokenizer.decode,
    sampler=Sampler.create(0.7),
    roster=Roster.create(config, seed=1),
  )
  line = lines[examples[5].id, 1]
  assert line["samples"][1] == alone.completions[0].text
  assert line["output"] == line["samples"][line["picked"]] and len(set(line["samples"])) == 3


def test_costs_are_counted(output, model):
  params, config, tokenizer = model
  _, lines, costs = of(output, "roster_n=3")
  examples = tasks.get("wordmath").examples("test", limit=BATCH)
  prompts = [tokenizer.encode(e.prompt) for e in examples]
  ids = [request_id(e.prompt) for e in examples]
  roster = Roster.create(config, 3, 0.5)
  written = [
    c.tokens
    for c in decode.generate(
      params, config, prompts, max_new_tokens=96, request_ids=ids, roster=roster
    ).completions
  ]
  first = next(c for c in costs if c["seed"] == 0 and "steps" in c)
  before = sum(map(len, prompts)) - BATCH
  assert first["tokens"] == first["steps"] == sum(map(len, written))
  assert first["forward_passes"] == before + 3 * first["tokens"]
  unique = diagnostics.unique_experts(
    params, config, roster, [p + w for p, w in zip(prompts, written)], list(map(len, prompts)), ids
  )
  assert first["unique_experts_read"] == pytest.approx(unique.by_position.mean() * first["steps"])
  # By hand, of the plain model in two layers: projections to queries, keys, values
  # and back, router, two experts of three matrices, attention; and the vocabulary.
  _, _, costs = of(output, "baseline")
  plain = next(c for c in costs if "steps" in c)
  generated = [
    c.tokens
    for c in decode.generate(
      params, config, prompts, max_new_tokens=96, request_ids=range(BATCH)
    ).completions
  ]
  total = 0
  for prompt, tokens in zip(prompts, generated):
    for position in range(len(prompt) - 1 + len(tokens)):
      layer = 4 * 2 * 16 * 16 + 2 * 16 * 4 + 2 * 3 * 2 * 16 * 8 + 2 * 2 * 16 * (position + 1)
      total += 2 * layer
    total += len(tokens) * 2 * 16 * config.vocab_size
  assert plain["flops"] == total
  # The prompt of each sample goes through the network; only the selected one's tokens count.
  _, lines, costs = of(output, "self_consistency_n=3")
  line = lines[examples[0].id, 0]
  passes = 0
  for e, prompt in zip(examples, prompts):
    for text in lines[e.id, 0]["samples"]:
      passes += len(prompt) - 1
  first = next(c for c in costs if c["seed"] == 0 and "steps" in c)
  assert first["forward_passes"] == passes + first["steps"] and first["steps"] > first["tokens"]
  assert line["output"] == line["samples"][line["picked"]]


def test_evaluate_and_tune_give_the_same_numbers(output, model, tiny_checkpoint, tmp_path):
  params, config, tokenizer = model
  done = programs.call(
    "experiments.evaluate",
    f"--checkpoint={tiny_checkpoint}",
    "--tasks=wordmath",
    "--num_members=3",
    "--tau=0.5",
    "--num_seeds=2",
    f"--num_examples={LIMIT}",
    f"--batch_size={BATCH}",
    f"--output={tmp_path / 'run'}",
  )
  assert done.returncode == 0, done.errors
  _, compared, costs = of(output, "roster_n=3")
  _, evaluated, others = of(tmp_path, "run")
  assert compared.keys() == evaluated.keys()
  for key, line in evaluated.items():
    assert line["output"] == compared[key]["output"]
    assert line["metrics"] == pytest.approx(
      {name: compared[key]["metrics"][name] for name in line["metrics"]}, rel=1e-5
    )
  answering = [c for c in others if c["task"] == "wordmath"]
  for name in ("tokens", "forward_passes", "flops"):
    assert sum(c[name] for c in answering) == sum(c[name] for c in costs)
  examples = tasks.get("wordmath").examples("test", limit=LIMIT)
  ours = RequestBuilder(config, tokenizer), tasks.get("wordmath"), examples
  roster = Roster.create(config, 3, 0.5, seed=1)
  nll, _ = objectives.Perplexity(config, *ours, BATCH).measure(params, roster, slice(None))
  accuracy = objectives.Accuracy(config, *ours, BATCH)
  right, cost = accuracy.measure(params, roster, slice(None))
  for e, n, r in zip(examples, nll, right):
    metrics = evaluated[e.id, 1]["metrics"]
    assert n == pytest.approx(metrics["nll"], rel=1e-5) and r == metrics["exact_match"]
  assert cost.forward_passes == sum(c["forward_passes"] for c in costs if c["seed"] == 1)


def test_likelihoods_are_those_of_the_distribution(output, model):
  params, config, tokenizer = model
  example = tasks.get("wordmath").examples("test", limit=LIMIT)[4]
  prompt = tokenizer.encode(example.prompt)
  text = prompt + tokenizer.encode(example.reference, add_special_tokens=False) + [0]
  for name, roster in (
    ("baseline", Roster.create(config)),
    ("roster_n=3", Roster.create(config, 3, 0.5, seed=1)),
  ):
    _, lines, _ = of(output, name)
    fitted = json.loads((output / name / "output_temperatures.json").read_text())["wordmath"]
    assert 0.25 <= fitted["temperature"] <= 4 and fitted["examples"] == 3
    line = lines[example.id, int(roster.seed)]
    one = scoring.score(
      params,
      config,
      [text],
      [len(prompt)],
      roster=roster,
      request_ids=[request_id(example.prompt)],
      output_temperatures=(1.0, fitted["temperature"]),
    ).sequences[0]
    metrics = line["metrics"]
    assert metrics["tokens"] == len(text) - len(prompt) == len(line["correct"])
    np.testing.assert_allclose(
      [metrics["nll"], metrics["fitted_nll"]], -one.log_probs.sum(0), rtol=1e-4
    )
    np.testing.assert_allclose(line["confidences"], np.exp(one.greedy_log_probs[:, 0]), atol=1e-4)
    np.testing.assert_allclose(
      line["fitted_confidences"], np.exp(one.greedy_log_probs[:, 1]), atol=1e-4
    )
    assert line["correct"] == (one.greedy_tokens == text[len(prompt) :]).tolist()
  _, plain, _ = of(output, "baseline")
  _, fitted, _ = of(output, "baseline+temperature")
  for key, line in fitted.items():
    assert line["metrics"]["nll"] == pytest.approx(plain[key]["metrics"]["fitted_nll"], rel=1e-5)
    assert "fitted_nll" not in line["metrics"] and line["output"] == plain[key]["output"]
  for name in ("self_consistency_n=3", "scmoe"):
    settings, lines, _ = of(output, name)
    assert settings["likelihood"].startswith("not defined")
    assert all(
      "nll" not in line["metrics"] and "confidences" not in line for line in lines.values()
    )


def test_the_output_temperature_is_the_best_on_validation_examples(output):
  fitted = json.loads((output / "baseline/output_temperatures.json").read_text())["wordmath"]
  best = int(np.argmin(fitted["nll"]))
  assert abs(np.log(fitted["temperature"] / fitted["grid"][best])) < np.log(
    output_temperatures.GRID[1] / output_temperatures.GRID[0]
  )


def test_a_killed_comparison_goes_on_where_it_stopped(output, tiny_checkpoint):
  path = output / "roster_n=3"
  before = (path / runs.EXAMPLES).read_text()
  others = (output / "scmoe" / runs.COSTS).read_text()
  kept = [line for line in before.splitlines(keepends=True) if '"seed": 0' in line]
  (path / runs.EXAMPLES).write_text("".join(kept) + '{"task": "word')  # torn
  (path / runs.SUMMARY).unlink()
  done = compare(tiny_checkpoint, output, f"--methods={METHODS}", "--num_seeds=2")
  assert done.returncode == 0, done.errors
  again, first = (
    [json.loads(line) for line in text.splitlines()]
    for text in ((path / runs.EXAMPLES).read_text(), before)
  )
  assert len(again) == len(first) == 2 * LIMIT
  for one, other in zip(again, first):
    assert one["output"] == other["output"]
    assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-4)
  assert (output / "scmoe" / runs.COSTS).read_text() == others
  assert len(store.read_lines(path / runs.COSTS)) == 6  # of four batches, two done twice


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--methods=baseline;rooster"], "unknown method 'rooster'"),
    (["--tau=0"], "it is the baseline"),
    (["--tasks=wordmath,nothing"], "unknown task 'nothing'"),
    (["--num_seeds=0"], "--num_seeds must be at least 1"),
  ],
)
def test_bad_input_is_refused_before_any_work(tiny_checkpoint, tmp_path, arguments, message):
  done = compare(tiny_checkpoint, tmp_path, *arguments)
  assert done.returncode == 1 and message in done.errors and "Traceback" not in done.errors
  assert not list(tmp_path.iterdir())


def test_choices_are_judged_by_their_probability(model):
  params, config, tokenizer = model
  example = tasks.Example(
    id="choices/0",
    prompt="Question: Ann has 2 pears.\nAnswer:",
    choices=(" 1", " 2 pears", " 3"),
    target=1,
    reference=" 2 pears",
  )
  task = tasks.get("paper/arc_easy")
  method = methods.parse("roster:n=3,t=0.5", config, Roster.create(config))
  measurer = Measurer(params, RequestBuilder(config, tokenizer), BATCH)
  answers = measurer.answer(method, 4, task, [example], [1.0, 2.0])
  prompt = tokenizer.encode(example.prompt)
  texts = [prompt + tokenizer.encode(c, add_special_tokens=False) for c in example.choices]
  sums = np.array(
    [
      t.log_probs.sum(0)
      for t in scoring.score(
        params,
        config,
        texts,
        [len(prompt)] * 3,
        roster=method.with_seed(4),
        request_ids=[request_id(example.prompt)] * 3,
        output_temperatures=(1.0, 2.0),
      ).sequences
    ]
  )
  np.testing.assert_allclose(answers.outputs[0], sums[:, 0], rtol=1e-4)
  likelihood = answers.likelihoods[0]
  np.testing.assert_allclose(likelihood.nll[:2], -sums[1], rtol=1e-4)
  best = int(sums[:, 0].argmax())
  np.testing.assert_allclose(
    likelihood.confidences[:2, 0], scipy.special.softmax(sums, axis=0)[best], rtol=1e-3
  )
  assert likelihood.correct.tolist() == [best == 1]
  counts = [len(t) - len(prompt) for t in texts]
  # " 1" and " 3" differ in their last token: they are one sequence.
  assert likelihood.tokens == counts[1] and answers.cost.tokens == counts[0] + counts[1] + 1
  assert answers.cost.forward_passes == sum(
    len(t) - 1 + 3 * c for t, c in zip(texts[:2], counts[:2])
  )


def test_the_baseline_settings_with_most_right_answers_are_chosen_and_kept(
  model, tmp_path, monkeypatch
):
  _, config, _ = model
  method = methods.parse("best_baseline", config, Roster.create(config, 2, 0.5))
  task = tasks.get("wordmath")
  validation = task.examples("validation", limit=3)
  asked = []

  class AtSevenTenths:
    """Writes two right solutions at a temperature of 0.7, and one otherwise."""

    def answer(self, method, seed, task, batch):
      asked.append(method.sampler.settings())
      right = 2 if asked[-1]["temperature"] == 0.7 else 1
      return types.SimpleNamespace(
        outputs=[e.reference if validation.index(e) < right else "" for e in batch]
      )

  monkeypatch.setattr(
    program, "FLAGS", types.SimpleNamespace(batch_size=2, seed=0, allow_code_execution=False)
  )
  chosen = program.choose(AtSevenTenths(), method, task, tmp_path, validation)
  assert chosen.sampler.settings() == {"temperature": 0.7, "top_k": 0, "top_p": 1.0}
  assert len(asked) == 2 * len(method_specs.BASELINE_SETTINGS)
  kept = json.loads((tmp_path / "baseline_settings.json").read_text())["wordmath"]
  assert [round(3 * t["exact_match"]) for t in kept["tried"]] == [1, 1, 2, 2, 1]
  again = program.choose(None, method, task, tmp_path, validation)
  assert again.sampler.settings() == chosen.sampler.settings()


@pytest.mark.parametrize("select", ["vote", "routing", "any"])
def test_each_sequence_has_its_own_number_of_experts(model, monkeypatch, select):
  """With answers made up from the number of experts, 1 to 3, and the example's index."""
  params, config, tokenizer = model
  text = f"sequences:t=0,k=1-2-3,select={select}"
  method = methods.parse(text, config, Roster.create(config, 2, 0.5))
  task = tasks.get("wordmath")
  examples = task.examples("validation", limit=2)

  class Made:
    def __init__(self, params, config, tokenizer, roster, size):
      self.count = int(roster.experts_by_layer[0, 0])
      assert size == 2 and config.experts_per_token == 3

    def answer(self, requests, output_temperatures):
      answers = [examples[0].reference, " #### 7", examples[1].reference]
      completion = Completion([self.count] * self.count, [-1.0], [1], "stop_token", "")
      cost = Cost(tokens=self.count)
      return [Generated(answers[self.count - 1], completion, cost) for _ in requests]

    def last_gates(self, requests, written):
      assert [len(w) for w in written] == [self.count] * len(requests)
      return [np.eye(3) if self.count == 1 else np.ones((3, 3)) for _ in requests]

  monkeypatch.setattr(measurer, "Engine", Made)
  builder = RequestBuilder(config, tokenizer)
  judge = lambda outputs: [float(o == e.reference) for o, e in zip(outputs, examples)]
  found = Measurer(params, builder, 2).answer(method, 0, task, examples, judge=judge)
  # Two of three have the same gates.
  picked = {"vote": [0, 0], "any": [0, 2], "routing": [1, 1]}[select]
  assert [d["picked"] for d in found.details] == picked
  assert [d["samples"][1] for d in found.details] == [" #### 7"] * 2
  assert found.outputs == [d["samples"][i] for d, i in zip(found.details, picked)]
  assert found.cost.tokens == sum(i + 1 for i in picked)


def test_default_methods_without_an_answer_are_left_out_and_others_refused(
  model, monkeypatch, capsys
):
  _, config, _ = model
  base = Roster.create(config, 4, 0.5)
  found = methods.parse_all(methods.default_texts(config, 4), config, base)
  examples = {"paper/arc_easy": [tasks.Example("a", "?", choices=("x", "y"), target=0)]}
  monkeypatch.setattr(program, "FLAGS", types.SimpleNamespace(methods=None))
  kept = [m.name for m in program.check_methods(found, examples)]
  assert {"baseline", "roster", "experts"} <= set(kept)
  assert not {"self_consistency", "best_of", "best_scmoe", "best_baseline"} & set(kept)
  assert "[skipping SCMoE, best β: task paper/arc_easy needs" in capsys.readouterr().err
  read = [tasks.Example("a", "?", reference=" x", max_new_tokens=0)]
  kept = [m.name for m in program.check_methods(found, {"text/lambada": read})]
  assert {"baseline", "roster", "experts", "best_scmoe"} <= set(
    kept
  )  # greedy tokens are all it needs
  assert not {"self_consistency", "best_of", "best_baseline"} & set(kept)
  assert "best_scmoe" not in [
    m.name for m in program.check_methods(found, {"text/wikitext2": read})
  ]
  monkeypatch.setattr(program, "FLAGS", types.SimpleNamespace(methods="scmoe"))
  with pytest.raises(ValueError, match="remove the task or the method"):
    program.check_methods(found, examples)
