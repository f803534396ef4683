"""GGUF files of DeepSeek, Moonlight and Ling: their rules in llama.cpp's converter, written out."""

import json
import unicodedata

import chat_formats
import gguf
import hf
import jax
import numpy as np
import pytest
import regex
import safetensors.numpy
import tokenizers
from tokenizers import pre_tokenizers

import checkpoints_convert
from checkpoints_convert import gguf_tokenizer
from roe_jax import families, model_formats, transformer
from roe_jax.completion import Completion
from roe_jax.text.chat import Chat

# A writer of files as `conversion/{deepseek,bailing}.py` make them.


def deepseek_tensors(config, state, split):
  """The weights of `DeepseekV2Model`, with `kv_b` as it was before April 2025 or split."""
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, config["num_hidden_layers"])
  tensors = {}
  for name, weight in hf.hub_state(config, state).items():
    head, _, rest = name.partition(".mlp.experts.")
    if rest:
      expert, matrix, _ = rest.split(".")
      tensors.setdefault(f"{head}.mlp.experts.{matrix}.weight", []).append((int(expert), weight))
    elif name.endswith("kv_b_proj.weight") and split:
      nope, wide = config["qk_nope_head_dim"], config["v_head_dim"]
      both = weight.reshape(config["num_attention_heads"], nope + wide, -1)
      tensors[name.replace("kv_b", "k_b")] = both[:, :nope].swapaxes(1, 2)
      tensors[name.replace("kv_b", "v_b")] = both[:, nope:]
    else:
      tensors[name.replace("correction_bias", "correction.bias")] = weight
  return {
    names.get_name(name, try_suffixes=(".weight", ".bias")): np.ascontiguousarray(
      weight if isinstance(weight, np.ndarray) else np.stack([w for _, w in sorted(weight)])
    )
    for name, weight in tensors.items()
  }


def write(path, arch, config, tensors, edit=lambda writer: None):
  writer = gguf.GGUFWriter(path, arch)
  writer.add_block_count(config["num_hidden_layers"])
  writer.add_context_length(config["max_position_embeddings"])
  writer.add_embedding_length(config["hidden_size"])
  writer.add_feed_forward_length(config["intermediate_size"])
  writer.add_head_count(config["num_attention_heads"])
  writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
  writer.add_rope_freq_base(config["rope_theta"])
  writer.add_vocab_size(config["vocab_size"])
  writer.add_expert_used_count(config["num_experts_per_tok"])
  writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
  writer.add_expert_weights_scale(config["routed_scaling_factor"])
  writer.add_leading_dense_block_count(config["first_k_dense_replace"])
  if "n_group" in config:
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
  if config.get("norm_topk_prob"):
    writer.add_expert_weights_norm(True)
  for kind in ("bos", "eos", "pad"):
    getattr(writer, f"add_{kind}_token_id")(config[f"{kind}_token_id"])
  edit(writer)
  for name, tensor in tensors.items():
    writer.add_tensor(name, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return str(path)


def write_deepseek(path, config, tensors, split=True, edit=lambda writer: None):
  def more(writer):
    latent, rotary = config["kv_lora_rank"], config["qk_rope_head_dim"]
    key, value = config["qk_nope_head_dim"] + rotary, config["v_head_dim"]
    writer.add_head_count_kv(1 if split else config["num_attention_heads"])
    writer.add_key_length(latent + rotary if split else key)
    writer.add_value_length(latent if split else value)
    if split:
      writer.add_key_length_mla(key)
      writer.add_value_length_mla(value)
    writer.add_kv_lora_rank(latent)
    if config["q_lora_rank"]:
      writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_rope_dimension_count(rotary)
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    if config["model_type"] == "deepseek_v3":
      writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if scaling := config["rope_scaling"]:
      writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
      writer.add_rope_scaling_factor(scaling["factor"])
      writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
      writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])
    edit(writer)

  return write(path, "deepseek2", config, tensors, more)


YARN = hf.config_json("deepseek_v3")["rope_scaling"] | dict(mscale=0.707)
FILES = [("deepseek_v2", False, YARN), ("deepseek_v2", True, None), ("deepseek_v3", True, YARN)]


def same(actual, expected):
  for (path, x), (_, y) in zip(*map(jax.tree.leaves_with_path, (actual, expected)), strict=True):
    np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("family, split, scaling", FILES)
