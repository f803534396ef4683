"""What one device of a mesh does in a call of the model, and how long that takes."""

from collections import Counter
import dataclasses
import math

import jax
from jax.sharding import AbstractMesh

from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.costs import flops as flops_lib
from roe_jax.costs.accelerators import Accelerator
from roe_jax.costs.hlo import Collective
from roe_jax.costs.member_batches import MemberBatch, batches, num_shards, vocabulary_axes
from roe_jax.roster import Roster
from roe_jax.sharding import AXES, DATA, EXPERT, TENSOR

# Collectives of a few bytes by which a step keeps what all devices hold (tokens,
# lengths) where texts lie on some of them, as counted in compiled programs.
STATE_COLLECTIVES = 12


@dataclasses.dataclass(frozen=True)
class MeshCollective:
  """A collective, and over how many devices of the mesh each of its groups reaches."""

  collective: Collective
  reach: int


@dataclasses.dataclass
class DeviceCost:
  """What one device does in a call of the model.

  Attributes:
    flops: of matmuls.
    weights: bytes of weights that are read.
    cache: bytes of the cache that are read.
    logits: bytes of logits that are written and read.
    collectives: how often each collective is done.
  """

  flops: float = 0
  weights: float = 0
  cache: float = 0
  logits: float = 0
  collectives: Counter[MeshCollective] = dataclasses.field(default_factory=Counter)

  @property
  def bytes_read(self) -> float:
    return self.weights + self.cache + self.logits

  @property
  def bytes_sent(self) -> float:
    return sum(count * move.collective.bytes_sent for move, count in self.collectives.items())

  @property
  def num_collectives(self) -> int:
    return self.collectives.total()


@dataclasses.dataclass(frozen=True)
class Seconds:
  """The time of a call by its parts; arithmetic and reading overlap, all else does not."""

  arithmetic: float
  reading: float
  communication: float

  @property
  def total(self) -> float:
    return max(self.arithmetic, self.reading) + self.communication


def seconds(cost: DeviceCost, accelerator: Accelerator) -> Seconds:
  """A bound from the accelerator's figures.

  Arithmetic at its peak, reading at its bandwidth, each collective with its array
  going round a ring, after a latency that grows with the logarithm of the group.
  Collectives overlap with nothing. Devices follow each other as in the
  mesh, `tensor` fastest, and the slower network is used by groups that
  reach beyond a node.
  """

  def of(move):
    beyond = accelerator.node and move.reach > accelerator.node
    rate = accelerator.network if beyond else accelerator.link
    return move.collective.bytes_sent / rate + accelerator.latency * math.ceil(
      math.log2(move.collective.devices)
    )

  return Seconds(
    cost.flops / accelerator.flops,
    cost.bytes_read / accelerator.bandwidth,
    sum(count * of(move) for move, count in cost.collectives.items()),
  )


