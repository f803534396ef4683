"""Converts between text and token ids with a `tokenizer.json`.

tokenizer_config.json, special_tokens_map.json and added_tokens.json apply as in transformers.
"""

from collections.abc import Iterable, Mapping, Sequence
import pathlib
import re
from typing import Any

import tokenizers

from roe_jax import typed
from roe_jax.checkpoint_folder import CONFIG_FILE, PathLike
from roe_jax.config import ModelConfig

_KINDS = ("bos", "eos", "pad")
# The values of tokenizer_config.json and special_tokens_map.json that are read.
_SETTINGS: dict[str, Any] = {
  "added_tokens_decoder": dict[str, dict] | None,
  "additional_special_tokens": list[str | dict] | None,
  "extra_special_tokens": dict[str, str | dict] | list[str | dict] | None,
  "split_special_tokens": bool | None,
}
_SETTINGS |= {f"{kind}_token": str | dict | None for kind in (*_KINDS, "unk", "sep", "cls", "mask")}
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Other formats of tokenizers, which transformers can convert.
_UNREAD = ("tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json", "vocab.txt")


class Tokenizer:
  """A Hugging Face tokenizer with the model's special token ids.

  Attributes:
    bos_id, pad_id: token ids, or None.
    folder: the folder that it was loaded from, or None.
    eos_ids: end-of-sequence token ids, the tokenizer's own first; may be empty.
    named_tokens: special tokens as text, under their names in chat templates:
      {"bos_token": "<s>", ...}.
    vocab_size: largest token id + 1; a model's V may be larger (padding), or smaller by
      added tokens that it was not trained with.
    base_vocab_size: the same without added tokens.
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
    base = set(tokenizer.get_vocab(with_added_tokens=True).values()) - set(added)
    self.base_vocab_size = max(base, default=-1) + 1

  @classmethod
  def load(cls, folder: PathLike) -> "Tokenizer":
    """Loads the tokenizer of a roe_jax checkpoint or a Hugging Face folder.

    Prompts follow the tokenizer: its files name the special tokens, and the model's config
    only those that they do not. Generation ends at any end-of-sequence token that the
    tokenizer, the model's config or generation_config.json names.

    Raises:
      FileNotFoundError: there is no tokenizer.json.
      ValueError: a file is malformed.
    """
    folder = pathlib.Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
      raise FileNotFoundError(f"{folder} {missing_tokenizer(folder)}")
    try:
      tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises only this class
      raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
    named = _add_tokens(tokenizer, folder)
    own = {name: tokenizer.token_to_id(text) for name, text in named.items()}
    configs = [_model_ids(folder), _special_ids(folder / "generation_config.json")]

    def ids(kind):
      found = [own.get(f"{kind}_token"), *(c.get(f"{kind}_token_id") for c in configs)]
      found = [i for some in found for i in (some if isinstance(some, list) else [some])]
      return tuple(dict.fromkeys(i for i in found if i is not None))

    first = lambda kind: next(iter(ids(kind)), None)
    return cls(
      tokenizer,
      bos_id=first("bos"),
      pad_id=first("pad"),
      eos_ids=ids("eos"),
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

  def buffered(self) -> str:
    """Returns what `flush` would, and keeps it."""
    before = self._decode(self._context)
    return self._decode(self._context + self._buffer)[len(before) :]

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
  """Checks that the tokenizer can be the model's.

  Added tokens without an embedding are allowed (`batching.check_tokens` refuses prompts that
  contain them), as is an embedding without a token: V is often padded.

  Raises:
    ValueError: a token that is not an added one has an id outside the model's vocabulary.
  """
  if tokenizer.base_vocab_size > config.vocab_size:
    raise ValueError(
      f"the tokenizer has ids up to {tokenizer.base_vocab_size - 1}, but the model's vocabulary "
      f"has {config.vocab_size} tokens: use the tokenizer of this model"
    )


def stop_tokens(
  tokenizer: Tokenizer, config: ModelConfig, more: Sequence[int] = ()
) -> tuple[int, ...]:
  """Returns the end-of-sequence tokens of the tokenizer and the config, and `more`."""
  return tuple(dict.fromkeys((*tokenizer.eos_ids, *config.eos_token_ids, *more)))


def missing_tokenizer(folder: pathlib.Path) -> str:
  """Returns what to do about a folder without tokenizer.json: "has only tokenizer.model: ..."."""
  for name in _UNREAD:
    if (folder / name).is_file():
      return (
        f"has {name} but no tokenizer.json, the only format that is read: download tokenizer.json "
        "from the model's hub page, or write it with "
        "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
      )
  return "has no tokenizer.json"


def read_json(path: pathlib.Path, kinds: dict[str, Any] | None = None) -> dict[str, Any]:
  """Returns the JSON object in a file, or {} if the file does not exist.

  Args:
    path: the file.
    kinds: types of its keys; they may be missing.

  Raises:
    ValueError: the file does not contain a JSON object of these types.
  """
  values = typed.read(path) if path.is_file() else {}
  typed.check_keys(str(path), values, kinds or {}, required=False, others=True)
  return values


def _special_ids(path: pathlib.Path) -> dict[str, Any]:
  """Returns a config with special token ids, each an integer, a list of them, or null."""
  values = read_json(path, {f"{kind}_token_id": int | list[int] | None for kind in _KINDS})
  for name in (f"{kind}_token_id" for kind in _KINDS):
    ids = values.get(name)
    if any(not 0 <= i < 2**31 for i in (ids if isinstance(ids, list) else [ids or 0])):
      raise ValueError(f"{name} of {path} must be a token id, got {ids}"[:300])
  return values


def _model_ids(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the special ids of the model's config, under Hugging Face names."""
  if not (folder / CONFIG_FILE).is_file():
    return _special_ids(folder / "config.json")
  config = ModelConfig.from_json((folder / CONFIG_FILE).read_text("utf-8"))
  return {
    "bos_token_id": config.bos_token_id,
    "pad_token_id": config.pad_token_id,
    "eos_token_id": list(config.eos_token_ids),
  }


