"""What `transformer.run_layers` takes: where tokens are, the cache, and settings."""

import dataclasses

from flax import struct
import jax

from roe_jax import routing
from roe_jax.cache import KVCache
from roe_jax.noise import RoutingNoise


class RouterInputs(struct.PyTreeNode):
  """What a roster adds to the model's routers.

  Attributes:
    bias: `[L, E]` float32 added to all router logits, or None.
    counts: `[M, L]` int32, how many of the A experts each member uses, by its index; M = 1 if all
      use as many. None: all A.
  """

  bias: jax.Array | None = None
  counts: jax.Array | None = None

  def count(self, member: jax.Array | int, layer: jax.Array | int) -> jax.Array | None:
    """Returns how many experts a member uses in a layer, int32 scalar, or None."""
    return None if self.counts is None else self.counts.at[member, layer].get(mode="clip")


class TokenBatch(struct.PyTreeNode):
  """Where T tokens of each sequence are, and the noise of their routing.

  Attributes:
    positions_BxT: int32, consecutive along T.
    noise: the routing noise, or None.
    lengths_B: int32; positions at or beyond a sequence's length are not written to the
      cache of sliding layers. By default all are.
    router: what is added to the routers.
  """

  positions_BxT: jax.Array
  noise: RoutingNoise | None = None
  lengths_B: jax.Array | None = None
  router: RouterInputs = RouterInputs()


class CacheAccess(struct.PyTreeNode):
  """How layers use a cache.

  Attributes:
    cache: keys and values so far, or None.
    write: whether to write the keys and values of the tokens first.
    offset: the first layer in the cache.
    rows: `[B]` int32, the sequence in the cache of each sequence of tokens; by default they are
      the same. Only to read.
  """

  cache: KVCache | None = None
  write: bool = struct.field(pytree_node=False, default=False)
  offset: int = struct.field(pytree_node=False, default=0)
  rows: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class LayerOptions:
  """Settings of a range of layers.

  Attributes:
    layers: `(first, end)` of the range; all layers by default.
    gate_weights: see `routing.route`.
    strategy: see `experts.apply`.
    keep: names of the `BlockOutputs` to return.
    trains_bits: see `bit_routing.apply`.
    detach_router_state: whether no gradient flows through the state of a recurrent router from
      layer to layer.
    rematerialize: whether gradients recompute what is inside a layer, and only its input is kept.
    tokens_sharded: see `experts.apply`; set inside a `shard_map`.
  """

  layers: tuple[int, int] | None = None
  gate_weights: str = routing.CLEAN
  strategy: str | None = None
  keep: tuple[str, ...] = ()
  trains_bits: bool = False
  detach_router_state: bool = False
  rematerialize: bool = False
  tokens_sharded: bool = False
