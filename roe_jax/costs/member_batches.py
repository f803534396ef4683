"""Which rows a device of a mesh computes: members of a roster, texts, positions."""

from collections.abc import Iterable
import dataclasses
import math

from jax.sharding import AbstractMesh

from roe_jax import members as members_lib
from roe_jax import sharding
from roe_jax.config import ModelConfig
from roe_jax.experts import expert_parallel
from roe_jax.roster import Roster
from roe_jax.sharding import EXPERT


@dataclasses.dataclass(frozen=True)
class MemberBatch:
  """Members that are computed together, as one device of a mesh takes part in it.

  Attributes:
    layers: those they are computed in.
    times: how many such batches follow each other.
    is_shared: whether these are the hidden states before the first noise, which all
      members have in common.
    texts: how many texts' rows (and caches) are on this device.
    members: how many members' rows are.
    group_sequences, group_members: the same of the devices along `expert` together,
      which compute each other's rows.
    positions: of each text and member.
    tokens_sharded: whether those devices hold different rows.
    member_axes: mesh axes along which devices hold different members.
    head_tokens: rows on this device where distributions are computed.
    head_gather_axes: mesh axes along which rows were split until there.
  """

  layers: range
  times: int
  is_shared: bool
  texts: int
  members: int
  group_sequences: int
  group_members: int
  positions: int
  tokens_sharded: bool
  member_axes: tuple[str, ...]
  head_tokens: int
  head_gather_axes: tuple[str, ...]

  @property
  def rows(self) -> int:
    return self.members * self.texts * self.positions

  @property
  def group_tokens(self) -> int:
    return self.group_members * self.group_sequences * self.positions

  def room(self, choices: int, devices: int) -> int:
    """Rows that this device exchanges with each other one; see `parallel.exchange_capacity`."""
    return (
      expert_parallel.exchange_capacity(self.rows, choices, devices) if self.tokens_sharded else 0
    )

  def tokens_at_experts(self, choices: int, devices: int) -> int:
    """Rows that this device has while it computes its experts' share."""
    room = self.room(choices, devices)
    return room * devices if room else self.group_tokens


def batches(
  config: ModelConfig,
  roster: Roster,
  mesh: AbstractMesh,
  batch_size: int,
  positions: int,
  platform: str | None = None,
) -> list[MemberBatch]:
  """The batches of a call, in their order; see `members.against_clean_cache`."""
  first, end = roster.noisy_layers[0], config.num_layers
  if roster.cache == "clean":
    size, *others = members_lib.batch_sizes(config, roster, batch_size * positions, platform)
    sizes = [(size, 1), tuple(reversed(others))]
  else:
    sizes = [(len(roster.members), 1)]
  shape = batch_size, positions, config.d_model
  shared = [_batch(mesh, shape, range(first), 1, None)] if first else []
  return shared + [
    _batch(mesh, shape, range(first, end), times, size) for size, times in sizes if times
  ]


def _batch(mesh, shape, layers, times, members):
  is_shared = members is None  # such states have no axis of members
  members = members or 1
  names = ("members", "batch", "positions", "embed")[is_shared:]
  spec = sharding.spec(mesh, names, shape if is_shared else (members, *shape))
  of_members = () if is_shared else sharding.axes_of(spec, 0)
  of_texts = sharding.axes_of(spec, 1 - is_shared)
  of_head = sharding.axes_of(
    sharding.spec(
      mesh, ("members_of_vocab", "batch_of_vocab", "positions", "embed"), (members, *shape)
    )
  )
  split = of_members + of_texts
  return MemberBatch(
    layers,
    times,
    is_shared,
    texts=shape[0] // num_shards(mesh, of_texts),
    members=members // num_shards(mesh, of_members),
    group_sequences=shape[0] // num_shards(mesh, (a for a in of_texts if a != EXPERT)),
    group_members=members // num_shards(mesh, (a for a in of_members if a != EXPERT)),
    positions=shape[1],
    tokens_sharded=EXPERT in split,
    member_axes=of_members,
    head_tokens=members * shape[0] * shape[1] // num_shards(mesh, of_head),
    head_gather_axes=tuple(a for a in split if a not in of_head),
  )


def num_shards(mesh: AbstractMesh, axes: Iterable[str]) -> int:
  """Into how many parts mesh axes split an array."""
  return math.prod(mesh.shape[a] for a in axes)


def vocabulary_axes(config: ModelConfig, mesh: AbstractMesh) -> tuple[str, ...]:
  """The mesh axes that split the vocabulary."""
  return sharding.axes_of(sharding.spec(mesh, ("vocab",), (config.vocab_size,)))
