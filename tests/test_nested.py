"""Nested codes: bits written out, prefixes, the error of each plane, experts at fewer bits, and
compensation against its definition.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_quantized_experts import CLAMPED, check, weights
import tiny

from roe_jax import compensation, experts, quantization, transformer
from roe_jax import params as params_lib
from roe_jax.quantization import Quantized, dequantize, dequantize_on_host, first_planes, quantize


def gaussian(*shape):
  return np.random.RandomState(0).standard_normal(shape).astype(np.float32)


def element(matrix, axis, n, d, width):
  """One weight `[n, d]` of a nested matrix, written out from the description of the format."""
  base, bits = (int(b) for b in matrix.format.removeprefix("nested:").split("-"))
  row = matrix.codes[n].reshape(bits, width // 8)
  planes = [int(p[d % (width // 8)]) >> d // (width // 8) & 1 for p in row]
  scales = np.asarray(matrix.scales, np.float64)
  rows, groups = scales.shape
  scales = scales.reshape(rows, 2 + bits - base, -1)
  group = (n, d * scales.shape[2] // width) if axis == -1 else (n * rows // len(matrix.codes), d)
  step, offset, *others = scales[group[0], :, group[1]]
  code = int("".join(map(str, planes[:base])), 2)
  return step * code + offset + sum(s if p else -s for s, p in zip(others, planes[base:]))


@pytest.mark.parametrize("format", ["nested:2-4", "nested:1-3", "nested:4-8"])
@pytest.mark.parametrize("axis, rows, width", [(-1, 3, 192), (-2, 256, 16)])
def test_weights_are_those_of_the_described_bits(format, axis, rows, width):
  matrix = quantize(gaussian(rows, width), format, axis)
  weights = dequantize_on_host(matrix)
  expected = [[element(matrix, axis, n, d, width) for d in range(width)] for n in range(rows)]
  np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-6)
  of_jax: Any = jax.tree.map(jnp.asarray, matrix)
  np.testing.assert_array_equal(dequantize(params_lib.in_storage_dtype(of_jax)), weights)


@pytest.mark.parametrize("axis", [-1, -2])
def test_the_first_planes_are_the_matrix_of_fewer_bits_and_every_plane_lowers_the_error(axis):
  array = gaussian(2, 128, 256)
  whole, errors = quantize(array, "nested:2-6", axis), []
  for bits in range(2, 7):
    short = quantize(array, f"nested:2-{bits}", axis)
    for name in ("codes", "scales"):
      all_of, first = getattr(whole, name), getattr(short, name)
      np.testing.assert_array_equal(all_of[..., : first.shape[-1]], first)
    found = dequantize_on_host(first_planes(whole, bits))
    np.testing.assert_array_equal(found, dequantize_on_host(short))
    np.testing.assert_array_equal(
      dequantize(jax.tree.map(jnp.asarray, first_planes(whole, bits))), found
    )
    errors.append(np.square(found - array).mean())
  assert all(b < a / 2 for a, b in zip(errors, errors[1:]))


def test_the_scale_of_a_plane_minimizes_the_squared_error():
  array = gaussian(1, 128)
  left = array - dequantize_on_host(quantize(array, "nested:2-2", -1))
  with_plane = dequantize_on_host(quantize(array, "nested:2-3", -1))
  by_scale = [np.square(left - s * np.sign(left)).sum() for s in np.linspace(0, 2, 2001)]
  assert np.square(array - with_plane).sum() <= min(by_scale) * (1 + 1e-4)  # s is in bfloat16


def test_one_plane_of_two_values_is_exact_and_zeros_are():
  array = np.where(gaussian(4, 64) > 0, 3, -0.5).astype(np.float32)
  array[3] = 0
  np.testing.assert_array_equal(dequantize_on_host(quantize(array, "nested:1-1", -1)), array)
  np.testing.assert_array_equal(dequantize_on_host(quantize(array, "nested:2-4", -1))[3], 0)


def correlated(size):
  """Inputs `[P, size]` whose directions differ in variance."""
  random = np.random.RandomState(1)
  mix = random.standard_normal((size, size)) * np.exp(-np.arange(size) / (size / 6))
  return (random.standard_normal((8 * size, size)) @ mix.T).astype(np.float32)


@pytest.mark.parametrize("axis", [-1, -2])
def test_compensation_lowers_the_error_of_outputs_at_all_bits(axis):
  array, inputs = gaussian(1, 2, 128, 128), correlated(128)
  moments = (inputs.T @ inputs)[None, None]
  plain = quantize(array, "nested:2-4", axis)
  same = compensation.quantize(array, "nested:2-4", axis, np.eye(128)[None, None])
  for name in ("codes", "scales"):  # inputs without correlation have nothing to make up for
    np.testing.assert_array_equal(getattr(same, name), getattr(plain, name))
  found = compensation.quantize(array, "nested:2-4", axis, moments)
  for bits, most in ((2, 0.4), (3, 0.7), (4, 1.0)):
    changes = [dequantize_on_host(first_planes(m, bits)) - array for m in (found, plain)]
    subscripts = "lend,pd->lepn" if axis == -1 else "lend,pn->lepd"
    ours, theirs = (np.square(np.einsum(subscripts, c, inputs)).sum() for c in changes)
    assert ours < most * theirs


def test_weights_after_a_rounded_one_have_the_least_error_of_outputs():
  """Solves for them after each rounding, in float64, as arXiv 2208.11580 defines it."""
  weights, inputs = gaussian(3, 8).astype(np.float64), correlated(8).astype(np.float64)
  moments = inputs.T @ inputs
  moments += compensation.DAMPING * np.trace(moments) / 8 * np.eye(8)
  step, low = (weights.max(1) - weights.min(1)) / 3, weights.min(1)
  step, low = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (step, low))
  current, codes = weights.copy(), np.zeros(weights.shape, int)
  for j in range(8):
    codes[:, j] = np.clip(np.rint((current[:, j] - low) / step), 0, 3)
    current[:, j] = codes[:, j] * step + low
    fixed, free = slice(0, j + 1), slice(j + 1, 8)
    changed = (current - weights)[:, fixed] @ moments[fixed, free]
    current[:, free] = weights[:, free] - changed @ np.linalg.inv(moments[free, free])
  matrix = compensation.quantize(
    weights[None, None].astype(np.float32), "nested:2-2", -1, (inputs.T @ inputs)[None, None]
  )
  found = np.round((dequantize_on_host(matrix)[0, 0] - low[:, None]) / step[:, None])
  np.testing.assert_array_equal(found, codes)
  assert (codes != np.clip(np.rint((weights - low[:, None]) / step[:, None]), 0, 3)).any()


def test_second_moments_are_those_of_the_inputs_of_experts(monkeypatch):
  config = tiny.config("olmoe")
  params, texts, seen = tiny.params(config), tiny.texts([9, 5]), []
  apply = experts.apply

  def recorded(matrices, **named):
    seen.append((int(named["layer"]), *map(np.asarray, (named["x_NxD"], named["indices_NxA"]))))
    return apply(matrices, **named)

  monkeypatch.setattr(experts, "apply", recorded)
  with jax.disable_jit():
    for text in texts:
      transformer.forward(params, config, [text])
  monkeypatch.undo()
  found = compensation.second_moments(params, config, texts)
  for layer in range(config.num_layers):
    of_layer = [(x, chosen) for index, x, chosen in seen if index == layer]
    x, chosen = (np.concatenate(a) for a in zip(*of_layer))
    np.testing.assert_allclose(found["gate_up"][layer, 0], x.T @ x, rtol=1e-4, atol=1e-4)
    for expert in range(config.num_experts):
      own = x[(chosen == expert).any(-1)]
      gate, up = np.einsum("pd,fid->ipf", own, params.layers.experts.gate_up[layer, expert])
      hidden = gate / (1 + np.exp(-gate)) * up
      np.testing.assert_allclose(
        found["down"][layer, expert], hidden.T @ hidden, rtol=1e-4, atol=1e-4
      )


@pytest.mark.parametrize("strategy", [None, "dense", "grouped_matmul", "native"])
def test_strategies_read_a_prefix_of_the_planes(strategy):
  whole = weights("nested:2-4", biases=True)
  planes = lambda w: first_planes(w, 3) if isinstance(w, Quantized) else w
  prefix = jax.tree.map(planes, whole, is_leaf=quantization.is_quantized)
  check(strategy, prefix, 5, "float32", CLAMPED)


def test_random_parameters_have_the_standard_deviation_of_the_config():
  config = dataclasses.replace(
    tiny.config("olmoe", d_model=256, d_expert=128), expert_format="nested:2-4"
  )
  experts = params_lib.initialize(config, jax.random.key(0)).layers.experts
  found = np.asarray(dequantize(experts.gate_up))
  assert found.std() == pytest.approx(config.initializer_range, rel=0.1)
  assert abs(found.mean()) < 0.05 * found.std()


@pytest.mark.parametrize(
  "name, message",
  [
    ("nested:4-2", "unknown expert format 'nested:4-2'.*BASE <= BITS"),
    ("nested:2-9", "such as nested:2-4"),
    ("int3", "choose one of int8, int4, mxfp4, or nested:BASE-BITS"),
  ],
)
def test_unknown_formats(name, message):
  with pytest.raises(ValueError, match=message):
    tiny.config("olmoe").replace(expert_format=name)


def test_what_cannot_be_read_with_fewer_bits():
  with pytest.raises(ValueError, match="read with 2 to 4 bits, got 5"):
    first_planes(quantize(gaussian(1, 64), "nested:2-4", -1), 5)
  with pytest.raises(ValueError, match="only experts in a nested format.*got int8: convert"):
    first_planes(quantize(gaussian(1, 64), "int8", -1), 4)
  with pytest.raises(ValueError, match="packs 8 weights per byte.*multiple of 8, got 52"):
    params_lib.describe(tiny.config("olmoe", d_model=52).replace(expert_format="nested:2-4"))
