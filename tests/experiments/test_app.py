import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import programs
import pytest

from experiments.cli import app


def test_temperatures_are_read_from_numbers_lists_and_files(tmp_path):
  assert app.parse_temperatures("0.3") == 0.3
  assert app.parse_temperatures("0, 0.3,0.1") == [0.0, 0.3, 0.1]
  path = tmp_path / "profile.json"
  path.write_text(json.dumps({"temperatures": [0, 0.25]}))
  assert app.parse_temperatures(str(path)) == [0.0, 0.25]


@pytest.mark.parametrize("content", ["[0.1]", "{}", "not json", '{"temperatures": "x"}'])
def test_a_file_that_is_no_profile_is_refused(tmp_path, content):
  path = tmp_path / "profile.json"
  path.write_text(content)
  with pytest.raises(ValueError, match="not a temperature profile"):
    app.parse_temperatures(str(path))


def test_a_profile_that_does_not_exist_is_refused():
  with pytest.raises(ValueError, match="or an existing JSON file"):
    app.parse_temperatures("no_such_profile.json")


def test_atomic_writes_replace_the_file_and_leave_nothing_beside(tmp_path):
  path = tmp_path / "new" / "file.txt"
  app.write_atomically(path, "one")
  app.write_atomically(path, "two")
  assert path.read_text() == "two"
  assert list(path.parent.iterdir()) == [path]


def test_a_mesh_is_read_and_parameters_are_restored_onto_it(tiny_checkpoint, capsys):
  assert app.parse_mesh("auto") == {}
  assert app.parse_mesh("data:2, expert:4") == {"data": 2, "expert": 4}
  params, config = app.load_params(str(tiny_checkpoint), mesh="expert:2,tensor:2")
  assert capsys.readouterr().err == "[mesh data:1,expert:2,tensor:2]\n"
  held = params.layers.experts.down.addressable_shards[0].data
  assert held.shape == (
    config.num_layers,
    config.num_experts // 2,
    config.d_expert // 2,
    config.d_model,
  )


@pytest.mark.parametrize("text", ["", "expert", "expert:x", "expert:2,expert:2", "experts:2"])
def test_what_is_no_mesh_is_refused(text):
  with pytest.raises(ValueError, match="data, expert, tensor, such as"):
    app.parse_mesh(text)


@pytest.mark.parametrize(
  "needs, body, sentence",
  [
    ("'tabulate',", "pass", 'needs tabulate: pip install "roe_jax[experiments]"'),
    (
      "",
      "raise PermissionError(13, 'Permission denied', '/proc/version')",
      "/proc/version: Permission denied: change its permissions, or choose another path",
    ),
    ("", "raise OSError(30, 'Read-only file system', 'f')", "choose a path that can be written"),
    ("", "open('/dev/full', 'w', 1).write('x' + chr(10))", "No space left on device: free some"),
    ("", "open('/' + 'x' * 300)", "x: File name too long: give a shorter path"),
    ("", "open('/proc', 'w')", "error: /proc: Is a directory: give a file"),
    ("", "open('/proc/version/x')", "/proc/version/x: Not a directory: give a path whose parts"),
    ("", "import os; os.rename('/no/a', '/no/b')", "/no/a -> /no/b: No such file or directory"),
    ("", "few_open_files(); [open('/proc/version') for _ in range(99)]", "raise the limit of open"),
    ("", "raise MemoryError", "error: out of memory: use smaller settings"),
    ("", "raise FloatingPointError('not finite')", "error: not finite"),
    ("", "raise ValueError('a\\n\\x1b]0;b' + 'c' * 9999)", "error: a \\x1b]0;bccc"),
  ],
)
def test_expected_failures_end_with_one_sentence(monkeypatch, capsys, needs, body, sentence):
  from absl import app as absl_app

  def call(main):
    monkeypatch.setattr(sys, "argv", ["program"])
    main(sys.argv)

  limit = resource.getrlimit(resource.RLIMIT_NOFILE)

  def few_open_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 9, limit[1]))

  def failing(argv):
    del argv
    try:
      exec(body, {"few_open_files": few_open_files})
    finally:
      resource.setrlimit(resource.RLIMIT_NOFILE, limit)

  monkeypatch.setattr(absl_app, "run", call)
  if needs:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  if not app.flags.FLAGS.is_parsed():
    app.flags.FLAGS(["program"])
  with pytest.raises(SystemExit) as ended:
    app.run(failing, needs=tuple(needs.strip("',").split()))
  assert sentence in str(ended.value)
  assert str(ended.value).isprintable() and len(str(ended.value)) < 1100


