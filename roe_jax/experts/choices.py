"""Which expert strategy is chosen, per device kind and format: the crossovers.

`python -m experiments.accelerator` measures the strategies on a device and prints its lines of
`CROSSOVERS`, ready to paste. The lines of GPUs and TPUs below are unmeasured: no strategy has
run on either yet. That of CPUs is measured.
"""

import math
from typing import NamedTuple

from roe_jax import nested, quantization


class Step(NamedTuple):
  """A strategy, and up to where it is the fastest.

  Attributes:
    strategy: one of `experts.STRATEGIES`.
    max_pairs: most pairs (token, active expert) per expert: tokens x active / all experts.
    max_tokens: most tokens.
  """

  strategy: str
  max_pairs: float = math.inf
  max_tokens: float = math.inf

  def holds(self, num_tokens: int, experts_per_token: int, num_experts: int) -> bool:
    pairs = num_tokens * experts_per_token / num_experts
    return pairs <= self.max_pairs and num_tokens <= self.max_tokens


# 180 tokens: up to there `dense` is bound by reading bfloat16 weights, by an H200's data sheet.
_UNMEASURED = (
  Step("gather_gemv", max_pairs=0.5),
  Step("dense", max_tokens=180),
  Step("grouped_matmul"),
)
_UNMEASURED_QUANTIZED = (Step("gather_gemv", max_pairs=0.5), Step("grouped_matmul"))
_ANY_FORMAT = None
_QUANTIZED = ("int8", "int4", "mxfp4", nested.PREFIX)

# By (prefix of JAX's `device_kind`, or platform; format of the experts: their dtype or one of
# `quantization.FORMATS`). Steps are tried in order.
CROSSOVERS: dict[tuple[str, str | None], tuple[Step, ...]] = {
  # With 1024 tokens, the most that were timed (float32, bfloat16), `native` took half as long.
  ("cpu", _ANY_FORMAT): (Step("native", max_tokens=1024), Step("tiled_loop")),
  **{
    (platform, format): _UNMEASURED_QUANTIZED
    for platform in ("gpu", "tpu")
    for format in quantization.FORMATS
  },
  # No other kernel reads planes of bits.
  **{(platform, nested.PREFIX): (Step("tiled_loop"),) for platform in ("gpu", "tpu")},
  ("gpu", _ANY_FORMAT): _UNMEASURED,
  ("tpu", _ANY_FORMAT): _UNMEASURED,
}


def steps(device_kind: str, platform: str, format: str) -> tuple[Step, ...]:
  """Returns the steps of a device, then what runs anywhere.

  Args:
    device_kind: JAX's name of the device; the longest prefix in the table counts.
    platform: its platform, for device kinds that are not in the table.
    format: dtype of the experts, or one of `quantization.FORMATS`.
  """
  format = format.partition(":")[0]  # nested:2-4 has the strategies of all nested formats
  found = max(
    (
      key
      for key in CROSSOVERS
      if key[1] in (format, None) and _covers(key[0], device_kind, platform)
    ),
    key=lambda key: (key[0] != platform, len(key[0]), key[1] is not None),
    default=("cpu", None),
  )
  return (*CROSSOVERS[found], Step("tiled_loop" if format in _QUANTIZED else "dense"))


def _covers(prefix, device_kind, platform):
  return device_kind.startswith(prefix) or prefix == platform
