"""Rosters of any routed network: images in, values or class logits out.

A network is a `RoutedNetwork`, a `flax.linen.Module` with a routing config and three methods:

* `trunk(images) -> features`: what precedes the first router; computed once for all members;
* `routed(features, route) -> features`: the routed parts; `route(layer, logits)` chooses experts;
* `head(features) -> outputs`: what follows the last router.

A member is `head(routed(trunk(images), route))` with noise in `route`. Its address is (seed, image,
location, layer, member): a location is the row and column of a pixel or patch in the whole image,
so that a member draws the same noise for it in any batch, and in any tile that it is a part of.

    config = routing_config(num_layers=2, num_experts=8, experts_per_token=2)
    roster = Roster.create(config, 8, 0.5)
    log_probs = predict(network, params, images, roster)

Settings, noise, routing and aggregation are those of language models: `roe_jax.roster.Roster`, of
which caches, drafts and adaptive members do not apply. Images are averaged with `MEAN_VALUE`.
"""

from collections.abc import Iterator
import functools
import hashlib
from typing import Any, Protocol

from flax import struct
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import members, routing
from roe_jax.aggregation import MEAN_LOGIT, Aggregation
from roe_jax.config import ModelConfig
from roe_jax.roster import Roster

# Locations are row * _ROW + column, whatever the image's width.
_ROW = 2**16
Features = Any


def _add_values(state, values):
  return MEAN_LOGIT.add(state, values)


# The mean of the members' values, such as images, in place of a distribution.
MEAN_VALUE = Aggregation(_add_values, lambda state, n: state / n)


def routing_config(
  num_layers: int, num_experts: int, experts_per_token: int, normalize_gates: bool = False
) -> ModelConfig:
  """Returns what `Roster` and `routing` need to know of a network; other fields have no meaning.

  Args:
    num_layers: L, the number of routers.
    num_experts: E of each.
    experts_per_token: A, experts that a location chooses.
    normalize_gates: whether the gates of the chosen experts sum to one.
  """
  sizes = dict.fromkeys(
    ("vocab_size", "d_model", "num_heads", "num_kv_heads", "d_expert", "context_length"), 1
  )
  return ModelConfig(
    family="olmoe",
    num_layers=num_layers,
    num_experts=num_experts,
    experts_per_token=experts_per_token,
    normalize_gates=normalize_gates,
    gates_in_model_dtype=False,
    qk_norm=False,
    head_dim=2,
    **sizes,
  )


class Route(Protocol):
  """Chooses experts: `route(layer, logits [B, H, W, E]) -> experts, gates [B, H, W, A]`."""

  def __call__(
    self, layer: jax.Array | int, logits_BxHxWxE: jax.Array
  ) -> tuple[jax.Array, jax.Array]: ...


class RoutedNetwork(nn.Module):
  """A network that a roster can be made of; see the module."""

  @property
  def routing(self) -> ModelConfig:
    raise NotImplementedError

  def trunk(self, images: jax.Array) -> Features:
    raise NotImplementedError

  def routed(self, features: Features, route: Route) -> Features:
    raise NotImplementedError

  def head(self, features: Features) -> jax.Array:
    raise NotImplementedError

  def __call__(self, images: jax.Array, route: Route | None = None) -> jax.Array:
    """Returns the outputs, by default of the network itself."""
    route = route or CleanRoute(self.routing)
    return self.head(self.routed(self.trunk(images), route))


class MemberRoute(struct.PyTreeNode):
  """The choices of one member.

  Attributes:
    roster: the roster.
    ids: `[B]` uint32 addresses of the images, see `image_id`.
    origins: `[B, 2]` int32, row and column in the whole image of the first location.
    member: int32 scalar; member 0 has no noise.
    config: the network's routing.
  """

  roster: Roster
  ids: jax.Array
  origins: jax.Array
  member: jax.Array
  config: ModelConfig = struct.field(pytree_node=False)

  def perturb(self, layer: jax.Array | int, logits_BxHxWxE: jax.Array) -> jax.Array:
    """Returns the logits with this member's noise, float32 `[B, H, W, E]`."""
    b, h, w, e = logits_BxHxWxE.shape
    positions = locations(h, w, self.origins).reshape(b, h * w)
    noise = members.routing_noise(self.roster, self.ids, positions, self.member)
    logits = logits_BxHxWxE.astype(jnp.float32).reshape(b, h * w, e)
    return noise.perturb(layer, logits, self.config.experts_per_token).reshape(b, h, w, e)

  def __call__(self, layer, logits_BxHxWxE):
    perturbed = self.perturb(layer, logits_BxHxWxE)
    logits = logits_BxHxWxE.astype(jnp.float32)
    return routing.route(self.config, logits, perturbed, self.roster.gate_weights)


