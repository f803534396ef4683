"""Randomness by address.

Every random number of a roster is a pure function of the seed and of where it
is used: (request, position, layer, member) for routing noise, (request,
position) for sampling a token. So a token's roster is the same however
requests are batched, padded, chunked or placed, and whether the token is
generated, scored or verified.
"""

from collections.abc import Callable
import math

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


def position_keys(key: jax.Array, request_ids_B: jax.Array, positions_BxT: jax.Array) -> jax.Array:
  """Keys `[B, T]`, one for each (request, position)."""

  def one_request(request_id, positions_T):
    request_key = jax.random.fold_in(key, request_id)
    return jax.vmap(lambda p: jax.random.fold_in(request_key, p))(positions_T)

  return jax.vmap(one_request)(request_ids_B, positions_BxT)


def _added(draw):
  """A family that adds τ times what `draw(key, [E]) -> [E]` gives to the logits."""

  def perturb(key, logits, temperature, count):
    del count
    return logits + temperature * draw(key, logits.shape)

  return perturb


def _gumbel(key, shape):
  return jax.random.gumbel(key, shape, jnp.float32)


def _gaussian(key, shape):
  return _STANDARD_DEVIATION * jax.random.normal(key, shape, jnp.float32)


def _uniform(key, shape):
  bound = math.sqrt(3) * _STANDARD_DEVIATION
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _swap(key, logits, temperature, count):
  """Each chosen expert trades logits, with probability τ, with one not chosen.

  Which one is drawn evenly, no one twice; what it is weighted with, should gates
  follow the perturbed logits, is what the replaced expert would have had. Where
  more are to be replaced than others are left, the last ones stay.
  """
  by_rank = jax.lax.top_k(logits, logits.size)[1]
  chosen, others = by_rank[:count], by_rank[count:]
  if not others.size:
    return logits
  coins, order = jax.random.split(key)
  replaced = jax.random.bernoulli(coins, temperature, (count,))
  place = jnp.cumsum(replaced) - 1  # among those replaced
  replaced &= place < others.size
  partner = jax.random.permutation(order, others)[jnp.clip(place, 0, others.size - 1)]
  none = logits.size  # an index out of range, where nothing is put
  return (
    logits.at[jnp.where(replaced, chosen, none)]
    .set(logits[partner], mode="drop")
    .at[jnp.where(replaced, partner, none)]
    .set(logits[chosen], mode="drop")
  )


def _uniform_choice(key, logits, temperature, count):
  """With probability τ the logits are dealt out anew: any A experts are as likely as others."""
  del count
  coin, order = jax.random.split(key)
  anew = jax.random.bernoulli(coin, temperature)
  return jnp.where(anew, jax.random.permutation(order, logits), logits)


def _second_expert(key, logits, temperature, count):
  """Where τ > 0 only the expert of the second largest logit is left; no chance in it.

  The weak pass of SCMoE (arXiv 2405.14507), which is contrasted with the clean
  member: see `aggregation.CONTRAST`.
  """
  del key, count
  second = jax.lax.top_k(logits, 2)[1][1]
  alone = jnp.where(jnp.arange(logits.size) == second, logits, -jnp.inf)
  return jnp.where(temperature > 0, alone, logits)


# That of a standard Gumbel variable. Noise of other distributions is scaled to it,
# so that temperatures mean the same.
_STANDARD_DEVIATION = math.pi / math.sqrt(6)

GUMBEL = "gumbel"
# What becomes of the router logits of one row, by name:
# `(key, logits [E] float32, τ, A) -> perturbed logits [E]`, of which the A largest
# are chosen; -inf leaves an expert out even if there are fewer than A others. τ = 0
# must give the logits themselves. An entry here is available under its name
# everywhere.
FAMILIES: dict[str, Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]] = {
  GUMBEL: _added(_gumbel),
  "gaussian": _added(_gaussian),
  "uniform": _added(_uniform),
  "swap": _swap,
  "uniform_choice": _uniform_choice,
  "second_expert": _second_expert,
}
# Families whose τ is a probability, and of what.
PROBABILITIES = {
  "swap": "that an expert is replaced",
  "uniform_choice": "that experts are chosen evenly at random",
}


class RoutingNoise(struct.PyTreeNode):
  """Noise on the routers of one roster member.

  Attributes:
    keys: `[B, T]` keys of the (request, position) of each row.
    temperatures: `[L]` float32, τ of each layer, in units of router logits.
    member: scalar int32 index of the member. Member 0 is the clean one, which has
      no noise in any layer.
    family: a name in `FAMILIES`.
  """

  keys: jax.Array
  temperatures: jax.Array
  member: jax.Array
  family: str = struct.field(pytree_node=False, default=GUMBEL)

  def perturb(self, layer: jax.Array, logits_BxTxE: jax.Array, count: int) -> jax.Array:
    """Router logits with noise, of which the `count` largest are chosen.

    With Gumbel noise, logits + τ_l · G of arXiv 2509.17238 eq. (1).

    float32 whatever the model's dtype: bfloat16 has too few bits for the tail
    of the distribution, and makes ties.
    """
    temperature = jnp.where(self.member == 0, 0.0, self.temperatures[layer])

    def of_row(key, logits_E):
      key = jax.random.fold_in(jax.random.fold_in(key, layer), self.member)
      return FAMILIES[self.family](key, logits_E, temperature, count)

    return jax.vmap(jax.vmap(of_row))(self.keys, logits_BxTxE)
