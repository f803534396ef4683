"""A transformer over patches with MoE layers (V-MoE, arXiv 2106.05974), and E3 (arXiv 2110.03360).

Blocks before the first MoE layer are the trunk. E3 trains members that each choose among a part of
the experts, with a loss of its own; its roster has the noise `partition` and noisy gates.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.vision import routed_network
from experiments.vision.routed_network import MemberRoute, Route, RoutedNetwork
from roe_jax import experts, perturbations, routing, training
from roe_jax.config import ModelConfig
from roe_jax.params import ExpertParams
from roe_jax.roster import Roster

BALANCE = 0.01  # weight of the load-balancing loss


class Attention(nn.Module):
  """A residual block of attention over patches `[B, H, W, D]`."""

  heads: int

  @nn.compact
  def __call__(self, x):
    b, h, w, d = x.shape
    tokens = nn.LayerNorm()(x).reshape(b, h * w, d)
    mixed = nn.MultiHeadDotProductAttention(num_heads=self.heads)(tokens)
    return x + mixed.reshape(x.shape)


class DenseBlock(nn.Module):
  """Attention and an MLP."""

  heads: int
  hidden: int

  @nn.compact
  def __call__(self, x):
    x = Attention(self.heads)(x)
    return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(self.hidden)(nn.LayerNorm()(x))))


class RoutedBlock(nn.Module):
  """Attention, and experts that `route` chooses for each patch.

  Attributes:
    heads: H.
    hidden: F, of each expert.
    num_experts: E.
    layer: index among the routed blocks.
  """

  heads: int
  hidden: int
  num_experts: int
  layer: int

  @nn.compact
  def __call__(self, x, route: Route):
    x = Attention(self.heads)(x)
    b, h, w, d = x.shape
    tokens = nn.LayerNorm()(x)
    logits = nn.Dense(self.num_experts, use_bias=False, name="router")(tokens)
    chosen, gates = route(self.layer, logits)
    self.sow("intermediates", "chosen", chosen)
    self.sow("intermediates", "router_logits", logits)
    init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-3)
    gate_up = self.param("gate_up", init, (1, self.num_experts, self.hidden, 2, d))
    init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-2, out_axis=-1)
    down = self.param("down", init, (1, self.num_experts, self.hidden, d))
    flat = (t.reshape(b * h * w, -1) for t in (tokens, chosen, gates))
    # All experts for all tokens: there are few, and it is differentiable.
    mixed = experts.apply(ExpertParams(gate_up, down), 0, *flat, strategy="dense")
    return x + mixed.reshape(x.shape)


class PatchTransformer(RoutedNetwork):
  """The network: images `[B, side, side]` to logits of classes `[B, V]`.

  Attributes:
    num_classes: V.
    side: of the images.
    patch: side of a patch.
    width: D.
    heads: H.
    hidden: F, of an expert and of dense MLPs.
    dense_blocks, routed_blocks: numbers of blocks without and, after them, with experts.
    num_experts: E.
    experts_per_token: A; of each member for E3.
  """

  num_classes: int = 10
  side: int = 12
  patch: int = 3
  width: int = 32
  heads: int = 4
  hidden: int = 48
  dense_blocks: int = 1
  routed_blocks: int = 2
  num_experts: int = 8
  experts_per_token: int = 2

  @property
  def routing(self) -> ModelConfig:
    """As in V-MoE: gates are a softmax over all experts, or over the part of a member of E3."""
    return routed_network.routing_config(
      self.routed_blocks, self.num_experts, self.experts_per_token
    )

  def setup(self):
    patch, grid = (self.patch, self.patch), self.side // self.patch
    self.embed = nn.Conv(self.width, patch, patch, padding="VALID")
    self.position = self.param(
      "position", nn.initializers.normal(0.02), (1, grid, grid, self.width)
    )
    self.dense = [DenseBlock(self.heads, self.hidden) for _ in range(self.dense_blocks)]
    self.mixtures = [
      RoutedBlock(self.heads, self.hidden, self.num_experts, layer)
      for layer in range(self.routed_blocks)
    ]
    self.norm, self.classify = nn.LayerNorm(), nn.Dense(self.num_classes)

  def trunk(self, images):
    x = self.embed(images[..., None]) + self.position
    for block in self.dense:
      x = block(x)
    return x

  def routed(self, x, route: Route):
    for block in self.mixtures:
      x = block(x, route)
    return x

  def head(self, x):
    return self.classify(self.norm(x).mean((1, 2)))


def partition_roster(
  network: PatchTransformer,
  parts: int,
  num_members: int | None = None,
  tau: float = 0.0,
  seed: int = 0,
) -> Roster:
  """Returns E3's roster: members that take turns at the parts of the experts.

  Args:
    network: the network.
    parts: number of parts of the experts.
    num_members: n, by default one for each part.
    tau: of Gumbel noise within the parts; 0 draws none.
    seed: of that noise.
  """
  return Roster.create(
    network.routing,
    num_members or parts,
    tau or 1.0,  # any but zero switches the partition on
    noise=perturbations.partition(parts, gumbel=tau > 0),
    gate_weights=routing.NOISY,
    include_clean=False,
    seed=seed,
  )


@dataclasses.dataclass(frozen=True)
class Loss:
  """Mean cross-entropy of each member alone, and a load-balancing loss of the experts.

  Attributes:
    tau: of Gumbel noise on the routers; 0: none.
    parts: number of members that each have a part of the experts (E3); 1: one that has all.
  """

  tau: float = 0.0
  parts: int = 1

  def __call__(self, params: Any, batch: Any, network: PatchTransformer) -> jax.Array:
    """Returns the loss of images `[B, side, side]`, labels `[B]` and noise addresses `[B]`."""
    images, labels, ids = batch
    losses = [
      self._of_member(params, network, images, labels, self._route(network, ids, member), member)
      for member in range(1, self.parts + 1)
    ]
    return jnp.asarray(sum(losses) / self.parts)

  def _route(self, network, ids, member):
    if self.parts > 1:
      roster = partition_roster(network, self.parts, tau=self.tau)
    elif self.tau:
      roster = Roster.create(network.routing, 1, self.tau, include_clean=False)
    else:
      return routed_network.CleanRoute(network.routing)
    origins = jnp.zeros((len(ids), 2), jnp.int32)
    return MemberRoute(roster, ids, origins, jnp.int32(member), network.routing)

  def _of_member(self, params, network, images, labels, route, member):
    logits, kept = network.apply(params, images, route, mutable="intermediates")
    of_layers = [kept["intermediates"][f"mixtures_{i}"] for i in range(network.routed_blocks)]
    flat = lambda name: jnp.stack(
      [of[name][0].reshape(len(images), -1, of[name][0].shape[-1]) for of in of_layers]
    )
    of_router, chosen = flat("router_logits"), flat("chosen")
    own = perturbations.parts_of(network.num_experts, self.parts) == member - 1
    of_router = jnp.where(jnp.broadcast_to(own, of_router.shape), of_router, -jnp.inf)
    mask = jnp.ones(chosen.shape[1:3], bool)
    loads = training.expert_loads(chosen, mask, network.num_experts)
    balance = training.balance_loss(of_router, loads, mask) / self.parts
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return entropy + BALANCE * balance
