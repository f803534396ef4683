"""Expert dispatch: every strategy against a loop in float64."""

import functools

import expert_loop
from expert_loop import CLAMPED, PLAIN
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roe_jax import experts as experts_lib
from roe_jax import lazy_modules, native, numerics
from roe_jax.experts import choices, tiled_loop
from roe_jax.params import ExpertParams

pytestmark = pytest.mark.slow

L, E, D, F, A = 2, 8, 16, 12, 3

every_activation = pytest.mark.parametrize(
  "activation", expert_loop.ACTIVATIONS.values(), ids=list(expert_loop.ACTIVATIONS)
)


def weights(dtype="float32", activation=PLAIN):
  return expert_loop.weights((L, E), F, D, activation, dtype)


def rows(n, dtype="float32", lead=()):
  return expert_loop.rows(n, E, A, D, dtype, lead=lead)


def flattened(params):
  return jax.tree.map(lambda w: w.reshape(L * E, *w.shape[2:]), params)


def assert_agrees(actual, params, layer, x, indices, gates, activation=PLAIN):
  expert_loop.assert_agrees(actual, activation, flattened(params), x, layer * E + indices, gates)


@functools.partial(jax.jit, static_argnums=0, static_argnames="activation")
def apply(strategy, params, layer, *row_args, activation=PLAIN):
  return experts_lib.apply(params, layer, *row_args, strategy, activation)


# The kernels for accelerators are interpreted here.
STRATEGIES = experts_lib.STRATEGIES


# One token; few; many, and no multiple of a block. Each strategy meets both activations, each
# activation all sizes.
@pytest.mark.parametrize(
  "strategy, activation, n, dtype",
  [
    (strategy, list(expert_loop.ACTIVATIONS)[(i + j) % 2], n, dtype)
    for i, strategy in enumerate([*STRATEGIES, None])
    for j, (n, dtype) in enumerate([(1, "bfloat16"), (7, "float32"), (33, "float32")])
  ],
)
def test_strategies_agree_with_a_loop(strategy, activation, n, dtype):
  activation = expert_loop.ACTIVATIONS[activation]
  params = weights(dtype, activation)
  args = rows(n, dtype)
  for layer in range(L):
    assert_agrees(
      apply(strategy, params, layer, *args, activation=activation), params, layer, *args, activation
    )


def test_inputs_lie_beyond_the_limit_on_both_sides():
  params, (x, *_) = weights(activation=CLAMPED), rows(7)
  projected = np.einsum("lefcd,nd->clefn", params.gate_up, x)
  projected += np.moveaxis(np.asarray(params.gate_up_bias), -1, 0)[..., None]
  for values in projected:
    for beyond in (values > CLAMPED.limit, values < -CLAMPED.limit):
      assert 0.05 < beyond.mean() < 0.5


@pytest.mark.parametrize("blocks", [(1, 1), (4, 1), (4, 3), (4, 4), (16, 1)], ids=str)
@pytest.mark.parametrize("tile", [1, 400, 10**6])
def test_sizes_of_blocks_and_tiles_change_nothing(monkeypatch, blocks, tile):
  monkeypatch.setattr(tiled_loop, "_block_size", lambda *args: blocks)
  monkeypatch.setattr(numerics, "tile_bytes", lambda: tile)
  params = weights(activation=CLAMPED)
  x, indices, gates = rows(33)
  indices = indices.at[:20].set(jnp.asarray([7, 2, 3]))  # some experts have many rows
  run = jax.jit(lambda *args: tiled_loop.compute(E, CLAMPED, *args))
  assert_agrees(run(flattened(params), 1, x, indices, gates), params, 1, x, indices, gates, CLAMPED)


