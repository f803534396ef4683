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


@pytest.mark.parametrize("count, starts", [
    (1, [0, 3, 6]), (3, [0, 2, 4]), (7, [0, 0, 0]),
    # What lies beyond the capacity of 7 is dropped.
    (3, [5, 6, 9])])
def test_writing_at_different_starts(count, starts):
  random = np.random.RandomState(0)
  def values(*shape):
    return random.standard_normal(shape).astype(np.float32)
  old = [values(3, 3, 2, 7, 8) for _ in range(2)]
  new = [values(3, 3, count, 2, 8) for _ in range(2)]
  cache = kv_cache.write(kv_cache.KVCache(*map(jnp.asarray, old)), *map(jnp.asarray, new),
                         jnp.asarray(starts))
  for actual, expected, written in zip((cache.keys, cache.values), old, new):
    for row, start in enumerate(starts):
      for i in range(count):
        if start + i < 7:
          expected[:, row, :, start + i] = written[:, row, i]
    np.testing.assert_array_equal(actual, expected)


def test_members_share_one_cache_without_copies():
  """Temporaries of a compiled roster grow with the members, but by far less
  than the cache that all of them read."""
  # Heads as wide as they are few, so that attention scores stay small beside
  # the cache.
  config = tiny.config("mixtral", num_heads=2, head_dim=64, context_length=4096)
  params = jax.eval_shape(lambda: tiny.params(config))
  rows, capacity = 2, 4096

  def temporaries(num_members):
    roster = roster_lib.Roster.create(config, num_members, 0.5)
    cache = members_lib.empty_cache(config, roster, rows, capacity)
    compiled = jax.jit(members_lib.member_states, static_argnames="config").lower(
        params, config, roster, cache, jnp.zeros((rows, 1), jnp.int32),
        jnp.zeros((rows, 1), jnp.int32), jnp.zeros(rows, jnp.uint32)).compile()
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
    assert members_lib.cache_bytes(CONFIG, roster, 3, 16) == expected
