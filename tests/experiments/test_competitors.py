"""The same models in other libraries: cases of the benchmark."""

import pytest

from experiments.benchmarks import bench as bench_lib
from experiments.benchmarks import random_models
from experiments.benchmarks.sweeps import Sizes

pytestmark = pytest.mark.slow

SIZES = Sizes((1,), context=8, contexts=(8,), batch_sizes=(1,), cache_context=8, score_tokens=9)
TINY = random_models.PRESETS["tiny"]


def test_the_same_model_in_transformers(monkeypatch):
  pytest.importorskip("torch"), pytest.importorskip("transformers")
  from experiments.benchmarks import transformers_cases

  monkeypatch.setattr(transformers_cases, "NUM_MEMBERS", (1, 2))
  monkeypatch.setattr(transformers_cases.torch, "set_num_threads", lambda count: None)
  bench = bench_lib.Bench(TINY, temperature=0.5, seed=0)
  cases = transformers_cases.cases(bench, SIZES, num_cores=1)
  assert [(c.variant, c.num_members) for c in cases] == [
    (name, n) for n in (1, 2) for name in ("roe_jax", "transformers")
  ]
  for case in cases:
    assert case.baseline == ("roe_jax", case.num_members, 0.5, 8, 1)
    assert case.unique_experts >= 4 and case.floor_bytes > 0
    for call, _ in case.parts:
      call.run(2)
  # With the same weights and tokens the baselines agree.
  differences = [c.options["difference"] for c in cases if "difference" in c.options]
  assert len(differences) == 1 and differences[0] < 3e-5


# Experts of 32 columns are one block of GGUF's formats, and have one scale here too.
@pytest.mark.parametrize("expert_format, tolerance", [(None, 3e-5), ("int8", 0.1), ("mxfp4", 0.1)])
def test_the_same_model_in_llama_cpp(expert_format, tolerance):
  pytest.importorskip("llama_cpp")
  from experiments.benchmarks import llama_cpp_cases

  config = TINY.replace(d_expert=32, expert_format=expert_format)
  assert llama_cpp_cases.obstacle(config, None, "cpu") is None
  bench = bench_lib.Bench(config, temperature=0.5, seed=0)
  ours, theirs = llama_cpp_cases.cases(bench, SIZES, num_cores=1)
  assert (ours.variant, theirs.variant) == ("roe_jax", "llama.cpp")
  for case in (ours, theirs):
    assert case.baseline == ours.key and case.floor_bytes > 0
    for call, _ in case.parts:
      call.run(2)
  print(theirs.options, ours.floor_bytes, theirs.floor_bytes)
  assert theirs.options["difference"] < tolerance
