"""Bits that vary: formats, plans of bits per expert, bit routers, and members at fewer bits.

    python -m experiments.reproduce --figure=bits --model=embedded

Experts in nested formats (D2MoE, arXiv 2504.15299), rounded and with compensation; plans that keep
all bits of some experts by a rule (QuantMoE-Bench, arXiv 2406.08155), with as many bytes as each
other; routers that choose bits by token; and rosters whose noisy members read fewer bits. Texts are
read with the words before them given. The KL divergence is from the unquantized model with the same
noise to the quantized one, at the tokens of the text. A text is right if all of its tokens are the
most probable ones, which no output temperature changes; perplexities are at an output temperature
fitted on development texts, which the rules, compensation and bit routers are made on, too.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments.analysis import (
  comparisons,
  drawing,
  output_temperatures,
  paired_statistics,
  report_page,
)
from experiments.cli import app
from experiments.evaluation.requests import Continuation, RequestBuilder
from experiments.figures import compared, passages
from experiments.figures.figure_run import FigureRun
from experiments.training import bit_router_training
from roe_jax import batching, bit_plans, bit_routing, compensation, quantization
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.costs import calls, flops
from roe_jax.nested import Nested
from roe_jax.params import Params
from roe_jax.quantization import CONTRACTED
from roe_jax.roster import Roster

TITLE = "Bits that vary"
BACKGROUND = (
  "QuantMoE-Bench (arXiv 2406.08155) gives more bits to experts that are chosen often, D2MoE "
  "(arXiv 2504.15299) bits by token from one nested file. Rosters read rarer experts, too."
)
FORMAT = Nested(2, 4)
FORMATS = ("int8", "int4", *(f"nested:{b}-{k}" for b in (2, 3) for k in range(b, 5)))
UNQUANTIZED, BASELINE, ROSTER = "unquantized", "baseline", "roster"
RANDOM = "mean of random plans"
OF_MEMBERS = ("members", "bits as noise")
# Kinds of systems: what they are compared with.
KINDS = {
  "format": "the unquantized model",
  "compensated": "rounding to as many bits",
  "plan": RANDOM,
  "bit router": "the plan of frequency",
  "members": "the same number of members at all bits",
  "bits as noise": "the clean member alone, at all bits",
}


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    kinds: of systems, in `KINDS`; differences from systems of other kinds are left out.
    task: its references are read.
    num_members, tau: of the roster.
    mean: bits of plans and bit routers.
    random_plans: number of random plans.
    num_examples: test texts.
    num_validation: development texts.
    router_examples, router_steps, router_batch: further development texts and steps that bit
      routers are trained on.
  """

  kinds: tuple[str, ...] = tuple(KINDS)
  task: str = "text/lambada"
  num_members: int = 4
  tau: float = 0.3
  mean: float = 3.0
  random_plans: int = 5
  num_examples: int = 1000
  num_validation: int = 60
  router_examples: int = 400
  router_steps: int = 60
  router_batch: int = 8
  num_seeds: ClassVar[int] = 1


CONFIGS = {
  "embedded": Config(task="wordmath", router_examples=800, router_steps=200, router_batch=16),
  "smollm2": Config(),
}


@dataclasses.dataclass(frozen=True)
class System:
  """Experts at some bits.

  Attributes:
    kind: in `KINDS`.
    label: its name.
    size: bytes of all experts; those that a decode step of one sequence reads for rosters with
      bits of their own.
    make: returns parameters and config.
    rosters: what reads the texts, by name.
    reference: label of the system that it is compared with.
  """

  kind: str
  label: str
  size: int
  make: Callable[[], tuple[Params, ModelConfig]]
  rosters: dict[str, Roster]
  reference: str | None = None


