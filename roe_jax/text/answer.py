"""Separates a chat model's answer from its reasoning.

Formats are recognized by their markers, which are single tokens: text that merely spells
out a marker is text.
"""

from collections.abc import Sequence
import dataclasses

from roe_jax.completion import Completion
from roe_jax.text.tokenizer import StreamDecoder, Tokenizer

HARMONY_MARKS = ("<|channel|>", "<|message|>")
HARMONY_ENDS = ("<|return|>", "<|call|>")  # of a turn; <|end|> ends one message
THINK_MARKS = ("<think>", "</think>")


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


class AnswerReader:
  """Reads a response token by token; in this format all of it is the answer."""

  def __init__(self, tokenizer: Tokenizer, opening: Sequence[int] = ()):
    """Starts reading a response, the start of which (`opening`) is in the prompt."""
    self._tokenizer = tokenizer
    self._parts: list[_Part] = []
    self._current: _Part | None = None
    self._begin()
    for token in opening:
      self.push(token)
    current = self._current
    self._parts, self._current = [], None
    if current:
      self._open(current.is_final)

  def push(self, token_id: int) -> None:
    token_id = int(token_id)
    if not self._take_mark(token_id) and self._current:
      self._current.text += self._current.decoder.push(token_id)

  def flush(self) -> None:
    """Adds buffered text; call this after the last token."""
    if self._current:
      self._current.text += self._current.decoder.flush()

  def answer(self) -> Answer:
    """Returns the answer so far."""
    final = [p.text for p in self._parts if p.is_final]
    reasoning = [p.text.strip("\n") for p in self._parts if not p.is_final]
    return Answer("\n".join(final) if final else None, "\n".join(filter(None, reasoning)))

  def _begin(self):
    self._open(is_final=True)

  def _take_mark(self, token_id: int) -> bool:
    """Opens or closes parts if the token is a marker; returns whether it is."""
    return False

  def _open(self, is_final: bool):
    self.flush()
    self._current = _Part(is_final, StreamDecoder(self._tokenizer))
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

  def answer(self):
    answer = super().answer()
    return dataclasses.replace(answer, final=answer.final and answer.final.lstrip("\n"))


class HarmonyReader(AnswerReader):
  """Takes the final channel as the answer.

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
      return False
    mark = self._tokenizer.token(token_id)
    if self._channel is not None:
      # "commentary to=functions.f": a recipient may follow the name.
      self._name = (self._tokenizer.decode(self._channel).split() or [""])[0]
      self._channel = None
    if mark == "<|message|>":
      self._open(is_final=self._name == "final")
      self._name = ""
    elif mark == "<|channel|>":
      self._close()
      self._channel = []
    elif mark in ("<|start|>", "<|end|>", *HARMONY_ENDS):
      self._close()
      self._name = ""
    return True


def is_harmony(tokenizer: Tokenizer) -> bool:
  """Returns whether the model writes answers in harmony channels, as GPT-OSS does."""
  return all(
    i is not None and tokenizer.is_special(i) for i in map(tokenizer.added_id, HARMONY_MARKS)
  )


def reader(tokenizer: Tokenizer, opening: Sequence[int] = ()) -> AnswerReader:
  """Returns a reader for the model's format.

  Args:
    tokenizer: the model's tokenizer; its special tokens identify the format.
    opening: prompt tokens that belong to the model's turn: a template may open a channel
      or thoughts, and a prompt may contain the start of the answer.
  """
  if is_harmony(tokenizer):
    return HarmonyReader(tokenizer, opening)
  if all(tokenizer.added_id(mark) is not None for mark in THINK_MARKS):
    return ThinkingReader(tokenizer, opening)
  return AnswerReader(tokenizer, opening)


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
  found = reader(tokenizer, opening)
  ended = completion.finish_reason == "stop_token"
  for token in completion.tokens[:-1] if ended else completion.tokens:
    found.push(token)
  found.flush()
  answer = found.answer()
  if completion.finish_reason != "stop_string":
    return answer
  if answer.final is None:
    return dataclasses.replace(answer, reasoning=_cut(answer.reasoning, stop_strings))
  return dataclasses.replace(answer, final=_cut(answer.final, stop_strings))


def _cut(text, strings):
  return text[: min((i for i in map(text.find, strings) if i >= 0), default=len(text))]
