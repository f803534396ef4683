"""The expert strategies for accelerators: against a loop in float64, with the
kernels interpreted on CPU; and what they are lowered to for the accelerators."""

import functools
import warnings

import expert_loop
from expert_loop import CLAMPED, PLAIN
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roe_jax.experts import gather_gemv, gpu_kernels, grouped_matmul, packing, tpu_kernels
from roe_jax.params import ExpertParams
from roe_jax.quantization import (
  FORMATS,
  Quantized,
  codes_and_scales,
  decode_codes,
  decode_scales,
  group_size,
  weights_per_code,
)

pytestmark = pytest.mark.slow

# No power of two among the widths.
L, E, D, F, A = 3, 5, 20, 12, 3


def selected_on_tpu(*args):
  return gather_gemv.by_pairs(functools.partial(gather_gemv.on_tpu, interpret=True), *args)


# As dispatched on this platform, and the other platforms' by interpretation.
STRATEGIES = {
  "gather_gemv": gather_gemv.compute,
  "selected on a TPU": selected_on_tpu,
  "grouped_matmul": grouped_matmul.compute,
  **{
    f"grouped on a {name}": functools.partial(
      grouped_matmul.by_blocks, functools.partial(kernel, interpret=True)
    )
    for name, kernel in (("GPU", gpu_kernels.apply_on_gpu), ("TPU", tpu_kernels.apply_on_tpu))
  },
}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def weights(dtype="float32", width=D, hidden=F, activation=CLAMPED):
  return expert_loop.weights((L * E,), hidden, width, activation, dtype)