def judge(
  log_probs: list[np.ndarray], reference: list[np.ndarray], requests: list[Continuation], t: float
) -> dict[str, Any]:
  """Returns for each text the KL divergence from `reference` (nats, mean over its tokens), nats at
  output temperatures 1 and `t`, and whether all tokens are the most probable ones."""
  found: dict[str, Any] = {"temperature": t, "kl": [], "nll": [], "fitted_nll": [], "right": []}
  for ours, expected, request in zip(log_probs, reference, requests):
    kl = (np.exp(expected) * (expected - ours)).sum(-1).mean()
    nll = _nll(ours, request, np.array([1.0, t]))
    right = bool((ours.argmax(-1) == request.tokens).all())
    for name, value in zip(("kl", "nll", "fitted_nll"), (kl, *nll)):
      found[name].append(float(f"{value:.6g}"))
    found["right"].append(right)
  return found


def _nll(log_probs, request, temperatures):
  """Returns `[G]` nats of a text at output temperatures."""
  scaled = log_probs / temperatures[:, None, None]
  top = scaled.max(-1)
  total = top + np.log(np.exp(scaled - top[..., None]).sum(-1))
  own = np.take_along_axis(scaled, np.array(request.tokens)[None, :, None], axis=-1)[..., 0]
  return (total - own).sum(-1)


def dequantized(
  params: Params,
  format: str,
  plan: np.ndarray | None = None,
  moments: dict[str, np.ndarray] | None = None,
  bits: int | None = None,
) -> Params:
  """Returns parameters with experts as a format holds them, so that all share one program.

  Args:
    params: the unquantized ones.
    format: the format.
    plan: bits of each expert of a nested format.
    moments: of the experts' inputs, for compensation.
    bits: how many bits of a nested format are read; None: all.
  """
  experts, changed = params.layers.experts, {}
  for name, axis in CONTRACTED.items():
    array = np.asarray(getattr(experts, name), np.float32)
    if moments is None:
      matrix = quantization.quantize(array, format, axis)
    else:
      matrix = compensation.quantize(array, format, axis, moments[name])
    if bits is not None:
      matrix = quantization.first_planes(matrix, bits)
    if plan is not None:
      matrix = bit_plans.apply(matrix, plan)
    changed[name] = jnp.asarray(quantization.dequantize_on_host(matrix))
  return params.replace(layers=params.layers.replace(experts=experts.replace(**changed)))


def bytes_per_step(config: ModelConfig, roster: Roster) -> int:
  """Returns the expected bytes of experts that a decode step of one sequence reads."""

  def of(bits, members):
    unique = flops.expected_unique_experts(config, len(members), 1)
    return config.num_expert_layers * unique * calls.bytes_per_expert(config, bits)

  return int(sum(of(weights.bits, members) for weights, members in roster.groups(roster.members)))


def _bit_routers(params, config, requests, own: Config) -> tuple[dict[str, Params], dict, Any]:
  """Returns the model with random and with trained bit routers, mean bits of each, its config."""
  settings = bit_router_training.Settings(own.mean, own.router_steps)
  params, config = bit_routing.add(params, config, jax.random.key(0))
  length = batching.bucket(max(r.max_length for r in requests))

  def batch(some):
    tokens = batching.pad([r.sequence for r in some], len(some), length)
    used = np.zeros(tokens.shape, bool)
    for row, r in zip(used, some):
      row[len(r.context) - 1 : r.max_length - 1] = True
    return jnp.asarray(tokens), jnp.asarray(used)

  def of_step(step):
    drawn = np.random.default_rng(step).integers(len(requests), size=own.router_batch)
    return batch([requests[i] for i in drawn])

  trained = bit_router_training.train(params, config, of_step, settings)
  mean_bits = jax.jit(
    lambda routers: bit_router_training.divergence(
      params, config, routers, *batch(requests[: own.router_batch])
    )[1]
  )
  found = {"random": params, "trained": trained}
  bits = {name: float(mean_bits(p.layers.bit_router)) for name, p in found.items()}
  return found, bits, config


