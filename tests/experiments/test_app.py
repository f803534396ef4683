import json
import os
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
      "/proc/version: Permission denied",
    ),
    ("", "open('/dev/full', 'w', 1).write('x' + chr(10))", "No space left on device"),
    ("", "raise FloatingPointError('not finite')", "error: not finite"),
  ],
)
def test_expected_failures_end_with_one_sentence(monkeypatch, capsys, needs, body, sentence):
  from absl import app as absl_app

  def call(main):
    monkeypatch.setattr(sys, "argv", ["program"])
    main(sys.argv)

  def failing(argv):
    del argv
    exec(body)

  monkeypatch.setattr(absl_app, "run", call)
  if needs:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  if not app.flags.FLAGS.is_parsed():
    app.flags.FLAGS(["program"])
  with pytest.raises(SystemExit) as ended:
    app.run(failing, needs=tuple(needs.strip("',").split()))
  assert sentence in str(ended.value)


def test_output_that_is_cut_ends_a_program_quietly():
  code = "import sys; from absl import flags; from checkpoints_convert import command_line; "
  code += "flags.DEFINE_string('a', None, 'x' * 200000); command_line.run(lambda argv: None)"
  program = f'{sys.executable} -c "{code}" --help | head -1; echo ${{PIPESTATUS[0]}}'
  done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
  assert done.stderr == "" and done.stdout.endswith("\n141\n")


def test_control_characters_in_error_messages_do_not_reach_the_terminal():
  code = "import sys; from absl import flags; from checkpoints_convert import command_line as c; "
  code += r"c.run(lambda argv: sys.exit('error: \x1b]0;title\x07 \r\u202eü\n\ud800'))"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.stderr == "error: \\x1b]0;title\\x07 \\r\\u202eü\n\\ud800\n"
  assert done.returncode == 1


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


BUSY = """
import sys
import jax
from experiments.cli import app, interrupts
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
