"""Time, memory, power and active experts of generation with rosters, for figures 4 and 5b.

A call generates tokens after prompts, including prefill but not compilation. Calls take turns
in changing order, each round on other prompts, and ratios are within rounds. Prompts are
truncated on the left to one length, so that one program serves all of them. At τ = 0 all
members are computed, as in the paper, but use the same experts, which hides what a roster
reads when its members differ; hence τ > 0 is measured, too.
"""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments import tasks
from experiments.analysis.paired_statistics import Estimate
from experiments.benchmarks import machine, power, timing
from experiments.cli import app
from experiments.figures import figure_models
from experiments.figures.figure_run import FigureRun, Measurements
from roe_jax import batching, decode, diagnostics, prefill
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler


@dataclasses.dataclass(frozen=True)
class Config:
  """The measurement.

  Attributes:
    task: whose prompts are continued.
    prompts: number of prompts, the first of the test split.
    prompt_length: tokens kept of each.
    new_tokens: tokens generated after each.
    members: n, ascending from 1.
    uncached: n measured without a cache, one sequence at a time.
    temperatures: τ of all layers.
    batch_sizes: sequences per batch.
    rounds: calls of each case.
  """

  num_seeds: ClassVar[int] = 1
  task: str = "paper/gsm8k"
  prompts: int = 100
  prompt_length: int = 128
  new_tokens: int = 128
  members: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
  uncached: tuple[int, ...] = (1, 4, 16)
  temperatures: tuple[float, ...] = (0.0, 0.2)
  batch_sizes: tuple[int, ...] = (1, 16)
  rounds: int = 10


CONFIGS = figure_models.configs(
  Config(),
  embedded=Config(
    task="wordmath",
    prompt_length=48,
    new_tokens=32,
    uncached=(1, 4),
    temperatures=(0.0, 0.3),
    members=(1, 4, 16, 64),
    batch_sizes=(1, 8),
    rounds=7,
  ),
)


@dataclasses.dataclass(frozen=True)
class Case:
  """A compiled way of generating tokens.

  Attributes:
    call: `call(count)` runs it `count` times.
    bytes: arguments and temporaries of the compiled program; None: not reported.
  """

  call: Callable[[int], object]
  bytes: int | None


def case(
  params: Params,
  config: ModelConfig,
  roster: Roster,
  prompts: Sequence[Sequence[int]],
  batch_size: int,
  new_tokens: int,
) -> Case:
  """Compiles generation after prompts, which take turns from call to call.

  Args:
    params: the model's parameters.
    config: its architecture.
    roster: the settings.
    prompts: token ids, all of one length.
    batch_size: sequences per batch.
    new_tokens: tokens generated for every sequence.
  """
  params = params_lib.in_storage_dtype(params)  # as in generation
  slots = batching.bucket(batch_size)
  capacity = prefill.capacity_for(config, prompts, new_tokens)
  parts = itertools.cycle(
    [prompts[i : i + batch_size] for i in range(0, len(prompts) - batch_size + 1, batch_size)]
  )
  stops, steps = jnp.full(4, -1, jnp.int32), jnp.int32(new_tokens)

  def begin():
    return decode.start(
      params, config, roster, next(parts), range(batch_size), new_tokens, slots, capacity
    )

  program = timing.compiled(
    decode.decode_steps, params, config, roster, Sampler.greedy(), begin(), stops, steps
  )

  def call(count):
    for _ in range(count):
      state, _ = program(params, roster, Sampler.greedy(), begin(), stops, steps)
    jax.block_until_ready(state)

  memory = timing.memory(program)
  return Case(call, sum(memory.values()) if memory else None)


def all_members(config: ModelConfig, n: int, tau: float | Sequence[float], **settings) -> Roster:
  """Makes a roster whose members run all layers, even at τ = 0."""
  return Roster.create(config, n, tau, noisy_layers=(0, config.num_layers), **settings)


