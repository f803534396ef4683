"""Carving: the division of neurons, the fitted router, and carved checkpoints."""

import itertools

import numpy as np
import pytest
from scipy import optimize

from checkpoints_convert import carving
from checkpoints_convert.common import ConversionError


def _planted(seed=0, tokens=96, groups=3, width=4, shared=4):
  """Returns contributions whose groups of neurons are active in disjoint sets of tokens.

  The first `shared` neurons are always active and the largest. All are then permuted.
  """
  rng = np.random.default_rng(seed)
  c = rng.uniform(0.01, 0.02, (tokens, shared + groups * width))
  c[:, :shared] += 5
  group = rng.integers(groups, size=tokens)
  for j in range(groups):
    c[group == j, shared + j * width : shared + (j + 1) * width] += 1
  c *= rng.choice([-1, 1], c.shape)
  order = rng.permutation(c.shape[1])
  expected = {frozenset(np.flatnonzero((order - shared) // width == j)) for j in range(groups)}
  return c[:, order].astype(np.float32), np.flatnonzero(order < shared), expected


def test_planted_groups_are_recovered():
  contributions, shared, groups = _planted()
  division = carving.divide(contributions, carving.Plan(1, 1, 4), marked=8)
  np.testing.assert_array_equal(division.shared, shared)
  assert {frozenset(e) for e in division.experts} == groups
  assert sorted(division.order) == list(range(contributions.shape[1]))
  assert all(r in e for r, e in zip(division.representatives, division.experts))
  # The target of the router names the group that is active in each token.
  best = carving.expert_contributions(contributions, division.experts).argmax(axis=1)
  active = np.abs(contributions) > 0.5
  for token, expert in enumerate(best):
    assert active[token, division.experts[expert]].all()


def test_clusters_minimize_the_total_distance():
  rng = np.random.default_rng(1)
  marks = rng.random((20, 6)) < 0.4
  clusters, nearest = carving.balanced_clusters(marks, 2)
  starts = np.argsort(-marks.sum(0), kind="stable")[:2]
  distance = np.abs(marks[:, :, None].astype(int) - marks[:, None, starts]).sum(0)

  def cost(first):
    others = [i for i in range(6) if i not in first]
    return distance[list(first), 0].sum() + distance[others, 1].sum()

  assert cost(tuple(clusters[0])) == min(map(cost, itertools.combinations(range(6), 3)))
  for columns, column in zip(clusters, nearest):
    mean = marks[:, columns].mean(axis=1, keepdims=True)
    gaps = np.abs(marks[:, columns] - mean).sum(0)
    assert gaps[list(columns).index(column)] == gaps.min()


def test_clusters_equal_the_transport_problem():
  """Balanced assignment is a linear program, which another solver gives the same cost."""
  rng = np.random.default_rng(2)
  marks = rng.random((64, 24)) < rng.random(24)
  clusters, _ = carving.balanced_clusters(marks, 4)
  starts = np.argsort(-marks.sum(0), kind="stable")[:4]
  distance = (marks[:, :, None] != marks[:, None, starts]).sum(0)
  each_neuron = np.kron(np.eye(24), np.ones(4))
  each_cluster = np.kron(np.ones(24), np.eye(4))
  best = optimize.linprog(
    distance.ravel(),
    A_eq=np.vstack([each_neuron, each_cluster]),
    b_eq=[1] * 24 + [6] * 4,
  )
  assert sum(distance[c, j].sum() for j, c in enumerate(clusters)) == round(best.fun)


def test_fitted_router_is_the_least_squares_solution():
  rng = np.random.default_rng(3)
  x, weights, bias = rng.normal(size=(50, 5)), rng.normal(size=(3, 5)), rng.normal(size=3)
  found = carving.fit_linear(x, x @ weights.T + bias, ridge=0)
  np.testing.assert_allclose(found[0], weights, atol=1e-5)
  np.testing.assert_allclose(found[1], bias, atol=1e-5)


@pytest.mark.parametrize(
  "text, message",
  [
    ("4A8E16", "like S4A8E16"),
    ("S4A13E16", "no more than 16"),
    ("S16A0E16", "at least one active"),
  ],
)
def test_plans_are_refused(text, message):
  with pytest.raises(ConversionError, match=message):
    carving.Plan.parse(text)


def test_uneven_experts_are_refused():
  with pytest.raises(ConversionError, match="divisor of 1536"):
    carving.Plan.parse("S1A2E7").width(1536)
