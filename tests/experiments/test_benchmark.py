import json

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from experiments.benchmarks import bench, machine, random_models, sweeps, timing
from roe_jax import model_formats, native, quantization
from roe_jax import params as params_lib

pytestmark = pytest.mark.slow

TINY = random_models.PRESETS["tiny"]
FLAGS = (
  "--preset=tiny",
  "--rounds=3",
  "--num_members=1,8",
  "--context=24",
  "--contexts=8,16",
  "--batch_sizes=1,2",
  "--cache_context=24",
  "--score_tokens=17",
  "--transformers=no",
)


def run(*arguments):
  return programs.call("experiments.benchmark", *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder of results of the sweeps that take least time to compile."""
  path = tmp_path_factory.mktemp("benchmark")
  done = run(*FLAGS, "--sweeps=decode,cache", f"--output={path}")
  assert done.returncode == 0, done.errors
  assert "times as long as with Clean Cache" in done.output
  return path


def records(path):
  return [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]


def test_the_files_and_what_they_say(folder):
  assert (folder / "cost.png").read_bytes()[:4] == b"\x89PNG"
  assert "Decode step by cache" in (folder / "table.txt").read_text()
  found = records(folder)
  assert [(r["sweep"], r["variant"], r["num_members"], r["temperature"]) for r in found] == [
    ("decode", "clean", 1, 0.0),
    ("decode", "clean", 8, 0.0),
    ("decode", "clean", 1, 0.5),
    ("decode", "clean", 8, 0.5),
  ] + [("cache", name, 8, 0.5) for name in ("clean", "standard", "none", "none, clean history")]
  for r in found:
    assert r["settings"]["preset"] == "tiny" and r["settings"]["cores"] >= 1
    assert r["rounds"] == 3 and r["peak_process_bytes"] > 0


def test_ratios_are_those_of_the_times(folder):
  found = records(folder)

  def key(record):
    return [record[k] for k in ("variant", "num_members", "temperature", "context", "batch_size")]

  for r in found:
    seconds = np.array(r["seconds_by_round"])
    assert r["seconds"] == pytest.approx(np.median(seconds))
    assert r["seconds_low"] <= r["seconds"] <= r["seconds_high"]
    (base,) = (
      np.array(b["seconds_by_round"])
      for b in found
      if b["sweep"] == r["sweep"] and key(b) == list(r["baseline"].values())
    )
    assert r["to_baseline"] == pytest.approx(np.median(seconds / base))
    if "floor_bytes" in r:
      reading = r["floor_bytes"] / np.array(r["bandwidth_by_round"])
      computing = r["floor_flops"] / np.array(r["matmul_rate_by_round"])
      floor = np.maximum(reading, computing)
      assert r["floor_seconds"] == pytest.approx(np.median(floor))
      assert r["to_floor"] == pytest.approx(np.median(seconds / floor))
  by_name = {r["variant"]: r for r in found if r["sweep"] == "cache"}
  assert by_name["none"]["seconds"] > by_name["clean"]["seconds"]
  assert "floor_bytes" not in by_name["none"]


def test_experts_hit_grow_with_noise_only(folder):
  hit = {
    (r["num_members"], r["temperature"]): r["unique_experts"]
    for r in records(folder)
    if r["sweep"] == "decode"
  }
  assert hit[1, 0.0] == hit[8, 0.0] == hit[1, 0.5] == TINY.experts_per_token
  assert TINY.experts_per_token < hit[8, 0.5] <= TINY.num_experts


def test_finished_sweeps_are_not_measured_again(folder):
  before = (folder / "results.jsonl").read_text()
  (folder / "table.txt").unlink()
  done = run(*FLAGS, "--sweeps=decode,cache", f"--output={folder}")
  assert done.returncode == 0, done.errors
  assert (folder / "results.jsonl").read_text() == before
  assert (folder / "table.txt").exists()


REFUSED = {
  "--preset=huge": "value should be one of",
  "--num_members=0,1": "--num_members must be a list of integers of at least 1",
  "--num_members=a": "--num_members must be an integer, got 'a'",
  "--contexts=8,4096": "sequences of 4097 tokens, but the context length of tiny is 4096",
  "--tau=0": "--tau must be positive",
  "--rounds=0": "--rounds must be at least 1",
  "--sweeps=speed": "--sweeps: unknown speed",
  "--num_cores=10000": "--num_cores must lie in [1, ",
  "--seed=1": "holds results with seed = 0, not 1",
  "--preset=mixtral-8x7b": "needs about",
}
_SCRIPT = """
import sys
from absl import flags
from experiments import benchmark
benchmark.define_flags()
benchmark.machine.free_bytes = lambda: 2**33
for flag in sys.argv[2:]:
  for known in flags.FLAGS.get_flags_for_module("experiments.benchmark"):
    known.unparse()
  try:
    flags.FLAGS([*sys.argv[1].split(";"), flag])
    benchmark.main([])
    print("accepted")
  except (ValueError, flags.Error) as error:
    print(str(error).replace(chr(10), " "))
"""


def test_refusals(folder, tmp_path):
  others, said = [name for name in REFUSED if name != "--seed=1"], []
  for output, names in ((folder, ["--seed=1"]), (tmp_path, others)):
    given = ";".join(["benchmark", *FLAGS, "--sweeps=decode", f"--output={output}"])
    done = programs.call(_SCRIPT, given, *names)
    said += zip(names, done.output.splitlines(), strict=True)
  for name, sentence in said:
    assert REFUSED[name] in sentence, name
  assert not list(tmp_path.iterdir())


def test_floor_bytes_by_hand():
  # Two layers; D 32, 4 heads of 8, 16 experts of 16, 97 words; 4 bytes a number.
  experts = 5.5 * 3 * 32 * 16
  attention = 4 * 32 * 32
  router = 16 * 32
  history = 2 * 32 * 20
  expected = 4 * (2 * (experts + attention + router + history) + 97 * 32)
  assert random_models.step_bytes(TINY, 5.5, 20) == expected
  # Keys and values of fewer heads.
  grouped = TINY.replace(num_kv_heads=2)
  assert (
    random_models.step_bytes(TINY, 1, 0) - random_models.step_bytes(grouped, 1, 0)
    == 4 * 2 * 2 * 16 * 32
  )
  # A text's keys and values; in a layer with a window only those that are seen.
  assert (
    random_models.step_bytes(TINY, 1, 20, 3) - random_models.step_bytes(TINY, 1, 0)
    == 3 * 4 * 4 * 32 * 20
  )
  window = TINY.replace(sliding_window=6, sliding_layers=(1,))
  assert random_models.cache_bytes(window, 20) == 4 * 2 * 32 * (20 + 5)
  # An expert in four bits: codes, and a bfloat16 scale for each group of 32 or 16.
  four = TINY.replace(expert_format="int4")
  assert random_models.step_bytes(four, 2, 0) - random_models.step_bytes(four, 1, 0) == 2 * (
    3 * 16 * 32 / 2 + 2 * (2 * 16 * 32 / 32 + 32 * 16 / 16)
  )


def test_distinct_experts():
  experts = np.array([[[[[0, 1]]], [[[1, 2]]]], [[[[3, 4]]], [[[3, 4]]]]])
  assert random_models.count_unique_experts(experts, 1) == 2
  assert random_models.count_unique_experts(experts, 2) == 2.5


@pytest.mark.parametrize("expert_format", ["int8", "int4"])
def test_random_weights_in_few_bits_are_as_large(expert_format):
  config = TINY.replace(expert_format=expert_format)
  params = random_models.random_params(config, seed=3)
  gate_up = quantization.dequantize(params.layers.experts.gate_up)
  assert abs(np.std(gate_up) / TINY.initializer_range - 1) < 0.1


def test_random_weights():
  params = random_models.random_params(TINY, seed=3)
  params_lib.validate(params, TINY)
  gate_up = np.asarray(params.layers.experts.gate_up)
  assert abs(gate_up.std() / TINY.initializer_range - 1) < 0.05
  assert np.abs(gate_up[0, 0] - gate_up[0, 1]).max() > 0
  assert (np.asarray(params.final_norm) == 1).all()


def test_turns():
  waits = {"slow": 0.03, "fast": 0.002}
  counts = dict.fromkeys(waits, 0)

  def call(name):
    def run(count):
      counts[name] += count
      timing.time.sleep(count * waits[name])

    return run

  seconds = timing.take_turns({name: call(name) for name in waits}, rounds=4)
  for name, wait in waits.items():
    assert seconds[name].shape == (4,)
    assert wait <= np.median(seconds[name]) < 2 * wait
  assert counts["slow"] == 2 + 2 * 4  # tried twice; an untimed one each time
  assert counts["fast"] > counts["slow"]


def test_slow_calls_take_fewer_turns(monkeypatch):
  monkeypatch.setattr(timing, "BUDGET", 0.03)
  monkeypatch.setattr(timing, "LONG", 0.005)
  calls = []
  seconds = timing.take_turns({"": lambda count: calls.append(timing.time.sleep(0.01))}, rounds=9)
  assert np.isfinite(seconds[""]).sum() == 3
  assert len(calls) == 1 + 3


def test_programs_are_compiled_once():
  double = jax.jit(lambda x: 2 * x)
  first = timing.compiled(double, jnp.ones(3))
  assert timing.compiled(double, jnp.zeros(3)) is first
  assert timing.compiled(double, jnp.zeros(4)) is not first


def test_bandwidth_is_read_from_all_of_an_array(monkeypatch):
  monkeypatch.setattr(machine, "free_bytes", lambda: 2**22)
  call, num_bytes = machine.bandwidth_call()
  call()
  assert num_bytes == 2**20


def test_the_rate_of_matmuls_is_that_of_the_faster_dtype(monkeypatch):
  monkeypatch.setattr(machine, "MATMUL_WIDTH", (64, 64))
  call, flops = machine.matmul_call()
  call()
  assert flops == 2 * 64**3


def test_the_kernels_sweep_times_the_same_step_with_and_without_them():
  if not native.is_available():
    pytest.skip("no C++ compiler")
  sizes = sweeps.Sizes((2,), 8, (8,), (1,), 8, 9)
  ours, xla = sweeps.kernels(bench.Bench(TINY, 0.5, 0), sizes)
  assert xla.baseline == ours.baseline == ours.key and ours.floor_bytes == xla.floor_bytes != 0
  called = [case.parts[0][0].hlo().count("roe_jax_") > 0 for case in (ours, xla)]
  assert called == [True, False] and native.is_available()


def test_sweeps_of_drafts_and_of_unsure_positions(monkeypatch):
  """What the calls are asked for; `test_drafting` and `test_adaptive` have what they compute."""
  asked, top = [], np.arange(1, 9, dtype=np.float32) / 10
  fakes = {
    "clean_history": lambda self, *sizes: sizes,
    "unique_experts": lambda self, n, tau, box: {1: 4.0, 32: 12.0},
    "top_probabilities": lambda self, box: top,
    "step": lambda self, roster, box, drafts=None: asked.append((roster, drafts)) or bench.Call(id),
    "score_chunk": lambda self, roster, box: asked.append((roster, None)) or bench.Call(id),
  }
  for name, fake in fakes.items():
    monkeypatch.setattr(bench.Bench, name, fake)
  model, sizes = bench.Bench(TINY, 0.5, 0), sweeps.Sizes((1,), 8, (8,), (1,), 8, 9)
  baseline, step, *rounds = sweeps.drafts(model, sizes)
  assert [drafts for _, drafts in asked] == [None, None, *sweeps.DRAFTS]
  for count, case in zip(sweeps.DRAFTS, rounds, strict=True):
    assert case.parts[0][1] == 1 / count and case.baseline == step.key
    assert case.floor_bytes == baseline.floor_bytes + step.floor_bytes / count
    assert case.floor_flops == step.floor_flops == 32 * baseline.floor_flops
  asked.clear()
  cases = sweeps.adaptive(model, sizes)
  assert [c.options.get("unsure_share") for c in cases] == [*sweeps.SHARES, None, None]
  for share, (roster, _) in zip(sweeps.SHARES[:-1], asked):
    assert (top < float(roster.unsure.threshold)).mean() == share
  assert asked[len(sweeps.SHARES) - 1][0].unsure is None and asked[-1][0].member_stop is not None


def test_a_converted_checkpoint_is_measured_in_its_own_and_in_other_formats(tiny_checkpoint):
  config = model_formats.load_config(tiny_checkpoint)
  found = []
  for format in (None, "int8"):
    own = bench.Bench(config.replace(expert_format=format), 0.5, 0, str(tiny_checkpoint))
    assert quantization.is_quantized(own.params.layers.experts.down) == (format is not None)
    roster = own.roster(2, 0.5)
    found.append(own.log_probs(roster, own.empty(roster, 8, 1), 0))
  difference = np.abs(found[0] - found[1]).max()
  assert 0 < difference < 0.1
