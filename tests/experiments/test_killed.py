"""Programs killed at random moments, started again until they finish."""

import json
import time

import jax
import numpy as np
import programs
import pytest

from experiments.tasks import wordmath
from roe_jax import checkpoint

pytestmark = pytest.mark.slow

MEMBERS = "--num_members=3"
TAU = "--tau=0.4"


def write_lines(path, problems, **keys):
  lines = [{"id": i} | {k: f(p) for k, f in keys.items()} for i, p in enumerate(problems)]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def num_lines(path):
  return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_until_done(start, kill, grows, kills, seed, seconds):
  """Starts work and kills it, `kills` times, and then lets it finish.

  Args:
    start: starts the processes of the work.
    kill: kills them; whether they had finished.
    grows: a file to which the work adds lines, or None.
    kills: how often.
    seed: of when.
    seconds: that the work takes. A kill comes soon after new lines in `grows`, if there is
      such a file, or else at any moment.
  """
  rng = np.random.default_rng(seed)
  for _ in range(kills):
    runs = start()
    if grows:
      wanted = num_lines(grows) + int(rng.integers(1, 4))
      while num_lines(grows) < wanted and all(run.process.is_alive() for run in runs):
        time.sleep(0.005)
      time.sleep(rng.uniform(0, 0.05))
    else:
      time.sleep(rng.uniform(0, seconds))
    if kill(runs, rng):
      return
  for run in start():
    assert run.exit_code() == 0, run.errors


def kill_one(runs, rng):
  del rng
  runs[0].process.kill()
  assert runs[0].exit_code() in (-9, 0), runs[0].errors
  return runs[0].exit_code() == 0


def same_bytes(*names):
  def check(found, expected):
    for name in names:
      assert (found / name).read_bytes() == (expected / name).read_bytes(), name

  return check


def same_parameters(found, expected):
  (one, config), (other, _) = checkpoint.load(found), checkpoint.load(expected)
  assert jax.tree.all(jax.tree.map(np.array_equal, one, other))
  assert checkpoint.load_config(found) == config
  assert sorted(p.name for p in found.iterdir()) == sorted(p.name for p in expected.iterdir())


# Module and flags ({folder} is where results go, {inputs} where inputs are), the file that
# grows, and what is compared in the end.
CASES = {
  "score of lines": (
    "experiments.score",
    [
      "--checkpoint={checkpoint}",
      "--input={inputs}/pairs.jsonl",
      "--output={folder}/out.jsonl",
      "--batch_size=4",
      MEMBERS,
      TAU,
    ],
    "out.jsonl",
    same_bytes("out.jsonl"),
  ),
  "convert": (
    "checkpoints_convert",
    ["--source={checkpoint}", "--target={folder}/int4", "--quantize_experts=int4"],
    None,
    lambda found, expected: same_parameters(found / "int4", expected / "int4"),
  ),
  "convert back": (
    "checkpoints_convert",
    ["--source={checkpoint}", "--target={folder}/hf", "--to_hugging_face", "--max_shard_size=8KB"],
    None,
    lambda found, expected: same_bytes(*(f"hf/{p.name}" for p in (expected / "hf").iterdir()))(
      found, expected
    ),
  ),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("inputs")
  problems = list(wordmath.problems("test", 18))
  write_lines(folder / "prompts.jsonl", problems, prompt=wordmath.prompt)
  keys = dict(prompt=wordmath.prompt, continuation=wordmath.completion)
  write_lines(folder / "pairs.jsonl", problems, **keys)
  (folder / "text").write_text(
    " ".join(wordmath.prompt(p) + wordmath.completion(p) for p in wordmath.problems("test", 9))
  )
  return folder


@pytest.mark.parametrize("case", CASES)
def test_a_program_that_is_killed_finishes_with_the_same_results(
  case, tiny_checkpoint, inputs, tmp_path
):
  module, arguments, grows, check = CASES[case]

  def start(name):
    (tmp_path / name).mkdir(exist_ok=True)
    return programs.Run(
      module,
      [
        a.format(checkpoint=tiny_checkpoint, inputs=inputs, folder=tmp_path / name)
        for a in arguments
      ],
      tmp_path / "logs" / name,
    )

  def kill(runs, rng):
    # The converter gives the target its name when it is complete, and then refuses to
    # write it again.
    written = (tmp_path / "killed" / name for name in ("int4", "hf"))
    return kill_one(runs, rng) or any(path.exists() for path in written)

  began = time.monotonic()
  whole = start("whole")
  assert whole.exit_code() == 0, whole.errors
  kill_until_done(
    lambda: [start("killed")],
    kill,
    grows and tmp_path / "killed" / grows,
    kills=1 if grows else 2,
    seed=list(CASES).index(case),
    seconds=time.monotonic() - began,
  )
  check(tmp_path / "killed", tmp_path / "whole")


def test_where_one_of_two_processes_is_killed_both_end_and_go_on(tiny_checkpoint, inputs, tmp_path):
  arguments = [
    f"--checkpoint={tiny_checkpoint}",
    f"--input={inputs / 'prompts.jsonl'}",
    "--batch_size=4",
    "--max_new_tokens=16",
    MEMBERS,
    TAU,
  ]

  def start(name):
    return programs.two(
      "experiments.generate",
      [*arguments, f"--output={tmp_path / name}", "--host_timeout=5", "--mesh=data:2,expert:4"],
      tmp_path / "logs",
    )

  def kill_one_of_two(runs, rng):
    killed = int(rng.integers(2))
    runs[killed].process.kill()
    if runs[killed].exit_code() == 0:
      return runs[1 - killed].exit_code() == 0
    began = time.monotonic()
    assert runs[1 - killed].exit_code() == 1
    assert time.monotonic() - began < 30
    errors = runs[1 - killed].errors  # a progress bar may be drawn before or after
    assert "error: process" in errors and "Traceback" not in errors
    return False

  programs.run(
    "experiments.generate",
    [*arguments, f"--output={tmp_path / 'whole.jsonl'}"],
    tmp_path / "logs" / "whole",
  )
  grows = tmp_path / "killed.jsonl"
  kill_until_done(lambda: start("killed.jsonl"), kill_one_of_two, grows, kills=1, seed=0, seconds=5)
  whole, found = (
    [json.loads(line) for line in path.read_text().splitlines()]
    for path in (tmp_path / "whole.jsonl", grows)
  )
  assert [r["index"] for r in found] == list(range(18))
  for one, other in zip(found, whole, strict=True):
    np.testing.assert_allclose(one.pop("log_probs"), other.pop("log_probs"), atol=1e-5)
    assert one == other
