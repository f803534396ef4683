import json
import shutil
import time

import chat_formats
import jax
import numpy as np
import programs
import pytest

from experiments.tasks import wordmath
from roe_jax import checkpoint, decode
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.roster import Roster
from roe_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

PROMPTS = [wordmath.prompt(p) for p in wordmath.problems("test", 5)]


def start(checkpoint_folder, *arguments, stdin=""):
  arguments = [f"--checkpoint={checkpoint_folder}", "--max_new_tokens=6", *arguments]
  return programs.Run("experiments.generate", arguments, stdin=stdin)


def run(checkpoint_folder, *arguments, text=""):
  done = start(checkpoint_folder, *arguments, stdin=text)
  done.exit_code()
  return done


def lines(prompts):
  return "".join(json.dumps({"id": f"p{i}", "prompt": p}) + "\n" for i, p in enumerate(prompts))


def test_lines_in_lines_out_and_a_killed_run_goes_on_where_it_stopped(tiny_checkpoint, tmp_path):
  source, target, other = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "other.jsonl"))
  prompts = [wordmath.prompt(p) for p in wordmath.problems("test", 12)]
  source.write_text(lines(prompts))
  # Texts end with the context of 128 tokens, in another order than they begin.
  arguments = (
    f"--input={source}",
    "--num_members=3",
    "--tau=0.4",
    "--batch_size=3",
    "--max_new_tokens=90",
  )
  trace = f"--trace={tmp_path / 'trace.npz'}"
  first = run(tiny_checkpoint, f"--output={other}", trace, *arguments)
  assert first.returncode == 0, first.errors
  expected = [json.loads(line) for line in other.read_text().splitlines()]
  assert [(r["index"], r["id"]) for r in expected] == [(i, f"p{i}") for i in range(12)]
  assert expected[0]["settings"]["roster"]["num_members"] == 3
  tokens = sum(len(r["tokens"]) for r in expected)
  assert f"[12 prompts: {tokens} tokens in " in first.errors
  assert "% of the slots running" in first.errors

  params, config = checkpoint.load(tiny_checkpoint)
  tokenizer = Tokenizer.load(tiny_checkpoint)
  alone = decode.generate(
    params,
    config,
    [tokenizer.encode(prompts[7])],
    max_new_tokens=90,
    request_ids=[7],
    roster=Roster.create(config, 3, 0.4),
    decode=tokenizer.decode,
  ).completions[0]
  assert (expected[7]["tokens"], expected[7]["text"]) == (alone.tokens, alone.text)
  with np.load(tmp_path / "trace.npz") as found:
    logits, sequence = found["7/logits"], found["7/tokens"].tolist()
  assert sequence == tokenizer.encode(prompts[7]) + alone.tokens
  members = np.exp(logits - logits.max(-1, keepdims=True))
  mean = (members / members.sum(-1, keepdims=True)).mean(0)[-len(alone.tokens) - 1 : -1]
  chosen = mean[np.arange(len(alone.tokens)), alone.tokens]
  np.testing.assert_allclose(np.log(chosen), alone.log_probs, atol=1e-3)

  killed = start(tiny_checkpoint, f"--output={target}", *arguments)
  while killed.process.is_alive() and not (target.exists() and target.read_text().count("\n") >= 4):
    time.sleep(0.001)
  killed.process.kill()
  killed.process.join()
  there = target.read_text().count("\n")
  assert 4 <= there < 12
  with target.open("a") as file:  # as if it had been killed within a line
    file.write('{"index": 9, "id": "p9", "tok')
  second = run(tiny_checkpoint, f"--output={target}", *arguments)
  assert second.returncode == 0, second.errors
  assert f"has {there} of 12" in second.errors
  assert f"[{12 - there} prompts: " in second.errors
  found = [json.loads(line) for line in target.read_text().splitlines()]
  for one, record in zip(found, expected, strict=True):
    np.testing.assert_allclose(one.pop("log_probs"), record.pop("log_probs"), atol=1e-4)
    assert one == record

  # Before the parameters are read, which a mesh of too many devices would end.
  arguments += ("--mesh=expert:97",)
  refused = run(tiny_checkpoint, f"--output={target}", *arguments, "--seed=1")
  assert refused.returncode == 1
  assert "other requests or settings" in refused.errors
  refused = run(tiny_checkpoint, f"--output={target}", trace, *arguments)
  assert refused.returncode == 1 and "choose another --output" in refused.errors


