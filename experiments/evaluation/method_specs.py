"""The methods of `methods.METHODS`, as they are written and made."""

import dataclasses
import pathlib
import re
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from experiments.evaluation.method import SAMPLING, Method, Spec
from experiments.evaluation.picking import SELECTIONS
from roe_jax import aggregation, perturbations, routing, temperature_profiles
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler

# Sampling settings that `BestBaseline` chooses from, greedy first.
BASELINE_SETTINGS: tuple[dict[str, Any], ...] = tuple(
  dict(temperature=temperature, top_k=0, top_p=top_p)
  for temperature, top_p in ((0.0, 1.0), (0.3, 1.0), (0.7, 1.0), (0.7, 0.95), (1.0, 1.0))
)
# β that `BestScmoe` chooses from, as in the paper.
BETAS = 0.1, 0.3, 0.5, 0.7, 0.9
_ROSTER_NAMES = {"n": "num_members", "t": "temperatures"}


def _counts(k: str | None, name: str = "k") -> tuple[int, ...]:
  """Parses one number or several, such as "8" or "8-8-6-4"; none if not given."""
  if k is None:
    return ()
  if not re.fullmatch(r"\d+(-\d+)*", k):
    raise ValueError(f"{name} must be a number, or several such as 8-8-6-4, got {k!r}")
  return tuple(map(int, k.split("-")))


def _range(layers: str, count: int) -> np.ndarray:
  """Returns `[L]` float64, one in the layers of a range such as 0-9, zero in others."""
  found = re.fullmatch(r"(\d+)-(\d+)", layers)
  first, last = map(int, found.groups()) if found else (1, 0)
  if not first <= last < count:
    raise ValueError(f"layers must be FIRST-LAST within 0-{count - 1}, got {layers!r}")
  return ((first <= np.arange(count)) & (np.arange(count) <= last)).astype(float)


def _with_experts(config, counts, gates, mass=None):
  """Returns the model with room for all counts (all experts with a mass), or unchanged."""
  if not counts and mass is None:
    if gates not in (None, "model"):
      raise ValueError(f"gates={gates} needs k or mass")
    return config
  most = max(counts) if counts else config.num_experts
  return routing.with_experts(config, most, gates or "model", mass)


def _create_roster(config, base, **settings):
  return Roster.create(
    config,
    seed=int(base.seed),
    expert_strategy=base.expert_strategy,
    memory_budget=base.memory_budget,
    router_bias=base.router_bias,
    draft_tokens=base.draft_tokens,
    **settings,
  )


def _sampler(spec, **defaults):
  """Returns a sampler with the settings that are given, and the words of a label for them."""
  given = {key: value for key, value in spec.given.items() if key in SAMPLING}
  words = "".join(f", {key} {value:g}" for key, value in given.items())
  return Sampler.create(**(SAMPLING | defaults | given)), words


@dataclasses.dataclass(frozen=True)
class Baseline(Spec):
  NAME = "baseline"
  temperature: float | None = None
  top_k: int | None = None
  top_p: float | None = None

  def make(self, config, base):
    sampler, words = _sampler(self, temperature=0.0)
    return Method(self, f"baseline{words}", config, _create_roster(config, base), sampler)


@dataclasses.dataclass(frozen=True)
class FittedBaseline(Spec):
  NAME = "baseline+temperature"
  LABEL: ClassVar[str] = "baseline, fitted output temperature"

  def make(self, config, base):
    return Method(self, self.LABEL, config, _create_roster(config, base), Sampler.greedy())


@dataclasses.dataclass(frozen=True)
class BestBaseline(FittedBaseline):
  NAME = "best_baseline"
  LABEL = "baseline, best settings"

  def make(self, config, base):
    method = super().make(config, base)
    tried = (
      dataclasses.replace(method, sampler=Sampler.create(**settings))
      for settings in BASELINE_SETTINGS
    )
    return dataclasses.replace(method, candidates=tuple(zip(BASELINE_SETTINGS, tried)))


