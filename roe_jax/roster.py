"""Roster of Experts: n noisy members of one MoE model (arXiv 2509.17238).

A `Roster` holds the settings; its cache mode (see `roster_caches`) runs the members on a batch
through `roe_jax.members`.
"""

from collections.abc import Sequence
import dataclasses
import operator
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import aggregation as aggregations
from roe_jax import experts, perturbations, quantization, routing, temperature_profiles
from roe_jax import noise as noise_lib
from roe_jax import roster_settings as given
from roe_jax.adaptive import Stop, Unsure
from roe_jax.aggregation import (
  AGGREGATIONS,
  MEAN_LOGIT,
  MEAN_PROBABILITY,
  Aggregation,
  check_aggregation,
)
from roe_jax.cache_modes import CACHES, CacheMode
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster_settings import Weights
from roe_jax.routers import ROUTERS

MEMORY_BUDGET = 256 * 2**20
_MAX_MEMBERS = 2**20  # each has an entry in several tables

_NO_MEMBERS = (
  "temperatures without num_members would be the baseline, whose only member has no noise: pass "
  "num_members as well, such as num_members=8"
)
_NO_TEMPERATURES = (
  "without temperatures all members are equal, as in the baseline: pass temperatures as well, "
  "such as temperatures=0.3"
)