def call(
  config: ModelConfig,
  roster: Roster,
  mesh: AbstractMesh,
  batch_size: int,
  context: int,
  positions: int = 1,
  *,
  kind: str = "step",
  overlap: float | None = None,
  platform: str | None = None,
) -> DeviceCost:
  """One call of the model: a decode step, or a chunk of prefill or of scoring.

  Assumptions, beside those of `seconds`: rows spread evenly over the experts, and
  so over devices. Each expert that is hit is read once for each batch of members that
  the memory budget holds (in truth `dense` reads all experts, and `gather_gemv` one
  for each row that chose it), and so is the cache, as far as rows see. Logits
  are written once and read three times. Rows that are exchanged are so in one turn,
  with all of their room (`parallel.via_ragged_all_to_all` sends only those that there are).
  Activations are neither written nor read.

  Args:
    config: the model's architecture.
    roster: the settings; of a prefill `Roster.history()`.
    mesh: of `sharding.make_mesh` or `sharding.abstract_mesh`.
    batch_size: texts together.
    context: positions of each text before these.
    positions: of each text.
    kind: "step", "prefill" (without distributions) or "score".
    overlap: see `flops.unique_experts`.
    platform: JAX's name of the devices'; the backend's by default.
  """
  abstract = params_lib.abstract(config)
  item = abstract.final_norm.dtype.itemsize
  per_expert = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(abstract.layers.experts))
  per_expert /= config.num_layers * config.num_experts
  t, e = mesh.shape[TENSOR], mesh.shape[EXPERT]
  vocab = vocabulary_axes(config, mesh)
  head_size = config.vocab_size * config.d_model // num_shards(mesh, vocab)
  router_size = config.num_experts * config.d_model
  split_flops = (flops_lib.projection_flops(config) + flops_lib.shared_expert_flops(config)) / t
  expert_flops = config.experts_per_token * 6 * config.d_model * config.d_expert / (e * t)
  own_heads = config.num_kv_heads * config.head_dim * item / t  # a position's keys
  cost = DeviceCost(collectives=_embedding_moves(config, mesh, batch_size * positions, vocab, item))
  if kind == "step" and num_shards(mesh, (DATA, EXPERT)) > 1:
    cost.collectives[_move(mesh, "all-gather", 4 * batch_size, (DATA, EXPERT))] += STATE_COLLECTIVES
  for batch in batches(config, roster, mesh, batch_size, positions, platform):
    layers, times = len(batch.layers), batch.times
    rows_of_member = batch.group_sequences * positions
    hit = flops_lib.expected_unique_experts(config, batch.group_members, rows_of_member, overlap)
    seen = (
      sum(
        flops_lib.seen_by(config, layer, context + p)
        for layer in batch.layers
        for p in range(positions)
      )
      / positions
    )
    slots = sum(flops_lib.seen_by(config, layer, context + positions - 1) for layer in batch.layers)
    cost.flops += times * (
      batch.rows
      * (layers * (split_flops + 2 * router_size) + seen * flops_lib.attention_flops(config) / t)
      + layers * batch.group_tokens * expert_flops
    )
    cost.weights += (
      times * layers * ((split_flops / 2 + router_size) * item + hit / e * per_expert / t)
    )
    # Each member has a cache of its own, or all read one.
    caches = 1 if roster.cache == "clean" else batch.members
    cost.cache += times * caches * batch.texts * 2 * own_heads * slots
    collectives = _layer_moves(config, mesh, batch, item)
    found = Counter({move: layers * count for move, count in collectives.items()})
    if kind == "step" and batch.member_axes:
      found[_move(mesh, "all-reduce", layers * batch.texts * own_heads, batch.member_axes)] += 2
    if kind != "prefill" and not batch.is_shared:
      cost.flops += times * 2 * batch.head_tokens * head_size
      cost.weights += times * head_size * item
      cost.logits += times * 4 * 4 * batch.head_tokens * config.vocab_size / num_shards(mesh, vocab)
      found += _head_moves(config, mesh, batch, vocab, item)
    cost.collectives += Counter({move: times * count for move, count in found.items()})
  return cost


def _move(mesh, kind, num_bytes, axes):
  """A collective along mesh axes, the largest array on a device being of so many bytes."""
  split = [a for a in AXES if a in axes and mesh.shape[a] > 1]
  # From the first device of a group to its last, as `tensor` counts fastest.
  strides = {a: num_shards(mesh, AXES[i + 1 :]) for i, a in enumerate(AXES)}
  reach = 1 + sum((mesh.shape[a] - 1) * strides[a] for a in split)
  return MeshCollective(Collective(kind, int(num_bytes), num_shards(mesh, split)), reach)


def _moves(mesh, *wanted):
  """Those of `(kind, bytes, axes)` that are between more than one device."""
  return Counter(_move(mesh, *w) for w in wanted if num_shards(mesh, w[-1]) > 1)


def _embedding_moves(config, mesh, num_rows, vocab, item):
  rows = num_rows // mesh.shape[DATA] if num_rows % mesh.shape[DATA] == 0 else num_rows
  return _moves(mesh, ("all-reduce", rows * config.d_model * item, vocab))


def _layer_moves(config: ModelConfig, mesh, batch: MemberBatch, item):
  """Of one layer: see `transformer._block` and `experts.expert_parallel`."""
  sums = batch.rows * config.d_model * 4
  wanted = [("all-reduce", sums, (TENSOR,))]  # of attention
  if config.d_shared_expert:
    wanted.append(("all-reduce", sums, (TENSOR,)))
  if config.qk_norm and not config.qk_norm_per_head:
    wanted += 2 * [("all-reduce", batch.rows * 4, (TENSOR,))]
  if not batch.tokens_sharded:
    return _moves(mesh, *wanted, ("all-reduce", sums, (EXPERT, TENSOR)))
  e, a = mesh.shape[EXPERT], config.experts_per_token
  wanted.append(("all-reduce", sums, (TENSOR,)))
  rows = batch.tokens_at_experts(a, e)
  if batch.room(a, e):
    kinds = "all-to-all", "all-to-all"
    wanted.append(("all-reduce", 4, AXES))
  else:
    kinds = "all-gather", "reduce-scatter"
  sent = (config.d_model * item, a * 4, a * 4)  # rows, their experts, their gates
  wanted += [(kinds[0], rows * size, (EXPERT,)) for size in sent]
  return _moves(mesh, *wanted, (kinds[1], rows * config.d_model * 4, (EXPERT,)))


def _head_moves(config, mesh, batch: MemberBatch, vocab, item):
  """Hidden states where the vocabulary's parts are, and the softmax over these."""
  return _moves(
    mesh,
    ("all-gather", batch.head_tokens * config.d_model * item, batch.head_gather_axes),
    *2 * [("all-reduce", batch.head_tokens * 4, vocab)],
  )
