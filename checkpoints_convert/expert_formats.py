"""Converts the matrices in a piece of a checkpoint to other formats."""

from collections.abc import Mapping

import numpy as np

from roe_jax import bit_plans, compensation
from roe_jax.config import ModelConfig
from roe_jax.quantization import (
  EXPERT_MATRICES,
  Quantized,
  contracted_axis,
  dequantize_on_host,
  format_of,
  quantize,
)


def recode(
  arrays: dict[str, np.ndarray],
  source: ModelConfig,
  target: ModelConfig,
  plan: np.ndarray | None = None,
  moments: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
  """Returns the arrays of a piece in the formats of `target`.

  Decoded matrices have the dtype of `target`. Matrices that are quantized again are decoded to
  bfloat16, which represents MXFP4 exactly.

  Args:
    arrays: named as in `checkpoint.piece_shapes` of `source`; matrices of other formats are
      removed from it.
    source: the config of the arrays.
    target: the config of the result.
    plan: bits of the piece's experts, `[layers of the piece, E]`, or None; see `bit_plans`.
    moments: of the inputs of the piece's experts, for a nested format with compensation; see
      `compensation.second_moments`.
  """
  for stem in [name.removesuffix(".codes") for name in arrays]:
    own, wanted = stored_format(source, stem), stored_format(target, stem)
    if own == wanted:
      continue
    matrix, axis = stem.removeprefix("experts."), contracted_axis(stem)
    if own:
      codes, scales = arrays.pop(f"{stem}.codes"), arrays.pop(f"{stem}.scales")
      decoded = np.dtype("bfloat16" if wanted else target.dtype)
      arrays[stem] = dequantize_on_host(Quantized(codes, scales, own), decoded)
    if wanted:
      array, of_experts = arrays.pop(stem), stem in EXPERT_MATRICES
      if of_experts and moments is not None:
        quantized = compensation.quantize(array, wanted, axis, moments[matrix])
      else:
        quantized = quantize(array, wanted, axis)
      if of_experts and plan is not None:
        quantized = bit_plans.apply(quantized, plan)
      arrays |= {f"{stem}.codes": quantized.codes, f"{stem}.scales": quantized.scales}
  return arrays


def stored_format(config: ModelConfig, name: str) -> str | None:
  """Returns the format of a parameter, named as in a piece; None for an array of numbers."""
  return format_of(name, config.expert_format, config.projection_format)