def test_a_prompt_is_streamed_to_the_terminal(tiny_checkpoint):
  done = run(
    tiny_checkpoint,
    f"--prompt={PROMPTS[0]}",
    "--num_members=2",
    "--tau=0.4",
    "--temperature=0.8",
    "--top_p=0.9",
  )
  assert done.returncode == 0, done.errors
  assert "6 tokens" in done.errors and '"num_members": 2' in done.errors
  piped = run(
    tiny_checkpoint,
    "--num_members=2",
    "--tau=0.4",
    "--temperature=0.8",
    "--top_p=0.9",
    "--mesh=data:2,expert:2,tensor:2",
    text=lines(PROMPTS[:1]),
  )
  assert piped.returncode == 0, piped.errors
  assert json.loads(piped.output)["text"] + "\n" == done.output


BAD_SETTINGS = {
  "--prompt=": "prompt 1 is empty",
  "--prompt=" + "7 " * 200: "does not fit the model's context",
  "--prompt=x --num_members=0": "num_members must be an integer of at least 1",
  "--prompt=x --tau=0.1,0.2,0.3": "a list of 2",
  "--prompt=x --tau=nan": "must be finite",
  "--prompt=x --temperature=1 --top_p=0": "top_p must lie in",
  "--prompt=x --top_p=0.9": "--top_p applies to sampling only: set --temperature",
  "--prompt=x --num_members=4": "--num_members does nothing to the baseline",
  "--prompt=x --tau=0.3": "--tau does nothing to the baseline",
  "--prompt=x --noise=swap": "--noise does nothing to the baseline",
  "--prompt=x --num_members=1000000 --tau=0.3 --cache=standard": "need about",
  "--prompt=x --length=9": "--length applies to --dry_run only",
  "--prompt=x --output=y": "use either it or --input",
  "--input=no_such_file": "does not exist",
  "--prompt=x --mesh=expert:3": "expert may be 1, 2, 4",
}
# Runs the program once for each JSON list of arguments on standard input.
MANY_RUNS = """
import contextlib, io, json, sys
from absl import flags
from absl.testing import flagsaver
from experiments import generate
from experiments.cli import app
generate.define_flags()
for arguments in json.load(sys.stdin):
  with flagsaver.flagsaver():
    flags.FLAGS.unparse_flags()
    sys.argv = ["generate", *arguments]
    out, errors = io.StringIO(), io.StringIO()
    try:
      with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        app.run(generate.main, output=app.outputs.FILE)
    except SystemExit as exit:
      print(json.dumps([exit.code, out.getvalue(), errors.getvalue()]))
"""


def many_runs(runs):
  """Exit code or message, output and errors of each run of the program."""
  done = programs.call(MANY_RUNS, stdin=json.dumps(runs))
  assert done.returncode == 0, done.errors
  results = [json.loads(line) for line in done.output.splitlines()]
  assert len(results) == len(runs)
  return results


def check_refused(runs, sentences):
  for (message, out, _), sentence in zip(many_runs(runs), sentences, strict=True):
    assert message.startswith("error: ") and sentence in message
    assert "\n" not in message and not out


def test_bad_settings_end_with_one_sentence(tiny_checkpoint):
  runs = [
    [f"--checkpoint={tiny_checkpoint}", *([line] if "7 7" in line else line.split(" "))]
    for line in BAD_SETTINGS
  ]
  check_refused(runs, BAD_SETTINGS.values())


def test_a_folder_that_is_no_checkpoint_ends_with_one_sentence(tmp_path):
  done = run(tmp_path, "--prompt=x")
  assert done.returncode == 1 and "Traceback" not in done.errors
  assert str(tmp_path) in done.errors


SCRIPTS = {  # the end of a prompt, and what the model says then
  "thinking": ("\n", ["<think>", "h", "m", "</think>", "4", ".", "<|im_end|>"]),
  "harmony": ("t", ["<|channel|>", *"final", "<|message|>", "4", "<|return|>"]),
}


