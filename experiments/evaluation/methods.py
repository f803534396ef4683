"""The methods that `experiments.compare` compares.

A method is written as NAME or NAME:SETTING=VALUE,...:

    baseline                                greedy; also baseline:temperature=0.7,top_p=0.95
    baseline+temperature                    its output temperature fitted on validation examples
    best_baseline                           its best sampling settings on validation examples
    roster:n=8,t=0.3,aggregation=mean_logit any of n, t (or profile=FILE with the τ of each layer),
                                            cache, aggregation, include_clean, gate_weights, noise,
                                            unsure, member_stop, member_bits, member_tasks,
                                            layers=0-9 (those with noise),
                                            k=3-2-4 (experts of each member, the clean one first)
    experts:k=16,gates=rescaled             the baseline with k experts per token; k=8-8-6-4 by
                                            layer, mass=0.9 the fewest with this probability
    self_consistency:n=8,temperature=0.7    majority vote over n samples of the baseline
    best_of:n=8,temperature=0.7             the most probable of n samples
    scmoe:rank=2,beta=0.5,alpha=0.1         contrast with a forward pass of one expert of that rank
                                            (1-3: of several, random: of any); gates=model|one,
                                            k (experts of the other pass), and n and temperature
                                            for a vote over samples
    best_scmoe                              its best beta on validation examples; as scmoe
    sequences:n=8,t=0.3,select=vote         each member writes an answer of its own: noise, k=7-8-9
                                            (experts of each), temperature; select=vote|likelihood|
                                            routing|any

Defaults come from the program's flags, the model and `method.SAMPLING`.
"""

from collections.abc import Sequence
import dataclasses
import re

from experiments.cli import overrides
from experiments.evaluation.method import Method, Spec
from experiments.evaluation.method_specs import (
  Baseline,
  BestBaseline,
  BestOf,
  BestScmoe,
  Experts,
  FittedBaseline,
  RosterOf,
  Scmoe,
  SelfConsistency,
  Sequences,
)
from roe_jax.config import ModelConfig
from roe_jax.roster import Roster

METHODS: dict[str, type[Spec]] = {
  spec.NAME: spec
  for spec in (
    Baseline,
    FittedBaseline,
    BestBaseline,
    RosterOf,
    Experts,
    SelfConsistency,
    BestOf,
    Scmoe,
    BestScmoe,
    Sequences,
  )
}


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
  # Parameters of a noise or aggregation are in parentheses.
  for part in re.split(r",(?![^()]*\))", rest) if colon else ():
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
    BestScmoe(),
  ]


def default_texts(config: ModelConfig, n: int) -> list[str]:
  """Returns the methods of `at_equal_compute` for a model.

  Methods with more experts per token use twice the model's number, and n times it (at most all).
  """
  own, most = config.experts_per_token, config.num_experts
  rules = ["model"] if config.normalize_gates else ["model", "rescaled", "renormalized"]
  experts = [Experts(str(min(2 * own, most)), rule) for rule in rules]
  if n > 2 and 2 * own < most:
    gates = "model" if config.normalize_gates else "rescaled"
    experts.append(Experts(str(min(n * own, most)), gates))
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
