"""The program that evaluates: from flags to a run's files."""

import json
import time

import numpy as np
import programs
import pytest

from experiments.evaluation.requests import request_id
from experiments.records import runs
from experiments.tasks import wordmath
from roe_jax import checkpoint, scoring
from roe_jax.roster import Roster
from roe_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

PROBLEMS = wordmath.problems("test", 10)
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
  """A task of the harness with local data."""
  path = tmp_path_factory.mktemp("tasks")
  with (path / "data.jsonl").open("w") as file:
    for i, problem in enumerate(PROBLEMS):
      file.write(
        json.dumps(
          {"question": wordmath.prompt(problem), "choices": ["3+4=7", "12"], "label": i % 2}
        )
        + "\n"
      )
  (path / "choice.yaml").write_text(CHOICE.format(data=path / "data.jsonl"))
  return path


def start(checkpoint_folder, *arguments):
  return programs.Run("experiments.evaluate", [f"--checkpoint={checkpoint_folder}", *arguments])


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_killed_run_goes_on_and_ends_with_the_files_of_one_that_was_not(
  tiny_checkpoint, task_folder, tmp_path, monkeypatch
):
  monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
  arguments = (
    "--tasks=wordmath,choice",
    f"--include_path={task_folder}",
    "--num_examples=5",
    "--num_members=2",
    "--tau=0.5",
    "--max_new_tokens=16",
    "--batch_size=4",
    "--num_seeds=2",
    "--seed=3",
  )
  whole, other = tmp_path / "run", tmp_path / "killed" / "run"
  first = start(tiny_checkpoint, f"--output={whole}", *arguments)
  assert first.returncode == 0, first.errors
  settings, records, summary = runs.load(whole)
  assert settings["method"] == "roster" and settings["seeds"] == [3, 4]
  assert settings["model"]["routers"] and settings["roster"]["num_members"] == 2
  assert [runs.key(r) for r in records] == sorted(
    [("wordmath", f"wordmath/test/{i}", s) for i in range(5) for s in (3, 4)]
    + [("choice", f"choice/{i}", s) for i in range(5) for s in (3, 4)]
  )
  assert "Saved" in first.output and "10 examples x 2 seeds;" in first.output
  assert summary["costs"]["flops"] > 0
  (row,) = (line for line in first.output.splitlines() if "perplexity" in line.split())
  found = summary["tasks"]["wordmath"]
  assert row.split() == ["wordmath", "perplexity"] + [
    f"{found[kind]['perplexity']:.4f}" for kind in ("metrics", "standard_errors", "std_over_seeds")
  ] + ["5"]

  params, config = checkpoint.load(tiny_checkpoint)
  tokenizer = Tokenizer.load(tiny_checkpoint)
  for record in records[-4:]:
    number = int(record["example"].rpartition("/")[2])
    problem = PROBLEMS[number]
    prompt = tokenizer.encode(wordmath.prompt(problem))
    text = prompt + tokenizer.encode(wordmath.completion(problem)) + [0]
    (found,) = scoring.score(
      params,
      config,
      [text],
      [len(prompt)],
      roster=Roster.create(config, 2, 0.5, seed=record["seed"]),
      request_ids=[request_id(wordmath.prompt(problem))],
    ).sequences
    assert record["metrics"]["nll"] == pytest.approx(-float(found.log_probs.sum()), abs=1e-3)
    assert record["metrics"]["tokens"] == len(text) - len(prompt)
    assert record["metrics"]["exact_match"] == wordmath.is_correct(record["output"], problem)
    assert record["correct"] == [record["metrics"]["exact_match"] == 1]
    assert 0 < record["confidences"][0] < 1

  killed = start(tiny_checkpoint, f"--output={other}", *arguments)
  cache = other / "requests"
  while killed.process.is_alive() and not any(
    path.read_text().count("\n") > 4 for path in cache.glob("*.jsonl")
  ):
    time.sleep(0.01)
  killed.process.kill()
  killed.process.join()
  other = other.parent.rename(tmp_path / "moved") / "run"
  other = other.rename(tmp_path / "renamed")
  cache = other / "requests"
  there = sum(path.read_text().count("\n") for path in cache.glob("*.jsonl"))
  assert there < sum(path.read_text().count("\n") for path in (whole / "requests").glob("*.jsonl"))
  second = start(tiny_checkpoint, f"--output={other}", *arguments)
  assert second.returncode == 0, second.errors
  assert second.output.partition("Saved")[0] == first.output.partition("Saved")[0]
  for found, expected in zip(runs.load(other)[1], records, strict=True):
    for name in ("confidences", "log_probs"):
      np.testing.assert_allclose(found.pop(name, []), expected.pop(name, []), rtol=1e-4)
    assert found.pop("metrics") == pytest.approx(expected.pop("metrics"), rel=1e-4)
    assert found == expected
  costs = [
    [line | {"seconds": 0} for line in lines(path / "costs.jsonl")] for path in (whole, other)
  ]
  assert costs[0] == costs[1]
  assert [(c["task"], c["seed"]) for c in costs[0]] == [
    (task, seed) for seed in (3, 4) for task in ("wordmath", "wordmath, references", "choice")
  ]
  assert (other / "harness.json").read_text() == (whole / "harness.json").read_text()


