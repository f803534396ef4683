"""Sorts (token, choice) pairs by expert and packs them into blocks of one expert."""

import jax
import jax.numpy as jnp


def plan(
  indices: jax.Array, num_experts: int, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Assigns each (token, choice) pair a place in blocks of one expert each.

  Args:
    indices: `[N, A]` int32 active experts.
    num_experts: E.
    block: tokens per block.

  Returns:
    tokens `[K · block]`: the token at each place, N for padding;
    places `[N, A]`: the place of each pair;
    experts `[K]` int32: the expert of each block, -1 for an unused block.
  """
  n, a = indices.shape
  flat = indices.reshape(n * a)
  order = jnp.argsort(flat, stable=True)
  counts = jnp.bincount(flat, length=num_experts)
  blocks = -(-counts // block)
  end = jnp.cumsum(blocks)
  expert = flat[order]
  rank = jnp.arange(n * a) - (jnp.cumsum(counts) - counts)[expert]
  place = (end - blocks)[expert] * block + rank
  k = jnp.arange(n * a // block + min(num_experts, n * a))
  tokens = jnp.full(k.size * block, n).at[place].set(order // a, unique_indices=True)
  places = jnp.zeros(n * a, jnp.int32).at[order].set(place, unique_indices=True)
  experts = jnp.where(k < end[-1], jnp.searchsorted(end, k, side="right"), -1)
  return tokens, places.reshape(n, a), experts.astype(jnp.int32)


def block_size(num_pairs: int, num_experts: int, least: int, most: int) -> int:
  """Returns about twice the mean tokens per expert: a power of two in [least, most]."""
  return min(most, max(least, 1 << (max(1, 2 * num_pairs // num_experts) - 1).bit_length()))


def combine(out: jax.Array, gates: jax.Array) -> jax.Array:
  """Sums `[N, A, D]` float32 outputs over choices, weighted by `[N, A]` gates: `[N, D]` float32.

  Outputs with gate zero may have any value, including NaN.
  """
  # Not an einsum: its default precision on accelerators is lower than float32.
  gates = gates[..., None]
  return jnp.where(gates == 0, 0, out * gates).sum(1)