class CleanRoute(struct.PyTreeNode):
  """The choices of the network itself."""

  config: ModelConfig = struct.field(pytree_node=False)

  def __call__(self, layer, logits_BxHxWxE):
    del layer
    return routing.route(self.config, logits_BxHxWxE.astype(jnp.float32))


def dense_gates(experts: jax.Array, gates: jax.Array, num_experts: int) -> jax.Array:
  """Returns the gates `[..., A]` of chosen experts as `[..., E]`, zero for the others."""
  return jnp.einsum("...ae,...a->...e", jax.nn.one_hot(experts, num_experts), gates)


def locations(height: int, width: int, origins_Bx2: jax.Array) -> jax.Array:
  """Returns the addresses `[B, H, W]` uint32 of pixels or patches within their images."""
  rows = origins_Bx2[:, :1].astype(jnp.uint32) + jnp.arange(height, dtype=jnp.uint32)[None]
  columns = origins_Bx2[:, 1:].astype(jnp.uint32) + jnp.arange(width, dtype=jnp.uint32)[None]
  return rows[:, :, None] * _ROW + columns[:, None, :]


def image_id(image: np.ndarray) -> int:
  """Returns the noise address of an image: 32 bits of a hash of its values and shape."""
  values = np.ascontiguousarray(image, np.float32)
  digest = hashlib.blake2b(str(values.shape).encode() + values.tobytes(), digest_size=4).digest()
  return int.from_bytes(digest, "little")


def image_ids(images: np.ndarray) -> np.ndarray:
  """Returns the addresses of a batch of images, `[B]` uint32."""
  return np.array([image_id(image) for image in images], np.uint32)


# Compiled in parts, which rosters, the network itself and other routes share.
@functools.partial(jax.jit, static_argnames="network")
def _trunk(network, params, images):
  return network.apply(params, images, method="trunk")


@functools.partial(jax.jit, static_argnames="network")
def _rest(network, params, features, route):
  features = network.apply(params, features, route, method="routed")
  return network.apply(params, features, method="head")


def outputs_of(
  network: RoutedNetwork, params: Any, images: jax.Array | np.ndarray, route: Route | None = None
) -> jax.Array:
  """Returns the outputs `[B, ...]` with the choices of `route`, a pytree; None: the network's."""
  return _rest(
    network, params, _trunk(network, params, images), route or CleanRoute(network.routing)
  )


@functools.partial(jax.jit, static_argnames="network")
def _members(network, params, features, roster, ids, origins, members_R):
  def of_member(member):
    route = MemberRoute(roster, ids, origins, member, network.routing)
    return _rest(network, params, features, route)

  return jax.vmap(of_member)(members_R)


def member_outputs(
  network: RoutedNetwork,
  params: Any,
  images: Any,
  roster: Roster,
  ids: Any = None,
  origins: Any = None,
  members_at_once: int = 8,
) -> Iterator[jax.Array]:
  """Yields the outputs `[R, B, ...]` of the members that are averaged, R at once.

  Args:
    network, params: the network.
    images: `[B, ...]` whole images or tiles of them.
    roster: created with `network.routing`.
    ids: `[B]` addresses of the images; those of their values by default. Tiles have that of the
      whole image.
    origins: `[B, 2]` row and column of each tile's first location; zero by default.
    members_at_once: R, members whose outputs exist at once; the last are fewer.

  Raises:
    ValueError: the roster was made for another routing.
  """
  roster.check(network.routing)
  ids = image_ids(np.asarray(images)) if ids is None else ids
  origins = np.zeros((len(images), 2), np.int32) if origins is None else origins
  where = jnp.asarray(ids, jnp.uint32), jnp.asarray(origins, jnp.int32)
  features = _trunk(network, params, jnp.asarray(images))
  # Member 0 also writes a shared cache of language models if it is not averaged.
  indices = [m for m in roster.members if m or roster.include_clean]
  for first in range(0, len(indices), members_at_once):
    some = jnp.array(indices[first : first + members_at_once])
    yield _members(network, params, features, roster, *where, some)


def predict(
  network: RoutedNetwork, params: Any, images: Any, roster: Roster, *where: Any, **settings: Any
) -> jax.Array:
  """Returns the aggregated outputs of a roster for a batch of images.

  Args are those of `member_outputs`. The baseline returns the network's own outputs.

  Returns:
    `[B, ...]`: log-probabilities, or with `MEAN_VALUE` values.
  """
  state = None
  for outputs in member_outputs(network, params, images, roster, *where, **settings):
    state = roster.combine.add(state, outputs)
  return roster.combine.finish(state, roster.num_members)
