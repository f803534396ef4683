"""Rotary embeddings extended to a longer context: the kinds of RoPE scaling."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Yarn:
  """YaRN (arXiv 2309.00071).

  Attributes:
    factor: ratio of the extended to the original context length.
    original_context: context length before the extension, in tokens.
    beta_fast, beta_slow: dimensions with more than `beta_fast` rotations over the original
      context keep their frequency; those with fewer than `beta_slow` divide it by `factor`.
    truncate: whether the ramp between them starts and ends at integer dimensions.
    attention_factor: multiplies cosines and sines.
    mscale_all_dim: scale m of DeepSeek's models, whose attention scores are multiplied by
      (0.1 m ln(factor) + 1)²; 0 leaves them as they are.
  """

  kind: ClassVar[str] = "yarn"

  factor: float
  original_context: int
  beta_fast: float
  beta_slow: float
  truncate: bool
  attention_factor: float
  mscale_all_dim: float = 0.0

  @property
  def score_factor(self) -> float:
    """Multiplies attention scores."""
    return (0.1 * self.mscale_all_dim * math.log(max(self.factor, 1)) + 1) ** 2

  def scale(self, frequencies: jax.Array, theta: float) -> jax.Array:
    """Scales the radians per position of each rotated pair, `[C/2]` float32.

    High frequencies stay, low ones are divided by the factor, and those on the ramp between
    them are interpolated (section 3.2; the bounds of the ramp as in transformers).
    """
    low, high = self.ramp(2 * len(frequencies), theta)
    slow = jnp.clip((jnp.arange(len(frequencies)) - low) / (high - low), 0, 1)
    return frequencies / self.factor * slow + frequencies * (1 - slow)

  def ramp(self, head_dim: int, theta: float) -> tuple[float, float]:
    """Returns the pairs between which frequencies change from unscaled to divided."""

    def pair(rotations):
      """Returns the index of the pair that rotates so often over the original context."""
      wavelength = self.original_context / (rotations * 2 * math.pi)
      return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = pair(self.beta_fast), pair(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high if high != low else high + 0.001


@dataclasses.dataclass(frozen=True)
class Llama3:
  """The extension of Llama 3.1 and its successors.

  Attributes:
    factor: divides low frequencies.
    original_context: context length before the extension, in tokens.
    low_freq_factor, high_freq_factor: frequencies with fewer than `low_freq_factor` rotations
      over the original context are divided by `factor`, those with more than
      `high_freq_factor` stay, and those between are interpolated.
  """

  kind: ClassVar[str] = "llama3"
  attention_factor: ClassVar[float] = 1.0
  score_factor: ClassVar[float] = 1.0

  factor: float
  original_context: int
  low_freq_factor: float
  high_freq_factor: float

  def scale(self, frequencies: jax.Array, theta: float) -> jax.Array:
    """Scales the radians per position of each rotated pair, `[C/2]` float32."""
    del theta
    rotations = self.original_context * frequencies / (2 * math.pi)
    width = self.high_freq_factor - self.low_freq_factor
    stay = jnp.clip((rotations - self.low_freq_factor) / width, 0, 1)
    return (1 - stay) * frequencies / self.factor + stay * frequencies


@dataclasses.dataclass(frozen=True)
class Linear:
  """Position interpolation (arXiv 2306.15595): all frequencies are divided by `factor`."""

  kind: ClassVar[str] = "linear"
  attention_factor: ClassVar[float] = 1.0
  score_factor: ClassVar[float] = 1.0

  factor: float

  def scale(self, frequencies: jax.Array, theta: float) -> jax.Array:
    """Scales the radians per position of each rotated pair, `[C/2]` float32."""
    del theta
    return frequencies / self.factor


RopeScaling = Yarn | Llama3 | Linear
SCALINGS: dict[str, type[RopeScaling]] = {s.kind: s for s in (Yarn, Llama3, Linear)}


def from_fields(fields: Mapping[str, Any]) -> RopeScaling:
  """Returns the scaling with these fields, as `dataclasses.asdict` writes them.

  Fields with a default may be missing: older files lack them.

  Raises:
    ValueError: there is none.
  """
  for scaling in SCALINGS.values():
    names = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(scaling)}
    if set(fields) <= set(names) and all(n in fields for n, needed in names.items() if needed):
      return scaling(**fields)
  raise ValueError(f"the model config has a rope_scaling of unknown kind, with {sorted(fields)}")
