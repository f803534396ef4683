"""Converts between text and token ids with a `tokenizer.json`."""

from collections.abc import Iterable, Mapping, Sequence
import json
import pathlib
import re
from typing import Any

import tokenizers

from roe_jax.checkpoint_folder import CONFIG_FILE, PathLike
from roe_jax.config import ModelConfig

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_NAMED = tuple(f"{kind}_token" for kind in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"))


class Tokenizer:
  """A Hugging Face tokenizer with the model's special token ids.

  Attributes:
    bos_id, pad_id: token ids, or None.
    folder: the folder that it was loaded from, or None.
    eos_ids: end-of-sequence token ids; may be empty.
    named_tokens: special tokens as text, under their names in chat templates:
      {"bos_token": "<s>", ...}.
    vocab_size: largest token id + 1; a model's V may be larger (padding).
  """

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    *,
    bos_id: int | None = None,
    eos_ids: Iterable[int] = (),
    pad_id: int | None = None,
    named_tokens: Mapping[str, str] | None = None,
    folder: pathlib.Path | None = None,
  ):
    # A tokenizer.json may contain settings of a training run that silently truncate.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    self._tokenizer = tokenizer
    self.bos_id = bos_id
    self.eos_ids = tuple(eos_ids)
    self.pad_id = pad_id
    self.folder = folder
    self.named_tokens = dict(named_tokens or {})
    self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    added = tokenizer.get_added_tokens_decoder()
    self._special_ids = frozenset(i for i, t in added.items() if t.special)
    self._added_ids = {t.content: i for i, t in added.items()}

  @classmethod
  def load(cls, folder: PathLike) -> "Tokenizer":
    """Loads the tokenizer of a roe_jax checkpoint or a Hugging Face folder.

    Each special id comes from the first of generation_config.json, the model's config and
    tokenizer_config.json that has it: some tokenizers name another end-of-sequence token
    than the one that the model was trained with. If so, `named_tokens` has the model's
    instead; also as bos_token if that is the same wrong token and no config names another.

    Raises:
      FileNotFoundError: there is no tokenizer.json.
      ValueError: a file is malformed.
    """
    folder = pathlib.Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
      if (folder / "tokenizer.model").is_file():
        raise FileNotFoundError(
          f"{folder} has only a SentencePiece tokenizer.model: download tokenizer.json from the "
          "model's hub page, or write it with "
          "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
      raise FileNotFoundError(f"{folder} has no tokenizer.json")
    try:
      tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises only this class
      raise ValueError(f"{path} is not a tokenizer.json: {error}") from error

    configs = [read_json(folder / "generation_config.json"), _model_ids(folder)]
    named = _named_tokens(folder)

    def configured(kind):
      return next(
        (c[f"{kind}_token_id"] for c in configs if c.get(f"{kind}_token_id") not in (None, [])),
        None,
      )

    def first(kind):
      found = configured(kind)
      return tokenizer.token_to_id(named.get(f"{kind}_token", "")) if found is None else found

    eos = first("eos")
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    wrong = named.get("eos_token")
    right = tokenizer.id_to_token(eos_ids[0]) if eos_ids else None
    if wrong and right and tokenizer.token_to_id(wrong) not in eos_ids:
      named["eos_token"] = right
      if named.get("bos_token") == wrong and configured("bos") is None:
        named["bos_token"] = right
    return cls(
      tokenizer,
      bos_id=first("bos"),
      pad_id=first("pad"),
      eos_ids=eos_ids,
      named_tokens=named,
      folder=folder,
    )

  def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
    """Returns token ids, with the special tokens that the tokenizer's template adds."""
    return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

  def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """Returns the text of token ids; ids without a token (padding of V) have no text."""
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

  def token(self, token_id: int) -> str | None:
    """Returns the token's vocabulary entry, or None."""
    return self._tokenizer.id_to_token(int(token_id))

  def is_special(self, token_id: int) -> bool:
    return token_id in self._special_ids

  def added_id(self, text: str) -> int | None:
    """Returns the id of the added token with exactly this text, or None."""
    return self._added_ids.get(text)


class StreamDecoder:
  """Decodes token by token.

  The texts that `push` and `flush` return, joined, equal `tokenizer.decode` of all ids. A
  token's text is buffered while it can still change: in the middle of a character, and
  while it ends in byte tokens (`<0x0A>`), which byte fallback decodes as one group.
  """

  def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
    self._tokenizer = tokenizer
    self._skip_special_tokens = skip_special_tokens
    # The preceding text can determine the space in front of a token, so the tokens of the
    # last returned text are decoded again together with the new ones.
    self._context: list[int] = []
    self._buffer: list[int] = []

  def push(self, token_id: int) -> str:
    """Returns the text that this token completes; often "", or more than its own."""
    token_id = int(token_id)
    token = self._tokenizer.token(token_id)
    if token is None or (self._skip_special_tokens and self._tokenizer.is_special(token_id)):
      return ""
    self._buffer.append(token_id)
    if _BYTE_TOKEN.fullmatch(token):
      return ""
    return self._take(final=False)

  def flush(self) -> str:
    """Returns the buffered text; call this after the last token."""
    return self._take(final=True)

  def _take(self, final: bool) -> str:
    before = self._decode(self._context)
    text = self._decode(self._context + self._buffer)
    if not final and (len(text) <= len(before) or text.endswith(_INCOMPLETE)):
      return ""
    self._context, self._buffer = self._buffer or self._context, []
    return text[len(before) :]

  def _decode(self, ids: Sequence[int]) -> str:
    return self._tokenizer.decode(ids, self._skip_special_tokens)


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
  """Checks that the model has an embedding for every token.

  Raises:
    ValueError: the tokenizer has ids outside the model's vocabulary. (The opposite is
      normal: V is padded.)
  """
  if tokenizer.vocab_size > config.vocab_size:
    raise ValueError(
      f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model's vocabulary has "
      f"{config.vocab_size} tokens: use the tokenizer of this model"
    )


def stop_tokens(tokenizer: Tokenizer, config: ModelConfig) -> tuple[int, ...]:
  """Returns the end-of-sequence tokens: the tokenizer's, or the config's if it has none.

  generation_config.json, which the tokenizer reads, often has more than the model's config.
  """
  return tokenizer.eos_ids or config.eos_token_ids


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the JSON object in a file, or {} if the file does not exist.

  Raises:
    ValueError: the file does not contain a JSON object.
  """
  if not path.is_file():
    return {}
  try:
    values = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f"{path} is not valid JSON: {error}") from error
  if not isinstance(values, dict):
    raise ValueError(f"{path} must contain a JSON object")
  return values


def _model_ids(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the special ids of the model's config, under Hugging Face names."""
  if not (folder / CONFIG_FILE).is_file():
    return read_json(folder / "config.json")
  config = ModelConfig.from_json((folder / CONFIG_FILE).read_text())
  return {
    "bos_token_id": config.bos_token_id,
    "pad_token_id": config.pad_token_id,
    "eos_token_id": list(config.eos_token_ids),
  }


def _named_tokens(folder: pathlib.Path) -> dict[str, str]:
  """Returns the special tokens in the tokenizer's files, as text."""
  files = [
    read_json(folder / name) for name in ("special_tokens_map.json", "tokenizer_config.json")
  ]
  return {name: _token_text(file[name]) for file in files for name in _NAMED if file.get(name)}


def _token_text(token: Any) -> str:
  return token.get("content", "") if isinstance(token, dict) else token
