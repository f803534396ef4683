"""Addressed noise.

Every random number is a pure function of the seed and the address where it is used:
(request, position, layer, member) for routing noise, (request, position) for sampling
a token. A token's roster is thus the same however requests are batched, padded,
chunked or sharded, and whether the token is generated, scored or verified.
"""

from flax import struct
import jax
import jax.numpy as jnp

from roe_jax.perturbations import FAMILIES, GUMBEL, Context, Family, perturb

# Domain separation: the first number folded into a seed's key.
ROUTING = 0
SAMPLING = 1
TRAINING = 2  # draws of a training step

MAX_SEED = 2**32 - 1


def stream_key(seed: jax.Array | int, stream: int) -> jax.Array:
  """Returns the key of one stream (`ROUTING`, `SAMPLING` or `TRAINING`) of a seed.

  threefry2x32 is set explicitly: other implementations are not reproducible under
  vmap, or make chains of `fold_in` collide.
  """
  return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stream)


def position_keys(key: jax.Array, request_ids_B: jax.Array, positions_BxT: jax.Array) -> jax.Array:
  """Returns keys `[B, T]`, one for each (request, position)."""

  def one_request(request_id, positions_T):
    request_key = jax.random.fold_in(key, request_id)
    return jax.vmap(lambda p: jax.random.fold_in(request_key, p))(positions_T)

  return jax.vmap(one_request)(request_ids_B, positions_BxT)


class RoutingNoise(struct.PyTreeNode):
  """The routing noise of one roster member.

  Attributes:
    keys: `[B, T]` keys of the (request, position) of each token.
    temperatures: `[L]` float32, τ of each layer, in units of router logits.
    member: int32 scalar index of the member. Member 0 is clean: it has no noise.
    family: the function that perturbs a token's logits, as in `perturbations.FAMILIES`.
    num_noisy: number of members with noise.
  """

  keys: jax.Array
  temperatures: jax.Array
  member: jax.Array
  family: Family = struct.field(pytree_node=False, default=FAMILIES[GUMBEL])
  num_noisy: int = struct.field(pytree_node=False, default=1)

  @jax.named_scope("router")
  def perturb(self, layer: jax.Array | int, logits_BxTxE: jax.Array, count: int) -> jax.Array:
    """Adds noise to router logits, of which the `count` largest are then chosen.

    With Gumbel noise: logits + τ_l · G, arXiv 2509.17238 eq. (1). Always float32:
    bfloat16 has too few bits for the tail of the distribution, and makes ties.
    """
    temperature = jnp.where(self.member == 0, 0.0, self.temperatures[layer])

    def perturb_token(key, logits_E):
      shared = jax.random.fold_in(key, layer)
      own = jax.random.fold_in(shared, self.member)
      context = Context(shared, layer, self.member, self.num_noisy)
      return perturb(self.family, own, logits_E, temperature, count, context)

    return jax.vmap(jax.vmap(perturb_token))(self.keys, logits_BxTxE)
