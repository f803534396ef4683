"""The cost of answers, counted alike by all programs."""

from __future__ import annotations

import dataclasses

MEASURED_BY = "engine"  # marks costs with these definitions in a run


@dataclasses.dataclass(frozen=True)
class Cost:
  """The cost of answers; costs of several are added, and the largest `peak_bytes` counts.

  Attributes:
    tokens: tokens of the answers: generated, or scored. Those of samples that were not selected do
      not count.
    forward_passes: tokens x members that went through the network, those of prompts included.
    flops: forward FLOPs, see `roe_jax.costs`.
    seconds: wall time without compilation.
    peak_bytes: estimated weights, cache and activations of one device.
    unique_experts_read: unique active experts of all members at a position that predicts a token
      of an answer, mean over layers, summed over `steps`.
    experts_used: experts of one member there, mean over members and layers, summed over `steps`.
    steps: positions at which unique experts were counted; 0 if they were not.
  """

  tokens: int = 0
  forward_passes: int = 0
  flops: float = 0
  seconds: float = 0.0
  peak_bytes: int = 0
  unique_experts_read: float = 0.0
  experts_used: float = 0.0
  steps: int = 0

  def __add__(self, other: Cost) -> Cost:
    mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
    return Cost(
      **{n: max(v, theirs[n]) if n == "peak_bytes" else v + theirs[n] for n, v in mine.items()}
    )

  def to_json(self) -> dict[str, float]:
    """Returns the fields that are not zero."""
    return {name: value for name, value in dataclasses.asdict(self).items() if value}

  def line(self) -> dict[str, float | str]:
    """Returns a part of a line of a run's costs."""
    return {"measured_by": MEASURED_BY, **self.to_json()}
