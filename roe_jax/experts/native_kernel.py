"""The experts in C++, for CPUs: see `roe_jax.native`."""

import jax
import jax.numpy as jnp

from roe_jax import collectives, native, nested, quantization
from roe_jax.quantization import codes_and_scales, find, is_quantized


def dequantizes(expert_format: str) -> bool:
  """Whether the kernel reads experts of this format as they are stored."""
  kind = find(expert_format)
  return not kind.nested or kind.bits <= native.MOST_BITS


def compute(num_experts, activation, weights, layer, x, indices, gates):
  """Returns the gate-weighted sum of the active experts' outputs; see `experts.apply`.

  Raises:
    ValueError: the kernel is not available, or D is not a multiple of 4 (of 8 with four bits, of
      32 in nested formats).
  """
  codes, scales, format = codes_and_scales(weights.gate_up)
  if quantization.codes_per_row(weights.gate_up) % native.MULTIPLE:
    raise ValueError(
      "the expert strategy 'native' needs a d_model that is a multiple of 4 (of 8 with four bits, "
      f"of 32 in nested formats), got {x.shape[1]}: choose another one"
    )
  if not native.is_available():
    raise ValueError(
      "the expert strategy 'native' is not available here: it needs a CPU, a C++ compiler, and "
      "ROE_JAX_NATIVE other than 0"
    )
  kind = format or ("float32" if codes.dtype == "float32" else "bfloat16")
  planes = (0, 0, 0)
  if format and (own := find(format).nested):
    kind, planes = nested.PREFIX, (own.base, weights.gate_up.depth or own.bits, own.bits)
  return native.apply_experts(
    kind,
    num_experts,
    activation.limit,
    activation.alpha,
    layer,
    x,
    indices,
    gates,
    (codes, scales),
    codes_and_scales(weights.down)[:2],
    (weights.gate_up_bias, weights.down_bias),
    planes,
    _bits_of_layer(weights.gate_up, num_experts, layer),
  )


def _bits_of_layer(matrix, num_experts, layer):
  """Returns how many bits this device's experts of a layer have, `[E]`, or None without a plan."""
  if not is_quantized(matrix) or matrix.plan is None:
    return None
  first = collectives.axis_index("expert") * num_experts
  return jax.lax.dynamic_slice(jnp.array(matrix.plan, jnp.int32), (layer, first), (1, num_experts))[
    0
  ]