@dataclasses.dataclass(frozen=True)
class RosterOf(Spec):
  """A roster; `t` is τ of all layers, and `profile` the file of a temperature profile.

  With `layers` such as 0-9, noise is in these layers only, numbered from 0.
  `k` is how many experts all members use or each one, the clean one first; `gates` and `mass` are
  as in `Experts`.
  """

  NAME = "roster"
  n: int | None = None
  t: float | None = None
  profile: str | None = None
  layers: str | None = None
  cache: str | None = None
  aggregation: str | None = None
  include_clean: bool | None = None
  gate_weights: str | None = None
  noise: str | None = None
  unsure: str | None = None
  member_stop: str | None = None
  member_bits: str | None = None
  member_tasks: str | None = None
  k: str | None = None
  gates: str | None = None
  mass: float | None = None

  def make(self, config, base):
    own = {"k", "gates", "mass", "layers"}
    given = {_ROSTER_NAMES.get(k, k): v for k, v in self.given.items() if k not in own}
    names = {_ROSTER_NAMES.get(f.name, f.name) for f in dataclasses.fields(self)} - own
    values = {key: getattr(base, key) for key in names if key != "profile"} | given
    counts = _counts(self.k)
    config = _with_experts(config, counts, self.gates, self.mass)
    by_member = [[k] for k in counts] if len(counts) > 1 else None
    profile, source = None, []
    if path := values.pop("profile", None):
      if self.t is not None:
        raise ValueError("t and profile both set the temperatures: use one of them")
      path = pathlib.Path(path)
      if not path.is_file():
        raise ValueError(f"temperature profile {path} does not exist")
      profile = temperature_profiles.read(path)
      profile.check_sizes(config)
      values["temperatures"] = profile.temperatures
      # `experiments.tune` names all of its profiles profile.json.
      source = [f"τ of {path.stem if path.stem != 'profile' else path.parent.name}"]
    if self.layers is not None:
      temperatures = np.asarray(values["temperatures"]) * _range(self.layers, config.num_layers)
      values["temperatures"] = temperatures.astype(np.float32)
    roster = _create_roster(config, base, experts_by_layer=by_member, **values)
    # A search may find that zero temperatures are best, so a profile may have them.
    differ = (
      profile or by_member or roster.has_own_weights or bool(jnp.any(roster.temperatures > 0))
    )
    if roster.is_baseline or not differ:
      raise ValueError(
        "it is the baseline: set n to at least 2, and router temperatures with t=... or --tau"
      )
    descriptions = {
      "t": "τ = {:g}",
      "layers": "noise in layers {}",
      "cache": "{} cache",
      "aggregation": "{}",
      "gate_weights": "{} gates",
      "noise": "{} noise",
      "unsure": "where {}",
      "member_stop": "members until settled ({})",
      "member_bits": "members at {} bits",
      "member_tasks": "members of tasks {}",
      "k": "{} experts",
      "gates": "gates {}",
      "mass": "experts of {:g} of the probability",
      "include_clean": "with clean member" if roster.include_clean else "without clean member",
    }
    parts = [
      d.format(self.given[key]).replace("_", " ")
      for key, d in descriptions.items()
      if key in self.given
    ]
    label = ", ".join([f"roster, n = {roster.num_members}", *source, *parts])
    return Method(self, label, config, roster, Sampler.greedy(), profile=profile)


@dataclasses.dataclass(frozen=True)
class Experts(Spec):
  """The baseline with `k` experts per token, of all layers or of each.

  With `mass`, a token's experts are the fewest with this probability, at most `k` (XMoE).
  """

  NAME = "experts"
  k: str | None = None
  gates: str | None = None
  mass: float | None = None

  def make(self, config, base):
    own, gates, counts = config.experts_per_token, self.gates or "model", _counts(self.k)
    if not counts and self.mass is None:
      counts = (min(2 * own, config.num_experts),)
    changed = _with_experts(config, counts, gates, self.mass)
    by_layer = list(counts) if len(counts) > 1 else None
    roster = _create_roster(changed, base, experts_by_layer=by_layer)
    labels = {
      "model": "",
      "raw": ", gates not scaled",
      "rescaled": f", gates as of {own}",
      "renormalized": ", gates sum to 1",
    }
    k = "-".join(map(str, counts))
    if self.mass is None:
      label = f"{k} experts by layer" if by_layer else f"{k} experts"
    else:
      label = f"experts of {self.mass:g} of the probability" + (f", at most {k}" if k else "")
    return Method(self, label + labels[gates], changed, roster, Sampler.greedy())


@dataclasses.dataclass(frozen=True)
class SelfConsistency(Spec):
  NAME = "self_consistency"
  SELECT: ClassVar[str] = "vote"
  LABEL: ClassVar[str] = "self-consistency, {} samples"
  n: int | None = None
  temperature: float | None = None
  top_k: int | None = None
  top_p: float | None = None

  def make(self, config, base):
    n = base.num_members if self.n is None else self.n
    sampler, words = _sampler(self)
    if n < 2 or sampler.is_greedy:
      raise ValueError(
        f"n must be at least 2 and temperature above 0, got n={n} and "
        f"temperature={float(sampler.temperature):g}"
      )
    label = self.LABEL.format(n) + words
    return Method(self, label, config, _create_roster(config, base), sampler, n, self.SELECT)


@dataclasses.dataclass(frozen=True)
class BestOf(SelfConsistency):
  NAME = "best_of"
  SELECT = "likelihood"
  LABEL = "best of {} samples"


