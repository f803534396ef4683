"""The same model and roster in Hugging Face transformers, as cases beside roe_jax's.

Needs torch and transformers; is imported where they are.
"""

import itertools

import jax
import numpy as np
import torch

from experiments.benchmarks import random_models, transformers_roster, transformers_stock
from experiments.benchmarks.bench import Bench, Call
from experiments.benchmarks.sweeps import Case, Sizes
from experiments.benchmarks.transformers_roster import TransformersRoster
from experiments.benchmarks.transformers_stock import StockRoster
from roe_jax import members as members_lib
from roe_jax import params as params_lib

NUM_MEMBERS = (1, 4, 16, 32)
# `batched_mm` gathers the weights of every row's experts: hopeless beyond this.
GATHERED_BYTES = 2**29
# What neither waits for the device nor has shapes that depend on values.
CAPTURABLE = ("grouped_mm", "batched_mm", "dense", "deepgemm", "sonicmoe")


def runs_on(platform: str) -> bool:
  """Whether torch can use what JAX uses here: anything else would be no comparison."""
  return platform == "cpu" or (platform == "gpu" and torch.cuda.is_available())


def needed_bytes(config, sizes: Sizes) -> int:
  """Memory beside roe_jax's own: the weights once more, and the members' caches."""
  copies = 2 * max(NUM_MEMBERS)  # in the making there are two
  return (
    params_lib.num_bytes(config)
    + GATHERED_BYTES
    + copies * random_models.cache_bytes(config, sizes.context + 1)
  )


def cases(bench: Bench, sizes: Sizes, num_cores: int) -> list[Case]:
  """Decode steps at τ > 0: roe_jax, transformers, and transformers hand-tuned.

  The weights, the prompt and the tokens are the same. For each n the two in
  transformers use whichever implementation of the experts (and, for the stock
  modules, which cache) is fastest in a short trial. The stock modules run
  without torch.compile; on CUDA the hand-tuned roster may be a CUDA graph.
  """
  torch.set_num_threads(num_cores)
  device = "cuda" if jax.default_backend() == "gpu" else "cpu"
  model = transformers_roster.build(bench.config, bench.config.dtype, device)
  transformers_stock.copy_params(bench.params, model)
  stock, tuned = transformers_stock.twin(model), transformers_stock.twin(model)
  rivals = _Rivals(bench, sizes.context, device, stock, tuned)
  tau, box, found = bench.temperature, bench.clean_history(sizes.context), []
  hits = bench.unique_experts(NUM_MEMBERS, tau, box)
  expected = _plain_log_probs(bench, sizes.context)
  for n in NUM_MEMBERS:
    base = Case(
      "roe_jax",
      n,
      tau,
      sizes.context,
      1,
      ((bench.step(bench.roster(n, tau), box), 1),),
      None,
      hits[n],
      random_models.step_bytes(bench.config, hits[n], sizes.context),
    )
    for name, call, options in (
      ("roe_jax", base.parts[0][0], {}),
      ("transformers", *rivals.fastest_stock(n, expected)),
      ("transformers, hand-tuned", *rivals.fastest_tuned(n, expected)),
    ):
      found.append(
        Case(
          name,
          n,
          tau,
          sizes.context,
          1,
          ((call, 1),),
          base.key,
          hits[n],
          base.floor_bytes,
          options=options,
        )
      )
  return found


def _plain_log_probs(bench, context):
  """What roe_jax's plain model says of the first token that is measured, `[1, V]`."""
  box = bench.clean_history(context)
  config, roster = bench.config, bench.roster(1, 0.0)

  @jax.jit
  def run(params, cache, tokens_B):
    positions, ids = (
      np.full(1, value, dtype) for value, dtype in ((context, np.int32), (0, np.uint32))
    )
    outputs, _ = members_lib.step(params, config, roster, cache, tokens_B, positions, ids)
    return outputs.log_probs[:, 0]

  return np.asarray(run(bench.params, box.cache, bench.samples(1)[0]))


class _Rivals:
  """Rosters in transformers, prefilled with the bench's text."""

  def __init__(self, bench, context, device, stock, tuned):
    self._bench, self._context, self._device = bench, context, device
    self._stock, self._tuned = stock, tuned
    self._implementations = transformers_roster.experts_implementations(tuned)
    self._text = torch.tensor(bench.text(1, context), dtype=torch.long, device=device)
    self._samples = [torch.tensor(s, dtype=torch.long, device=device) for s in bench.samples(1)]

  def fastest_stock(self, n, expected):
    """The call and its settings."""
    names = [
      name
      for name in transformers_stock.EXPERTS
      if name in self._implementations and not self._hopeless(name, n)
    ]
    return self._fastest(
      {
        (cache, name): self._stock_roster(n, cache, name)
        for cache in transformers_stock.CACHES
        for name in names
      },
      ("cache", "experts"),
      expected,
    )

  def fastest_tuned(self, n, expected):
    """The call and its settings."""
    names = [name for name in self._implementations if not self._hopeless(name, n)]
    runs = [(name, "eager") for name in names]
    if self._device == "cuda":
      runs += [(name, "graph") for name in names if name in CAPTURABLE]
    return self._fastest(
      {(name, run): self._tuned_roster(n, name, run) for name, run in runs},
      ("experts", "run"),
      expected,
    )

  def _hopeless(self, name, n):
    config = self._bench.config
    gathered = (
      n
      * config.experts_per_token
      * 3
      * config.d_model
      * config.d_expert
      * self._stock.dtype.itemsize
    )
    return name == "batched_mm" and gathered > GATHERED_BYTES

  def _stock_roster(self, n, cache, experts):
    return lambda: StockRoster(
      self._stock,
      n,
      self._bench.temperature,
      experts=experts,
      cache=cache,
      capacity=self._context + 1,
    )

  def _tuned_roster(self, n, experts, run):
    return lambda: TransformersRoster(
      self._tuned, n, self._bench.temperature, experts=experts, capacity=self._context + 1, run=run
    )

  def _fastest(self, makers, names, expected):
    """Tries each and keeps the fastest: its call and what it is."""
    best, seconds = None, float("inf")
    for setting, make in makers.items():
      try:
        roster = make()
        roster.prefill(self._text)
        log_probs = roster.step(self._samples[0])
        call = self._call(roster)
        taken = transformers_roster.time_each(lambda _: call.run(1), [""], repeats=2)[""]
      except (RuntimeError, NotImplementedError):
        continue  # an implementation that does not run at this size or cannot be captured
      if taken < seconds:
        best, seconds = (call, dict(zip(names, setting))), taken
        if roster.num_members == 1:
          best[1]["difference"] = float(np.abs(log_probs.cpu().numpy() - expected).max())
    if best is None:
      raise ValueError(
        "no implementation of the experts in transformers runs here: give --transformers=no"
      )
    return best

  def _call(self, roster):
    turns = itertools.cycle(self._samples)

    def run(count):
      for _ in range(count):
        roster.length = self._context
        roster.step(next(turns))
      if self._device == "cuda":
        torch.cuda.synchronize()

    return Call(run)
