"""The sweeps of the benchmark: each is a list of cases that take turns."""

from collections.abc import Callable
import dataclasses
from typing import Any

import numpy as np

from experiments.benchmarks import bench as bench_lib
from experiments.benchmarks import random_models
from experiments.benchmarks.bench import Bench, Call
from roe_jax import costs, native
from roe_jax.aggregation import AGGREGATIONS
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler

# Drafted tokens of a round, and shares of unsure positions.
DRAFTS = (2, 4, 8, 16)
SHARES = (0.0, 0.125, 0.25, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of the sweeps, from the flags.

  Attributes:
    num_members: n in the decode sweep.
    context: positions before a step, unless another attribute says otherwise.
    contexts: positions before a step in the context sweep.
    batch_sizes: B in the batch sweep.
    cache_context: positions before a step in the cache sweep.
    score_tokens: length of the scored sequence.
  """

  num_members: tuple[int, ...]
  context: int
  contexts: tuple[int, ...]
  batch_sizes: tuple[int, ...]
  cache_context: int
  score_tokens: int


@dataclasses.dataclass(frozen=True)
class Case:
  """One line of the results.

  Attributes:
    variant: its name within the sweep.
    num_members: n.
    temperature: τ.
    context: positions before the step, or length of the scored sequence.
    batch_size: B.
    parts: calls to time, and the weight of each in the sum.
    baseline: key `(variant, n, τ, context, B)` of the case to compare with, or None.
    unique_experts: unique active experts, mean over layers.
    floor_bytes: bytes that must be read.
    floor_flops: FLOPs that must be done.
    tokens: number of scored tokens.
    options: further settings, for the record.
  """

  variant: str
  num_members: int
  temperature: float
  context: int
  batch_size: int
  parts: tuple[tuple[Call, float], ...]
  baseline: tuple | None = None
  unique_experts: float | None = None
  floor_bytes: float | None = None
  floor_flops: float | None = None
  tokens: int | None = None
  options: dict = dataclasses.field(default_factory=dict)

  @property
  def key(self) -> tuple:
    return (self.variant, self.num_members, self.temperature, self.context, self.batch_size)

  @property
  def memory(self) -> dict[str, int]:
    """Memory of the part with the most temporaries."""
    return max((call.memory for call, _ in self.parts), key=lambda m: m.get("temp_bytes", 0))


def floor(
  bench: Bench, roster: Roster, unique: float, context: int, batch_size: int = 1, histories: int = 1
) -> dict[str, Any]:
  """Returns what a decode step must read and compute, as fields of `Case`.

  Args:
    bench: the model.
    roster: the settings.
    unique: number of unique active experts.
    context: positions before the step.
    batch_size: B.
    histories: number of caches that the members of a sequence attend to.
  """
  flops = costs.forward_flops(bench.config, roster, range(context, context + 1))
  return {
    "floor_bytes": random_models.step_bytes(bench.config, unique, context, batch_size * histories),
    "floor_flops": batch_size * flops,
  }


def _step(
  bench: Bench, n: int, tau: float, context: int, batch_size: int, unique: float, **settings
) -> Case:
  """A decode step with Clean Cache; `unique` is the number of unique active experts."""
  box, roster = bench.clean_history(context, batch_size), bench.roster(n, tau)
  return Case(
    "clean",
    n,
    tau,
    context,
    batch_size,
    ((bench.step(roster, box), 1),),
    unique_experts=unique,
    **floor(bench, roster, unique, context, batch_size),
    **settings,
  )


def decode(bench: Bench, sizes: Sizes) -> list[Case]:
  """Decode steps against n at τ = 0 (identical members, as in the paper) and at τ > 0."""
  cases, box = [], bench.clean_history(sizes.context)
  for tau in (0.0, bench.temperature):
    unique = bench.unique_experts(sizes.num_members, tau, box)
    for n in sizes.num_members:
      cases.append(
        _step(
          bench,
          n,
          tau,
          sizes.context,
          1,
          unique[n],
          baseline=("clean", sizes.num_members[0], tau, sizes.context, 1),
        )
      )
  return cases


def context(bench: Bench, sizes: Sizes) -> list[Case]:
  """Decode steps against context length."""
  n, tau, cases = 16, bench.temperature, []
  for length in sizes.contexts:
    unique = bench.unique_experts([n], tau, bench.clean_history(length))[n]
    cases.append(
      _step(bench, n, tau, length, 1, unique, baseline=("clean", n, tau, sizes.contexts[0], 1))
    )
  return cases


def batch(bench: Bench, sizes: Sizes) -> list[Case]:
  """Decode steps against batch size."""
  n, tau, cases = 8, bench.temperature, []
  for size in sizes.batch_sizes:
    unique = bench.unique_experts([n], tau, bench.clean_history(sizes.context, size))[n]
    cases.append(
      _step(
        bench,
        n,
        tau,
        sizes.context,
        size,
        unique,
        baseline=("clean", n, tau, sizes.context, sizes.batch_sizes[0]),
      )
    )
  return cases


def cache(bench: Bench, sizes: Sizes) -> list[Case]:
  """Decode steps with Clean Cache, with the standard cache and without a cache.

  "none" has no cache: every member runs the whole sequence. "none, clean history" has no cache
  but a clean history, which one pass computes for all members. The standard cache is assumed to
  activate as many unique experts as Clean Cache.
  """
  n, tau, length = 8, bench.temperature, sizes.cache_context
  box = bench.clean_history(length)
  unique = bench.unique_experts([n], tau, box)[n]
  clean = _step(bench, n, tau, length, 1, unique)
  clean = dataclasses.replace(clean, baseline=clean.key)
  standard = bench.roster(n, tau, cache="standard")
  own = bench.empty(standard, length, 1)
  bench.fill(standard, own).run(1)
  needs = floor(bench, standard, unique, length, histories=n) | {"unique_experts": unique}
  unknown = dict.fromkeys(needs)
  others = {
    "standard": (bench.step(standard, own), needs),
    "none": (bench.recomputed_step(standard, length), unknown),
    "none, clean history": (bench.recomputed_step(bench.roster(n, tau), length), unknown),
  }
  return [clean] + [
    dataclasses.replace(clean, variant=name, parts=((call, 1),), **of)
    for name, (call, of) in others.items()
  ]


def late(bench: Bench, sizes: Sizes) -> list[Case]:
  """Noise in the second half of the layers only, with the first half computed once for all
  members or for each member."""
  n, layers = 16, bench.config.num_layers
  first = layers // 2
  temperatures = [0.0] * first + [bench.temperature] * (layers - first)
  box = bench.clean_history(sizes.context)
  unique = bench.unique_experts([n], temperatures, box)[n]
  rosters = {
    name: bench.roster(n, temperatures, noisy_layers=noisy)
    for name, noisy in (("late tiling", (first, layers)), ("all layers", (0, layers)))
  }
  return [
    Case(
      name,
      n,
      bench.temperature,
      sizes.context,
      1,
      ((bench.step(roster, box), 1),),
      ("late tiling", n, bench.temperature, sizes.context, 1),
      unique,
      **floor(bench, roster, unique, sizes.context),
    )
    for name, roster in rosters.items()
  ]


def scoring(bench: Bench, sizes: Sizes) -> list[Case]:
  """Teacher-forced scoring of one sequence.

  A roster needs a clean pass and then chunks of positions of all members, and the time of the
  middle chunk is multiplied by the number of chunks. The baseline (n = 1) needs one pass only.
  """
  length = sizes.score_tokens - 1
  box = bench.clean_history(length)
  chunks = -(-length // min(bench_lib.SCORE_CHUNK, length))
  cases = []
  prefill = bench.fill(bench.roster(1, 0.0), box)
  for n, tau in ((1, 0.0), (8, 0.0), (8, bench.temperature), (64, bench.temperature)):
    parts = ((bench.score_chunk(bench.roster(n, tau), box), chunks),)
    if n > 1:
      parts = ((prefill, 1), *parts)
    cases.append(
      Case("scoring", n, tau, length, 1, parts, ("scoring", 1, 0.0, length, 1), tokens=length)
    )
  return cases


def aggregation(bench: Bench, sizes: Sizes) -> list[Case]:
  """A chunk of scoring with each aggregation, whose cost grows with the vocabulary."""
  n, length = 4, sizes.score_tokens - 1
  box = bench.clean_history(length)

  def case(variant, n, tau, **settings):
    call = bench.score_chunk(bench.roster(n, tau, **settings), box)
    return Case(variant, n, tau, length, 1, ((call, 1),), ("baseline", 1, 0.0, length, 1))

  return [case("baseline", 1, 0.0)] + [
    case(name, n, bench.temperature, aggregation=name) for name in AGGREGATIONS
  ]


def samplers(bench: Bench, sizes: Sizes) -> list[Case]:
  """Decode steps of the baseline with each kind of sampling."""
  box = bench.clean_history(sizes.context)
  return [
    Case(
      name,
      1,
      0.0,
      sizes.context,
      1,
      ((bench.step(bench.roster(1, 0.0), box, sampler), 1),),
      ("greedy", 1, 0.0, sizes.context, 1),
    )
    for name, sampler in (
      ("greedy", Sampler.create()),
      ("temperature 0.7", Sampler.create(0.7)),
      ("temperature 0.7, top-k 40", Sampler.create(0.7, 40)),
      ("temperature 0.7, top-p 0.95", Sampler.create(0.7, 0, 0.95)),
    )
  ]


def kernels(bench: Bench, sizes: Sizes) -> list[Case]:
  """Decode steps with the native kernels and with XLA's code alone."""
  tau, box = bench.temperature, bench.clean_history(sizes.context)
  unique, cases = bench.unique_experts(sizes.num_members, tau, box), []
  for n in sizes.num_members:
    native_step = bench.step(bench.roster(n, tau), box)
    with native.turned_off():
      # With a strategy of its own, the program is traced again.
      xla_step = bench.step(bench.roster(n, tau, expert_strategy="tiled_loop"), box)
    cases += [
      Case(
        variant,
        n,
        tau,
        sizes.context,
        1,
        ((call, 1),),
        baseline=("native", n, tau, sizes.context, 1),
        unique_experts=unique[n],
        **floor(bench, bench.roster(n, tau), unique[n], sizes.context),
      )
      for variant, call in (("native", native_step), ("XLA", xla_step))
    ]
  return cases


def drafts(bench: Bench, sizes: Sizes) -> list[Case]:
  """Tokens of a roster by steps and by rounds of drafted tokens that are all kept.

  Times are those of a token. A round reads what each of its steps of the clean member and at least
  what one step of the roster needs, and does the FLOPs of as many steps of the roster.
  """
  n, tau, length = 32, bench.temperature, sizes.context
  box = bench.clean_history(length)
  unique = bench.unique_experts([1, n], tau, box)
  steps = {m: _step(bench, m, tau, length, 1, unique[m]) for m in (1, n)}
  cases = [
    dataclasses.replace(steps[1], variant="baseline", baseline=("step", n, tau, length, 1)),
    dataclasses.replace(steps[n], variant="step", baseline=("step", n, tau, length, 1)),
  ]
  clean, full = (steps[m].floor_bytes or 0.0 for m in (1, n))
  for count in DRAFTS:
    call = bench.step(bench.roster(n, tau), box, drafts=count)
    changes = dict(variant=f"drafts of {count}", parts=((call, 1 / count),))
    cases.append(dataclasses.replace(cases[1], floor_bytes=clean + full / count, **changes))
  return cases


def adaptive(bench: Bench, sizes: Sizes) -> list[Case]:
  """A chunk of scoring with members at a share of the positions, and steps that may stop early.

  The thresholds are quantiles of the clean member's largest probability in the chunk. Random
  weights settle no token, so the steps show what checks cost that stop nothing.
  """
  n, tau, length = 8, bench.temperature, sizes.score_tokens - 1
  box = bench.clean_history(length)
  top = bench.top_probabilities(box)
  reference = ("all members", n, tau, length, 1)

  def case(variant, call, **settings):
    return Case(variant, n, tau, length, 1, ((call, 1),), reference, **settings)

  cases = []
  for share in SHARES:
    threshold = float(np.quantile(top, share)) if share < 1 else 1.0
    settings = {"unsure": f"top_probability<{threshold!r}"} if share < 1 else {}
    call = bench.score_chunk(bench.roster(n, tau, **settings), box)
    unsure = float((top < np.float32(threshold)).mean())
    name = f"unsure at {100 * unsure:.0f} %" if settings else reference[0]
    cases.append(case(name, call, tokens=len(top), options={"unsure_share": unsure}))
  step = ("step", n, tau, length, 1)
  for name, settings in (("step", {}), ("step, exact stop", {"member_stop": "exact"})):
    call = bench.step(bench.roster(n, tau, **settings), box)
    cases.append(dataclasses.replace(case(name, call), baseline=step))
  return cases


SWEEPS: dict[str, Callable[[Bench, Sizes], list[Case]]] = {
  "decode": decode,
  "context": context,
  "batch": batch,
  "cache": cache,
  "late": late,
  "scoring": scoring,
  "aggregation": aggregation,
  "samplers": samplers,
  "kernels": kernels,
  "drafts": drafts,
  "adaptive": adaptive,
}
