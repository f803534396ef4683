"""Converts the experts in a piece of a checkpoint to another format."""

from collections.abc import Mapping

import numpy as np

from roe_jax import bit_plans, compensation
from roe_jax.config import ModelConfig
from roe_jax.quantization import CONTRACTED, Quantized, dequantize_on_host, quantize


def recode(
  arrays: dict[str, np.ndarray],
  source: ModelConfig,
  target: ModelConfig,
  plan: np.ndarray | None = None,
  moments: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
  """Returns the arrays of a piece in the expert format of `target`.

  Decoded matrices have the dtype of `target`. Matrices that are quantized again are decoded to
  bfloat16, which represents MXFP4 exactly.

  Args:
    arrays: named as in `checkpoint.piece_shapes` of `source`; the experts' matrices are removed
      from it.
    source: the config of the arrays.
    target: the config of the result.
    plan: bits of the piece's experts, `[layers of the piece, E]`, or None; see `bit_plans`.
    moments: of the inputs of the piece's experts, for a nested format with compensation; see
      `compensation.second_moments`.
  """
  if source.expert_format == target.expert_format:
    return arrays
  decoded = np.dtype("bfloat16" if target.expert_format else target.dtype)
  for matrix, axis in CONTRACTED.items():
    name = f"experts.{matrix}"
    if source.expert_format and f"{name}.codes" in arrays:
      arrays[name] = dequantize_on_host(
        Quantized(arrays.pop(f"{name}.codes"), arrays.pop(f"{name}.scales"), source.expert_format),
        decoded,
      )
    if target.expert_format and name in arrays:
      array = arrays.pop(name)
      if moments is None:
        quantized = quantize(array, target.expert_format, axis)
      else:
        quantized = compensation.quantize(array, target.expert_format, axis, moments[matrix])
      if plan is not None:
        quantized = bit_plans.apply(quantized, plan)
      arrays |= {f"{name}.codes": quantized.codes, f"{name}.scales": quantized.scales}
  return arrays
