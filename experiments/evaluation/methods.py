"""The methods that `experiments.compare` compares.

A method is written as NAME or NAME:SETTING=VALUE,...:

    baseline                                greedy; also baseline:temperature=0.7,top_p=0.95
    baseline+temperature                    its output temperature fitted on validation examples
    best_baseline                           the best of `BASELINE_SETTINGS` on validation examples
    roster:n=8,t=0.3,aggregation=mean_logit any of n, t (or profile=FILE with the τ of each layer),
                                            cache, aggregation, include_clean, gate_weights, noise,
                                            unsure, member_stop
    experts:k=16,gates=rescaled             the baseline with k experts per token
    self_consistency:n=8,temperature=0.7    majority vote over n samples of the baseline
    best_of:n=8,temperature=0.7             the most probable of n samples
    scmoe                                   contrast with a forward pass of second-best experts

Defaults come from the program's flags, the model and `SAMPLING`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
import dataclasses
import pathlib
import re
from typing import Any, ClassVar

import jax.numpy as jnp

from experiments import tasks
from experiments.cli import overrides
from experiments.tasks import llm_adapters, wordmath
from experiments.tasks.wordmath_task import WORDMATH
from roe_jax import routing, temperature_profiles
from roe_jax.completion import Completion
from roe_jax.config import ModelConfig
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler

BASELINE, FITTED, BEST_BASELINE, ROSTER, EXPERTS, VOTE, BEST, SCMOE = (
  "baseline",
  "baseline+temperature",
  "best_baseline",
  "roster",
  "experts",
  "self_consistency",
  "best_of",
  "scmoe",
)
SAMPLING = dict(temperature=0.7, top_k=0, top_p=1.0)
# Sampling settings that `BEST_BASELINE` chooses from, greedy first.
BASELINE_SETTINGS = tuple(
  dict(temperature=temperature, top_k=0, top_p=top_p)
  for temperature, top_p in ((0.0, 1.0), (0.3, 1.0), (0.7, 1.0), (0.7, 0.95), (1.0, 1.0))
)
_ROSTER_NAMES = {"n": "num_members", "t": "temperatures"}

# {task: extracts the answer to vote on}
EXTRACT: dict[str, Callable[[str], Hashable | None]] = {
  **{task.name: wordmath.extract for task in WORDMATH if task.metric == "exact_match"},
  **{task.name: llm_adapters.extract_number for task in llm_adapters.MATH},
}


@dataclasses.dataclass(frozen=True)
class Method:
  """A method to get answers from a model.

  Attributes:
    spec: how it is written.
    label: its name in tables.
    config: the model's config, as the method changes it.
    roster: its roster, with the first noise seed.
    sampler: how tokens are sampled.
    num_samples: samples per example, of which `pick` selects one.
    profile: source of the roster's temperatures, or None.
  """

  spec: Spec
  label: str
  config: ModelConfig
  roster: Roster
  sampler: Sampler
  num_samples: int = 1
  profile: temperature_profiles.Profile | None = None

  @property
  def name(self) -> str:
    """A key of `METHODS`."""
    return self.spec.NAME

  @property
  def text(self) -> str:
    return str(self.spec)

  @property
  def folder(self) -> str:
    """The folder name of its run."""
    return re.sub(r"[^\w.=+-]+", "_", self.text)

  @property
  def passes_per_token(self) -> int:
    """Forward passes per token of the answer: samples x members."""
    return self.num_samples * len(self.roster.members)

  @property
  def is_stochastic(self) -> bool:
    """Whether answers depend on the seed."""
    noisy = not self.roster.is_baseline and self.roster.noise != "second_expert"
    return noisy or not self.sampler.is_greedy or self.name == BEST_BASELINE

  @property
  def no_likelihood(self) -> str | None:
    """Why the method assigns no likelihood to a reference; None if it does."""
    if self.name == BEST_BASELINE:
      return "not defined: its settings are selected by accuracy"
    if self.num_samples > 1:
      return "not defined: it selects among samples"
    if self.roster.aggregation == "contrast":
      return "not defined: tokens that the clean member finds improbable are masked"
    if not self.sampler.is_greedy and (int(self.sampler.top_k) or float(self.sampler.top_p) < 1):
      return "not defined: top_k or top_p cuts off tokens"
    return None

  @property
  def output_temperature(self) -> float:
    """The output temperature before one is fitted."""
    return 1.0 if self.sampler.is_greedy else float(self.sampler.temperature)

  @property
  def fits_temperature(self) -> bool:
    """Whether an output temperature is fitted; sampling settings already have one."""
    return not self.no_likelihood and self.sampler.is_greedy

  @property
  def sampling(self) -> tuple[float, int, float]:
    """Temperature, top_k and top_p of the sampler; see `requests.Prompt`."""
    settings = SAMPLING | self.sampler.settings()
    return tuple(settings[name] for name in SAMPLING)

  def with_seed(self, seed: int) -> Roster:
    return self.roster.replace(seed=jnp.asarray(seed, jnp.uint32))

  def with_sampling(self, settings: dict[str, Any]) -> Method:
    """Returns the method with other arguments of `Sampler.create`."""
    return dataclasses.replace(self, sampler=Sampler.create(**settings))

  def check_task(self, task: tasks.Task, kind: str) -> None:
    """Checks that the method can answer a task.

    Args:
      task: the task.
      kind: kind of its examples, see `tasks.Example.kind`.

    Raises:
      ValueError: it cannot.
    """
    if kind == "read" and (self.num_samples > 1 or self.name == BEST_BASELINE):
      raise ValueError(
        f"task {task.name} reads a text, so {self.text} has nothing to sample: remove the task or "
        "the method"
      )
    needs = "choices" if kind == "choose" else "text" if task.metric == tasks.PERPLEXITY else None
    if needs and self.no_likelihood:
      raise ValueError(
        f"task {task.name} needs the likelihood of its {needs}, which for {self.text} is "
        f"{self.no_likelihood}: remove the task or the method"
      )
    if self.name == VOTE and task.name not in EXTRACT:
      raise ValueError(
        f"{self.text} votes on numbers, which task {task.name} does not have (tasks with numbers: "
        f"{', '.join(EXTRACT)}): remove the task or the method"
      )

  def pick(self, task: tasks.Task, samples: Sequence[Completion], texts: Sequence[str]) -> int:
    """Returns the index of the selected sample, given the samples' answers."""
    if self.name == VOTE:
      return vote([EXTRACT[task.name](text) for text in texts])
    return max(range(len(samples)), key=lambda i: sum(samples[i].log_probs))


