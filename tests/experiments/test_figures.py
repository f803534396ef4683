"""What figures compute: laws, fits, differences, costs, against closed forms."""

import dataclasses
import json
import pathlib
import threading
import types

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.special
from statsmodels.stats.multitest import multipletests
import tiny
import tokenizers

from experiments import figures
from experiments.analysis import paired_statistics
from experiments.analysis.run_results import Result, Tuning
from experiments.benchmarks import power, timing
from experiments.cli import app
from experiments.evaluation import methods
from experiments.figures import (
  calibration,
  ceiling,
  compared,
  deep_training,
  fig5b,
  fig10,
  figure_models,
  judged_sequences,
  last_words,
  likelihoods,
  main_table,
  merged_tasks,
  overhead,
  passages,
  scaling_law,
  search_cost,
  searches,
  table1,
  trained_routing,
  transfer,
)
from experiments.figures.figure_run import RECORDS, FigureRun, read_records, write_records
from experiments.records import store
from experiments.tasks import wordmath, wordmath_task, wordmath_tokenizer
from experiments.training import python_corpus, training_batches
from experiments.tuning import confirm
import roe_jax
from roe_jax import checkpoint, decode, diagnostics, presets, scoring, transformer
from roe_jax import params as params_lib
from roe_jax.roster import Roster

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
  monkeypatch.setattr(paired_statistics, "RESAMPLES", 400)
  monkeypatch.setattr(paired_statistics, "FLIPS", 399)


@pytest.mark.parametrize("exponent", [0.076, 0.5, 2.0])
def test_the_exponent_of_a_power_law_is_found(exponent):
  sizes = np.array([1e5, 4e5, 1.6e6])
  losses = 3.0 * sizes**-exponent
  assert scaling_law.fit_exponent(sizes, losses) == pytest.approx(exponent)
  # The third one's loss equals that of a model of its size.
  assert scaling_law.equivalent(sizes[0], losses[0], losses[2], exponent) == pytest.approx(sizes[2])


def test_the_papers_example_of_the_law():
  """7 B to 10.5 B at α = 0.076 is a loss that is 3 % lower."""
  assert scaling_law.equivalent(7e9, 1.0, 1.5**-0.076, 0.076) == pytest.approx(10.5e9)
  assert 1.5**-0.076 == pytest.approx(0.97, abs=1e-3)


def test_parameters_are_counted_without_embeddings_and_with_all_experts():
  config = presets.PRESETS["olmoe-1b-7b"]
  total = sum(np.prod(w.shape) for w in jax.tree.leaves(params_lib.abstract(config)))
  assert scaling_law.num_parameters(config) == total - 2 * config.vocab_size * config.d_model
  assert 6.6e9 < scaling_law.num_parameters(config) < 6.9e9


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5, 4.0])
def test_a_resized_model_has_the_size_that_was_asked_for(factor):
  config = tiny.config("olmoe", d_model=64, d_expert=48, num_experts=16)
  wanted = factor * scaling_law.num_parameters(config)
  assert scaling_law.num_parameters(scaling_law.resized(config, wanted)) == pytest.approx(
    wanted, rel=0.05
  )


@pytest.mark.parametrize("b", [0.6, 1.0, 1.7])
def test_a_ceiling_is_found_from_points_below_it(b):
  n = np.array([2.0, 4, 8, 16, 32])
  nll = ceiling.curve(n, 0.7, 0.2, b)
  assert ceiling.fit(n, nll, b) == pytest.approx((0.7, 0.2))
  assert ceiling.exponent(n, nll) == pytest.approx(b, abs=1e-3)


def test_shares_of_a_ceiling_are_told_where_it_is_clear():
  n = np.array([1.0, 2, 4, 8, 16, 32, 64])
  random = np.random.default_rng(0)
  tokens = random.integers(10, 30, 80).astype(float)
  base = tokens * 0.2
  gain = np.where(n == 1, 0.0, 0.1 - 0.1 / n)[:, None] * tokens * random.uniform(0.5, 1.5, 80)
  found = ceiling.fit_ceiling(n, base - gain, tokens)
  assert found["b"] == pytest.approx(1, abs=0.02) and found["limit"].excludes_zero
  assert found["limit"].value == pytest.approx(
    100 * np.expm1(-0.1 * (gain[-1] / 0.1 / (1 - 1 / 64)).sum() / tokens.sum()), rel=0.02
  )
  # The last one has all but 1 / n of it.
  assert found["reached"]["64"] == pytest.approx(100 * (1 - 1 / 64), abs=1)
  noise = random.normal(0, 0.5, (len(n), 80))
  noise[0] = 0
  assert (
    ceiling.fit_ceiling(n, base + noise - noise.mean(axis=1, keepdims=True), tokens)["reached"]
    is None
  )


