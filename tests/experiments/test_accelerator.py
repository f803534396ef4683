"""The program for accelerators: deadlines, resumption, floors, traces and crossovers."""

import functools
import json
import math
import os
import signal
import time
from types import SimpleNamespace

import expert_loop
import jax
import numpy as np
import programs
import pytest

from experiments import accelerator
from experiments.benchmarks import (
  crossover_fit,
  device_stages,
  expert_kernels,
  floors,
  random_models,
  scope_times,
  supervisor,
)
from experiments.benchmarks.floors import Rates
from experiments.benchmarks.scope_times import Event
from experiments.benchmarks.supervisor import Case, Stage
from experiments.records import store
from roe_jax import native
from roe_jax.experts import choices
from roe_jax.experts.choices import Step


def opened():
  return 20


def added(number, stage):
  return {"sum": stage + number}


def hangs(stage):
  time.sleep(60)


def crashes(stage):
  os.kill(os.getpid(), signal.SIGSEGV)


def raises(stage):
  raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\ndetails")


@pytest.mark.slow
def test_cases_that_hang_crash_or_raise_are_lines_and_the_others_run(tmp_path):
  # Each case that ends its process is followed by one that needs another.
  cases = [
    Case("one", functools.partial(added, 1)),
    Case("hangs", hangs, seconds=0.5),
    Case("two", functools.partial(added, 2)),
    Case("raises", raises),
    Case("crashes", crashes),
    Case("three", functools.partial(added, 3)),
  ]
  stage = Stage("stage", "", 100, opened, cases)
  path = tmp_path / "results.jsonl"
  supervisor.run([stage], store.SavedValues(path, {}), time.monotonic() + 100)
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  values = {line["name"].removeprefix("stage/"): line["value"] for line in lines}
  assert list(values) == [c.name for c in cases]
  assert [values[n]["sum"] for n in ("one", "two", "three")] == [21, 22, 23]
  assert values["hangs"]["failed"] == "killed after 0 s"
  assert values["crashes"]["failed"] == "its process ended with exit code -11"
  assert values["raises"]["failed"] == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"


class Children:
  """In place of child processes: what they were given, and when."""

  def __init__(self, monkeypatch, seconds):
    self.ran, self.now, self._seconds = [], 0.0, seconds
    monkeypatch.setattr(supervisor, "_run_child", self.run)
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: self.now)

  def run(self, stage, todo, saved, deadline):
    for case in todo:
      if self.now + self._seconds > deadline:
        self.now = deadline
        return
      self.now += self._seconds
      self.ran.append(f"{stage.name}{case.name}")
      saved.put(f"{stage.name}/{case.name}", {})


def test_stages_keep_to_their_limits_and_share_what_is_left(monkeypatch, tmp_path):
  stages = [
    Stage("a", "", 25, opened, [Case(str(i), opened) for i in range(5)]),
    Stage("b", "", 5, opened, [Case("0", opened)]),
    Stage("c", "", 40, opened, [Case("0", opened)]),
  ]
  children, path = Children(monkeypatch, seconds=10), tmp_path / "results.jsonl"
  saved = store.SavedValues(path, {})
  supervisor.run(stages, saved, deadline=75)
  # a: 25 s hold two cases; b: 5 s hold none; c: one. Of the rest, b has the first turn.
  assert children.ran == ["a0", "a1", "c0", "b0", "a2", "a3"] and children.now == 75
  # A rerun continues with what has no line.
  children.ran.clear()
  saved = store.SavedValues(path, {})
  supervisor.run(stages, saved, deadline=1000)
  assert children.ran == ["a4"]
  # What failed is measured again only if it is forgotten.
  saved.put("c/0", {"failed": "why"})
  saved.forget("c/0")
  supervisor.run(stages, saved, deadline=2000)
  assert children.ran == ["a4", "c0"]


def test_a_floor_is_the_larger_time_of_bytes_and_flops():
  rates = Rates(bandwidth=2e12, flops=5e14)
  assert rates.floor(4e9, 1e9) == 2e-3 and rates.floor(1e3, 1e12) == 2e-3
  assert rates.compare(6e-3, 4e9, 1e9) == {"ms": 6.0, "floor_ms": 2.0, "to_floor": 3.0}
  assert [floors.steps_for(s) for s in (1.0, 1e-3, 1e-9)] == [4, 20, 512]


