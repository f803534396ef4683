"""The plain roster in transformers does what the hand-tuned one does."""

import functools

import numpy as np
import pytest
import test_transformers_roster as other

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from experiments.benchmarks import transformers_roster, transformers_stock  # noqa: E402


@functools.cache
def model(case):
  hf_config, config = other.settings(case)
  made = transformers_roster.build(config)
  transformers_roster.load_params(made, other.hf.random_state(hf_config, seed=3))
  return made


def make(case, num_members=3, temperatures=other.TEMPERATURES, **options):
  return transformers_stock.StockRoster(
    transformers_stock.twin(model(case)),
    num_members,
    temperatures,
    batch_size=2,
    capacity=16,
    **options,
  )


@pytest.mark.parametrize("case", other.CASES)
@pytest.mark.parametrize("cache", transformers_stock.CACHES)
def test_steps_are_those_of_the_hand_tuned_roster(case, cache):
  expected = other.steps(other.make(case, draw=other.roe_jax_noise(case)))
  roster = make(case, cache=cache, draw=other.roe_jax_noise(case))
  for name in transformers_stock.EXPERTS:
    roster.experts = name
    other.assert_close(other.steps(roster), expected)


@pytest.mark.parametrize("cache", transformers_stock.CACHES)
def test_the_length_can_be_set_back(cache):
  roster = make("olmoe", cache=cache, draw=other.roe_jax_noise("olmoe"))
  tokens = torch.tensor(other.TOKENS)
  roster.prefill(tokens[:, :4])
  first = roster.step(tokens[:, 4])
  roster.step(tokens[:, 5])
  roster.length = 4
  other.assert_close(roster.step(tokens[:, 4]), first)


def test_its_own_noise_changes_members_but_not_the_clean_one():
  tokens = torch.tensor(other.TOKENS)
  plain, noisy = make("olmoe", 1), make("olmoe", 4, seed=1)
  plain.prefill(tokens[:, :4]), noisy.prefill(tokens[:, :4])
  assert (plain.step(tokens[:, 4]) - noisy.step(tokens[:, 4])).abs().max() > 1e-3
  for a, b in zip(plain._cache.layers, noisy._cache.layers):
    other.assert_close(a.keys[:, :, :5], b.keys[::4, :, :5])
    other.assert_close(b.values[1::4, :, :5], b.values[::4, :, :5])


def test_a_twin_shares_weights_and_not_modules():
  first = model("olmoe")
  second = transformers_stock.twin(first)
  for a, b in zip(first.parameters(), second.parameters()):
    assert a.data_ptr() == b.data_ptr()
  assert first.model.layers[0].mlp.gate is not second.model.layers[0].mlp.gate


@pytest.mark.parametrize("family", other.FAMILIES)
def test_weights_of_roe_jax(family):
  hf_config, config = other.settings(family)
  params = other.hf.to_params(hf_config, other.hf.random_state(hf_config, seed=3))
  copied = transformers_roster.build(config)
  transformers_stock.copy_params(params, copied)
  for (name, a), b in zip(model(family).named_parameters(), copied.parameters()):
    np.testing.assert_array_equal(a.detach(), b.detach(), err_msg=name)