def test_output_that_is_cut_ends_a_program_quietly():
  code = "import sys; from absl import flags; from checkpoints_convert import command_line; "
  code += "flags.DEFINE_string('a', None, 'x' * 200000); command_line.run(lambda argv: None)"
  program = f'{sys.executable} -c "{code}" --help | head -1; echo ${{PIPESTATUS[0]}}'
  done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
  assert done.stderr == "" and done.stdout.endswith("\n141\n")


def test_standard_output_that_is_full_ends_a_program_with_one_sentence(tmp_path):
  (tmp_path / "output").symlink_to("/dev/full")
  code = "from checkpoints_convert import command_line as c\nc.run(lambda argv: print('x'))"
  program = programs.Run(code, [], tmp_path)
  assert program.exit_code(60) == 1
  assert program.errors.count("\n") == 1
  assert "error: standard output: No space left on device: free some space" in program.errors


def test_a_home_folder_is_expanded_in_paths_and_not_in_text():
  code = "from absl import flags; from checkpoints_convert import command_line as c; "
  code += "flags.DEFINE_string('target', '', ''); flags.DEFINE_string('prompt', '', ''); "
  code += "c._PACKAGES = ('__main__', '-c'); "
  code += "c.run(lambda argv: print(flags.FLAGS.target, flags.FLAGS.prompt))"
  done = subprocess.run(
    [sys.executable, "-c", code, "--target=~/x", "--prompt=~/y"],
    capture_output=True,
    text=True,
    env={"HOME": "/home/me"},
  )
  assert done.stdout == "/home/me/x ~/y\n", done.stderr


SIGNALS = [(signal.SIGINT, "[interrupted]"), (signal.SIGTERM, "[terminated]")]
# In place of JAX, a module that gets a signal and, as some do, goes on after any exception.
SIGNALED = """
import os, time
try:
  os.kill(os.getpid(), {})
  time.sleep(5)
except BaseException:
  pass
"""


@pytest.mark.parametrize("number, message", SIGNALS)
@pytest.mark.parametrize("program", ["checkpoints_convert", "experiments.score"])
def test_a_signal_ends_a_program_that_is_still_importing(tmp_path, program, number, message):
  (tmp_path / "jax.py").write_text(SIGNALED.format(int(number)))
  root = pathlib.Path(app.__file__).parents[2]
  done = subprocess.run(
    [sys.executable, "-m", program],
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": f"{tmp_path}:{root}"},
  )
  assert (done.returncode, done.stdout + done.stderr) == (128 + number, f"\n{message}\n")


WAITING = """
import os, signal, sys, time, warnings
from checkpoints_convert import command_line

def main(argv):
  warnings.simplefilter("ignore")  # of forks with threads, from Python 3.12 on
  if not (child := os.fork()):
    time.sleep(100)
  os.kill(child, signal.SIGTERM)  # which must not end this process
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr, flush=True)
  try:
    time.sleep(100)
  finally:
    print("cleaned up")

command_line.run(main)
"""


@pytest.mark.parametrize("number, message", SIGNALS)
def test_a_signal_ends_a_program_and_not_its_parent(tmp_path, number, message):
  program = programs.Run(WAITING, [], tmp_path)
  deadline = time.monotonic() + 60
  while not ((tmp_path / "errors").exists() and program.errors) and time.monotonic() < deadline:
    time.sleep(0.01)
  os.kill(program.process.pid, number)
  assert program.exit_code(20) == 128 + number
  assert program.errors == f"-15\n\n{message}\n" and program.output == "cleaned up\n"


BUSY = """
import sys
import jax
from checkpoints_convert import interrupts
from experiments.cli import app
from experiments.records import jsonl

def main(argv):
  interrupts.PATIENCE = 0.2
  app.CompiledPrograms.PATIENCE = 0.0
  with jsonl.Results(None, [{}, {}], {}) as results:
    results.write(1, {"text": "computed"})
    forever = lambda x: jax.lax.while_loop(lambda x: x > 0, lambda x: x + 1 % 2, x)
    run = jax.jit(forever).lower(1.0).compile()
    print("running", file=sys.stderr, flush=True)
    run(1.0).block_until_ready()

app.run(main)
"""


def test_an_interrupt_is_answered_in_a_long_computation(tmp_path):
  """Python's own handler would wait for it; what is computed is printed."""
  program = programs.Run(BUSY, [], tmp_path, devices=1)
  errors, deadline = tmp_path / "errors", time.monotonic() + 120
  while not (errors.exists() and "running" in program.errors) and time.monotonic() < deadline:
    time.sleep(0.05)
  os.kill(program.process.pid, signal.SIGINT)
  assert program.exit_code(20) == 130
  assert "[interrupted]" in program.errors and "Traceback" not in program.errors
  assert '"computed"' in program.output
  assert program.errors.count("[JAX is compiling") == 1
