"""Noise families: how the router logits of one token are perturbed.

A family is a function `(key, logits [E] float32, τ, A) -> perturbed logits [E]`, whose A largest
are chosen; an expert at -inf is left out, even if fewer than A others remain. τ = 0 must return
the logits. One with a fifth parameter, `context`, also knows which of the members it perturbs
for, so that members can share draws, or experts. One with an attribute `perturb_state`, a function
`(key, state [q] float32, τ) -> perturbed state [q]`, perturbs the state of a recurrent router, too.
"""

from collections.abc import Callable
import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from roe_jax.makers import parametric


class Context(NamedTuple):
  """For which member a family perturbs.

  Attributes:
    key: that of (seed, request, position, layer), the same for all members.
    layer: int32 scalar.
    member: int32 scalar; noisy members count from 1.
    num_noisy: number of noisy members.
  """

  key: jax.Array
  layer: jax.Array | int
  member: jax.Array
  num_noisy: int


Family = Callable[..., jax.Array]


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


@parametric
def rank_experts(ranks: tuple[int, ...] | int = 2) -> Family:
  """Keeps only the experts of some ranks, 1 for the best, where τ > 0; deterministic.

  The weak pass of SCMoE (arXiv 2405.14507, by default rank 2), which `aggregation.contrast`
  contrasts with the clean member.
  """
  ranks = ranks if isinstance(ranks, tuple) else (ranks,)
  if not ranks or not all(isinstance(rank, int) and rank >= 1 for rank in ranks):
    raise ValueError(f"ranks must be positive integers, got {ranks}")

  def perturb(key, logits, temperature, count):
    del key, count
    if max(ranks) > logits.size:
      raise ValueError(f"there is no rank {max(ranks)} among {logits.size} experts")
    chosen = jax.lax.top_k(logits, max(ranks))[1][jnp.array(ranks) - 1]
    return _only(logits, jnp.zeros(logits.size, bool).at[chosen].set(True), temperature)

  return _deterministic(perturb)


def _random_expert(key, logits, temperature, count):
  """Keeps only one expert where τ > 0; all are equally likely (SCMoE's random-1)."""
  del count
  likely = jnp.where(jnp.isneginf(logits), -jnp.inf, 0.0)
  chosen = jax.random.categorical(key, likely)
  return _only(logits, jnp.arange(logits.size) == chosen, temperature)


def parts_of(num_experts: int, parts: int) -> jax.Array:
  """Returns the part that each expert is in, `[E]` int32: contiguous, of nearly equal size."""
  return jnp.arange(num_experts) * parts // num_experts


@parametric
def partition(subsets: int | None = None, gumbel: bool = False) -> Family:
  """Gives each noisy member its own part of the experts where τ > 0 (E3, arXiv 2110.03360).

  Members take turns: the m-th noisy member has part (m - 1) modulo their number. Parts are
  contiguous and differ in size by at most one. With `gate_weights="noisy"`, gates are a softmax
  over the part, as in the paper.

  Args:
    subsets: number of parts; by default that of the noisy members.
    gumbel: whether τ also scales Gumbel noise within the part; deterministic otherwise.
  """
  if subsets is not None and not (isinstance(subsets, int) and subsets >= 1):
    raise ValueError(f"subsets must be a positive integer, got {subsets}")

  def perturb(key, logits, temperature, count, context):
    del count
    parts = subsets or context.num_noisy
    if parts > logits.size:
      raise ValueError(f"{logits.size} experts cannot be split into {parts} parts")
    part = parts_of(logits.size, parts)
    noise = temperature * _gumbel(key, logits.shape) if gumbel else 0.0
    return _only(logits + noise, part == (context.member - 1) % parts, temperature)

  return perturb if gumbel else _deterministic(perturb)