def _add_tokens(tokenizer: tokenizers.Tokenizer, folder: pathlib.Path) -> dict[str, str]:
  """Adds the tokens that only the tokenizer's other files have, in the order of transformers.

  Returns:
    The special tokens with a name, as text: {"eos_token": "</s>"}.

  Raises:
    ValueError: a file is malformed.
  """
  path = folder / "tokenizer_config.json"
  settings = read_json(path, _SETTINGS)
  listed = settings.get("added_tokens_decoder")
  if listed is None:  # older files, which the newer one replaces
    path = folder / "special_tokens_map.json"
    settings |= read_json(path, _SETTINGS)
    path = folder / "added_tokens.json"
  try:
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    values = settings | extra if isinstance(extra, dict) else settings
    named = {
      name: _token(value)
      for name, value in values.items()
      if value
      and (name in extra or name.endswith("_token"))
      and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))
    }
    special = [*named.values(), *([] if isinstance(extra, dict) else map(_token, extra))]
    texts = {token.content for token in special}
    if listed is None:
      added = {
        i: tokenizers.AddedToken(text, normalized=text not in texts, special=text in texts)
        for text, i in _added_ids(path).items()
      } | tokenizer.get_added_tokens_decoder()
    else:
      path = folder / "tokenizer_config.json"
      added = {int(i): _token(value, special=False) for i, value in listed.items()}
    tokens = [added[i] for i in sorted(added)]
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} has malformed special or added tokens: {error}") from error
  known = {t.content for t in (*tokenizer.get_added_tokens_decoder().values(), *tokens)}
  for token in tokens:
    token.special = token.special or token.content in {t.content for t in named.values()}
  tokens += {t.content: t for t in special if t.content not in known}.values()
  tokenizer.add_tokens(tokens)
  tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens"))
  return {name: token.content for name, token in named.items()}


def _added_ids(path: pathlib.Path) -> dict[str, int]:
  values = read_json(path)
  typed.check(str(path), values, dict[str, int])
  return values


def _token(value: str | dict[str, Any], special: bool = True) -> tokenizers.AddedToken:
  """Returns a token that a file names by its text or describes; `special` by default."""
  value = {"content": value} if isinstance(value, str) else value
  known: dict[str, Any] = {k: v for k, v in value.items() if k != "__type"}
  known.setdefault("special", special)
  return tokenizers.AddedToken(**known)
