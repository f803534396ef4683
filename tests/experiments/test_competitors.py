"""The same models in other libraries: cases of the benchmark."""

import jax
import numpy as np
import pytest

import checkpoints_convert
from experiments.benchmarks import bench as bench_lib
from experiments.benchmarks import random_gguf, random_models
from experiments.benchmarks.sweeps import Sizes
from roe_jax import quantization

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


def test_the_same_model_in_llama_cpp():
  pytest.importorskip("llama_cpp")
  from experiments.benchmarks import llama_cpp_cases

  bench = bench_lib.Bench(TINY, temperature=0.5, seed=0)
  ours, theirs = llama_cpp_cases.cases(bench, SIZES, num_cores=1)
  assert (ours.variant, theirs.variant) == ("roe_jax", "llama.cpp")
  for case in (ours, theirs):
    assert case.baseline == ours.key
    for call, _ in case.parts:
      call.run(2)
  # They read the same numbers; the router is in float32 there, too.
  assert theirs.floor_bytes == pytest.approx(ours.floor_bytes)
  assert theirs.options["formats"] == "F32"
  # The cache is in float16 there.
  assert theirs.options["difference"] < 1e-2
  assert theirs.options["same_tokens"] == theirs.options["num_tokens"]


def test_random_models_in_gguf_files(tmp_path):
  pytest.importorskip("gguf")
  config = TINY.replace(d_expert=32, expert_format="mxfp4", dtype="bfloat16")
  params = random_models.random_params(config)
  random_gguf.write(tmp_path / "m.gguf", config, params)
  found, _ = checkpoints_convert.load(str(tmp_path / "m.gguf"))
  expected = jax.tree.map(random_gguf.to_float32, params, is_leaf=quantization.is_quantized)
  for (path, x), (_, y) in zip(*map(jax.tree.leaves_with_path, (found, expected)), strict=True):
    np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))
