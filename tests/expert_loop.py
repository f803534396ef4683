"""The experts' sum as a loop in float64, and how far a strategy may be from it."""

import jax.numpy as jnp
import numpy as np

from roe_jax.experts.activation import Activation
from roe_jax.params import ExpertParams
from roe_jax.quantization import Quantized, group_size, typical_scales

# One unit in the last place at 1.
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7}

# What the tests' models have: no biases and SwiGLU, or as GPT-OSS biases and a
# limit, beyond which some of the inputs lie on either side.
PLAIN, CLAMPED = Activation(), Activation(limit=1.5, alpha=1.7)
ACTIVATIONS = {"plain": PLAIN, "clamped": CLAMPED}

# The values of the four bits of mxfp4.
E2M1 = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def weights(lead, hidden, width, activation=PLAIN, dtype="float32", seed=0):
  """Random weights with these leading axes; with biases if there is a limit."""
  random = np.random.RandomState(seed)

  def normal(fan_in, *shape):
    return jnp.asarray(2 / fan_in**0.5 * random.standard_normal((*lead, *shape)), dtype)

  matrices = normal(width, hidden, 2, width), normal(hidden, hidden, width)
  biases = (normal(16, hidden, 2), normal(16, width)) if activation.limit else ()
  return ExpertParams(*matrices, *biases)


def quantized(format, shape, axis, seed=0):
  """A random matrix in few bits, contracted over `axis`, and its values in float64."""
  random = np.random.RandomState(seed)
  group = group_size(format, shape[axis])
  groups = [s // group if i == axis else s for i, s in enumerate(shape)]
  if format == "int8":
    numbers = codes = random.randint(-128, 128, shape).astype(np.int8)
  else:
    bits = random.randint(0, 16, shape)
    low, high = np.split(bits, 2, axis=-1)
    codes = (low | high << 4).astype(np.uint8)
    numbers = E2M1[bits] if format == "mxfp4" else np.where(bits < 8, bits, bits - 16)
  (scale,) = typical_scales(format, 2 / shape[axis] ** 0.5, 1).tolist()
  if format == "mxfp4":
    scales = (scale + random.randint(-1, 2, groups)).astype(np.uint8)
    factors = 2.0 ** (scales.astype(int) - 127)
  else:
    scales = jnp.asarray(scale * random.uniform(0.5, 1.5, groups), jnp.bfloat16)
    factors = np.asarray(scales, np.float64)
  values = numbers * np.repeat(factors, group, axis)
  return Quantized(jnp.asarray(codes), jnp.asarray(scales), format), values


def quantized_weights(format, lead, hidden, width, activation=PLAIN):
  """As `weights`, with quantized matrices, and the same with these as float64 values."""
  params = weights(lead, hidden, width, activation)
  gate_up, gate_up_values = quantized(format, (*lead, hidden, 2, width), len(lead) + 2, seed=1)
  down, down_values = quantized(format, (*lead, hidden, width), len(lead), seed=2)
  return (
    params.replace(gate_up=gate_up, down=down),
    params.replace(gate_up=gate_up_values, down=down_values),
  )


def rows(n, num_experts, choices, width, dtype="float32", seed=1, lead=()):
  """Inputs, distinct experts and gates of `n` rows."""
  random = np.random.RandomState(seed)
  shape = (*lead, n)
  indices = np.argsort(random.uniform(size=(*shape, num_experts)), axis=-1)[..., :choices]
  return (
    jnp.asarray(random.standard_normal((*shape, width)), dtype),
    jnp.asarray(indices, jnp.int32),
    jnp.asarray(random.uniform(0.1, 1, (*shape, choices)), jnp.float32),
  )


def activate(activation, gate, up):
  if activation.limit is None:
    return gate / (1 + np.exp(-gate)) * up
  gate = np.minimum(gate, activation.limit)
  up = np.maximum(np.minimum(up, activation.limit), -activation.limit)
  return (up + 1) * gate / (1 + np.exp(-activation.alpha * gate))


def by_loop(activation, params, x, experts, gates):
  """The sum over chosen experts, and two magnitudes that rounding errors are
  measured in: of the sum over hidden values, and of all sums.

  `params` have one leading axis, which `experts [N, A]` are indices into.
  """
  gate_up, down, x, gates = (
    np.asarray(a, np.float64) for a in (params.gate_up, params.down, x, gates)
  )
  gate_up_bias, down_bias = (
    np.zeros(shape) if b is None else np.asarray(b, np.float64)
    for b, shape in (
      (params.gate_up_bias, gate_up.shape[:-1]),
      (params.down_bias, (len(down), down.shape[-1])),
    )
  )
  y, hidden_magnitude, magnitude = (np.zeros_like(x) for _ in range(3))
  for row in range(len(x)):
    for expert, weight in zip(np.asarray(experts)[row], gates[row]):
      hidden = activate(activation, *(gate_up[expert] @ x[row] + gate_up_bias[expert]).T)
      y[row] += weight * (hidden @ down[expert] + down_bias[expert])
      bias = np.abs(down_bias[expert])
      hidden_magnitude[row] += weight * (np.abs(hidden) @ np.abs(down[expert]) + bias)
      gate, up = (np.abs(gate_up[expert]) @ np.abs(x[row]) + np.abs(gate_up_bias[expert])).T
      up += activation.limit is not None
      magnitude[row] += weight * ((gate * up) @ np.abs(down[expert]) + bias)
  return y, hidden_magnitude, magnitude


def assert_agrees(actual, activation, params, x, experts, gates, dtype=None):
  """Arguments as of `by_loop`; the dtype is that of `x` unless given."""
  assert actual.dtype == (dtype or x.dtype) and actual.shape == x.shape
  expected, hidden_magnitude, magnitude = by_loop(activation, params, x, experts, gates)
  # The hidden values and the output are rounded to the dtype once each, by half
  # a unit; float32 sums add a few units of float32.
  bound = EPSILON[str(x.dtype)] * hidden_magnitude + 8 * EPSILON["float32"] * magnitude
  error = np.abs(np.asarray(actual, np.float64) - expected)
  assert np.all(error <= bound), (error / bound).max()
  # The bound leaves no room for a missing expert.
  assert np.median(np.abs(expected)) > 10 * np.median(bound)
