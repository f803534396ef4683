"""Where sequences end: stop tokens and stop strings."""

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
  """What ends a text before its limit; made by `Stops.create`.

  Attributes:
    tokens: tokens that end a text.
    strings: strings that end it.
    decode: from token ids to text, or None.
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
    """The stops of a model, whose end-of-text tokens are the default.

    Raises:
      ValueError: a string is empty, or there are strings and no `decode`.
    """
    if strings and decode is None:
      raise ValueError("stop_strings need a decode function, to see them in the text")
    if any(not s for s in strings):
      raise ValueError("a stop string is empty: it would end every text at once")
    return cls(tuple(config.eos_token_ids if tokens is None else tokens), tuple(strings), decode)

  def token_array(self) -> jax.Array:
    """The stop tokens as int32 `[X]`, padded with -1 to one of few lengths."""
    width = batching.bucket(len(self.tokens), 4)
    return jnp.asarray(self.tokens + (-1,) * (width - len(self.tokens)), jnp.int32)

  def text(self, generated: list[int]) -> str:
    """Generated tokens as text, without a final stop token."""
    ends = bool(generated) and generated[-1] in self.tokens
    return self.decode(generated[:-1] if ends else generated)

  def find(self, text: str) -> int | None:
    """Where the first stop string begins."""
    return min((i for i in map(text.find, self.strings) if i >= 0), default=None)


class OpenSequence:
  """One text while it grows: looks for stop strings, and is cut at the first.

  Attributes:
    index: of its prompt.
    start: the prompt's tokens.
  """

  def __init__(self, index: int, start: int, stops: Stops):
    self.index = index
    self.start = start
    self._stops = stops
    self._seen = 0
    self._count = None  # number of tokens that complete a stop string

  def hits_stop_string(self, tokens_S: np.ndarray, length: int) -> bool:
    """Whether a stop string is complete within the first `length` tokens."""
    generated = tokens_S[self.start : length].tolist()
    if self._count is None and self._found(generated):
      # It may be complete anywhere since the last look: find its last token.
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
    """The completion as it stands; without a reason if it is not done."""
    end = length if self._count is None else self.start + self._count
    generated = tokens_S[self.start : end].tolist()
    text = None if self._stops.decode is None else self._stops.text(generated)
    if self._count is not None:
      reason, text = "stop_string", text[: self._stops.find(text)]
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
