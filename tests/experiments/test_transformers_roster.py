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

from experiments.benchmarks import transformers_roster  # noqa: E402

# Absolute, in nats: float32 sums of some ten layers of operations, taken in
# another order.
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


def make(case, num_members=3, temperatures=TEMPERATURES, **options):
  """A roster in transformers over the weights of `hf.random_state`."""
  hf_config, config = settings(case)
  model = transformers_roster.build(config)
  transformers_roster.load_params(model, hf.random_state(hf_config, seed=3))
  return transformers_roster.TransformersRoster(
    model, num_members, temperatures, batch_size=2, capacity=16, **options
  )


def steps(roster, first=4):
  """Log-probabilities `[B, LENGTH - first, V]` after a prefill of `first` tokens."""
  tokens = torch.tensor(TOKENS)
  roster.prefill(tokens[:, :first])
  return np.stack([roster.step(tokens[:, t]).numpy() for t in range(first, LENGTH)], axis=1)


@functools.cache
def plain_log_probs(case):
  hf_config, _ = settings(case)
  model = hf.to_model(hf_config, hf.random_state(hf_config, seed=3))
  return np.asarray(jax.nn.log_softmax(hf.logits(model, TOKENS)))


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
  """The same in the form that `TransformersRoster` takes."""

  def draw(members, start, length):
    return torch.tensor(all_noise(case)[:, :, list(members), start : start + length])

  return draw


@functools.cache
def roe_jax_log_probs(case):
  """roe_jax's log-probabilities at all positions, `[B, T, V]`."""
  (hf_config, config), roster = settings(case), roe_jax_roster(case)

  @jax.jit
  def run(params):
    positions = jnp.tile(jnp.arange(LENGTH), (2, 1))
    cache = kv_cache.empty(config, 2, 16)
    cache, _ = members_lib.prefill_cache(params, config, roster, cache, TOKENS, positions, REQUESTS)
    x, _ = members_lib.member_states(params, config, roster, cache, TOKENS, positions, REQUESTS)
    return members_lib.aggregate(params, config, roster, x).log_probs

  return np.asarray(run(hf.to_params(hf_config, hf.random_state(hf_config, seed=3))))


def assert_close(actual, expected):
  assert np.abs(np.asarray(actual) - np.asarray(expected)).max() < TOLERANCE


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_members, temperatures", [(1, 0.7), (3, 0.0)])
def test_without_noise_it_is_the_plain_model(case, num_members, temperatures):
  assert_close(steps(make(case, num_members, temperatures)), plain_log_probs(case)[:, 4:])


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_roe_jax(case):
  log_probs = steps(make(case, draw=roe_jax_noise(case)))
  assert_close(log_probs, roe_jax_log_probs(case)[:, 4:])
  # The noise matters.
  assert np.abs(log_probs - plain_log_probs(case)[:, 4:]).max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows_per_chunk", [6, 512])
def test_scores_are_those_of_roe_jax(family, rows_per_chunk):
  roster = make(family, draw=roe_jax_noise(family))
  scores = roster.score(torch.tensor(TOKENS), rows_per_chunk)
  chosen = np.take_along_axis(roe_jax_log_probs(family)[:, :-1], TOKENS[:, 1:, None], axis=-1)
  assert_close(scores, chosen[..., 0])


def test_scores_of_the_plain_model():
  scores = make("olmoe", num_members=1).score(torch.tensor(TOKENS), 8)
  chosen = np.take_along_axis(plain_log_probs("olmoe")[:, :-1], TOKENS[:, 1:, None], axis=-1)
  assert_close(scores, chosen[..., 0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_one_for_all_members(family):
  roster = make(family, num_members=5)
  plain = make(family, num_members=1)
  address = roster.cache.data_ptr()
  steps(roster), steps(plain)
  assert roster.cache.data_ptr() == address
  # Clean slots and one scratch slot for each member, whatever n.
  assert roster.cache.shape[2:5] == (2, 2, 16 + 5)
  # The history is the clean one.
  assert_close(roster.cache[..., :LENGTH, :], plain.cache[..., :LENGTH, :])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_implementations_of_the_experts_agree(family):
  roster = make(family, draw=roe_jax_noise(family))
  names = transformers_roster.experts_implementations(roster.model)
  assert {"eager", "grouped_mm", "batched_mm", "loop", "dense"} <= set(names)
  for name in names:
    roster.experts = roster.prefill_experts = name
    assert_close(steps(roster), roe_jax_log_probs(family)[:, 4:])


def test_steps_of_static_shapes():
  # What is compiled or captured, here run as it is.
  roster = make("mixtral", draw=roe_jax_noise("mixtral"), run="compile")
  roster._static_inputs()
  roster._step = lambda tokens, position: roster._distribution(tokens, int(position), True)
  assert_close(steps(roster), roe_jax_log_probs("mixtral")[:, 4:])


def test_its_own_noise_is_gumbel_and_spares_member_0():
  roster = make("olmoe", num_members=4, temperatures=[0.0, 0.5])
  gates = [layer.mlp.gate for layer in roster.model.model.layers]
  draws = []
  for _ in range(500):
    roster._set_noise(range(4), 0, 1)
    assert gates[0].noise is None
    draws.append(gates[1].noise.view(2, 4, -1))
  draws = torch.stack(draws)
  assert (draws[:, :, 0] == 0).all()
  noisy = draws[:, :, 1:].double() / 0.5
  # Mean and variance of a Gumbel variable; 24,000 of them.
  assert abs(noisy.mean() - np.euler_gamma) < 0.04
  assert abs(noisy.var() - np.pi**2 / 6) < 0.1


def test_times_are_sorted():
  waits = {"slow": 0.02, "fast": 0.001}
  times = transformers_roster.time_each(
    lambda name: transformers_roster.time.sleep(waits[name]), list(waits)
  )
  assert list(times) == ["fast", "slow"]
