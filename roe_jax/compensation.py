"""Compensated quantization: weights that are not rounded yet make up for errors of others.

GPTQ (arXiv 2210.17323) rounds the inputs of a matrix one after the other and changes the weights of
the next ones so that the outputs on sample inputs x change least: the squared error of `W x`
depends on the inputs by their second moments `H = sum x x^T`. In a nested format (arXiv 2504.15299)
the base is rounded so, and then each plane, whose target is what the planes before it leave over;
so every prefix of the planes is as good as it can be, given those before it.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import batching, quantization, transformer
from roe_jax.config import ModelConfig
from roe_jax.experts import Activation
from roe_jax.layer_inputs import LayerOptions, TokenBatch
from roe_jax.nested import Nested, rounded
from roe_jax.params import Params
from roe_jax.quantization import CONTRACTED, Quantized, to_float32

# Added to H's diagonal, in units of its mean. The paper's code adds 0.01: that helps a base of two
# bits more, and its weights are then so far from the given ones that planes cannot follow. KL of an
# embedded model in 1000 nats at 2, 3, 4 bits of nested:2-4, rounded 78.8, 18.3, 4.6; with 0.01:
# 43.7, 20.8, 9.6; with 0.3: 42.9, 16.6, 6.5; with 1: 57.9, 13.8, 4.9; with 3: 63.3, 12.8, 4.9.
DAMPING = 1.0

# Quantizes a column `[N]` by the parameters of its group `[N]`: returns codes and weights.
_Round = Callable[..., tuple[np.ndarray, np.ndarray]]


def second_moments(
  params: Params, config: ModelConfig, sequences: Sequence[Sequence[int]]
) -> dict[str, np.ndarray]:
  """Computes the second moments of the inputs of experts, on tokens of some sequences.

  The inputs of `gate_up` are those of all tokens, which the experts of a layer share; those of
  `down` are of the tokens that choose the expert. Inputs are the unquantized model's.

  Args:
    params: unquantized parameters.
    config: their architecture.
    sequences: token ids.

  Returns:
    {"gate_up": `[L, 1, D, D]`, "down": `[L, E, F, F]`}, float32.

  Raises:
    ValueError: the weights are quantized.
  """
  if config.formats:
    raise ValueError(f"compensation needs unquantized weights, got {config.formats}")
  stack = params.layers
  parts: dict[str, Any] = {
    "experts": stack.experts.replace(down=jnp.zeros_like(stack.experts.down))
  }
  if stack.experts.down_bias is not None:
    parts["experts"] = parts["experts"].replace(down_bias=jnp.zeros_like(stack.experts.down_bias))
  if stack.shared_expert is not None:
    zeros = jnp.zeros_like(stack.shared_expert.down)
    parts["shared_expert"] = stack.shared_expert.replace(down=zeros)
  attention_only = params.replace(layers=stack.replace(**parts))
  run = jax.jit(transformer.run_layers, static_argnames=("config", "options"))
  capacity = batching.bucket(max(map(len, sequences)))  # all share one program
  tokens = jnp.asarray(batching.pad(sequences, len(sequences), capacity))
  used = jnp.asarray([[i < len(s) for i in range(capacity)] for s in sequences])
  batch = TokenBatch(jnp.broadcast_to(jnp.arange(capacity), tokens.shape))
  x = transformer.embed(params, config, tokens)
  found: dict[str, list[np.ndarray]] = {name: [] for name in CONTRACTED}
  for layer in range(config.num_layers):
    options = LayerOptions((layer, layer + 1), strategy="padded", keep=("experts",))
    after, _, outputs = run(params, config, x, batch, options=options)
    if layer >= config.first_dense_layers:
      row = layer - config.first_dense_layers
      before, _, _ = run(attention_only, config, x, batch, options=options)
      moments = _moments(
        stack, config, row, before[..., : config.d_model], outputs.experts[0], used
      )
      for name, values in zip(("gate_up", "down"), moments):
        found[name].append(np.asarray(values))
    x = after
  return {name: np.stack(values) for name, values in found.items()}


@functools.partial(jax.jit, static_argnames="config")
def _moments(layers, config, layer, x, chosen, used):
  """Returns the moments of one layer's inputs, `[1, D, D]` and `[E, F, F]`."""
  x = transformer.norm(config, x, layers.moe_norm[layer]).reshape(-1, config.d_model)
  x = jnp.where(used.reshape(-1, 1), x.astype(jnp.float32), 0)
  chosen = chosen.reshape(len(x), -1)
  activation = Activation(config.swiglu_limit, config.swiglu_alpha)
  matrices, bias = layers.experts.gate_up[layer], layers.experts.gate_up_bias

  def of_expert(e):
    inputs = jnp.einsum("pd,fid->pif", x, matrices[e].astype(jnp.float32))
    if bias is not None:
      inputs += bias[layer, e].T.astype(jnp.float32)
    hidden = activation(inputs[:, 0], inputs[:, 1])
    hidden = jnp.where((chosen == e).any(-1)[:, None] & used.reshape(-1, 1), hidden, 0)
    return hidden.T @ hidden

  return (x.T @ x)[None], jax.lax.map(of_expert, jnp.arange(config.num_experts))