_STATIC = {"static": True}
# Settings that name an object, and the attribute that holds it.
_OBJECTS = {"aggregation": "combine", "noise": "perturb", "cache": "cache_mode"}
# Settings that give noisy members weights of their own.
_OF_WEIGHTS = ("member_bits", "member_tasks")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Roster:
  """The settings of a roster; construct with `Roster.create` or `Roster.from_profile`.

  Temperatures, seed and numbers of experts are traced: changing them compiles nothing.

  Attributes:
    temperatures: `[L]` float32, τ of each layer in units of router logits.
    seed: uint32 scalar, seed of routing noise and sampling.
    router_bias: `[L, E]` float32 added to the router logits of all members, also of the clean one:
      steers routing; -inf bans an expert. None adds nothing.
    experts_by_layer: `[M, L]` int32, how many experts each member uses in each layer, at most the
      model's `experts_per_token` (see `routing.with_experts` to have more); M = 1 if all members
      use as many. None: all `experts_per_token`.
    num_members: n, the number of distributions that are averaged.
    include_clean: whether the noise-free member 0 is one of the n.
    cache: a name in `cache_modes.CACHES`, or "module:attribute": the KV cache that members
      attend to. The clean member's ("clean"), each member's own ("standard"), or none, so that
      each step computes every member's whole sequence ("none").
    aggregation: a name in `aggregation.AGGREGATIONS`, NAME(PARAMETER=VALUE,...) of one in
      `aggregation.MAKERS`, or "module:attribute".
    gate_weights: see `routing.route`.
    noise: a name in `perturbations.FAMILIES`, NAME(PARAMETER=VALUE,...) of one in
      `perturbations.MAKERS`, or "module:function".
    noisy_layers: `(first, end)`, the range of layers that may have noise; layers before
      it are computed once for all members.
    memory_budget: approximate memory in bytes for the activations of members computed
      together; affects results by rounding only.
    expert_strategy: see `experts.apply`.
    draft_tokens: maximum number of tokens that the clean member drafts before all members run at
      their positions together, see `drafting`; 0 drafts none. Affects results by rounding only.
    member_bits: how many bits of experts in a nested format each noisy member reads; the clean
      member reads all. None: all members do.
    member_tasks: index of the task of merged fine-tunes whose weights each noisy member computes
      with; the clean member writes the cache with the base's. None: all members compute with the
      model's own. See `merging.TaskParams`.
    unsure: positions at which the noisy members run, an `adaptive.Unsure`: where the clean member
      is unsure. Its distribution is the roster's at others. None: at all positions.
    member_stop: an `adaptive.Stop`: members run in batches until the most probable token is
      settled, and those that ran are averaged. None: all members run.
    combine: the aggregation of that name when the roster was created.
    perturb: the noise of that name when the roster was created.
    cache_mode: the cache of that name when the roster was created.
  """

  temperatures: jax.Array
  seed: jax.Array
  router_bias: jax.Array | None
  experts_by_layer: jax.Array | None
  unsure: Unsure | None
  num_members: int = dataclasses.field(metadata=_STATIC)
  include_clean: bool = dataclasses.field(metadata=_STATIC)
  cache: str = dataclasses.field(metadata=_STATIC)
  aggregation: str = dataclasses.field(metadata=_STATIC)
  gate_weights: str = dataclasses.field(metadata=_STATIC)
  noise: str = dataclasses.field(metadata=_STATIC)
  noisy_layers: tuple[int, int] = dataclasses.field(metadata=_STATIC)
  memory_budget: int = dataclasses.field(metadata=_STATIC)
  expert_strategy: str | None = dataclasses.field(metadata=_STATIC)
  draft_tokens: int = dataclasses.field(metadata=_STATIC)
  member_bits: tuple[int, ...] | None = dataclasses.field(metadata=_STATIC)
  member_tasks: tuple[int, ...] | None = dataclasses.field(metadata=_STATIC)
  member_stop: Stop | None = dataclasses.field(metadata=_STATIC)
  # Compiled functions are cached by these objects: a name may be given to another one.
  combine: Aggregation = dataclasses.field(metadata=_STATIC)
  perturb: perturbations.Family = dataclasses.field(metadata=_STATIC)
  cache_mode: CacheMode = dataclasses.field(metadata=_STATIC)

  @classmethod
  def create(
    cls,
    config: ModelConfig,
    num_members: int | None = None,
    temperatures: float | Sequence[float] | None = None,
    *,
    seed: int = 0,
    router_bias: Any = None,
    experts_by_layer: Any = None,
    include_clean: bool = True,
    cache: str | CacheMode = "clean",
    aggregation: str | Aggregation = "mean_probability",
    gate_weights: str = routing.CLEAN,
    noise: str | perturbations.Family = perturbations.GUMBEL,
    noisy_layers: tuple[int, int] | None = None,
    memory_budget: int = MEMORY_BUDGET,
    expert_strategy: str | None = None,
    draft_tokens: int = 0,
    member_bits: int | str | Sequence[int] | None = None,
    member_tasks: int | str | Sequence[int] | None = None,
    unsure: str | Unsure | None = None,
    member_stop: str | float | Stop | None = None,
  ) -> "Roster":
    """Creates a roster for models of `config`; by default the baseline.

    The other arguments are the attributes of the class.

    Args:
      config: the model's architecture.
      num_members: n. An explicit 1 is the baseline at any τ, so that a sweep over n can
        start with it.
      temperatures: one τ for all layers, or a list with one per layer. An explicit 0 runs
        n equal members, so that a sweep over τ can start with it.
      seed: in [0, 2**32).
      experts_by_layer: one number, a list with one per layer, or a list with such a value for each
        member, from member 0 (the clean one, also if it is not averaged) on.
      cache: a name, "module:attribute", or a `CacheMode`.
      aggregation: a name, "module:attribute", or an `Aggregation`.
      noise: a name, "module:function", or a function as in `perturbations.FAMILIES`.
      noisy_layers: by default from the first to the last layer with τ > 0. Set it to vary
        τ within the range without recompiling, or to run a roster at τ = 0.
      member_bits, member_tasks: one number, or one for each noisy member: a list, or a text such
        as "3-2-2".
      unsure: such as "margin<0.5", "top_probability<0.9" or "entropy>1" (nats).
      member_stop: "exact", or an error rate.

    Raises:
      ValueError: a setting is out of range or unknown, or only one of `num_members` and
        `temperatures` is given, which would be the baseline.
    """
    if not isinstance(config, ModelConfig):
      raise ValueError(
        f"config must be the model's ModelConfig, got {type(config).__name__}: pass the second "
        "value that roe_jax.open_model returns"
      )
    of_layers = temperatures
    if config.first_dense_layers and not given.is_traced(temperatures):
      # They have no router, so that members may share them.
      of_layers = given.as_temperatures(temperatures, config.num_layers).copy()
      of_layers[: config.first_dense_layers] = 0
    roster = cls._checked(
      config.num_layers,
      num_members=1 if num_members is None else num_members,
      temperatures=of_layers,
      seed=seed,
      router_bias=router_bias,
      experts_by_layer=experts_by_layer,
      include_clean=include_clean,
      cache=cache,
      aggregation=aggregation,
      gate_weights=gate_weights,
      noise=noise,
      noisy_layers=noisy_layers,
      memory_budget=memory_budget,
      expert_strategy=expert_strategy,
      draft_tokens=draft_tokens,
      member_bits=member_bits,
      member_tasks=member_tasks,
      unsure=unsure,
      member_stop=member_stop,
    )
    if not roster.is_baseline and roster._is_uniform(temperatures) and noisy_layers is None:
      raise ValueError(_NO_TEMPERATURES)
    if roster.is_baseline and num_members is None and np.any(roster.temperatures):
      raise ValueError(_NO_MEMBERS)
    roster.check(config)
    if not roster.is_baseline:
      sizes = config.num_experts, config.experts_per_token, roster.num_noisy
      perturbations.check(roster.perturb, *sizes)
    return roster

  @classmethod
  def from_profile(
    cls, path: str | os.PathLike, config: ModelConfig, params: Params | None = None, **settings: Any
  ) -> "Roster":
    """Creates the roster of a temperature profile, a JSON file from `experiments.tune`.

    Args:
      path: the file; see `temperature_profiles`.
      config: the model's architecture.
      params: its parameters, to check that the profile was made for its routers.
      **settings: other arguments of `create`; they override the profile's.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, the profile is for a different model, or a setting
        is out of range.
    """
    profile = temperature_profiles.read(path)
    profile.check_sizes(config)
    if params is not None:
      profile.check_routers(params)
    merged: dict[str, Any] = {"temperatures": profile.temperatures} | profile.roster | settings
    return cls.create(config, **merged)

  def replace(self, **changes: Any) -> "Roster":
    """Returns the roster with other settings, checked as in `create`.

    `noisy_layers` is kept if it contains all layers with τ > 0. Traced temperatures and
    seeds are not checked.

    Raises:
      ValueError: a setting is out of range or unknown.
    """
    names = [f.name for f in dataclasses.fields(self) if f.name not in _OBJECTS.values()]
    if unknown := sorted(set(changes) - set(names)):
      raise ValueError(f"unknown {unknown[0]}; the settings of a roster are {', '.join(names)}")
    settings: dict[str, Any] = {name: getattr(self, name) for name in names} | changes
    temperatures, layers = settings["temperatures"], len(self.temperatures)
    for name, attribute in _OBJECTS.items():
      settings[name] = changes.get(name, (settings[name], getattr(self, attribute)))
    first, end = self.noisy_layers
    if "noisy_layers" not in changes and not given.is_traced(temperatures):
      values = given.as_temperatures(temperatures, layers)
      counts = given.as_experts_by_layer(settings["experts_by_layer"], layers)
      own = any(settings[name] is not None for name in _OF_WEIGHTS)
      noisy = given.differing_layers(values, counts, own)
      if first == end or (noisy.size and not first <= noisy[0] <= noisy[-1] < end):
        settings["noisy_layers"] = None
    roster = self._checked(layers, **settings)
    first, end = roster.noisy_layers
    if first == end and len({"temperatures", "num_members"} & changes.keys()) == 1:
      if roster.is_baseline and (given.is_traced(temperatures) or np.any(temperatures)):
        raise ValueError(_NO_MEMBERS)
      if not roster.is_baseline and "num_members" in changes and roster._is_uniform(None):
        raise ValueError(_NO_TEMPERATURES)
    return roster

  @classmethod
  def _checked(
    cls,
    layers: int,
    *,
    num_members,
    temperatures,
    seed,
    router_bias,
    experts_by_layer,
    include_clean,
    cache,
    aggregation,
    gate_weights,
    noise,
    noisy_layers,
    memory_budget,
    expert_strategy,
    draft_tokens,
    member_bits,
    member_tasks,
    unsure,
    member_stop,
  ) -> "Roster":
    """Creates a roster for models of so many layers."""
    if not given.is_integer(num_members) or num_members < 1:
      raise ValueError(f"num_members must be an integer of at least 1, got {num_members!r}")
    if num_members > _MAX_MEMBERS:
      raise ValueError(f"num_members must be at most {_MAX_MEMBERS}, got {num_members}")
    traced = given.is_traced(temperatures)
    values = np.ones(layers) if traced else given.as_temperatures(temperatures, layers)
    if not np.all(np.isfinite(values)) or np.any(values < 0):
      raise ValueError(f"temperatures must be finite and not negative, got {values.tolist()}")
    if gate_weights not in routing.GATE_WEIGHTS:
      raise ValueError(
        f"unknown gate_weights {gate_weights!r}; choose one of {', '.join(routing.GATE_WEIGHTS)}"
      )
    cache, cache_mode = given.resolve("cache", cache, CACHES, lambda v: isinstance(v, CacheMode))
    aggregation, combine = given.resolve(
      "aggregation",
      aggregation,
      AGGREGATIONS,
      lambda v: isinstance(v, Aggregation),
      aggregations.MAKERS,
    )
    noise, perturb = given.resolve(
      "noise", noise, perturbations.FAMILIES, callable, perturbations.MAKERS
    )
    check_aggregation(combine)
    if noise in perturbations.PROBABILITIES and np.any(values > 1):
      raise ValueError(
        f"with noise {noise!r} a temperature is the probability "
        f"{perturbations.PROBABILITIES[noise]} and at most 1, got {values.tolist()}"
      )
    in_range = given.is_integer(seed) and 0 <= operator.index(seed) <= noise_lib.MAX_SEED
    if not (given.is_traced(seed) or in_range):
      raise ValueError(f"seed must be an integer in [0, 2**32), got {seed!r}")
    num_rows = num_members + (not include_clean)
    experts_by_layer = given.as_experts_by_layer(experts_by_layer, layers, num_rows)
    num_noisy = num_members - include_clean
    member_bits = given.as_member_weights("member_bits", member_bits, 1, num_noisy)
    member_tasks = given.as_member_weights("member_tasks", member_tasks, 0, num_noisy)
    of_weights = dict(member_bits=member_bits, member_tasks=member_tasks)
    own_weights = any(w is not None for w in of_weights.values())
    noisy = given.differing_layers(values, experts_by_layer, own_weights)
    needed = (int(noisy[0]), int(noisy[-1]) + 1) if noisy.size else (layers, layers)
    if noisy_layers is None:
      noisy_layers = needed
    first, end = noisy_layers
    if not 0 <= first <= end <= layers:
      raise ValueError(f"noisy_layers must be a range within (0, {layers}), got {noisy_layers}")
    if noisy.size and not (first <= needed[0] and needed[1] <= end):
      raise ValueError(
        f"noisy_layers {noisy_layers} leaves out layers with a temperature above 0 or with other "
        f"numbers of experts or weights; these span {needed}"
      )
    if combine.contrasts and not include_clean:
      raise ValueError(
        f"aggregation {aggregation!r} contrasts the clean member with the others: it needs "
        "include_clean"
      )
    if memory_budget < 1:
      raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget}")
    experts.check_strategy(expert_strategy)
    if not given.is_integer(draft_tokens) or draft_tokens < 0 or draft_tokens == 1:
      raise ValueError(
        f"draft_tokens must be 0 (no drafts) or an integer of at least 2, got {draft_tokens!r}: a "
        "single drafted token would not be verified sooner than it is computed"
      )
    unsure, member_stop = given.as_adaptive(unsure, member_stop)
    if num_members == 1 and include_clean:
      first, end = layers, layers  # the clean member alone
      unsure = member_stop = member_bits = member_tasks = None
    if not cache_mode.can_draft:
      needing = dict(draft_tokens=draft_tokens, unsure=unsure, member_stop=member_stop)
      given.check_unset(cache, **needing, **of_weights)
    if member_stop is not None:
      member_stop.check(combine, aggregation)
      for name, numbers in of_weights.items():
        if len(set(numbers or ())) > 1:
          raise ValueError(
            "with member_stop, members run in batches that read equal weights: give one number as "
            f"{name}, got {numbers}"
          )
    return cls(
      jnp.asarray(temperatures if traced else values, jnp.float32),
      jnp.asarray(seed, jnp.uint32),
      router_bias if given.is_traced(router_bias) else given.as_router_bias(router_bias, layers),
      experts_by_layer,
      unsure,
      int(num_members),
      bool(include_clean),
      cache,
      aggregation,
      gate_weights,
      noise,
      (first, end),
      int(memory_budget),
      expert_strategy,
      int(draft_tokens),
      member_bits,
      member_tasks,
      member_stop,
      combine,
      perturb,
      cache_mode,
    )

  @property
  def is_baseline(self) -> bool:
    """Whether this is the baseline: the clean member alone."""
    return self.num_members == 1 and self.include_clean

  @property
  def members(self) -> tuple[int, ...]:
    """Indices of the members that are computed.

    Member 0 writes a history that all members share, even if it is not averaged.
    """
    if self.include_clean:
      return tuple(range(self.num_members))
    noisy = tuple(range(1, self.num_members + 1))
    return (0, *noisy) if self.cache_mode.is_shared else noisy

  @property
  def num_noisy(self) -> int:
    """Number of members with noise."""
    return self.num_members - self.include_clean

  @property
  def is_random(self) -> bool:
    """Whether results depend on the seed, apart from sampling."""
    noisy = not self.is_baseline and bool(np.any(self.temperatures))
    return noisy and perturbations.is_random(self.perturb)

  @property
  def aggregate_with(self) -> Aggregation:
    """The aggregation; it does not affect the baseline."""
    return MEAN_LOGIT if self.is_baseline else self.combine

  @property
  def is_adaptive(self) -> bool:
    """Whether members run only where, or until, they are needed."""
    return self.unsure is not None or self.member_stop is not None

  @property
  def clean_runs_first(self) -> bool:
    """Whether the clean member runs before the noisy ones, not in a batch with some of them."""
    return self.is_adaptive or self.has_own_weights

  @property
  def has_own_weights(self) -> bool:
    """Whether noisy members compute with weights of their own."""
    return any(getattr(self, name) is not None for name in _OF_WEIGHTS)

  def groups(self, members: Sequence[int]) -> list[tuple[Weights, list[int]]]:
    """Returns the members with the weights they compute with, those with the same together."""

    def of(member, values):
      return values[min(member, len(values)) - 1] if member and values is not None else None

    found: dict[Weights, list[int]] = {}
    for member in members:
      weights = Weights(of(member, self.member_bits), of(member, self.member_tasks))
      found.setdefault(weights, []).append(member)
    return list(found.items())

  def check(self, config: ModelConfig) -> None:
    """Checks that the roster fits the model.

    Raises:
      ValueError: the model has no router and this is not the baseline, the noise is on a state
        that its routers do not have, or the roster has no temperatures for all layers of the model.
    """
    if ROUTERS[config.router].axes is None and not self.is_baseline:
      raise ValueError(
        f"a {config.family} model is dense: it has no router that noise could perturb, so it runs "
        "without a roster only (one member)"
      )
    if self.temperatures.shape != (config.num_layers,):
      raise ValueError(
        f"the roster has temperatures for {self.temperatures.shape[0]} layers and the model "
        f"has {config.num_layers}: create it with Roster.create and this model's config"
      )
    if perturbations.state_perturbation(self.perturb) and not config.router_state:
      raise ValueError(
        f"the noise {self.noise} is on the state of a recurrent router, and this model's is "
        f"{config.router!r}: choose another noise"
      )
    self._check_router_bias(config)
    for bits in set(self.member_bits or ()):
      quantization.nested_format(config.expert_format).first(bits)
    counts = self.experts_by_layer
    if counts is None or given.is_traced(counts):
      return
    if counts.shape[1] != config.num_layers or int(counts.max()) > config.experts_per_token:
      raise ValueError(
        f"experts_by_layer {np.asarray(counts).tolist()} does not fit a model of "
        f"{config.num_layers} layers that uses at most {config.experts_per_token} experts per "
        "token: change the model with routing.with_experts(config, k) to use more"
      )

  def _is_uniform(self, temperatures):
    """Whether no temperatures are given and members do not differ by weights or experts."""
    counts = self.experts_by_layer
    differ = (counts is not None and len(counts) > 1) or self.has_own_weights
    return temperatures is None and not differ

  def _check_router_bias(self, config):
    bias, choices = self.router_bias, config.experts_per_token
    if bias is None:
      return
    if bias.shape != (config.num_layers, config.num_experts):
      raise ValueError(
        f"router_bias must have shape [{config.num_layers}, {config.num_experts}] (layers, experts "
        f"of the model), got {list(bias.shape)}"
      )
    if not given.is_traced(bias) and (np.isfinite(bias).sum(axis=1) < choices).any():
      raise ValueError(
        f"router_bias bans too many experts of a layer: a token needs {choices} that are not at "
        "-inf"
      )

  def history(self) -> "Roster":
    """Returns the roster that writes the history: a shared one, the clean member alone.

    So rosters of all sizes share one compiled prefill.
    """
    if not self.cache_mode.is_shared:
      return self
    layers = self.temperatures.shape[0]
    return dataclasses.replace(
      self,
      num_members=1,
      include_clean=True,
      noisy_layers=(layers, layers),
      aggregation="mean_probability",
      gate_weights=routing.CLEAN,
      noise=perturbations.GUMBEL,
      experts_by_layer=None if self.experts_by_layer is None else self.experts_by_layer[:1],
      draft_tokens=0,
      member_bits=None,
      member_tasks=None,
      unsure=None,
      member_stop=None,
      combine=MEAN_PROBABILITY,
      perturb=perturbations.FAMILIES[perturbations.GUMBEL],
    )

  def settings(self) -> dict[str, Any]:
    """Returns all settings that affect results as JSON values, to be recorded with them."""
    optional = {}
    if self.router_bias is not None:  # JSON has no infinity
      rows = np.asarray(self.router_bias).tolist()
      optional["router_bias"] = [[v if np.isfinite(v) else str(v) for v in row] for row in rows]
    if self.experts_by_layer is not None:
      optional["experts_by_layer"] = np.asarray(self.experts_by_layer).tolist()
    for name in _OF_WEIGHTS:
      if (values := getattr(self, name)) is not None:
        optional[name] = "-".join(map(str, values))
    if self.unsure is not None:
      optional["unsure"] = str(self.unsure)
    if self.member_stop is not None:
      optional["member_stop"] = self.member_stop.setting
    return optional | {
      "num_members": self.num_members,
      "temperatures": [round(float(t), 6) for t in np.asarray(self.temperatures)],
      "seed": int(self.seed),
      "include_clean": self.include_clean,
      "cache": self.cache,
      "aggregation": self.aggregation,
      "gate_weights": self.gate_weights,
      "noise": self.noise,
      "noisy_layers": list(self.noisy_layers),
    }
