"""Stop tokens and stop strings."""

import bisect
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import inspect
import os
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import batching
from roe_jax.completion import Completion
from roe_jax.config import ModelConfig

Decode = Callable[[list[int]], str]


class StopReader(Protocol):
  """Reads one sequence token by token for the text in which stop strings are searched."""

  def push(self, token_id: int) -> None: ...

  def stop_text(self) -> str:
    """Returns the text so far; later tokens only extend it, except a character's first bytes."""
    ...


class _DecodedReader:
  """Searches all generated text."""

  def __init__(self, decode: Decode):
    self._decode, self._tokens = decode, []

  def push(self, token_id: int) -> None:
    self._tokens.append(token_id)

  def stop_text(self) -> str:
    return self._decode(self._tokens)


def check_strings(strings: Sequence[str]) -> None:
  """Raises a ValueError if a stop string is empty."""
  if any(not s for s in strings):
    raise ValueError("a stop string is empty, which would end every sequence at once: remove it")


def find(text: str, strings: Sequence[str]) -> int | None:
  """Returns where the first of the strings begins in the text, or None."""
  return min((i for i in map(text.find, strings) if i >= 0), default=None)


def cut(
  tokens: Sequence[int],
  strings: Sequence[str],
  make_reader: Callable[[], StopReader],
  shown: Decode,
) -> str:
  """Returns `shown(tokens)` up to where the first of the strings begins.

  Args:
    tokens: up to the one that completes a string.
    strings: the stop strings.
    make_reader: makes a reader of the text in which they are searched.
    shown: converts tokens to text, in which parts of the searched text may be absent.
  """
  before = stop_text(make_reader, tokens)
  before = before[: find(before, strings)]
  # The tokens that are kept whole, and then what precedes the string in the next ones.
  for kept in range(len(tokens), -1, -1):
    text = stop_text(make_reader, tokens[:kept])
    if before.startswith(text):
      candidate = shown(list(tokens[:kept])) + before[len(text) :]
      return os.path.commonprefix([candidate, shown(list(tokens))])  # noqa: RUF071 - of characters
  return ""


def stop_text(make_reader: Callable[[], StopReader], tokens: Sequence[int]) -> str:
  """Returns the text of all tokens in which stop strings are searched."""
  reader = make_reader()
  for token in tokens:
    reader.push(token)
  return reader.stop_text()


@dataclasses.dataclass(frozen=True)
class Stops:
  """What ends a sequence before its limit; construct with `Stops.create`.

  Attributes:
    tokens: tokens that end a sequence.
    strings: strings that end it.
    decode: converts token ids to text; None without strings to look for.
    make_reader: `make_reader(index)` makes the reader of the completion of a prompt.
  """

  tokens: tuple[int, ...]
  strings: tuple[str, ...]
  decode: Decode | None
  make_reader: Callable[[int], StopReader]

  @classmethod
  def create(
    cls,
    config: ModelConfig,
    tokens: Sequence[int] | None,
    strings: Sequence[str],
    decode: Decode | None,
    make_reader: Callable[[int], StopReader] | None = None,
  ) -> "Stops":
    """Creates the stops; `tokens` default to `config.eos_token_ids`.

    Without `make_reader`, strings are searched in what `decode` returns, with special tokens if
    it has a parameter `skip_special_tokens`.

    Raises:
      ValueError: a string is empty, or there are strings but no `decode`.
    """
    if strings and decode is None:
      raise ValueError("stop_strings need a decode function from token ids to text")
    check_strings(strings)
    if make_reader is None and decode is not None:
      visible = decode
      if "skip_special_tokens" in inspect.signature(decode).parameters:
        keywords: dict[str, Any] = {"skip_special_tokens": False}
        visible = functools.partial(decode, **keywords)
      make_reader = lambda index: _DecodedReader(visible)
    tokens = tuple(config.eos_token_ids if tokens is None else tokens)
    return cls(tokens, tuple(strings), decode, make_reader or (lambda index: _DecodedReader(str)))

  def token_array(self) -> jax.Array:
    """Returns the stop tokens as int32 `[X]`, padded with -1 to one of few lengths."""
    width = batching.bucket(len(self.tokens), 4)
    return jnp.asarray(self.tokens + (-1,) * (width - len(self.tokens)), jnp.int32)

  def without_stop_token(self, generated: list[int]) -> list[int]:
    """Returns generated tokens without a final stop token."""
    return generated[:-1] if generated and generated[-1] in self.tokens else generated


class OpenSequence:
  """A sequence being generated: looks for stop strings and cuts at the first.

  Attributes:
    index: index of its prompt.
    start: length of its prompt, in tokens.
  """

  def __init__(self, index: int, start: int, stops: Stops):
    self.index = index
    self.start = start
    self._stops = stops
    self._make_reader = functools.partial(stops.make_reader, index)
    self._reader = self._make_reader()
    self._seen = 0
    self._count = None  # number of tokens that complete a stop string

  def hits_stop_string(self, tokens_S: np.ndarray, length: int) -> bool:
    """Returns whether the first `length` tokens contain a stop string."""
    if self._count is not None:
      return True
    generated = self._stops.without_stop_token(tokens_S[self.start : length].tolist())
    for token in generated[self._seen :]:
      self._reader.push(token)
    if self._found(self._reader.stop_text()):
      # It may have been completed anywhere since the last call: find its last token.
      self._count = bisect.bisect_left(
        range(len(generated)),
        True,
        lo=self._seen + 1,
        key=lambda n: self._found(stop_text(self._make_reader, generated[:n])),
      )
    self._seen = len(generated)
    return self._count is not None

  def _found(self, text):
    return find(text, self._stops.strings) is not None

  def completion(
    self,
    tokens_S: np.ndarray,
    of_tokens: Mapping[str, np.ndarray],
    length: int,
    done: bool,
    context_length: int,
  ) -> Completion:
    """Returns the completion so far; `finish_reason` is "" until it is done.

    Args:
      tokens_S: int32.
      of_tokens: what `Completion` has of each token, `[S]`.
      length: number of tokens, including the prompt's.
      done: whether it ends there, if not before at a stop string.
      context_length: the model's.
    """
    count = self._count
    if count is not None and length < self.start + count:
      count = None
    end = length if count is None else self.start + count
    generated = tokens_S[self.start : end].tolist()
    decode, text = self._stops.decode, None
    if decode is not None:
      text = decode(self._stops.without_stop_token(generated))
    if count is not None:
      reason = "stop_string"
      text = decode and cut(generated, self._stops.strings, self._make_reader, decode)
    elif not done:
      reason = ""
    elif generated[-1] in self._stops.tokens:
      reason = "stop_token"
    else:
      reason = "context" if end >= context_length else "length"
    return Completion(
      generated,
      finish_reason=reason,
      text=text,
      **{name: values[self.start : end].tolist() for name, values in of_tokens.items()},
    )
