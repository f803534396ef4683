"""Memory on one device of a mesh."""

import dataclasses

import jax
from jax.sharding import AbstractMesh

from roe_jax import attention, latent_attention, sharding
from roe_jax import members as members_lib
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.costs.member_batches import batches, num_shards, vocabulary_axes
from roe_jax.roster import Roster
from roe_jax.sharding import EXPERT, TENSOR


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device.

  Attributes:
    weights, cache: exact.
    tokens: tokens, their log-probabilities, the clean member's choices, and how many members and
      forward passes each took; exact.
    activations: an estimate, see `memory`.
  """

  weights: int
  cache: int
  tokens: int
  activations: int

  @property
  def total(self) -> int:
    return sum(dataclasses.astuple(self))


def memory(
  config: ModelConfig,
  roster: Roster,
  mesh: AbstractMesh,
  batch_size: int,
  capacity: int,
  positions: int = 1,
  *,
  kind: str = "step",
  platform: str | None = None,
) -> Memory:
  """Returns the memory of one device of a mesh while generating or scoring.

  Activations are estimated as the larger of two sums, all in float32. In a block: six
  arrays of hidden states, queries, attention outputs and the scores of one block of cache
  positions, with latent attention also the keys and values of such a block, where these are
  expanded; and for each pair of a token and an expert on this device its input, its
  output and twice its hidden values. For the next-token distributions: four arrays of
  logits. Programs compiled for CPUs took 0.4 to 1.4 times that, plus up to 32 MiB.

  Args:
    config: the model's architecture.
    roster: its settings.
    mesh: from `sharding.make_mesh` or `sharding.abstract_mesh`.
    batch_size: sequences.
    capacity: cache positions.
    positions: positions of each sequence in one call.
    kind: "step", "prefill" or "score", see `calls.call`.
    platform: JAX's name of the devices' platform; by default the backend's.
  """
  weights = sharding.bytes_on_device(
    mesh, params_lib.abstract(config), sharding.parameter_specs(mesh, config)
  )
  cache = jax.eval_shape(
    lambda: members_lib.empty_cache(
      config,
      roster,
      batch_size,
      capacity,
      rerun=capacity if kind == "score" else roster.draft_tokens,
    )
  )
  t, e, a = mesh.shape[TENSOR], mesh.shape[EXPERT], config.experts_per_token
  cache_block = min(capacity, attention.block_size(platform))
  heads = config.num_heads // t
  per_pair = min(a, config.num_experts // e) * (2 * config.d_model + 2 * config.d_expert // t)
  vocab = config.vocab_size // num_shards(mesh, vocabulary_axes(config, mesh))
  activations = 0
  for batch in batches(config, roster, mesh, batch_size, positions, platform):
    caches = roster.cache_mode.histories(batch.members)
    width, expanded = 2 * config.cached_head_dim, 0  # of a query and what it mixes
    queries = batch.members * positions // max(1, caches)
    if config.kv_lora_rank and latent_attention.is_expanded(config, queries):
      width = config.head_dim + config.v_head_dim
      expanded = caches * batch.sequences * cache_block * heads * width
    per_token = 6 * config.d_model + heads * (width + cache_block)
    block = batch.tokens * per_token + expanded + batch.tokens_at_experts(a, e) * per_pair
    logits = 0 if batch.is_shared or kind == "prefill" else 4 * batch.head_tokens * vocab
    activations = max(activations, block, logits)
  cache_bytes = sharding.bytes_on_device(mesh, cache, sharding.state_specs(mesh, cache))
  return Memory(weights, cache_bytes, 5 * 4 * batch_size * capacity, 4 * activations)
