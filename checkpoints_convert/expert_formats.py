"""A piece of a checkpoint with its experts in another format."""

import numpy as np

from roe_jax.config import ModelConfig
from roe_jax.quantization import CONTRACTED, Quantized, dequantize_on_host, quantize


def recode(
  arrays: dict[str, np.ndarray], source: ModelConfig, target: ModelConfig
) -> dict[str, np.ndarray]:
  """The arrays of a piece in the expert format of `target`.

  What is decoded comes in the dtype of `target`; to be quantized again, in
  bfloat16, which holds mxfp4 exactly.

  Args:
    arrays: named as in `checkpoint.piece_shapes` of `source`; experts' matrices
      are taken out of it.
    source: the config of the arrays.
    target: the config of the result.
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
      quantized = quantize(arrays.pop(name), target.expert_format, axis)
      arrays |= {f"{name}.codes": quantized.codes, f"{name}.scales": quantized.scales}
  return arrays
