"""The expert strategies for accelerators: against a loop in float64, with the
kernels interpreted on CPU; and what they are lowered to for the accelerators."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roe_jax.experts import few_rows, gpu_kernels, many_rows, packing, tpu_kernels

# No power of two among the widths.
L, E, D, F, A = 3, 5, 20, 12, 3
# One unit in the last place at 1.
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7}


def selected_on_tpu(num_experts, gate_up, down, layer, x, indices, gates):
  return few_rows.on_tpu(layer * num_experts + indices, gate_up, down, x, gates,
                                 interpret=True)


# As dispatched on this platform, and the other platforms' by interpretation.
STRATEGIES = {
    "selected": few_rows.selected,
    "selected on a TPU": selected_on_tpu,
    "grouped": many_rows.grouped,
    **{f"grouped on a {name}": functools.partial(
        many_rows.by_blocks, functools.partial(kernel, interpret=True))
       for name, kernel in (("GPU", gpu_kernels.apply_on_gpu),
                            ("TPU", tpu_kernels.apply_on_tpu))}}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def weights(dtype="float32", width=D, hidden=F, seed=0):
  """gate_up `[L·E, F, 2, D]` and down `[L·E, F, D]`."""
  random = np.random.RandomState(seed)
  return (jnp.asarray(0.5 * random.standard_normal((L * E, hidden, 2, width)), dtype),
          jnp.asarray(0.5 * random.standard_normal((L * E, hidden, width)), dtype))


def rows(n, dtype="float32", width=D, seed=1):
  """Inputs, distinct experts and gates of `n` rows."""
  random = np.random.RandomState(seed)
  indices = np.argsort(random.uniform(size=(n, E)), axis=-1)[:, :A]
  return (jnp.asarray(random.standard_normal((n, width)), dtype),
          jnp.asarray(indices, jnp.int32),
          jnp.asarray(random.uniform(0.1, 1, (n, A)), jnp.float32))


def by_loop(gate_up, down, layer, x, indices, gates):
  """The sum over chosen experts in float64, and two magnitudes that rounding
  errors are measured in: of the sum over hidden values, and of all sums."""
  gate_up, down, x, gates = (np.asarray(a, np.float64) for a in (gate_up, down, x, gates))
  y, hidden_magnitude, magnitude = (np.zeros_like(x) for _ in range(3))
  for row in range(len(x)):
    for expert, weight in zip(layer * E + np.asarray(indices)[row], gates[row]):
      gate, up = gate_up[expert, :, 0] @ x[row], gate_up[expert, :, 1] @ x[row]
      hidden = gate / (1 + np.exp(-gate)) * up
      y[row] += weight * (hidden @ down[expert])
      hidden_magnitude[row] += weight * (np.abs(hidden) @ np.abs(down[expert]))
      gate, up = (np.abs(gate_up[expert, :, i]) @ np.abs(x[row]) for i in (0, 1))
      magnitude[row] += weight * ((gate * up) @ np.abs(down[expert]))
  return y, hidden_magnitude, magnitude


@functools.partial(jax.jit, static_argnums=0)
def apply(strategy, *args):
  return STRATEGIES[strategy](E, *args)


def assert_agrees(strategy, gate_up, down, layer, x, indices, gates):
  args = (gate_up, down, layer, x, indices, gates)
  actual = apply(strategy, *args)
  assert actual.dtype == x.dtype and actual.shape == x.shape
  expected, hidden_magnitude, magnitude = by_loop(*args)
  # The hidden values and the output are rounded to the dtype once each, by half
  # a unit; float32 sums add a few units of float32.
  bound = EPSILON[str(x.dtype)] * hidden_magnitude + 8 * EPSILON["float32"] * magnitude
  error = np.abs(np.asarray(actual, np.float64) - expected)
  assert np.all(error <= bound), (error / bound).max()
  # The bound leaves no room for a missing expert.
  assert np.median(np.abs(expected)) > 10 * np.median(bound)


@every_strategy
@pytest.mark.parametrize("n, dtype", [
    (1, "float32"), (2, "float32"), (7, "float32"), (33, "float32"),
    (1, "bfloat16"), (33, "bfloat16")])
def test_strategies_agree_with_a_loop(strategy, n, dtype):
  for layer in range(L) if n == 2 else [1]:
    assert_agrees(strategy, *weights(dtype), layer, *rows(n, dtype))


@every_strategy
def test_several_tiles_with_the_last_one_not_full(strategy, monkeypatch):
  """More than one tile and step of each kernel along both widths."""
  monkeypatch.setattr(few_rows, "DOWN_SPLIT", 64)
  monkeypatch.setattr(tpu_kernels, "TILE_BYTES", 1)
  width, hidden = 300, 150
  assert few_rows.HIDDEN_TILE[1] < width > gpu_kernels.OUT_TILE
  assert few_rows.DOWN_SPLIT < hidden > gpu_kernels.SUM_BYTES // 4
  assert tpu_kernels._tile(hidden, 1) == 128
  jax.clear_caches()  # the tiles are no arguments
  try:
    assert_agrees(strategy, *weights(width=width, hidden=hidden), 1, *rows(2, width=width))
  finally:
    jax.clear_caches()


@every_strategy
@pytest.mark.parametrize("chosen", [[4, 0, 3], [0, 1, 2], [4, 3, 2]], ids=str)
def test_all_rows_on_the_same_experts_leaves_others_empty(strategy, chosen):
  x, _, gates = rows(33)
  indices = jnp.tile(jnp.asarray(chosen, jnp.int32), (33, 1))
  assert_agrees(strategy, *weights(), 1, x, indices, gates)


@every_strategy
def test_weights_of_other_experts_are_not_used(strategy):
  """Not even multiplied by zero: a value that is not finite would be seen."""
  x, _, gates = rows(7)
  indices = jnp.tile(jnp.asarray([3, 1, 4], jnp.int32), (7, 1))
  used = jnp.zeros(L * E, bool).at[E + indices[0]].set(True)
  args = [jnp.where(used.reshape(-1, *[1] * (w.ndim - 1)), w, jnp.nan) for w in weights()]
  if strategy == "grouped":  # of this layer it reads all, on CPU
    args = [w.at[E:2 * E].set(jnp.nan_to_num(w[E:2 * E])) for w in args]
  assert_agrees(strategy, *args, 1, x, indices, gates)


@pytest.mark.parametrize("pairs, experts, expected", [
    (8, 64, 16), (64 * 8, 64, 16), (64 * 16, 64, 32), (64 * 17, 64, 64), (10**6, 64, 64)])
def test_size_of_blocks(pairs, experts, expected):
  assert packing.block_size(pairs, experts, 16, 64) == expected


def test_blocks_hold_every_pair_once():
  indices = rows(33)[1]
  planned, slots, experts = map(
      np.asarray, jax.jit(packing.plan, static_argnums=(1, 2))(indices, E, 16))
  assert len(set(slots.flat)) == indices.size
  np.testing.assert_array_equal(planned[slots], np.tile(np.arange(33)[:, None], A))
  np.testing.assert_array_equal(experts[slots // 16], indices)
  assert np.sum(planned < 33) == indices.size


def abstract_arguments(n, dtype="bfloat16"):
  """Shapes of an OLMoE-like model of two layers with widths that are no powers of two."""
  num_experts, width, hidden, choices = 64, 2880, 1440, 8
  shape = jax.ShapeDtypeStruct
  return num_experts, (
      shape((2 * num_experts, hidden, 2, width), dtype),
      shape((2 * num_experts, hidden, width), dtype), shape((), jnp.int32),
      shape((n, width), dtype), shape((n, choices), jnp.int32),
      shape((n, choices), jnp.float32))


def lowered(strategy, n, dtype, platform, device):
  """StableHLO for a platform that need not be at hand."""
  num_experts, args = abstract_arguments(n, dtype)
  traced = jax.jit(functools.partial(STRATEGIES[strategy], num_experts)).trace
  mesh = jax.sharding.AbstractMesh(
      (1,), ("x",), (jax.sharding.AxisType.Auto,),
      abstract_device=jax.sharding.AbstractDevice(
          device_kind=device, num_cores=1, platform="gpu" if platform == "cuda" else platform))
  with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    return traced(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform, device, target", [
    ("cuda", "NVIDIA H200", "__gpu$xla.gpu.triton"), ("tpu", "TPU v5 lite", "tpu_custom_call")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy, n", [("selected", 1), ("selected", 8), ("grouped", 500)])
def test_accelerators_are_given_two_kernels_that_read_the_weights(
    strategy, n, dtype, platform, device, target):
  text = lowered(strategy, n, dtype, platform, device)
  calls = [line for line in text.splitlines() if "custom_call" in line]
  assert len(calls) == 2 and all(target in line for line in calls)
  # The kernels are given the whole weights, and nothing else uses or makes
  # an array of their size: no gathered copy, and none for a layer.
  _, (gate_up, down, *_) = abstract_arguments(n)
  for call, w in zip(calls, (gate_up, down)):
    assert f"tensor<{'x'.join(map(str, w.shape))}x" in call
  hidden, width = down.shape[1:]
  for line in text.splitlines():
    if line not in calls and "func.func" not in line:
      assert f"{hidden}x2x{width}x" not in line and f"{hidden}x{width}x" not in line


def test_kernels_copy_no_weights():
  """In the jaxpr: between arguments and kernels there is no array of their size."""
  _, args = abstract_arguments(8)
  for kernels in (
      functools.partial(few_rows.on_gpu, jnp.zeros((8, 8), jnp.int32)),
      functools.partial(few_rows.on_tpu, jnp.zeros((8, 8), jnp.int32))):
    jaxpr = jax.make_jaxpr(kernels)(args[0], args[1], args[3], args[5])
    expert = np.prod(args[1].shape[1:])
    assert max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars) < expert


def equations(jaxpr):
  """All equations, also those of kernels and loops."""
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
      if hasattr(inner, "eqns"):
        yield from equations(inner)


@pytest.mark.parametrize("kernels", ["selected", "grouped"])
def test_what_interpretation_on_cpu_does_not_show(kernels):
  """A store beyond the end of a row is dropped there, and float32 is never shortened."""
  _, (gate_up, down, _, x, _, gates) = abstract_arguments(8, "float32")
  if kernels == "selected":
    jaxpr = jax.make_jaxpr(functools.partial(
        few_rows.on_gpu, jnp.zeros((8, 8), jnp.int32)))(gate_up, down, x, gates)
  else:
    jaxpr = jax.make_jaxpr(functools.partial(
        gpu_kernels.apply_on_gpu, jnp.zeros(4, jnp.int32)))(
            gate_up, down, jax.ShapeDtypeStruct((4, 16, x.shape[1]), x.dtype))
  seen = list(equations(jaxpr.jaxpr))
  stores = [eqn for eqn in seen if eqn.primitive.name == "masked_swap"]
  assert len(stores) == 2
  for eqn in stores:
    *_, mask = jax.tree.unflatten(eqn.params["args_tree"], eqn.invars)
    assert mask is not None
  dots = [eqn for eqn in seen if eqn.primitive.name == "dot_general"]
  assert len(dots) == (0 if kernels == "selected" else 3)
  highest = jax.lax.Precision.HIGHEST
  assert all(eqn.params["precision"] == (highest, highest) for eqn in dots)


def test_one_row_makes_enough_programs_for_a_large_gpu():
  """Four for each of an H200's multiprocessors, in OLMoE's shapes."""
  width, hidden, choices = 2048, 1024, 8
  programs = choices * hidden // few_rows.HIDDEN_TILE[0]
  assert programs >= 264
  programs = choices * width // few_rows.DOWN_TILE[1] * (
      hidden // few_rows.DOWN_SPLIT)
  assert programs >= 264
