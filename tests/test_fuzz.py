"""Damaged files: the results of undamaged ones, one sentence, or a warning.

ROE_JAX_FUZZ=5000 damages each subject so often, and `-s` prints the counts of outcomes.
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import shutil
import traceback
import warnings

import damage
import numpy as np
import pytest
import tiny
import tokenizers
from tokenizers import decoders, pre_tokenizers

from checkpoints_convert import command_line, common, convert_to_hugging_face
from experiments.analysis import run_results
from experiments.records import jsonl, runs, store
from roe_jax import checkpoint, model_formats, temperature_profiles
from roe_jax.checkpoint_folder import named_leaves
from roe_jax.roster import Roster
from roe_jax.text.chat import Chat

COUNT = int(os.environ.get("ROE_JAX_FUZZ", 0))
SECONDS, NUM_BYTES = 60, 1 << 30  # for one damaged subject of some 100 KB

SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
ALPHABET = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
TEMPLATE = (
  "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
  "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# What may differ in what is read, without a word, when a file is changed: only its author can say
# whether a valid value is the right one.
_TOKENIZER = {"tokens", "ends", "chat"}
_MODEL = {
  # As in transformers, these files may be edited, and may be missing.
  "generation_config.json": {"ends", "chat"},
  "tokenizer.json": _TOKENIZER,
  "tokenizer_config.json": _TOKENIZER,
  "special_tokens_map.json": _TOKENIZER,
  "chat_template.jinja": {"chat"},
}
ALLOWED = {
  # The format has no checksums.
  "hugging_face": _MODEL | {".safetensors": {"arrays"}, "config.json": {"config", *_TOKENIZER}},
  "gguf": {".gguf": {"config", "arrays", *_TOKENIZER}},
  # What is computed of a model has checksums, what it is described by has not.
  "checkpoint": _MODEL | {"model_config.json": {"config", *_TOKENIZER}},
  "profile": {"profile.json": {"profile", "roster"}},
  # Measured numbers can be any, and lines that are incomplete are computed again.
  "results": {
    "settings.json": {"settings"},
    "summary.json": {"summary"},
    "examples.jsonl": {"records", "done"},
    "costs.jsonl": {"costs"},
    "out.jsonl": {"missing"},
    "values.jsonl": {"values"},
  },
}


def write_files(folder):
  """The files of a model that are no weights."""
  folder.mkdir()
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={t: i for i, t in enumerate([*SPECIAL, *ALPHABET])}, merges=[("a", "b")]
    )
  )
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(SPECIAL)
  tokenizer.save(str(folder / "tokenizer.json"))
  files = {
    "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
    "generation_config.json": {"eos_token_id": [1, 2], "bos_token_id": 0},
  }
  for name, content in files.items():
    (folder / name).write_text(json.dumps(content, indent=2))
  (folder / "chat_template.jinja").write_text(TEMPLATE)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A folder with a model in each format."""
  root = tmp_path_factory.mktemp("models")
  write_files(root / "files")
  config = tiny.config("olmoe", vocab_size=len(SPECIAL) + len(ALPHABET), num_layers=2).replace(
    eos_token_ids=(1,), bos_token_id=0
  )
  params = tiny.params(config)
  checkpoint.save(root / "checkpoint", params, config, files=root / "files")
  convert_to_hugging_face(
    str(root / "checkpoint"), str(root / "hugging_face"), max_shard_bytes=1 << 16
  )
  profile = temperature_profiles.Profile(
    (0.0, 0.3),
    model=temperature_profiles.model_of("m", config, params),
    roster={"num_members": 4, "cache": "clean", "gate_weights": "clean"},
    seed=1,
  )
  (root / "profile").mkdir()
  (root / "profile" / "profile.json").write_text(profile.to_json())
  write_gguf(root / "gguf")
  write_results(root / "results")
  return root, config, params