@pytest.fixture(scope="module")
def chat_checkpoints(tmp_path_factory):
  """Models that go on from each token with the next one of their script."""
  found = {}
  for name, (end, script) in SCRIPTS.items():
    folder = tmp_path_factory.mktemp(name)
    tokenizer = chat_formats.tokenizer(name)
    # The end of a turn is named by the template alone, or by the generation config alone.
    end_of_text = tokenizer.token_to_id("<|endoftext|>")
    ends = [end_of_text] + ([tokenizer.token_to_id("<|return|>")] if name == "harmony" else [])
    chat_formats.write(folder / "files", name, generation_config={"eos_token_id": ends})
    config = ModelConfig(
      family="olmoe",
      vocab_size=tokenizer.get_vocab_size(),
      num_layers=1,
      d_model=64,
      num_heads=2,
      num_kv_heads=2,
      head_dim=8,
      num_experts=4,
      experts_per_token=2,
      d_expert=8,
      context_length=256,
      normalize_gates=False,
      gates_in_model_dtype=True,
      qk_norm=True,
      eos_token_ids=(end_of_text,),
    )
    model = params_lib.initialize(config, jax.random.key(0))
    ids = [tokenizer.encode(text).ids[0] for text in (end, *script)]
    embedding = np.random.RandomState(0).choice([-1.0, 1.0], model.embedding.shape)
    unembedding = np.zeros(embedding.shape)
    unembedding[ids[1:]] = embedding[ids[:-1]]
    model = model.replace(
      embedding=embedding.astype(np.float32),
      unembedding=unembedding.astype(np.float32),
      layers=jax.tree.map(np.zeros_like, model.layers),
    )
    checkpoint.save(folder / "checkpoint", model, config, files=folder / "files")
    found[name] = folder / "checkpoint"
  return found


def test_chats_from_message_to_answer(chat_checkpoints, tmp_path):
  source = tmp_path / "in.jsonl"
  source.write_text(
    "".join(
      json.dumps(request) + "\n"
      for request in [
        {"id": "a", "messages": [{"role": "user", "content": "2 + 2?"}]},
        {"prompt": "What is <think>?"},
        {
          "messages": [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "It is\n"},
          ]
        },
      ]
    )
  )
  thinking, harmony = (f"--checkpoint={chat_checkpoints[name]}" for name in ("thinking", "harmony"))
  terminal, shown, short, lines_out, harmony_lines, stopped, dated, plain = many_runs(
    [
      [thinking, "--chat", "--prompt=2 + 2?"],
      [thinking, "--chat", "--prompt=2 + 2?", "--show_reasoning", "--system=Brief.", "--thinking"],
      [thinking, "--chat", "--prompt=2 + 2?", "--max_new_tokens=3"],
      [thinking, "--chat", f"--input={source}"],
      [
        harmony,
        "--chat",
        f"--input={source}",
        "--chat_date=2025-01-31",
        "--reasoning_effort=low",
        "--max_new_tokens=8",
        "--system=Be brief.",
      ],
      [thinking, "--chat", "--prompt=2 + 2?", "--stop=m", "--stop=."],
      [harmony, "--chat", "--prompt=2 + 2?", "--chat_date=2025-01-31"],
      [harmony, "--prompt=t"],
    ]
  )
  settings = lambda errors: json.loads(errors.split("[settings: ")[1].split("]\n[")[0])

  code, out, errors = terminal
  assert (code, out) == (None, "4.\n")
  assert "[7 tokens, stop_token;" in errors and "hm" not in errors
  end = Tokenizer.load(chat_checkpoints["thinking"]).added_id("<|im_end|>")
  assert end in settings(errors)["stop_tokens"]
  assert settings(errors)["chat"]["system"] is None

  code, out, errors = shown
  assert (code, out) == (None, "4.\n") and errors.startswith("hm\n")
  assert settings(errors)["chat"]["system"] == "Brief."
  assert settings(errors)["chat"]["enable_thinking"] is True

  code, out, errors = short
  assert (code, out) == (None, "")
  assert "no answer: the reasoning exceeded 3 tokens; increase" in errors

  code, out, errors = lines_out
  assert code is None
  records = [json.loads(line) for line in out.splitlines()]
  for record in records:
    assert (record["answer"], record["reasoning"]) == ("4.", "hm")
    assert record["text"] == "<think>hm</think>4." and record["finish_reason"] == "stop_token"
  assert records[0]["id"] == "a" and records[0]["messages"][0]["content"] == "2 + 2?"

  code, out, errors = harmony_lines
  assert code is None
  records = [json.loads(line) for line in out.splitlines()]
  assert [r["answer"] for r in records[:2]] == ["4", "4"]
  # The last prompt opens the channel itself, so that the answer begins at once.
  assert records[2]["answer"] and records[2]["text"].startswith(records[2]["answer"])
  assert [r["text"] for r in records[:2]] == ["final4", "final4"]
  chat = records[0]["settings"]["chat"]
  assert (chat["date"], chat["reasoning_effort"], chat["system"]) == (
    "2025-01-31",
    "low",
    "Be brief.",
  )

  assert stopped[:2] == [None, "4\n"] and "stop_string" in stopped[2]
  assert dated[:2] == [None, "4\n"] and settings(dated[2])["chat"]["date"] == "2025-01-31"
  assert plain[:2] == [None, "final4\n"] and "stop_token;" in plain[2]
  assert "chat" not in settings(plain[2])