def test_classes_of_tokens_are_between_their_bounds():
  config = calibration.Config(bounds=(0.99, 0.9, 0.5))
  top = np.array([1.0, 0.99, 0.989, 0.9, 0.89, 0.5, 0.1])
  assert calibration._classes(config, top).tolist() == [0, 0, 1, 1, 2, 2, 3]
  assert config.classes == ["p ≥ 0.99", "0.9 ≤ p < 0.99", "0.5 ≤ p < 0.9", "p < 0.5"]


def test_the_share_of_calibration_is_told_only_of_a_clear_gain():
  random = np.random.default_rng(0)
  roster = random.normal(2.0, 0.5, 100)
  clear = paired_statistics.Estimate(
    *paired_statistics.bootstrap([roster, np.ones(100)], paired_statistics.ratio)
  )
  assert calibration._share(0.7 * roster, roster, clear).value == pytest.approx(70)
  unclear = dataclasses.replace(clear, low=-0.1)
  assert calibration._share(0.7 * roster, roster, unclear) is None


def test_differences_are_corrected_over_all_records():
  p = [0.001, 0.02, 0.03, 0.4]
  found = compared.corrected(
    [{"quality_difference": paired_statistics.Difference(2.0, 1.0, 3.0, x, x)} for x in p]
    + [{"quality_difference": None}]
  )
  expected = multipletests(p, method="holm")[1]
  assert [r["quality_difference"].adjusted for r in found[:4]] == pytest.approx(expected.tolist())
  assert [r["quality_difference"].is_significant for r in found[:4]] == [True, False, False, False]
  assert "1 is significant" in compared.findings(
    [r | {"label": "x", "task": "y"} for r in found], ("quality",)
  )


def test_a_record_of_likelihoods_is_paired_with_the_baseline():
  random = np.random.default_rng(0)
  tokens = random.integers(5, 20, 50)
  baseline = {
    "temperature": 1.5,
    "nll": (0.2 * tokens[:, None]).tolist(),
    "fitted_nll": (0.15 * tokens[:, None]).tolist(),
  }
  ours = {
    "temperature": 1.2,
    "nll": (0.18 * tokens[:, None] * [1, 1]).tolist(),
    "fitted_nll": (0.15 * tokens[:, None] * [1.01, 0.99]).tolist(),
  }
  record = likelihoods.record(ours, baseline, tokens, "roster", "wordmath")
  assert record["perplexity"].value == pytest.approx(np.exp(0.18))
  assert record["perplexity_difference"].value == pytest.approx(100 * np.expm1(-0.02))
  assert record["fitted_difference"].value == pytest.approx(0, abs=1e-9)
  assert not record["fitted_difference"].is_significant
  alone = likelihoods.record(baseline, baseline, tokens, "baseline", "wordmath")
  assert alone["perplexity_difference"] is None and alone["fitted_difference"] is None


class FakeNvml(types.SimpleNamespace):
  """The functions of pynvml that are used, of two GPUs of 100 W and 150 W."""

  def __init__(self):
    super().__init__(read=threading.Event())

  def nvmlDeviceGetCount(self):
    return 2

  def nvmlDeviceGetHandleByIndex(self, index):
    return index

  def nvmlDeviceGetPowerUsage(self, handle):
    if handle == 1:
      self.read.set()
    return 100_000 + 50_000 * handle


def test_power_is_the_sum_over_gpus_and_nothing_is_invented_without_them():
  nvml = FakeNvml()
  assert power.mean_watts(nvml, nvml.read.wait, seconds=0.05) == pytest.approx(250)
  meter = power.Meter(nvml)
  assert meter.watts is None and power.mean_watts(None, lambda: 1 / 0) is None


