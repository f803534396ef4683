import pytest

from experiments.records import runs


def record(example, seed=0, correct=1.0, task="t"):
  return {"task": task, "example": example, "seed": seed, "metrics": {"acc": correct}}


def test_a_run_goes_on_where_it_stopped_and_ends_the_same(tmp_path):
  whole = runs.Run(tmp_path / "whole", "plain", {"n": 1})
  whole.write([record("a"), record("b", correct=0.0)], {"task": "t", "seed": 0, "tokens": 5})
  summary = whole.finish()
  assert summary["tasks"]["t"] == {"examples": 2, "seeds": 1, "metrics": {"acc": 0.5}}
  assert summary["costs"] == {"tokens": 5}

  path = tmp_path / "killed"
  runs.Run(path, "plain", {"n": 1}).write([record("b", correct=0.0)])
  with open(path / runs.EXAMPLES, "a") as file:
    file.write('{"task": "t", "exam')  # torn by a kill
  again = runs.Run(path, "plain", {"n": 1})
  assert again.done == {("t", "b", 0)}
  again.write([record("a")], {"task": "t", "seed": 0, "tokens": 5})
  assert again.finish() == summary
  assert (path / runs.EXAMPLES).read_text() == (tmp_path / "whole" / runs.EXAMPLES).read_text()
  settings, lines, found = runs.load(path)
  assert settings.pop("command").startswith("python -m experiments.")
  assert settings == {"name": "plain", "n": 1} and len(lines) == 2 and found == summary


def test_costs_are_summed_and_peaks_are_not(tmp_path):
  run = runs.Run(tmp_path, "r", {})
  for bytes_ in (3, 7, 5):
    run.write([], {"task": "t", "seed": 0, "seconds": 1.5, "peak_bytes": bytes_})
  assert run.costs() == {"seconds": 4.5, "peak_bytes": 7}


def test_other_settings_are_refused(tmp_path):
  runs.Run(tmp_path, "r", {"n": 1, "seed": 0})
  with pytest.raises(ValueError, match=r"other settings \(n\): choose another folder"):
    runs.Run(tmp_path, "r", {"n": 2, "seed": 0})


def test_an_unfinished_run_is_no_result(tmp_path):
  runs.Run(tmp_path, "r", {}).write([record("a")])
  with pytest.raises(FileNotFoundError, match="summary.json, so it is not a finished run"):
    runs.load(tmp_path)
