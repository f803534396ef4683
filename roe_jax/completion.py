"""The results of generation."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Completion:
  """The completion of one prompt.

  Attributes:
    tokens: generated tokens, including a final stop token; with a stop string, up
      to the token that completes it.
    log_probs: log-probability of each token under the aggregated distribution,
      before any sampling temperature, float32.
    clean_tokens: the clean member's greedy choice at each position (-1 if no clean
      member is computed).
    finish_reason: "stop_token", "stop_string", "length" (`max_new_tokens` reached) or
      "context" (end of the model's context).
    text: decoded tokens without the stop token, cut before a stop string; None
      without a `decode` function.
    members: how many members were computed at each token's position.
    forward_passes: tokens x members computed after the prompt, those of drafted tokens that were
      not kept included.
  """

  tokens: list[int]
  log_probs: list[float]
  clean_tokens: list[int]
  finish_reason: str
  text: str | None = None
  members: list[int] = dataclasses.field(default_factory=list)
  forward_passes: int = 0


@dataclasses.dataclass(frozen=True)
class Throughput:
  """The throughput of one call of `decode.generate`.

  Attributes:
    tokens: generated tokens in all completions.
    steps: decode steps; each adds one token to every running slot, or several that were drafted.
    occupancy: mean fraction of slots that were running.
    seconds: wall time, including prefill and compilation.
    drafted: tokens drafted in running slots.
  """

  tokens: int
  steps: int
  occupancy: float
  seconds: float
  drafted: int = 0

  @property
  def tokens_per_second(self) -> float:
    return self.tokens / self.seconds if self.seconds else 0.0

  def __str__(self) -> str:
    drafted = f", {self.drafted} tokens drafted" if self.drafted else ""
    return (
      f"{self.tokens} tokens in {self.seconds:.1f} s ({self.tokens_per_second:.1f} "
      f"tokens/s) and {self.steps} steps, {100 * self.occupancy:.0f} % of the slots running"
      f"{drafted}"
    )


@dataclasses.dataclass(frozen=True)
class Generation:
  """Completions in the order of the prompts, the settings used, and the throughput."""

  completions: list[Completion]
  settings: dict[str, Any]
  throughput: Throughput
