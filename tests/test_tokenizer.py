import json
import random

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from roe_jax import batching
from roe_jax.presets import PRESETS
from roe_jax.text.tokenizer import StreamDecoder, Tokenizer, check_vocabulary, stop_tokens

TEXT = (
  "the quick brown fox jumps over the lazy dog\n"
  * 3
  + "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich. 12 + 34 = 46\n"
  "любя, съешь щипцы — вздохнёт мэр 🙂🦊 👩‍👩‍👧 你好，世界\n"
)


def byte_level():
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(
    [TEXT],
    trainers.BpeTrainer(
      vocab_size=330,
      special_tokens=["<eos>", "<pad>"],
      show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  return tokenizer


def sentence_piece():
  """Built as the tokenizers converted from SentencePiece models are."""
  words = ["the", "fox", "qu", "ick", "ü", "é", "你", "1", "2", "o", "a", "b", "c", ",", "."]
  tokens = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{i:02X}>" for i in range(256)),
    "▁",
    "▁▁",
    "▁▁▁",
    *words,
    *("▁" + w for w in words),
  ]
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      {t: i for i, t in enumerate(tokens)},
      [("▁", "a"), ("▁", "▁")],
      unk_token="<unk>",
      byte_fallback=True,
      fuse_unk=True,
    )
  )
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 1)]
  )
  return tokenizer


KINDS = pytest.mark.parametrize("make", [byte_level, sentence_piece])


def write(folder, tokenizer, **files):
  tokenizer.save(str(folder / "tokenizer.json"))
  for name, values in files.items():
    (folder / f"{name}.json").write_text(json.dumps(values))
  return folder


@KINDS
def test_text_survives_encoding_and_decoding(make, tmp_path):
  tokenizer = Tokenizer.load(write(tmp_path, make()))
  assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_special_tokens_are_added_and_skipped_on_request(tmp_path):
  tokenizer = Tokenizer.load(write(tmp_path, sentence_piece()))
  bare = tokenizer.encode("a b", add_special_tokens=False)
  assert tokenizer.encode("a b") == [1, *bare]
  assert tokenizer.decode([1, *bare, 2]) == "a b"
  assert tokenizer.decode([1, *bare, 2], skip_special_tokens=False) == "<s> a b</s>"


def test_truncation_stored_in_the_file_does_not_cut_texts(tmp_path):
  raw = byte_level()
  raw.enable_truncation(4)
  raw.enable_padding(length=4)
  tokenizer = Tokenizer.load(write(tmp_path, raw))
  assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
  assert len(tokenizer.encode("a")) == 1


@KINDS
@pytest.mark.parametrize("skip", [True, False])
def test_a_stream_is_exactly_the_whole_decoded(make, skip, tmp_path):
  tokenizer = Tokenizer.load(write(tmp_path, make()))
  generator = random.Random(0)
  streams = [tokenizer.encode(TEXT)]
  # Mostly invalid UTF-8, with special tokens and ids that have no token between.
  for size in range(120):
    ids = range(tokenizer.vocab_size + 3)
    streams.append(generator.choices(ids, k=size))
    streams.append(generator.choices([*ids[:6], *tokenizer.encode("🙂 你  the\n")], k=size))
  for ids in streams:
    stream = StreamDecoder(tokenizer, skip_special_tokens=skip)
    text = "".join([stream.push(i) for i in ids] + [stream.flush()])
    assert text == tokenizer.decode(ids, skip_special_tokens=skip), ids


@KINDS
def test_a_stream_returns_whole_characters_as_soon_as_it_can(make, tmp_path):
  tokenizer = Tokenizer.load(write(tmp_path, make()))
  stream = StreamDecoder(tokenizer)
  pushed = [stream.push(i) for i in tokenizer.encode("the 🙂 fox, the fo, a")]
  assert not any("�" in text for text in pushed)
  assert sum(bool(text) for text in pushed) >= 4
  assert "".join(pushed) == "the 🙂 fox, the fo, a" and stream.flush() == ""


