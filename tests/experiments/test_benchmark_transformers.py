import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from experiments.benchmarks import bench as bench_lib
from experiments.benchmarks import competitors, random_models
from experiments.benchmarks.sweeps import Sizes

pytestmark = pytest.mark.slow


def test_the_same_model_in_transformers(monkeypatch):
  monkeypatch.setattr(competitors, "NUM_MEMBERS", (1, 2))
  monkeypatch.setattr(competitors.torch, "set_num_threads", lambda count: None)
  bench = bench_lib.Bench(random_models.PRESETS["tiny"], temperature=0.5, seed=0)
  sizes = Sizes((1,), context=8, contexts=(8,), batch_sizes=(1,), cache_context=8, score_tokens=9)
  cases = competitors.cases(bench, sizes, num_cores=1)
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
