"""GGUF files, written with the `gguf` package, against the weights and tokenizers in them."""

import json
import math
import struct
import types

from absl import flags
import gguf
import hf
import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, trainers

import checkpoints_convert
from checkpoints_convert import ConversionError, cli, gguf_files, gguf_model, gguf_tokenizer, hub
from roe_jax import families, model_formats
from roe_jax.quantization import Quantized, dequantize_on_host
from roe_jax.text.chat import Chat
from roe_jax.text.tokenizer import Tokenizer

Q = gguf.GGMLQuantizationType
ARCHITECTURES = {
  "llama": "llama",
  "mixtral": "llama",
  "qwen2": "qwen2",
  "qwen2_moe": "qwen2moe",
  "qwen3": "qwen3",
  "qwen3_moe": "qwen3moe",
  "olmoe": "olmoe",
  "gpt_oss": "gpt-oss",
  "granitemoe": "granitemoe",
  "granitemoeshared": "granitemoe",
}
FAMILIES = tuple(ARCHITECTURES)
LLAMA3 = dict(
  rope_type="llama3",
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=8192,
)


def config_json(family, **changes):
  # Files have no window of Qwen's and no bound of OLMoE's.
  if family == "gpt_oss":
    changes = dict(intermediate_size=32, swiglu_limit=7.0) | changes
  return hf.config_json(family, **changes)


def interleaved(weight, heads):
  """The rows of llama's queries and keys as llama.cpp has them (`LlamaModel.permute`)."""
  rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
  return rows.swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(config, state):
  """The weights as convert_hf_to_gguf.py of llama.cpp writes them, with the package's names."""
  arch = ARCHITECTURES[config["model_type"]]
  number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
  names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
  tensors = {}

  def add(name, weight):
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found, name
    tensors[found] = weight

  for name, weight in state.items():
    if arch in ("llama", "granitemoe") and "q_proj" in name:
      weight = interleaved(weight, config["num_attention_heads"])
    if arch in ("llama", "granitemoe") and "k_proj" in name:
      weight = interleaved(weight, config["num_key_value_heads"])
    if arch == "granitemoe":
      name = name.replace("router.", "router.layer.")
      name = name.replace(".block_sparse_moe.experts", ".mlp.experts")
    if "shared_mlp.input_linear" in name:  # `GraniteMoeModel.modify_tensors`
      layer = name.split(".")[2]
      for kind, half in zip(("gate", "up"), np.split(weight, 2)):
        tensors[f"blk.{layer}.ffn_{kind}_shexp.weight"] = half
    elif "gate_up_proj" in name:
      in_pairs = config["model_type"] == "gpt_oss"
      if in_pairs and not name.endswith("bias"):
        weight = weight.swapaxes(1, 2)
      halves = (weight[:, 0::2], weight[:, 1::2]) if in_pairs else np.split(weight, 2, axis=1)
      for kind, half in zip(("gate", "up"), halves):
        part = name.replace("gate_up_proj_bias", f"{kind}_proj.bias")
        add(part.replace("gate_up_proj", f"{kind}_proj.weight"), half)
    elif "experts.down_proj" in name:
      if config["model_type"] == "gpt_oss" and not name.endswith("bias"):
        weight = weight.swapaxes(1, 2)
      name = name.replace("down_proj_bias", "down_proj.bias")
      add(name if name.endswith("bias") else name + ".weight", weight)
    elif "sinks" in name:
      add(name + ".weight", weight)
    else:
      add(name, weight.squeeze() if "shared_expert_gate" in name else weight)
  return {name: np.ascontiguousarray(weight) for name, weight in tensors.items()}