def test_without_its_package_there_is_no_library_of_power(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
  assert power.load_nvml() is None


@pytest.mark.slow
def test_a_case_of_overhead_writes_what_generation_writes_with_all_members(monkeypatch):
  config = tiny.config("olmoe", context_length=64)
  params = tiny.params(config)
  prompts = [[1 + (i * 7 + j) % 40 for j in range(6)] for i in range(4)]
  roster = overhead.all_members(config, 3, 0.0)
  assert roster.noisy_layers == (0, config.num_layers) and len(roster.members) == 3
  written, compile_ = [], timing.compiled

  def compiled(*args):
    program = compile_(*args)

    def run(*inputs):
      state, steps = program(*inputs)
      written.append(np.asarray(state.tokens)[:2, 6:11].tolist())
      return state, steps

    run.memory_analysis = program.memory_analysis
    return run

  monkeypatch.setattr(timing, "compiled", compiled)
  case = overhead.case(params, config, roster, prompts, 2, 5)
  case.call(2)
  assert case.bytes is None or case.bytes > 0
  expected = [
    c.tokens
    for c in decode.generate(
      params,
      config,
      prompts,
      max_new_tokens=5,
      roster=roster,
      stop_tokens=[],
      request_ids=[0, 1, 0, 1],
    ).completions
  ]
  # The first two were taken to compile; then prompts take turns, two at a time.
  assert written == [expected[2:], expected[:2]]


def test_ratios_are_within_rounds():
  seconds, first = np.array([2.0, 6.0, 4.0]), np.array([1.0, 3.0, 1.0])
  found = overhead.timings(seconds, first, 4)
  assert found["time_ratio"] == 2.0 and found["ms_per_token"].value == 1000.0
  assert found["rounds"] == 3


def result(name, tasks, values, nll):
  """A run with exact_match and fitted nll of each example, the same on each of some tasks."""
  records = {
    t: {
      f"{t}/{i}": {0: {"metrics": {"exact_match": v, "fitted_nll": x, "tokens": 10}}}
      for i, (v, x) in enumerate(zip(values, nll))
    }
    for t in tasks
  }
  return Result(None, name, {"spelled": name}, records, [], {})


def test_a_tasks_own_profile_is_compared_with_the_mean_of_the_others():
  random = np.random.default_rng(0)
  tasks = ["a", "b", "c"]
  right = {"a": np.ones(60), "b": random.integers(0, 2, 60), "c": random.integers(0, 2, 60)}
  nll = random.uniform(1, 2, 60)
  worse = {"a": 0.0, "b": 0.5, "c": 0.1}
  found = transfer.own_and_others({t: result(t, tasks, right[t], nll + worse[t]) for t in tasks})
  assert [r["task"] for r in found] == [*tasks, "all tasks"]
  assert found[0]["quality_difference"].value == pytest.approx(
    100 * (1 - (right["b"] + right["c"]).mean() / 2)
  )
  assert [r["fitted_difference"].value for r in found] == pytest.approx(
    [100 * np.expm1(x / 10) for x in (-0.3, 0.45, -0.15, 0.0)]
  )
  # The nll differ alike on all examples of a task, and cancel over all tasks.
  assert [r["fitted_difference"].is_significant for r in found] == [True, True, True, False]
  text = transfer.findings(found)
  assert (
    "perplexity at fitted output temperatures: no significant difference over all tasks" in text
  )
  assert "significantly better on 2 of 3 tasks, worse on 1" in text
  assert transfer.own_and_others({"a": result("a", ["a"], right["a"], nll)}) == []


def test_confirmations_are_corrected_over_tasks():
  random, fresh = np.random.default_rng(0), types.SimpleNamespace(metric="acc")
  expected, found = [], []
  for task, shift in (("one", 0.02), ("two", 0.2), ("three", 0.0)):
    baseline = random.uniform(1, 2, 60)
    tuned = baseline - shift + random.normal(0, 0.1, 60)
    contrasts = confirm.compare({"baseline": {"acc": baseline}, "tuned": {"acc": tuned}}, fresh)
    differences = json.loads(json.dumps([c.to_json() for c in contrasts]))
    profile = {"objective": {"confirmed": {"differences": differences}}}
    expected.append(paired_statistics.paired_test(tuned, baseline).p)
    found.append({"differences": searches._differences(Tuning(task, profile, []))})
    assert found[-1]["differences"] == contrasts
  found = searches.corrected(found)
  differences = [searches.fresh(r) for r in found]
  assert [d.p for d in differences] == pytest.approx(expected)
  corrected = multipletests(expected, method="holm")[1]
  assert [d.adjusted for d in differences] == pytest.approx(corrected)
  assert [d.is_significant for d in differences] == [False, True, False]
  del profile["objective"]["confirmed"]["differences"][0]["p"]
  with pytest.raises(ValueError, match="differences without a test, of an earlier version: delete"):
    searches._differences(Tuning("three", profile, []))


def test_records_of_figures_come_back_as_they_were_written(tmp_path):
  difference = paired_statistics.Difference(-0.4, -0.8, -0.1, 0.01, 0.02)
  records = [
    {"task": "t", "d": difference, "untested": paired_statistics.Difference(1.0, 0.5, 2.0)},
    {"differences": [paired_statistics.Contrast("tuned", "baseline", True, difference)], "n": None},
  ]
  write_records(tmp_path / RECORDS, records)
  assert read_records(tmp_path / RECORDS) == records
  line = json.loads((tmp_path / RECORDS).read_text().splitlines()[0])
  values = {"value": -0.4, "low": -0.8, "high": -0.1, "p": 0.01, "adjusted": 0.02}
  assert line["d"] == values | {"significant": True}


@pytest.fixture
def search():
  """A search by perplexity of four trials, one pruned."""
  difference = paired_statistics.Contrast(
    "tuned", "baseline", False, paired_statistics.Difference(-0.4, -0.8, 0.1, 0.1, 0.1)
  )
  trial = lambda number, kind, state, temperatures, value, rows: {
    "number": number,
    "kind": kind,
    "state": state,
    "temperatures": temperatures,
    "value": value,
    "forward_passes": rows,
  }
  return {
    "task": "t",
    "category": "math",
    "settings": {
      "objective": "perplexity",
      "num_examples": 5,
      "num_trials": 4,
      "num_members": 4,
      "max_tau": 0.5,
      "fixed_layers": 1,
    },
    "profile": {
      "temperatures": [0.0, 0.1, 0.2, 0.0],
      "objective": {"name": "perplexity", "value": 1.9, "baseline": 2.0, "kind": "tpe"},
      "cost": {
        "tokens": 30,
        "forward_passes": 160,
        "seconds": 3.0,
        "trials": 4,
        "pruned": 1,
        "failed": 0,
      },
    },
    "differences": [difference],
    "trials": [
      trial(0, "sweep", "complete", [0.0, 0.1, 0.1, 0.0], 1.95, 50),
      trial(1, "tpe", "pruned", [0.0, 0.4, 0.4, 0.0], 2.5, 20),
      trial(2, "tpe", "complete", [0.0, 0.1, 0.2, 0.0], 1.9, 50),
      trial(3, "sweep", "complete", [0.0, 0.2, 0.2, 0.0], 1.92, 40),
    ],
  }


def test_a_search_tells_what_is_left_on_fresh_examples(search):
  assert searches.searched_gain(search) == pytest.approx(-5) and searches.gained(search)
  assert "beats the baseline on 1 of 1 task; on fresh examples this is significant on 0." in (
    searches.findings([search])
  )
  text = searches.table([search])
  assert "-5.00" in text and "-0.40 [-0.80, +0.10]" in text and "0.00 0.10 0.20 0.00" in text
  assert "| 5 / 4" in table1.table([search]) and "-0.40 [-0.80, +0.10]" in table1.table([search])
  worse = search | {
    "profile": search["profile"]
    | {"objective": {"name": "accuracy", "value": 0.4, "baseline": 0.5}}
  }
  assert not searches.gained(worse)
  assert "on 0 of 1 task" in searches.findings([worse])


def test_a_search_costs_what_its_trials_cost(search, monkeypatch):
  monkeypatch.setattr(searches, "records", lambda work, tasks: [search])
  model = dataclasses.replace(figure_models.get("embedded"), math=("t",), commonsense=(), code=())
  work = FigureRun("search_cost", model, search_cost.CONFIGS["embedded"], None)
  (record,) = search_cost.measure(work)
  assert [(h["forward_passes"], h["best"]) for h in record["history"]] == [
    (50, 1.95),
    (70, 1.95),
    (120, 1.9),
    (160, 1.9),
  ]
  assert record["roster_tokens"] == 40  # 160 rows of four members
  # -0.4 of -5 percent; what TPE gave up is no value that it found.
  assert dataclasses.astuple(record["retained"]) == pytest.approx((8, -2, 16))
  assert record["equal_trials"] == {"trials": 2, "sweep": 1.92, "tpe": 1.9}
  text = search_cost.findings([record])
  assert "8 % of the search gain (median; 8 to 8 %) is" in text
  assert "costs as much as generating 40 to 40 tokens" in text
  assert "retained on fresh examples, where it is significant on 0 of 1 task" in text
  assert "TPE's best beats the sweep's on 1 of 1 task and loses on 0" in text
  assert "| 8 [-2, 16]" in search_cost.table([record])
  # The sweep is not compared with fewer trials, nor with one that was given up.
  trials = search["trials"]
  for fewer in (trials[:2], [trials[i] for i in (0, 2, 3)]):
    search["trials"] = fewer
    assert search_cost.measure(work)[0]["equal_trials"] is None


def test_layers_that_a_search_kept_at_zero_are_marked_and_not_averaged(search):
  other = search | {
    "task": "u",
    "profile": search["profile"] | {"temperatures": [0.0, 0.3, 0.4, 0.0]},
  }
  assert fig10.table([search, other]).count("fixed") == 4
  text = fig10.findings([search, other])
  assert "layers 1 to 2, which no search kept at 0, over 2 tasks: 0.20, 0.30." in text
  assert "between tasks 0.14 on average, between layers 0.07" in text
  picture = fig10.draw([search, other])
  hatched = [(p.get_x() + 0.5, p.get_y() + 0.5) for p in picture.axes[0].patches if p.get_hatch()]
  assert sorted(hatched) == [(0, 0), (0, 1), (3, 0), (3, 1)]
  assert "kept at 0" in picture.axes[0].get_xlabel()
  plt.close(picture)


def test_larger_models_are_made_on_one_device_only(tmp_path):
  work = FigureRun("fig5b", figure_models.get("mixtral"), fig5b.CONFIGS["mixtral"], tmp_path)
  with pytest.raises(ValueError, match="needs several"):
    fig5b.measure(work)


@pytest.mark.parametrize("name", ["fig6", "caches", "ceiling", "sparsity", "iso_compute"])
def test_lower_perplexity_is_drawn_higher(name):
  measure = "fitted_difference" if name == "iso_compute" else "perplexity_difference"
  records = read_records(ROOT / "docs/results/embedded" / name / RECORDS)
  figure = figures.get(name).draw(records)
  drawn = {
    round(float(y), 9)
    for axis in figure.axes
    for container in axis.containers
    for y in container.lines[0].get_ydata()
  }
  reductions = {round(-r[measure].value, 9) for r in records if r.get(measure)}
  reductions -= {0.0}
  assert reductions and reductions <= drawn
  plt.close(figure)


@pytest.fixture
def last_words_run(tiny_checkpoint, tmp_path):
  config = dataclasses.replace(
    last_words.Config(),
    members=(1, 2, 3, 4),
    compared=2,
    temperatures=(0.5,),
    num_validation=3,
    num_examples=5,
    num_other=2,
    num_seeds=2,
  )
  model = dataclasses.replace(
    figure_models.get("smollm2"), checkpoints=(str(tiny_checkpoint),), batch_size=2
  )
  for name, lines in {
    "lambada/test.jsonl": [json.dumps({"text": f"Ann has {i} Qs{i % 2 * 's'}"}) for i in range(6)],
    "lambada/development.txt": [f"Ann `` had '' {i} Qs" for i in range(3)],
    "wikitext2/wiki.test.raw": [f" = Title {i} = \n" + 40 * " Qs Qs" for i in range(2)],
  }.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("\n".join(lines) + "\n")
  return FigureRun("last_words", model, config, tmp_path / "out", 3, str(tmp_path))


def test_last_words_are_read_as_all_members_predict_them(last_words_run, monkeypatch):
  monkeypatch.setattr(last_words, "OTHER_CONTEXT", 60)
  run, checkpoint = last_words_run, last_words_run.model.checkpoint
  found = last_words.measure(run)
  assert [r["part"] for r in found].count("n") == 4 and len(found) == 1 + 4 + 2 + 8 + 3
  of_seeds = [r["perplexity"].value for r in found if r["part"] == "seed"]
  assert of_seeds[0] == next(r["perplexity"].value for r in found if r.get("n") == 2)
  assert of_seeds[0] != of_seeds[1] and np.prod(of_seeds[:2]) == pytest.approx(of_seeds[2] ** 2)
  log = {r["n"]: np.log(r["perplexity"].value) for r in found if r["part"] == "n"}
  _, limit = np.polyfit([1 / n for n in (2, 3, 4)], [log[n] for n in (2, 3, 4)], 1)
  of_limit = next(r["limit"].value for r in found if r["part"] == "ceiling" and r["fit"] == "nll")
  assert of_limit == pytest.approx(100 * np.expm1(limit - log[1]), rel=1e-6, abs=1e-9)
  tau = next(r["tau"] for r in found if r["part"] == "tau" and r["chosen"])
  assert all(
    isinstance(part, str) for part in (last_words.table(found), last_words.findings(found))
  )
  plt.close(last_words.draw(found))

  reader = last_words.Reader(run, checkpoint, run.measurements())
  requests = reader.requests("text/lambada", "test", 5)
  assert len({len(r.tokens) for r in requests}) > 1
  roster = Roster.create(reader.config, 4, tau, seed=3)
  job = last_words.Job("a", roster, (1, 2, 4), np.array([[1.0, 2.0]] * 3))
  values = reader.read("again", None, requests, [job])["a"]
  for r, value in zip(requests, values):
    logits = diagnostics.member_logits(
      reader.params,
      reader.config,
      [r.sequence[:-1]],
      roster=roster,
      request_ids=[r.request_id],
      all_positions=True,
    )[:, 0, -len(r.tokens) :].astype(float)
    p = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    for i, n in enumerate(job.sizes):
      mean = p[:n].mean(axis=0)
      own = mean[range(len(r.tokens)), r.tokens]
      halved = mean**0.5 / (mean**0.5).sum(axis=-1, keepdims=True)
      expected = [-np.log(own).sum(), -np.log(halved[range(len(r.tokens)), r.tokens]).sum()]
      np.testing.assert_allclose(value["nll"][i], expected, rtol=1e-4)
      np.testing.assert_allclose(
        value["entropy"][i], [-(q[0] * np.log(q[0])).sum() for q in (mean, halved)], rtol=1e-4
      )
      of_members = -(p[:n, 0] * np.log(p[:n, 0])).sum(axis=-1).mean()
      assert value["of_members"][i] == pytest.approx(of_members, rel=1e-4)
      assert value["right"][i] == (mean.argmax(axis=-1) == r.tokens).all()
      assert value["first"][i] == (mean[0].argmax() == r.tokens[0])
  record = next(r for r in found if r.get("n") == 4)
  nll = np.mean([v["nll"][2][0] for v in values])
  assert record["perplexity"].value == pytest.approx(np.exp(nll), rel=1e-4)

  more = dataclasses.replace(run, config=dataclasses.replace(run.config, num_examples=6))
  monkeypatch.setattr(passages, "PART", 5)
  assert last_words.measure(more)[1]["examples"] == 6


def test_merged_tasks_are_compared_with_averages_and_task_arithmetic(tmp_path, monkeypatch):
  config = merged_tasks.Config(multiples=(0.5, 1.0), temperatures=(0.3,), num_examples=2)
  model = dataclasses.replace(figure_models.get("embedded"), num_validation=40)
  run = FigureRun("merged_tasks", model, config, tmp_path)
  params, of_model = app.load_params(config.checkpoint, "float32")
  keys = iter(jax.random.split(jax.random.key(0), 99))
  changes = [
    jax.tree.map(lambda w: 0.01 * jax.random.normal(next(keys), w.shape), params) for _ in range(2)
  ]

  def fine_tune(run, kind):
    folder = run.folder / kind
    checkpoint.save(
      folder,
      jax.tree.map(jnp.add, params, changes[kind == "choice"]),
      of_model,
      files=app.checkpoint_path(config.checkpoint),
    )
    return str(folder)

  monkeypatch.setattr(merged_tasks, "_fine_tune", fine_tune)
  problems = merged_tasks._Problems(run)
  valued = []
  monkeypatch.setattr(problems, "value", lambda system, seed: valued.append(system) or len(valued))
  systems = merged_tasks._systems(run, problems, run.measurements())
  of = lambda name, task=0: systems[name][0](task, 7)
  embedding, (a, b) = params.embedding, (c.embedding for c in changes)
  # Three of the four fine-tunes are the same.
  found = of("average of weights")[0].embedding
  np.testing.assert_allclose(found, embedding + (3 * a + b) / 4, atol=1e-6)
  np.testing.assert_allclose(
    of("task arithmetic, 0.5")[0].embedding, embedding + (3 * a + b) / 2, atol=1e-6
  )
  np.testing.assert_array_equal(of("separate fine-tunes", 3)[0].embedding, embedding + b)
  one = sum(w.nbytes for w in jax.tree.leaves(params))
  assert systems["base"][1] == one and systems["separate fine-tunes"][1] == 4 * one
  assert 2 * one < systems["merged, task given, scale sums"][1] < 2.3 * one
  _, roster = of("roster of the four tasks, scale least_squares, τ = 0.3")
  assert (roster.member_tasks, roster.include_clean, int(roster.seed)) == ((0, 1, 2, 3), False, 7)


@pytest.fixture(scope="module")
def tokenizer():
  """That of the embedded models."""
  return wordmath_tokenizer.build_tokenizer()


@pytest.mark.parametrize("kind", merged_tasks.TASKS)
def test_problems_of_sub_tasks_and_their_answers(kind, tokenizer):
  for index in range(5):
    problem = merged_tasks._problem(kind, index, 1)
    assert kind in ("choice", wordmath_task.kind_of(problem))
    before, answer = merged_tasks._encode(tokenizer, kind, problem)
    text = tokenizer.decode(before + answer)
    assert text == wordmath.prompt(problem) + wordmath.completion(problem)
    if kind == "choice":
      assert tokenizer.decode(answer) == f"{problem.result}. #### {problem.result}"


def test_a_missing_checkpoint_of_the_main_table_is_named_with_its_command():
  with pytest.raises(FileNotFoundError, match="make it with `.*--carve_router=neurons`"):
    main_table.check_others(["smollm2_neurons"])


def test_the_main_table_has_each_method_as_it_scores_alone(last_words_run, monkeypatch):
  monkeypatch.setattr(main_table, "ENOUGH", 5)
  monkeypatch.setattr(main_table, "BETAS", (0.9,))
  config = main_table.Config(
    num_members=3,
    temperatures=(0.5,),
    compute=("experts:k=1", "roster:unsure=margin<0.5", "roster", "best_scmoe"),
    strength=(),
    noise=("roster:noise=swap",),
    layers=(),
    histories=("roster:cache=standard",),
    experts=(1,),
    others=(),
    num_validation=3,
    num_examples=5,
    num_few=4,
    num_counted=2,
  )
  run = dataclasses.replace(last_words_run, figure="main_table", config=config)
  found = main_table.measure(run)
  assert isinstance(main_table.table(found) + main_table.findings(found), str)
  plt.close(main_table.draw(found))
  of = {(r["table"], r["method"]): r for r in found}
  reader = main_table.Reader(run, run.model.checkpoint, run.measurements())
  reader.choose()
  for text, (table, name) in {
    "roster:t=0.5": ("compute", "roster"),
    "roster:t=0.5,cache=standard": ("histories", "roster:cache=standard"),
    "roster:t=0.5,k=1": ("experts", "roster:k=1"),
    "baseline": ("compute", "baseline"),
  }.items():
    method, r = reader.parse(text), of[table, name]
    some = reader.requests["test"][: r["examples"]]
    scores = scoring.score(
      reader.params,
      method.config,
      [s.sequence for s in some],
      [len(s.context) for s in some],
      roster=method.roster,
      request_ids=[s.request_id for s in some],
    )
    nll = [-one.log_probs.sum() for one in scores.sequences]
    assert r["perplexity"].value == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    assert r["members"] == len(method.roster.members)
    right = [(one.greedy_tokens == s.tokens).all() for one, s in zip(scores.sequences, some)]
    if r["quality"]:
      assert r["quality"].value == pytest.approx(100 * np.mean(right))
  assert of["compute", "baseline"]["computation"] == 1
  active = reader.config.experts_per_token
  assert of["compute", "baseline"]["unique_experts"] == active
  assert active < of["compute", "roster"]["unique_experts"] < 3 * active
  assert of["compute", "roster:unsure=margin<0.5"]["unique_experts"] is None
  assert (
    1
    < of["compute", "roster:unsure=margin<0.5"]["computation"]
    <= of["compute", "roster"]["computation"]
  )
  scmoe = next(r for (_, name), r in of.items() if name.startswith("scmoe:beta="))
  assert scmoe["perplexity"] is None and scmoe["quality_difference"] is not None
  # As many experts are kept as with Gumbel noise: one more or fewer of all counted.
  swap = next(name for table, name in of if "noise=swap" in name)
  strength = methods.read(swap).t
  kept = [reader._kept(noise, t) for noise, t in (("swap", strength), ("gumbel", 0.5))]
  assert abs(kept[0] - kept[1]) < 0.1 and 0 < strength < 1


def test_solved_problems_are_those_that_greedy_decoding_writes(tokenizer, tmp_path):
  config = trained_routing.Config(
    questions=("noise",), training_seeds=(1,), steps=1, num_examples=6, num_validation=2
  )
  run = FigureRun("trained_routing", figure_models.get("embedded"), config, tmp_path)
  folder = trained_routing._training(run, "plain", 1).output
  folder.mkdir(parents=True)
  (folder / "model").symlink_to(app.checkpoint_path("embedded:wordmath_d64"))
  models = trained_routing._Models(run)
  params, of_model = models.load("plain", 1)
  roster = Roster.create(of_model, 4, 1.0, seed=7)
  nll, right, confidence = models.test.judge(of_model, [(params, roster)], [1.0, 2.0])
  encoded = [training_batches.encode(tokenizer, p) for p in wordmath.problems("test", 6)]
  written = decode.generate(
    params, of_model, [prompt for prompt, _ in encoded], max_new_tokens=60, roster=roster
  )
  solved = [all(r) for r in right]
  assert solved == [
    list(c.tokens) == completion for c, (_, completion) in zip(written.completions, encoded)
  ]
  assert {True, False} == set(solved)
  pairs = judged_sequences.Items(models.test.batches, np.arange(6) // 2)
  of_pairs = pairs.judge(of_model, [(params, roster)], [1.0, 2.0])
  for i in range(3):
    np.testing.assert_allclose(of_pairs[0][i], nll[2 * i] + nll[2 * i + 1], rtol=1e-6)
    np.testing.assert_array_equal(of_pairs[1][i], np.concatenate(right[2 * i : 2 * i + 2]))
    assert pairs.tokens[i] == len(of_pairs[2][i])

  halved = jax.tree.map(lambda w: 0.9 * w, params)
  two = [(p, Roster.create(of_model)) for p in (params, halved)]
  nll, right, confidence = models.test.judge(of_model, two, [1.0, 2.0])
  texts = np.zeros((6, max(len(prompt + completion) for prompt, completion in encoded)), int)
  for row, (prompt, completion) in zip(texts, encoded):
    row[: len(prompt + completion)] = prompt + completion
  forward = jax.jit(lambda params: transformer.forward(params, of_model, texts)[0])
  each = [scipy.special.softmax(np.asarray(forward(p), np.float64), axis=-1) for p, _ in two]
  for i, (prompt, completion) in enumerate(encoded):
    p = np.mean(each, axis=0)[i, len(prompt) - 1 : len(prompt + completion) - 1]
    flat = p**0.5 / (p**0.5).sum(-1, keepdims=True)
    rows = np.arange(len(completion))
    expected = [-np.log(q[rows, completion]).sum() for q in (p, flat)]
    np.testing.assert_allclose(nll[i], expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(confidence[i], flat.max(-1), rtol=1e-3)
    np.testing.assert_array_equal(right[i], p.argmax(-1) == completion)


def test_gradient_spikes_are_counted_after_the_window():
  norms = np.array([9.0, 1, 1, 1, 5, 1.4, 1, 2.5, 1])
  # Medians of the three steps before: 1, 1, 1.4, 1.4, 1.4, 1.4.
  assert deep_training.spike_ratio(norms, 2.0, 3) == pytest.approx(1 / 6)
  assert deep_training.spike_ratio(norms, 1.5, 3) == pytest.approx(2 / 6)
  with pytest.raises(ValueError, match="need more steps, got 3"):
    deep_training.spike_ratio(norms[:3], 2.0, 3)


def test_effects_of_deep_training_are_differences_paired_by_seed(tmp_path):
  config = deep_training.Config(training_seeds=(1, 2), factors=(2.0,), window=2)
  run = FigureRun("deep_training", figure_models.get("embedded"), config, tmp_path)
  added = {"plain": 0.0, "sandwich": -1.0, "tiny": -0.2, "sandwich_tiny": -1.4}
  for name, change in added.items():
    for seed in (1, 2):
      lines = [
        {
          "step": s,
          "kind": "training",
          "cross_entropy": 3 + seed + change,
          "grad_norm": 1.0 + 9 * (s == 3),
        }
        for s in (1, 2, 3, 4)
      ] + [{"step": 4, "kind": "evaluation", "validation_perplexity": 2.0}]
      store.write_lines(deep_training._training(run, name, seed).output / "metrics.jsonl", lines)
  records = {r["label"]: r for r in deep_training.measure(run)}
  assert records["plain"]["spikes"]["2"] == [50.0, 50.0]
  # The mean over the other factor: (-1 - 1.2) / 2 and (-0.2 - 0.4) / 2.
  assert records["sandwich norm"]["loss (nats)"].value == pytest.approx(-1.1)
  assert records["TinyInit"]["loss (nats)"].value == pytest.approx(-0.3)


def test_windows_of_text_are_grouped_by_file(tmp_path, monkeypatch):
  sentence = "Tom has 3 pens and buys 14 more. "
  documents = {
    split: [
      python_corpus.Document("p", f"{i}", f"{split} {i}. " + sentence * 20 * (i + 1))
      for i in range(3)
    ]
    for split in python_corpus.SPLITS
  }
  corpus = python_corpus.Corpus(documents, {"python": "3"})
  monkeypatch.setattr(python_corpus, "collect", lambda: corpus)
  monkeypatch.setattr(app, "checkpoint_path", pathlib.Path)  # folders without models
  model = roe_jax.load_config("embedded:wordmath_d32")
  folders = [tmp_path / name for name in "ab"]
  for folder in folders:
    wordmath_tokenizer.save_tokenizer(wordmath_tokenizer.build_tokenizer(200), folder)
  counts = {"validation": 3, "test": 5}
  validation, test = judged_sequences.TEXT.items(model, list(map(str, folders)), counts)
  assert len(validation.tokens) == len(test.tokens) == 3  # one window of each file, then others
  assert test.facts == {"windows": 5, "digest": corpus.digest}
  tokenizer = tokenizers.Tokenizer.from_file(str(folders[0] / "tokenizer.json"))
  rows = np.concatenate([b.tokens for b in test.batches])
  texts = [tokenizer.decode(row.tolist()) for row in rows]
  whole = [d.text for d in documents["test"]]
  assert all(any(text in w for w in whole) for text in texts) and len(set(texts)) > 1
  assert test.tokens.sum() == sum((b.weights[:, 1:] > 0).sum() for b in test.batches)
  wordmath_tokenizer.save_tokenizer(wordmath_tokenizer.build_tokenizer(300), folders[1])
  with pytest.raises(ValueError, match="they were trained on different text"):
    judged_sequences.TEXT.items(model, list(map(str, folders)), counts)
