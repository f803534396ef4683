"""What one device of a mesh does in a call of the model, and a bound on its time."""

from collections import Counter
import dataclasses
import math

import jax
from jax.sharding import AbstractMesh
import numpy as np

from roe_jax import params as params_lib
from roe_jax import quantization, sharding
from roe_jax.config import ModelConfig
from roe_jax.costs import flops as flops_lib
from roe_jax.costs.accelerators import Accelerator
from roe_jax.costs.hlo import Collective
from roe_jax.costs.member_batches import MemberBatch, batches, num_shards, vocabulary_axes
from roe_jax.roster import Roster
from roe_jax.sharding import AXES, DATA, EXPERT, TENSOR

# Collectives of a few bytes by which a step replicates its state (tokens, lengths) when
# sequences are sharded, as counted in compiled programs.
STATE_COLLECTIVES = 14


@dataclasses.dataclass(frozen=True)
class MeshCollective:
  """A collective on a mesh.

  Attributes:
    collective: its kind, bytes and group size.
    span: devices from the first to the last of a group, in mesh order.
  """

  collective: Collective
  span: int


@dataclasses.dataclass
class DeviceCost:
  """What one device does in a call of the model.

  Attributes:
    flops: of matmuls.
    weights: bytes of weights read.
    cache: bytes of the cache read.
    logits: bytes of logits written and read.
    collectives: how often each collective runs.
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
    return sum(count * c.collective.bytes_sent for c, count in self.collectives.items())

  @property
  def num_collectives(self) -> int:
    return self.collectives.total()


@dataclasses.dataclass(frozen=True)
class Seconds:
  """The time of a call; arithmetic and reading overlap, communication does not."""

  arithmetic: float
  reading: float
  communication: float

  @property
  def total(self) -> float:
    return max(self.arithmetic, self.reading) + self.communication


def seconds(cost: DeviceCost, accelerator: Accelerator) -> Seconds:
  """Bounds the time of a call by the accelerator's data-sheet numbers.

  Assumes peak arithmetic, full memory bandwidth, and ring collectives that overlap with
  nothing, each after a latency of log2(group size) messages. Devices are numbered in mesh
  order with `tensor` fastest; groups that span more than a node use the slower network.
  """

  def collective_time(c: MeshCollective) -> float:
    between_nodes = accelerator.node and c.span > accelerator.node
    rate = accelerator.network if between_nodes else accelerator.link
    messages = math.ceil(math.log2(c.collective.devices))
    return c.collective.bytes_sent / rate + accelerator.latency * messages

  return Seconds(
    cost.flops / accelerator.flops,
    cost.bytes_read / accelerator.bandwidth,
    sum(count * collective_time(c) for c, count in cost.collectives.items()),
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
  """Returns the cost of one call: a decode step, or a chunk of prefill, scoring or verification.

  Assumptions, in addition to those of `seconds`: tokens are spread evenly over experts,
  and so over devices. Each unique active expert is read once per batch of members that
  fits the memory budget (in fact `dense` reads all experts, and `gather_gemv` one per
  token and choice); so is the cache, within the attention window. Logits are written once
  and read three times. An all-to-all exchange of tokens takes one round at full capacity
  (`expert_parallel.via_ragged_all_to_all` sends only actual tokens). Activations are
  neither read nor written.

  Args:
    config: the model's architecture.
    roster: its settings; `Roster.history()` for a prefill.
    mesh: from `sharding.make_mesh` or `sharding.abstract_mesh`.
    batch_size: sequences.
    context: positions of each sequence before this call.
    positions: positions of each sequence in this call.
    kind: "step", "prefill" (without distributions), "score", or "verify": the noisy members alone,
      after the clean one has computed the layers before the first noise.
    overlap: see `flops.expected_unique_experts`.
    platform: JAX's name of the devices' platform; by default the backend's.
  """
  abstract = params_lib.abstract(config)
  item = abstract.final_norm.dtype.itemsize
  t, e = mesh.shape[TENSOR], mesh.shape[EXPERT]
  vocab = vocabulary_axes(config, mesh)
  head_size = config.vocab_size * config.d_model // num_shards(mesh, vocab)
  router_size = flops_lib.router_size(config)
  projections = flops_lib.projection_flops(config, t)
  sharded_flops = projections + flops_lib.shared_expert_flops(config) / t
  dense_layer_flops = projections + flops_lib.dense_flops(config) / t
  layer_bytes, dense_layer_bytes, head_bytes = _projection_bytes(config, mesh)
  expert_flops = config.experts_per_token * 6 * config.d_model * config.d_expert / (e * t)
  # Of what a layer caches of a position; a single head is not split.
  entry_bytes = config.cached_size * item / (1 if config.num_kv_heads == 1 else t)
  arrays = 1 if config.kv_lora_rank else 2
  tokens = batch_size * positions
  if tokens % mesh.shape[DATA] == 0:
    tokens //= mesh.shape[DATA]
  embedded = ("all-reduce", tokens * config.d_model * item, vocab)
  cost = DeviceCost(collectives=_collectives(mesh, embedded))
  if kind == "step":
    state = _collectives(mesh, ("all-gather", 4 * batch_size, (DATA, EXPERT)))
    cost.collectives += Counter(dict.fromkeys(state, STATE_COLLECTIVES))
  after_clean = kind == "verify"
  for batch in batches(config, roster, mesh, batch_size, positions, platform, after_clean):
    (dense, layers), times = map(len, config.split(batch.layers)), batch.times
    unique_experts = flops_lib.expected_unique_experts(
      config, batch.group_members, batch.group_sequences * positions, overlap
    )
    windows = [
      sum(flops_lib.window_size(config, layer, context + p) for layer in batch.layers)
      for p in range(positions)
    ]
    caches = roster.cache_mode.histories(batch.members)
    per_pair = flops_lib.attention_flops(config, batch.members * positions // max(1, caches)) / t
    attention_flops = sum(windows) / positions * per_pair
    cost.flops += times * (
      batch.tokens * (layers * (sharded_flops + 2 * router_size) + attention_flops)
      + batch.tokens * dense * dense_layer_flops
      + layers * batch.group_tokens * expert_flops
    )
    per_expert = bytes_per_expert(config, batch.bits)
    cost.weights += (
      times * layers * (layer_bytes + router_size * item + unique_experts / e * per_expert / t)
    )
    cost.weights += times * dense * dense_layer_bytes
    cost.cache += times * caches * batch.sequences * entry_bytes * windows[-1]
    found = Counter()
    for number, is_dense in ((dense, True), (layers, False)):
      for c, count in _layer_collectives(config, mesh, batch, item, is_dense).items():
        found[c] += number * count
    if kind == "step" and batch.member_axes:
      written = len(batch.layers) * batch.sequences * entry_bytes / arrays
      found += _collectives(mesh, *arrays * [("all-reduce", written, batch.member_axes)])
    if kind != "prefill" and not batch.is_shared:
      cost.flops += times * 2 * batch.head_tokens * head_size
      cost.weights += times * head_bytes
      cost.logits += times * 4 * 4 * batch.head_tokens * config.vocab_size / num_shards(mesh, vocab)
      # Hidden states go to all shards of the vocabulary, and a softmax reduces over these.
      hidden = ("all-gather", batch.head_tokens * config.d_model * item, batch.head_gather_axes)
      softmax = ("all-reduce", batch.head_tokens * 4, vocab)
      found += _collectives(mesh, hidden, softmax, softmax)
    for c, count in found.items():
      cost.collectives[c] += times * count
  return cost


def _projection_bytes(config, mesh):
  """Returns a device's bytes of the matrices of one layer but routers and experts, and the head's.

  First of a layer with experts, then of a dense one.
  """
  abstract, specs = params_lib.abstract(config), sharding.parameter_specs(mesh, config)

  def size(of):
    return sharding.bytes_on_device(mesh, of(abstract), of(specs))

  def of_layers(layers):
    return layers and (layers.attention.matrices, layers.shared_expert)

  return (
    size(lambda p: of_layers(p.layers)) / config.num_expert_layers,
    size(lambda p: of_layers(p.dense_layers)) / max(1, config.first_dense_layers),
    size(lambda p: p.unembedding),
  )


def bytes_per_expert(config: ModelConfig, bits: int | None = None) -> float:
  """Returns the bytes of one expert, or of so many bits of one in a nested format.

  With a plan of bits, the mean of the experts.
  """
  if config.expert_bits is not None:
    plan = np.array(config.expert_bits)
    own = np.minimum(plan, plan.max() if bits is None else bits)
    config = config.replace(expert_bits=None)
    of_bits = zip(*np.unique(own, return_counts=True))
    return sum(n * bytes_per_expert(config, int(b)) for b, n in of_bits) / plan.size
  if bits is not None:
    nested = quantization.nested_format(config.expert_format).first(bits)
    config = config.replace(expert_format=nested.name)
  experts = jax.tree.leaves(params_lib.abstract(config).layers.experts)
  size = sum(a.size * a.dtype.itemsize for a in experts)
  return size / (config.num_expert_layers * config.num_experts)


def _collectives(mesh, *wanted):
  """Counts those `(kind, bytes of the largest array, mesh axes)` with more than one device."""
  # How many devices apart the neighbors along an axis are; `tensor` varies fastest.
  strides = {a: num_shards(mesh, AXES[i + 1 :]) for i, a in enumerate(AXES)}
  found = Counter()
  for kind, num_bytes, axes in wanted:
    if (devices := num_shards(mesh, axes)) > 1:
      span = 1 + sum((mesh.shape[a] - 1) * strides[a] for a in axes)
      found[MeshCollective(Collective(kind, int(num_bytes), devices), span)] += 1
  return found


def _layer_collectives(config: ModelConfig, mesh, batch: MemberBatch, item, is_dense):
  """Collectives of one layer; see `transformer._Block` and `experts.expert_parallel`."""
  sums = batch.tokens * config.d_model * 4
  wanted: list[tuple[str, float, tuple[str, ...]]] = [("all-reduce", sums, (TENSOR,))]  # attention
  if is_dense or config.d_shared_expert:
    wanted.append(("all-reduce", sums, (TENSOR,)))
  if config.qk_norm and not config.qk_norm_per_head:
    wanted += 2 * [("all-reduce", batch.tokens * 4, (TENSOR,))]
  if is_dense:
    return _collectives(mesh, *wanted)
  if not batch.tokens_sharded:
    return _collectives(mesh, *wanted, ("all-reduce", sums, (EXPERT, TENSOR)))
  e, a = mesh.shape[EXPERT], config.experts_per_token
  wanted.append(("all-reduce", sums, (TENSOR,)))
  if batch.exchange_capacity(a, e):
    scatter, reduce = "all-to-all", "all-to-all"
    wanted.append(("all-reduce", 4, AXES))
  else:
    scatter, reduce = "all-gather", "reduce-scatter"
  tokens = batch.tokens_at_experts(a, e)
  for size in (config.d_model * item, a * 4, a * 4):  # hidden states, expert indices, gates
    wanted.append((scatter, tokens * size, (EXPERT,)))
  return _collectives(mesh, *wanted, (reduce, tokens * config.d_model * 4, (EXPERT,)))