def test_lines_without_an_answer_are_null_and_counted(chat_checkpoints, tmp_path):
  target = tmp_path / "out.jsonl"
  source = tmp_path / "in.jsonl"
  source.write_text(lines(["2 + 2?", "3 + 3?"]))
  arguments = [
    f"--checkpoint={chat_checkpoints['harmony']}",
    "--chat",
    f"--input={source}",
    f"--output={target}",
    "--max_new_tokens=4",
  ]
  first, again, other_day = many_runs(
    [[*arguments, "--chat_date=2025-01-31"]] * 2 + [[*arguments, "--chat_date=2025-02-01"]]
  )
  assert first[0] is None and "[2 results ended before the answer" in first[2]
  records = [json.loads(line) for line in target.read_text().splitlines()]
  assert [(r["answer"], r["reasoning"], r["text"]) for r in records] == [(None, "", "fin")] * 2
  assert "has 2 of 2" in again[2] and "ended before" not in again[2]
  assert "other requests or settings" in other_day[0]


BAD_CHATS = [  # checkpoint, arguments, line of input, sentence
  ("none", ["--chat", "--prompt=x"], None, "has no chat template"),
  ("thinking", ["--prompt=x", "--system=y"], None, "--system applies to chats only: add --chat"),
  ("thinking", ["--prompt=x", "--nothinking"], None, "--thinking applies to chats only"),
  ("thinking", ["--prompt=x", "--show_reasoning"], None, "--show_reasoning applies to chats only"),
  (
    "thinking",
    ["--chat", "--show_reasoning"],
    {"prompt": "x"},
    "--show_reasoning applies to --prompt only",
  ),
  ("thinking", ["--chat", "--prompt=x", "--nospecial_tokens"], None, "applies to raw prompts"),
  (
    "thinking",
    ["--chat", "--prompt=x", "--reasoning_effort=low"],
    None,
    "does not use the setting reasoning_effort",
  ),
  ("thinking", ["--prompt=x", "--stop=a", "--stop="], None, "a stop string is empty"),
  ("thinking", ["--chat", "--prompt=x", "--chat_date=2025-01-31"], None, "not use the date"),
  ("harmony", ["--chat", "--prompt=x", "--chat_date=1.2.2025"], None, "must be YYYY-MM-DD"),
  ("harmony", ["--chat", "--prompt=" + "x" * 200], None, "does not fit the model's context"),
  ("refusing", ["--chat", "--prompt=x"], None, "error: --prompt: the chat template of "),
  ("thinking", [], {"messages": "x"}, "input request 2: messages must be a list"),
  ("thinking", [], {"messages": [{"role": "user"}]}, 'message 0 must have "role"'),
  ("thinking", [], {"prompt": "x"}, 'input request 2 must have either "messages"'),
  ("thinking", ["--chat"], {"prompt": "x", "messages": []}, 'either "messages"'),
  ("thinking", [], {"prompt": "x", "messages": []}, 'either "messages"'),
  ("thinking", ["--chat"], {"prompt_tokens": [1]}, 'either "messages"'),
  ("thinking", ["--chat"], {"prompt": 3}, 'message 0 must have "role"'),
  (
    "thinking",
    ["--system=y"],
    {"messages": [{"role": "system", "content": "x"}]},
    "has a system message: remove it",
  ),
]


def test_bad_chats_are_refused_before_the_parameters_are_read(
  chat_checkpoints, tiny_checkpoint, tmp_path
):
  folders = {}
  for name, folder in (chat_checkpoints | {"none": tiny_checkpoint}).items():
    folders[name] = shutil.copytree(folder, tmp_path / name)
    shutil.rmtree(folders[name] / "params")
  folders["refusing"] = shutil.copytree(folders["thinking"], tmp_path / "refusing")
  (folders["refusing"] / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
  runs = []
  for i, (name, arguments, line, _) in enumerate(BAD_CHATS):
    runs.append([f"--checkpoint={folders[name]}", *arguments])
    if line is not None:
      (tmp_path / f"{i}.jsonl").write_text(
        "".join(
          json.dumps(r) + "\n" for r in [{"messages": [{"role": "user", "content": "x"}]}, line]
        )
      )
      runs[-1].append(f"--input={tmp_path / f'{i}.jsonl'}")
  check_refused(runs, [sentence for *_, sentence in BAD_CHATS])
