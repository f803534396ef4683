import json

import programs
import pytest

from experiments.records import runs

pytestmark = pytest.mark.slow


def test_the_whole_program_on_a_random_model(tiny_checkpoint, tmp_path):
  arguments = (
    f"--checkpoints={tiny_checkpoint}",
    "--num_members=3",
    "--tau=0.5",
    "--num_examples=6",
    "--num_validation=3",
    "--batch_size=3",
    f"--output={tmp_path}",
  )
  done = programs.call("experiments.quickstart", *arguments)
  assert done.returncode == 0, done.errors
  by_method = {}
  for name in ("baseline", "roster_n=2", "roster_n=3"):
    settings, records, _ = runs.load(tmp_path / "checkpoint" / name)
    assert settings["dtype"] == "float32"
    by_method[name] = records
    nll, tokens = (sum(r["metrics"][key] for r in records) for key in ("nll", "tokens"))
    label = "baseline (n = 1)" if name == "baseline" else f"roster, n = {name[-1]}"
    (line,) = (l for l in done.output.splitlines() if l.startswith(label))
    found = float(line.removeprefix(label).split()[0])
    assert found == pytest.approx(2.718281828 ** (nll / tokens), rel=1e-4)
  assert by_method["baseline"] != by_method["roster_n=3"]
  assert (tmp_path / "quickstart.png").read_bytes()[:4] == b"\x89PNG"
  assert (tmp_path / "table.txt").read_text() in done.output
  # The problem is solved again as it was solved in the comparison.
  (answer,) = (l for l in done.output.splitlines() if l.startswith("Roster: "))
  tokens = [l.split("p = ")[0].strip() for l in done.output.splitlines() if "  p = " in l]
  assert any(answer.startswith(f"Roster:    {r['output']} (") for r in by_method["roster_n=3"])
  solved = "".join(map(json.loads, (t.replace("'", '"') for t in tokens if t != "'<|endoftext|>'")))
  assert answer.startswith(f"Roster:    {solved} (")


def test_bad_settings_are_refused_before_any_work(tiny_checkpoint, tmp_path):
  done = programs.call(
    "experiments.quickstart",
    f"--checkpoints={tiny_checkpoint}",
    "--num_members=1",
    f"--output={tmp_path}",
  )
  assert done.returncode == 1 and "Traceback" not in done.errors
  assert "--num_members must be at least 2" in done.errors
  assert not list(tmp_path.iterdir())