def vote(answers: Sequence[Hashable | None]) -> int:
  """Returns the first index of the most frequent answer; ties go to the earliest.

  None (no answer extracted) wins only if all are None.
  """
  votes = Counter(a for a in answers if a is not None)
  return answers.index(votes.most_common(1)[0][0]) if votes else 0


@dataclasses.dataclass(frozen=True)
class Spec:
  """A method as it is written; None: set by the program's flags or the model."""

  NAME: ClassVar[str]

  @property
  def given(self) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

  def __str__(self) -> str:
    settings = ",".join(f"{key}={_written(value)}" for key, value in self.given.items())
    return f"{self.NAME}:{settings}" if settings else self.NAME

  def make(self, config: ModelConfig, base: Roster) -> Method:
    """Returns the method on a model; `base` has the settings of the program's flags.

    Raises:
      ValueError: a setting is out of range.
    """
    raise NotImplementedError


def _written(value):
  if isinstance(value, bool):
    return str(value).lower()
  return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else value


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
  NAME = BASELINE
  temperature: float | None = None
  top_k: int | None = None
  top_p: float | None = None

  def make(self, config, base):
    sampler, words = _sampler(self, temperature=0.0)
    return Method(self, f"baseline{words}", config, _create_roster(config, base), sampler)


@dataclasses.dataclass(frozen=True)
class FittedBaseline(Spec):
  NAME = FITTED
  LABEL: ClassVar[str] = "baseline, fitted output temperature"

  def make(self, config, base):
    return Method(self, self.LABEL, config, _create_roster(config, base), Sampler.greedy())


@dataclasses.dataclass(frozen=True)
class BestBaseline(FittedBaseline):
  NAME = BEST_BASELINE
  LABEL = "baseline, best settings"


