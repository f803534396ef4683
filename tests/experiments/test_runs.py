import json
import statistics

import numpy as np
import pytest
import scipy.stats

from experiments.records import runs


def record(example, seed=0, correct=1.0, task="t"):
  return {"task": task, "example": example, "seed": seed, "metrics": {"acc": correct}}


def test_a_run_goes_on_where_it_stopped_and_ends_the_same(tmp_path):
  whole = runs.Run(tmp_path / "whole", "plain", {"n": 1})
  whole.write([record("a"), record("b", correct=0.0)], {"task": "t", "seed": 0, "tokens": 5})
  summary = whole.finish()
  assert summary["tasks"]["t"] == {
    "examples": 2,
    "seeds": 1,
    "metrics": {"acc": 0.5},
    "standard_errors": {"acc": 0.5},
    "std_over_seeds": {},
  }
  assert summary["costs"] == {"tokens": 5}

  path = tmp_path / "killed"
  runs.Run(path, "plain", {"n": 1}).write([record("b", correct=0.0)])
  with open(path / runs.EXAMPLES, "a") as file:
    file.write('{"task": "t", "exam')  # torn by a kill
  again = runs.Run(path, "plain", {"n": 1})
  assert again.done == {("t", "b", 0)}
  # A batch that was cut off within its lines is measured as a whole again.
  again.write([record("a"), record("b", correct=0.0)], {"task": "t", "seed": 0, "tokens": 5})
  assert again.finish() == summary
  assert (path / runs.EXAMPLES).read_text() == (tmp_path / "whole" / runs.EXAMPLES).read_text()
  settings, lines, found = runs.load(path)
  assert settings.pop("command").startswith("python -m experiments.")
  assert settings == {"name": "plain", "n": 1} and len(lines) == 2 and found == summary


DEEP = "[" * 10**5


@pytest.mark.parametrize(
  "name, text, message",
  [
    (runs.SETTINGS, "{", "settings.json is not valid JSON"),
    (runs.SETTINGS, "null", "settings.json must be a JSON object, got None"),
    (runs.SETTINGS, DEEP, "settings.json is nested too deeply"),
    (runs.SUMMARY, "[1]", "summary.json must be a JSON object"),
    (runs.SUMMARY, "\xff", "summary.json is not UTF-8 text"),
    (runs.EXAMPLES, DEEP, "line 1 of .*examples.jsonl is nested too deeply"),
    (runs.EXAMPLES, "{}", "line 1 of .*examples.jsonl has no example, metrics, seed, task"),
    (runs.EXAMPLES, {"seed": True}, "seed of line 1 of .* must be an integer, got True"),
    (runs.EXAMPLES, {"example": 1.5}, "example of line 1 of .* must be text or an integer"),
    (runs.EXAMPLES, {"metrics": []}, "metrics of line 1 of .* must be a JSON object"),
    (runs.EXAMPLES, {"metrics": {"acc": "1"}}, "'acc' of metrics of line 1 of .* a finite number"),
    (runs.EXAMPLES, {"metrics": {"acc": float("nan")}}, "'acc' of metrics .*, got nan"),
  ],
)
def test_damaged_files_of_a_run_get_a_sentence(tmp_path, name, text, message):
  run = runs.Run(tmp_path, "plain", {})
  run.write([record("a")])
  run.finish()
  text = text if isinstance(text, str) else json.dumps(record("a") | text)
  (tmp_path / name).write_text(text + "\n", encoding="latin-1")
  with pytest.raises(ValueError, match=message):
    runs.load(tmp_path)
  if name != runs.SUMMARY:  # a rerun replaces it
    with pytest.raises(ValueError, match=message):
      runs.Run(tmp_path, "plain", {})


def test_a_summary_has_perplexities_and_the_uncertainty_of_every_metric():
  rng = np.random.default_rng(0)
  correct, tokens = rng.random((200, 3)) < 0.6, rng.integers(5, 40, 200)
  nll = tokens[:, None] * rng.gamma(2.0, 0.1, (200, 3))
  records = [
    record(f"e{x}", s, float(correct[x, s]))
    | {"metrics": {"acc": float(correct[x, s]), "nll": nll[x, s], "tokens": int(tokens[x])}}
    for x in range(200)
    for s in range(3)
  ]
  found = runs.means([*records, record("alone", task="one")])
  mean, error, spread = (
    found["t"][kind] for kind in ("metrics", "standard_errors", "std_over_seeds")
  )
  assert error["acc"] == pytest.approx(scipy.stats.sem(correct.mean(axis=1)))
  assert spread["acc"] == pytest.approx(statistics.stdev(correct.mean(axis=0)))
  assert mean["perplexity"] == pytest.approx(np.exp(nll.sum() / (3 * tokens.sum())))
  by_seed = np.exp(nll.sum(axis=0) / tokens.sum())
  assert spread["perplexity"] == pytest.approx(statistics.stdev(by_seed))
  resampled = scipy.stats.bootstrap(
    (nll.mean(axis=1), tokens),
    lambda n, t, axis: np.exp(n.sum(axis=axis) / t.sum(axis=axis)),
    paired=True,
    n_resamples=2000,
    method="percentile",
    rng=rng,
  )
  assert error["perplexity"] == pytest.approx(resampled.standard_error, rel=0.08)
  assert found["one"]["standard_errors"] == found["one"]["std_over_seeds"] == {}


def test_costs_are_summed_and_peaks_are_not(tmp_path):
  run = runs.Run(tmp_path, "r", {})
  for bytes_ in (3, 7, 5):
    run.write([], {"task": "t", "seed": 0, "seconds": 1.5, "peak_bytes": bytes_})
  assert run.costs() == {"seconds": 4.5, "peak_bytes": 7}


def test_other_settings_are_refused(tmp_path):
  runs.Run(tmp_path, "r", {"n": 1, "seed": 0})
  with pytest.raises(ValueError, match=r"other settings \(n\): choose another folder"):
    runs.Run(tmp_path, "r", {"n": 2, "seed": 0})


def test_a_folder_with_a_run_may_be_renamed(tmp_path):
  runs.Run(tmp_path / "first", None, {"n": 1}).write([record("a")])
  (tmp_path / "first").rename(tmp_path / "second")
  again = runs.Run(tmp_path / "second", None, {"n": 1})
  assert again.done == {("t", "a", 0)} and again.finish()["name"] == "first"
  with pytest.raises(ValueError, match=r"other settings \(name\)"):  # of a method, for example
    runs.Run(tmp_path / "second", "other", {"n": 1})


def test_an_unfinished_run_is_no_result(tmp_path):
  runs.Run(tmp_path, "r", {}).write([record("a")])
  with pytest.raises(FileNotFoundError, match="summary.json, so it is not a finished run"):
    runs.load(tmp_path)
