"""The same model and roster in Hugging Face transformers, as cases of the benchmark.

Needs torch and transformers; imported only where they are installed.
"""

import itertools
import time
from typing import Any

import jax
import numpy as np
import torch

from experiments.benchmarks import random_models, sweeps, transformers_stock
from experiments.benchmarks.bench import Bench, Call
from experiments.benchmarks.sweeps import Case, Sizes
from experiments.benchmarks.transformers_stock import StockRoster
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig

FAMILIES = ("olmoe", "mixtral")
NUM_MEMBERS = (1, 4, 16, 32)
# `batched_mm` gathers the weights of every token's experts: hopeless beyond this.
GATHERED_BYTES = 2**29


def obstacle(config: ModelConfig, checkpoint: str | None, platform: str) -> str | None:
  """Returns why transformers cannot run the model, or None."""
  del checkpoint
  if config.formats or config.family not in FAMILIES:
    return f"only {' and '.join(FAMILIES)} without quantized weights can be"
  if platform == "cpu" or (platform == "gpu" and torch.cuda.is_available()):
    return None
  return f"torch cannot use this {platform}"


def needed_bytes(config, sizes: Sizes) -> int:
  """Memory on top of roe_jax's own: a second copy of the weights, and the members' caches."""
  copies = 2 * max(NUM_MEMBERS)  # two while a cache is copied
  return (
    params_lib.num_bytes(config)
    + GATHERED_BYTES
    + copies * random_models.cache_bytes(config, sizes.context + 1)
  )


def cases(bench: Bench, sizes: Sizes, num_cores: int) -> list[Case]:
  """Returns the cases of a `Comparison` for all `NUM_MEMBERS`."""
  torch.set_num_threads(num_cores)
  comparison = Comparison(bench, sizes.context)
  return [case for n in NUM_MEMBERS for case in comparison.of(n)]


class Comparison:
  """Decode steps at τ > 0 in roe_jax and in transformers, with the same weights and tokens.

  For each n transformers uses the expert implementation and cache that were fastest in a short
  trial, without torch.compile.
  """

  def __init__(self, bench: Bench, context: int):
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    self._bench, self._context = bench, context
    self._model = transformers_stock.build(bench.config, bench.config.dtype, device)
    transformers_stock.copy_params(bench.params, self._model)
    self._box = bench.clean_history(context)
    self._unique = bench.unique_experts(NUM_MEMBERS, bench.temperature, self._box)
    self._expected = bench.log_probs(bench.roster(1, 0.0), self._box, 0)

  def of(self, n: int) -> tuple[Case, Case]:
    """Returns the case of roe_jax, and that of transformers, for n of `NUM_MEMBERS` members."""
    bench, context, tau = self._bench, self._context, self._bench.temperature
    shared: dict[str, Any] = dict(
      num_members=n,
      temperature=tau,
      context=context,
      batch_size=1,
      baseline=("roe_jax", n, tau, context, 1),
      unique_experts=self._unique[n],
      **sweeps.floor(bench, bench.roster(n, tau), self._unique[n], context),
    )
    call = bench.step(bench.roster(n, tau), self._box)
    ours = Case("roe_jax", parts=((call, 1),), **shared)
    call, options = _fastest(bench, self._model, context, n, self._expected)
    return ours, Case("transformers", parts=((call, 1),), options=options, **shared)


def _fastest(bench, model, context, n, expected):
  """Tries each cache and expert implementation; returns the fastest one's call and settings."""
  config = bench.config
  gathered = n * config.experts_per_token * 3 * config.d_model * config.d_expert
  names = [
    name
    for name in transformers_stock.EXPERTS
    if name != "batched_mm" or gathered * model.dtype.itemsize <= GATHERED_BYTES
  ]
  text = torch.tensor(bench.text(1, context), dtype=torch.long, device=model.device)
  samples = [torch.tensor(s, dtype=torch.long, device=model.device) for s in bench.samples(1)]
  best, shortest = None, float("inf")
  for cache, experts in itertools.product(transformers_stock.CACHES, names):
    roster = StockRoster(
      model, n, bench.temperature, experts=experts, cache=cache, capacity=context + 1
    )
    try:
      roster.prefill(text)
      log_probs = roster.step(samples[0])
      call = _call(roster, context, samples)
      call.run(1)
      begin = time.perf_counter()
      call.run(2)
      seconds = time.perf_counter() - begin
    except (RuntimeError, NotImplementedError):
      continue  # an implementation that does not run here or at this size
    if seconds < shortest:
      options: dict[str, Any] = {"cache": cache, "experts": experts}
      best, shortest = (call, options), seconds
      if n == 1:
        options["difference"] = float(np.abs(log_probs.cpu().numpy() - expected).max())
  if best is None:
    raise ValueError(
      "no expert implementation of transformers runs on this machine: give --transformers=no"
    )
  return best


def _call(roster, context, samples):
  turns = itertools.cycle(samples)

  def run(count):
    for _ in range(count):
      roster.length = context
      roster.step(next(turns))
    if roster.model.device.type == "cuda":
      torch.cuda.synchronize()

  return Call(run)