def test_deepseek_files_have_the_weights_and_config_of_their_hub_form(
  tmp_path, family, split, scaling
):
  config = hf.config_json(family, rope_scaling=scaling)
  state = hf.random_state(config, seed=1)
  tensors = deepseek_tensors(config, state, split)
  if not split:  # some programs write both, and the halves in another shape
    tensors["blk.0.attn_k_b.weight"] = np.zeros((5, 7), np.float32)
  params, found = checkpoints_convert.load(
    write_deepseek(tmp_path / "m.gguf", config, tensors, split)
  )
  same(params, hf.to_params(config, state))
  assert found == families.from_hugging_face(config, dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("family, split, scaling", [FILES[0], FILES[2]])
def test_deepseek_files_compute_what_transformers_does(tmp_path, family, split, scaling):
  pytest.importorskip("torch")
  config = hf.config_json(family, rope_scaling=scaling)
  state = hf.random_state(config, seed=1)
  tensors = deepseek_tensors(config, state, split)
  params, found = checkpoints_convert.load(
    write_deepseek(tmp_path / "m.gguf", config, tensors, split)
  )
  tokens = np.random.RandomState(0).randint(0, config["vocab_size"], (2, 20))
  expected = hf.logits(hf.to_model(config, state), tokens)
  actual = jax.jit(transformer.forward, static_argnums=1)(params, found, tokens)[0]
  assert np.abs(np.asarray(actual) - expected).max() < 1e-5 * np.abs(expected).max()


def ling_tensors(config):
  """Weights with the hub's names, those of a layer that predicts a further token included."""
  state = hf.random_state(hf.config_json("glm4_moe", num_hidden_layers=4))
  tensors = hf.hub_state(hf.config_json("glm4_moe"), state)
  for i in range(4):
    at = f"model.layers.{i}."
    for kind in ("weight", "bias"):
      three = [tensors.pop(f"{at}self_attn.{p}_proj.{kind}") for p in "qkv"]
      tensors[f"{at}attention.query_key_value.{kind}"] = np.concatenate(three)
  for old, new in (
    ("embed_tokens", "word_embeddings"),
    ("self_attn.o_proj", "attention.dense"),
    ("self_attn.q_norm", "attention.query_layernorm"),
    ("self_attn.k_norm", "attention.key_layernorm"),
    ("gate.e_score_correction_bias", "gate.expert_bias"),
  ):
    tensors = {name.replace(old, new): weight for name, weight in tensors.items()}
  width = config["hidden_size"]
  return tensors | {
    "model.layers.3.eh_proj.weight": np.ones((width, 2 * width), np.float32),
    "model.layers.3.enorm.weight": np.ones(width, np.float32),
  }


def test_ling_files_have_the_weights_and_config_of_their_hub_form(tmp_path, caplog):
  config = hf.config_json("bailing_moe_v2", num_nextn_predict_layers=1)
  hub = ling_tensors(config)
  (tmp_path / "hub").mkdir()
  (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
  safetensors.numpy.save_file(hub, tmp_path / "hub" / "model.safetensors")
  expected, same_config = checkpoints_convert.load(str(tmp_path / "hub"), dtype="float32")

  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BAILINGMOE2, 4)
  joint = {}
  for name, weight in hub.items():  # as in `BailingMoeV2Model.modify_tensors`
    head, _, rest = name.partition(".mlp.experts.")
    name = f"{head}.mlp.experts.{rest.split('.')[1]}.weight" if rest else name
    name = name.replace("expert_bias", "expert_bias.bias")
    name = names.get_name(name, try_suffixes=(".weight", ".bias"))
    joint[name] = np.stack([*joint.get(name, ()), weight]) if rest else weight
  assert {"blk.3.nextn.eh_proj.weight", "blk.3.nextn.enorm.weight"} <= set(joint)

  def more(writer, function=gguf.ExpertGatingFuncType.SIGMOID):
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"] // 2)
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_shared_count(config["num_shared_experts"])
    writer.add_expert_shared_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_gating_func(function)
    writer.add_nextn_predict_layers(1)

  of_file = config | dict(num_hidden_layers=4)  # which counts all
  path = write(tmp_path / "m.gguf", "bailingmoe2", of_file, joint, more)
  params, found = checkpoints_convert.load(path)
  assert found == same_config
  same(params, expected)
  assert "skipping the layers of" in caplog.text and "m.gguf that predict" in caplog.text

  softmax = lambda writer: more(writer, gguf.ExpertGatingFuncType.SOFTMAX)
  path = write(tmp_path / "n.gguf", "bailingmoe2", of_file, joint, softmax)
  with pytest.raises(ValueError, match="score_function = 'softmax'; supported: sigmoid"):
    checkpoints_convert.load_config(path)


def test_deepseek_files_without_metadata_of_the_router_are_read_as_by_llama_cpp(tmp_path):
  config = hf.config_json("deepseek_v3", rope_scaling=None)
  plain = {k: v for k, v in config.items() if k not in ("n_group", "norm_topk_prob")}
  plain["first_k_dense_replace"] = 1
  tensors = deepseek_tensors(config, hf.random_state(config), True)

  def edit(writer):
    del writer.kv_data[0]["deepseek2.expert_weights_scale"]

  found = checkpoints_convert.load_config(
    write_deepseek(tmp_path / "m.gguf", plain, tensors, edit=edit)
  )
  assert (found.expert_groups, found.gate_multiplier, found.normalize_gates) == (1, 1.0, False)


def extra(name):
  return lambda tensors: tensors | {name: np.zeros(4, np.float32)}


BAD = {
  "groups by their best expert": (
    "deepseek_v2",
    lambda tensors: tensors,
    lambda writer: writer.add_expert_group_count(4) or writer.add_expert_group_used_count(2),
    "topk_method = 'group_limited_greedy'; supported: greedy",
  ),
  "gates": (
    "deepseek_v2",
    lambda tensors: tensors,
    lambda writer: writer.add_uint32("deepseek2.expert_gating_func", 3),
    "scoring_func = 3; supported: softmax",
  ),
  "unknown": (
    "deepseek_v3",
    extra("blk.1.indexer.k_norm.weight"),
    lambda writer: None,
    "has a tensor blk.1.indexer.k_norm.weight, which is unknown in a deepseek_v3 model",
  ),
  "left over": (
    "deepseek_v2",
    extra("blk.1.exp_probs_b.bias"),
    lambda writer: None,
    "tensors that a deepseek_v2 model .* not have: .*e_score_correction_bias",
  ),
  "lacking": (
    "deepseek_v3",
    lambda tensors: tensors.pop("blk.1.attn_v_b.weight") is None or tensors,
    lambda writer: None,
    "lacks tensors .*v_b_proj",
  ),
  "type": (
    "deepseek_v3",
    lambda tensors: tensors,
    lambda writer: writer.add_string("deepseek2.nextn_predict_layers", "1"),
    "deepseek2.nextn_predict_layers of .*m.gguf must be .* got '1'",
  ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_a_sentence(tmp_path, case):
  family, change, edit, message = BAD[case]
  config = hf.config_json(family, rope_scaling=None)
  tensors = change(deepseek_tensors(config, hf.random_state(config), True))
  with pytest.raises(ValueError, match=message) as error:
    checkpoints_convert.load_config(write_deepseek(tmp_path / "m.gguf", config, tensors, edit=edit))
  assert "\n" not in str(error.value)


# What the models' own tokenizers split by, one pattern after the other, as published in their
# tokenizer.json (Kimi and Moonlight: tokenization_moonshot.py).
END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
MARKS = r"!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~"
KIMI_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
KIMI_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
KIMI_WORDS = "|".join(
  r"[^\r\n\p{L}\p{N}]?" + KIMI_UPPER + a + KIMI_LOWER + b + "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
  for a, b in ("*+", "+*")
)
SPLITS = {
  "deepseek-llm": (
    "[\r\n]",
    r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",  # but see the next test
    r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    CJK,
    r"\p{N}",
  ),
  "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"),
  "deepseek-v3": (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    f"[{MARKS}][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + END,
  ),
  "kimi-k2": (rf"[\p{{Han}}]+|{KIMI_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{END}",),
  "bailingmoe2": (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+",
  ),
}
TRICKY = (
  "The 1234567 quick  brown foxes' don't JUMP, they'LL  \n\n run:\r\n\tHelloWorld!!\t x=3.14;\n",
  "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n 🚀 (normal) 😶\u200d🌫️ ✅ 🦙🦙 3 33 333 3333",
  "3.3 3..3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ -----=== нещо на Български ''''``\"\"!!??",
  "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you? We'Ve a'lL",
  "東京タワーへ2024年に行った。「すごい！」と言った、 한국어 텍스트 ２０２４",
  "हिन्दी العربية Ελληνικά ʻokina naïve café “quotes” … ½ ² Ⅷ e\u0301 \u00a0\u3000全角　スペース",
  "getUserName iPhone/path_to/file.py //\r\n",
  "  leading, trailing   ",
  "\r\r\n\n",
  " ",
)


def isolated(pattern, words):
  """Splits words into what a pattern matches and what is between; by another engine."""
  for word in words:
    at = 0
    for match in regex.finditer(pattern, word, regex.V1):
      yield from filter(None, (word[at : match.start()], match.group()))
      at = match.end()
    yield from filter(None, (word[at:],))


@pytest.mark.parametrize("name", SPLITS)
def test_text_is_split_as_by_the_tokenizers_of_the_models(name):
  pre = next(pre for pre in gguf_tokenizer.PRE_TOKENIZERS if name in pre.names)
  ours = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in pre.patterns]
  )
  for text in TRICKY:
    expected = [text]
    for pattern in SPLITS[name]:
      expected = list(isolated(pattern, expected))
    assert [word for word, _ in ours.pre_tokenize_str(text)] == expected


