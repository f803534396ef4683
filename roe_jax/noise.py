"""Addressed noise.

Every random number is a pure function of the seed and the address where it is used:
(request, position, layer, member) for routing noise (on states of recurrent routers, with one more
number), (request, position) for sampling a token. A token's roster is thus the same however
requests are batched, padded, chunked or sharded, and whether the token is generated, scored or
verified.
"""

from flax import struct
import jax
import jax.numpy as jnp

from roe_jax.numerics import rounded
from roe_jax.perturbations import FAMILIES, GUMBEL, Context, Family, perturb, state_perturbation

# Domain separation: the first number folded into a seed's key.
ROUTING = 0
SAMPLING = 1
TRAINING = 2  # draws of a training step

# Folded into the key of a member's logits in a layer, for the noise on its state there.
_STATE = 1

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
    temperature = self._temperature(layer)

    def perturb_token(key, logits_E):
      shared, own = self._keys(key, layer)
      context = Context(shared, layer, self.member, self.num_noisy)
      return perturb(self.family, own, logits_E, temperature, count, context)

    return jax.vmap(jax.vmap(perturb_token))(self.keys, logits_BxTxE)

  @jax.named_scope("router")
  def perturb_state(self, layer: jax.Array | int, state_BxTxQ: jax.Array) -> jax.Array:
    """Adds noise to the states of a recurrent router, if the family has any; in their dtype."""
    of_family = state_perturbation(self.family)
    if of_family is None:
      return state_BxTxQ
    temperature = self._temperature(layer)

    def perturb_token(key, state_Q):
      _, own = self._keys(key, layer)
      return of_family(jax.random.fold_in(own, _STATE), state_Q, temperature)

    states = state_BxTxQ.astype(jnp.float32)
    return rounded(jax.vmap(jax.vmap(perturb_token))(self.keys, states), state_BxTxQ.dtype)

  def _temperature(self, layer):
    return jnp.where(self.member == 0, 0.0, self.temperatures[layer])

  def _keys(self, key, layer):
    """Returns the keys of a token in a layer: that of all members, and the member's own."""
    shared = jax.random.fold_in(key, layer)
    return shared, jax.random.fold_in(shared, self.member)
