"""Two processes with four devices each, against one process with eight and one device."""

import json
import os
import time

from absl.testing import flagsaver
import numpy as np
import programs
import pytest

from experiments.cli import distributed
from experiments.tasks import wordmath

slow = pytest.mark.slow

ROSTER = ("--num_members=3", "--tau=0.4", "--seed=1")
# Of each program its flags, and the file of its results. What runs of `compare` are made with,
# `tune` confirms with.
PROGRAMS = {
  "generate": (
    (
      "--input=in.jsonl",
      "--output=out.jsonl",
      "--batch_size=4",
      "--max_new_tokens=12",
      "--draft_tokens=4",
      *ROSTER,
    ),
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


@slow
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


@slow
def test_standard_output_is_that_of_the_first_process(tiny_checkpoint, tmp_path):
  folder_with_input(tmp_path / "in", "generate")
  (tmp_path / "elsewhere").mkdir()
  prompt = "--prompt=" + records(tmp_path / "in" / "in.jsonl")[0]["prompt"]
  arguments = [f"--checkpoint={tiny_checkpoint}", "--max_new_tokens=5"]
  first, second = programs.two("experiments.generate", [*arguments, prompt], tmp_path / "two")
  alone = programs.Run("experiments.generate", [*arguments, prompt], tmp_path / "alone")
  for run in (first, second, alone):
    assert run.exit_code() == 0, run.errors
  assert first.output == alone.output != ""
  assert second.output == ""


@slow
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
  monkeypatch.setattr(distributed, "_partners", None)  # programs of later tests have none
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


PARTNER = """
import sys, time
from experiments.cli import partners
number, count, port, seconds = map(int, sys.argv[1:5])
partners.PERIOD = partners.PATIENCE = 0.2
partner = partners.Partners(number, count, seconds)
try:
  partner.connect("127.0.0.1", port) if number else partner.listen(port=port)
  partner.await_all()
except TimeoutError as error:
  partner.leave(f"timeout: {error}")
  sys.exit(f"timeout: {error}")
print("together", flush=True)
if sys.argv[5:] == [str(number)]:
  partner.leave("no disk")
else:
  time.sleep(60)
"""


def start_partners(logs, seconds, numbers=range(3), failing=()):
  port = programs.free_port()
  found = {
    i: programs.Run(PARTNER, [str(x) for x in (i, 3, port, seconds, *failing)], logs / str(i))
    for i in numbers
  }
  deadline = time.monotonic() + 30
  while len(found) == 3 and time.monotonic() < deadline:
    time.sleep(0.02)
    if all((logs / str(i) / "output").exists() and run.output for i, run in found.items()):
      break
  return found


@pytest.mark.parametrize("lost", [0, 1])
def test_all_processes_end_and_say_who_was_killed(tmp_path, lost):
  found = start_partners(tmp_path, 30)
  found.pop(lost).process.kill()
  for run in found.values():
    assert run.exit_code(10) == 1
    *waiting, last = run.errors.splitlines()
    assert last == (
      f"error: process {lost} of 3 has ended: rerun all processes with the same flags to resume"
    )
    assert all(line.startswith("[waiting for process") for line in waiting)


def test_all_processes_say_why_one_failed(tmp_path):
  found = start_partners(tmp_path, 30, failing=[1])
  assert found.pop(1).exit_code(10) == 0
  for run in found.values():
    assert run.exit_code(10) == 1
    assert "error: process 1 of 3 failed (no disk): rerun all" in run.errors


def test_processes_say_for_whom_they_wait(tmp_path):
  found = start_partners(tmp_path, 1, numbers=(0, 2))
  for run in found.values():
    assert run.exit_code(10) == 1
    waiting = [line for line in run.errors.splitlines() if line.startswith("[waiting for")]
    assert len(waiting) > 2
    assert {line.partition(":")[0] for line in waiting} <= {
      "[waiting for process 1",
      "[waiting for processes 1, 2",  # before it has come
    }
    ends = set(run.errors.splitlines()) - set(waiting)  # its own, what the other said, or both
    assert ends and all("timeout: process 1" in end for end in ends), ends
  alone = start_partners(tmp_path / "alone", 1, numbers=(2,))[2]
  assert alone.exit_code(10) == 1
  assert "[waiting for process 0 at 127.0.0.1:" in alone.errors and "refused" in alone.errors


def test_a_process_number_that_is_taken_is_refused(tmp_path):
  port = programs.free_port()
  runs = [
    programs.Run(PARTNER, [str(x) for x in (i, 3, port, 2)], tmp_path / str(n))
    for n, i in enumerate((0, 1, 1))
  ]
  assert [run.exit_code(10) for run in runs] == [1, 1, 1]
  said = runs[1].errors + runs[2].errors
  assert said.count("several processes have --process_id=1") == 1
