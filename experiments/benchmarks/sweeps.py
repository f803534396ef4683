"""What is compared with what: each sweep is a list of cases that take turns."""

from collections.abc import Callable
import dataclasses

from experiments.benchmarks import bench as bench_lib
from experiments.benchmarks import random_models
from experiments.benchmarks.bench import Bench, Call


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What the flags say.

  Attributes:
    num_members: n of the sweeps of decoding.
    context: positions before a step where nothing else is said.
    contexts: of the sweep of contexts.
    batch_sizes: of the sweep of batches.
    cache_context: positions before a step where caches are compared.
    score_tokens: length of the text that is scored.
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
    variant: what it is, within its sweep.
    num_members: n.
    temperature: τ.
    context: positions before the step, or in the text that is scored.
    batch_size: B.
    parts: calls that are timed, and how often each counts.
    baseline: `(variant, n, τ, context, B)` of the case that it is compared to;
      None for what needs no comparison.
    unique_experts: different experts chosen in a layer, mean.
    floor_bytes: what must be read at least.
    tokens: that are scored.
    options: what else was settled.
  """

  variant: str
  num_members: int
  temperature: float
  context: int
  batch_size: int
  parts: tuple[tuple[Call, int], ...]
  baseline: tuple | None = None
  unique_experts: float | None = None
  floor_bytes: float | None = None
  tokens: int | None = None
  options: dict = dataclasses.field(default_factory=dict)

  @property
  def key(self) -> tuple:
    return (self.variant, self.num_members, self.temperature, self.context, self.batch_size)

  @property
  def memory(self) -> dict[str, int]:
    """Of the part that takes most."""
    return max((call.memory for call, _ in self.parts), key=lambda m: m.get("temp_bytes", 0))


def _step(
  bench: Bench, n: int, tau: float, context: int, batch_size: int, hit: float, **settings
) -> Case:
  """A decode step under Clean Cache whose baseline is the given one."""
  box = bench.clean_history(context, batch_size)
  floor = random_models.step_bytes(bench.config, hit, context, batch_size)
  return Case(
    "clean",
    n,
    tau,
    context,
    batch_size,
    ((bench.step(bench.roster(n, tau), box), 1),),
    unique_experts=hit,
    floor_bytes=floor,
    **settings,
  )


def decode(bench: Bench, sizes: Sizes) -> list[Case]:
  """Decode steps against n, at τ = 0 (members that all do the same, as the paper
  measured) and at τ > 0."""
  cases, box = [], bench.clean_history(sizes.context)
  for tau in (0.0, bench.temperature):
    hits = bench.unique_experts(sizes.num_members, tau, box)
    for n in sizes.num_members:
      cases.append(
        _step(
          bench,
          n,
          tau,
          sizes.context,
          1,
          hits[n],
          baseline=("clean", sizes.num_members[0], tau, sizes.context, 1),
        )
      )
  return cases


def context(bench: Bench, sizes: Sizes) -> list[Case]:
  """Decode steps against the length of the context."""
  n, tau, cases = 16, bench.temperature, []
  for length in sizes.contexts:
    hit = bench.unique_experts([n], tau, bench.clean_history(length))[n]
    cases.append(
      _step(bench, n, tau, length, 1, hit, baseline=("clean", n, tau, sizes.contexts[0], 1))
    )
  return cases


def batch(bench: Bench, sizes: Sizes) -> list[Case]:
  """Decode steps against the number of texts."""
  n, tau, cases = 8, bench.temperature, []
  for size in sizes.batch_sizes:
    hit = bench.unique_experts([n], tau, bench.clean_history(sizes.context, size))[n]
    cases.append(
      _step(
        bench,
        n,
        tau,
        sizes.context,
        size,
        hit,
        baseline=("clean", n, tau, sizes.context, sizes.batch_sizes[0]),
      )
    )
  return cases


def cache(bench: Bench, sizes: Sizes) -> list[Case]:
  """Clean Cache, standard cache and none.

  "none" is a token's cost without any cache: every member runs the whole text.
  "none, clean history" is that with Clean Cache's history, which one pass
  makes for all members. The number of different experts under the standard
  cache is taken to be that under Clean Cache.
  """
  n, tau, length = 8, bench.temperature, sizes.cache_context
  box = bench.clean_history(length)
  hit = bench.unique_experts([n], tau, box)[n]
  clean = _step(bench, n, tau, length, 1, hit)
  clean = dataclasses.replace(clean, baseline=clean.key)
  standard = bench.roster(n, tau, cache="standard")
  own = bench.empty(standard, length, 1)
  bench.fill(standard, own).run(1)
  others = {
    "standard": (bench.step(standard, own), random_models.step_bytes(bench.config, hit, length, n)),
    "none": (bench.recomputed_step(standard, length), None),
    "none, clean history": (bench.recomputed_step(bench.roster(n, tau), length), None),
  }
  return [clean] + [
    dataclasses.replace(
      clean,
      variant=name,
      parts=((call, 1),),
      floor_bytes=floor,
      unique_experts=hit if floor else None,
    )
    for name, (call, floor) in others.items()
  ]


def late(bench: Bench, sizes: Sizes) -> list[Case]:
  """Noise in the second half of the layers only: the first half once for all members,
  and for each."""
  n, layers = 16, bench.config.num_layers
  first = layers // 2
  temperatures = [0.0] * first + [bench.temperature] * (layers - first)
  box = bench.clean_history(sizes.context)
  hit = bench.unique_experts([n], temperatures, box)[n]
  floor = random_models.step_bytes(bench.config, hit, sizes.context)
  return [
    Case(
      name,
      n,
      bench.temperature,
      sizes.context,
      1,
      ((bench.step(bench.roster(n, temperatures, noisy_layers=noisy), box), 1),),
      ("late tiling", n, bench.temperature, sizes.context, 1),
      hit,
      floor,
    )
    for name, noisy in (("late tiling", (first, layers)), ("all layers", (0, layers)))
  ]


def scoring(bench: Bench, sizes: Sizes) -> list[Case]:
  """Teacher-forced scoring of one text.

  One clean pass over it, and chunks of positions of all members: the chunk in
  the middle is timed, and counts as often as there are chunks. The plain model
  (n = 1) needs the one pass only, with scores.
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


SWEEPS: dict[str, Callable[[Bench, Sizes], list[Case]]] = {
  "decode": decode,
  "context": context,
  "batch": batch,
  "cache": cache,
  "late": late,
  "scoring": scoring,
}