@parametric
def expert_sample(fixed: int | None = None, pool: int | None = None) -> Family:
  """Keeps the most certain experts and samples the others (Expert-Sample, arXiv 2602.02443).

  The `fixed` best experts stay, and A - `fixed` others are drawn without replacement from the next
  best, up to rank `pool`, by Gumbel-top-k at τ. How many, the paper leaves to the user.

  Args:
    fixed: m, at most A; by default half of A.
    pool: P, at least A; by default twice A.
  """

  def perturb(key, logits, temperature, count):
    m = count // 2 if fixed is None else fixed
    p = min(logits.size, 2 * count if pool is None else pool)
    if not 0 <= m <= count <= p:
      raise ValueError(f"expert_sample needs 0 <= fixed <= {count} <= pool, got {m} and {p}")
    by_rank = jax.lax.top_k(logits, p)[1]
    noisy = logits + temperature * _gumbel(key, logits.shape)
    pool_of = jnp.full(logits.size, -jnp.inf).at[by_rank[m:]].set(noisy[by_rank[m:]])
    drawn = jax.lax.top_k(pool_of, count - m)[1]
    keep = jnp.zeros(logits.size, bool).at[by_rank[:m]].set(True).at[drawn].set(True)
    perturbed = noisy.at[by_rank[:m]].set(logits[by_rank[:m]])
    return _only(jnp.where(temperature > 0, perturbed, logits), keep, temperature)

  return perturb


@parametric
def on_state(scale: float = 1.0, logits: bool = False) -> Family:
  """Adds noise to the state of a recurrent router (RMoE, arXiv 2408.06793), which later layers see.

  After layer l a member's state h, `[q]` in (-1, 1), is h + τ_l * `scale` * ε with standard normal
  ε. The layer's logits are computed from this state, and so are, also with clean gate weights, the
  gates; the next layer's state starts from it.

  Args:
    scale: standard deviation of the noise at τ = 1.
    logits: whether the logits have Gumbel noise at τ, too.
  """
  if not scale > 0:
    raise ValueError(f"scale must be positive, got {scale}")

  def perturb(key, logits_E, temperature, count):
    return FAMILIES[GUMBEL](key, logits_E, temperature, count) if logits else logits_E

  def perturb_state(key, state, temperature):
    return state + scale * temperature * jax.random.normal(key, state.shape, jnp.float32)

  perturb.perturb_state = perturb_state
  return perturb


def state_perturbation(family: Family) -> Callable[..., jax.Array] | None:
  """Returns how a family perturbs the state of a recurrent router; None if it does not."""
  return getattr(family, "perturb_state", None)


def _only(logits, keep, temperature):
  """Leaves out all other experts where τ > 0."""
  return jnp.where((temperature > 0) & ~keep, -jnp.inf, logits)


def _deterministic(family):
  """Marks a family that draws nothing; see `is_random`."""
  family.is_random = False
  return family


def is_random(family: Family) -> bool:
  """Whether what a family returns depends on the key."""
  return getattr(family, "is_random", True)


# Of a standard Gumbel variable. Other distributions are scaled to it, so that
# temperatures are comparable.
_STANDARD_DEVIATION = math.pi / math.sqrt(6)


def _coupled(uniform):
  """Returns the family that adds τ times a Gumbel variable of uniform ones.

  Each member's noise is that of `GUMBEL` in distribution; only its dependence between members
  differs.

  Args:
    uniform: `(key, shape, context)`, uniform variables in (0, 1).
  """

  def perturb(key, logits, temperature, count, context):
    del count
    u = jnp.clip(uniform(key, logits.shape, context), _LEAST, 1 - _LEAST)
    return logits - temperature * jnp.log(-jnp.log(u))

  return perturb


_LEAST = 2.0**-24  # the largest float32 below one is 1 - 2**-24


def _open_uniform(key, shape):
  """Draws from (0, 1), symmetrically: u and 1 - u are both exact."""
  bits = jax.random.bits(key, shape, jnp.uint32) >> 9
  return (bits.astype(jnp.float32) + 0.5) * 2.0**-23


