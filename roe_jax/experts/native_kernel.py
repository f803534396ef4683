"""The experts in C++, for CPUs: see `roe_jax.native`."""

from roe_jax import native
from roe_jax.quantization import codes_and_scales


def compute(num_experts, activation, weights, layer, x, indices, gates):
  """Returns the gate-weighted sum of the active experts' outputs; see `experts.apply`.

  Raises:
    ValueError: the kernel is not available, or D is not a multiple of 4 (of 8 with four bits).
  """
  codes, scales, format = codes_and_scales(weights.gate_up)
  if codes.shape[-1] % native.MULTIPLE:
    raise ValueError(
      "the expert strategy 'native' needs a d_model that is a multiple of 4 (of 8 with four bits), "
      f"got {x.shape[1]}: choose another one"
    )
  if not native.is_available():
    raise ValueError(
      "the expert strategy 'native' is not available here: it needs a CPU, a C++ compiler, and "
      "ROE_JAX_NATIVE other than 0"
    )
  kind = format or ("float32" if codes.dtype == "float32" else "bfloat16")
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
  )