def quantize(array: np.ndarray, format: str, axis: int, moments: np.ndarray) -> Quantized:
  """Quantizes experts' matrices to a nested format on the host, with compensation.

  Args:
    array: `[L, E, ..., N, D]` weights, float32 or bfloat16.
    format: the name of a nested format.
    axis: the contracted axis, -1 or -2.
    moments: `[L, E, K, K]` or `[L, 1, K, K]`, second moments of the K inputs, K being the size of
      that axis.

  Raises:
    ValueError: the format is not nested, or does not support the sizes.
  """
  kind = quantization.nested_format(format)
  empty = quantization.quantize(np.zeros_like(array), format, axis)  # checks sizes
  group = quantization.group_size(format, array.shape[axis])
  weights, codes, scales = (
    a.reshape(*a.shape[:2], -1, a.shape[-1]) for a in (array, empty.codes, empty.scales)
  )
  for layer, expert in np.ndindex(*weights.shape[:2]):
    if expert < moments.shape[1]:
      factor = _factor(moments[layer, expert])
    matrix = to_float32(weights[layer, expert])
    found, own = encode(matrix if axis == -1 else matrix.T, factor, kind, group)
    # Scales are next to each other along the last axis.
    found, own = (
      (found, np.moveaxis(own, 0, 1)) if axis == -1 else (found.T, own.transpose(2, 0, 1))
    )
    codes[layer, expert] = kind.pack(np.ascontiguousarray(found))
    scales[layer, expert] = own.reshape(scales.shape[2:])
  return empty


def _factor(moments_KxK):
  """Returns the upper factor U of the damped inverse, `H^-1 = U^T U`, float32.

  Its row j says by how much the other weights make up for an error of weight j.
  """
  moments = moments_KxK.astype(np.float64)
  damping = max(DAMPING * np.trace(moments) / len(moments), 1e-12)
  inverse = np.linalg.inv(moments + damping * np.eye(len(moments)))
  return np.linalg.cholesky(inverse).T.astype(np.float32)


def encode(
  weights_NxK: np.ndarray, factor_KxK: np.ndarray, format: Nested, group: int
) -> tuple[np.ndarray, np.ndarray]:
  """Quantizes a matrix with compensation, in groups of inputs; see `_factor`.

  Returns:
    uint8 codes `[N, K]` and float32 scales `[num_scales, N, K/group]`, as `Nested.encode` does.
  """
  levels = 2**format.base - 1

  def base_scales(left):
    low, high = left.min(axis=1), left.max(axis=1)
    return rounded((high - low) / np.float32(levels)), rounded(low)

  def round_base(column, step, low):
    codes = np.clip(np.rint((column - low) / np.where(step == 0, np.float32(1), step)), 0, levels)
    return codes, codes * step + low

  def sign_scale(left):
    return (rounded(np.abs(left).mean(axis=1)),)

  def round_sign(column, scale):
    signs = column >= 0
    return signs, np.where(signs, scale, -scale)

  codes, scales = np.zeros(weights_NxK.shape, np.uint8), []
  left = weights_NxK.astype(np.float32)
  parts = [(base_scales, round_base)] + (format.bits - format.base) * [(sign_scale, round_sign)]
  for of_group, round_column in parts:
    found, own, rounded_to = _compensated(left, factor_KxK, group, of_group, round_column)
    codes = (2 * codes if scales else codes) + found
    scales += own
    left = left - rounded_to
  return codes, np.stack(scales)


def _compensated(target, factor, group, of_group, round_column: _Round):
  """Rounds a matrix `[N, K]` column by column.

  Returns:
    uint8 codes, a list of scales `[N, K/group]`, and the rounded matrix.
  """
  work, size = target.copy(), target.shape[1]
  codes, rounded_to, of_groups = np.zeros(work.shape, np.uint8), np.empty_like(work), []
  for first in range(0, size, group):
    end = first + group
    of_groups.append(of_group(work[:, first:end]))
    errors = np.empty((len(work), group), np.float32)
    for j in range(first, end):
      codes[:, j], rounded_to[:, j] = round_column(work[:, j], *of_groups[-1])
      errors[:, j - first] = (work[:, j] - rounded_to[:, j]) / factor[j, j]
      work[:, j + 1 : end] -= np.outer(errors[:, j - first], factor[j, j + 1 : end])
    work[:, end:] -= errors @ factor[first:end, end:]
  return codes, [np.stack(s, axis=1) for s in zip(*of_groups)], rounded_to