def test_choice_of_block_size(monkeypatch):
  def choice(cores, rows, tile_elements):
    monkeypatch.setenv("NPROC", str(cores))
    return tiled_loop._block_size(rows * 8, 64, tile_elements)

  large, small = 2**20, 2**14
  assert [choice(1, n, large) for n in (1, 64, 65)] == [(4, 3), (4, 3), (16, 1)]
  assert [choice(8, n, large) for n in (1, 16, 64, 65)] == [(4, 1), (4, 1), (8, 1), (16, 1)]
  # Small tiles take more rows, but not many more than experts have.
  assert [choice(1, n, small) for n in (1, 64, 1024)] == [(4, 1), (16, 1), (32, 1)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_rows_on_the_same_experts_leaves_others_empty(strategy):
  params = weights(activation=CLAMPED)
  x, indices, gates = rows(33)
  for chosen in ([7, 0, 3], [0, 1, 2], [7, 6, 5]):
    indices = jnp.tile(jnp.asarray(chosen, jnp.int32), (33, 1))
    args = params, 1, x, indices, gates
    assert_agrees(apply(strategy, *args, activation=CLAMPED), *args, CLAMPED)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_biases_of_other_experts_are_not_used(strategy):
  params = weights(activation=CLAMPED)
  x, _, gates = rows(7)
  indices = jnp.tile(jnp.asarray([5, 0, 3], jnp.int32), (7, 1))
  # Not infinite: `dense` multiplies what it does not use by zero.
  used = jnp.zeros((L, E), bool).at[1, indices[0]].set(True)[..., None]
  params = params.replace(
    gate_up_bias=jnp.where(used[..., None], params.gate_up_bias, 1e6),
    down_bias=jnp.where(used, params.down_bias, 1e6),
  )
  args = params, 1, x, indices, gates
  assert_agrees(apply(strategy, *args, activation=CLAMPED), *args, CLAMPED)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_do_not_influence_each_other(strategy):
  params = weights()
  x, indices, gates = rows(33)
  whole = apply(strategy, params, 0, x, indices, gates)
  x = x.at[:32].set(1e4)
  indices = indices.at[:32].set(jnp.flip(indices[:32], axis=0))
  np.testing.assert_allclose(
    apply(strategy, params, 0, x, indices, gates)[32], whole[32], rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize("strategy", [*STRATEGIES, None])
def test_a_roster_axis_is_folded_into_the_rows(strategy):
  params = weights()
  args = rows(5, lead=(4, 2))
  nested = jax.jit(jax.vmap(jax.vmap(lambda *a: experts_lib.apply(params, 1, *a, strategy))))(*args)
  for i in range(4):
    for j in range(2):
      one = [a[i, j] for a in args]
      assert_agrees(nested[i, j], params, 1, *one)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("in_axes", [(None, 0, 0), (0, None, 1), (None, None, 0)], ids=str)
def test_only_some_of_the_row_arguments_are_mapped(strategy, in_axes):
  params = weights()
  args = rows(5, lead=(4,))
  args = [a[0] if axis is None else jnp.moveaxis(a, 0, axis) for a, axis in zip(args, in_axes)]
  mapped = jax.jit(
    jax.vmap(lambda *a: experts_lib.apply(params, 0, *a, strategy), in_axes=in_axes)
  )(*args)
  for i in range(4):
    one = [a if axis is None else jnp.take(a, i, axis) for a, axis in zip(args, in_axes)]
    assert_agrees(mapped[i], params, 0, *one)


@pytest.mark.parametrize("strategy", ["tiled_loop"])
def test_members_share_one_reading_of_the_weights(strategy):
  """No copy of an expert for each member in the compiled program."""
  width, members = 64, 32
  params = ExpertParams(
    gate_up=jnp.zeros((L, E, width, 2, width)), down=jnp.zeros((L, E, width, width))
  )
  args = (
    jnp.zeros((members, 1, width)),
    jnp.zeros((members, 1, A), jnp.int32),
    jnp.zeros((members, 1, A)),
  )
  mapped = jax.vmap(lambda *a: experts_lib.apply(params, 0, *a, strategy))
  temporaries = jax.jit(mapped).lower(*args).compile().memory_analysis().temp_size_in_bytes
  one_expert = 3 * width * width * 4
  assert temporaries < members / 4 * one_expert


@every_activation
def test_gradients_of_padded_and_dense_agree(activation):
  params = weights(activation=activation)
  x, indices, gates = rows(7)
  target = jnp.asarray(np.random.RandomState(5).standard_normal((7, D)), jnp.float32)

  def gradients(strategy):
    loss = lambda params, x, gates: jnp.sum(
      target * experts_lib.apply(params, 1, x, indices, gates, strategy, activation)
    )
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, x, gates)

  padded, dense = map(jax.tree.leaves, map(gradients, ("padded", "dense")))
  for one, other in zip(padded, dense):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())
  # Against differences along a random direction of all arguments at once.
  random = np.random.RandomState(6)
  directions = [random.standard_normal(a.shape) for a in padded]
  leaves, structure = jax.tree.flatten((params, x, gates))
  values = [np.asarray(a, np.float64) for a in leaves]

  def loss(step):
    params_, x_, gates_ = structure.unflatten(v + step * d for v, d in zip(values, directions))
    y, *_ = expert_loop.by_loop(activation, flattened(params_), x_, E + indices, gates_)
    return np.sum(np.asarray(target) * y)

  difference = (loss(1e-5) - loss(-1e-5)) / 2e-5
  slope = sum(np.sum(np.asarray(g, np.float64) * d) for g, d in zip(padded, directions))
  np.testing.assert_allclose(slope, difference, rtol=1e-4)