def rows(n, dtype="float32", width=D):
  return expert_loop.rows(n, E, A, width, dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def apply(strategy, activation, *args):
  return STRATEGIES[strategy](E, activation, *args)


def assert_agrees(strategy, params, layer, x, indices, gates, activation=CLAMPED):
  actual = apply(strategy, activation, params, layer, x, indices, gates)
  expert_loop.assert_agrees(actual, activation, params, x, layer * E + indices, gates, "float32")


# Each strategy meets both activations, each activation all sizes.
@pytest.mark.parametrize(
  "strategy, activation, n, dtype",
  [
    (strategy, list(expert_loop.ACTIVATIONS)[(i + j) % 2], n, dtype)
    for i, strategy in enumerate(STRATEGIES)
    for j, (n, dtype) in enumerate([(1, "float32"), (33, "float32"), (7, "bfloat16")])
  ],
)
def test_strategies_agree_with_a_loop(strategy, activation, n, dtype):
  activation = expert_loop.ACTIVATIONS[activation]
  params = weights(dtype, activation=activation)
  for layer in range(L) if n == 2 else [1]:
    assert_agrees(strategy, params, layer, *rows(n, dtype), activation)


def assert_quantized_agrees(strategy, format, dtype="float32", width=D, hidden=F):
  params, values = expert_loop.quantized_weights(format, (L * E,), hidden, width, CLAMPED)
  x, indices, gates = rows(7, dtype, width)
  if "TPU" in strategy and dtype == "bfloat16":  # they round weights to the dtype of x
    values = values.replace(
      gate_up=jnp.asarray(values.gate_up, dtype), down=jnp.asarray(values.down, dtype)
    )
  actual = apply(strategy, CLAMPED, params, 1, x, indices, gates)
  expert_loop.assert_agrees(actual, CLAMPED, values, x, E + indices, gates, "float32")


@every_strategy
@pytest.mark.parametrize("format, dtype", zip(FORMATS, ["float32", "bfloat16", "bfloat16"]))
def test_quantized_experts_agree_with_a_loop(format, dtype, strategy):
  # The second half of a row starts within a group of four-bit weights.
  assert D // 2 % group_size("int4", D) != 0
  assert_quantized_agrees(strategy, format, dtype)


def test_widening_of_every_code():
  codes = np.arange(256).astype(np.uint8)
  numbers = np.arange(16)
  for format, expected in (
    ("int4", np.where(numbers < 8, numbers, numbers - 16)),
    ("mxfp4", expert_loop.E2M1 / 2),
  ):  # its scales are doubled
    low, high = decode_codes(codes, format)
    np.testing.assert_array_equal(low, np.tile(expected, 16))
    np.testing.assert_array_equal(high, np.repeat(expected, 16))
  np.testing.assert_array_equal(
    decode_codes(codes.astype(np.int8), "int8")[0], codes.astype(np.int8)
  )
  exponents = np.arange(1, 255).astype(np.uint8)
  np.testing.assert_array_equal(
    decode_scales(jnp.minimum(exponents, 253)),
    2.0 ** (np.minimum(exponents, 253).astype(np.float64) - 126),
  )


@pytest.mark.parametrize(
  "strategy, format",
  [*((name, None) for name in STRATEGIES), *zip(STRATEGIES, (*FORMATS, *FORMATS))],
)
def test_several_tiles_with_the_last_one_not_full(format, strategy, monkeypatch):
  """More than one tile and step of each kernel along both widths."""
  monkeypatch.setattr(gather_gemv, "DOWN_SPLIT", 64)
  monkeypatch.setattr(tpu_kernels, "TILE_BYTES", 1)
  width, hidden = (300, 150) if format is None else (320, 160)
  assert gather_gemv.HIDDEN_TILE[1] < width > gpu_kernels.OUT_TILE
  assert gather_gemv.DOWN_SPLIT < hidden > gpu_kernels.SUM_BYTES // 4
  assert tpu_kernels._tile(hidden, 1) == 128
  jax.clear_caches()  # the tiles are no arguments
  try:
    if format is None:
      assert_agrees(strategy, weights(width=width, hidden=hidden), 1, *rows(2, width=width))
    else:
      assert_quantized_agrees(strategy, format, width=width, hidden=hidden)
  finally:
    jax.clear_caches()


@every_strategy
@pytest.mark.parametrize("chosen", [[4, 0, 3], [0, 1, 2]], ids=str)
def test_all_rows_on_the_same_experts_leaves_others_empty(strategy, chosen):
  x, _, gates = rows(33)
  indices = jnp.tile(jnp.asarray(chosen, jnp.int32), (33, 1))
  assert_agrees(strategy, weights(), 1, x, indices, gates)


@every_strategy
def test_weights_of_other_experts_are_not_used(strategy):
  """Not even multiplied by zero: a value that is not finite would be seen."""
  x, _, gates = rows(7)
  indices = jnp.tile(jnp.asarray([3, 1, 4], jnp.int32), (7, 1))
  used = jnp.zeros(L * E, bool).at[E + indices[0]].set(True)
  params = jax.tree.map(
    lambda w: jnp.where(used.reshape(-1, *[1] * (w.ndim - 1)), w, jnp.nan), weights()
  )
  if strategy == "grouped_matmul":  # of this layer it reads all matrices, on CPU
    of_layer = slice(E, 2 * E)
    params = params.replace(
      **{
        name: w.at[of_layer].set(jnp.nan_to_num(w[of_layer]))
        for name, w in (("gate_up", params.gate_up), ("down", params.down))
      }
    )
  assert_agrees(strategy, params, 1, x, indices, gates)


@pytest.mark.parametrize(
  "pairs, experts, expected",
  [(8, 64, 16), (64 * 8, 64, 16), (64 * 16, 64, 32), (64 * 17, 64, 64), (10**6, 64, 64)],
)
def test_size_of_blocks(pairs, experts, expected):
  assert packing.block_size(pairs, experts, 16, 64) == expected


def test_blocks_hold_every_pair_once():
  indices = rows(33)[1]
  planned, slots, experts = map(
    np.asarray, jax.jit(packing.plan, static_argnums=(1, 2))(indices, E, 16)
  )
  assert len(set(slots.flat)) == indices.size
  np.testing.assert_array_equal(planned[slots], np.tile(np.arange(33)[:, None], A))
  np.testing.assert_array_equal(experts[slots // 16], indices)
  assert np.sum(planned < 33) == indices.size


def abstract_matrix(format, shape, axis, dtype):
  if format is None:
    return jax.ShapeDtypeStruct(shape, dtype)
  groups = [s // group_size(format, s) if i == axis else s for i, s in enumerate(shape)]
  codes = (*shape[:-1], shape[-1] // weights_per_code(format))
  return Quantized(
    jax.ShapeDtypeStruct(codes, "int8" if format == "int8" else "uint8"),
    jax.ShapeDtypeStruct(groups, "uint8" if format == "mxfp4" else "bfloat16"),
    format,
  )


def abstract_arguments(n, dtype="bfloat16", activation=PLAIN, format=None):
  """Shapes of an OLMoE-like model of two layers with widths that are no powers of two."""
  num_experts, width, hidden, choices = 64, 2880, 1440, 8
  shape = jax.ShapeDtypeStruct
  biases = (
    ()
    if activation.limit is None
    else (shape((2 * num_experts, hidden, 2), dtype), shape((2 * num_experts, width), dtype))
  )
  return num_experts, (
    ExpertParams(
      abstract_matrix(format, (2 * num_experts, hidden, 2, width), 3, dtype),
      abstract_matrix(format, (2 * num_experts, hidden, width), 1, dtype),
      *biases,
    ),
    shape((), jnp.int32),
    shape((n, width), dtype),
    shape((n, choices), jnp.int32),
    shape((n, choices), jnp.float32),
  )


def lowered(strategy, n, dtype, activation, format, platform, device):
  """StableHLO for a platform that need not be at hand."""
  num_experts, args = abstract_arguments(n, dtype, activation, format)
  traced = jax.jit(functools.partial(STRATEGIES[strategy], num_experts, activation)).trace
  mesh = jax.sharding.AbstractMesh(
    (1,),
    ("x",),
    (jax.sharding.AxisType.Auto,),
    abstract_device=jax.sharding.AbstractDevice(
      device_kind=device, num_cores=1, platform="gpu" if platform == "cuda" else platform
    ),
  )
  with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    return traced(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
  "platform, device, target",
  [("cuda", "NVIDIA H200", "__gpu$xla.gpu.triton"), ("tpu", "TPU v5 lite", "tpu_custom_call")],
)
@pytest.mark.parametrize(
  "dtype, activation, format",
  [
    ("float32", PLAIN, None),
    ("bfloat16", CLAMPED, None),
    *(("bfloat16", CLAMPED, format) for format in FORMATS),
  ],
  ids=str,
)
@pytest.mark.parametrize("strategy, n", [("gather_gemv", 8), ("grouped_matmul", 500)])
def test_accelerators_are_given_two_kernels_that_read_the_weights(
  strategy, n, dtype, activation, format, platform, device, target
):
  text = lowered(strategy, n, dtype, activation, format, platform, device)
  calls = [line for line in text.splitlines() if "custom_call" in line]
  assert len(calls) == 2 and all(target in line for line in calls)
  # The kernels are given the whole weights, and nothing else uses or makes
  # an array of their size: no gathered copy, none for a layer, and none widened.
  _, (params, *_) = abstract_arguments(n, format=format)
  matrices = [codes_and_scales(w)[0] for w in (params.gate_up, params.down)]
  shapes = [list(w.shape) for w in matrices]
  if platform == "tpu" and format is not None:  # seen as XLA lays it out, which copies nothing
    shapes[0][1:3] = shapes[0][2:0:-1]
  for call, shape in zip(calls, shapes):
    assert f"tensor<{'x'.join(map(str, shape))}x" in call
  hidden, width = matrices[1].shape[1:]
  for line in text.splitlines():
    if not any(s in line for s in ("custom_call", "func.func", "stablehlo.transpose")):
      for columns in (width, width * weights_per_code(format)):
        assert f"{hidden}x2x{columns}x" not in line and f"{hidden}x{columns}x" not in line


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_kernels_copy_no_weights(format):
  """In the jaxpr: between arguments and kernels there is no array of their size."""
  _, (params, _, x, indices, _) = abstract_arguments(1, activation=CLAMPED, format=format)
  for kernels in (gather_gemv.on_gpu, gather_gemv.on_tpu):
    jaxpr = jax.make_jaxpr(functools.partial(kernels, CLAMPED))(indices, params, x)
    expert = np.prod(codes_and_scales(params.down)[0].shape[1:])
    made = [v for eqn in jaxpr.eqns for v in eqn.outvars if eqn.primitive.name != "transpose"]
    assert max(v.aval.size for v in made) < expert


def equations(jaxpr):
  """All equations, also those of kernels and loops."""
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
      if hasattr(inner, "eqns"):
        yield from equations(inner)


@pytest.mark.parametrize("kernels", ["gather_gemv", "grouped_matmul"])
def test_what_interpretation_on_cpu_does_not_show(kernels):
  """A store beyond the end of a row is dropped there, and float32 is never shortened."""
  _, (params, _, x, indices, _) = abstract_arguments(8, "float32", CLAMPED)
  if kernels == "gather_gemv":
    jaxpr = jax.make_jaxpr(functools.partial(gather_gemv.on_gpu, CLAMPED))(indices, params, x)
  else:
    jaxpr = jax.make_jaxpr(functools.partial(gpu_kernels.apply_on_gpu, CLAMPED))(
      jax.ShapeDtypeStruct((4,), jnp.int32),
      params,
      jax.ShapeDtypeStruct((4, 16, x.shape[1]), x.dtype),
    )
  seen = list(equations(jaxpr.jaxpr))
  stores = [eqn for eqn in seen if eqn.primitive.name == "masked_swap"]
  assert len(stores) == 2
  for eqn in stores:
    *_, mask = jax.tree.unflatten(eqn.params["args_tree"], eqn.invars)
    assert mask is not None
  dots = [eqn for eqn in seen if eqn.primitive.name == "dot_general"]
  assert len(dots) == (0 if kernels == "gather_gemv" else 3)
  highest = jax.lax.Precision.HIGHEST
  assert all(eqn.params["precision"] == (highest, highest) for eqn in dots)


def test_one_row_makes_enough_programs_for_a_large_gpu():
  """Four for each of an H200's multiprocessors, in OLMoE's shapes."""
  width, hidden, choices = 2048, 1024, 8
  programs = choices * hidden // gather_gemv.HIDDEN_TILE[0]
  assert programs >= 264
  programs = choices * width // gather_gemv.DOWN_TILE[1] * (hidden // gather_gemv.DOWN_SPLIT)
  assert programs >= 264
