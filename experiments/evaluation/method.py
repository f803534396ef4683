"""A method to get answers from a model, and how it is written."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, ClassVar

import jax.numpy as jnp

from experiments import tasks
from experiments.evaluation.picking import EXTRACT, SELECTIONS
from roe_jax import temperature_profiles
from roe_jax.config import ModelConfig
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler

SAMPLING: dict[str, Any] = dict(temperature=0.7, top_k=0, top_p=1.0)


@dataclasses.dataclass(frozen=True)
class Method:
  """A method to get answers from a model.

  Attributes:
    spec: how it is written.
    label: its name in tables.
    config: the model's config, as the method changes it.
    roster: its roster, with the first noise seed.
    sampler: how tokens are sampled.
    num_samples: samples per example; one is selected.
    select: how, a name in `picking.SELECTIONS`.
    sample_experts: experts per token of each sample, if they differ.
    candidates: settings and the methods with them; the best on validation examples is used.
    profile: source of the roster's temperatures, or None.
  """

  spec: Spec
  label: str
  config: ModelConfig
  roster: Roster
  sampler: Sampler
  num_samples: int = 1
  select: str = "vote"
  sample_experts: tuple[int, ...] | None = None
  candidates: tuple[tuple[dict[str, Any], Method], ...] = ()
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
    own = self.roster.is_random or not self.sampler.is_greedy
    return own or any(method.is_stochastic for _, method in self.candidates)

  @property
  def no_likelihood(self) -> str | None:
    """Why the method assigns no likelihood to a reference; None if it does."""
    if self.candidates:
      return "not defined: its settings are selected by accuracy"
    if self.num_samples > 1:
      return "not defined: it selects among samples"
    if self.roster.combine.contrasts:
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
    return settings["temperature"], settings["top_k"], settings["top_p"]

  def with_seed(self, seed: int) -> Roster:
    return self.roster.replace(seed=jnp.asarray(seed, jnp.uint32))

  def check_task(self, task: tasks.Task, kind: str) -> None:
    """Checks that the method can answer a task.

    Args:
      task: the task.
      kind: kind of its examples, see `tasks.Example.kind`.

    Raises:
      ValueError: it cannot.
    """
    samples = self.num_samples > 1 or not all(m.sampler.is_greedy for _, m in self.candidates)
    if kind == "read" and samples:
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
    votes = self.num_samples > 1 and SELECTIONS[self.select].numbers
    if votes and task.name not in EXTRACT:
      raise ValueError(
        f"{self.text} votes on numbers, which task {task.name} does not have (tasks with numbers: "
        f"{', '.join(EXTRACT)}): remove the task or the method"
      )


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
