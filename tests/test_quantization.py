"""Formats of few bits: rounding, packing, and widening by numpy and by JAX."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny

from roe_jax import checkpoint, decode, quantization, scoring
from roe_jax import params as params_lib
from roe_jax.quantization import FORMATS, Quantized, dequantize, dequantize_on_host, quantize
from roe_jax.roster import Roster

pytestmark = pytest.mark.slow

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def matrix(rows, width, seed=0):
  """Weights of two matrices, with groups of very different sizes, and of zeros."""
  random = np.random.RandomState(seed)
  array = random.standard_normal((2, rows, width)) * np.exp(random.uniform(-9, 9, (2, rows, width)))
  array[0, : rows // 2] = 0
  return array.astype(np.float32)


def element(quantized, axis, i, n, d):
  """One weight, written out from the description of the formats; and its scale."""
  kind, codes, scales = quantized.format, quantized.codes, quantized.scales
  width = codes.shape[-1] * (1 if kind == "int8" else 2)
  group = (width if axis == -1 else codes.shape[-2]) // scales.shape[axis]
  scale = scales[(i, n, d // group) if axis == -1 else (i, n // group, d)]
  if kind == "int8":
    return float(codes[i, n, d]) * float(scale), float(scale)
  byte = int(codes[i, n, d % (width // 2)])
  nibble = byte >> 4 if d >= width // 2 else byte & 15
  if kind == "int4":
    return (nibble - 16 * (nibble > 7)) * float(scale), float(scale)
  return FP4[nibble] * 2.0 ** (int(scale) - 127), 2.0 ** (int(scale) - 127)


CASES = [
  (f, axis, rows, width)
  for f in FORMATS
  for axis in (-1, -2)
  for rows, width in ((64, 96), (32, 64))
]
CASES += [
  (f, axis, rows, width)
  for f in ("int8", "int4")
  for axis in (-1, -2)
  for rows, width in ((3, 10), (128, 2), (1, 6), (8, 180))
]
CASES += [("int8", -1, 4, 7), ("int8", -2, 7, 3), ("int4", -1, 2, 320)]


@pytest.mark.parametrize("format,axis,rows,width", CASES)
def test_weights_are_rounded_to_the_nearest_and_read_alike_everywhere(format, axis, rows, width):
  array = matrix(rows, width)
  quantized = quantize(array, format, axis)
  plain = dequantize_on_host(quantized)
  np.testing.assert_array_equal(jax.jit(dequantize)(jax.tree.map(jnp.asarray, quantized)), plain)
  held = params_lib.in_storage_dtype(jax.tree.map(jnp.asarray, quantized))  # scales as bits
  np.testing.assert_array_equal(dequantize(held), plain)
  expected, scales = np.moveaxis(
    np.array(
      [
        [[element(quantized, axis, i, n, d) for d in range(width)] for n in range(rows)]
        for i in range(2)
      ]
    ),
    -1,
    0,
  )
  np.testing.assert_array_equal(plain, expected.astype(np.float32))
  error, scales = np.abs(plain.astype(np.float64) - array), np.abs(scales)
  if format == "int8":
    assert np.all(error <= scales / 2 * 1.00001)
  elif format == "int4":  # what is as large as the largest, of the other sign, is cut off
    cut = np.abs(array) > 7.4 * scales
    assert np.all(error <= np.where(cut, scales, scales / 2) * 1.00001)
  else:  # distances of neighbors are 0.5, 1 and 2 scales, and 8 is cut off at 6
    assert np.all(
      error
      <= scales
      * np.where(np.abs(array) < 2 * scales, 0.25, np.where(np.abs(array) < 4 * scales, 0.5, 2))
    )
  assert np.all(plain[0, : rows // 2] == 0) or axis == -2
  again = quantize(plain, format, axis)
  if format != "int8":  # a scale that was rounded up is found again to a rounding
    np.testing.assert_array_equal(dequantize_on_host(again), plain)


def test_all_levels_are_used():
  random = np.random.RandomState(0).standard_normal((64, 1024)).astype(np.float32)
  assert set(quantization.unpack(quantize(random, "int4", -1).codes).ravel()) == set(range(16))
  assert set(quantization.unpack(quantize(random, "mxfp4", -1).codes).ravel()) == set(range(16))
  codes = quantize(random, "int8", -1).codes
  assert codes.min() == -127 and codes.max() == 127


def test_mxfp4_rounds_to_the_nearest_of_its_values_and_ties_to_even():
  exact = np.array(FP4[:8])
  values = np.linspace(0, 7.99, 32 * 100).astype(np.float32).reshape(100, 32)
  values[:, 0] = 4  # the scale is one
  got = dequantize_on_host(quantize(values, "mxfp4", -1))
  nearest = np.abs(values[..., None] - exact).min(-1)
  np.testing.assert_array_equal(np.abs(got - values), nearest.astype(np.float32))
  ties = np.zeros((1, 32), np.float32)
  ties[0, :8] = 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -5
  assert dequantize_on_host(quantize(ties, "mxfp4", -1))[0, :8].tolist() == [
    0,
    1,
    1,
    2,
    2,
    4,
    4,
    -4,
  ]


@pytest.mark.parametrize("exponent", [0, 1, 2, 64, 127, 200, 253])
def test_mxfp4_is_widened_exactly_without_small_numbers(exponent):
  codes = np.tile(np.arange(256, dtype=np.uint8), (32, 1))
  quantized = Quantized(codes, np.full((1, 512), exponent, np.uint8), "mxfp4")
  nibbles = np.concatenate([codes & 15, codes >> 4], axis=-1)
  with np.errstate(over="ignore"):
    exact = np.ldexp(np.array(FP4)[nibbles], exponent - 127).astype(np.float32)
    np.testing.assert_array_equal(dequantize_on_host(quantized), exact)
  exact[np.abs(exact) < np.finfo(np.float32).tiny] = 0  # XLA's CPU backend has no others
  np.testing.assert_array_equal(jax.jit(dequantize)(quantized), exact)
  if 2 < exponent < 250:
    np.testing.assert_array_equal(
      np.asarray(jax.jit(dequantize, static_argnums=1)(quantized, jnp.bfloat16), np.float32), exact
    )


def test_packing_keeps_every_code():
  nibbles = np.random.RandomState(0).randint(0, 16, (3, 5, 14)).astype(np.uint8)
  packed = quantization.pack(nibbles)
  assert packed.shape == (3, 5, 7) and packed[0, 0, 2] == nibbles[0, 0, 2] + 16 * nibbles[0, 0, 9]
  np.testing.assert_array_equal(quantization.unpack(packed), nibbles)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_are_not_finite_are_refused(format, value):
  array = np.ones((32, 32), np.float32)
  array[3, 4] = value
  with pytest.raises(ValueError, match="not finite"):
    quantize(array, format, -2)


def test_weights_too_small_for_a_scale_become_zero():
  array = np.full((32, 64), 1e-39, np.float32)
  for format in ("int8", "int4"):
    assert not dequantize_on_host(quantize(array, format, -1)).any()


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(expert_format="mxfp4", d_model=48), "blocks of 32.*d_model 48 .*int8 or int4"),
    (dict(expert_format="mxfp4", d_expert=16), "d_expert 16"),
    (dict(expert_format="int4", d_model=31), "even d_model, got 31: use int8"),
  ],
)
def test_sizes_that_a_format_does_not_have_are_refused(changes, message):
  config = tiny.config("olmoe", d_expert=32).replace(**changes)
  with pytest.raises(ValueError, match=message):
    params_lib.abstract(config)
  plain = config.replace(expert_format=None)
  with pytest.raises(ValueError, match=message):
    params_lib.quantize(tiny.params(plain), plain, config.expert_format)
  array = np.zeros((config.d_expert, config.d_model), np.float32)
  with pytest.raises(ValueError, match="32 weights|two weights"):
    for axis in (-1, -2):
      quantize(array, config.expert_format, axis)


@pytest.mark.parametrize("format, projections", [("int8", None), ("mxfp4", "int4")])
def test_parameters_are_described_made_counted_and_stored(tmp_path, format, projections):
  plain = tiny.config("olmoe", d_expert=32, dtype="bfloat16")
  params, config = params_lib.quantize(tiny.params(plain), plain, format, projections)
  assert quantization.is_quantized(params.unembedding) == bool(projections)
  params_lib.validate(params, config)
  assert params_lib.count(config) == params_lib.count(plain)
  assert params_lib.num_bytes(config) == sum(x.nbytes for x in jax.tree.leaves(params))
  assert params_lib.num_bytes(config) < params_lib.num_bytes(plain)
  made = params_lib.initialize(config, jax.random.key(0))
  params_lib.validate(made, config)
  usual = params_lib.initialize(plain, jax.random.key(0)).layers
  for found, wanted in (
    *(
      (getattr(made.layers.experts, n), getattr(usual.experts, n)) for n in quantization.CONTRACTED
    ),
    *zip(made.layers.attention.matrices, usual.attention.matrices),
  ):
    values = dequantize(found) if quantization.is_quantized(found) else found
    assert 0.5 < np.std(np.asarray(values, np.float32)) / np.std(np.float32(wanted)) < 2
  with pytest.raises(ValueError, match="in .* already"):
    params_lib.quantize(params, config, "int8")
  checkpoint.save(tmp_path / "c", params, config, piece_bytes=1)
  for dtype in (None, "float32"):
    loaded, loaded_config = checkpoint.load(tmp_path / "c", dtype)
    assert loaded_config == config.replace(dtype=dtype or "bfloat16")
    params_lib.validate(loaded, loaded_config)
    for one, other in zip(
      jax.tree.leaves(loaded.layers.experts), jax.tree.leaves(params.layers.experts)
    ):
      assert one.dtype == other.dtype
      np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize(
  "family, format, projections",
  [("olmoe", "int8", None), ("olmoe", "mxfp4", "int4"), ("deepseek_v3", None, "int8")],
)
def test_a_quantized_model_is_the_model_of_its_widened_weights(family, format, projections):
  plain = tiny.config(family, d_expert=32, num_layers=2)
  params, config = params_lib.quantize(tiny.params(plain), plain, format, projections)
  widened = jax.tree.map(
    lambda w: dequantize(w) if quantization.is_quantized(w) else w,
    params,
    is_leaf=quantization.is_quantized,
  )
  texts = tiny.texts([9, 12])
  roster = Roster.create(config, 3, 0.5)
  quantized, of_plain = (params, config), (widened, plain)
  own = [roster.replace(cache=cache) for cache in ("standard", "none")]
  pairs = [((*quantized, roster), (*of_plain, roster)), [(*quantized, r) for r in own]]
  for one, other in pairs if format == "int8" else pairs[:1]:
    scores = [scoring.score(p, c, texts, roster=r).sequences for p, c, r in (one, other)]
    for found, expected in zip(*scores):
      np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generation_and_scores_of_a_quantized_model_agree(dtype):
  plain = tiny.config("olmoe", num_layers=2, dtype=dtype)
  params, config = params_lib.quantize(tiny.params(plain), plain, "int4", "int8")
  prompts = tiny.texts([5, 8])
  roster = Roster.create(config, 3, 0.5)
  generation = decode.generate(params, config, prompts, max_new_tokens=4, roster=roster)
  texts = [p + list(c.tokens) for p, c in zip(prompts, generation.completions)]
  if dtype == "float32":  # drafts change no token
    drafts = roster.replace(draft_tokens=2)
    drafted = decode.generate(params, config, prompts, max_new_tokens=4, roster=drafts)
    assert [c.tokens for c in drafted.completions] == [c.tokens for c in generation.completions]
  scores = scoring.score(params, config, texts, list(map(len, prompts)), roster=roster)
  for completion, scored in zip(generation.completions, scores.sequences):
    np.testing.assert_allclose(
      completion.log_probs,
      scored.log_probs[:, 0],
      rtol=1e-3,
      atol=1e-3 if dtype == "float32" else 0.05,
    )
