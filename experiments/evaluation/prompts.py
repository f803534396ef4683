"""How a task's examples are put to a model, and what its texts answer.

As plain prompts, or as messages in the format of an instruct model, where the answer
is read apart from what was reasoned before it.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from experiments.tasks import Example
from roe_jax.completion import Completion
from roe_jax.config import ModelConfig
from roe_jax.text import tokenizer as tokenizer_lib
from roe_jax.text.chat import Chat, Prompt
from roe_jax.text.tokenizer import Tokenizer


class PromptBuilder:
  """A model's way of being asked.

  Attributes:
    tokenizer: its tokenizer.
    stop_tokens: what ends an answer.
  """

  def __init__(
    self,
    config: ModelConfig,
    tokenizer: Tokenizer,
    chat: Chat | None = None,
    system: str | None = None,
  ):
    """Plain prompts without a chat.

    Args:
      config: the model's architecture.
      tokenizer: its tokenizer.
      chat: the format; examples must then have `messages`.
      system: a system message before them.
    """
    self.tokenizer = tokenizer
    self._config, self._chat, self._system = config, chat, system
    self.stop_tokens: Sequence[int] = (chat and chat.stop_tokens) or tokenizer_lib.stop_tokens(
      tokenizer, config
    )
    self._prompts: dict[str, Prompt] = {}

  @property
  def settings(self) -> dict[str, Any]:
    """What prompts depend on besides their examples: "chat", None for plain ones, and "system"."""
    return {"chat": self._chat.settings if self._chat else None, "system": self._system}

  @staticmethod
  def limited(examples: Sequence[Example], max_new_tokens: int | None) -> list[Example]:
    """Examples with another limit of what is written; None leaves theirs."""
    return [
      dataclasses.replace(e, max_new_tokens=max_new_tokens)
      if max_new_tokens and e.kind == "generate"
      else e
      for e in examples
    ]

  def prompt(self, example: Example) -> list[int]:
    """Token ids of the question, up to where the answer begins."""
    if self._chat is None:
      return self.tokenizer.encode(example.prompt)
    return self._rendered(example).tokens

  def with_text(self, example: Example, text: str) -> tuple[list[int], int]:
    """Token ids of the question and a text behind it, and the index of the text's first one."""
    prompt = self.prompt(example)
    return prompt + self.tokenizer.encode(text, add_special_tokens=False), len(prompt)

  def with_reference(self, example: Example) -> tuple[list[int], int]:
    """As `with_text`, of the reference, and the end of text behind it.

    A text that is only to be read has no end, and how the answer of a chat ends is its
    template's matter: that is not scored.
    """
    tokens, start = self.with_text(example, example.reference)
    ends = self._chat is None and example.kind != "read"
    return tokens + list(self._config.eos_token_ids[:1] if ends else ()), start

  def answer(self, example: Example, completion: Completion) -> str:
    """What a completion of the question answers; of a chat "" if the limit came first."""
    if self._chat is None:
      return completion.text
    return self._chat.answer(self._rendered(example), completion, example.stop).final or ""

  def _rendered(self, example):
    if example.id not in self._prompts:
      system = [{"role": "system", "content": self._system}] if self._system else []
      self._prompts[example.id] = self._chat.prompt([*system, *example.messages])
    return self._prompts[example.id]