def write_gguf(folder):
  gguf = pytest.importorskip("gguf")
  folder.mkdir()
  writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
  writer.add_block_count(1)
  writer.add_context_length(64)
  writer.add_embedding_length(32)
  writer.add_feed_forward_length(32)
  writer.add_head_count(2)
  writer.add_head_count_kv(2)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(1e4)
  writer.add_rope_dimension_count(16)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list([*SPECIAL, *ALPHABET])
  writer.add_token_types([3] * len(SPECIAL) + [1] * len(ALPHABET))
  writer.add_token_merges(["a b"])
  writer.add_bos_token_id(0)
  writer.add_eos_token_id(1)
  writer.add_chat_template(TEMPLATE)
  values = np.random.RandomState(0)
  vocab = len(SPECIAL) + len(ALPHABET)
  shapes = {"token_embd": (vocab, 32), "output": (vocab, 32), "output_norm": (32,)}
  shapes |= {f"blk.0.{n}_norm": (32,) for n in ("attn", "ffn")}
  shapes |= {
    f"blk.0.{n}": (32, 32)
    for n in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
  }
  for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", values.standard_normal(shape).astype(np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


REQUESTS = [{"id": i, "prompt": f"p{i}"} for i in range(3)]
SETTINGS = {"method": "roster", "roster": {"num_members": 4}, "seeds": [0]}


def write_results(folder):
  run = runs.Run(folder / "run", "run", SETTINGS)
  run.write(
    [
      {"task": "t", "example": str(i), "seed": 0, "metrics": {"acc": i % 2, "nll": 0.5}}
      for i in range(3)
    ],
    {"task": "t", "seed": 0, "tokens": 30, "seconds": 0.5},
  )
  run.finish()
  with jsonl.Results(str(folder / "out.jsonl"), REQUESTS, SETTINGS) as results:
    for i in range(3):
      results.write(i, {"text": f"a{i}"})
  values = store.SavedValues(folder / "values.jsonl", SETTINGS)
  values.put("x", 1.5)
  values.put("y", [1, 2])


def digest(array):
  return hashlib.sha256(np.ascontiguousarray(array)).hexdigest(), array.shape, str(array.dtype)


def read_model(name, folder):
  """All that a program reads of a model."""
  tokenizer = model_formats.load_tokenizer(name)
  chat = Chat.load(model_formats.find_folder(name), tokenizer)
  ids = tokenizer.encode("A <s>model\n")
  params, config = model_formats.load_params(name)
  special = (tokenizer.bos_id, tokenizer.pad_id, *tokenizer.eos_ids)
  most = max(config.vocab_size, tokenizer.vocab_size)  # as in transformers, tokens may be added
  assert all(type(i) is int and 0 <= i < most for i in (*special, *ids) if i is not None)
  return {
    "config": config,
    "tokens": (ids, tokenizer.decode(ids), tokenizer.bos_id, tokenizer.pad_id),
    "ends": tokenizer.eos_ids,
    "chat": (chat.render([{"role": "user", "content": "hello"}]), chat.stop_tokens),
    "arrays": {name: digest(np.asarray(x)) for name, x in named_leaves(params).items()},
  }


def read_profile(folder, model):
  profile = temperature_profiles.read(folder / "profile.json")
  roster = Roster.from_profile(folder / "profile.json", *model)
  return {"profile": (profile.temperatures, profile.roster), "roster": roster.settings()}


def read_results(folder):
  settings, records, summary = runs.load(folder / "run")
  (result,) = run_results.load_runs([str(folder / "run")])
  resumed = runs.Run(folder / "run", "run", SETTINGS)
  with jsonl.Results(str(folder / "out.jsonl"), REQUESTS, SETTINGS) as results:
    missing = results.missing
  values = store.SavedValues(folder / "values.jsonl", SETTINGS)
  return {
    "settings": settings,
    "records": (records, result.records),
    "costs": (result.costs, resumed.costs()),
    "summary": summary,
    "done": resumed.done,
    "missing": missing,
    "values": dict(values.items()),
  }


