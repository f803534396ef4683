"""The stages of `experiments.accelerator`: what is measured on a device, most valuable first."""

import functools
import importlib.util
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import bench as bench_lib
from experiments.benchmarks import (
  expert_kernels,
  floors,
  machine,
  power,
  random_models,
  scope_times,
  timing,
)
from experiments.benchmarks.bench import Bench
from experiments.benchmarks.floors import Rates
from experiments.benchmarks.supervisor import Case, Stage
from experiments.cli import app
from experiments.figures import overhead
from experiments.tasks import wordmath
from roe_jax import costs, decode
from roe_jax.model_formats import EMBEDDED
from roe_jax.roster import Roster

TAU = 0.5  # of noisy rosters
PROBLEMS, NEW_TOKENS = 50, 48  # of the embedded models
# Without CUDA graphs, whose kernels a profiler does not attribute to instructions.
_NO_GRAPHS = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer="}


def machine_stage(toy: bool | None) -> Stage:
  """Returns the stage that measures the device; `toy` None: small sizes on CPUs."""
  case = Case("rates", functools.partial(_rates, toy), 90)
  return Stage("machine", "Device", 90, _nothing, [case])


def _nothing():
  jax.devices()  # a device that cannot be used is reported here


def _rates(toy, _):
  return floors.measure(jax.default_backend() == "cpu" if toy is None else toy)


def stages(toy: bool, rates: Rates) -> list[Stage]:
  """Returns all stages but that of the machine, with limits for a budget of 480 seconds."""
  open_bench = functools.partial(_Steps, toy, rates)
  found = [
    Stage(
      "experts",
      "Expert layers",
      150,
      functools.partial(expert_kernels.Layers, toy, rates),
      expert_kernels.cases(toy),
    ),
    Stage("steps", "Decode steps and scoring", 110, open_bench, _step_cases(toy)),
    Stage("profile", "Time by scope", 45, open_bench, _profile_cases(toy), environment=_NO_GRAPHS),
    Stage(
      "cpu_tokens",
      "Embedded models on the CPU",
      40,
      _nothing,
      _token_cases(toy),
      environment={"JAX_PLATFORMS": "cpu"},
    ),
    Stage("tokens", "Embedded models", 40, _nothing, _token_cases(toy)),
    Stage(
      "figure4", "Generation (figure 4)", 60, functools.partial(_Generation, toy), _figure(toy)
    ),
  ]
  if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
    found.append(
      Stage(
        "transformers",
        "transformers",
        60,
        functools.partial(_open_stock, toy),
        [
          Case(f"n={n}", functools.partial(_stock, n), 60)
          for n in ((1, 4) if toy else (1, 32, 16, 4))
        ],
        environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
      )
    )
  return found


def _model(toy):
  return random_models.PRESETS["tiny" if toy else "olmoe-1b-7b"]


class _Steps:
  """The model with random weights, and counts of unique active experts."""

  def __init__(self, toy: bool, rates: Rates):
    self.bench, self.rates = Bench(_model(toy), TAU, 0), rates
    self.sizes = _members(toy)
    self._unique: dict[Any, dict[int, float]] = {}

  def unique(self, n: int, tau: float, context: int) -> float:
    if tau == 0:
      return self.unique(1, TAU, context)
    if context not in self._unique:
      box = self.bench.clean_history(context)
      self._unique[context] = self.bench.unique_experts(self.sizes, TAU, box)
    return self._unique[context][n]

  def call(self, variant: str, n: int, tau: float, context: int) -> tuple[bench_lib.Call, int]:
    """Returns the call and its positions."""
    bench = self.bench
    if variant == "scoring":
      return (
        bench.score_chunk(bench.roster(n, tau), bench.clean_history(context)),
        min(bench_lib.SCORE_CHUNK, context),
      )
    if variant == "clean":
      return bench.step(bench.roster(n, tau), bench.clean_history(context)), 1
    roster = bench.roster(n, tau, cache="standard")
    if variant == "none":
      return bench.recomputed_step(roster, context), 1
    box = bench.empty(roster, context, 1)
    bench.fill(roster, box).run(1)
    return bench.step(roster, box), 1

  def floor(self, variant, n, tau, context, positions):
    """Returns unique active experts, bytes and FLOPs; the second and third as a pair."""
    config = self.bench.config
    if variant == "clean" or variant == "standard":
      unique = self.unique(n, tau, context)
    elif variant == "scoring":
      unique = costs.expected_unique_experts(config, 1, positions)
    else:
      return None
    histories = n if variant == "standard" else 1
    last = range(context - positions + 1, context + 1)
    return unique, (
      random_models.step_bytes(config, unique, context, histories),
      costs.forward_flops(config, self.bench.roster(n, tau), last),
    )


def _members(toy):
  return (1, 4) if toy else (1, 8, 32, 64)


