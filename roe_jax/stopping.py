"""Stop tokens and stop strings."""

from collections.abc import Callable, Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import batching
from roe_jax.completion import Completion
from roe_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Stops:
  """What ends a sequence before its limit; construct with `Stops.create`.

  Attributes:
    tokens: tokens that end a sequence.
    strings: strings that end it.
    decode: converts token ids to text; None without strings to look for.
  """

  tokens: tuple[int, ...]
  strings: tuple[str, ...]
  decode: Callable[[list[int]], str] | None

  @classmethod
  def create(
    cls,
    config: ModelConfig,
    tokens: Sequence[int] | None,
    strings: Sequence[str],
    decode: Callable[[list[int]], str] | None,
  ) -> "Stops":
    """Creates the stops; `tokens` default to `config.eos_token_ids`.

    Raises:
      ValueError: a string is empty, or there are strings but no `decode`.
    """
    if strings and decode is None:
      raise ValueError("stop_strings need a decode function from token ids to text")
    if any(not s for s in strings):
      raise ValueError("a stop string is empty, which would end every sequence at once: remove it")
    return cls(tuple(config.eos_token_ids if tokens is None else tokens), tuple(strings), decode)

  def token_array(self) -> jax.Array:
    """Returns the stop tokens as int32 `[X]`, padded with -1 to one of few lengths."""
    width = batching.bucket(len(self.tokens), 4)
    return jnp.asarray(self.tokens + (-1,) * (width - len(self.tokens)), jnp.int32)

  def text(self, generated: list[int]) -> str:
    """Decodes generated tokens, without a final stop token."""
    assert self.decode is not None
    ends = bool(generated) and generated[-1] in self.tokens
    return self.decode(generated[:-1] if ends else generated)

  def find(self, text: str) -> int | None:
    """Returns where the first stop string begins, or None."""
    return min((i for i in map(text.find, self.strings) if i >= 0), default=None)


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
    self._seen = 0
    self._count = None  # number of tokens that complete a stop string

  def hits_stop_string(self, tokens_S: np.ndarray, length: int) -> bool:
    """Returns whether the first `length` tokens contain a stop string."""
    generated = tokens_S[self.start : length].tolist()
    if self._count is None and self._found(generated):
      # It may have been completed anywhere since the last call: find its last token.
      self._count = next(
        n for n in range(self._seen + 1, len(generated) + 1) if self._found(generated[:n])
      )
    self._seen = len(generated)
    return self._count is not None

  def _found(self, generated):
    return self._stops.find(self._stops.text(generated)) is not None

  def completion(
    self,
    tokens_S: np.ndarray,
    log_probs_S: np.ndarray,
    clean_tokens_S: np.ndarray,
    length: int,
    done: bool,
    context_length: int,
  ) -> Completion:
    """Returns the completion so far; `finish_reason` is "" until it is done."""
    end = length if self._count is None else self.start + self._count
    generated = tokens_S[self.start : end].tolist()
    text = None if self._stops.decode is None else self._stops.text(generated)
    if self._count is not None:
      reason, text = "stop_string", text and text[: self._stops.find(text)]
    elif not done:
      reason = ""
    elif generated[-1] in self._stops.tokens:
      reason = "stop_token"
    else:
      reason = "context" if end >= context_length else "length"
    return Completion(
      generated,
      log_probs_S[self.start : end].tolist(),
      clean_tokens_S[self.start : end].tolist(),
      reason,
      text,
    )