@pytest.mark.slow
def test_work_of_a_layer_and_the_routing_of_a_roster():
  layer = object.__new__(expert_kernels.Layer)
  layer.config = config = expert_kernels.config_of("olmoe-1b-7b", "bfloat16", toy=True)
  layer.indices, gates = expert_kernels.draw_routing(config, 64)
  layer.expert_bytes = 1e3
  e, a = config.num_experts, config.experts_per_token
  assert (e, a) == (64, 8) and layer.indices.shape == gates.shape == (expert_kernels.DRAWS, 64, a)
  assert layer.work(1) == (a, 1e3 * a, 6 * a * 128 * 64)
  unique, num_bytes, flops = layer.work(32)
  # Members of one token share experts: fewer than independent ones would use.
  assert 2 * a < unique < e * (1 - (1 - a / e) ** 32) and num_bytes == 1e3 * unique
  assert flops == 32 * layer.work(1)[2]
  np.testing.assert_allclose(gates.sum(-1), 1, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("format", [None, "mxfp4"])
def test_the_reference_of_a_layer_agrees_with_a_loop(format):
  e, f, d = 5, 32, 64
  if format is None:
    params = values = expert_loop.weights((2, e), f, d, expert_loop.CLAMPED)
  else:
    params, values = expert_loop.quantized_weights(format, (2, e), f, d, expert_loop.CLAMPED)
  x, indices, gates = expert_loop.rows(9, e, 2, d)
  actual = expert_kernels.reference(e, expert_loop.CLAMPED, params, x, indices, gates)
  values = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), values)
  expert_loop.assert_agrees(actual, expert_loop.CLAMPED, values, x, indices, gates)


@pytest.mark.slow
def test_a_strategy_that_is_wrong_is_measured_and_says_so(monkeypatch):
  rates = Rates(1e9, 1e10)
  layer = expert_kernels.Layer("olmoe-1b-7b", "float32", True, 8)
  right = layer.measure("dense", 8, rates)
  assert right["differs"] is None and right["error"] < 1e-4 and right["to_floor"] > 0
  apply = expert_kernels.experts.apply
  monkeypatch.setattr(expert_kernels.experts, "apply", lambda *args: 1.01 * apply(*args))
  assert "differs from the reference by 1.0e-02" in layer.measure("dense", 8, rates)["differs"]


def test_time_by_scope_counts_nested_and_overlapping_events_once():
  hlo = """
    %fusion.1 = f32[8]{0} fusion(%p), metadata={op_name="jit(f)/while/vmap(attention)/dot" id=1}
    %custom.2 = f32[8]{0} custom-call(%p), metadata={op_name="jit(f)/vmap(experts)/router/mul"}
    ROOT while.3 = f32[8]{0} while(%p), metadata={op_name="jit(f)/while"}
  """
  scopes = scope_times.scopes_of(hlo)
  assert scopes == {"fusion.1": "attention", "custom.2": "router", "while.3": "other"}
  ms = 1e6
  events = [
    Event("while.3", "a", 0, 10 * ms),  # contains the next two
    Event("fusion.1", "a", 1 * ms, 5 * ms),
    Event("custom.2", "a", 5 * ms, 8 * ms),
    Event("jit(f)/vmap(unembed)/dot", "b", 9 * ms, 12 * ms),  # another stream, named by its scope
    Event("fusion.1", "a", 14 * ms, 16 * ms),
  ]
  found = scope_times.by_scope(events, scopes, steps=2)
  assert found["scopes_ms"] == {"attention": 3.0, "router": 1.5, "unembed": 1.5, "other": 1.5}
  assert found["busy_ms"] == 7.0 and found["idle_ms"] == 1.0 and found["gaps_us"] == [2000.0]


def test_traces_of_devices_count_only_what_runs_on_them():
  def event(name, **stats):
    return SimpleNamespace(name=name, start_ns=1.0, duration_ns=2.0, stats=list(stats.items()))

  def plane(name, **lines):
    lines = [SimpleNamespace(name=n.replace("_", " "), events=e) for n, e in lines.items()]
    return SimpleNamespace(name=name, lines=lines)

  host = plane("/host:CPU", python=[event("run")], pool=[event("x", hlo_op="dot.1")])
  gpu = plane("/device:GPU:0", Stream_7=[event("gemm", hlo_op="dot.1"), event("memcpy")])
  tpu = plane("/device:TPU:0", Steps=[event("0")], XLA_Ops=[event("%dot.1 = f32[] dot()")])
  for planes, expected in (
    ([host], ["dot.1"]),
    ([host, gpu], ["dot.1", "memcpy"]),
    ([host, tpu], ["dot.1"]),
  ):
    found = scope_times.read(SimpleNamespace(planes=planes))
    assert [e.name for e in found] == expected and found[0][2:] == (1.0, 3.0)


