"""The key/value cache, and that a roster shares it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from roe_jax import cache as kv_cache
from roe_jax import members as members_lib
from roe_jax import roster as roster_lib

CONFIG = tiny.config("olmoe")


def test_an_empty_cache_has_the_shape_and_dtype_of_the_config():
  cache = kv_cache.empty(CONFIG.replace(dtype="bfloat16"), 5, 7)
  assert cache.keys.shape == cache.values.shape == (3, 5, 2, 7, 8)
  # On CPUs bfloat16 is held as its bits.
  assert cache.keys.dtype == cache.values.dtype == jnp.uint16
  assert cache.capacity == 7


@pytest.mark.parametrize(
  "count, starts",
  [
    (1, [0, 3, 6]),
    (3, [0, 2, 4]),
    (7, [0, 0, 0]),
    # What lies beyond the capacity of 7 is dropped.
    (3, [5, 6, 9]),
  ],
)
def test_writing_at_different_starts(count, starts):
  random = np.random.RandomState(0)

  def values(*shape):
    return random.standard_normal(shape).astype(np.float32)

  old = [values(3, 3, 2, 7, 8) for _ in range(2)]
  new = [values(3, 3, count, 2, 8) for _ in range(2)]
  cache = kv_cache.write(
    kv_cache.KVCache(*map(jnp.asarray, old)), *map(jnp.asarray, new), jnp.asarray(starts)
  )
  for actual, expected, written in zip((cache.keys, cache.values), old, new):
    for row, start in enumerate(starts):
      for i in range(count):
        if start + i < 7:
          expected[:, row, :, start + i] = written[:, row, i]
    np.testing.assert_array_equal(actual, expected)


SLIDING = tiny.config("olmoe", num_layers=6, sliding_window=4, sliding_layers=(1, 2, 5))


def test_an_empty_window_is_as_long_as_rows_see_or_as_the_text():
  cache = kv_cache.empty(SLIDING, 5, 7)
  assert cache.keys.shape == (3, 5, 2, 7, 8)
  assert cache.sliding.keys.shape == cache.sliding.values.shape == (3, 5, 2, 4, 8)
  assert cache.sliding.positions.shape == (3, 5, 1, 4, 1)
  assert (cache.sliding.positions == kv_cache.NO_POSITION).all()
  assert kv_cache.empty(SLIDING, 5, 7, rerun=7).sliding.capacity == 7
  assert kv_cache.empty(SLIDING, 5, 3).sliding.capacity == 3
  assert kv_cache.empty(SLIDING, 5, 7, (2, 5)).sliding.keys.shape[0] == 1
  assert kv_cache.empty(CONFIG, 5, 7).sliding is None


def test_the_place_of_a_layer_counts_its_kind_from_the_first_of_the_cache():
  def places(layers, layer_range, offset):
    found = [
      kv_cache.layer_location(SLIDING, jnp.int32(layer), layer_range, offset) for layer in layers
    ]
    return [(bool(p.is_sliding), int(p.index)) for p in found]

  whole = [(False, 0), (True, 0), (True, 1), (False, 1), (False, 2), (True, 2)]
  assert places(range(6), (0, 6), 0) == whole
  assert places(range(1, 6), (1, 6), 1) == [(True, 0), (True, 1), (False, 0), (False, 1), (True, 2)]
  assert places(range(4, 6), (4, 6), 2) == [(False, 1), (True, 1)]
  # Known before running where a range is of one kind.
  assert kv_cache.layer_location(SLIDING, jnp.int32(3), (3, 5)).is_sliding is False
  assert kv_cache.layer_location(SLIDING, jnp.int32(1), (1, 3)).is_sliding is True
  assert kv_cache.layer_location(CONFIG, 2, (0, 3), 1) == kv_cache.LayerLocation(False, 1)


@pytest.mark.parametrize("chunks", [[1] * 19, [3] * 7, [4, 4, 11], [19], [2, 16, 1]])
def test_a_window_holds_the_last_positions_below_the_length(chunks):
  lengths = np.array([19, 0, 5, 13])
  random = np.random.RandomState(0)
  keys, values = (random.standard_normal((4, 21, 2, 8)).astype(np.float32) for _ in range(2))
  write = jax.jit(kv_cache.write_sliding)
  window, start = kv_cache.empty(SLIDING, 4, 32).sliding, 0
  for count in chunks:
    new = (jnp.asarray(a[:, start : start + count]) for a in (keys, values))
    window = write(window, *new, jnp.full(4, start), jnp.int32(1), jnp.asarray(lengths))
    start += count
  for row, length in enumerate(lengths):
    held = np.asarray(window.positions[1, row, 0, :, 0])
    seen = range(max(0, length - 4), length)
    assert sorted(held[held != kv_cache.NO_POSITION]) == list(seen)
    for position in seen:
      assert held[position % 4] == position
      np.testing.assert_array_equal(window.keys[1, row, :, position % 4], keys[row, position])
      np.testing.assert_array_equal(window.values[1, row, :, position % 4], values[row, position])
  for layer in (0, 2):
    assert (window.positions[layer] == kv_cache.NO_POSITION).all()


def test_one_step_is_put_into_layers_of_both_kinds():
  cache = kv_cache.empty(SLIDING, 2, 9)
  keys = jnp.asarray(np.random.RandomState(0).standard_normal((6, 2, 1, 2, 8)), jnp.float32)
  found = kv_cache.write_step(SLIDING, cache, keys, 2 * keys, jnp.asarray([3, 6]))
  for row, position in enumerate([3, 6]):
    for arrays, layers, slot in (
      (found, (0, 3, 4), position),
      (found.sliding, (1, 2, 5), position % 4),
    ):
      new = keys[jnp.asarray(layers), row, 0]
      np.testing.assert_array_equal(arrays.keys[:, row, :, slot], new)
      np.testing.assert_array_equal(arrays.values[:, row, :, slot], 2 * new)
    assert (found.sliding.positions[:, row, 0, position % 4, 0] == position).all()
  assert np.count_nonzero(found.keys) == np.count_nonzero(found.sliding.keys) == 3 * 2 * 16


def test_members_share_one_cache_without_copies():
  """Temporaries of a compiled roster grow with the members, but by far less
  than the cache that all of them read."""
  # Heads as wide as they are few, so that attention scores stay small beside
  # the cache.
  config = tiny.config("mixtral", num_heads=2, head_dim=64, context_length=4096)
  params = jax.eval_shape(lambda: tiny.params(config))
  rows, capacity = 2, 4096
  rows_of_zeros = jnp.zeros(rows, jnp.int32)

  def temporaries(num_members):
    roster = roster_lib.Roster.create(config, num_members, 0.5)
    cache = members_lib.empty_cache(config, roster, rows, capacity)
    compiled = (
      jax.jit(roster.cache_mode.states)
      .lower(members_lib.RosterPass.of_step(params, config, roster, *3 * [rows_of_zeros]), cache)
      .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes

  growth = (temporaries(18) - temporaries(2)) / 16
  keys_of_one_layer = rows * 2 * capacity * 64 * 4
  # The scores of a member: [B, H, S], perhaps several times.
  assert growth < 6 * rows * 2 * capacity * 4 < keys_of_one_layer / 8


def test_cache_bytes_are_those_of_the_arrays():
  for cache, members in (("clean", 1), ("standard", 5)):
    roster = roster_lib.Roster.create(CONFIG, 5, 0.5, cache=cache)
    arrays = members_lib.empty_cache(CONFIG, roster, 3, 16)
    expected = members * 2 * 3 * 3 * 2 * 16 * 8 * 4
    assert sum(a.nbytes for a in jax.tree.leaves(arrays)) == expected
    assert roster.cache_mode.bytes(CONFIG, roster, 3, 16) == expected
  roster = roster_lib.Roster.create(CONFIG, 5, 0.5, cache="none")
  assert roster.cache_mode.bytes(CONFIG, roster, 3, 16) == 3 * 16 * 4  # the tokens
