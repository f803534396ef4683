"""Loads of devices, counted by hand."""

import numpy as np

from experiments import expert_load


def test_loads_count_the_choices_of_all_members_up_to_the_end_of_a_sequence():
  # Two members, two sequences of two and one tokens, two choices; 4 is no expert.
  experts = np.array([[[[[0, 1], [2, 3]], [[1, 2], [0, 3]]], [[[0, 2], [2, 4]], [[1, 3], [0, 3]]]]])
  found = expert_load.loads(experts, [2, 1], 4)
  np.testing.assert_array_equal(found, [[[2, 3, 2, 1], [0, 0, 2, 1]]])
  load = expert_load.imbalance(found[0], np.array([0, 0, 1, 1]))
  np.testing.assert_allclose(load, [5 / 4, 2])
  assert np.isnan(expert_load.imbalance(np.zeros((1, 4)), np.array([0, 0, 1, 1]))).all()


def test_experts_are_placed_by_their_loads():
  load = np.array([9, 8, 1, 2])
  device = expert_load.placed(load, 2)
  np.testing.assert_array_equal(device, [0, 1, 0, 1])
  assert expert_load.imbalance(load[None], device)[0] == 1
  np.testing.assert_array_equal(np.bincount(expert_load.placed(np.arange(8), 4)), 2)


def test_placing_by_other_batches_helps_where_loads_last_and_chance_is_in_the_steps():
  random = np.random.RandomState(0)
  skewed = [random.poisson([9, 9, 1, 1], (2, 40, 4)) for _ in range(4)]
  found = expert_load.measures(skewed, 2)
  assert all(len(values) == 4 for values in found.values())
  assert found["total"].min() > 1.6 and found["total, placed"].max() < 1.1
  assert (found["step"] > found["step, even"] + 0.3).all() and (found["step, even"] > 1.05).all()