def write(path, config, tensors, kinds=None, edit=lambda writer: None):
  """Writes a file; `kinds` are the quantizations of tensors by name."""
  writer = gguf.GGUFWriter(path, ARCHITECTURES[config["model_type"]])
  writer.add_vocab_size(config["vocab_size"])
  writer.add_context_length(config["max_position_embeddings"])
  writer.add_embedding_length(config["hidden_size"])
  writer.add_block_count(config["num_hidden_layers"])
  writer.add_feed_forward_length(config["intermediate_size"])
  writer.add_head_count(config["num_attention_heads"])
  writer.add_head_count_kv(config["num_key_value_heads"])
  writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
  writer.add_rope_freq_base(config["rope_theta"])
  if head_dim := config.get("head_dim"):
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
  if num_experts := config.get("num_experts", config.get("num_local_experts")):
    writer.add_expert_count(num_experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
  if width := config.get("moe_intermediate_size"):
    writer.add_expert_feed_forward_length(width)
  shared = (config.get(f"shared_{name}intermediate_size") for name in ("expert_", ""))
  if width := next(filter(None, shared), None):
    writer.add_expert_shared_feed_forward_length(width)
  if config["model_type"] == "gpt_oss":
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(config["rope_scaling"]["factor"])
    writer.add_rope_scaling_orig_ctx_len(config["rope_scaling"]["original_max_position_embeddings"])
  if ARCHITECTURES[config["model_type"]] == "granitemoe":
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])
  for kind in ("bos", "eos", "pad"):
    getattr(writer, f"add_{kind}_token_id")(config[f"{kind}_token_id"])
  edit(writer)
  for name, tensor in tensors.items():
    writer.add_tensor(name, tensor, raw_dtype=(kinds or {}).get(name))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def same(actual, expected):
  actual, expected = jax.tree.leaves_with_path(actual), jax.tree.leaves_with_path(expected)
  assert [path for path, _ in actual] == [path for path, _ in expected]
  for (path, x), (_, y) in zip(actual, expected):
    np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_has_the_weights_and_config_of_its_hub_form(tmp_path, family):
  config = config_json(family)
  state = hf.random_state(config)
  path = write(tmp_path / "m.gguf", config, gguf_tensors(config, state))
  params, found = checkpoints_convert.load(str(path))
  assert found == families.from_hugging_face(config, dtype="float32")
  same(params, hf.to_params(config, state))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_are_those_of_transformers_with_the_same_file(tmp_path, family):
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  from roe_jax import transformer

  config = config_json(family)
  tensors = gguf_tensors(config, hf.random_state(config))
  write(tmp_path / "m.gguf", config, tensors)
  params, found = checkpoints_convert.load(str(tmp_path / "m.gguf"))
  x = np.random.RandomState(0).randint(0, config["vocab_size"], (2, 12))
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, gguf_file="m.gguf", dtype=torch.float32, attn_implementation="eager"
  )
  expected = hf.logits(model, x)
  actual = jax.jit(transformer.forward, static_argnums=1)(params, found, x)[0]
  assert np.abs(np.asarray(actual) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_llama_cpp_with_the_same_file(tmp_path, family):
  pytest.importorskip("llama_cpp")
  from experiments.benchmarks import llama_cpp_cases
  from roe_jax import transformer

  # Its OLMoE has as many keys as queries.
  config = config_json(family, **({"num_key_value_heads": 4} if family == "olmoe" else {}))
  tensors = gguf_tensors(config, hf.random_state(config))
  edit = lambda writer: writer.add_tokenizer_model("none")
  path = write(tmp_path / "m.gguf", config, tensors, edit=edit)
  x = np.random.RandomState(0).randint(0, config["vocab_size"], 24).tolist()
  model = llama_cpp_cases.Model(path, num_threads=1, capacity=len(x), exact=True)
  found = [model.prefill(x[:-1]).copy(), model.step(x[-1]).copy()]
  params, config = checkpoints_convert.load(str(path))
  logits, *_ = jax.jit(transformer.forward, static_argnums=1)(params, config, np.array([x]))
  expected = np.asarray(logits)[0, -2:]
  assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
  "family, sentence",
  [
    ("llama", "on 20 tokens: largest relative difference"),
    ("mixtral", "nothing to --verify with: it reads family as llama instead of mixtral"),
    ("olmoe", "nothing to --verify with: GGUF model with architecture olmoe is not supported"),
  ],
)
def test_files_are_verified_where_transformers_reads_the_same_model(
  tmp_path, capsys, family, sentence
):
  pytest.importorskip("torch"), pytest.importorskip("transformers")
  config = config_json(family)
  path = write(tmp_path / "m.gguf", config, gguf_tensors(config, hf.random_state(config)))
  values = flags.FlagValues()
  cli.define_flags(values)
  values(["convert", f"--source={path}", f"--target={tmp_path / 'roe'}", "--verify=20"])
  verified = family == "llama"
  assert cli.run(values) == (0 if verified else 1)
  printed = capsys.readouterr()
  assert sentence in printed.out + printed.err
  assert (tmp_path / "roe").exists() == verified