@dataclasses.dataclass(frozen=True)
class Scmoe(Spec):
  """SCMoE (arXiv 2405.14507): the clean member, contrasted with a weak one of few experts.

  `rank` is that of the weak member's expert, 1 for the best; several such as 1-3, or random.
  `gates` sets its gates: the model's, or one. `k` is how many experts the clean member uses. With
  `n` samples at a `temperature`, their answers vote.
  """

  NAME = "scmoe"
  rank: str | None = None
  beta: float | None = None
  alpha: float | None = None
  gates: str | None = None
  k: str | None = None
  n: int | None = None
  temperature: float | None = None
  LABEL: ClassVar[str] = "SCMoE"

  def make(self, config, base):
    return self._with_beta(self.beta, config, base)

  def _with_beta(self, beta, config, base):
    if self.gates not in (None, "model", "one"):
      raise ValueError(f"gates must be model or one, got {self.gates!r}")
    if (self.n is None) != (self.temperature is None):
      raise ValueError("n samples need a temperature, and a temperature n samples: give both")
    weak, numbers = perturbations.FAMILIES["random_expert"], {"alpha": self.alpha, "beta": beta}
    if self.rank != "random":
      ranks = _counts(self.rank or "2", "rank")
      weak = perturbations.rank_experts(ranks[0] if len(ranks) == 1 else ranks)
    changed = _with_experts(config, _counts(self.k), None)
    roster = _create_roster(
      changed,
      base,
      num_members=2,
      temperatures=1.0,
      cache="standard",
      noise=weak,
      aggregation=aggregation.contrast(**{k: v for k, v in numbers.items() if v is not None}),
      gate_weights=routing.NOISY if self.gates == "one" else routing.CLEAN,
    )
    sampler = Sampler.greedy() if self.temperature is None else Sampler.create(self.temperature)
    words = {"gates": "gates of {}", "k": "{} experts", "n": "{} samples"}
    parts = (
      words.get(key, f"{key} {{:g}}" if isinstance(value, float) else f"{key} {{}}").format(value)
      for key, value in self.given.items()
    )
    label = ", ".join([self.LABEL, *parts])
    return Method(self, label, changed, roster, sampler, self.n or 1)


@dataclasses.dataclass(frozen=True)
class BestScmoe(Scmoe):
  """SCMoE with the best of `BETAS` on validation examples."""

  NAME = "best_scmoe"
  LABEL = "SCMoE, best β"

  def make(self, config, base):
    if self.beta is not None:
      raise ValueError("best_scmoe tunes beta: leave it out, or use scmoe")
    tried = tuple((dict(beta=beta), self._with_beta(beta, config, base)) for beta in BETAS)
    return dataclasses.replace(self._with_beta(None, config, base), candidates=tried)


@dataclasses.dataclass(frozen=True)
class Sequences(Spec):
  """Members that each write an answer of their own; one is selected.

  Each of `n` samples is one noisy member with its own cache, at noise of its own; `k` is how many
  experts each uses. With `noise=expert_sample(...)`, Expert-Sample (arXiv 2602.02443); with k
  alone, the variation of DES (arXiv 2509.22572); `select=routing` is that of RAD.
  """

  NAME = "sequences"
  n: int | None = None
  t: float | None = None
  noise: str | None = None
  gate_weights: str | None = None
  k: str | None = None
  temperature: float | None = None
  select: str | None = None

  def make(self, config, base):
    counts, select = _counts(self.k), self.select or "vote"
    n = self.n or (len(counts) if len(counts) > 1 else base.num_members)
    if select not in SELECTIONS:
      raise ValueError(f"select must be one of {', '.join(SELECTIONS)}, got {select!r}")
    if n < 2 or len(counts) not in (0, 1, n):
      raise ValueError(f"n must be at least 2, and k have one number or n, got n={n}, k={self.k}")
    changed = _with_experts(config, counts, None)
    roster = _create_roster(
      changed,
      base,
      num_members=1,
      include_clean=False,
      cache="standard",
      temperatures=base.temperatures if self.t is None else self.t,
      noise=self.noise or base.noise,
      gate_weights=self.gate_weights or base.gate_weights,
    )
    sampler = Sampler.create(self.temperature) if self.temperature else Sampler.greedy()
    several = counts if len(set(counts)) > 1 else None
    if not (several or roster.is_random or not sampler.is_greedy):
      raise ValueError("all samples would be equal: set t, temperature, or k of each sample")
    words = {"t": "τ = {:g}", "noise": "{} noise", "gate_weights": "{} gates", "k": "{} experts"}
    words |= {"temperature": "temperature {:g}", "select": "selected by {}"}
    parts = (words[key].format(self.given[key]) for key in words if key in self.given)
    label = ", ".join([f"{n} sequences", *parts])
    return Method(self, label, changed, roster, sampler, n, select, several)
