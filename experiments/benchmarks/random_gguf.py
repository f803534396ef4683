"""Writes models with random weights to GGUF files, for llama.cpp."""

from collections.abc import Callable, Iterator
import math
import pathlib
from typing import Any

import jax
import numpy as np

from experiments.cli.extras import gguf
from roe_jax import quantization
from roe_jax.config import ModelConfig
from roe_jax.numerics import to_compute_dtype
from roe_jax.params import AttentionParams, Params

FAMILY = "olmoe"  # the only one that is written
# Types of GGUF, by dtype or format of experts. Blocks of 32 weights have a scale; those of int8 and
# int4 are longer here, so these are close to a model's weights, and the others equal.
KINDS = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0", "mxfp4": "MXFP4"}


def kinds(config: ModelConfig) -> tuple[str, str]:
  """Returns the types of GGUF for the experts, and for the other matrices."""
  formats = (config.expert_format, config.projection_format)
  return KINDS[formats[0] or config.dtype], KINDS[formats[1] or config.dtype]


def write(path: pathlib.Path, config: ModelConfig, params: Params) -> None:
  """Writes a model without a tokenizer, array by array.

  Args:
    path: the file.
    config: the architecture, of `FAMILY`, with a dtype and experts in `KINDS`.
    params: its weights.
  """
  writer = gguf.GGUFWriter(path, config.family)
  writer.add_tokenizer_model("none")
  writer.add_vocab_size(config.vocab_size)
  writer.add_context_length(config.context_length)
  writer.add_embedding_length(config.d_model)
  writer.add_block_count(config.num_layers)
  writer.add_feed_forward_length(config.d_expert)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_layer_norm_rms_eps(config.rms_norm_eps)
  writer.add_rope_freq_base(config.rope_theta)
  writer.add_expert_count(config.num_experts)
  writer.add_expert_used_count(config.experts_per_token)
  types = gguf.GGMLQuantizationType
  tensors = [(name, types[kind], shape, get) for name, kind, shape, get in _tensors(config, params)]
  for name, kind, shape, _ in tensors:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    num_bytes = math.prod(shape) // block * size
    writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  for _, kind, shape, get in tensors:
    array = np.ascontiguousarray(get(), np.float32).reshape(shape)
    writer.write_tensor_data(gguf.quants.quantize(array, kind))
  writer.close()


def _tensors(
  config: ModelConfig, params: Params
) -> Iterator[tuple[str, str, tuple[int, ...], Callable[[], np.ndarray]]]:
  """Yields the name of each tensor, its type and shape, and a function that returns it."""
  of_experts, other = kinds(config)
  layers, attention = params.layers, params.layers.attention
  assert isinstance(attention, AttentionParams)
  v, d, f, e = config.vocab_size, config.d_model, config.d_expert, config.num_experts
  queries, keys = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
  yield "token_embd.weight", other, (v, d), lambda: to_float32(params.embedding)
  yield "output_norm.weight", "F32", (d,), lambda: to_float32(params.final_norm)
  yield "output.weight", other, (v, d), lambda: to_float32(params.unembedding)
  for layer in range(config.num_layers):

    def of(array, layer=layer):
      return lambda: to_float32(jax.tree.map(lambda a: a[layer], array))

    def moved(array, *axes, layer=layer):
      return lambda: of(array, layer)().transpose(axes)

    def half(index, layer=layer):
      return lambda: of(layers.experts.gate_up, layer)()[:, :, index]

    for name, kind, shape, get in (
      ("attn_norm", "F32", (d,), of(layers.attention_norm)),
      ("attn_q", other, (queries, d), of(attention.query)),
      ("attn_k", other, (keys, d), of(attention.key)),
      ("attn_v", other, (keys, d), of(attention.value)),
      ("attn_output", other, (d, queries), moved(attention.output, 2, 0, 1)),
      ("attn_q_norm", "F32", (queries,), of(attention.query_norm)),
      ("attn_k_norm", "F32", (keys,), of(attention.key_norm)),
      ("ffn_norm", "F32", (d,), of(layers.moe_norm)),
      ("ffn_gate_inp", "F32", (e, d), of(layers.router)),
      ("ffn_gate_exps", of_experts, (e, f, d), half(0)),
      ("ffn_up_exps", of_experts, (e, f, d), half(1)),
      ("ffn_down_exps", of_experts, (e, d, f), moved(layers.experts.down, 0, 2, 1)),
    ):
      yield f"blk.{layer}.{name}.weight", kind, shape, get


def to_float32(array: Any) -> np.ndarray:
  """Returns weights as float32, dequantized."""
  if quantization.is_quantized(array):
    codes, scales = (np.asarray(to_compute_dtype(a)) for a in (array.codes, array.scales))
    return quantization.dequantize_on_host(array.replace(codes=codes, scales=scales))
  return np.asarray(to_compute_dtype(array)).astype(np.float32)
