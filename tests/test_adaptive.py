"""Adaptive rosters: members run where the clean member is unsure, until a token is settled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from roe_jax import adaptive, diagnostics, scoring
from roe_jax.adaptive import Stop, Unsure
from roe_jax.roster import Roster

TEXTS = tiny.texts([16, 16, 16])
TOKENS = jnp.asarray(TEXTS, jnp.int32)
NUM = 9


@pytest.fixture(scope="module")
def log_probs(olmoe):
  config, params = olmoe
  run = jax.jit(scoring.log_probs, static_argnums=1)
  create = functools.partial(Roster.create, config, seed=5)
  return lambda *roster, **settings: np.asarray(
    run(params, config, TOKENS, create(*roster, **settings))
  )


@pytest.fixture(scope="module")
def baseline(log_probs):
  return log_probs()


@pytest.fixture(scope="module")
def full(log_probs):
  return log_probs(NUM, 0.4)


def measures(log_probs):
  p = np.sort(np.exp(np.float64(log_probs)), axis=-1)
  entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
  return {"top_probability": p[..., -1], "margin": p[..., -1] - p[..., -2], "entropy": entropy}


@pytest.mark.parametrize("name", ["top_probability", "margin", "entropy"])
def test_members_run_where_the_clean_member_is_unsure(name, log_probs, baseline, full):
  values = measures(baseline)[name]
  side, counts = adaptive.MEASURES[name][0], []
  for share in 0.05, 0.15, 0.4, 0.5, 0.85:  # pieces of 16 rows, and 4 of a rest
    threshold = float(np.float32(np.quantile(values, share) + 1e-3))
    is_unsure = values < threshold if side == "<" else values > threshold
    found = log_probs(NUM, 0.4, unsure=f"{name}{side}{threshold!r}")
    np.testing.assert_allclose(found[is_unsure], full[is_unsure], atol=2e-5)
    np.testing.assert_array_equal(found[~is_unsure], baseline[~is_unsure])
    counts.append(int(is_unsure.sum()))
  assert min(counts) < 8 and max(counts) > 36 and any(1 <= c % 16 < 8 for c in counts)


def test_a_threshold_of_always_or_never_is_the_roster_or_the_baseline(log_probs, baseline, full):
  np.testing.assert_array_equal(log_probs(NUM, 0.4, unsure="margin<-1"), baseline)
  np.testing.assert_array_equal(log_probs(NUM, 0.4, unsure="margin<inf"), full)
  np.testing.assert_allclose(log_probs(NUM, 0.4, unsure="margin<1"), full, atol=2e-5)


@pytest.fixture(scope="module")
def member_logits(olmoe):
  config, params = olmoe
  roster = Roster.create(config, NUM, 0.4, seed=5)
  return diagnostics.member_logits(params, config, TEXTS, roster=roster, all_positions=True)


def expected_stops(logits, is_settled, include_clean=True):
  """How many members are averaged at each position, and their mean probability."""
  p = np.exp(np.float64(jax.nn.log_softmax(logits, axis=-1)))[int(not include_clean) :]
  n, counts = len(p), np.full(p.shape[1:3], len(p))
  first = 2 if include_clean else 1
  for count in range(n - 1, first - 1, -1):
    counts = np.where(is_settled(p, count, first), count, counts)
  total = p.cumsum(axis=0)
  mean = np.take_along_axis(total, counts[None, ..., None] - 1, axis=0)[0] / counts[..., None]
  return counts, np.log(mean)


def leads(total):
  ranked = np.sort(total, axis=-1)
  return ranked[..., -1] - ranked[..., -2]


@pytest.mark.parametrize("include_clean", [True, False])
def test_an_exact_stop_changes_no_greedy_token(include_clean, log_probs, member_logits):
  left = lambda p, count, first: leads(p[:count].sum(axis=0)) > len(p) - count + 1e-4
  num = NUM - (not include_clean)
  counts, expected = expected_stops(member_logits, left, include_clean)
  assert len(np.unique(counts)) > 3
  settings = {"include_clean": include_clean}
  found = log_probs(num, 0.4, member_stop="exact", **settings)
  np.testing.assert_allclose(found, expected, atol=3e-5)
  whole = log_probs(num, 0.4, **settings)
  np.testing.assert_array_equal(found.argmax(-1), whole.argmax(-1))


def test_majority_is_settled_when_the_votes_are(log_probs):
  settings = {"aggregation": "majority"}
  found = log_probs(NUM, 0.4, member_stop="exact", **settings)
  np.testing.assert_array_equal(found.argmax(-1), log_probs(NUM, 0.4, **settings).argmax(-1))


@pytest.mark.parametrize("rare", [0.0, 0.08], ids=["normal", "rare members differ much"])
def test_a_statistical_stop_errs_at_most_as_often_as_stated(rare):
  """Simulated members of 4,000 tokens: 32 noisy ones in batches of 4, as they run."""
  rate, rows, noisy = 0.05, 4000, 32
  random = np.random.default_rng(0)
  share = 0.5 + random.normal(0.03, 0.06, (rows, 1)) + random.normal(0, 0.1, (rows, noisy))
  share = np.where(random.random(share.shape) < rare, 0.1, share).clip(0, 1)
  p = jnp.asarray(np.stack([share, 1 - share], axis=-1), jnp.float32)
  stop, stopped_at = Stop.create(rate), np.full(rows, noisy)
  leader = np.zeros(rows, int)
  for count in range(4, noisy + 1, 4):
    sums, squares = p[:, :count].sum(axis=1), (p[:, :count] ** 2).sum(axis=1)
    is_settled = np.asarray(stop.settled(sums, sums, squares, jnp.int32(count), noisy - count))
    now = (stopped_at == noisy) & (is_settled | (count == noisy))
    leader[now] = np.asarray(sums).argmax(-1)[now]
    stopped_at[now & (count < noisy)] = count
  wrong = leader != np.asarray(p.sum(axis=1)).argmax(-1)
  assert wrong.mean() < rate
  assert stopped_at.mean() < 0.9 * noisy and (stopped_at == noisy).any()


@pytest.mark.parametrize(
  "text, sure, unsure",
  [("margin<0.5", [0.8, 0.1], [0.5, 0.2]), ("top_probability<0.6", [0.7, 0.2], [0.5, 0.0])],
)
def test_thresholds_by_hand(text, sure, unsure):
  both = np.array([[*p, 1 - sum(p)] for p in (sure, unsure)])
  doubt = Unsure.create(text).doubt(jnp.log(jnp.asarray(both, jnp.float32) + 1e-9))
  assert (np.asarray(doubt) > 0).tolist() == [False, True]
  assert str(Unsure.create(text)) == text