class _Model:
  """The model, its texts, and what is measured of them."""

  def __init__(self, run: FigureRun):
    own = run.config
    if unknown := set(own.kinds) - set(KINDS):
      raise ValueError(f"unknown kind {min(unknown)!r}: choose from {', '.join(KINDS)}")
    # Measurements are by system, so that those of more kinds can be added.
    common = dataclasses.replace(run, config=dataclasses.replace(own, kinds=()))
    self.own, self.keep, self.batch_size = own, common.measurements(), run.model.batch_size
    self.params, self.config, tokenizer = app.open_model(run.model.checkpoint, "float32")
    builder = RequestBuilder(self.config, tokenizer)
    read = functools.partial(passages.requests, builder, own.task)
    self.test = read("test", run.data_dir, own.num_examples)
    development = read("validation", run.data_dir, own.num_validation + own.router_examples)
    self.validation = development[: own.num_validation]
    self.for_routers = development[own.num_validation :]
    roster = Roster.create(self.config, own.num_members, own.tau, seed=run.seed)
    self.rosters = {BASELINE: Roster.create(self.config), ROSTER: roster}
    self.tokens = np.array([len(r.tokens) for r in self.test])

  def _distributions(self, params, config, rosters, requests):
    return passages.distributions(params, config, rosters, requests, self.batch_size)

  @functools.cached_property
  def unquantized(self) -> dict[str, list[np.ndarray]]:
    rosters = list(self.rosters.values())
    found = self._distributions(self.params, self.config, rosters, self.test)
    return dict(zip(self.rosters, found))

  def measure(self, system: System) -> dict[str, dict[str, Any]]:
    """Returns what `judge` finds of each roster of a system."""
    params, config = system.make()
    rosters = list(system.rosters.values())
    development = self._distributions(params, config, rosters, self.validation)
    test = self._distributions(params, config, rosters, self.test)
    found = {}
    for name, roster, chosen_on, own in zip(system.rosters, rosters, development, test):
      grid = [_nll(p, r, output_temperatures.GRID) for p, r in zip(chosen_on, self.validation)]
      noisy = ROSTER if bool(np.asarray(roster.temperatures).any()) else BASELINE
      fitted = output_temperatures.fit(np.stack(grid))
      found[name] = judge(own, self.unquantized[noisy], self.test, fitted)
    return found

  def systems(self) -> Iterator[System]:
    """Yields what is compared, references first."""
    params, config, own, keep = self.params, self.config, self.own, self.keep
    e = config.num_expert_layers * config.num_experts
    bytes_of = lambda format: int(e * calls.bytes_per_expert(config.replace(expert_format=format)))

    def system(kind, label, size, make, reference, own_config=config):
      return System(kind, label, size, lambda: (make(), own_config), self.rosters, reference)

    size = int(e * calls.bytes_per_expert(config))
    yield system("format", UNQUANTIZED, size, lambda: params, None)
    for format in FORMATS:
      make = functools.partial(dequantized, params, format)
      yield system("format", format, bytes_of(format), make, UNQUANTIZED)
    sequences = [r.sequence for r in self.validation]
    moments = functools.cache(lambda: compensation.second_moments(params, config, sequences))
    for base in (2, 3):
      for bits in range(base, 5):
        make = lambda base=base, bits=bits: dequantized(
          params, f"nested:{base}-4", moments=moments(), bits=bits
        )
        name = f"nested:{base}-{bits}"
        yield system("compensated", f"{name}, compensated", bytes_of(name), make, name)
    evidence, text = bit_plans.Evidence(params, config, sequences), f"(mean={own.mean:g}"
    rules = [f"random{text},seed={s})" for s in range(own.random_plans)]
    rules += [f"{r}{text})" for r in bit_plans.RULES if r not in ("random", "uniform")]
    for name in rules if "plan" in own.kinds else ():  # to make plans takes long
      rule = bit_plans.find(name)
      scores = lambda rule=rule: bit_plans.allocate(rule.scores(evidence), rule.mean, FORMAT)
      plan = np.array(keep.get(f"{name}: plan", lambda scores=scores: scores().tolist()))
      make = functools.partial(dequantized, params, FORMAT.name, plan)
      yield system("plan", name, bit_plans.num_bytes(plan, config, FORMAT), make, RANDOM)
    whole, nested = params_lib.quantize(params, config, FORMAT.name)
    trained = functools.cache(lambda: _bit_routers(whole, nested, self.for_routers, own))
    at = functools.partial(calls.bytes_per_expert, nested)
    for name in ("random", "trained") if "bit router" in own.kinds else ():
      bits = keep.get(f"{name} bit router: bits", lambda name=name: trained()[1][name])
      size = int(e * (at(2) + (bits - 2) * (at(4) - at(2)) / 2))
      make, frequency = lambda name=name: trained()[0][name], f"frequency{text})"
      label, routed = f"{name} bit router, {bits:.2f} bits", nested.replace(bit_router=True)
      yield system("bit router", label, size, make, frequency, routed)
    several: dict[str, tuple[Any, ...]] = {"members": (own.num_members, own.tau, ("", "3", "2"))}
    several["bits as noise"] = (None, 0.0, ("", "3", "2", "3-2"))
    for kind, (n, tau, choices) in several.items():
      first = None
      for bits in choices:
        count = n or 1 + (len(bits.split("-")) if bits else 0)
        roster = Roster.create(nested, count, tau if count > 1 else None, member_bits=bits or None)
        members = f"other members at {bits or 4} bits" if count > 1 else "at 4 bits"
        label = f"n = {count}, τ = {tau:g}, {members}"
        size = bytes_per_step(nested, roster)
        yield System(kind, label, size, lambda: (whole, nested), {kind: roster}, first)
        first = first or label