def _step_cases(toy):
  short, long = (16, 32) if toy else (128, 2048)
  sizes = _members(toy)
  keys = [
    *(("clean", n, TAU, short) for n in (sizes[0], *sizes[:0:-1])),
    *(("clean", n, 0.0, short) for n in (sizes[0], *sizes[:0:-1])),
    *(("scoring", n, TAU, long) for n in sizes[::2]),
    *(("clean", n, TAU, long) for n in (sizes[-1], sizes[0])),
    ("standard", sizes[1], TAU, short),
    ("none", sizes[1], TAU, short),
    *(("clean", n, 0.0, long) for n in (sizes[-1], sizes[0])),
    ("standard", sizes[1], TAU, long),
    *(("clean", n, TAU, long) for n in sizes[1:-1]),
    ("none", sizes[1], TAU, long),
  ]
  return [
    Case("{} n={} tau={} context={}".format(*key), functools.partial(_step, key), 60)
    for key in keys
  ]


def _step(key, steps):
  call, positions = steps.call(*key)
  call.run(1)
  count = 1 if key[0] in ("none", "scoring") else 16
  seconds = floors.median_seconds(lambda: call.run(count), rounds=7, budget=2.0) / count
  record = {"ms": 1e3 * seconds}
  if floor := steps.floor(*key, positions):
    record = {"unique_experts": floor[0]} | steps.rates.compare(seconds, *floor[1])
  names = ("variant", "num_members", "temperature", "context")
  return dict(zip(names, key)) | {"positions": positions} | record | call.memory | machine.peaks()


def _profile_cases(toy):
  context = 16 if toy else 128
  sizes = (4,) if toy else (1, 32, 64)
  return [
    Case(f"n={n}", functools.partial(_profile, ("clean", n, TAU, context)), 60) for n in sizes
  ]


def _profile(key, steps):
  call, _ = steps.call(*key)
  return {"num_members": key[1]} | scope_times.profile(call.run, call.hlo(), 8)


def _token_cases(toy):
  names = ("wordmath_control", "wordmath_overtrained")[: 1 if toy else 2]
  return [
    Case(name, functools.partial(_tokens, name, 4 if toy else PROBLEMS), 90) for name in names
  ]


def _tokens(name, count, _):
  """Greedy completions of a roster, whose noise must be that of any other device."""
  params, config, tokenizer = app.open_model(EMBEDDED + name, "float32")
  problems = [wordmath.problem("test", i) for i in range(count)]
  found = decode.generate(
    params,
    config,
    [tokenizer.encode(wordmath.prompt(p)) for p in problems],
    max_new_tokens=NEW_TOKENS,
    roster=Roster.create(config, 4, 0.3),
    batch_size=count,
  )
  return {
    "platform": jax.default_backend(),
    "tokens": [list(map(int, c.tokens)) for c in found.completions],
  }


class _Generation:
  """Figure 4's measurement, on random weights and prompts: no file is needed."""

  def __init__(self, toy: bool):
    self.config = _model(toy)
    self.params = random_models.random_params(self.config)
    self.new_tokens, length = (4, 16) if toy else (128, 128)
    random = np.random.default_rng(0)
    self.prompts = random.integers(0, self.config.vocab_size, (4, length)).tolist()
    self.nvml = power.load_nvml()

  def measure(self, cached: bool, tau: float, n: int) -> dict[str, Any]:
    cache = "clean" if cached else "none"
    roster = overhead.all_members(self.config, n, tau, cache=cache)
    case = overhead.case(self.params, self.config, roster, self.prompts, 1, self.new_tokens)
    case.call(1)
    seconds = floors.median_seconds(lambda: case.call(1), rounds=5, budget=3.0)
    watts = power.mean_watts(self.nvml, lambda: case.call(1), seconds=1.5)
    per_token = seconds / self.new_tokens
    return {
      "cache": cache,
      "temperature": tau,
      "num_members": n,
      "ms_per_token": 1e3 * per_token,
      "bytes": case.bytes,
      "watts": watts,
      "joules_per_token": watts and watts * per_token,
      **machine.peaks(),
    }


def _figure(toy):
  sizes = (1, 4) if toy else (1, 64, 16, 4, 32, 8, 2)
  keys = [(True, 0.0, n) for n in sizes]
  if not toy:
    keys += [(True, 0.2, n) for n in (1, 64, 16)] + [(False, 0.0, n) for n in (1, 4)]
  return [
    Case(
      f"{'clean' if c else 'none'} tau={tau} n={n}", functools.partial(_generation, c, tau, n), 60
    )
    for c, tau, n in keys
  ]


def _generation(cached, tau, n, generation):
  return generation.measure(cached, tau, n)


def _open_stock(toy):
  from experiments.benchmarks import transformers_cases  # needs torch

  if obstacle := transformers_cases.obstacle(_model(toy), None, jax.default_backend()):
    raise ValueError(obstacle)
  return transformers_cases.Comparison(Bench(_model(toy), TAU, 0), 16 if toy else 128)


def _stock(n, stock):
  ours, theirs = stock.of(n)
  calls = {"roe_jax": ours.parts[0][0].run, "transformers": theirs.parts[0][0].run}
  ms = {name: 1e3 * timing.quartiles(s)[1] for name, s in timing.take_turns(calls, 5).items()}
  return {"num_members": n, "ms": ms, **theirs.options}
