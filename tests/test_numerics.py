"""Reading weights tile by tile, and bfloat16 held as bits."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest
import tiny

from roe_jax import cache as kv_cache
from roe_jax import members as members_lib
from roe_jax import numerics, quantization
from roe_jax import params as params_lib
from roe_jax import roster as roster_lib

L, D, OUT = 3, 20, (4, 6)


@pytest.fixture(params=["native", 1, 160, 480, 10**6])
def tile(request, monkeypatch):
  """The native kernels; or bytes of a tile: a row (as 24 has larger ones, not used), 2, 6, all."""
  if request.param != "native":
    monkeypatch.setattr(numerics, "NATIVE_TOKENS", 0)
    monkeypatch.setattr(numerics, "tile_bytes", lambda: request.param)
  return request.param


def arrays(dtype="float32"):
  random = np.random.RandomState(0)
  weights = jnp.asarray(random.standard_normal((L, *OUT, D)), dtype)
  x = jnp.asarray(random.standard_normal((5, 2, D)), dtype)
  h = jnp.asarray(random.standard_normal((5, 2, *OUT)), dtype)
  return weights, x, h


def float64(*values):
  return [np.asarray(v, np.float64) for v in values]


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_projections_of_quantized_matrices_are_those_of_their_weights(tile, format):
  weights, x, h = arrays()
  there, back = (quantization.quantize(np.asarray(weights), format, axis) for axis in (-1, -2))
  exact, exact_back = float64(*map(quantization.dequantize_on_host, (there, back)))
  there, back = jax.tree.map(jnp.asarray, (there, back))
  exact_x, exact_h = float64(x, h)
  layer = jnp.int32(1)

  def run(x, h):
    return numerics.project(x, there, layer), numerics.project_back(h, back, layer)

  for found_there, found_back in (jax.jit(run)(x, h), jax.vmap(run)(x, h)):
    np.testing.assert_allclose(
      found_there, np.einsum("btd,hcd->bthc", exact_x, exact[1]), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
      found_back, np.einsum("bthc,hcd->btd", exact_h, exact_back[1]), rtol=1e-5, atol=1e-5
    )
  of_x = jax.grad(lambda x: jnp.sum(h * numerics.project(x, there, layer)))(x)
  np.testing.assert_allclose(
    of_x, np.einsum("bthc,hcd->btd", exact_h, exact[1]), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize(
  "dtype, held", [("float32", False), ("bfloat16", False), ("bfloat16", True)]
)
def test_projections_are_those_of_numpy(tile, dtype, held):
  weights, x, h = arrays(dtype)
  exact, exact_x, exact_h = float64(weights, x, h)
  if held:
    weights = jax.lax.bitcast_convert_type(weights, jnp.uint16)
  for layer in range(L):
    there = jax.jit(lambda *a: numerics.project(*a))(x, weights, layer)
    back = jax.jit(lambda *a: numerics.project_back(*a))(h, weights, layer)
    assert there.dtype == back.dtype == jnp.float32
    np.testing.assert_allclose(
      there, np.einsum("btd,hcd->bthc", exact_x, exact[layer]), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
      back, np.einsum("bthc,hcd->btd", exact_h, exact[layer]), rtol=1e-5, atol=1e-5
    )


def test_projections_map_over_rows_and_have_gradients(tile):
  weights, x, h = arrays()
  exact, exact_x, exact_h = float64(weights, x, h)
  mapped = jax.vmap(lambda x: numerics.project(x, weights, 1), in_axes=1, out_axes=1)(x)
  np.testing.assert_allclose(
    mapped, np.einsum("btd,hcd->bthc", exact_x, exact[1]), rtol=1e-5, atol=1e-5
  )

  def loss(weights, x, h):
    return jnp.sum(h * numerics.project(x, weights, 1)) + jnp.sum(
      x * numerics.project_back(h, weights, 2)
    )

  of_weights, of_x, of_h = jax.grad(loss, argnums=(0, 1, 2))(weights, x, h)
  expected = np.zeros(exact.shape)
  expected[1:] = np.einsum("bthc,btd->hcd", exact_h, exact_x)
  np.testing.assert_allclose(of_weights, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    of_x, np.einsum("bthc,hcd->btd", exact_h, exact[1] + exact[2]), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
    of_h, np.einsum("btd,hcd->bthc", exact_x, exact[1] + exact[2]), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize(
  "size, row, expected",
  [
    (1024, 1024, 128),  # 512 KiB
    (50304, 1024, 128),
    (512, 2048, 64),
    (1408, 4096, 32),
    (61, 32, 61),  # all of a small matrix
    (50257, 1024, 29),  # 29 x 1733
    (50261, 1024, 50261),  # a prime
  ],
)
def test_rows_of_a_tile(monkeypatch, size, row, expected):
  monkeypatch.setenv("NPROC", "1")
  assert numerics.tile_rows(size, row) == expected


def test_several_cores_take_larger_tiles(monkeypatch):
  monkeypatch.setenv("NPROC", "2")
  assert numerics.tile_rows(1024, 1024) == 1024 and numerics.tile_rows(4096, 1024) == 1024


def test_storage_keeps_every_bfloat16():
  bits = jnp.arange(2**16, dtype=jnp.uint16)
  values = numerics.to_compute_dtype(bits)
  assert values.dtype == jnp.bfloat16
  finite = np.isfinite(np.asarray(values, np.float32))
  np.testing.assert_array_equal(numerics.to_storage_dtype(values, bits)[finite], bits[finite])
  np.testing.assert_array_equal(
    numerics.bits_to_float32(bits)[finite], np.asarray(values, np.float32)[finite]
  )
  x = jnp.float32(1.0 + 2**-9 + 2**-16)
  assert numerics.to_storage_dtype(x, bits) == numerics.to_storage_dtype(
    x.astype(jnp.bfloat16), bits
  )
  assert numerics.to_storage_dtype(x, jnp.zeros((), jnp.float32)) == x
  assert numerics.storage_dtype("float32") == jnp.float32


def test_parameters_are_held_as_bits_without_a_copy():
  config = tiny.config("olmoe", dtype="bfloat16")
  params = tiny.params(config)
  held = params_lib.in_storage_dtype(params)
  for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(held)):
    assert (
      other.dtype == jnp.uint16 and other.unsafe_buffer_pointer() == one.unsafe_buffer_pointer()
    )
    np.testing.assert_array_equal(np.asarray(one).view(np.uint16), other)
  assert params_lib.in_storage_dtype(held).embedding is held.embedding
  plain = tiny.params(tiny.config("olmoe"))
  assert params_lib.in_storage_dtype(plain).embedding is plain.embedding


def test_sharded_parameters_are_held_where_they_are():
  mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  sharding = NamedSharding(mesh, PartitionSpec("x"))
  values = jax.device_put(jnp.arange(32, dtype=jnp.bfloat16).reshape(8, 4), sharding)
  held = params_lib.in_storage_dtype({"w": values})["w"]
  assert held.sharding.is_equivalent_to(sharding, 2)
  np.testing.assert_array_equal(numerics.to_compute_dtype(held), values)


@pytest.mark.parametrize("num_members", [1, 6])
def test_a_bfloat16_step_makes_no_float32_copies(monkeypatch, num_members):
  """Temporaries stay far below the weights, and below one layer's cache."""
  monkeypatch.setenv("NPROC", "1")  # small tiles
  config = tiny.config(
    "olmoe",
    d_model=256,
    d_expert=256,
    num_experts=32,
    vocab_size=4096,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    context_length=4096,
    dtype="bfloat16",
  )
  params = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, jnp.uint16), params_lib.abstract(config)
  )
  roster = roster_lib.Roster.create(config, num_members, 0.5)
  cache = jax.eval_shape(lambda: kv_cache.empty(config, 1, 4096))
  one = lambda dtype: jax.ShapeDtypeStruct((1, 1), dtype)
  ids = jax.ShapeDtypeStruct((1,), jnp.uint32)
  run = members_lib.RosterPass(params, config, roster, one(jnp.int32), one(jnp.int32), ids)
  compiled = jax.jit(roster.cache_mode.step, donate_argnames="cache").lower(run, cache).compile()
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  assert params_lib.num_bytes(config) > 37e6 and cache.keys.size * 2 / 3 == 2 * 2**20
  assert temporaries < 1.5e6 + num_members * 1e5
