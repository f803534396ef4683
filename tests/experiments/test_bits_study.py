"""What the study of bits compares, and the bytes that it reports."""

import types

import numpy as np
import pytest
import tiny

from experiments import bits_study
from roe_jax import bit_plans, quantization
from roe_jax.roster import Roster


def test_divergence_perplexity_and_exact_matches():
  problems = [types.SimpleNamespace(tokens=t) for t in ([0], [1, 0])]
  reference = np.log([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]])
  found = np.log([[0.75, 0.25], [0.25, 0.75], [0.1, 0.9]])
  values = bits_study.Problems(problems, 2).compare(found, reference)
  kl = [0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25), 0, 0.8 * np.log(9)]
  assert values["kl"] == pytest.approx(np.mean(kl))
  of_problems = [kl[0], np.mean(kl[1:])]
  assert values["kl_error"] == pytest.approx(abs(of_problems[0] - of_problems[1]) / 2)
  assert values["perplexity"] == pytest.approx((0.75 * 0.75 * 0.1) ** (-1 / 3))
  assert values["exact"] == 0.5


def test_a_plan_leaves_each_expert_its_bits():
  config = tiny.config("olmoe")
  params = tiny.params(config)
  plan = np.full((config.num_layers, config.num_experts), 2)
  plan[1, 3] = 4
  experts = bits_study.dequantized(params, "nested:2-4", plan).layers.experts
  for bits, index in ((2, np.s_[0, 0]), (4, np.s_[1, 3])):
    matrix = quantization.quantize(np.asarray(params.layers.experts.down), f"nested:2-{bits}", -2)
    expected = quantization.dequantize_on_host(matrix)[index]
    np.testing.assert_array_equal(experts.down[index], expected)


def test_a_step_reads_the_clean_members_experts_and_the_first_bits_of_others():
  config = tiny.config("olmoe", expert_format="nested:2-4")
  read = lambda bits: bit_plans.num_bytes(
    np.full((config.num_layers, config.num_experts), bits), config, bits_study.FORMAT
  )
  share = config.experts_per_token / config.num_experts
  found = bits_study.bytes_per_step(config, Roster.create(config, 2, member_bits=2))
  assert found == int(share * read(4) + share * read(2))
