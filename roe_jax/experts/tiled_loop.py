"""A loop over the unique active experts, tile by tile: for CPUs and quantized experts.

Each tile of an expert's weights is read once, into the core's cache, and multiplied there
with all tokens that chose the expert, a block of tokens at a time. So main memory is read
once however tokens are spread over experts, and no temporary grows with the number of
experts. Quantized weights are dequantized as a tile is read. On other platforms than CPUs a
tile is a whole expert.
"""

import jax
import jax.numpy as jnp

from roe_jax.experts.packing import block_size, combine
from roe_jax.numerics import (
  einsum,
  loop_over_tiles,
  num_cores,
  rounded,
  tile_rows,
  to_compute_dtype,
)
from roe_jax.quantization import is_quantized, tile_weights

# Multiplications of an inner-loop step that make the overhead of starting it negligible.
MIN_STEP_SIZE = 2**19


def compute(num_experts, activation, weights, layer, x, indices, gates):
  """Returns the gate-weighted sum of the active experts' outputs; see `experts.apply`."""
  (n, a), d = indices.shape, x.shape[1]
  pairs, width = n * a, jax.tree.leaves(weights.gate_up)[0].shape[1]
  group = width // weights.down.scales.shape[1] if is_quantized(weights.down) else 1
  tile = tile_rows(width, 2 * d, group)
  block, fewest = _block_size(pairs, num_experts, 3 * tile * d)
  flat_indices = indices.reshape(pairs)
  by_expert = jnp.argsort(flat_indices, stable=True)
  counts = jnp.bincount(flat_indices, length=num_experts)
  ends = jnp.cumsum(counts)
  active = jnp.nonzero(counts, size=min(num_experts, pairs), fill_value=0)[0]
  sorted_x = jnp.pad(x[by_expert // a], ((0, block), (0, 0)))
  # [L·E, F, ...] to [L·E·F, ...]; a missing bias is an empty tree.
  matrices = jax.tree.map(
    lambda w: w.reshape(-1, *w.shape[2:]), (weights.gate_up, weights.down, weights.gate_up_bias)
  )

  def add_expert(i, sorted_y):
    expert = active[i]
    first, end = ends[expert] - counts[expert], ends[expert]

    def add_tile(tiles, start, sorted_y):
      del start
      gate_up, down, bias = tiles
      # The barrier keeps the copy or dequantization of a tile out of the loop over blocks.
      gate_up, down, bias = jax.lax.optimization_barrier(
        (tile_weights(gate_up, x.dtype), tile_weights(down, x.dtype), bias)
      )

      def add_block(begin, size, sorted_y):
        tokens = jax.lax.dynamic_slice_in_dim(sorted_x, begin, size)
        parts = zip(jnp.split(tokens, len(gate_up), axis=1), gate_up)
        projected = jnp.asarray(sum(einsum("bd,tcd->bct", *part) for part in parts))
        if bias is not None:
          projected += to_compute_dtype(bias).astype(jnp.float32).T[None]
        hidden = rounded(activation(projected[:, 0], projected[:, 1]), x.dtype)
        if size > 1:  # add zeros to the tokens of other experts that follow
          hidden = jnp.where((begin + jnp.arange(size) < end)[:, None], hidden, 0)
        y = jax.lax.dynamic_slice_in_dim(sorted_y, begin, size)
        y = y + jnp.concatenate([einsum("bt,td->bd", hidden, part) for part in down], axis=1)
        return jax.lax.dynamic_update_slice_in_dim(sorted_y, y, begin, 0)

      num_blocks = (counts[expert] + block - fewest) // block
      sorted_y = jax.lax.fori_loop(
        0, num_blocks, lambda b, y: add_block(first + b * block, block, y), sorted_y
      )
      if fewest == 1:
        return sorted_y
      return jax.lax.fori_loop(
        first + num_blocks * block, end, lambda token, y: add_block(token, 1, y), sorted_y
      )

    first_tile = (layer * num_experts + expert) * width
    return loop_over_tiles(matrices, first_tile, width, tile, add_tile, sorted_y)

  sorted_y = jnp.zeros((pairs + block, d), jnp.float32)
  if weights.down_bias is not None:
    bias = to_compute_dtype(weights.down_bias[layer * num_experts + flat_indices[by_expert]])
    sorted_y = sorted_y.at[:pairs].set(bias.astype(jnp.float32))
  sorted_y = jax.lax.fori_loop(0, jnp.count_nonzero(counts), add_expert, sorted_y)
  places = jnp.zeros(pairs, jnp.int32).at[by_expert].set(jnp.arange(pairs), unique_indices=True)
  return combine(sorted_y[places.reshape(n, a)], gates)


def _block_size(num_pairs, num_experts, tile_elements):
  """Returns the tokens per block, and the fewest that use a block; fewer run one by one.

  On accelerators a block is at least a GPU's smallest matmul. The CPU sizes were measured
  with D 1024, F 512 and 8 of 64 experts, in units of the time to read the experts once.
  On one core (a block of 4 takes as long as 2.5 single tokens):

    tokens   block 1   block 4   block 16
         1      1.48      1.73       more
        16      1.77      1.85       more
        64      2.54      2.24       2.42
      1024      18.3      11.3       10.0

  On two cores, where single tokens are slow:

    tokens   block 1   block 4   block 8   block 16
        16       3.7       2.6       2.8        3.3
        64       8.9       3.7       3.1        3.3
  """
  if jax.default_backend() != "cpu":
    return block_size(num_pairs, num_experts, least=16, most=128), 1
  mean = num_pairs / num_experts
  if num_cores() == 1:
    block, fewest = (4, 3) if mean <= 8 else (16, 1)
  else:
    block, fewest = (4 if mean <= 2 else 8 if mean <= 8 else 16), 1
  if block * tile_elements >= MIN_STEP_SIZE:
    return block, fewest
  while block * tile_elements < MIN_STEP_SIZE and block < min(2 * mean, 128):
    block *= 2
  return block, 1
