"""Roster of Experts: n noisy members of one MoE model (arXiv 2509.17238).

A `Roster` holds the settings; `roe_jax.members` runs the members on a batch, with one of
three kinds of history:

* Clean Cache: one KV cache, written by the clean member. Every member attends to it and
  to its own key and value at its position.
* Standard cache: every member is its own sequence, noisy at every position, with its
  own KV cache.
* No cache (`recompute=True`): either history is recomputed at each step by
  `roe_jax.reference`. Slow; the two caches are tested against it.
"""

from collections.abc import Sequence
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import experts, routing
from roe_jax import noise as noise_lib
from roe_jax.aggregation import AGGREGATIONS, MEAN_PROBABILITY, Aggregation
from roe_jax.config import ModelConfig

CACHES = ("clean", "standard")
MEMORY_BUDGET = 256 * 2**20


class Roster(struct.PyTreeNode):
  """The settings of a roster; construct with `Roster.create`.

  Temperatures and seed are traced: changing them compiles nothing.

  Attributes:
    temperatures: `[L]` float32, τ of each layer in units of router logits.
    seed: uint32 scalar, seed of routing noise and sampling.
    num_members: n, the number of distributions that are averaged.
    include_clean: whether the noise-free member 0 is one of the n.
    cache: the history that members attend to: the clean member's ("clean") or each
      member's own ("standard").
    recompute: whether to recompute that history instead of caching it.
    aggregation: a name in `aggregation.AGGREGATIONS`.
    gate_weights: see `routing.route`.
    noise: a name in `noise.FAMILIES`.
    noisy_layers: `(first, end)`, the range of layers that may have noise; layers before
      it are computed once for all members.
    memory_budget: approximate memory in bytes for the activations of members computed
      together; affects results by rounding only.
    expert_strategy: see `experts.apply`.
  """

  temperatures: jax.Array
  seed: jax.Array
  num_members: int = struct.field(pytree_node=False)
  include_clean: bool = struct.field(pytree_node=False)
  cache: str = struct.field(pytree_node=False)
  recompute: bool = struct.field(pytree_node=False)
  aggregation: str = struct.field(pytree_node=False)
  gate_weights: str = struct.field(pytree_node=False)
  noise: str = struct.field(pytree_node=False)
  noisy_layers: tuple[int, int] = struct.field(pytree_node=False)
  memory_budget: int = struct.field(pytree_node=False)
  expert_strategy: str | None = struct.field(pytree_node=False)

  @classmethod
  def create(
    cls,
    config: ModelConfig,
    num_members: int = 1,
    temperatures: float | Sequence[float] = 0.0,
    *,
    seed: int = 0,
    include_clean: bool = True,
    cache: str = "clean",
    recompute: bool = False,
    aggregation: str = "mean_probability",
    gate_weights: str = routing.CLEAN,
    noise: str = noise_lib.GUMBEL,
    noisy_layers: tuple[int, int] | None = None,
    memory_budget: int = MEMORY_BUDGET,
    expert_strategy: str | None = None,
  ) -> "Roster":
    """Creates a roster for models of `config`; by default the baseline.

    The other arguments are the attributes of the class.

    Args:
      config: the model's architecture.
      num_members: n.
      temperatures: one τ for all layers, or a list with one per layer.
      seed: in [0, 2**32).
      noisy_layers: by default from the first to the last layer with τ > 0. Set it to vary
        τ within the range without recompiling, or to run a roster at τ = 0.

    Raises:
      ValueError: a setting is out of range or unknown.
    """
    layers = config.num_layers
    if (
      isinstance(num_members, bool)
      or not isinstance(num_members, (int, np.integer))
      or num_members < 1
    ):
      raise ValueError(f"num_members must be an integer of at least 1, got {num_members!r}")
    values = np.asarray(temperatures, np.float32)
    if values.ndim == 0:
      values = np.full(layers, values)
    if values.shape != (layers,):
      raise ValueError(
        f"temperatures must be one number or a list of {layers} (one per layer of the "
        f"model), got shape {list(values.shape)}"
      )
    if not np.all(np.isfinite(values)) or np.any(values < 0):
      raise ValueError(f"temperatures must be finite and not negative, got {values.tolist()}")
    for name, value, known in (
      ("cache", cache, CACHES),
      ("aggregation", aggregation, tuple(AGGREGATIONS)),
      ("gate_weights", gate_weights, routing.GATE_WEIGHTS),
      ("noise", noise, tuple(noise_lib.FAMILIES)),
    ):
      if value not in known:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
    if noise in noise_lib.PROBABILITIES and np.any(values > 1):
      raise ValueError(
        f"with noise {noise!r} a temperature is the probability "
        f"{noise_lib.PROBABILITIES[noise]} and at most 1, got {values.tolist()}"
      )
    if not 0 <= seed <= noise_lib.MAX_SEED:
      raise ValueError(f"seed must lie in [0, 2**32), got {seed}")
    noisy = np.flatnonzero(values)
    needed = (int(noisy[0]), int(noisy[-1]) + 1) if noisy.size else (layers, layers)
    if noisy_layers is None:
      noisy_layers = needed
    first, end = noisy_layers
    if not 0 <= first <= end <= layers:
      raise ValueError(f"noisy_layers must be a range within (0, {layers}), got {noisy_layers}")
    if noisy.size and not (first <= needed[0] and needed[1] <= end):
      raise ValueError(
        f"noisy_layers {noisy_layers} leaves out layers with a temperature above 0; these span "
        f"{needed}"
      )
    if aggregation == "contrast" and not include_clean:
      raise ValueError(
        "aggregation 'contrast' contrasts the clean member with the others: it needs include_clean"
      )
    if memory_budget < 1:
      raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget}")
    experts.check_strategy(expert_strategy)
    if num_members == 1 and include_clean:
      first, end = layers, layers  # the clean member alone
    return cls(
      jnp.asarray(values),
      jnp.asarray(seed, jnp.uint32),
      int(num_members),
      bool(include_clean),
      cache,
      bool(recompute),
      aggregation,
      gate_weights,
      noise,
      (first, end),
      int(memory_budget),
      expert_strategy,
    )

  @property
  def is_baseline(self) -> bool:
    """Whether this is the baseline: the clean member alone."""
    return self.num_members == 1 and self.include_clean

  @property
  def members(self) -> tuple[int, ...]:
    """Indices of the members that are computed.

    Clean Cache needs member 0 for its keys and values even if it is not averaged.
    """
    if self.include_clean:
      return tuple(range(self.num_members))
    noisy = tuple(range(1, self.num_members + 1))
    return (0, *noisy) if self.cache == "clean" else noisy

  @property
  def aggregate_with(self) -> Aggregation:
    """The aggregation; it does not affect the baseline."""
    return MEAN_PROBABILITY if self.is_baseline else AGGREGATIONS[self.aggregation]

  def check(self, config: ModelConfig) -> None:
    """Raises a ValueError unless the roster has temperatures for all layers of the model."""
    if self.temperatures.shape != (config.num_layers,):
      raise ValueError(
        f"the roster has temperatures for {self.temperatures.shape[0]} layers and the model "
        f"has {config.num_layers}: create it with Roster.create and this model's config"
      )

  def history(self) -> "Roster":
    """Returns the roster that writes the history: with Clean Cache the clean member alone.

    So rosters of all sizes share one compiled prefill.
    """
    if self.cache == "standard":
      return self
    layers = self.temperatures.shape[0]
    return self.replace(
      num_members=1,
      include_clean=True,
      noisy_layers=(layers, layers),
      aggregation="mean_probability",
      gate_weights=routing.CLEAN,
      noise=noise_lib.GUMBEL,
    )

  def settings(self) -> dict[str, Any]:
    """Returns all settings that affect results as JSON values, to be recorded with them."""
    return {
      "num_members": self.num_members,
      "temperatures": [round(float(t), 6) for t in np.asarray(self.temperatures)],
      "seed": int(self.seed),
      "include_clean": self.include_clean,
      "cache": self.cache,
      "recompute": self.recompute,
      "aggregation": self.aggregation,
      "gate_weights": self.gate_weights,
      "noise": self.noise,
      "noisy_layers": list(self.noisy_layers),
    }
