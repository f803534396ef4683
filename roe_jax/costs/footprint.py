"""What one device of a mesh holds."""

import dataclasses

import jax
from jax.sharding import AbstractMesh

from roe_jax import attention, sharding
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
    texts: tokens, their log-probabilities and the clean member's choices; exact.
    activations: an estimate, see `memory`.
  """

  weights: int
  cache: int
  texts: int
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
  """What one device of a mesh holds while texts are generated or scored.

  Activations are estimated as the larger of two, all in float32. A block's: six
  arrays of hidden states, queries and attention's output, scores of one block of
  slots; and for each pair of a row and an expert that may be this device's its
  input, its output and twice its inner values. The distributions': four arrays of
  logits. Programs compiled for CPUs took 0.7 to 1.4 times that, and up to 32 MiB more.

  Args:
    config: the model's architecture.
    roster: the settings.
    mesh: of `sharding.make_mesh` or `sharding.abstract_mesh`.
    batch_size: texts together.
    capacity: positions that the cache holds.
    positions: of each text that are computed together.
    kind: "step", "prefill" or "score", see `calls.call`.
    platform: JAX's name of the devices'; the backend's by default.
  """
  weights = sharding.bytes_on_device(
    mesh, params_lib.abstract(config), sharding.parameter_specs(mesh, config)
  )
  cache = jax.eval_shape(
    lambda: members_lib.empty_cache(config, roster, batch_size, capacity, whole=kind == "score")
  )
  t = mesh.shape[TENSOR]
  a, e = config.experts_per_token, mesh.shape[EXPERT]
  slots = min(capacity, attention.block_slots(platform))
  per_row = 6 * config.d_model + config.num_heads // t * (2 * config.head_dim + slots)
  per_pair = 2 * config.d_model + 2 * config.d_expert // t
  of_vocabulary = config.vocab_size // num_shards(mesh, vocabulary_axes(config, mesh))
  activations = max(
    max(
      batch.rows * per_row
      + batch.tokens_at_experts(a, e) * min(a, config.num_experts // e) * per_pair,
      0 if batch.is_shared or kind == "prefill" else 4 * batch.head_tokens * of_vocabulary,
    )
    for batch in batches(config, roster, mesh, batch_size, positions, platform)
  )
  held = sharding.bytes_on_device(mesh, cache, sharding.state_specs(mesh, cache))
  return Memory(weights, held, 3 * 4 * batch_size * capacity, 4 * activations)