def _records(
  of: dict[str, dict[str, dict]], systems: list[System], tokens
) -> list[compared.Record]:
  records = []
  plans = [s.label for s in systems if s.label.startswith("random(")]
  for system in systems:
    for which, found in of[system.label].items():
      values = {name: np.array(found[name], float) for name in ("kl", "nll", "fitted_nll", "right")}
      record: compared.Record = {
        "kind": system.kind,
        "label": system.label,
        "task": "texts",
        "which": which,
        "bytes": int(system.size),
        "examples": len(tokens),
        "output_temperature": found["temperature"],
        "kl": paired_statistics.mean(1000 * values["kl"]),
        "quality": paired_statistics.accuracy(values["right"]),
        "perplexity": paired_statistics.perplexity(values["nll"], tokens),
        "fitted": paired_statistics.perplexity(values["fitted_nll"], tokens),
      }
      names = plans if system.reference == RANDOM else [system.reference or ""]
      if names and set(names) <= set(of) and system.label not in plans:
        several = [of[name][which] for name in names]
        joined = {key: np.mean([s[key] for s in several], axis=0) for key in values}
        compare = functools.partial(comparisons.compare_perplexities, "ours", "theirs", "texts")
        fitted = compare(values["fitted_nll"], joined["fitted_nll"], tokens)
        pair = values["right"], joined["right"]
        record |= {
          "kl_difference": paired_statistics.paired_mean(1000 * values["kl"], 1000 * joined["kl"]),
          "quality_difference": paired_statistics.tested(
            paired_statistics.paired_accuracy(*pair), paired_statistics.paired_test(*pair)
          ),
          "fitted_difference": fitted.difference,
        }
      records.append(record)
  for name in ("kl_difference", "quality_difference", "fitted_difference"):
    corrected = paired_statistics.corrected([r.get(name) for r in records])
    records = [r | {name: d} if d else r for r, d in zip(records, corrected)]
  return records


def measure(run: FigureRun) -> list[compared.Record]:
  model, of, systems = _Model(run), {}, []
  for system in model.systems():
    if system.kind in run.config.kinds:
      measured = functools.partial(model.measure, system)
      of[system.label] = model.keep.get(system.label, measured)
      systems.append(system)
  return _records(of, systems, model.tokens)