def test_deepseeks_letters_are_the_cased_ones_of_unicode_but_some_blocks():
  pre = next(pre for pre in gguf_tokenizer.PRE_TOKENIZERS if "deepseek-llm" in pre.names)
  letters = regex.compile(pre.patterns[1].removeprefix(r"\s?").removesuffix("+"))
  ours = set(map(ord, letters.findall("".join(map(chr, range(0x1F000))))))
  cased = {c for c in range(0x1F000) if unicodedata.category(chr(c)) in ("Lu", "Ll", "Lt")}
  assert ours - cased <= {0x2C2F, 0x2C5F}  # of Unicode 14
  blocks = [(0x560, 0x588), (0x10C7, 0x10FF), (0x1C80, 0x1C8A), (0x2D00, 0x2D2D), (0xA790, 0xA7FF)]
  blocks += [(0xAB30, 0xAB68), (0x10570, 0x105BC), (0x10D50, 0x10D85), (0x16E40, 0x1DFFF)]
  assert all(any(first <= c <= last for first, last in blocks) for c in cased - ours)
  assert {0x561, 0x10D0, 0x2D00, 0xA790, 0xAB30, 0x1D400} <= cased - ours


def test_a_deepseek_file_has_its_chat_format(tmp_path):
  made = chat_formats.tokenizer("r1")
  tokens = [made.id_to_token(i) for i in range(made.get_vocab_size())]
  begin, end = map(tokens.index, chat_formats.SPECIAL["r1"][:2])
  config = hf.config_json("deepseek_v3", rope_scaling=None, vocab_size=len(tokens))
  config |= dict(bos_token_id=begin, eos_token_id=end)

  def edit(writer):
    marks = made.get_added_tokens_decoder()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-v3")
    writer.add_token_list(tokens)
    writer.add_token_types(
      [(3 if marks[i].special else 4) if i in marks else 1 for i in range(len(tokens))]
    )
    writer.add_add_bos_token(True)
    writer.add_chat_template(chat_formats.R1)

  tensors = deepseek_tensors(config, hf.random_state(config), True)
  path = write_deepseek(tmp_path / "m.gguf", config, tensors, edit=edit)
  _, found, tokenizer = model_formats.open_model(path)
  assert found.eos_token_ids == (end,) and tokenizer.encode("2")[0] == begin
  chat = Chat.load(model_formats.find_folder(path), tokenizer)
  prompt = chat.prompt([{"role": "user", "content": "1 + 1?"}])
  expected = "<｜begin▁of▁sentence｜><｜User｜>1 + 1?<｜Assistant｜><think>\n"
  assert tokenizer.decode(prompt.tokens, False) == expected
  assert chat.stop_tokens == (end,)
  response = tokenizer.encode("It is two.</think>\n\n2", add_special_tokens=False)
  answer = chat.answer(prompt, Completion([*response, end], [], [], "stop_token"))
  assert (answer.final, answer.reasoning) == ("2", "It is two.")