def test_tied_embeddings_biases_and_experts_in_tensors_of_their_own(tmp_path):
  config = config_json("llama", attention_bias=True, tie_word_embeddings=True)
  state = hf.random_state(config)
  state["lm_head.weight"] = state["model.embed_tokens.weight"]
  tensors = gguf_tensors(config, state)
  del tensors["output.weight"]
  params, _ = checkpoints_convert.load(str(write(tmp_path / "m.gguf", config, tensors)))
  same(params, hf.to_params(config, state))

  config = config_json("mixtral")
  state = hf.random_state(config)
  tensors = {
    name.replace("_exps.", f".{i}." if "_exps." in name else "."): part
    for name, tensor in gguf_tensors(config, state).items()
    for i, part in (enumerate(tensor) if "_exps." in name else [(0, tensor)])
  }
  params, _ = checkpoints_convert.load(str(write(tmp_path / "n.gguf", config, tensors)))
  same(params, hf.to_params(config, state))


def test_rope_factors_are_llama3_scaling(tmp_path):
  # The factors as in `LlamaModel.generate_extra_tensors` of llama.cpp, written out.
  theta, width = 500000.0, 16
  config = config_json("llama", head_dim=width, rope_theta=theta, rope_scaling=LLAMA3)
  tensors = gguf_tensors(config, hf.random_state(config))
  factors = []
  for i in range(0, width, 2):
    length = 2 * math.pi * theta ** (i / width)
    if length < 8192 / 4.0:
      factors.append(1.0)
    elif length > 8192 / 1.0:
      factors.append(8.0)
    else:
      smooth = (8192 / length - 1.0) / (4.0 - 1.0)
      factors.append(1 / ((1 - smooth) / 8.0 + smooth))
  tensors["rope_freqs.weight"] = np.array(factors, np.float32)
  path = write(tmp_path / "m.gguf", config, tensors)
  found = checkpoints_convert.load_config(str(path))
  assert found == families.from_hugging_face(config, dtype="float32")
  tensors["rope_freqs.weight"][1] *= 1.5
  path = write(tmp_path / "other.gguf", config, tensors)
  with pytest.raises(ConversionError, match=r"rope_freqs.weight in .* is not .* of Llama 3"):
    checkpoints_convert.load_config(str(path))


def dequantizes(kind):
  try:
    gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
  except NotImplementedError:
    return False
  return True


