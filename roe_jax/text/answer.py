"""Separates a chat model's answer from its reasoning.

Formats are recognized by their markers, which are single tokens: text that merely spells
out a marker is text.
"""

from collections.abc import Sequence
import dataclasses
import re

from roe_jax import stopping
from roe_jax.completion import Completion
from roe_jax.text.tokenizer import StreamDecoder, Tokenizer

HARMONY_MARKS = ("<|channel|>", "<|message|>")
HARMONY_ENDS = ("<|return|>", "<|call|>")  # of a turn; <|end|> ends one message
THINK_MARKS = ("<think>", "</think>")
# A harmony message's header in front of its channel: a role (unless the prompt has it), and a
# recipient. While text can still become one, it is not an answer.
_HEADER = re.compile(r"(assistant|[\w.-]*)\s*(t|to|to=\S*\s*)?")
_NO_HEADER = re.compile("")  # of a message that has begun
_RECIPIENT = re.compile(r"\s*(t|to|to=\S*\s*)?")


@dataclasses.dataclass(frozen=True)
class Answer:
  """A model's answer.

  Attributes:
    final: the answer; None if the model did not reach it.
    reasoning: text before it, possibly "": thoughts, and in the harmony format all
      channels other than the final one.
  """

  final: str | None
  reasoning: str


@dataclasses.dataclass
class _Part:
  is_final: bool
  decoder: StreamDecoder
  text: str = ""
  began_final: bool = False
  header: re.Pattern | None = None  # of a message without a channel, which its text may be


class AnswerReader:
  """Reads a response token by token; in this format all of it is the answer."""

  def __init__(
    self, tokenizer: Tokenizer, opening: Sequence[int] = (), skip_special_tokens: bool = True
  ):
    """Starts reading a response, the start of which (`opening`) is in the prompt."""
    self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
    self._parts: list[_Part] = []
    self._current: _Part | None = None
    self._begin()
    for token in opening:
      self.push(token)
    current = self._current
    self._parts, self._current = [], None
    if current:
      self._open(current.is_final, current.header and _RECIPIENT)

  def push(self, token_id: int) -> None:
    token_id = int(token_id)
    part = self._current
    if not self._take_mark(token_id):
      part = self._current
    elif self._skip_special_tokens or not self._tokenizer.is_special(token_id):
      return
    if part:
      part.text += part.decoder.push(token_id)

  def flush(self) -> None:
    """Adds buffered text; call this after the last token."""
    if self._current:
      self._current.text += self._current.decoder.flush()

  def answer(self) -> Answer:
    """Returns the answer so far."""
    final = [self._text(p) for p in self._parts if p.is_final]
    reasoning = [self._text(p).strip("\n") for p in self._parts if not p.is_final]
    return Answer("\n".join(final) if final else None, "\n".join(filter(None, reasoning)))

  def stop_text(self) -> str:
    """Returns all text that was the answer when it was generated; see `stopping.StopReader`."""
    current = self._current
    texts = [
      self._text(p, p.decoder.buffered() if p is current else "")
      for p in self._parts
      if p.began_final
    ]
    return "\0".join(texts)  # which no stop string contains

  def _text(self, part: _Part, more: str = "") -> str:
    return part.text + more

  def _begin(self):
    self._open(is_final=True)

  def _take_mark(self, token_id: int) -> bool:
    """Opens or closes parts if the token is a marker; returns whether it is."""
    return False

  def _open(self, is_final: bool, header: re.Pattern | None = None):
    self.flush()
    decoder = StreamDecoder(self._tokenizer, self._skip_special_tokens)
    self._current = _Part(is_final, decoder, "", is_final or header is not None, header)
    self._parts.append(self._current)

  def _close(self):
    self.flush()
    self._current = None


class ThinkingReader(AnswerReader):
  """Takes the text after the last </think> as the answer, or all if there are no thoughts."""

  def _take_mark(self, token_id):
    begin, end = map(self._tokenizer.added_id, THINK_MARKS)
    if token_id not in (begin, end):
      return False
    # A </think> without <think> ends thoughts too: some templates open them in the prompt.
    for part in self._parts:
      part.is_final = False
    self._open(is_final=token_id == end)
    return True

  def _text(self, part, more=""):
    return super()._text(part, more).lstrip("\n")


