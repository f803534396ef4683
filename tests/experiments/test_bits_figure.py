"""What the figure of bits compares, and the bytes that it reports."""

import types

import numpy as np
import pytest
import tiny

from experiments.analysis import paired_statistics
from experiments.figures import bits, passages
from roe_jax import bit_plans, diagnostics, quantization
from roe_jax import params as params_lib
from roe_jax.roster import Roster


def request(i, context, tokens):
  sequence = [*context, *tokens]
  return types.SimpleNamespace(
    context=context, tokens=tokens, sequence=sequence, max_length=len(sequence), request_id=i
  )


def test_divergence_likelihoods_and_right_texts():
  requests = [request(0, [1], [0]), request(1, [1], [1, 0])]
  reference = [np.log([[0.5, 0.5]]), np.log([[0.25, 0.75], [0.9, 0.1]])]
  found = [np.log([[0.75, 0.25]]), np.log([[0.25, 0.75], [0.1, 0.9]])]
  values = bits.judge(found, reference, requests, 0.5)
  assert values["kl"] == pytest.approx(
    [0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25), 0.4 * np.log(9)], rel=1e-5
  )
  assert values["nll"] == pytest.approx(-np.log([0.75, 0.75 * 0.1]), rel=1e-5)
  # At T = 1/2, odds are squared.
  assert values["fitted_nll"] == pytest.approx(-np.log([9 / 10, 9 / 10 * 1 / 82]), rel=1e-5)
  assert values["right"] == [True, False]


def test_distributions_are_those_of_the_whole_sequences():
  config = tiny.config("olmoe")
  params, nested = params_lib.quantize(tiny.params(config), config, "nested:2-4")
  rng = np.random.default_rng(0)
  shapes = [(5, 1), (9, 3), (7, 4), (12, 2)]
  requests = [
    request(i, *map(list, np.split(rng.integers(1, 50, a + b), [a])))
    for i, (a, b) in enumerate(shapes)
  ]
  rosters = [Roster.create(nested), Roster.create(nested, 3, 0.7, member_bits=2)]
  found = passages.distributions(params, nested, rosters, requests, 3)
  for roster, own in zip(rosters, found):
    expected = diagnostics.next_token_distributions(
      params, nested, [r.sequence for r in requests], roster=roster, all_positions=True
    )
    for i, r in enumerate(requests):
      wanted = expected[i, len(r.context) - 1 : r.max_length - 1]
      np.testing.assert_allclose(own[i], wanted, atol=1e-5)


def test_a_plan_leaves_each_expert_its_bits():
  config = tiny.config("olmoe")
  params = tiny.params(config)
  plan = np.full((config.num_layers, config.num_experts), 2)
  plan[1, 3] = 4
  experts = bits.dequantized(params, "nested:2-4", plan).layers.experts
  for kept, index in ((2, np.s_[0, 0]), (4, np.s_[1, 3])):
    matrix = quantization.quantize(np.asarray(params.layers.experts.down), f"nested:2-{kept}", -2)
    expected = quantization.dequantize_on_host(matrix)[index]
    np.testing.assert_array_equal(experts.down[index], expected)


def test_a_step_reads_the_clean_members_experts_and_the_first_bits_of_others():
  config = tiny.config("olmoe", expert_format="nested:2-4")
  read = lambda kept: bit_plans.num_bytes(
    np.full((config.num_layers, config.num_experts), kept), config, bits.FORMAT
  )
  share = config.experts_per_token / config.num_experts
  found = bits.bytes_per_step(config, Roster.create(config, 2, member_bits=2))
  assert found == int(share * read(4) + share * read(2))


def test_plans_are_compared_with_the_mean_of_the_random_ones(monkeypatch):
  monkeypatch.setattr(paired_statistics, "RESAMPLES", 200)
  monkeypatch.setattr(paired_statistics, "FLIPS", 99)
  rng, tokens = np.random.default_rng(0), np.array([1, 2, 3])
  names = ["random(mean=3,seed=0)", "random(mean=3,seed=1)", "frequency(mean=3)"]
  measured = {
    name: {
      bits.BASELINE: {
        "temperature": 1.0,
        "kl": rng.random(3),
        "nll": rng.random(3),
        "fitted_nll": rng.random(3),
        "right": rng.integers(2, size=3),
      }
    }
    for name in names
  }
  systems = [bits.System("plan", name, 7, None, {}, bits.RANDOM) for name in names]
  *random, own = bits._records(measured, systems, tokens)
  assert all("kl_difference" not in r for r in random)
  of = [measured[name][bits.BASELINE] for name in names]
  kl = 1000 * (of[2]["kl"] - (of[0]["kl"] + of[1]["kl"]) / 2).mean()
  assert own["kl_difference"].value == pytest.approx(kl)
  nll = of[2]["fitted_nll"] - (of[0]["fitted_nll"] + of[1]["fitted_nll"]) / 2
  expected = 100 * np.expm1(nll.sum() / tokens.sum())
  assert own["fitted_difference"].value == pytest.approx(expected)
  assert "random(mean=3,seed=0)" in bits.table([*random, own])