def test_every_quantization_by_rows_and_experts(tmp_path):
  random = np.random.RandomState(0)
  kinds = [kind for kind in Q if dequantizes(kind)]
  assert {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "MXFP4", "BF16"} <= {
    kind.name for kind in kinds
  }
  writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
  raw = {}
  for kind in kinds:
    size = gguf.GGML_QUANT_SIZES[kind][1] * max(1, 256 // gguf.GGML_QUANT_SIZES[kind][0])
    # Bytes of no 16-bit infinities; any are codes.
    raw[kind] = random.randint(0, 120, (3, 4, size)).astype(np.uint8)
    writer.add_tensor(kind.name, raw[kind], raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  tensors = gguf_files.read_header(tmp_path / "m.gguf").tensors
  for kind in kinds:
    whole = gguf.quants.dequantize(raw[kind], kind)
    tensor = tensors[kind.name]
    assert tensor.shape == whole.shape == (3, 4, 256)
    np.testing.assert_array_equal(tensor.read((3, 4, 256), ((1, 3), (0, 4), (0, 256))), whole[1:])
    expert = list(gguf_files.experts(tensor))[2]
    spans = expert.widened((2, 2, 256), ((1, 2), (0, 1), (5, 9)))
    np.testing.assert_array_equal(expert.read((2, 2, 256), spans), whole[2].reshape(2, 2, 256)[1:])
  # By the definition of Q4_1: scale, minimum, then 16 bytes of two codes, 16 elements apart.
  block = raw[Q.Q4_1][0, 0, :20]
  scale, minimum = block[:4].view(np.float16).astype(np.float32)
  codes = np.concatenate([block[4:] & 15, block[4:] >> 4])
  spans = ((0, 3), (0, 4), (0, 256))
  np.testing.assert_array_equal(
    tensors["Q4_1"].read((3, 4, 256), spans)[0, 0, :32], scale * codes + minimum
  )


def test_mxfp4_experts_are_kept_or_decoded(tmp_path):
  config = config_json("gpt_oss")
  state = hf.random_state(config)
  tensors = gguf_tensors(config, state)
  kinds = {name: Q.MXFP4 for name in tensors if name.endswith("_exps.weight")}
  quantized = tensors | {
    name: gguf.quants.quantize(tensors[name], kind) for name, kind in kinds.items()
  }
  path = str(write(tmp_path / "m.gguf", config, quantized, kinds))
  gate, up, down = (
    np.stack(
      [
        gguf.quants.dequantize(quantized[f"blk.{i}.ffn_{part}_exps.weight"], Q.MXFP4)
        for i in range(config["num_hidden_layers"])
      ]
    )
    for part in ("gate", "up", "down")
  )
  expected = {"gate_up": np.stack([gate, up], axis=3), "down": down.swapaxes(2, 3)}
  decoded, found = checkpoints_convert.load(path, keep_mxfp4=False)
  assert found.expert_format is None
  kept, found = checkpoints_convert.load(path)
  assert found.expert_format == "mxfp4"
  for matrix, values in expected.items():
    np.testing.assert_array_equal(getattr(decoded.layers.experts, matrix), values)
    codes = getattr(kept.layers.experts, matrix)
    host = Quantized(np.asarray(codes.codes), np.asarray(codes.scales), codes.format)
    np.testing.assert_array_equal(dequantize_on_host(host, np.dtype(np.float32)), values)


TEXTS = (
  "The 1234567 quick  brown foxes' don't JUMP, they'LL  \n\n run:\r\n\tHelloWorld!!\t x=3.14;\n",
  "naïve café façade — “quotes” … Größe 東京は夜 привет мир 👩‍👩‍👧 e\u0301 \u00a0 ½ ²",
  "   leading and trailing   ",
  "<|im_start|>user\nHi<|im_end|>  <tool> a<tool>b",
  "",
)
# What the tokenizers of these models have, as their files on the hub describe it.
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
ORIGINALS = {
  "gpt-2": (None, GPT2),
  "olmo": (normalizers.NFC(), GPT2),
  "smollm": (None, DIGITS),
  "refact": (None, DIGITS),
  "starcoder": (None, DIGITS),
}
SPLIT = ("qwen2", "llama-bpe", "dbrx", "tekken", "gpt-4o")


def original(pre):
  """A small byte-level tokenizer of a model, trained on the texts."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  if pre in ORIGINALS:
    normalizer, pre_tokenizer = ORIGINALS[pre]
  else:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    normalizer = normalizers.NFC() if pre == "qwen2" else None
    split = tokenizers.Regex(mapping.GGUF_PRE_TOKENIZER_SPLITS[pre])
    pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(split, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
      ]
    )
  if normalizer:
    tokenizer.normalizer = normalizer
  tokenizer.pre_tokenizer = pre_tokenizer
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=420,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    show_progress=False,
  )
  tokenizer.train_from_iterator(TEXTS * 2, trainer)
  tokenizer.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
  return tokenizer


def metadata_of(tokenizer, pre, **more):
  state = json.loads(tokenizer.to_str())
  tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
  special = {t["content"]: t["special"] for t in state["added_tokens"]}
  types_ = [{True: 3, False: 4, None: 1}[special.get(token)] for token in tokens]
  values = {
    "model": "gpt2",
    "pre": pre,
    "tokens": tokens,
    "token_type": types_,
    "merges": [" ".join(merge) for merge in state["model"]["merges"]],
    "bos_token_id": 1,
    "eos_token_id": 0,
    "eot_token_id": 2,
    **more,
  }
  return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def load_tokenizer(folder, metadata):
  for name, content in gguf_tokenizer.files(folder / "m.gguf", metadata).items():
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
  return Tokenizer.load(folder)


@pytest.mark.parametrize("pre", [*ORIGINALS, *SPLIT])
def test_byte_level_tokenizers_equal_the_original(tmp_path, pre):
  expected = original(pre)
  found = load_tokenizer(tmp_path, metadata_of(expected, pre, add_bos_token=False))
  for text in TEXTS:
    ids = expected.encode(text).ids
    assert found.encode(text) == ids, text
    assert found.decode(ids) == expected.decode(ids)
  assert (found.bos_id, found.eos_ids) == (1, (0, 2))
  tool = expected.token_to_id("<tool>")
  assert found.added_id("<tool>") == tool and found.is_special(1)
  assert tool is not None and not found.is_special(tool)


def test_text_begins_and_ends_with_special_tokens_as_the_file_or_llama_cpp_says(tmp_path):
  tokenizer = original("gpt-2")
  plain = tokenizer.encode("quick").ids
  for pre, more, expected in (
    ("gpt-2", {}, plain),
    ("llama-bpe", {}, [1, *plain]),
    ("llama-bpe", {"add_bos_token": False, "add_eos_token": True}, [*plain, 0]),
  ):
    found = load_tokenizer(tmp_path, metadata_of(tokenizer, pre, **more))
    assert found.encode("quick") == expected
    assert found.encode("quick", add_special_tokens=False) == plain


def spm_metadata(**more):
  space = "\u2581"
  words = [space, "t", "h", "e", "he", "th", space + "t", space + "the", "the", "n", space + "then"]
  words += [space * 2, "a", "o", space + "a", "é"]
  tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, "<tool>"]
  types_ = [2, 3, 3, *[6] * 256, *[1] * len(words), 4]
  scores = [0.0] * 259 + [-float(i) for i in range(len(words))] + [0.0]
  values = {
    "model": "llama",
    "tokens": tokens,
    "scores": scores,
    "token_type": types_,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 0,
    **more,
  }
  return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def best_first(text, metadata):
  """Merges as SentencePiece does: of neighbors that make a token, those with the best score."""
  tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
  score = {t: s for t, s, k in zip(tokens, scores, metadata["tokenizer.ggml.token_type"]) if k == 1}
  parts = list(text.replace(" ", "\u2581"))
  while True:
    pairs = [(-score[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in score]
    if not pairs:
      break
    i = min(pairs)[1]
    parts[i : i + 2] = [parts[i] + parts[i + 1]]
  ids = []
  for part in parts:
    if part in score:
      ids.append(tokens.index(part))
    else:
      ids += [tokens.index(f"<0x{byte:02X}>") for byte in part.encode()]
  return ids


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_tokenizers_merge_to_the_best_score(tmp_path, prefix):
  metadata = spm_metadata(add_space_prefix=prefix)
  found = load_tokenizer(tmp_path, metadata)
  for text in ("then the  hen ate", "é ñ 東", " t", "thethe  \n"):
    ids = found.encode(text)
    assert ids == [1, *best_first(" " * prefix + text, metadata)]
    assert found.decode(ids) == text
  tool = metadata["tokenizer.ggml.tokens"].index("<tool>")
  assert tool in found.encode("the<tool>the") and not found.is_special(tool)


def with_tokenizer(writer):
  tokenizer = original("smollm")
  metadata = metadata_of(tokenizer, "smollm")
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list(metadata["tokenizer.ggml.tokens"])
  writer.add_token_types(metadata["tokenizer.ggml.token_type"])
  writer.add_token_merges(metadata["tokenizer.ggml.merges"])
  writer.add_chat_template(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
  )


def small_llama(path, edit=with_tokenizer, tensors=lambda t: t, **changes):
  vocabulary = original("smollm").get_vocab_size()
  config = config_json("llama", num_hidden_layers=1, vocab_size=vocabulary, **changes)
  weights = tensors(gguf_tensors(config, hf.random_state(config)))
  return write(path, config, weights, edit=edit)


def test_a_file_is_a_model_wherever_a_folder_is_one(tmp_path):
  path = small_llama(tmp_path / "m.gguf")
  fingerprint = hub.open_source(hub.find(str(path))).fingerprint
  gguf_model._expand.cache_clear()  # as when another process resumes
  assert hub.open_source(hub.find(str(path))).fingerprint == fingerprint
  params, config, tokenizer = model_formats.open_model(path)
  chat = Chat.load(model_formats.find_folder(path), tokenizer)
  prompt = chat.prompt([{"role": "user", "content": "quick"}])
  assert (
    tokenizer.decode(prompt.tokens, False)
    == "<|im_start|>user\nquick<|im_end|>\n<|im_start|>assistant\n"
  )
  assert tokenizer.added_id("<|im_end|>") in chat.stop_tokens
  target = str(tmp_path / "roe")
  checkpoints_convert.convert_from_hugging_face(str(path), target)
  converted, same_config, same_tokenizer = model_formats.open_model(target)
  assert config == same_config
  same(converted, params)
  assert tokenizer.encode(TEXTS[0]) == same_tokenizer.encode(TEXTS[0])
  assert Chat.load(target, same_tokenizer).settings == chat.settings
  assert not list(tmp_path.glob("*.json"))  # nothing is written next to the file


def damage(change):
  def edit(path):
    data = bytearray(small_llama(path).read_bytes())
    path.write_bytes(change(data))
    return path

  return edit


def changed(start, value):
  def change(data):
    data[start : start + len(value)] = value
    return data

  return change


def with_value(key, value):
  def edit(writer):
    with_tokenizer(writer)
    if key in writer.kv_data[0]:
      del writer.kv_data[0][key]
    kind = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
    kind(key, value)

  return lambda path: small_llama(path, edit)


def without(key):
  def edit(writer):
    with_tokenizer(writer)
    del writer.kv_data[0][key]

  return lambda path: small_llama(path, edit)


def extra(name):
  return lambda path: small_llama(path, tensors=lambda t: t | {name: np.zeros(4, np.float32)})


# One value: an array of an array, and so on.
NESTED = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 9)
NESTED += struct.pack("<IQ", 9, 1) * 50_000

BAD = {
  "absent": (lambda path: path, "there is no file .*m.gguf"),
  "empty": (lambda path: [path, path.write_bytes(b"")][0], "is not a GGUF file"),
  "foreign": (lambda path: [path, path.write_bytes(b"PK\3\4" * 9)][0], "is not a GGUF file"),
  "version": (damage(changed(4, b"\x01\0\0\0")), "of version 1, but only the versions 2 and 3"),
  "big-endian": (damage(changed(4, b"\0\0\0\x03")), "big-endian"),
  "header": (damage(lambda data: data[:300]), "truncated or damaged: its header"),
  "nested": (
    lambda path: [path, path.write_bytes(NESTED)][0],
    "damaged: its header cannot be read .maximum recursion depth",
  ),
  "type": (with_value("general.architecture", 5), "general.architecture of .* must be text, got 5"),
  "alignment": (with_value("general.alignment", 0), "general.alignment of .* must be positive"),
  "heads": (with_value("llama.attention.head_count", 0), "num_attention_heads of .* be positive"),
  "width": (with_value("llama.embedding_length", "x"), "llama.embedding_length of .* got 'x'"),
  "chat template": (with_value("tokenizer.chat_template", 5), "chat_template of .* must be text"),
  "data": (damage(lambda data: data[:-64]), "truncated: it has .* bytes, but its header describes"),
  "split by name": (
    lambda path: small_llama(path.with_name("m-00001-of-00002.gguf")),
    "one of the 2 parts of a split model",
  ),
  "split": (with_value("split.count", 3), "one of the 3 parts of a split model"),
  "architecture": (
    with_value("general.architecture", "mamba"),
    "has the architecture 'mamba'; supported: llama, qwen2",
  ),
  "metadata": (without("llama.block_count"), "lacks the metadata llama.block_count"),
  "tensor": (extra("blk.0.attn_rot_embd.weight"), "has a tensor blk.0.attn_rot_embd.weight"),
  "tensor of others": (
    extra("blk.0.attn_sinks.weight"),
    "tensors that a llama model .* not have: .*sinks",
  ),
  "lacking": (
    lambda path: small_llama(path, tensors=lambda t: t.pop("blk.0.ffn_up.weight") is None or t),
    "lacks tensors .*mlp.up_proj",
  ),
  "rotary": (
    with_value("llama.rope.dimension_count", 4),
    "partial_rotary_factor = 0.5; supported: 1.0",
  ),
  "kind of tokenizer": (with_value("tokenizer.ggml.model", "bert"), "tokenizer of the kind 'bert'"),
  "pre-tokenizer": (
    with_value("tokenizer.ggml.pre", "viking"),
    "pre-tokenizer of the kind 'viking'",
  ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_a_sentence(tmp_path, case):
  make, message = BAD[case]
  path = make(tmp_path / "m.gguf")
  with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
    model_formats.load_config(path)
  assert "\n" not in str(error.value)
  if case != "absent":
    assert path.name in str(error.value) or case == "rotary"


def test_unknown_quantizations_and_a_missing_package_are_refused(tmp_path, monkeypatch):
  path = small_llama(tmp_path / "m.gguf")
  data = path.read_bytes()
  name = b"blk.0.attn_norm.weight"
  at = data.index(name) + len(name) + 4 + 8
  for number, text in ((9, "Q8_1"), (250, "250")):
    path.write_bytes(data[:at] + number.to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(ConversionError, match=f"attn_norm.weight .* has the quantization {text}, "):
      gguf_files.read_header(path)

  class Missing(types.ModuleType):
    def __getattr__(self, name):
      raise ModuleNotFoundError("No module named 'gguf'")

  monkeypatch.setattr(gguf_files, "gguf", Missing("gguf"))
  with pytest.raises(ConversionError, match=r"needs the gguf package: run pip install"):
    gguf_model.expand(str(path))
