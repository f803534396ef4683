"""Randomness by address.

Every random number of a roster is a pure function of the seed and of where it
is used: (request, position, layer, member) for routing noise, (request,
position) for sampling a token. So a token's roster is the same however
requests are batched, padded, chunked or placed, and whether the token is
generated, scored or verified.
"""

from flax import struct
import jax
import jax.numpy as jnp

# Domain separation: the first number folded into a seed's key.
ROUTING = 0
SAMPLING = 1

MAX_SEED = 2**32 - 1


def stream_key(seed: jax.Array | int, stream: int) -> jax.Array:
  """The key of one stream (`ROUTING` or `SAMPLING`) of a seed.

  threefry2x32 is named because other implementations are not reproducible
  under vmap, or make chains of folds collide.
  """
  return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stream)


def position_keys(key: jax.Array, request_ids_B: jax.Array,
                  positions_BxT: jax.Array) -> jax.Array:
  """Keys `[B, T]`, one for each (request, position)."""
  def one_request(request_id, positions_T):
    request_key = jax.random.fold_in(key, request_id)
    return jax.vmap(lambda p: jax.random.fold_in(request_key, p))(positions_T)
  return jax.vmap(one_request)(request_ids_B, positions_BxT)


@struct.dataclass
class RoutingNoise:
  """Gumbel noise on the routers of one roster member.

  Attributes:
    keys: `[B, T]` keys of the (request, position) of each row.
    temperatures: `[L]` float32, τ of each layer, in units of router logits.
    member: scalar int32 index of the member. Member 0 is the clean one, whose
      noise is zero in every layer.
  """

  keys: jax.Array
  temperatures: jax.Array
  member: jax.Array

  def draw(self, layer: jax.Array, num_experts: int) -> jax.Array:
    """τ_l · G of arXiv 2509.17238 eq. (1): float32 `[B, T, E]`.

    float32 whatever the model's dtype: bfloat16 has too few bits for the tail
    of the distribution, and makes ties.
    """
    def gumbel(key):
      key = jax.random.fold_in(jax.random.fold_in(key, layer), self.member)
      return jax.random.gumbel(key, (num_experts,), jnp.float32)
    scale = jnp.where(self.member == 0, 0.0, self.temperatures[layer])
    return scale * jax.vmap(jax.vmap(gumbel))(self.keys)