@dataclasses.dataclass(frozen=True)
class RosterOf(Spec):
  """A roster; `t` is τ of all layers, and `profile` the file of a temperature profile."""

  NAME = ROSTER
  n: int | None = None
  t: float | None = None
  profile: str | None = None
  cache: str | None = None
  aggregation: str | None = None
  include_clean: bool | None = None
  gate_weights: str | None = None
  noise: str | None = None
  unsure: str | None = None
  member_stop: str | None = None

  def make(self, config, base):
    given = {_ROSTER_NAMES.get(key, key): value for key, value in self.given.items()}
    names = [_ROSTER_NAMES.get(f.name, f.name) for f in dataclasses.fields(self)]
    values = {key: getattr(base, key) for key in names if key != "profile"} | given
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
    roster = _create_roster(config, base, **values)
    # A search may find that zero temperatures are best, so a profile may have them.
    if roster.is_baseline or not (profile or bool(jnp.any(roster.temperatures > 0))):
      raise ValueError(
        "it is the baseline: set n to at least 2, and router temperatures with t=... or --tau"
      )
    descriptions = {
      "t": "τ = {:g}",
      "cache": "{} cache",
      "aggregation": "{}",
      "gate_weights": "{} gates",
      "noise": "{} noise",
      "unsure": "where {}",
      "member_stop": "members until settled ({})",
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
  NAME = EXPERTS
  k: int | None = None
  gates: str | None = None

  def make(self, config, base):
    own, gates = config.experts_per_token, self.gates or "model"
    k = min(2 * own, config.num_experts) if self.k is None else self.k
    changed = routing.with_experts(config, k, gates)
    labels = {"model": "", "rescaled": f", gates as of {own}", "renormalized": ", gates sum to 1"}
    label = f"{k} experts{labels[gates]}"
    return Method(self, label, changed, _create_roster(changed, base), Sampler.greedy())


@dataclasses.dataclass(frozen=True)
class SelfConsistency(Spec):
  NAME = VOTE
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
    return Method(self, label, config, _create_roster(config, base), sampler, n)


@dataclasses.dataclass(frozen=True)
class BestOf(SelfConsistency):
  NAME = BEST
  LABEL = "best of {} samples"


@dataclasses.dataclass(frozen=True)
class Scmoe(Spec):
  NAME = SCMOE

  def make(self, config, base):
    # Two members: the clean one, and one that uses the second-best expert only.
    contrast = dict(noise="second_expert", cache="standard", aggregation="contrast")
    roster = _create_roster(config, base, num_members=2, temperatures=1.0, **contrast)
    return Method(self, "SCMoE", config, roster, Sampler.greedy())


_SPECS = (Baseline, FittedBaseline, BestBaseline, RosterOf, Experts, SelfConsistency, BestOf, Scmoe)
METHODS: dict[str, type[Spec]] = {spec.NAME: spec for spec in _SPECS}


def read(text: str) -> Spec:
  """Parses a method as it is written.

  Raises:
    ValueError: the method or a setting is unknown, or a value is of another type.
  """
  text = re.sub(r"\s*([:,=+])\s*", r"\1", text.strip())
  name, colon, rest = text.partition(":")
  if name not in METHODS:
    raise ValueError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
  known, given = [f.name for f in dataclasses.fields(METHODS[name])], {}
  for part in rest.split(",") if colon else ():
    key, equals, value = part.partition("=")
    if not equals or key not in known or key in given:
      raise ValueError(
        f"method {text!r}: {part!r} must be SETTING=VALUE, each setting once; settings of "
        f"{name}: {', '.join(known) or 'none'}"
      )
    given[key] = value
  try:
    return overrides.changed(METHODS[name](), given)
  except ValueError as error:
    raise ValueError(f"method {text!r}: {error}") from error


def parse(text: str, config: ModelConfig, base: Roster) -> Method:
  """Parses a method and makes it; see `read` and `Spec.make`."""
  spec = read(text)
  try:
    return spec.make(config, base)
  except ValueError as error:
    raise ValueError(f"method {str(spec)!r}: {error}") from error


def at_equal_compute(n: int, experts: Sequence[Spec]) -> list[Spec]:
  """Returns methods with as many forward passes as a roster of n, and cheaper ones.

  A roster without its clean member has n - 1 noisy ones, since the clean one still writes the
  cache.

  Args:
    n: number of members.
    experts: the methods with more experts per token.
  """
  return [
    Baseline(),
    FittedBaseline(),
    BestBaseline(),
    *experts,
    RosterOf(n=n),
    RosterOf(n=n, gate_weights="noisy"),
    RosterOf(n=n, aggregation="mean_logit"),
    RosterOf(n=n - 1, include_clean=False),
    RosterOf(n=n, cache="standard"),
    SelfConsistency(n=n),
    BestOf(n=n),
    Scmoe(),
  ]


def default_texts(config: ModelConfig, n: int) -> list[str]:
  """Returns the methods of `at_equal_compute` for a model.

  Methods with more experts per token use twice the model's number, and n times it (at most all).
  """
  own, most = config.experts_per_token, config.num_experts
  rules = ["model"] if config.normalize_gates else list(routing.EXTRA_GATES)
  experts = [Experts(min(2 * own, most), rule) for rule in rules]
  if n > 2 and 2 * own < most:
    gates = "model" if config.normalize_gates else "rescaled"
    experts.append(Experts(min(n * own, most), gates))
  return list(map(str, at_equal_compute(n, experts)))


def parse_all(texts: Sequence[str], config: ModelConfig, base: Roster) -> list[Method]:
  """Parses methods.

  Raises:
    ValueError: see `parse`; or two methods are equal or have the same label.
  """
  found = [parse(text, config, base) for text in texts]
  for what in ("folder", "label"):
    names = [getattr(method, what) for method in found]
    twice = [method.text for method, name in zip(found, names) if names.count(name) > 1]
    if twice:
      raise ValueError(
        f"the methods {' and '.join(twice)} have the same settings or label: remove one"
      )
  return found
