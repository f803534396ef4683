"""The roster in transformers: against transformers itself, and against roe_jax."""

import functools

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roe_jax import cache as kv_cache
from roe_jax import families
from roe_jax import members as members_lib
from roe_jax.roster import Roster

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from experiments.benchmarks import transformers_stock  # noqa: E402

pytestmark = pytest.mark.slow

# Absolute, in nats: float32 sums of some ten layers of operations in another order.
TOLERANCE = 3e-5
FAMILIES = ("olmoe", "mixtral")
CASES = FAMILIES + ("olmoe_normalized",)
TEMPERATURES = [0.7, 0.4]
LENGTH = 12
TOKENS = np.random.RandomState(1).randint(0, hf.SMALL["vocab_size"], (2, LENGTH))
REQUESTS = jnp.asarray([3, 2**32 - 2], jnp.uint32)


def settings(case):
  family = case.split("_")[0]
  changes = {"norm_topk_prob": True} if case == "olmoe_normalized" else {}
  hf_config = hf.config_json(family, **changes)
  return hf_config, families.from_hugging_face(hf_config, dtype="float32")


def params(case):
  hf_config, _ = settings(case)
  return hf.to_params(hf_config, hf.random_state(hf_config, seed=3))


@functools.cache
def model(case):
  made = transformers_stock.build(settings(case)[1])
  transformers_stock.copy_params(params(case), made)
  return made


def make(case, num_members=3, temperatures=TEMPERATURES, **options):
  return transformers_stock.StockRoster(
    model(case), num_members, temperatures, batch_size=2, capacity=16, **options
  )


def steps(roster, first=4):
  """Log-probabilities `[B, LENGTH - first, V]` after a prefill of `first` tokens."""
  tokens = torch.tensor(TOKENS)
  roster.prefill(tokens[:, :first])
  return np.stack([roster.step(tokens[:, t]).numpy() for t in range(first, LENGTH)], axis=1)


@functools.cache
def baseline_log_probs(case):
  hf_config, _ = settings(case)
  stock = hf.to_model(hf_config, hf.random_state(hf_config, seed=3))
  return np.asarray(jax.nn.log_softmax(hf.logits(stock, TOKENS)))


def roe_jax_roster(case, num_members=3):
  _, config = settings(case)
  return Roster.create(config, num_members, TEMPERATURES, seed=5)


@functools.cache
def all_noise(case):
  """roe_jax's noise at all addresses, `[L, B, R, T, E]`."""
  roster, (_, config) = roe_jax_roster(case), settings(case)

  @jax.jit
  def draw(positions_BxT):
    def of_member(member, layer):
      noise = members_lib.routing_noise(roster, REQUESTS, positions_BxT, member)
      no_logits = jnp.zeros((*positions_BxT.shape, config.num_experts))
      return noise.perturb(layer, no_logits, config.experts_per_token)

    by_member = jax.vmap(of_member, in_axes=(0, None), out_axes=1)
    return jax.vmap(by_member, in_axes=(None, 0))(
      jnp.arange(roster.num_members), jnp.arange(config.num_layers)
    )

  return np.array(draw(jnp.tile(jnp.arange(LENGTH), (2, 1))))


def roe_jax_noise(case):
  """The same in the form that `StockRoster` takes."""
  return lambda position: torch.tensor(all_noise(case)[:, :, :, position])


@functools.cache
def roe_jax_log_probs(case):
  """roe_jax's log-probabilities at all positions, `[B, T, V]`."""
  (_, config), roster = settings(case), roe_jax_roster(case)

  @jax.jit
  def run(params):
    positions = jnp.tile(jnp.arange(LENGTH), (2, 1))
    cache = kv_cache.empty(config, 2, 16)
    run = members_lib.RosterPass(params, config, roster, TOKENS, positions, REQUESTS)
    x, *_ = roster.cache_mode.states(run, roster.cache_mode.prefill(run, cache))
    return run.aggregate(x).log_probs

  return np.asarray(run(params(case)))


def assert_close(actual, expected):
  assert np.abs(np.asarray(actual) - np.asarray(expected)).max() < TOLERANCE


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_members, temperatures", [(1, 0.7), (3, 0.0)])
def test_without_noise_it_is_the_baseline(case, num_members, temperatures):
  assert_close(steps(make(case, num_members, temperatures)), baseline_log_probs(case)[:, 4:])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cache", transformers_stock.CACHES)
def test_steps_are_those_of_roe_jax(case, cache):
  roster = make(case, cache=cache, draw=roe_jax_noise(case))
  for name in transformers_stock.EXPERTS:
    roster.experts = name
    log_probs = steps(roster)
    assert_close(log_probs, roe_jax_log_probs(case)[:, 4:])
  # The noise matters.
  assert np.abs(log_probs - baseline_log_probs(case)[:, 4:]).max() > 0.01


@pytest.mark.parametrize("cache", transformers_stock.CACHES)
def test_the_length_can_be_set_back(cache):
  roster = make("olmoe", cache=cache, draw=roe_jax_noise("olmoe"))
  tokens = torch.tensor(TOKENS)
  roster.prefill(tokens[:, :4])
  first = roster.step(tokens[:, 4])
  roster.step(tokens[:, 5])
  roster.length = 4
  assert_close(roster.step(tokens[:, 4]), first)


def test_its_own_noise_changes_members_but_not_the_clean_one():
  tokens = torch.tensor(TOKENS)
  one, noisy = make("olmoe", 1), make("olmoe", 4, seed=1)
  one.prefill(tokens[:, :4]), noisy.prefill(tokens[:, :4])
  assert (one.step(tokens[:, 4]) - noisy.step(tokens[:, 4])).abs().max() > 1e-3
  for a, b in zip(one._cache.layers, noisy._cache.layers):
    assert_close(a.keys[:, :, :5], b.keys[::4, :, :5])
    assert_close(b.values[1::4, :, :5], b.values[::4, :, :5])


def test_its_own_noise_is_gumbel_and_spares_member_0():
  roster = make("olmoe", num_members=4, temperatures=[0.0, 0.5])
  gates = [layer.mlp.gate for layer in roster.model.model.layers]
  draws = []
  for _ in range(500):
    roster._set_noise()
    assert gates[0].noise is None
    draws.append(gates[1].noise.view(2, 4, -1))
  for gate in gates:
    gate.noise = None  # the model is shared with other tests
  draws = torch.stack(draws)
  assert (draws[:, :, 0] == 0).all()
  noisy = draws[:, :, 1:].double() / 0.5
  # Mean and variance of a Gumbel variable; 24,000 of them.
  assert abs(noisy.mean() - np.euler_gamma) < 0.04
  assert abs(noisy.var() - np.pi**2 / 6) < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_roe_jax(family):
  hf_config, _ = settings(family)
  stock = hf.to_model(hf_config, hf.random_state(hf_config, seed=3))
  for (name, a), b in zip(stock.named_parameters(), model(family).parameters(), strict=True):
    np.testing.assert_array_equal(a.detach(), b.detach(), err_msg=name)
