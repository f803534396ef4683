import json
import os
import subprocess
import sys

from experiments.tasks import wordmath
from roe_jax import checkpoint, decode
from roe_jax.roster import Roster
from roe_jax.tokenizer import Tokenizer

PROMPTS = [wordmath.prompt(p) for p in wordmath.problems("test", 5)]


def run(checkpoint_folder, *arguments, text=None):
  return subprocess.run(
      [sys.executable, "-m", "experiments.generate", f"--checkpoint={checkpoint_folder}",
       "--max_new_tokens=6", *arguments],
      input=text, capture_output=True, text=True, env=os.environ)


def lines(prompts):
  return "".join(json.dumps({"id": f"p{i}", "prompt": p}) + "\n" for i, p in enumerate(prompts))


def test_lines_in_lines_out_and_a_second_run_goes_on_where_the_first_stopped(
    tiny_checkpoint, tmp_path):
  source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
  source.write_text(lines(PROMPTS))
  arguments = (f"--input={source}", f"--output={target}", "--num_members=3",
               "--temperature_profile=0.4", "--batch_size=2")
  first = run(tiny_checkpoint, *arguments)
  assert first.returncode == 0, first.stderr
  whole = target.read_text()
  records = [json.loads(line) for line in whole.splitlines()]
  assert [r["id"] for r in records] == [f"p{i}" for i in range(5)]
  assert records[0]["settings"]["roster"]["num_members"] == 3

  params, config = checkpoint.load(tiny_checkpoint)
  tokenizer = Tokenizer.load(tiny_checkpoint)
  expected = decode.generate(
      params, config, [tokenizer.encode(p) for p in PROMPTS], max_new_tokens=6,
      roster=Roster.create(config, 3, 0.4), decode=tokenizer.decode)
  assert [r["tokens"] for r in records] == [c.tokens for c in expected.completions]
  assert [r["text"] for r in records] == [c.text for c in expected.completions]

  # Killed while it wrote the fourth line.
  target.write_text("".join(whole.splitlines(keepends=True)[:3]) + '{"id": "p3", "tok')
  second = run(tiny_checkpoint, *arguments)
  assert second.returncode == 0, second.stderr
  again = [json.loads(line) for line in target.read_text().splitlines()]
  assert [r["tokens"] for r in again] == [r["tokens"] for r in records]
  assert "already holds 3 of 5" in second.stderr

  other = run(tiny_checkpoint, *arguments, "--seed=1")
  assert other.returncode == 1
  assert "other requests or settings" in other.stderr


def test_a_prompt_is_streamed_to_the_terminal(tiny_checkpoint):
  done = run(tiny_checkpoint, f"--prompt={PROMPTS[0]}", "--num_members=2",
             "--temperature_profile=0.4", "--temperature=0.8", "--top_p=0.9")
  assert done.returncode == 0, done.stderr
  assert "6 tokens" in done.stderr and '"num_members": 2' in done.stderr
  piped = run(tiny_checkpoint, "--num_members=2", "--temperature_profile=0.4",
              "--temperature=0.8", "--top_p=0.9", text=lines(PROMPTS[:1]))
  assert piped.returncode == 0, piped.stderr
  assert json.loads(piped.stdout)["text"] + "\n" == done.stdout


BAD_SETTINGS = {
    "--prompt=": "prompt 0 is empty",
    "--prompt=" + "7 " * 200: "does not fit the model's context",
    "--prompt=x --num_members=0": "num_members must be an integer of at least 1",
    "--prompt=x --temperature_profile=0.1,0.2,0.3": "a list of 2",
    "--prompt=x --temperature_profile=nan": "must be finite",
    "--prompt=x --top_p=0": "top_p",
    "--prompt=x --output=y": "not both",
    "--input=no_such_file": "does not exist",
}
# Runs the program once for each JSON list of arguments on standard input.
MANY_RUNS = """
import json, sys
from absl import flags
from absl.testing import flagsaver
from experiments import app, generate
generate.define_flags()
for arguments in json.load(sys.stdin):
  with flagsaver.flagsaver():
    flags.FLAGS.unparse_flags()
    sys.argv = ["generate", *arguments]
    try:
      app.run(generate.main)
    except SystemExit as exit:
      print(json.dumps(str(exit.code)))
"""


def test_bad_settings_end_with_one_sentence(tiny_checkpoint):
  runs = [[f"--checkpoint={tiny_checkpoint}",
           *([line] if "7 7" in line else line.split(" "))] for line in BAD_SETTINGS]
  done = subprocess.run([sys.executable, "-c", MANY_RUNS], input=json.dumps(runs),
                        capture_output=True, text=True, env=os.environ)
  assert done.returncode == 0, done.stderr
  messages = [json.loads(line) for line in done.stdout.splitlines()]
  assert len(messages) == len(BAD_SETTINGS)
  for message, sentence in zip(messages, BAD_SETTINGS.values()):
    assert message.startswith("error: ") and sentence in message
    assert "\n" not in message


def test_a_folder_that_is_no_checkpoint_ends_with_one_sentence(tmp_path):
  done = run(tmp_path, "--prompt=x")
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert str(tmp_path) in done.stderr
