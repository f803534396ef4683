import json

import numpy as np
import programs
import pytest

from experiments import quantization_study
from experiments.analysis.paired_statistics import Difference
from experiments.evaluation.requests import Continuation
from roe_jax import checkpoint
from roe_jax import params as params_lib

pytestmark = pytest.mark.slow


def run(*arguments):
  return programs.call("experiments.quantization_study", *arguments)


SMALL = (
  "--formats=bfloat16,int4",
  "--num_members=3",
  "--num_examples=3",
  "--num_validation=3",
  "--sweep=0.2,0.6",
  "--batch_size=3",
)


def test_the_whole_program_on_a_random_model(tiny_checkpoint, tmp_path):
  arguments = (f"--checkpoints={tiny_checkpoint}", f"--output={tmp_path}", *SMALL)
  done = run(*arguments)
  assert done.returncode == 0, done.errors
  result = json.loads((tmp_path / "results.json").read_text())
  rows = result["models"]["checkpoint"]
  plain, int4 = rows
  assert [r["format"] for r in rows] == ["bfloat16", "int4"]
  _, config = checkpoint.load(tiny_checkpoint, "bfloat16")
  for r in rows:
    format = None if r["format"] == "bfloat16" else r["format"]
    assert r["model_bytes"] == params_lib.num_bytes(config.replace(expert_format=format))
    assert np.allclose(
      r["roster_to_unquantized"]["value"],
      100 * (r["roster_perplexity"] / plain["roster_perplexity"] - 1),
    )
    assert len(r["sweep"]) == 2 and r["best_temperature"] in (0.2, 0.6)
    assert len(r["router_agreement"]) == len(r["noisy_agreement"]) == 2
  assert plain["expert_bytes"] > int4["expert_bytes"]
  assert plain["router_agreement"] == [1, 1] and np.mean(int4["router_agreement"]) < 1
  # Noise-free routing in the first layer does not depend on any expert.
  assert int4["router_agreement"][0] == 1
  assert plain["to_unquantized"] == {"value": 0, "low": 0, "high": 0}
  assert (tmp_path / "table.md").read_text() in done.output and "| int4 " in done.output

  # Again, after a kill within a line, it takes what is there and ends with the same.
  path = tmp_path / "measured.jsonl"
  values = [json.loads(line) for line in path.read_text().splitlines()]
  changed = [v for v in values if v["name"] == f"{tiny_checkpoint}, int4: baseline"]
  changed[0]["value"][0] += 1
  written = "".join(json.dumps(v) + "\n" for v in values)
  path.write_text(written[: written.rstrip("\n").rfind("\n", 0, -200) - 20])
  assert run(*arguments).returncode == 0
  assert [json.loads(line) for line in path.read_text().splitlines()] == values
  again = json.loads((tmp_path / "results.json").read_text())["models"]["checkpoint"]
  assert again[0] == plain and again[1]["perplexity"] > int4["perplexity"]


@pytest.mark.parametrize(
  "argument,message",
  [
    ("--formats=int8", "must begin with bfloat16"),
    ("--formats=bfloat16,fp8", "choose one of int8"),
    ("--formats=bfloat16,mxfp4", "blocks of 32"),
    ("--num_members=1", "at least 2"),
    ("--num_examples=0", "at least 1"),
  ],
)
def test_bad_settings_are_refused_before_any_work(tiny_checkpoint, tmp_path, argument, message):
  done = run(f"--checkpoints={tiny_checkpoint}", f"--output={tmp_path}", argument)
  assert done.returncode == 1 and message in done.errors and "Traceback" not in done.errors
  assert not list(tmp_path.iterdir())


def test_shared_experts():
  baseline = np.array([[[0, 1], [2, 3]], [[0, 1], [4, 5]]])
  chosen = np.array([[[1, 0], [2, 3]], [[0, 2], [1, 2]]])
  assert quantization_study.shared_experts(chosen, baseline).tolist() == [1, 0.25]


def test_a_summary_compares_the_sweeps_best_with_that_without_quantization():
  def measured(sweep):
    return dict(
      expert_bytes=1,
      model_bytes=1,
      experts=[[[0, 1]]],
      router_gap=[1.0],
      noisy_agreement=[1.0],
      baseline=[1.0, 1.0],
      roster=[1.0, 1.0],
      sweep_baseline=[1.0, 1.0],
      sweep=sweep,
    )

  texts = [Continuation((1,), (2, 3), 0)] * 2
  rows = quantization_study.summarize(
    {"bfloat16": measured([[0.9, 0.9], [1.0, 1.0]]), "int4": measured([[1.0, 1.0], [0.8, 0.8]])},
    texts,
    texts,
    [0.1, 0.2],
  )
  assert [r["best_temperature"] for r in rows] == [0.1, 0.2]
  assert rows[0]["tuned_again"].value == 0
  assert np.isclose(rows[1]["tuned_again"].value, 100 * np.expm1(-0.1))
  assert isinstance(rows[1]["to_unquantized"], Difference)