def _antithetic(key, shape, context):
  """Noisy members 1 and 2, 3 and 4, ... have u and 1 - u."""
  del key
  index = context.member - 1
  u = _open_uniform(jax.random.fold_in(context.key, index // 2), shape)
  return jnp.where(index % 2 == 0, u, 1 - u)


def _stratified(key, shape, context):
  """Of each expert's N draws, one lies in each of N equal parts of (0, 1).

  Which member has which part is a random linear permutation of each expert.
  """
  n = context.num_noisy
  factors = jnp.array([a for a in range(1, n + 1) if math.gcd(a, n) == 1])
  which, shift = jax.random.split(context.key)
  factor = factors[jax.random.randint(which, shape, 0, len(factors))]
  part = (factor * (context.member - 1) + jax.random.randint(shift, shape, 0, n)) % n
  return (part + _open_uniform(key, shape)) / n


@parametric
def coupled(correlation: float = 0.5) -> Family:
  """Adds Gumbel noise that members share in part, by a Gaussian copula of this correlation."""
  if not 0 <= correlation <= 1:
    raise ValueError(f"correlation must lie in [0, 1], got {correlation}")

  def perturb(key, logits, temperature, count, context):
    del count
    shared, own = (jax.random.normal(k, logits.shape) for k in (context.key, key))
    z = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    return logits - temperature * jnp.log(-jax.scipy.special.log_ndtr(z))

  return perturb


GUMBEL = "gumbel"
# Noise families by name; an entry is available everywhere by name.
FAMILIES: dict[str, Family] = {
  GUMBEL: _additive(_gumbel),
  "gaussian": _additive(_gaussian),
  "uniform": _additive(_uniform),
  "antithetic": _coupled(_antithetic),
  "stratified": _coupled(_stratified),
  "coupled": coupled(),
  "swap": _swap,
  "uniform_choice": _uniform_choice,
  "second_expert": rank_experts(),
  "random_expert": _random_expert,
  "partition": partition(),
  "expert_sample": expert_sample(),
  "on_state": on_state(),
}
# Families with parameters, which are written as "NAME(PARAMETER=VALUE,...)".
MAKERS: dict[str, Callable[..., Family]] = {
  make.__name__: make for make in (coupled, rank_experts, partition, expert_sample, on_state)
}
# Families whose τ is a probability, and the event that it belongs to.
PROBABILITIES = {
  "swap": "that an expert is replaced",
  "uniform_choice": "that experts are chosen evenly at random",
}


def perturb(
  family: Family,
  key: jax.Array,
  logits_E: jax.Array,
  temperature: jax.Array,
  count: int,
  context: Context,
) -> jax.Array:
  """Applies a noise family to one token's float32 logits.

  Raises:
    ValueError: the family returns something else than `[E]` float32.
  """
  more = (context,) if _takes_context(family) else ()
  perturbed = family(key, logits_E, temperature, count, *more)
  shape, dtype = jnp.shape(perturbed), getattr(perturbed, "dtype", None)
  if (shape, dtype) != (logits_E.shape, jnp.float32):
    raise ValueError(
      f"a noise must return float32 logits of the shape that it was given, "
      f"{list(logits_E.shape)}; it returned {dtype or type(perturbed).__name__} {list(shape)}"
    )
  return perturbed


@functools.lru_cache
def _takes_context(family: Any) -> bool:
  try:
    return "context" in inspect.signature(family).parameters
  except (TypeError, ValueError):  # a built-in function
    return False


@functools.lru_cache
def check(family: Family, num_experts: int, count: int, num_noisy: int) -> None:
  """Traces a family for a token of a model; raises as `perturb`."""

  def run(logits, temperature):
    key = jax.random.key(0, impl="threefry2x32")
    context = Context(key, 0, jnp.int32(1), num_noisy)
    return perturb(family, jax.random.fold_in(key, 1), logits, temperature, count, context)

  logits, temperature = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((num_experts,), ()))
  try:
    jax.eval_shape(run, logits, temperature)
  except TypeError as error:
    raise ValueError(f"a noise is a function of (key, logits, τ, A): {error}") from error