REFUSALS = [
  (["--tasks=gsm8k_cott"], "unknown task 'gsm8k_cott': did you mean gsm8k_cot"),
  (["--tasks=paper/gsm9k"], "unknown task 'paper/gsm9k': choose from wordmath, wordmath_sums"),
  (["--tasks=paper/humaneval"], "allow it with --allow_code_execution"),
  (
    ["--tasks=gsm8k", "--split=validation"],
    "--split=validation applies to this project's tasks, but gsm8k",
  ),
  (["--tasks=wordmath", "--num_fewshot=2"], "--num_fewshot applies to harness tasks"),
  (["--tasks=gsm8k", "--data_dir=x"], "--data_dir applies to this project's tasks"),
  (["--tasks=wordmath", "--system=x"], "--system applies to chats only"),
  (["--tasks=wordmath", "--chat"], "has no chat template"),
  (["--tasks=paper/gsm8k", "--data_dir={empty}"], "no data of gsm8k"),
  (["--tasks=wordmath", "--tau={other}"], "temperature profile has 3 layers"),
]
# In one process, as most of the time would go into imports.
SCRIPT = """
import sys, json
from absl import flags
from experiments import evaluate
from experiments.cli import app
evaluate.define_flags()
app.load_params = lambda *_: sys.exit("parameters were read")
for arguments in json.loads(sys.argv[1]):
  flags.FLAGS.unparse_flags()
  for name in flags.FLAGS:
    flags.FLAGS[name].unparse()
  flags.FLAGS(["evaluate", *arguments])
  try:
    evaluate.main(None)
  except (ValueError, FileNotFoundError) as error:
    print(json.dumps(str(error)))
"""


def test_wrong_input_is_refused_before_parameters_are_read(tiny_checkpoint, tmp_path):
  profile = tmp_path / "profile.json"
  profile.write_text(json.dumps({"temperatures": [0.1, 0.2, 0.3]}))
  places = {"empty": str(tmp_path), "other": str(profile)}
  cases = [
    [
      f"--checkpoint={tiny_checkpoint}",
      f"--output={tmp_path / 'run'}",
      *(a.format(**places) for a in arguments),
    ]
    for arguments, _ in REFUSALS
  ]
  done = programs.call(SCRIPT, json.dumps(cases))
  assert done.returncode == 0, done.errors
  found = [json.loads(line) for line in done.output.splitlines()]
  for (arguments, message), error in zip(REFUSALS, found, strict=True):
    assert message in error, arguments
  assert not (tmp_path / "run").exists()
