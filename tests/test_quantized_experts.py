"""Experts of few bits: every strategy against a loop in float64, and what is widened when."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from roe_jax import experts as experts_lib
from roe_jax import numerics, quantization
from roe_jax import params as params_lib
from roe_jax.experts import Activation, tiled_loop
from roe_jax.params import ExpertParams
from roe_jax.quantization import FORMATS, is_quantized

pytestmark = pytest.mark.slow

L, E, D, F, A = 2, 8, 64, 96, 3
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7}
CLAMPED = Activation(limit=1.0, alpha=1.702)


def weights(format, dtype="float32", biases=False, sizes=(L, E, D, F)):
  l, e, d, f = sizes
  random = np.random.RandomState(0)
  make = lambda *shape: (0.3 * random.standard_normal(shape)).astype(np.float32)
  experts = {
    name: jax.tree.map(jnp.asarray, quantization.quantize(array, format, axis))
    for (name, axis), array in zip(
      quantization.CONTRACTED.items(), (make(l, e, f, 2, d), make(l, e, f, d))
    )
  }
  if biases:
    experts |= {
      "gate_up_bias": jnp.asarray(make(l, e, f, 2), dtype),
      "down_bias": jnp.asarray(make(l, e, d), dtype),
    }
  return ExpertParams(**experts)


def rows(n, dtype="float32", d=D):
  random = np.random.RandomState(1)
  indices = np.argsort(random.uniform(size=(n, E)), axis=-1)[:, :A]
  return (
    jnp.asarray(random.standard_normal((n, d)), dtype),
    jnp.asarray(indices, jnp.int32),
    jnp.asarray(random.uniform(0.1, 1, (n, A)), jnp.float32),
  )


def by_loop(params, layer, x, indices, gates, activation, dtype):
  """The sum over chosen experts in float64, and the size of what is rounded."""
  plain = {}
  for name in params.__dataclass_fields__:
    w = getattr(params, name)
    if is_quantized(w):  # in the dtype that they are widened to
      w = quantization.dequantize_on_host(jax.tree.map(np.asarray, w)).astype(dtype)
    plain[name] = None if w is None else np.asarray(w, np.float64)[layer]
  x, gates = np.asarray(x, np.float64), np.asarray(gates, np.float64)
  y, magnitude = np.zeros_like(x), np.zeros_like(x)
  for row in range(len(x)):
    for e, weight in zip(np.asarray(indices)[row], gates[row]):
      gate, up = (plain["gate_up"][e, :, i] @ x[row] for i in (0, 1))
      if plain["gate_up_bias"] is not None:
        gate, up = gate + plain["gate_up_bias"][e, :, 0], up + plain["gate_up_bias"][e, :, 1]
      if activation.limit is None:
        hidden = gate / (1 + np.exp(-gate)) * up
      else:
        gate, up = (
          np.minimum(gate, activation.limit),
          np.clip(up, -activation.limit, activation.limit),
        )
        hidden = (up + 1) * gate / (1 + np.exp(-activation.alpha * gate))
      out = hidden @ plain["down"][e]
      if plain["down_bias"] is not None:
        out = out + plain["down_bias"][e]
      y[row] += weight * out
      magnitude[row] += weight * (np.abs(hidden) @ np.abs(plain["down"][e]) + np.abs(out))
  return y, magnitude


@functools.partial(jax.jit, static_argnums=(0, 1))
def apply(strategy, activation, params, layer, *row_args):
  return experts_lib.apply(params, layer, *row_args, strategy, activation)


def check(strategy, params, n, dtype, activation=Activation(), d=D):
  args = rows(n, dtype, d)
  in_float32 = strategy in (None, "native", "tiled_loop") or dtype == "float32"
  for layer in range(L):
    actual = apply(strategy, activation, params, layer, *args)
    assert actual.dtype == args[0].dtype
    expected, magnitude = by_loop(
      params, layer, *args, activation, np.float32 if in_float32 else ml_dtypes.bfloat16
    )
    error = np.abs(np.asarray(actual, np.float64) - expected)
    bound = (1 if dtype == "bfloat16" else 32) * EPSILON[dtype] * magnitude
    assert np.all(error <= bound), (error / bound).max()
    assert np.median(np.abs(expected)) > 4 * np.median(bound)  # no expert is missing


@pytest.mark.parametrize(
  "format, n, dtype", [("int8", 1, "float32"), ("int4", 21, "bfloat16"), ("mxfp4", 21, "float32")]
)
@pytest.mark.parametrize("strategy", [*experts_lib.STRATEGIES, None])
def test_strategies_agree_with_a_loop(strategy, format, n, dtype):
  check(strategy, weights(format), n, dtype)


@pytest.mark.parametrize("strategy, format", list(zip(experts_lib.STRATEGIES, 2 * list(FORMATS))))
def test_biases_and_the_clamped_activation(strategy, format):
  check(strategy, weights(format, biases=True), 5, "float32", CLAMPED)


@pytest.mark.parametrize("format", FORMATS)
def test_parameters_held_as_bits(format):
  params = params_lib.in_storage_dtype(weights(format, "bfloat16", biases=True))
  assert params.down_bias.dtype == jnp.uint16
  args = rows(9, "bfloat16")
  np.testing.assert_array_equal(
    apply(None, CLAMPED, params, 1, *args),
    apply(None, CLAMPED, weights(format, "bfloat16", biases=True), 1, *args),
  )


@pytest.mark.parametrize(
  "format,d,f",
  [("int8", 10, 7), ("int8", 7, 256), ("int4", 10, 12), ("int4", 192, 3), ("int4", 6, 320)],
)
def test_odd_sizes(format, d, f):
  """Groups that reach over the middle of D, that are one weight, or longer than a tile."""
  check(None, weights(format, sizes=(L, E, d, f)), 5, "float32", d=d)


@pytest.mark.parametrize(
  "blocks, rows_of_tile", [((1, 1), 32), ((4, 3), 16), ((16, 1), 1)], ids=str
)
@pytest.mark.parametrize("format", FORMATS)
def test_sizes_of_blocks_and_tiles_change_nothing(monkeypatch, blocks, rows_of_tile, format):
  monkeypatch.setattr(tiled_loop, "_block_size", lambda *args: blocks)
  monkeypatch.setattr(numerics, "tile_bytes", lambda: rows_of_tile * 4 * 2 * D)
  assert numerics.tile_rows(F, 2 * D, 32) == rows_of_tile
  apply.clear_cache()
  check("tiled_loop", weights(format), 33, "float32")
  apply.clear_cache()


@pytest.mark.parametrize(
  "size,row,group,expected",
  [
    (2880, 5760, 32, 16),
    (2880, 5760, 64, 16),
    (1024, 4096, 128, 32),
    (14336, 8192, 64, 16),
    (768, 4096, 32, 32),
    (96, 1400, 32, 32),
    (96, 1400, 1, 48),
  ],
)
def test_tiles_are_whole_groups_or_lie_within_one(monkeypatch, size, row, group, expected):
  monkeypatch.setenv("NPROC", "1")
  rows = numerics.tile_rows(size, row, group)
  assert rows == expected and (rows % group == 0 or group % rows == 0)


@pytest.mark.parametrize("members", [1, 24])
@pytest.mark.parametrize("format", FORMATS)
def test_no_more_than_a_tile_is_widened(monkeypatch, format, members):
  monkeypatch.setenv("NPROC", "1")
  config = params_lib.ModelConfig(
    family="gpt_oss",
    vocab_size=8,
    num_layers=2,
    d_model=512,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    num_experts=16,
    experts_per_token=A,
    d_expert=512,
    context_length=8,
    normalize_gates=True,
    gates_in_model_dtype=True,
    qk_norm=False,
    expert_format=format,
  )
  params = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, jnp.uint16 if a.dtype == jnp.bfloat16 else a.dtype),
    params_lib.abstract(config).layers.experts,
  )
  array = jax.ShapeDtypeStruct
  mapped = jax.vmap(lambda p, *a: experts_lib.apply(p, 1, *a), in_axes=(None, 0, 0, 0))
  compiled = (
    jax.jit(mapped)
    .lower(
      params,
      array((members, 1, 512), jnp.float32),
      array((members, 1, A), jnp.int32),
      array((members, 1, A), jnp.float32),
    )
    .compile()
  )
  one_expert = 4 * 3 * 512 * 512
  assert compiled.memory_analysis().temp_size_in_bytes < one_expert


@pytest.mark.parametrize("platform,blocks", [("gpu", [16, 32, 128]), ("tpu", [16, 32, 128])])
def test_accelerators_take_an_expert_at_a_time(monkeypatch, platform, blocks):
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  assert numerics.tile_rows(2880, 5760, 32) == 2880
  assert [tiled_loop._block_size(8 * n, 64, 2**20) for n in (1, 128, 1000)] == [
    (b, 1) for b in blocks
  ]
  matrix = weights("mxfp4").down
  (tile,) = quantization.tile_weights(matrix, jnp.bfloat16)
  assert tile.dtype == jnp.bfloat16 and tile.shape == (L, E, F, D)


def test_members_fold_into_rows():
  params = weights("int4")
  x, indices, gates = rows(6)
  mapped = jax.vmap(lambda *a: experts_lib.apply(params, 1, *a))(
    x[:, None], indices[:, None], gates[:, None]
  )
  np.testing.assert_allclose(
    mapped[:, 0], apply(None, Activation(), params, 1, x, indices, gates), rtol=1e-5, atol=1e-5
  )
