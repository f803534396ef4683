"""Which tokens one device of a mesh computes: roster members, sequences, positions."""

from collections.abc import Iterable
import dataclasses
import math

from jax.sharding import AbstractMesh

from roe_jax import sharding
from roe_jax.config import ModelConfig
from roe_jax.experts import expert_parallel
from roe_jax.roster import Roster
from roe_jax.sharding import EXPERT


@dataclasses.dataclass(frozen=True)
class MemberBatch:
  """Roster members that are computed together, as seen by one device of a mesh.

  Attributes:
    layers: layers they run through.
    times: how many such batches run one after the other.
    is_shared: whether these are the hidden states before the first noise, which all
      members share.
    sequences: sequences on this device.
    members: members on this device.
    group_sequences, group_members: the same for the devices along `expert` together, which
      compute experts for each other's tokens.
    positions: positions per sequence and member.
    tokens_sharded: whether the devices along `expert` hold different tokens.
    member_axes: mesh axes that shard the members.
    head_tokens: tokens on this device where next-token distributions are computed.
    head_gather_axes: mesh axes along which tokens are gathered before that.
    bits: how many bits of nested experts they read; None: all.
  """

  layers: range
  times: int
  is_shared: bool
  sequences: int
  members: int
  group_sequences: int
  group_members: int
  positions: int
  tokens_sharded: bool
  member_axes: tuple[str, ...]
  head_tokens: int
  head_gather_axes: tuple[str, ...]
  bits: int | None = None

  @property
  def tokens(self) -> int:
    return self.members * self.sequences * self.positions

  @property
  def group_tokens(self) -> int:
    return self.group_members * self.group_sequences * self.positions

  def exchange_capacity(self, choices: int, devices: int) -> int:
    """Tokens exchanged with each other device; see `expert_parallel.exchange_capacity`."""
    if not self.tokens_sharded:
      return 0
    return expert_parallel.exchange_capacity(self.tokens, choices, devices)

  def tokens_at_experts(self, choices: int, devices: int) -> int:
    """Tokens on this device while it applies its experts."""
    return self.exchange_capacity(choices, devices) * devices or self.group_tokens


def batches(
  config: ModelConfig,
  roster: Roster,
  mesh: AbstractMesh,
  batch_size: int,
  positions: int,
  platform: str | None = None,
  after_clean: bool = False,
) -> list[MemberBatch]:
  """Returns the batches of a call in order; see `CacheMode.member_batches`.

  With `after_clean` those of the noisy members alone, in the layers from the first noise on.
  """
  first, end = roster.noisy_layers[0], config.num_layers
  shape = batch_size, positions, config.d_model
  found = [_batch(mesh, shape, range(first), 1, None)] if first and not after_clean else []
  for weights, members in roster.groups(roster.members[after_clean:]):
    group = roster
    if roster.has_own_weights or after_clean:
      changes: dict = dict(member_bits=None, member_tasks=None)
      changes |= dict(num_members=len(members), include_clean=True)
      group = dataclasses.replace(roster, **changes)
    size, *others = roster.cache_mode.member_batches(
      config, group, (batch_size, positions), mesh, platform
    )
    sizes = [(size, 1), tuple(reversed(others))]
    layers = range(first, end)
    found += [
      _batch(mesh, shape, layers, times, size, weights.bits) for size, times in sizes if times
    ]
  return found


def token_batch(
  config: ModelConfig, mesh: AbstractMesh, batch_size: int, length: int
) -> MemberBatch:
  """Returns the tokens of whole sequences, which run without members through all layers."""
  return _batch(mesh, (batch_size, length, config.d_model), range(config.num_layers), 1, None)


def _batch(mesh, shape, layers, times, members, bits=None):
  is_shared = members is None  # shared hidden states have no member axis
  members = members or 1
  names = ("members", "batch", "positions", "embed")[is_shared:]
  spec = sharding.spec(mesh, names, shape if is_shared else (members, *shape))
  member_axes = () if is_shared else sharding.axes_of(spec, 0)
  sequence_axes = sharding.axes_of(spec, 1 - is_shared)
  head_names = ("members_of_vocab", "batch_of_vocab", "positions", "embed")
  head_axes = sharding.axes_of(sharding.spec(mesh, head_names, (members, *shape)))
  token_axes = member_axes + sequence_axes
  return MemberBatch(
    layers,
    times,
    is_shared,
    sequences=shape[0] // num_shards(mesh, sequence_axes),
    members=members // num_shards(mesh, member_axes),
    group_sequences=shape[0] // num_shards(mesh, (a for a in sequence_axes if a != EXPERT)),
    group_members=members // num_shards(mesh, (a for a in member_axes if a != EXPERT)),
    positions=shape[1],
    tokens_sharded=EXPERT in token_axes,
    member_axes=member_axes,
    head_tokens=members * shape[0] * shape[1] // num_shards(mesh, head_axes),
    head_gather_axes=tuple(a for a in token_axes if a not in head_axes),
    bits=bits,
  )


def num_shards(mesh: AbstractMesh, axes: Iterable[str]) -> int:
  """Returns into how many shards mesh axes divide an array."""
  return math.prod(mesh.shape[a] for a in axes)


def vocabulary_axes(config: ModelConfig, mesh: AbstractMesh) -> tuple[str, ...]:
  """Returns the mesh axes that shard the vocabulary."""
  return sharding.axes_of(sharding.spec(mesh, ("vocab",), (config.vocab_size,)))
