"""Noise families that know the member, or have parameters; see test_noise for the others."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from roe_jax import aggregation, perturbations
from roe_jax import noise as noise_lib
from roe_jax.roster import Roster

LOGITS = np.array([1.2, 0.4, 0.0, -0.3, 0.9, -1.1], np.float32)
CASES = [("antithetic", 4), ("antithetic", 3), ("stratified", 4), ("stratified", 6), ("coupled", 3)]


@functools.partial(jax.jit, static_argnames=("family", "num_noisy", "count", "num_draws"))
def _members(family, num_noisy, logits, temperature, count, num_draws):
  positions = jnp.arange(num_draws)[None]
  keys = noise_lib.position_keys(
    noise_lib.stream_key(5, noise_lib.ROUTING), jnp.array([3], jnp.uint32), positions
  )

  def one(member):
    noise = noise_lib.RoutingNoise(keys, jnp.full(2, temperature), member, family, num_noisy)
    tiled = jnp.broadcast_to(logits, (1, num_draws, len(logits)))
    return noise.perturb(jnp.int32(1), tiled, count)[0]

  return jax.vmap(one)(jnp.arange(num_noisy + 1))


def members(family, num_noisy, logits=LOGITS, temperature=1.0, count=2, num_draws=4000):
  """Perturbed logits `[1 + noisy, X, E]` of the clean member and the noisy ones."""
  if isinstance(family, str):
    family = perturbations.FAMILIES[family]
  logits = jnp.asarray(logits, jnp.float32)
  return np.asarray(_members(family, num_noisy, logits, jnp.float32(temperature), count, num_draws))


@pytest.mark.parametrize("family", perturbations.FAMILIES)
def test_the_clean_member_and_temperature_zero_change_nothing(family):
  clean = np.broadcast_to(LOGITS, (3, 50, 6))
  np.testing.assert_array_equal(members(family, 2, num_draws=50)[0], clean[0])
  np.testing.assert_array_equal(members(family, 2, temperature=0.0, num_draws=50), clean)


@pytest.mark.parametrize("family, num_noisy", CASES)
def test_members_that_share_draws_have_the_noise_of_independent_ones(family, num_noisy):
  """Each member's marginal: standard Gumbel, independent between experts."""
  noise = members(family, num_noisy, 0 * LOGITS)[1:].astype(np.float64)
  for member in noise:
    assert scipy.stats.kstest(member.ravel(), "gumbel_r").pvalue > 0.001
    off = np.corrcoef(member.T) - np.eye(6)
    assert abs(off).max() < 4.5 / np.sqrt(len(member))
  scaled = members(family, num_noisy, LOGITS, 0.5)[1:]
  np.testing.assert_allclose(scaled, LOGITS + 0.5 * noise, atol=1e-5)


def test_antithetic_members_mirror_each_other():
  u = np.exp(-np.exp(-members("antithetic", 5, 0 * LOGITS)[1:].astype(np.float64)))
  np.testing.assert_allclose(u[0] + u[1], 1, atol=1e-5)
  np.testing.assert_allclose(u[2] + u[3], 1, atol=1e-5)
  for a, b in ((0, 2), (0, 4), (2, 4)):  # pairs are independent
    assert abs(np.corrcoef(u[a].ravel(), u[b].ravel())[0, 1]) < 4 / np.sqrt(u[0].size)


@pytest.mark.parametrize("num_noisy", [4, 5, 6])
def test_stratified_members_have_one_draw_in_each_part(num_noisy):
  u = np.exp(-np.exp(-members("stratified", num_noisy, 0 * LOGITS)[1:].astype(np.float64)))
  parts = np.floor(num_noisy * u + 1e-5 * (0.5 - u)).astype(int)
  np.testing.assert_array_equal(np.sort(parts, axis=0)[:, :, 0].T[0], np.arange(num_noisy))
  assert np.mean(np.sort(parts, axis=0) == np.arange(num_noisy)[:, None, None]) > 0.9999
  # Which member has which part differs between experts.
  assert abs(np.corrcoef(parts[0].T) - np.eye(6)).max() < 4.5 / np.sqrt(len(parts[0]))


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_coupled_members_have_the_correlation_asked_for(correlation):
  noise = members(perturbations.coupled(correlation), 3, 0 * LOGITS)[1:].astype(np.float64)
  z = scipy.special.ndtri(np.exp(-np.exp(-noise))).reshape(3, -1)
  if correlation == 1:
    np.testing.assert_array_equal(noise[0], noise[2])
  else:
    assert abs(np.corrcoef(z)[0, 1:] - correlation).max() < 4 / np.sqrt(z.shape[1])