def test_the_crossovers_of_measured_times_are_found_and_can_be_pasted():
  def ms(strategy, n, a, e):
    return {
      "gather_gemv": 1 + 4 * n * a / e,
      "dense": 4.0 if n <= 64 else 4 * n / 64,
      "grouped_matmul": 6.0 + n / 512,
    }[strategy]

  records = [
    dict(zip(("strategy", "num_tokens", "experts_per_token", "num_experts"), (s, n, a, e)))
    | {"ms": ms(s, n, a, e), "format": "bfloat16", "differs": None}
    for s in ("gather_gemv", "dense", "grouped_matmul")
    for n in (1, 8, 32, 64, 256, 2048)
    for a, e in ((8, 64), (2, 8))
  ]
  # A wrong result is not chosen however fast.
  records.append(records[0] | {"strategy": "tiled_loop", "ms": 1e-6, "differs": "by 1"})
  (line,) = crossover_fit.lines("NVIDIA H100", records)
  ((key, steps),) = eval("{" + line + "\n}").items()
  assert key == ("NVIDIA H100", "bfloat16")
  assert [s.strategy for s in steps] == ["gather_gemv", "dense", "grouped_matmul"]
  # gather_gemv is faster than 4 ms below 0.75 pairs per expert: measured are 0.25 and 1.
  assert steps[0].max_pairs == 0.25 and steps[1].max_tokens == 64 and "1.00 x" in line
  assert math.isinf(steps[2].max_tokens)
  assert crossover_fit.fit([]) is None


def test_every_stage_has_columns_and_every_format_a_crossover():
  stages = device_stages.stages(True, Rates(1, 1))
  names = {s.name for s in stages} | {"transformers"}
  assert names == set(accelerator.STAGES) and set(accelerator.COLUMNS) == names | {"machine"}
  for platform in ("cpu", "gpu", "tpu"):
    for format in expert_kernels.FORMATS:
      assert choices.steps(platform, platform, format)[-1] in (Step("dense"), Step("tiled_loop"))


@pytest.mark.slow
def test_a_terminated_run_of_small_sizes_says_what_it_has(tmp_path):
  path = tmp_path / "found" / "results.jsonl"
  flags = (f"--output={path.parent}", "--stages=experts,profile", "--budget_s=400")
  run = programs.Run("experiments.accelerator", flags, devices=1)
  while run.process.is_alive() and not (path.exists() and "experts/" in path.read_text()):
    time.sleep(0.05)
  run.process.terminate()
  assert run.exit_code() == 143, run.errors
  table = (path.parent / "table.txt").read_text()
  assert (
    f"of {20 + 4 * native.is_available()} cases" in table
    and "Time by scope: 0 of 1 cases" in table
    and table in run.output
  )
  rates, *experts = [json.loads(line) for line in path.read_text().splitlines()]
  assert rates["name"] == "machine/rates" and rates["value"]["platform"] == "cpu"
  assert all(rates["value"][name] > 0 for name in ("bandwidth", "flops"))
  for line in experts:
    assert line["value"]["differs"] is None and line["value"]["to_floor"] > 0
  # Nothing runs on.
  before = path.read_bytes()
  time.sleep(0.5)
  assert path.read_bytes() == before


@pytest.mark.slow
def test_a_step_has_its_time_in_scopes_and_the_embedded_models_their_tokens():
  steps = device_stages._Steps(True, Rates(1e10, 1e11))
  (case,) = device_stages._profile_cases(True)
  found = case.run(steps)
  assert {"attention", "router", "experts", "unembed"} <= found["scopes_ms"].keys()
  assert sum(found["scopes_ms"].values()) > 0 and found["busy_ms"] > 0 and found["events"] > 0
  case = device_stages._step_cases(True)[0]
  record = case.run(steps)
  assert record["ms"] > 0 and record["unique_experts"] == steps.bench.config.experts_per_token
  # Bytes of one token's step: what is read once, at 10 GB/s; its FLOPs take less.
  num_bytes = random_models.step_bytes(steps.bench.config, record["unique_experts"], 16)
  assert record["floor_ms"] == pytest.approx(1e3 * num_bytes / 1e10)
