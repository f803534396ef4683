"""Samplers: choose the next token from the aggregated distribution."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import noise as noise_lib

# Sorting a vocabulary takes longer than a small model's step. So this many of the most probable
# tokens are ranked first, and all tokens only where another one could be drawn.
RANKED = 1024


class Sampler(struct.PyTreeNode):
  """Greedy decoding, or sampling with temperature, top-k and top-p.

  Construct with `Sampler.greedy` or `Sampler.create`; the numbers are traced.

  Attributes:
    temperature: float32 divisor of the log-probabilities.
    top_k: int32, keeps this many of the most probable tokens; 0 keeps all.
    top_p: float32, then keeps the smallest set of most probable tokens with at least
      this probability.
    is_greedy: whether to take the most probable token.
  """

  temperature: Any
  top_k: Any
  top_p: Any
  is_greedy: bool = struct.field(pytree_node=False)

  @classmethod
  def greedy(cls) -> "Sampler":
    return cls(jnp.float32(1), jnp.int32(0), jnp.float32(1), True)

  @classmethod
  def create(cls, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> "Sampler":
    """Creates a sampler; temperature 0 is greedy, top_k 0 and top_p 1 keep all tokens.

    Raises:
      ValueError: a setting is out of range.
    """
    if not (np.isfinite(temperature) and temperature >= 0):
      raise ValueError(f"the sampling temperature must be finite and >= 0, got {temperature}")
    if top_k < 0:
      raise ValueError(f"top_k must be 0 (all tokens) or positive, got {top_k}")
    if not 0 < top_p <= 1:
      raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if temperature == 0:
      return cls.greedy()
    return cls(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), False)

  def settings(self) -> dict[str, Any]:
    """Returns all settings as JSON values, to be recorded with every result."""
    if self.is_greedy:
      return {"temperature": 0.0}
    return {
      "temperature": round(float(self.temperature), 6),
      "top_k": int(self.top_k),
      "top_p": round(float(self.top_p), 6),
    }


def choose(
  sampler: Sampler,
  seed: jax.Array,
  log_probs_BxV: jax.Array,
  request_ids_B: jax.Array,
  positions_B: jax.Array,
) -> jax.Array:
  """Chooses the next token of each sequence, int32 `[B]`.

  Args:
    sampler: how to choose.
    seed: uint32; each draw is a function of (seed, request, position).
    log_probs_BxV: float32 aggregated distributions.
    request_ids_B: uint32.
    positions_B: int32 positions at which the distributions were computed.
  """
  if sampler.is_greedy:
    return jnp.argmax(log_probs_BxV, axis=-1).astype(jnp.int32)
  key = noise_lib.stream_key(seed, noise_lib.SAMPLING)
  keys = noise_lib.position_keys(key, request_ids_B, positions_B[:, None])[:, 0]
  scaled = log_probs_BxV / sampler.temperature
  size = scaled.shape[-1]
  noise = jax.vmap(lambda key: jax.random.gumbel(key, (size,)))(keys)
  if size <= RANKED:
    return _draw(sampler, scaled, noise, size)[0]
  tokens, is_exact = _draw(sampler, scaled, noise, RANKED)
  return jax.lax.cond(
    jnp.all(is_exact), lambda: tokens, lambda: _draw(sampler, scaled, noise, size)[0]
  )


def _draw(sampler, scaled_BxV, noise_BxV, count):
  """Draws tokens and ranks only the `count` most probable ones.

  Noise is added by rank, so that a token does not depend on `count`.

  Returns:
    The tokens `[B]`, and whether ranking the others would not change them, `[B]`.
  """
  ranked, tokens = jax.lax.top_k(scaled_BxV, count)
  keep = (sampler.top_k == 0) | (jnp.arange(count)[None] < sampler.top_k)
  kept = jnp.where(keep, ranked, -jnp.inf)
  total = jax.nn.logsumexp(kept, axis=-1, keepdims=True)
  if count < scaled_BxV.shape[-1]:
    of_all = jax.nn.logsumexp(scaled_BxV, axis=-1, keepdims=True)
    total = jnp.where(sampler.top_k == 0, of_all, total)
  probs = jnp.exp(kept - total)
  keep &= jnp.cumsum(probs, axis=-1) - probs < sampler.top_p
  noisy = jnp.where(keep, ranked, -jnp.inf) + noise_BxV[:, :count]
  drawn = jnp.argmax(noisy, axis=-1, keepdims=True)
  others = ranked[:, -1] + jnp.max(noise_BxV[:, count:], axis=-1, initial=-jnp.inf)
  is_exact = ~keep[:, -1] | (jnp.max(noisy, axis=-1) >= others)
  is_exact &= (sampler.top_k == 0) | (sampler.top_k <= count)
  return jnp.take_along_axis(tokens, drawn, axis=-1)[:, 0].astype(jnp.int32), is_exact
