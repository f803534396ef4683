"""Routing noise: its addresses and its distribution."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny

from roe_jax import members as members_lib
from roe_jax import noise as noise_lib
from roe_jax import perturbations
from roe_jax import roster as roster_lib

TEMPERATURES = jnp.asarray([0.0, 1.0, 0.5], jnp.float32)
NUM_EXPERTS = 8


@jax.jit
def draw(seed, requests_B, positions_BxT, layer, member, temperatures=TEMPERATURES):
  key = noise_lib.stream_key(seed, noise_lib.ROUTING)
  keys = noise_lib.position_keys(key, requests_B, positions_BxT)
  noise = noise_lib.RoutingNoise(keys, temperatures, member)
  return noise.perturb(layer, jnp.zeros((*positions_BxT.shape, NUM_EXPERTS)), 2)


def at(seed=0, request=3, position=5, layer=1, member=1):
  """The noise of one address, `[E]`."""
  return np.asarray(
    draw(
      jnp.uint32(seed),
      jnp.asarray([request], jnp.uint32),
      jnp.asarray([[position]]),
      jnp.int32(layer),
      jnp.int32(member),
    )[0, 0]
  )


@pytest.mark.parametrize(
  "change",
  [
    dict(seed=1),
    dict(request=4),
    dict(position=6),
    dict(layer=2),
    dict(member=2),
    # Numbers that would collide if they were added up or truncated.
    dict(request=5, position=3),
    dict(seed=2**32 - 1),
    dict(request=2**32 - 1),
    dict(position=2**30),
  ],
  ids=str,
)
def test_every_part_of_the_address_changes_the_noise(change):
  factor = 2 if "layer" in change else 1  # that layer's temperature is half
  assert np.all(at() != factor * at(**change))


def test_all_addresses_of_a_grid_differ():
  requests, positions = jnp.arange(6, dtype=jnp.uint32), jnp.tile(jnp.arange(6), (6, 1))
  drawn = np.stack(
    [
      draw(jnp.uint32(0), requests, positions, jnp.int32(layer), jnp.int32(member), jnp.ones(6))
      for layer in range(6)
      for member in range(1, 6)
    ]
  )
  vectors = drawn.reshape(-1, NUM_EXPERTS)
  assert len(np.unique(vectors, axis=0)) == len(vectors) == 30 * 36


def test_noise_does_not_depend_on_what_it_is_drawn_with():
  seed, layer = jnp.uint32(0), jnp.int32(1)
  requests, positions = [9, 3, 4], np.array([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
  batch = draw(seed, jnp.asarray(requests, jnp.uint32), jnp.asarray(positions), layer, jnp.int32(1))
  np.testing.assert_array_equal(batch[1, 1], at())
  for row, request in enumerate(requests):
    chunk = draw(
      seed,
      jnp.asarray([request], jnp.uint32),
      jnp.asarray(positions[row : row + 1, 1:3]),
      layer,
      jnp.int32(1),
    )
    np.testing.assert_array_equal(chunk[0], batch[row, 1:3])
  members = jax.vmap(
    lambda m: draw(seed, jnp.asarray([3], jnp.uint32), jnp.asarray([[5]]), layer, m)
  )(jnp.arange(4))
  for member in range(4):
    np.testing.assert_array_equal(members[member, 0, 0], at(member=member))


def test_the_clean_member_and_layers_at_temperature_zero_have_no_noise():
  for layer in range(3):
    np.testing.assert_array_equal(at(layer=layer, member=0), 0)
  np.testing.assert_array_equal(at(layer=0), 0)


def test_noise_is_the_temperature_times_a_gumbel():
  unit = draw(
    jnp.uint32(0),
    jnp.asarray([3], jnp.uint32),
    jnp.asarray([[5]]),
    jnp.int32(2),
    jnp.int32(1),
    jnp.ones(3),
  )
  np.testing.assert_array_equal(at(layer=2), 0.5 * np.asarray(unit[0, 0]))


def test_routing_and_sampling_are_streams_of_their_own():
  keys = [
    jax.random.key_data(noise_lib.stream_key(seed, stream)).tolist()
    for seed in (0, 1, noise_lib.MAX_SEED)
    for stream in (noise_lib.ROUTING, noise_lib.SAMPLING)
  ]
  assert len({tuple(k) for k in keys}) == len(keys)


def test_distribution_is_gumbel():
  count = 40_000
  drawn = np.asarray(
    draw(
      jnp.uint32(7),
      jnp.arange(8, dtype=jnp.uint32),
      jnp.tile(jnp.arange(count // 8), (8, 1)),
      jnp.int32(1),
      jnp.int32(3),
    ),
    np.float64,
  )
  values = drawn.reshape(-1)
  # Kurtosis 12/5 beyond a normal one: the variance's own deviation follows.
  variance = np.pi**2 / 6
  assert abs(values.mean() - np.euler_gamma) < 4 * np.sqrt(variance / values.size)
  assert abs(values.var() - variance) < 4 * variance * np.sqrt((2.4 + 2) / values.size)
  assert scipy.stats.kstest(values, "gumbel_r").pvalue > 0.01
  assert values.max() > 10  # bfloat16 draws end near 5
  # Independent between experts and between neighbors in position and request.
  vectors = drawn.reshape(8, -1, NUM_EXPERTS) - values.mean()
  pairs = [
    (vectors[..., :-1], vectors[..., 1:]),
    (vectors[:, :-1], vectors[:, 1:]),
    (vectors[:-1], vectors[1:]),
  ]
  for first, second in pairs:
    correlation = np.mean(first * second) / variance
    assert abs(correlation) < 4 / np.sqrt(first.size)


def perturbed(family, logits, temperature, count, num_draws=40_000):
  """`[X, E]` perturbed logits of many addresses."""
  keys = noise_lib.position_keys(
    noise_lib.stream_key(5, noise_lib.ROUTING),
    jnp.arange(4, dtype=jnp.uint32),
    jnp.tile(jnp.arange(num_draws // 4), (4, 1)),
  )
  noise = noise_lib.RoutingNoise(
    keys, jnp.full(2, temperature), jnp.int32(1), perturbations.FAMILIES[family]
  )
  tiled = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (4, num_draws // 4, len(logits)))
  return np.asarray(noise.perturb(jnp.int32(1), tiled, count)).reshape(num_draws, -1)


def test_gumbel_noise_is_that_of_its_address():
  key = jax.random.key(jnp.uint32(0), impl="threefry2x32")
  for number in (noise_lib.ROUTING, 3, 5, 1, 1):  # request, position, layer, member
    key = jax.random.fold_in(key, number)
  np.testing.assert_array_equal(at(), jax.random.gumbel(key, (NUM_EXPERTS,), jnp.float32))


@pytest.mark.parametrize(
  "family, distribution",
  [("gaussian", scipy.stats.norm), ("uniform", scipy.stats.uniform(-np.sqrt(3), np.sqrt(12)))],
)
def test_other_distributions_have_the_variance_of_the_gumbel(family, distribution):
  drawn = perturbed(family, np.zeros(4), 2.0, 2) / (2.0 * np.pi / np.sqrt(6))
  assert scipy.stats.kstest(drawn.reshape(-1), distribution.cdf).pvalue > 0.01
  assert abs(drawn.var() - 1) < 0.02
  assert abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 4 / np.sqrt(len(drawn))


def test_swapping_replaces_each_chosen_expert_with_the_given_probability():
  """Probabilities of all sets of two of five experts, by counting."""
  logits, temperature = np.array([0.1, 2.0, -1.0, 1.0, 0.5]), 0.3  # chosen: 1 and 3
  drawn = perturbed("swap", logits, temperature, 2)
  np.testing.assert_array_equal(
    np.sort(drawn), np.broadcast_to(np.sort(logits.astype(np.float32)), drawn.shape)
  )  # logits change places
  sets = np.sort(np.argsort(-drawn)[:, :2])
  for chosen in itertools.combinations(range(5), 2):
    kept = len({1, 3} & set(chosen))
    probability = {
      2: (1 - temperature) ** 2,
      1: temperature * (1 - temperature) / 3,
      0: temperature**2 / 3,
    }[kept]
    share = np.mean(np.all(sets == chosen, axis=1))
    deviation = np.sqrt(probability * (1 - probability) / len(sets))
    assert abs(share - probability) < 4 * deviation, chosen


def test_swapping_at_its_bounds():
  logits = np.array([0.1, 2.0, -1.0, 1.0, 0.5])
  np.testing.assert_array_equal(
    perturbed("swap", logits, 0.0, 2, 400), np.broadcast_to(logits.astype(np.float32), (400, 5))
  )
  best = np.argsort(-perturbed("swap", logits, 1.0, 2, 400))[:, :2]
  assert not np.isin(best, [1, 3]).any()
  # Of four chosen experts only one can be replaced.
  best = np.argsort(-perturbed("swap", logits, 1.0, 4, 400))[:, :4]
  assert np.all(np.isin(best, [2]).sum(1) == 1)
  np.testing.assert_array_equal(perturbed("swap", logits, 1.0, 5, 4)[0], logits.astype(np.float32))


def test_a_uniform_choice_has_the_given_probability_and_no_favorites():
  """Probabilities of all sets of two of five experts: one in ten of the rows dealt anew."""
  logits, temperature = np.array([0.1, 2.0, -1.0, 1.0, 0.5]), 0.4
  drawn = perturbed("uniform_choice", logits, temperature, 2)
  np.testing.assert_array_equal(
    np.sort(drawn), np.broadcast_to(np.sort(logits.astype(np.float32)), drawn.shape)
  )
  sets = np.sort(np.argsort(-drawn)[:, :2])
  for chosen in itertools.combinations(range(5), 2):
    probability = temperature / 10 + (1 - temperature) * (chosen == (1, 3))
    share = np.mean(np.all(sets == chosen, axis=1))
    deviation = np.sqrt(probability * (1 - probability) / len(sets))
    assert abs(share - probability) < 4 * deviation, chosen
  np.testing.assert_array_equal(
    perturbed("uniform_choice", logits, 0.0, 2, 400),
    np.broadcast_to(logits.astype(np.float32), (400, 5)),
  )


def test_neighboring_layers_and_members_are_independent():
  def values(layer, member):
    return np.asarray(
      draw(
        jnp.uint32(7),
        jnp.arange(8, dtype=jnp.uint32),
        jnp.tile(jnp.arange(1000), (8, 1)),
        jnp.int32(layer),
        jnp.int32(member),
        jnp.ones(3),
      )
    ).reshape(-1)

  base = values(1, 1)
  for other in (values(2, 1), values(1, 2), values(2, 2)):
    assert abs(np.corrcoef(base, other)[0, 1]) < 4 / np.sqrt(base.size)


@pytest.mark.parametrize("family, dtype", [("mixtral", "float32"), ("olmoe", "bfloat16")])
def test_members_choose_by_float32_noise_of_their_address(family, dtype):
  """What the forward pass chose is the top-k of its logits plus the noise of
  each row's address, in float32 also in a bfloat16 model."""
  config = tiny.config(family, dtype=dtype, num_experts=16)
  params = tiny.params(config)
  roster = roster_lib.Roster.create(config, 4, [0.0, 0.7, 2.0], seed=11)
  tokens = jnp.asarray(tiny.texts([40, 40, 40]))
  positions = jnp.tile(jnp.arange(40), (3, 1)) + jnp.asarray([[0], [4], [20]])
  requests = jnp.asarray([2, 2**32 - 1, 5], jnp.uint32)
  cache = members_lib.empty_cache(config, roster, 3, 64)
  run = members_lib.RosterPass(params, config, roster, tokens, positions, requests)
  states = jax.jit(roster.cache_mode.states, static_argnames="keep")
  *_, outputs = states(run, cache, keep=("experts", "router_logits"))
  keys = noise_lib.position_keys(noise_lib.stream_key(11, noise_lib.ROUTING), requests, positions)
  changed_by_rounding = 0
  for layer in range(config.num_layers):
    for member in range(4):
      noise = noise_lib.RoutingNoise(keys, roster.temperatures, jnp.int32(member)).perturb(
        jnp.int32(layer), jnp.zeros((3, 40, config.num_experts)), config.experts_per_token
      )
      assert noise.dtype == jnp.float32
      logits = outputs.router_logits[layer, member]
      _, expected = jax.lax.top_k(logits + noise, config.experts_per_token)
      np.testing.assert_array_equal(outputs.experts[layer, member], expected)
      rounded = noise.astype(jnp.bfloat16).astype(jnp.float32)
      _, other = jax.lax.top_k(logits + rounded, config.experts_per_token)
      changed_by_rounding += np.sum(np.asarray(other) != np.asarray(expected))
  assert changed_by_rounding > 0  # so that the check above can see the dtype
