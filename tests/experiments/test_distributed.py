"""Two processes with four devices each, against one process with eight and one device."""

import json
import os

from absl.testing import flagsaver
import numpy as np
import programs
import pytest

from experiments.cli import distributed
from experiments.tasks import wordmath

pytestmark = pytest.mark.slow

ROSTER = ("--num_members=3", "--tau=0.4", "--seed=1")
# Of each program its flags, and the file of its results.
PROGRAMS = {
  "generate": (
    ("--input=in.jsonl", "--output=out.jsonl", "--batch_size=4", "--max_new_tokens=12", *ROSTER),
    "out.jsonl",
  ),
  "evaluate": (
    (
      "--tasks=wordmath",
      "--num_examples=4",
      "--output=out",
      "--batch_size=4",
      "--max_new_tokens=12",
      *ROSTER,
    ),
    "out/examples.jsonl",
  ),
  "compare": (
    (
      "--methods=baseline; roster:n=3",
      "--num_examples=4",
      "--num_validation=4",
      "--output=out",
      "--batch_size=4",
      "--max_new_tokens=12",
      *ROSTER,
    ),
    "out/roster_n=3/examples.jsonl",
  ),
  "tune": (
    (
      "--task=wordmath",
      "--num_trials=3",
      "--num_examples=4",
      "--max_tau=0.15",
      "--num_confirm=4",
      "--num_seeds=1",
      "--num_members=3",
      "--output=out",
      "--batch_size=4",
    ),
    "out/confirm/tuned/examples.jsonl",
  ),
}


def folder_with_input(path, program):
  path.mkdir()
  (path / "in.jsonl").write_text(
    "".join(
      json.dumps(
        {"id": i, "prompt": wordmath.prompt(p)}
        | ({"continuation": wordmath.completion(p)} if program == "score" else {})
      )
      + "\n"
      for i, p in enumerate(wordmath.problems("test", 6))
    )
  )
  return path


def records(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same(found, expected):
  """JSON values are equal, numbers that are no integers to rounding."""
  if isinstance(expected, dict):
    assert found.keys() == expected.keys()
    found, expected = list(found.values()), list(expected.values())
  if isinstance(expected, list):
    for one, other in zip(found, expected, strict=True):
      assert_same(one, other)
  elif isinstance(expected, float):
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
  else:
    assert found == expected


def slurm(job):
  """Variables of the two tasks of a Slurm job on this machine."""
  return [
    {
      "SLURM_JOB_ID": str(job),
      "SLURM_STEP_NODELIST": "localhost",
      "SLURM_NTASKS": "2",
      "SLURM_PROCID": str(i),
      "SLURM_LOCALID": "0",
    }
    for i in range(2)
  ]


@pytest.mark.parametrize("program", PROGRAMS)
def test_two_processes_and_one_device_give_the_same(program, tiny_checkpoint, tmp_path):
  arguments, results = PROGRAMS[program]
  arguments = [f"--checkpoint={tiny_checkpoint}", *arguments]
  module = f"experiments.{program}"
  device, two = (folder_with_input(tmp_path / name, program) for name in ("device", "two"))
  (tmp_path / "elsewhere").mkdir()  # a host without input and output
  # One program takes its place from flags, the other from Slurm.
  first, second = programs.two(
    module,
    [*arguments, "--mesh=data:2,expert:4"],
    tmp_path / "logs",
    folders=(two, tmp_path / "elsewhere"),
    environments=slurm(os.getpid()) if program == "generate" else None,
  )
  alone = programs.Run(module, arguments, tmp_path / "logs" / "device", folder=device)
  for run in (first, second, alone):
    assert run.exit_code() == 0, run.errors
  expected = records(device / results)
  assert len(expected) == (6 if program == "generate" else 4)
  assert_same(records(two / results), expected)
  assert "[process 1 of 2: 4 of 8 devices]" in second.errors
  assert "100%" in first.errors and "%|" not in second.errors
  assert not list((tmp_path / "elsewhere").iterdir())


def test_standard_output_is_that_of_the_first_process(tiny_checkpoint, tmp_path):
  folder_with_input(tmp_path / "in", "generate")
  (tmp_path / "elsewhere").mkdir()
  prompt = "--prompt=" + records(tmp_path / "in" / "in.jsonl")[0]["prompt"]
  arguments = [f"--checkpoint={tiny_checkpoint}", "--max_new_tokens=5", *ROSTER]
  first, second = programs.two("experiments.generate", [*arguments, prompt], tmp_path / "two")
  alone = programs.Run("experiments.generate", [*arguments, prompt], tmp_path / "alone")
  for run in (first, second, alone):
    assert run.exit_code() == 0, run.errors
  assert first.output == alone.output != ""
  assert second.output == ""


@pytest.mark.parametrize(
  "case, sentence",
  [
    ("no input", "error: in.jsonl does not exist"),
    ("no checkpoint", "there is no model 'checkpoint'"),
    ("other flags", "--seed is 7 here but 1 in process 0"),
  ],
)
def test_what_is_wrong_with_one_process_ends_both(case, sentence, tiny_checkpoint, tmp_path):
  folders = [tmp_path / "first", tmp_path / "second"]
  for folder in folders:
    folder.mkdir()
    if folder.name == "first" or case != "no checkpoint":
      (folder / "checkpoint").symlink_to(tiny_checkpoint)
  arguments, _ = PROGRAMS["generate"]
  runs = programs.two(
    "experiments.generate",
    ["--checkpoint=checkpoint", *arguments],
    tmp_path / "logs",
    folders=folders,
    own=((), ("--seed=7",) if case == "other flags" else ()),
  )
  for run in runs:
    assert run.exit_code() == 1, run.errors
    assert sentence in run.errors and "Traceback" not in run.errors


@pytest.mark.parametrize(
  "given, sentence",
  [
    (dict(num_processes=2), "--num_processes applies to several processes"),
    (dict(distributed=True, process_id=0), "--process_id requires --coordinator_address and --num"),
    (
      dict(distributed=True, coordinator_address="h:1", num_processes=2, process_id=2),
      r"--process_id must lie in \[0, 1\]",
    ),
    (
      dict(distributed=True, coordinator_address="h", num_processes=2, process_id=1),
      "must be HOST:PORT, got 'h'",
    ),
    (dict(distributed=True), "detected no TPU pod, Slurm"),
    (
      dict(
        distributed=True,
        coordinator_address=f"127.0.0.1:{programs.free_port()}",
        num_processes=2,
        process_id=1,
        start_timeout=1,
      ),
      "process 0 did not answer at",
    ),
  ],
)
def test_flags_that_cannot_work_are_refused(given, sentence, monkeypatch):
  for name in ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST", "OMPI_MCA_orte_hnp_uri"):
    monkeypatch.delenv(name, raising=False)
  distributed.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver(**given), pytest.raises(ValueError, match=sentence):
    distributed.start()


def test_programs_of_one_process_say_why():
  distributed.FLAGS.mark_as_parsed()
  with (
    flagsaver.flagsaver(distributed=True),
    pytest.raises(
      ValueError, match="this program does not support --distributed: it times one machine"
    ),
  ):
    distributed.start("it times one machine")
