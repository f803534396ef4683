"""Sorting (row, choice) pairs by expert, and packing them into blocks of one expert."""

import jax
import jax.numpy as jnp

from roe_jax.numerics import rounded


def plan(
  indices: jax.Array, num_experts: int, block: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Where each pair goes when pairs are packed into blocks of one expert.

  Args:
    indices: `[N, A]` int32 chosen experts.
    num_experts: E.
    block: slots in a block.

  Returns:
    rows `[K · block]`: the row in each slot, N in an empty one;
    slots `[N, A]`: the slot of each pair;
    experts `[K]` int32: the expert of each block, -1 in one not in use.
  """
  n, a = indices.shape
  flat = indices.reshape(n * a)
  order = jnp.argsort(flat, stable=True)
  counts = jnp.bincount(flat, length=num_experts)
  blocks = -(-counts // block)
  end = jnp.cumsum(blocks)
  expert = flat[order]
  rank = jnp.arange(n * a) - (jnp.cumsum(counts) - counts)[expert]
  slot = (end - blocks)[expert] * block + rank
  k = jnp.arange(n * a // block + min(num_experts, n * a))
  rows = jnp.full(k.size * block, n).at[slot].set(order // a, unique_indices=True)
  slots = jnp.zeros(n * a, jnp.int32).at[order].set(slot, unique_indices=True)
  experts = jnp.where(k < end[-1], jnp.searchsorted(end, k, side="right"), -1)
  return rows, slots.reshape(n, a), experts.astype(jnp.int32)


def block_size(num_pairs: int, num_experts: int, least: int, most: int) -> int:
  """About twice the rows that an expert has on average, a power of two within bounds."""
  return min(most, max(least, 1 << (max(1, 2 * num_pairs // num_experts) - 1).bit_length()))


def combine(out: jax.Array, gates: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """`[N, A, D]` float32 outputs summed over choices with `[N, A]` gates: `[N, D]`.

  What a gate of zero weights may be anything.
  """
  # A product and a sum rather than a contraction, whose default is shorter than
  # float32 on accelerators.
  gates = gates[..., None]
  return rounded(jnp.where(gates == 0, 0, out * gates).sum(1), dtype)