def test_prompts_follow_the_tokenizer_and_every_end_stops(tmp_path):
  named = {"eos_token": "<pad>", "bos_token": {"content": "<eos>"}, "pad_token": "<pad>"}
  write(tmp_path, byte_level(), config={"eos_token_id": 0, "bos_token_id": 7, "pad_token_id": None})
  load = lambda: (lambda t: (t.bos_id, t.eos_ids, t.pad_id))(Tokenizer.load(tmp_path))
  assert load() == (7, (0,), None)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
  assert load() == (0, (1, 0), 1)
  config = PRESETS["olmoe-1b-7b"].replace(eos_token_ids=(7, 8), pad_token_id=None)
  (tmp_path / "model_config.json").write_text(config.to_json())
  (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
  assert load() == (0, (1, 7, 8, 5), 1)
  assert stop_tokens(Tokenizer.load(tmp_path), config.replace(eos_token_ids=(9, 5)), (4, 1)) == (
    1,
    7,
    8,
    5,
    9,
    4,
  )


ADDED = {"content": "<new>", "lstrip": True, "normalized": False, "rstrip": False}
ADDED |= {"single_word": False, "special": False}
FILES = [  # the tokens in tokenizer.json are <eos> (special), <pad> (special), <plain>
  {"tokenizer_config": {"added_tokens_decoder": {"331": ADDED}, "eos_token": "<new>"}},
  {"tokenizer_config": {"added_tokens_decoder": {"331": ADDED, "332": ADDED | {"content": "<b>"}}}},
  {
    "tokenizer_config": {
      "added_tokens_decoder": {"330": ADDED | {"content": "<plain>", "special": True}},
      "eos_token": "<end>",
      "image_token": "<image>",
      "extra_special_tokens": ["<x>"],
    }
  },
  {
    "tokenizer_config": {"eos_token": "<pad>", "additional_special_tokens": ["<new>"]},
    "added_tokens": {"<b>": 332, "<new>": 331},
  },
  {
    "tokenizer_config": {"eos_token": "<pad>", "split_special_tokens": True},
    "special_tokens_map": {"eos_token": {"content": "<eos>"}, "pad_token": "the"},
  },
  {"tokenizer_config": {"added_tokens_decoder": {}}, "special_tokens_map": {"eos_token": "<new>"}},
]


@pytest.mark.parametrize("files", FILES)
def test_tokens_of_all_files_are_those_of_transformers(files, tmp_path):
  transformers = pytest.importorskip("transformers")
  raw = byte_level()
  raw.add_tokens(["<plain>"])
  tokenizer = Tokenizer.load(write(tmp_path, raw, **files))
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  assert tokenizer.named_tokens == theirs.special_tokens_map
  assert tokenizer.vocab_size == len(theirs)
  for i, token in theirs.added_tokens_decoder.items():
    assert (tokenizer.added_id(token.content), tokenizer.is_special(i)) == (i, token.special)
  assert set(tokenizer.eos_ids) == {theirs.eos_token_id} - {None}
  text = "the <new> fox<b>\n<plain> <eos><end><image> <x> the"
  ids = theirs.encode(text)
  assert tokenizer.encode(text) == ids
  assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_malformed_added_tokens_get_a_sentence(tmp_path):
  for wrong in ({"x": ADDED}, {"331": "<new>", "332": 3}, {"331": ADDED | {"special": 1}}, [1]):
    write(tmp_path, byte_level(), tokenizer_config={"added_tokens_decoder": wrong})
    with pytest.raises(ValueError, match=r"tokenizer_config.json (has malformed|must be)"):
      Tokenizer.load(tmp_path)


def test_only_whole_added_tokens_have_an_added_id(tmp_path):
  raw = byte_level()
  raw.add_tokens(["<think>"])
  tokenizer = Tokenizer.load(write(tmp_path, raw))
  assert tokenizer.added_id("<pad>") == 1
  assert tokenizer.added_id("<think>") == 330 and not tokenizer.is_special(330)
  assert tokenizer.added_id("a") is None and raw.token_to_id("a") is not None


def test_a_tokenizer_without_special_ids_has_none(tmp_path):
  tokenizer = Tokenizer.load(write(tmp_path, byte_level()))
  assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (None, (), None)


def test_the_model_must_know_every_token(tmp_path):
  raw = byte_level()
  raw.add_tokens(["<extra>"])
  tokenizer = Tokenizer.load(write(tmp_path, raw))
  assert tokenizer.vocab_size == 331 == raw.token_to_id("<extra>") + 1
  config = PRESETS["olmoe-1b-7b"]
  check_vocabulary(tokenizer, config)
  # An added token is refused only in a prompt.
  small = config.replace(vocab_size=330)
  check_vocabulary(tokenizer, small)
  batching.check_tokens(small, [tokenizer.encode("the fox")])
  with pytest.raises(ValueError, match="token id 330, outside the model's vocabulary of 330"):
    batching.check_tokens(small, [tokenizer.encode("the<extra>")])
  with pytest.raises(ValueError, match="ids up to 329, .* has 329 tokens"):
    check_vocabulary(tokenizer, config.replace(vocab_size=329))


def test_bad_folders_get_a_sentence(tmp_path):
  with pytest.raises(FileNotFoundError, match="has no tokenizer.json"):
    Tokenizer.load(tmp_path)
  (tmp_path / "tokenizer.model").write_bytes(b"x")
  with pytest.raises(FileNotFoundError, match="has tokenizer.model but no tokenizer.json"):
    Tokenizer.load(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(ValueError, match="is not a tokenizer.json"):
    Tokenizer.load(tmp_path)
  write(tmp_path, byte_level())
  for name, text, message in [
    ("tokenizer_config.json", "[" * 10**5, "tokenizer_config.json is nested too deeply"),
    ("tokenizer_config.json", "[]", "tokenizer_config.json must be a JSON object"),
    ("tokenizer_config.json", '{"eos_token": 5}', "eos_token of .* must be text or a JSON object"),
    ("tokenizer_config.json", '{"split_special_tokens": 1}', "must be true or false or null"),
    ("tokenizer_config.json", '{"extra_special_tokens": [null]}', "extra_special_tokens of .*list"),
    ("tokenizer_config.json", '{"extra_special_tokens": {"x": 1}}', "'x' of extra_special_tokens"),
    ("added_tokens.json", '{"<new>": true}', "'<new>' of .*added_tokens.json must be an integer"),
    ("added_tokens.json", '{"<new>": NaN}', "'<new>' of .*added_tokens.json must be an integer"),
    ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id of .* must be an integer"),
    ("generation_config.json", '{"eos_token_id": [1, true]}', "or a list whose items are integers"),
    ("generation_config.json", '{"eos_token_id": -1}', "eos_token_id of .* must be a token id"),
    ("generation_config.json", '{"eos_token_id": [1e30]}', "eos_token_id of .* must be an integer"),
    ("config.json", '{"pad_token_id": 99999999999}', "pad_token_id of .*config.json must be a tok"),
  ]:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
      Tokenizer.load(tmp_path)
    (tmp_path / name).unlink()
  (tmp_path / "generation_config.json").write_text("{")
  with pytest.raises(ValueError, match="generation_config.json is not valid JSON"):
    Tokenizer.load(tmp_path)