def test_choice_of_strategy(monkeypatch):
  def choice(*args):
    return experts_lib.choose_strategy(*args)

  monkeypatch.setattr(experts_lib, "kernel_passes", lambda *args: True)
  for available, chosen in ((True, "native"), (False, "tiled_loop")):
    monkeypatch.setattr(native, "is_available", lambda available=available: available)
    assert choice(1, 8, 64, "float32", "cpu") == choice(1024, 8, 64, "bfloat16", "cpu") == chosen
    assert choice(1025, 8, 64, "float32", "cpu") == "tiled_loop"
    assert choice(1, 8, 64, "bfloat16", "cpu", "int4") == chosen
    assert choice(1, 8, 64, "float32", "cpu", None, 6) == "tiled_loop"
  # A layout that a TPU's kernel would have changed.
  assert choice(1, 8, 64, "bfloat16", "tpu", None, 2880) == "dense"
  assert choice(1, 8, 64, "bfloat16", "tpu", "mxfp4", 1440) == "tiled_loop"
  for platform in ("gpu", "tpu"):
    assert choice(4, 8, 64, "bfloat16", platform, "int4") == "gather_gemv"
    assert {choice(n, 8, 64, "bfloat16", platform, "int4") for n in (5, 1000)} == {"grouped_matmul"}
    assert choice(4, 8, 64, "bfloat16", platform) == "gather_gemv"
    assert choice(5, 8, 64, "bfloat16", platform) == "dense"
    assert choice(181, 8, 64, "bfloat16", platform) == "grouped_matmul"
  monkeypatch.setattr(experts_lib, "kernel_passes", lambda *args: False)
  assert {choice(n, 8, 64, "bfloat16", "gpu") for n in (1, 100, 1000)} == {"dense"}
  assert {choice(n, 8, 64, "bfloat16", "gpu", "int8") for n in (1, 100, 1000)} == {"tiled_loop"}


@pytest.mark.parametrize(
  "strategy, expert_format",
  [("gather_gemv", None), ("gather_gemv", "mxfp4"), ("grouped_matmul", "int8"), ("native", "int4")],
)
def test_a_kernel_is_used_only_if_it_works(strategy, expert_format, monkeypatch):
  def works():
    return experts_lib.kernel_passes(strategy, "float32", expert_format)

  monkeypatch.setattr(native, "remembered", lambda name, error: error())
  experts_lib.kernel_passes.cache_clear()
  # Called while a program is traced, as the choice is.
  jax.jit(lambda x: x if works() else 1 / 0)(1.0)

  def raising(*args):
    raise RuntimeError("no such instruction")

  for broken in (raising, lambda *args: 1.01 * experts_lib.dense(*args)):
    experts_lib.kernel_passes.cache_clear()
    monkeypatch.setitem(experts_lib._FUNCTIONS, strategy, broken)
    assert not works()
  experts_lib.kernel_passes.cache_clear()


@pytest.mark.parametrize("strategy", ["gather_gemv", "grouped_matmul"])
def test_without_pallas_triton_ragged_dot_takes_over(strategy, monkeypatch):
  """As in a JAX that no longer has it: also for other platforms, whose branches are traced too."""
  monkeypatch.setattr(lazy_modules.plgpu, "_name", "jax.experimental.pallas.removed")
  assert not lazy_modules.is_available(lazy_modules.plgpu)
  params, args = weights(), rows(7)
  run = jax.jit(lambda *args: experts_lib.apply(*args, strategy))
  assert_agrees(run(params, 1, *args), params, 1, *args, PLAIN)
  assert "ragged_dot" in str(jax.make_jaxpr(run)(params, 1, *args))
  quantized, _ = expert_loop.quantized_weights("int4", (L, E), F, D)
  jax.make_jaxpr(run)(quantized, 1, *args)


def test_crossovers_of_a_measured_device_come_before_those_of_its_platform(monkeypatch):
  measured = (choices.Step("dense", max_pairs=2), choices.Step("ragged_dot"))
  monkeypatch.setitem(choices.CROSSOVERS, ("NVIDIA H100", "bfloat16"), measured)

  def chosen(kind, format, n):
    steps = choices.steps(kind, "gpu", format)
    return next(s.strategy for s in steps if s.holds(n, 8, 64))

  assert [chosen("NVIDIA H100 80GB HBM3", "bfloat16", n) for n in (16, 17)] == [
    "dense",
    "ragged_dot",
  ]
  # Other devices and formats keep the platform's lines.
  assert chosen("NVIDIA A100", "bfloat16", 4) == chosen("NVIDIA H100", "int8", 4) == "gather_gemv"
  assert choices.steps("NVIDIA H100", "gpu", "int8")[-1] == choices.Step("tiled_loop")


def test_an_unknown_strategy_is_refused():
  with pytest.raises(
    ValueError, match="'fast'.*native, tiled_loop, dense, gather_gemv, grouped_matmul"
  ):
    experts_lib.apply(weights(), 0, *rows(1), "fast")


@pytest.mark.parametrize("strategy", ["tiled_loop", "gather_gemv", None])
def test_mapping_over_weights_is_refused(strategy):
  params = jax.tree.map(lambda w: jnp.stack([w, w]), weights())
  with pytest.raises(ValueError, match="not over weights"):
    jax.vmap(lambda p: experts_lib.apply(p, 0, *rows(2), strategy))(params)
