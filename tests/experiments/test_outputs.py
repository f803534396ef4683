import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from checkpoints_convert import outputs
from experiments.cli import app
from experiments.records import jsonl

HOLDER = """
import sys
from checkpoints_convert import outputs
with outputs.held(sys.argv[1], sys.argv[2]):
  print("held", flush=True)
  sys.stdin.read()
"""


def start_holder(path, kind):
  return subprocess.Popen(
    [sys.executable, "-c", HOLDER, str(path), kind],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


@pytest.mark.parametrize("kind", [outputs.FOLDER, outputs.FILE])
def test_one_program_at_a_time_writes_an_output(tmp_path, kind):
  path, link = tmp_path / "new" / "output", tmp_path / "link"
  link.symlink_to(path)
  with start_holder(path, kind) as holder:
    assert holder.stdout.readline() == "held\n"
    for name in (path, link):
      with pytest.raises(ValueError, match=f"is being written by process {holder.pid} on "):
        with outputs.held(str(name), kind):
          pass
    with outputs.held(str(tmp_path / "other"), kind):
      pass
    holder.kill()  # its lock file stays, and its lock does not
    holder.wait()
    with outputs.held(str(path), kind):
      (path.parent if kind == outputs.FILE else path).joinpath("result").touch()
  assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["result"]


def test_of_many_that_start_at_once_one_writes(tmp_path):
  inside, most, refused = [0], [0], [0]
  barrier = threading.Barrier(8)

  def run():
    barrier.wait()
    for _ in range(50):
      try:
        with outputs.held(str(tmp_path / "output")):
          inside[0] += 1
          most[0] = max(most[0], inside[0])
          inside[0] -= 1
      except ValueError:
        refused[0] += 1

  threads = [threading.Thread(target=run) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert most[0] == 1 and refused[0] < 400


def test_nothing_is_left_of_a_run_that_writes_nothing(tmp_path):
  with pytest.raises(KeyError):
    with outputs.held(str(tmp_path / "a" / "b"), outputs.FOLDER):
      raise KeyError
  assert not list(tmp_path.iterdir())


def test_an_output_of_the_wrong_kind_is_refused(tmp_path):
  (tmp_path / "file").touch()
  for path, kind in (
    (tmp_path / "file", outputs.FOLDER),
    (tmp_path, outputs.FILE),
    (pathlib.Path(os.devnull), outputs.FOLDER),
  ):
    with pytest.raises(ValueError, match=f"{path} must be a {kind}"):
      with outputs.held(str(path), kind):
        pass


@pytest.fixture
def pipe(tmp_path):
  """A named pipe, and a list that gets what is written to it."""
  path, read = tmp_path / "pipe", []
  os.mkfifo(path)
  thread = threading.Thread(target=lambda: read.append(path.read_text()))
  thread.start()
  yield path, read, thread
  assert path.is_fifo()


def test_a_stream_gets_results_in_order_and_stays_a_stream(pipe):
  path, read, thread = pipe
  requests = [{"id": i} for i in range(3)]
  with outputs.held(str(path), outputs.FILE), jsonl.Results(str(path), requests, {}) as results:
    for i in (2, 0, 1):
      results.write(i, {"x": i})
  thread.join(10)
  assert [json.loads(line)["x"] for line in read[0].splitlines()] == [0, 1, 2]
  assert [p.name for p in path.parent.iterdir()] == ["pipe"]


def test_a_stream_gets_a_whole_file(pipe):
  path, read, thread = pipe
  app.write_atomically(path, "text")
  thread.join(10)
  assert read == ["text"]


def test_a_link_to_a_file_stays_a_link(tmp_path):
  (tmp_path / "file").write_text("old")
  (tmp_path / "link").symlink_to("file")
  app.write_atomically(tmp_path / "link", "new")
  assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
