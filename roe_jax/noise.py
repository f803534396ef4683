"""Addressed noise.

Every random number is a pure function of the seed and the address where it is used:
(request, position, layer, member) for routing noise, (request, position) for sampling
a token. A token's roster is thus the same however requests are batched, padded,
chunked or sharded, and whether the token is generated, scored or verified.
"""

from collections.abc import Callable
import functools
import math

from flax import struct
import jax
import jax.numpy as jnp

# Domain separation: the first number folded into a seed's key.
ROUTING = 0
SAMPLING = 1

MAX_SEED = 2**32 - 1


def stream_key(seed: jax.Array | int, stream: int) -> jax.Array:
  """Returns the key of one stream (`ROUTING` or `SAMPLING`) of a seed.

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


def _additive(draw):
  """Returns the family that adds τ * `draw(key, [E]) -> [E]` to the logits."""

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
  """Swaps the logits of each chosen expert, with probability τ, with one not chosen.

  Partners are drawn uniformly without replacement. If gates follow the perturbed
  logits, a partner gets the gate of the expert that it replaces. If there are fewer
  partners than experts to replace, the last of these stay.
  """
  by_rank = jax.lax.top_k(logits, logits.size)[1]
  chosen, others = by_rank[:count], by_rank[count:]
  if not others.size:
    return logits
  coins, order = jax.random.split(key)
  replaced = jax.random.bernoulli(coins, temperature, (count,))
  order_of = jnp.cumsum(replaced) - 1  # index among the replaced
  replaced &= order_of < others.size
  partner = jax.random.permutation(order, others)[jnp.clip(order_of, 0, others.size - 1)]
  none = logits.size  # out of bounds, where nothing is written
  swapped = (
    logits.at[jnp.where(replaced, chosen, none)]
    .set(logits[partner], mode="drop")
    .at[jnp.where(replaced, partner, none)]
    .set(logits[chosen], mode="drop")
  )
  return _without_banned(logits, swapped)


def _uniform_choice(key, logits, temperature, count):
  """Permutes the logits with probability τ, so that any A experts are equally likely."""
  del count
  coin, order = jax.random.split(key)
  permuted = jax.random.permutation(order, logits)
  permuted = jnp.where(jax.random.bernoulli(coin, temperature), permuted, logits)
  return _without_banned(logits, permuted)


def _without_banned(logits, perturbed):
  """Keeps experts at -inf there, where a noise moves logits between experts."""
  return jnp.where(jnp.isneginf(logits), -jnp.inf, perturbed)


def _second_expert(key, logits, temperature, count):
  """Keeps only the expert with the second largest logit where τ > 0; deterministic.

  The weak pass of SCMoE (arXiv 2405.14507), which `aggregation.CONTRAST` contrasts
  with the clean member.
  """
  del key, count
  second = jax.lax.top_k(logits, 2)[1][1]
  alone = jnp.where(jnp.arange(logits.size) == second, logits, -jnp.inf)
  return jnp.where(temperature > 0, alone, logits)


# Of a standard Gumbel variable. Other distributions are scaled to it, so that
# temperatures are comparable.
_STANDARD_DEVIATION = math.pi / math.sqrt(6)

GUMBEL = "gumbel"
# Noise families by name: `(key, logits [E] float32, τ, A) -> perturbed logits [E]` of one
# token, of which the A largest are chosen; -inf excludes an expert even if fewer than A
# others remain. τ = 0 must return the logits. An entry is available everywhere by name.
Family = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]
FAMILIES: dict[str, Family] = {
  GUMBEL: _additive(_gumbel),
  "gaussian": _additive(_gaussian),
  "uniform": _additive(_uniform),
  "swap": _swap,
  "uniform_choice": _uniform_choice,
  "second_expert": _second_expert,
}
# Families whose τ is a probability, and the event that it belongs to.
PROBABILITIES = {
  "swap": "that an expert is replaced",
  "uniform_choice": "that experts are chosen evenly at random",
}


def perturb(
  family: Family, key: jax.Array, logits_E: jax.Array, temperature: jax.Array, count: int
) -> jax.Array:
  """Applies a noise family to one token's float32 logits.

  Raises:
    ValueError: the family returns something else than `[E]` float32.
  """
  perturbed = family(key, logits_E, temperature, count)
  shape, dtype = jnp.shape(perturbed), getattr(perturbed, "dtype", None)
  if (shape, dtype) != (logits_E.shape, jnp.float32):
    raise ValueError(
      f"a noise must return float32 logits of the shape that it was given, "
      f"{list(logits_E.shape)}; it returned {dtype or type(perturbed).__name__} {list(shape)}"
    )
  return perturbed


@functools.lru_cache
def check_family(family: Family, num_experts: int, count: int) -> None:
  """Traces a family for a token of a model; raises as `perturb`."""
  key = jax.eval_shape(lambda: stream_key(0, ROUTING))
  logits, temperature = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((num_experts,), ()))
  try:
    jax.eval_shape(functools.partial(perturb, family, count=count), key, logits, temperature)
  except TypeError as error:
    raise ValueError(f"a noise is a function of (key, logits, τ, A): {error}") from error


class RoutingNoise(struct.PyTreeNode):
  """The routing noise of one roster member.

  Attributes:
    keys: `[B, T]` keys of the (request, position) of each token.
    temperatures: `[L]` float32, τ of each layer, in units of router logits.
    member: int32 scalar index of the member. Member 0 is clean: it has no noise.
    family: the function that perturbs a token's logits, as in `FAMILIES`.
  """

  keys: jax.Array
  temperatures: jax.Array
  member: jax.Array
  family: Family = struct.field(pytree_node=False, default=FAMILIES[GUMBEL])

  @jax.named_scope("router")
  def perturb(self, layer: jax.Array | int, logits_BxTxE: jax.Array, count: int) -> jax.Array:
    """Adds noise to router logits, of which the `count` largest are then chosen.

    With Gumbel noise: logits + τ_l · G, arXiv 2509.17238 eq. (1). Always float32:
    bfloat16 has too few bits for the tail of the distribution, and makes ties.
    """
    temperature = jnp.where(self.member == 0, 0.0, self.temperatures[layer])

    def perturb_token(key, logits_E):
      key = jax.random.fold_in(jax.random.fold_in(key, layer), self.member)
      return perturb(self.family, key, logits_E, temperature, count)

    return jax.vmap(jax.vmap(perturb_token))(self.keys, logits_BxTxE)
