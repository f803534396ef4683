"""What one device of a mesh holds."""

import dataclasses

import jax
from jax.sharding import AbstractMesh

from roe_jax import attention, members as members_lib, params as params_lib, sharding
from roe_jax.config import ModelConfig
from roe_jax.costs.batches import batches, parts, vocabulary_axes
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
    return self.weights + self.cache + self.texts + self.activations


def memory(config: ModelConfig, roster: Roster, mesh: AbstractMesh, batch_size: int,
           capacity: int, positions: int = 1, *, whole: bool = False,
           platform: str | None = None) -> Memory:
  """What one device of a mesh holds while texts are generated or scored.

  Activations are estimated as the larger of two, all in float32. A block's: eight
  arrays of hidden states; queries, attention's output and its sum, each twice;
  scores of one block of slots twice; and for each pair of a row and an expert that
  may be this device's its input, its output, and inner values thrice. The
  distributions': four arrays of logits.

  Args:
    config: the model's architecture.
    roster: the settings.
    mesh: of `sharding.make_mesh` or `sharding.abstract_mesh`.
    batch_size: texts together.
    capacity: positions that the cache holds.
    positions: of each text that are computed together.
    whole: whether sliding layers hold all positions, as scoring needs.
    platform: JAX's name of the devices'; the backend's by default.
  """
  weights = sharding.bytes_on_device(
      mesh, params_lib.abstract(config), sharding.parameter_specs(mesh, config))
  cache = jax.eval_shape(
      lambda: members_lib.empty_cache(config, roster, batch_size, capacity, whole))
  t = mesh.shape[TENSOR]
  own_experts = min(config.experts_per_token, config.num_experts // mesh.shape[EXPERT])
  slots = min(capacity, attention.block_slots(platform))
  per_row = (8 * config.d_model
             + config.num_heads // t * (6 * config.head_dim + 2 * slots))
  per_pair = 2 * config.d_model + 3 * config.d_expert // t
  of_vocabulary = config.vocab_size // parts(mesh, vocabulary_axes(config, mesh))
  activations = max(
      max(batch.rows * per_row + batch.group_rows * own_experts * per_pair,
          0 if batch.is_shared else 4 * batch.head_rows * of_vocabulary)
      for batch in batches(config, roster, mesh, batch_size, positions, platform))
  return Memory(weights, sharding.bytes_on_device(mesh, cache, sharding.state_specs(mesh, cache)),
                3 * 4 * batch_size * capacity, 4 * activations)
