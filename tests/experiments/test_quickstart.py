import json

import programs
import pytest

pytestmark = pytest.mark.slow


def run(*arguments):
  return programs.call("experiments.quickstart", *arguments)


def test_the_whole_program_on_a_random_model(tiny_checkpoint, tmp_path):
  done = run(
    f"--checkpoints={tiny_checkpoint}",
    "--num_members=1",
    "--num_members=3",
    "--temperature_profile=0.5",
    "--num_problems=5",
    "--num_validation=4",
    "--batch_size=3",
    f"--output={tmp_path}",
  )
  assert done.returncode == 0, done.errors
  found = json.loads((tmp_path / "results.json").read_text())["checkpoint"]
  plain, one, three = found["rows"]
  # n = 1 is the plain model.
  for key in ("perplexity", "fitted_perplexity", "output_temperature", "accuracy"):
    assert one[key] == plain[key]
  assert one["perplexity_difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
  assert three["perplexity"] != plain["perplexity"]
  difference = three["perplexity_difference"]
  assert abs(difference["value"] - 100 * (three["perplexity"] / plain["perplexity"] - 1)) < 1e-6
  assert difference["low"] <= difference["value"] <= difference["high"]
  assert len(found["routing_agreement"]) == 2
  assert 0 < min(found["routing_agreement"]) <= max(found["routing_agreement"]) < 1
  assert (tmp_path / "quickstart.png").read_bytes()[:4] == b"\x89PNG"
  assert "roster, n = 3" in done.output and "clean member alone would choose" in done.output
  assert (tmp_path / "table.txt").read_text() in done.output


def test_bad_settings_are_refused_before_any_work(tiny_checkpoint, tmp_path):
  done = run(f"--checkpoints={tiny_checkpoint}", "--num_members=0", f"--output={tmp_path}")
  assert done.returncode == 1 and "Traceback" not in done.errors
  assert not list(tmp_path.iterdir())
