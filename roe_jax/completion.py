"""What generation returns, and where its texts end."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import batching
from roe_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Completion:
  """What was generated for one prompt.

  Attributes:
    tokens: the generated tokens, a final stop token included; up to the token
      that completed a stop string.
    log_probs: of each token under the aggregated distribution, before any
      sampling temperature, float32.
    clean_tokens: the token that the clean member would have chosen greedily at
      each position (-1 where no clean member is computed).
    finish_reason: "stop_token", "stop_string", "length" (the token limit) or
      "context" (the end of the model's context).
    text: the decoded tokens without stop token, cut before a stop string; None
      if no `decode` function was given.
  """

  tokens: list[int]
  log_probs: list[float]
  clean_tokens: list[int]
  finish_reason: str
  text: str | None = None


@dataclasses.dataclass(frozen=True)
class Throughput:
  """What a call of `decode.generate` did in which time.

  Attributes:
    tokens: generated tokens in its completions.
    steps: decode steps; each makes one token in every running slot.
    occupancy: the share of the slots that were running, mean over the steps.
    seconds: wall time, with prefill and whatever had to be compiled.
  """

  tokens: int
  steps: int
  occupancy: float
  seconds: float

  @property
  def tokens_per_second(self) -> float:
    return self.tokens / self.seconds if self.seconds else 0.0

  def __str__(self) -> str:
    return (f"{self.tokens} tokens in {self.seconds:.1f} s ({self.tokens_per_second:.1f} "
            f"tokens/s) and {self.steps} steps, {100 * self.occupancy:.0f} % of the slots running")


@dataclasses.dataclass(frozen=True)
class Generation:
  """Completions in the order of the prompts, the settings that made them, and the throughput."""

  completions: list[Completion]
  settings: dict[str, Any]
  throughput: Throughput


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
  def create(cls, config: ModelConfig, tokens: Sequence[int] | None, strings: Sequence[str],
             decode: Callable[[list[int]], str] | None) -> "Stops":
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


class OpenText:
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
    generated = tokens_S[self.start:length].tolist()
    if self._count is None and self._found(generated):
      # It may be complete anywhere since the last look: find its last token.
      self._count = next(n for n in range(self._seen + 1, len(generated) + 1)
                         if self._found(generated[:n]))
    self._seen = len(generated)
    return self._count is not None

  def _found(self, generated):
    return self._stops.find(self._stops.text(generated)) is not None

  def completion(self, tokens_S: np.ndarray, log_probs_S: np.ndarray, clean_tokens_S: np.ndarray,
                 length: int, done: bool, context_length: int) -> Completion:
    """The completion as it stands; without a reason if it is not done."""
    end = length if self._count is None else self.start + self._count
    generated = tokens_S[self.start:end].tolist()
    text = None if self._stops.decode is None else self._stops.text(generated)
    if self._count is not None:
      reason, text = "stop_string", text[:self._stops.find(text)]
    elif not done:
      reason = ""
    elif generated[-1] in self._stops.tokens:
      reason = "stop_token"
    else:
      reason = "context" if end >= context_length else "length"
    return Completion(generated, log_probs_S[self.start:end].tolist(),
                      clean_tokens_S[self.start:end].tolist(), reason, text)
