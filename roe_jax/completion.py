"""What generation returns."""

import dataclasses
from typing import Any


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
    return (
      f"{self.tokens} tokens in {self.seconds:.1f} s ({self.tokens_per_second:.1f} "
      f"tokens/s) and {self.steps} steps, {100 * self.occupancy:.0f} % of the slots running"
    )


@dataclasses.dataclass(frozen=True)
class Generation:
  """Completions in the order of the prompts, the settings that made them, and the throughput."""

  completions: list[Completion]
  settings: dict[str, Any]
  throughput: Throughput
