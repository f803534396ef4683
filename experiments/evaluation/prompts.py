"""Turns task examples into prompts, and completions into answers.

Prompts are raw text or, for instruct models, chats, whose answers exclude the reasoning.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from experiments.tasks import Example
from roe_jax.completion import Completion
from roe_jax.config import ModelConfig
from roe_jax.text import tokenizer as tokenizer_lib
from roe_jax.text.answer import AnswerReader
from roe_jax.text.chat import Chat, Prompt
from roe_jax.text.tokenizer import Tokenizer


class PromptBuilder:
  """Builds a model's prompts and reads its answers.

  Attributes:
    tokenizer: the model's tokenizer.
    stop_tokens: tokens that end an answer.
  """

  def __init__(
    self,
    config: ModelConfig,
    tokenizer: Tokenizer,
    chat: Chat | None = None,
    system: str | None = None,
  ):
    """Builds raw prompts, or chats if a format is given.

    Args:
      config: the model's config.
      tokenizer: its tokenizer.
      chat: the chat format; examples must then have `messages`.
      system: system message at the start of each chat.
    """
    self.tokenizer = tokenizer
    self._chat, self._system = chat, system
    self.stop_tokens = tokenizer_lib.stop_tokens(
      tokenizer, config, chat.stop_tokens if chat else ()
    )
    self._prompts: dict[str, Prompt] = {}

  @property
  def settings(self) -> dict[str, Any]:
    """What prompts depend on besides the examples: "chat" (None for raw prompts) and "system"."""
    return {"chat": self._chat.settings if self._chat else None, "system": self._system}

  @staticmethod
  def limited(examples: Sequence[Example], max_new_tokens: int | None) -> list[Example]:
    """Returns examples with `max_new_tokens`; None leaves them as they are."""
    return [
      dataclasses.replace(e, max_new_tokens=max_new_tokens)
      if max_new_tokens and e.kind == "generate"
      else e
      for e in examples
    ]

  def prompt(self, example: Example) -> list[int]:
    """Returns the token ids of the prompt, up to where the answer starts."""
    if self._chat is None:
      return self.tokenizer.encode(example.prompt)
    return self._rendered(example).tokens

  def with_text(self, example: Example, text: str) -> tuple[list[int], int]:
    """Returns the token ids of the prompt and `text`, and the index of the first one of `text`."""
    prompt = self.prompt(example)
    return prompt + self.tokenizer.encode(text, add_special_tokens=False), len(prompt)

  def with_reference(self, example: Example) -> tuple[list[int], int]:
    """Returns `with_text` of the reference, and an end-of-text token.

    There is no such token for examples of kind "read", which have no end, or for chats, where the
    template decides how an answer ends.
    """
    tokens, start = self.with_text(example, example.reference)
    ends = self._chat is None and example.kind != "read"
    return tokens + list(self.stop_tokens[:1] if ends else ()), start

  def stop_reader(self, examples: Sequence[Example]) -> Callable[[int], AnswerReader] | None:
    """Returns the `stop_reader` of `decode.generate` for the prompts of examples."""
    return self._chat and self._chat.stop_reader([self._rendered(e) for e in examples])

  def answer(self, example: Example, completion: Completion) -> str:
    """Returns the answer in a completion; "" if a chat reached its limit before the answer."""
    if self._chat is None:
      return completion.text
    return self._chat.answer(self._rendered(example), completion, example.stop).final or ""

  def _rendered(self, example):
    if example.id not in self._prompts:
      system = [{"role": "system", "content": self._system}] if self._system else []
      self._prompts[example.id] = self._chat.prompt([*system, *example.messages])
    return self._prompts[example.id]