def table(records: list[compared.Record]) -> str:
  columns: dict[str, Any] = {
    "experts": "label",
    "read by": "which",
    "MB": lambda r: f"{r['bytes'] / 1e6:.3f}",
    "KL (nats / 1000)": lambda r: compared.cell(r["kl"], 2),
    "KL, difference": lambda r: compared.cell(r.get("kl_difference"), 2, True),
    "right (%)": lambda r: compared.cell(r["quality"], 1),
    "right, difference (points)": lambda r: compared.cell(r.get("quality_difference"), 1, True),
    "perplexity": lambda r: compared.cell(r["perplexity"], 4),
    "at fitted T": lambda r: compared.cell(r["fitted"], 4),
    "at fitted T, difference (%)": lambda r: compared.cell(r.get("fitted_difference"), 2, True),
  }
  parts = []
  for kind, reference in KINDS.items():
    some = [r for r in records if r["kind"] == kind]
    if some:
      heading = f"**{kind[0].upper()}{kind[1:]}**; differences are from {reference}"
      parts += [heading, report_page.table_of(some, columns)]
  note = (
    f"{records[0]['examples']} texts. MB: of all experts; for members and bits as noise, of the "
    "experts that a decode step of one sequence reads. Brackets: 95 % bootstrap intervals over "
    "texts, differences paired by text; *: significant after Holm's correction over all tables."
  )
  return "\n\n".join([*parts, note])


def findings(records: list[compared.Record]) -> str:
  def of(kind, name, places, unit):
    some = [r for r in records if r["kind"] == kind and name in r and r[name].is_significant]
    return "; ".join(
      f"{r['label']}, {r['which']} {report_page.difference(r[name], places, unit)}" for r in some
    )

  parts, measured = [], compared.unique(records, "kind")
  for kind in [k for k in ("compensated", "plan", "bit router") if k in measured]:
    better = of(kind, "kl_difference", 1, " thousandths of a nat")
    parts.append(f"KL against {KINDS[kind]}: {better or 'no significant difference'}.")
  for kind in [k for k in OF_MEMBERS if k in measured]:
    better = of(kind, "fitted_difference", 2, " %")
    parts.append(f"Perplexity against {KINDS[kind]}: {better or 'no significant difference'}.")
  return " ".join(parts)


def draw(records: list[compared.Record]):
  of_members = [k for k in OF_MEMBERS if k in compared.unique(records, "kind")]
  figure, axes = drawing.axes(2 + bool(of_members), width=3.6, height=3.4)
  first, second = axes.flat[:2]
  some = [r for r in records if r["kind"] in list(KINDS)[:4] and r["label"] != UNQUANTIZED]
  for i, kind in enumerate(compared.unique(some, "kind")):
    for which in (BASELINE, ROSTER):
      of = [r for r in some if r["kind"] == kind and r["which"] == which]
      settings = drawing.style(i)
      settings["markerfacecolor"] = "none" if which == ROSTER else settings["color"]
      label = f"{kind}, {which}"
      for axis, name in ((first, "kl"), (second, "quality")):
        x = [r["bytes"] / 1e6 for r in of]
        drawing.errorbars(axis, x, [r[name] for r in of], label=label, **settings)
  drawing.value_axis(first, "y", "KL (nats / 1000)", [r["kl"].value for r in some])
  second.set_ylabel("right (%)")
  for axis in (first, second):
    drawing.value_axis(axis, "x", "MB of all experts", [r["bytes"] / 1e6 for r in some])
  for i, kind in enumerate(of_members):
    third = axes.flat[2]
    of = [r for r in records if r["kind"] == kind]
    x = [r["bytes"] / 1e6 for r in of]
    drawing.errorbars(third, x, [r["fitted"] for r in of], label=kind, **drawing.style(4 + i))
    third.set_xlabel("MB of experts per step")
    third.set_ylabel("perplexity at fitted T")
    third.legend(fontsize=7, frameon=False)
  drawing.legend(figure, first, columns=4)
  return figure