def test_members_of_a_partition_have_parts_of_their_own():
  found = members("partition", 3)[1:, 0]
  kept = np.isfinite(found)
  np.testing.assert_array_equal(kept.sum(0), 1)  # disjoint, and all together
  for member, chosen in zip(found, ([0, 1], [2, 3], [4, 5])):
    np.testing.assert_array_equal(member[chosen], LOGITS[chosen])
  # Members take turns if there are fewer parts, and parts may differ in size.
  kept = np.isfinite(members(perturbations.partition(4), 5)[1:, 0])
  np.testing.assert_array_equal(kept[0], kept[4])
  assert sorted(kept[:4].sum(1)) == [1, 1, 2, 2] and (kept[:4].sum(0) == 1).all()
  # One part is the plain model; Gumbel noise may act within the parts.
  np.testing.assert_array_equal(members(perturbations.partition(1), 2)[1, 0], LOGITS)
  both = members(perturbations.partition(2, gumbel=True), 4)[1:]
  assert (np.isfinite(both[0]) == np.isfinite(both[2])).all()
  values = both[:, :, :3][:1].astype(np.float64) - LOGITS[:3]
  assert scipy.stats.kstest(values[0, :, 1], "gumbel_r").pvalue > 0.01
  assert np.any(both[0] != both[2])


@pytest.mark.parametrize("ranks", [(1,), (3,), (2, 5), (6,)])
def test_only_the_ranks_asked_for_are_left(ranks):
  found = members(perturbations.rank_experts(ranks), 1, num_draws=3)[1, 2]
  by_rank = np.argsort(-LOGITS)[np.array(ranks) - 1]
  np.testing.assert_array_equal(np.flatnonzero(np.isfinite(found)), np.sort(by_rank))
  np.testing.assert_array_equal(found[by_rank], LOGITS[by_rank])


def test_a_random_expert_may_be_any_that_is_not_banned():
  logits = np.where(np.arange(6) == 4, -np.inf, LOGITS)
  kept = np.isfinite(members("random_expert", 1, logits)[1])
  np.testing.assert_array_equal(kept.sum(1), 1)
  counts = np.delete(kept.sum(0), 4)
  assert kept[:, 4].sum() == 0 and scipy.stats.chisquare(counts).pvalue > 0.01


def test_certain_experts_stay_and_others_are_drawn_from_the_pool():
  """Sets against probabilities by counting orders of draws without replacement."""
  family, temperature = perturbations.expert_sample(fixed=1, pool=5), 0.7
  kept = np.isfinite(members(family, 1, LOGITS, temperature, count=3)[1])
  by_rank = np.argsort(-LOGITS)
  assert kept[:, by_rank[0]].all() and not kept[:, by_rank[5]].any()
  np.testing.assert_array_equal(kept.sum(1), 3)
  p = scipy.special.softmax(LOGITS[by_rank[1:5]].astype(np.float64) / temperature)
  observed, expected = [], []
  for a, b in itertools.combinations(range(4), 2):
    observed.append((kept[:, by_rank[1 + a]] & kept[:, by_rank[1 + b]]).sum())
    expected.append(len(kept) * p[a] * p[b] * (1 / (1 - p[a]) + 1 / (1 - p[b])))
  assert scipy.stats.chisquare(observed, expected).pvalue > 0.01
  # All fixed is the model's own choice, by default half are.
  everything = members(perturbations.expert_sample(fixed=2, pool=2), 1)[1]
  np.testing.assert_array_equal(np.argsort(-everything, axis=1)[:, :2], [by_rank[:2]] * 4000)
  default = np.isfinite(members("expert_sample", 1)[1])
  assert default[:, by_rank[0]].all() and not default[:, by_rank[4:]].any()
  assert default[:, by_rank[3]].any()


@pytest.mark.parametrize(
  "text, message",
  [
    ("coupled(correlation=2)", r"must lie in \[0, 1\], got 2"),
    ("partition(subsets=0)", "subsets must be a positive integer"),
    ("partition(subsets=9)", "8 experts cannot be split into 9 parts"),
    ("rank_experts(ranks=0)", "ranks must be positive integers"),
    ("rank_experts(ranks=9)", "no rank 9 among 8 experts"),
    ("rank_experts(rank=2)", r"does not fit rank_experts\(ranks=2\)"),
    ("rank_experts(ranks=)", r"does not fit rank_experts\(ranks=2\)"),
    ("expert_sample(fixed=4)", "0 <= fixed <= 3 <= pool, got 4 and 6"),
    ("gumbel(scale=2)", r"'gumbel' has no parameters; what has: coupled\(correlation=0.5\)"),
  ],
)
def test_wrong_parameters_are_refused(olmoe, text, message):
  with pytest.raises(ValueError, match=message):
    Roster.create(olmoe[0], 2, 0.3, noise=text)


def test_families_with_parameters_are_written_and_read(olmoe):
  roster = Roster.create(
    olmoe[0], 2, 0.3, noise=perturbations.rank_experts((2, 3)), aggregation="contrast( beta=0.25 )"
  )
  settings = roster.settings()
  assert settings["noise"] == "rank_experts(ranks=2-3)"
  assert settings["aggregation"] == "contrast(alpha=0.1,beta=0.25)"
  again = Roster.create(olmoe[0], **settings)
  assert again.perturb is roster.perturb and again.combine is roster.combine
  assert again.combine is aggregation.contrast(0.1, 0.25)
  assert not again.is_random and Roster.create(olmoe[0], 2, 0.3).is_random
  with pytest.raises(ValueError, match="alpha must lie"):
    Roster.create(olmoe[0], 2, 0.3, aggregation="contrast(alpha=0)")