# Of each subject, how its copy is read, and how often it is damaged.
SUBJECTS = {
  "hugging_face": (lambda folder, model: read_model(str(folder), folder), 70),
  "checkpoint": (lambda folder, model: read_model(str(folder), folder), 15),
  "gguf": (lambda folder, model: read_model(str(folder / "model.gguf"), folder), 40),
  "profile": (read_profile, 30),
  "results": (lambda folder, model: read_results(folder), 35),
}


@dataclasses.dataclass
class Attempt:
  """A damaged copy: what was done to it, and what came of it."""

  number: int
  file: str
  change: str
  outcome: str
  detail: str = ""


def where(error):
  """The innermost place in this project that an error went through."""
  places = traceback.extract_tb(error.__traceback__)
  ours = [f for f in places if "/tests/" not in f.filename and "site-packages" not in f.filename]
  last = (ours or places)[-1]
  return f"at {pathlib.Path(last.filename).name}:{last.lineno}"


def attempt(subject, number, model, work, expected, caplog):
  root, *rest = model
  read, _ = SUBJECTS[subject]
  folder = work / "copy"
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(root / subject, folder)
  choice = random.Random(f"{subject} {number}")
  files = sorted(p for p in folder.rglob("*") if p.is_file())
  # Of the many files of an array each as often as one other.
  kinds = sorted({p.suffix or "array" for p in files})
  kind = choice.choice(kinds)
  # Orbax names the files of arrays at random.
  content = lambda p: (p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest())
  of_kind = [p for p in files if (p.suffix or "array") == kind]
  path = choice.choice(sorted(of_kind, key=content) if kind == "array" else of_kind)
  change = damage.damage(choice, path)
  done = lambda *outcome: Attempt(number, str(path.relative_to(folder)), change, *outcome)
  caplog.clear()
  common.note.cache_clear()
  with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    try:
      with damage.bounds(SECONDS, NUM_BYTES):
        found = read(folder, rest)
    except (ValueError, OSError, FloatingPointError) as error:
      return done("sentence", command_line.describe(error))
    except (damage.Hang, MemoryError) as error:
      return done("hang" if isinstance(error, damage.Hang) else "memory", where(error))
    except KeyboardInterrupt:
      raise
    except BaseException as error:
      return done("traceback", f"{type(error).__name__} {where(error)}: {str(error)[:200]}")
  differing = {name for name in expected if found[name] != expected[name]}
  if not differing:
    return done("same")
  messages = [r.getMessage() for r in caplog.records] + [str(w.message) for w in warned]
  allowed = ALLOWED.get(subject, {}).get(path.name, ALLOWED.get(subject, {}).get(path.suffix, ()))
  if differing <= set(allowed):
    return done("allowed", ", ".join(sorted(differing)))
  if any(str(path.relative_to(folder)) in m or str(folder) in m for m in messages):
    return done("warning", messages[0][:200])
  return done("differs", ", ".join(sorted(differing)))


GOOD = ("same", "sentence", "warning", "allowed")


@pytest.mark.parametrize("subject", SUBJECTS)
def test_damaged_files_are_refused_in_a_sentence_or_make_no_difference(
  subject, model, tmp_path, caplog
):
  read, count = SUBJECTS[subject]
  copy = tmp_path / "copy"
  shutil.copytree(model[0] / subject, copy)
  expected = read(copy, model[1:])
  assert read(copy, model[1:]) == expected
  attempts = [
    attempt(subject, number, model, tmp_path, expected, caplog) for number in range(COUNT or count)
  ]
  counts = collections.Counter(a.outcome for a in attempts)
  print(f"\n{subject}: {dict(counts.most_common())}")
  if COUNT:
    for a in attempts:
      print(*dataclasses.astuple(a), sep=" | ")
  bad = [a for a in attempts if a.outcome not in GOOD]
  assert not bad, "\n".join(map(str, bad))
