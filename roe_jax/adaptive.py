"""Adaptive rosters: where the noisy members run, and how many of them.

Where the clean member is sure, its distribution is the roster's. Elsewhere members run in batches
until the most probable token is settled. Both are decided by what a token's own members computed,
so that, as everywhere, neither batches nor placement matter.
"""

from collections.abc import Callable
import dataclasses
import math
import re

from flax import struct
import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

from roe_jax.aggregation import Aggregation


def _top_probability(log_probs):
  return jnp.exp(log_probs.max(axis=-1))


def _margin(log_probs):
  first, second = jnp.moveaxis(jnp.exp(jax.lax.top_k(log_probs, 2)[0]), -1, 0)
  return first - second


def _entropy(log_probs):
  return -jnp.sum(jnp.where(log_probs > -jnp.inf, jnp.exp(log_probs) * log_probs, 0.0), axis=-1)


_MOST_FREEDOM = 128  # degrees of freedom from which quantiles of the t distribution count as equal


# Measures of a distribution `[..., V]` by name, and on which side of the threshold a token is
# unsure. An entry is available everywhere by name.
MEASURES: dict[str, tuple[str, Callable[[jax.Array], jax.Array]]] = {
  "top_probability": ("<", _top_probability),
  "margin": ("<", _margin),
  "entropy": (">", _entropy),
}


class Unsure(struct.PyTreeNode):
  """Says where the clean member is unsure; construct with `Unsure.create`.

  Attributes:
    threshold: float32 scalar, may be traced.
    measure: a name in `MEASURES`: its most probable token's probability, that minus the second
      token's, or the entropy in nats.
  """

  threshold: jax.Array
  measure: str = struct.field(pytree_node=False)

  @classmethod
  def create(cls, text: str) -> "Unsure":
    """Creates it from a text such as "margin<0.5" or "entropy>1".

    Raises:
      ValueError: the text has another form.
    """
    found = re.fullmatch(r"\s*(\w+)\s*([<>])\s*(\S+)\s*", text)
    name, side, number = found.groups() if found else ("", "", "")
    try:
      threshold = float(number)
    except ValueError:
      threshold = math.nan
    if name not in MEASURES or MEASURES[name][0] != side or math.isnan(threshold):
      forms = ", ".join(f"{name}{side}NUMBER" for name, (side, _) in MEASURES.items())
      raise ValueError(f"unsure must have one of the forms {forms}, got {text!r}")
    return cls(jnp.float32(threshold), name)

  def __str__(self) -> str:
    return f"{self.measure}{MEASURES[self.measure][0]}{round(float(self.threshold), 6):g}"

  @property
  def is_everywhere(self) -> bool:
    """Whether no token can be sure: probabilities are at most 1, and entropies at least 0."""
    if isinstance(self.threshold, Tracer):
      return False
    return bool(self.threshold < 0 if MEASURES[self.measure][0] == ">" else self.threshold > 1)

  def doubt(self, logits: jax.Array) -> jax.Array:
    """Returns `[...]` float32 of logits `[..., V]`: positive where the clean member is unsure."""
    side, measure = MEASURES[self.measure]
    value = measure(jax.nn.log_softmax(logits, axis=-1))
    return value - self.threshold if side == ">" else self.threshold - value


@dataclasses.dataclass(frozen=True)
class Stop:
  """When no more members run at a position; construct with `Stop.create`.

  With an error rate of 0 ("exact"), when the members that are left could not change the most
  probable token. Otherwise when they would with at most about this probability: by a t test, at
  each check with an equal share of the rate, of the sum over the members left of the difference
  between the two leading tokens' probabilities. As members that differ much from the others may be
  rare, one with the worst possible difference is added to those seen. Other tokens than these two
  are left out of account.

  Attributes:
    error_rate: in [0, 0.5).
  """

  error_rate: float

  # The number of checks: members run in so many batches of equal size.
  CHECKS = 8
  # Sums of float32 probabilities are compared with this margin.
  _ROUNDING = 1e-4

  @classmethod
  def create(cls, value: str | float) -> "Stop":
    """Creates it from "exact" or an error rate.

    Raises:
      ValueError: it is neither.
    """
    try:
      rate = 0.0 if value == "exact" else float(value)
    except (TypeError, ValueError):
      rate = math.nan
    if not (0 < rate < 0.5 or value == "exact"):
      raise ValueError(
        f'member_stop must be "exact" or an error rate between 0 and 0.5, got {value!r}'
      )
    return cls(rate)

  @property
  def setting(self) -> str | float:
    return self.error_rate or "exact"

  def check(self, aggregation: Aggregation, name: str) -> None:
    """Raises a ValueError if an aggregation of this name cannot tell when a token is settled."""
    if aggregation.scores is None:
      raise ValueError(
        "member_stop needs an aggregation that says how much one member can change (`scores`), "
        f"such as mean_probability and majority, not {name!r}"
      )

  def settled(
    self, scores: jax.Array, noisy: jax.Array, squares: jax.Array, count: jax.Array, left: jax.Array
  ) -> jax.Array:
    """Returns whether the most probable tokens are settled, bool `[...]`.

    Args:
      scores: `[..., V]` float32, sums of what members added; each adds between 0 and 1.
      noisy: `[..., V]`, of the noisy ones alone.
      squares: `[..., V]`, sums of the squares of what these added.
      count: int32 scalar, how many noisy members were added.
      left: int32 scalar, how many are left.
    """
    values, tokens = jax.lax.top_k(scores, 2)
    lead = values[..., 0] - values[..., 1]
    is_settled = lead > left + self._ROUNDING
    if not self.error_rate:
      return is_settled
    import scipy.stats  # slow to import

    # Moments of the two tokens, where the worst member gives all to the second.
    worst, m = jnp.array([0.0, 1.0]).reshape(*[1] * lead.ndim, 2), count + 1
    mean, square = ((jnp.take_along_axis(a, tokens, axis=-1) + worst) / m for a in (noisy, squares))
    variance = jnp.maximum(0.0, square - mean**2) * m / (m - 1)
    deviation = jnp.sqrt(variance).sum(axis=-1)  # of their difference, at most
    quantiles = scipy.stats.t.ppf(1 - self.error_rate / self.CHECKS, np.arange(1, _MOST_FREEDOM))
    quantile = jnp.asarray(quantiles, jnp.float32)[jnp.minimum(m - 2, _MOST_FREEDOM - 2)]
    expected = lead + left * (mean[..., 0] - mean[..., 1])
    return is_settled | (expected > quantile * deviation * jnp.sqrt(left * (1 + left / m)))