class HarmonyReader(AnswerReader):
  """Takes the final channel as the answer, or without one the text outside any channel.

  Messages are <|start|>role<|channel|>name<|message|>text, ended by <|end|> or a token
  that ends the turn.
  """

  def _begin(self):
    self._channel: list[int] | None = None  # tokens of the channel name being read
    self._name = ""

  def _take_mark(self, token_id):
    if not self._tokenizer.is_special(token_id):
      if self._channel is not None:
        self._channel.append(token_id)
        return True
      if self._current is None:
        self._open(is_final=False, header=_RECIPIENT)
      return False
    mark = self._tokenizer.token(token_id)
    if self._channel is not None:
      # "commentary to=functions.f <|constrain|>json": more may follow the name.
      name = (self._tokenizer.decode(self._channel).split() or [""])[0]
      self._name, self._channel = self._name or name, [] if mark == "<|constrain|>" else None
    if mark == "<|message|>":
      ours = not self._role() or self._role() == "assistant"
      self._close_header()
      self._open(self._name == "final", _NO_HEADER if ours and not self._name else None)
      self._name = ""
    elif mark == "<|channel|>":
      self._close_header()
      self._channel = []
    elif mark == "<|start|>":
      self._close()
      self._open(is_final=False, header=_HEADER)
      self._name = ""
    elif mark in ("<|end|>", *HARMONY_ENDS):
      self._close()
      self._name = ""
    return True

  def _role(self):
    if self._current is None or self._current.header is not _HEADER:
      return ""
    return self._current.text.split(" ")[0]

  def _close_header(self):
    """Closes the current part, and drops it if it is a header."""
    part = self._current
    self._close()
    if part and part.header and not self._text(part):
      self._parts.remove(part)

  def _text(self, part, more=""):
    text = super()._text(part, more)
    if part.header is None or part.header is _NO_HEADER:
      return text
    if part.header.fullmatch(text):
      return ""
    return text.removeprefix("assistant") if part.header is _HEADER else text

  def answer(self):
    answer = super().answer()
    loose = [text for p in self._parts if p.header and (text := self._text(p))]
    if answer.final is not None or not loose:
      return answer
    rest = [self._text(p).strip("\n") for p in self._parts if not p.header]
    return Answer("\n".join(loose), "\n".join(filter(None, rest)))


def is_harmony(tokenizer: Tokenizer) -> bool:
  """Returns whether the model writes answers in harmony channels, as GPT-OSS does."""
  return all(
    i is not None and tokenizer.is_special(i) for i in map(tokenizer.added_id, HARMONY_MARKS)
  )


def reader(
  tokenizer: Tokenizer, opening: Sequence[int] = (), skip_special_tokens: bool = True
) -> AnswerReader:
  """Returns a reader for the model's format.

  Args:
    tokenizer: the model's tokenizer; its special tokens identify the format.
    opening: prompt tokens that belong to the model's turn: a template may open a channel
      or thoughts, and a prompt may contain the start of the answer.
    skip_special_tokens: whether to leave special tokens out of the text; stop strings see them.
  """
  if is_harmony(tokenizer):
    return HarmonyReader(tokenizer, opening, skip_special_tokens)
  if all(tokenizer.added_id(mark) is not None for mark in THINK_MARKS):
    return ThinkingReader(tokenizer, opening, skip_special_tokens)
  return AnswerReader(tokenizer, opening, skip_special_tokens)


def read(
  tokenizer: Tokenizer,
  completion: Completion,
  *,
  opening: Sequence[int] = (),
  stop_strings: Sequence[str] = (),
) -> Answer:
  """Returns the answer in a completion, without the stop token.

  Like `Completion.text`, it is cut at the stop string that ended the completion, if any.
  """
  ended = completion.finish_reason == "stop_token"
  tokens = completion.tokens[:-1] if ended else completion.tokens

  def answer_of(tokens):
    found = reader(tokenizer, opening)
    for token in tokens:
      found.push(token)
    found.flush()
    return found.answer()

  answer = answer_of(tokens)
  if completion.finish_reason != "stop_string" or answer.final is None:
    return answer
  final = stopping.cut(
    tokens,
    stop_strings,
    lambda: reader(tokenizer, opening, skip_special_tokens=False),
    lambda tokens: answer_of(tokens).final or "",
  )
  return dataclasses.replace(answer, final=final)