def prompts_of(run: FigureRun, config: Config, tokenizer) -> list[list[int]]:
  """Returns prompts truncated on the left to one length, without shorter ones.

  Raises:
    ValueError: too few prompts are long enough.
  """
  examples = tasks.get(config.task).examples("test", run.data_dir, config.prompts)
  encoded = [tokenizer.encode(e.prompt) for e in examples]
  long = [e[-config.prompt_length :] for e in encoded if len(e) >= config.prompt_length]
  if len(long) < max(config.batch_sizes):
    raise ValueError(
      f"{len(long)} of {len(encoded)} prompts of {config.task} have {config.prompt_length} tokens, "
      f"fewer than a batch of {max(config.batch_sizes)}: allow shorter ones with "
      "--set=prompt_length=..."
    )
  return long


def timings(seconds: np.ndarray, first: np.ndarray, tokens: int) -> dict[str, Any]:
  """Returns milliseconds per token (median and quartiles), and the ratio to the first case."""
  low, median, high = timing.quartiles(1e3 * seconds / tokens)
  return {
    "ms_per_token": Estimate(median, low, high),
    "time_ratio": timing.median_ratio(seconds, first),
    "rounds": int(np.isfinite(seconds).sum()),
  }


def measure(run: FigureRun, config: Config) -> list[dict[str, Any]]:
  """Returns a record per (batch, cache, τ, n), measured once for all figures that show them."""
  settings = run.settings | {"figure": "overhead", "config": dataclasses.asdict(config)}
  keep = Measurements(run.root / "overhead" / "measured.jsonl", settings)
  groups = [
    (batch_size, cached)
    for batch_size in config.batch_sizes
    for cached in (True, False)
    if cached or batch_size == config.batch_sizes[0]
  ]
  opened = None
  found = []
  for batch_size, cached in groups:
    name = f"batch {batch_size}, {'with' if cached else 'without'} cache"
    if opened is None and name not in keep:
      params, model, tokenizer = app.open_model(run.model.checkpoint, None, run.model.mesh)
      opened = params, model, prompts_of(run, config, tokenizer)
    found += keep.get(name, lambda: _group(opened, config, batch_size, cached))
  return found


def _group(opened, config, batch_size, cached):
  params, model, prompts = opened
  nvml = power.load_nvml()
  sizes = [
    (tau, n) for tau in config.temperatures for n in (config.members if cached else config.uncached)
  ]
  cache = "clean" if cached else "none"
  rosters = {key: all_members(model, key[1], key[0], cache=cache) for key in sizes}
  cases = {
    key: case(params, model, roster, prompts, batch_size, config.new_tokens)
    for key, roster in rosters.items()
  }
  for c in cases.values():
    c.call(1)  # compiles prefill, too
  seconds = timing.take_turns({key: c.call for key, c in cases.items()}, config.rounds)
  records = []
  for tau, n in sizes:
    watts = power.mean_watts(nvml, lambda: cases[tau, n].call(1))
    spent = seconds[tau, n]
    experts = None
    if cached:
      some = prompts[:batch_size]
      starts = [len(prompt) // 2 for prompt in some]
      found = diagnostics.unique_experts(
        params, model, rosters[tau, n], some, starts, batch_size=batch_size
      )
      experts = float(found.by_step.mean())
    records.append(
      {
        "batch": batch_size,
        "cache": "Clean Cache" if cached else "no cache",
        "τ": tau,
        "n": n,
        **timings(spent, seconds[tau, sizes[0][1]], config.new_tokens),
        "bytes": cases[tau, n].bytes,
        "watts": watts,
        "joules_per_token": None
        if watts is None
        else watts * float(np.nanmedian(spent)) / (config.new_tokens * batch_size),
        "unique_experts": experts,
        "num_experts": model.num_experts,
        "peak_device_bytes": machine.peaks().get("peak_device_bytes"),
      }
    )
  return records


def label(record: dict[str, Any]) -> str:
  """Returns the label of a record's series."""
  return f"{record['cache']}, τ = {record['τ']:g}, batch {record['batch']}"


def series(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
  """Groups records by their series, one line of a picture."""
  found: dict[str, list[dict[str, Any]]] = {}
  for r in records:
    found.setdefault(label(r), []).append(r)
  return found
