"""FLOPs of a roster for one sequence, and the expected number of unique active experts."""

import math

import numpy as np

from roe_jax import latent_attention, params
from roe_jax.config import ModelConfig
from roe_jax.prefill import PREFILL_CHUNK
from roe_jax.roster import Roster


def forward_flops(
  config: ModelConfig, roster: Roster, positions: range, predicted: int | None = None
) -> int:
  """Counts the FLOPs of a roster's matmuls at some positions of one sequence.

  A multiply-add is two FLOPs. Norms, softmax, rotary embeddings and noise are not
  counted. Layers before the first noise are counted once for all members. Members with fewer
  experts of their own (`experts_by_layer`) count these; with `expert_mass`, which experts a token
  needs is known only when it is routed, so the model's number of experts counts. Latent attention
  is counted as in a prefill in chunks where nothing is predicted, and as in decode steps elsewhere.

  Args:
    config: the model's architecture.
    roster: its settings.
    positions: consecutive positions; each attends to the earlier ones in its window
      and to itself.
    predicted: at how many of them next-token distributions are computed; all by default.
  """
  first, members = roster.noisy_layers[0], len(roster.members)
  predicted = len(positions) if predicted is None else predicted
  queries = 1 if predicted else min(len(positions), PREFILL_CHUNK)
  counts = config.experts_per_token if roster.experts_by_layer is None else roster.experts_by_layer
  used = np.broadcast_to(counts, (members, config.num_layers))

  def layers_flops(layers: range, rows: int) -> int:
    attended = sum(window_size(config, layer, p) for layer in layers for p in positions)
    dense, routed = config.split(layers)
    of_position = len(dense) * _dense_layer_flops(config) + len(routed) * _layer_flops(config)
    experts = 6 * config.d_model * config.d_expert * int(used[:rows, list(routed)].sum())
    of_rows = rows * of_position + experts
    return len(positions) * of_rows + rows * attended * attention_flops(config, queries)

  head = 2 * config.vocab_size * config.d_model * predicted
  noisy = layers_flops(range(first, config.num_layers), members)
  return layers_flops(range(first), 1) + noisy + members * head


def generation_flops(
  config: ModelConfig, roster: Roster, prompt_length: int, num_new_tokens: int
) -> int:
  """Counts the FLOPs of prefilling a prompt and decoding new tokens; see `forward_flops`."""
  passes = roster.cache_mode.generation(roster, prompt_length, num_new_tokens)
  return sum(forward_flops(config, *p) for p in passes)


def scoring_flops(config: ModelConfig, roster: Roster, length: int, start: int = 1) -> int:
  """Counts the FLOPs of scoring a sequence's tokens from index `start`; see `forward_flops`."""
  passes = roster.cache_mode.scoring(roster, length, start)
  return sum(forward_flops(config, *p) for p in passes)


def _layer_flops(config):
  """FLOPs per position and layer, without attention scores and values and routed experts."""
  return projection_flops(config) + 2 * router_size(config) + shared_expert_flops(config)


def _dense_layer_flops(config):
  return projection_flops(config) + dense_flops(config)


def dense_flops(config: ModelConfig) -> int:
  """The MLP of the first dense layers, per position and layer."""
  return 6 * config.d_dense * config.d_model


def projection_flops(config: ModelConfig, shards: int = 1) -> int:
  """The projections of attention, per position and layer, on one of the shards of its heads."""
  matrices = params.describe(config.unquantized()).layers.attention.matrices
  return sum(
    2 * math.prod(m.shape[1:]) // (shards if {"heads", "kv_heads"} & set(m.axes) else 1)
    for m in matrices
  )


def router_size(config: ModelConfig) -> int:
  """Weights of a layer's router; 0 without one."""
  layers, cell = params.describe(config).layers, 6 * config.router_state**2
  matrices = [m for m in (layers.router, layers.router_projection) if m is not None]
  return sum(math.prod(m.shape[1:]) for m in matrices) + cell


def shared_expert_flops(config: ModelConfig) -> int:
  """The shared expert, per position and layer; 0 without one."""
  width = config.d_shared_expert
  return (6 * width + 2 * config.shared_expert_gate) * config.d_model if width else 0


def attention_flops(config: ModelConfig, queries: int = 1) -> int:
  """Attention scores and values, per layer and pair of query and key position.

  Args:
    config: the model's architecture.
    queries: how many queries, of positions and members, share what latent attention expands.
  """
  if config.kv_lora_rank and latent_attention.is_expanded(config, queries):
    expansion = 2 * config.num_heads * latent_attention.expansion_size(config)
    return 2 * config.num_heads * (config.head_dim + config.v_head_dim) + expansion // queries
  return 4 * config.num_heads * config.cached_head_dim


def window_size(config: ModelConfig, layer: int, position: int) -> int:
  """Returns how many positions a token attends to in a layer, including itself."""
  window = config.sliding_window if layer in config.sliding_layers else None
  return position + 1 if window is None else min(position + 1, window)


def expected_unique_experts(
  config: ModelConfig, num_members: int, num_tokens: int = 1, overlap: float | None = None
) -> float:
  """Returns the expected number of unique active experts of a layer.

  Without a measured overlap all tokens of all members choose uniformly and
  independently, which activates `E (1 - (1 - A/E)^(tokens · members))` experts: the maximum
  over independent routings, since real routing is skewed and the members of one token are
  correlated. With an overlap, noisy members choose that fraction of their experts among
  the clean member's A and the rest uniformly from the others; tokens stay independent.

  Args:
    config: the model's architecture.
    num_members: roster members, including the clean one.
    num_tokens: sequences times positions.
    overlap: fraction of a noisy member's experts that the clean member also chose, in [0, 1].
  """
  e, a = config.num_experts, config.experts_per_token
  if overlap is None:
    overlap = a / e
  per_token = a
  if a < e:
    per_token += (e - a) * (1 - (1 - (1 - overlap) * a / (e - a)) ** (num_members - 1))
  return e * (1 - (1 - per_token / e) ** num_tokens)
