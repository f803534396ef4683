import json

import numpy as np
import programs
import pytest
import scipy.special

from roe_jax import checkpoint, scoring
from roe_jax.roster import Roster
from roe_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

PAIRS = [("Tom has 3 pens.", " He buys 4."), ("A boat goes 12 miles.", " 12*3=36. #### 36")]


def run(folder, *arguments):
  return programs.call(
    "experiments.score", f"--checkpoint={folder}", "--num_members=3", "--tau=0.4", *arguments
  )


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
  params, config = checkpoint.load(tiny_checkpoint)
  return params, config, Tokenizer.load(tiny_checkpoint), Roster.create(config, 3, 0.4)


@pytest.mark.parametrize("mesh", [(), ("--mesh=auto",)], ids=["one device", "mesh"])
def test_continuations_are_scored_as_by_the_library(tiny_checkpoint, model, tmp_path, mesh):
  params, config, tokenizer, roster = model
  source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
  source.write_text("".join(json.dumps({"prompt": p, "continuation": c}) + "\n" for p, c in PAIRS))
  trace = tmp_path / "trace.npz"
  done = run(tiny_checkpoint, f"--input={source}", f"--output={target}", f"--trace={trace}", *mesh)
  assert done.returncode == 0, done.errors
  prompts, ends = zip(*[[tokenizer.encode(t) for t in pair] for pair in PAIRS])
  expected = scoring.score(
    params, config, [p + c for p, c in zip(prompts, ends)], [len(p) for p in prompts], roster=roster
  )
  records = [json.loads(line) for line in target.read_text().splitlines()]
  for record, text, end in zip(records, expected.sequences, ends, strict=True):
    np.testing.assert_allclose(record["log_probs"], text.log_probs[:, 0], atol=1e-4)
    assert record["log_prob"] == pytest.approx(sum(record["log_probs"]))
    assert record["tokens"] == end
    assert record["is_greedy"] == (text.greedy_tokens.tolist() == end)
  with np.load(trace) as found:
    for i, (prompt, end) in enumerate(zip(prompts, ends)):
      np.testing.assert_array_equal(found[f"{i}/tokens"], prompt + end)
      members = scipy.special.softmax(found[f"{i}/logits"], axis=-1)  # [R, S, V]
      at = np.arange(len(prompt) - 1, len(prompt) + len(end) - 1)
      log_probs = np.log(members[:, at, end].mean(0))
      np.testing.assert_allclose(log_probs, records[i]["log_probs"], atol=1e-3)


def test_a_texts_perplexity_is_printed_beside_the_plain_models(tiny_checkpoint, model, tmp_path):
  params, config, tokenizer, roster = model
  text = " ".join(p + c for p, c in PAIRS) * 3
  (tmp_path / "text.txt").write_text(text)
  done = run(
    tiny_checkpoint,
    f"--text={tmp_path / 'text.txt'}",
    "--window=32",
    f"--output={tmp_path / 'found.json'}",
  )
  assert done.returncode == 0, done.errors
  found = json.loads((tmp_path / "found.json").read_text())
  for name, setting in (("baseline", None), ("roster", roster)):
    expected = scoring.perplexity(params, config, tokenizer.encode(text), window=32, roster=setting)
    assert found[name]["perplexity"] == pytest.approx(expected.perplexity[0], rel=1e-4)
    assert f"{name}: perplexity" in done.output
  assert found["roster"]["settings"]["roster"]["num_members"] == 3


def test_bad_input_ends_with_one_sentence(tiny_checkpoint, tmp_path):
  (tmp_path / "in.jsonl").write_text('{"prompt": "a", "continuation": ""}\n')
  for arguments, sentence in (
    ([f"--input={tmp_path / 'in.jsonl'}"], "is empty"),
    ([f"--text={tmp_path / 'no.txt'}"], "does not exist"),
  ):
    done = run(tiny_checkpoint, *arguments)
    assert done.returncode == 1 and "Traceback" not in done.errors
    assert sentence in done.errors.strip().splitlines()[-1]
