"""Makes the tokenizer's files of a Hugging Face folder from the metadata of a GGUF file."""

from collections.abc import Sequence
import dataclasses
import enum
import pathlib
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from checkpoints_convert.common import ConversionError
from roe_jax.text.chat import TEMPLATE_FILE

_PREFIX = "tokenizer.ggml."
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Cased letters, as far as DeepSeek's tokenizers know them. Escaped are those that would turn into
# others if this file were normalized.
_CASED = (
  "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅ"
  "ὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄ"
  "Ⰰ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CJK = "[一-龥\u0800-一가-\ud7ff]+"


def _llama3(digits: str) -> str:
  return (
    _SUFFIXES + rf"|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*" + _END
  )


def _by_case(suffixes: str, but: str = "") -> str:
  """Returns the words of upper-case letters and then lower-case ones, without letters `but`."""
  start = r"[^\r\n\p{L}\p{N}]?"
  upper, lower = (rf"[{case}\p{{Lm}}\p{{Lo}}\p{{M}}{but}]" for case in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
  return f"{start}{upper}*{lower}+{suffixes}|{start}{upper}+{lower}*{suffixes}|"


def _gpt4o(digits: str, suffixes: str) -> str:
  return _by_case(suffixes) + rf"{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + _END


class _Type(enum.IntEnum):
  """Types of tokens in GGUF."""

  NORMAL = 1
  UNKNOWN = 2
  CONTROL = 3
  USER_DEFINED = 4
  UNUSED = 5
  BYTE = 6


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
  """A value of `tokenizer.ggml.pre`: how byte-level BPE splits text into words.

  Attributes:
    names: the values.
    patterns: regular expressions that isolate words, one after the other.
    normalizes: whether the tokenizers of these models apply NFC.
    ignores_merges: whether a word that is a token is not merged from its parts.
    adds_bos: whether text starts with the BOS token if the file does not say it.
  """

  names: tuple[str, ...]
  patterns: tuple[str, ...]
  normalizes: bool = False
  ignores_merges: bool = False
  adds_bos: bool = False


# As in llama.cpp, with the regular expressions that the models' own tokenizers have.
PRE_TOKENIZERS = (
  PreTokenizer(("default",), (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
  PreTokenizer(
    ("gpt-2", "phi-2", "mpt", "exaone4", "a.x-4.0", "mellum", "granite-docling"), (_GPT2,)
  ),
  PreTokenizer(("olmo",), (_GPT2,), normalizes=True),
  PreTokenizer(
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _GPT2)
  ),
  PreTokenizer(("falcon",), (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
  PreTokenizer(("qwen2", "deepseek-r1-qwen", "megrez"), (_llama3(r"\p{N}"),), normalizes=True),
  PreTokenizer(("dbrx", "smaug-bpe"), (_llama3(r"\p{N}{1,3}"),)),
  PreTokenizer(
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"),
    (_llama3(r"\p{N}{1,3}"),),
    ignores_merges=True,
    adds_bos=True,
  ),
  PreTokenizer(("gpt-4o", "llama4"), (_gpt4o(r"\p{N}{1,3}", _SUFFIXES + "?"),)),
  PreTokenizer(("tekken",), (_gpt4o(r"\p{N}", ""),), ignores_merges=True, adds_bos=True),
  PreTokenizer(
    ("deepseek-llm",),
    (r"[\r\n]", rf"\s?[{_CASED}]+", r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", _CJK, r"\p{N}"),
  ),
  PreTokenizer(("deepseek-coder",), (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
  PreTokenizer(
    ("deepseek-v3",),
    (
      r"\p{N}{1,3}",
      "[一-龥぀-ゟ゠-ヿ]+",
      r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
      r"| ?[\p{P}\p{S}]+[\r\n]*" + _END,
    ),
  ),
  PreTokenizer(  # of Moonlight, too
    ("kimi-k2",),
    (
      r"\p{Han}+|"
      + _by_case(_SUFFIXES + "?", r"&&[^\p{Han}]")
      + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
      + _END,
    ),
  ),
  PreTokenizer(
    ("bailingmoe", "bailingmoe2", "llada-moe"),
    (
      r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
      r"|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
  ),
)


def special_ids(metadata: dict[str, Any]) -> dict[str, Any]:
  """Returns the ids of special tokens under the names in `config.json`."""
  get = lambda kind: metadata.get(f"{_PREFIX}{kind}_token_id")
  ends = [get(kind) for kind in ("eos", "eot", "eom")]
  return {
    "bos_token_id": get("bos"),
    "eos_token_id": list(dict.fromkeys(i for i in ends if i is not None)) or None,
    "pad_token_id": get("padding"),
  }


def files(path: pathlib.Path, metadata: dict[str, Any]) -> dict[str, Any]:
  """Returns the tokenizer's files by name: JSON objects or text; none if there is no tokenizer.

  Args:
    path: the GGUF file, for error messages.
    metadata: its metadata.

  Raises:
    ConversionError: the tokenizer is of an unknown kind or malformed.
  """
  kind = metadata.get(_PREFIX + "model", "none")
  if kind in ("none", "no_vocab"):
    return {}
  makers = {"gpt2": _byte_level, "llama": _sentence_piece}
  if kind not in makers:
    raise ConversionError(
      f"{path} has a tokenizer of the kind {kind!r}; supported: {', '.join(makers)}"
    )
  get = lambda key, default=None: metadata.get(_PREFIX + key, default)
  tokens: list[str] = metadata.get(_PREFIX + "tokens", [])
  try:
    types = [_Type(value) for value in get("token_type") or [_Type.NORMAL] * len(tokens)]
    vocabulary = {t: i for i, (t, kind) in enumerate(zip(tokens, types)) if kind != _Type.UNUSED}
    tokenizer, adds_bos = makers[kind](path, metadata, vocabulary, types)
    _add_tokens(tokenizer, tokens, types)
    ids = {name: get(f"{key}_token_id") for name, key in _NAMED.items()}
    named = {name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}
    ends = [("bos", get("add_bos_token", adds_bos)), ("eos", get("add_eos_token", False))]
    first, last = ([named[f"{n}_token"]] if adds else [] for n, adds in ends)
    if first or last:
      tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *first, "$B:1", *last],
        special_tokens=[(token, vocabulary[token]) for token in {*first, *last}],
      )
  except ConversionError:
    raise
  except Exception as error:  # tokenizers raises only this class
    raise ConversionError(f"{path} has a malformed tokenizer: {error!r}") from error
  contents = {
    "tokenizer.json": tokenizer.to_str(),
    "tokenizer_config.json": named,
    "generation_config.json": special_ids(metadata),
  }
  if "tokenizer.chat_template" in metadata:
    contents[TEMPLATE_FILE] = metadata["tokenizer.chat_template"]
  return contents


_NAMED = {
  "bos_token": "bos",
  "eos_token": "eos",
  "unk_token": "unknown",
  "pad_token": "padding",
  "sep_token": "seperator",  # the spelling of the format
}


def _add_tokens(
  tokenizer: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[_Type]
) -> None:
  special = (_Type.CONTROL, _Type.UNKNOWN)
  tokenizer.add_tokens(
    [
      tokenizers.AddedToken(token, normalized=False, special=kind in special)
      for token, kind in zip(tokens, types)
      if kind in (*special, _Type.USER_DEFINED)
    ]
  )


def _byte_level(path, metadata, vocabulary, types) -> tuple[tokenizers.Tokenizer, bool]:
  """Returns a byte-level BPE tokenizer, and whether it adds the BOS token by default."""
  name = metadata.get(_PREFIX + "pre", "default")
  pre = next((pre for pre in PRE_TOKENIZERS if name in pre.names), None)
  if pre is None:
    known = ", ".join(name for pre in PRE_TOKENIZERS for name in pre.names)
    raise ConversionError(f"{path} has a pre-tokenizer of the kind {name!r}; supported: {known}")
  # A space can only be the first character of a token.
  merges = [
    (merge[:i], merge[i + 1 :])
    for merge in metadata.get(_PREFIX + "merges", [])
    for i in [merge.index(" ", 1)]
  ]
  tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre.ignores_merges))
  if pre.normalizes:
    tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      *(pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in pre.patterns),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  return tokenizer, pre.adds_bos


def _sentence_piece(path, metadata, vocabulary, types) -> tuple[tokenizers.Tokenizer, bool]:
  """Returns a BPE tokenizer as SentencePiece's, which merges to the token with the best score."""
  scores = metadata[_PREFIX + "scores"]
  merges = [
    (-scores[i], token[:cut], token[cut:])
    for token, i in vocabulary.items()
    if types[i] == _Type.NORMAL
    for cut in range(1, len(token))
    if token[:cut] in vocabulary and token[cut:] in vocabulary
  ]
  merges.sort(key=lambda merge: merge[0])
  unknown = next((t for t, i in vocabulary.items() if types[i] == _Type.UNKNOWN), None)
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocabulary,
      [(left, right) for _, left, right in merges],
      unk_token=unknown,
      fuse_unk=True,
      byte_fallback=_Type.BYTE in types,
    )
  )
  replace = normalizers.Replace(" ", _SPACE)
  decode = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
  if metadata.get(_PREFIX + "add_space_prefix", True):
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
    decode.append(decoders.Strip(" ", 1, 0))
  else:
    tokenizer.normalizer = replace
  tokenizer.decoder = decoders.Sequence(decode)
  return tokenizer, True
