import json
import os
import subprocess
import sys
import time

import numpy as np

from experiments.tasks import wordmath
from roe_jax import checkpoint, decode
from roe_jax.roster import Roster
from roe_jax.tokenizer import Tokenizer

PROMPTS = [wordmath.prompt(p) for p in wordmath.problems("test", 5)]


def start(checkpoint_folder, *arguments):
  return subprocess.Popen(
      [sys.executable, "-m", "experiments.generate", f"--checkpoint={checkpoint_folder}",
       "--max_new_tokens=6", *arguments],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(checkpoint_folder, *arguments, text=None):
  process = start(checkpoint_folder, *arguments)
  out, errors = process.communicate(text)
  return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def lines(prompts):
  return "".join(json.dumps({"id": f"p{i}", "prompt": p}) + "\n" for i, p in enumerate(prompts))


def test_lines_in_lines_out_and_a_killed_run_goes_on_where_it_stopped(tiny_checkpoint, tmp_path):
  source, target, other = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "other.jsonl"))
  prompts = [wordmath.prompt(p) for p in wordmath.problems("test", 24)]
  source.write_text(lines(prompts))
  # Texts end with the context of 128 tokens, in another order than they begin.
  arguments = (f"--input={source}", "--num_members=3", "--temperature_profile=0.4",
               "--batch_size=3", "--max_new_tokens=90")
  first = run(tiny_checkpoint, f"--output={other}", *arguments)
  assert first.returncode == 0, first.stderr
  expected = [json.loads(line) for line in other.read_text().splitlines()]
  assert [(r["index"], r["id"]) for r in expected] == [(i, f"p{i}") for i in range(24)]
  assert expected[0]["settings"]["roster"]["num_members"] == 3
  tokens = sum(len(r["tokens"]) for r in expected)
  assert f"[24 prompts: {tokens} tokens in " in first.stderr
  assert "% of the slots running" in first.stderr

  params, config = checkpoint.load(tiny_checkpoint)
  tokenizer = Tokenizer.load(tiny_checkpoint)
  alone = decode.generate(
      params, config, [tokenizer.encode(prompts[7])], max_new_tokens=90, request_ids=[7],
      roster=Roster.create(config, 3, 0.4), decode=tokenizer.decode).completions[0]
  assert (expected[7]["tokens"], expected[7]["text"]) == (alone.tokens, alone.text)

  killed = start(tiny_checkpoint, f"--output={target}", *arguments)
  while killed.poll() is None and not (target.exists() and target.read_text().count("\n") >= 4):
    time.sleep(0.001)
  killed.kill()
  killed.communicate()
  there = target.read_text().count("\n")
  assert 4 <= there < 24
  with target.open("a") as file:  # as if it had been killed within a line
    file.write('{"index": 9, "id": "p9", "tok')
  second = run(tiny_checkpoint, f"--output={target}", *arguments)
  assert second.returncode == 0, second.stderr
  assert f"already holds {there} of 24" in second.stderr
  assert f"[{24 - there} prompts: " in second.stderr
  found = [json.loads(line) for line in target.read_text().splitlines()]
  for one, record in zip(found, expected, strict=True):
    np.testing.assert_allclose(one.pop("log_probs"), record.pop("log_probs"), atol=1e-4)
    assert one == record

  refused = run(tiny_checkpoint, f"--output={target}", *arguments, "--seed=1")
  assert refused.returncode == 1
  assert "other requests or settings" in refused.stderr


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
