"""A loop over the experts that were hit, tile by tile: for CPUs, and for few bits.

Each tile of an expert's weights is read once, into the core's cache, and
multiplied there with all rows that chose the expert, a block of rows at a
time. So main memory is read once however the rows are spread over experts, and
no temporary grows with the number of experts. Quantized weights are widened as
a tile is read, and a tile is all of an expert on other platforms.
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
from roe_jax.quantization import dequantize, dequantize_parts, is_quantized

# A step of the inner loop should have so many multiplications that what
# starting it costs does not matter.
LEAST_WORK = 2**19


def compute(num_experts, activation, weights, layer, x, indices, gates):
  """See `experts.apply`; one row's choices are a loop over (row, choice) pairs."""
  (n, a), d = indices.shape, x.shape[1]
  pairs, width = n * a, jax.tree.leaves(weights.gate_up)[0].shape[1]
  group = width // weights.down.scales.shape[1] if is_quantized(weights.down) else 1
  rows_of_tile = tile_rows(width, 2 * d, group)
  block, fewest = _block_size(pairs, num_experts, 3 * rows_of_tile * d)
  flat_indices = indices.reshape(pairs)
  by_expert = jnp.argsort(flat_indices, stable=True)
  counts = jnp.bincount(flat_indices, length=num_experts)
  ends = jnp.cumsum(counts)
  hit = jnp.nonzero(counts, size=min(num_experts, pairs), fill_value=0)[0]
  sorted_x = jnp.pad(x[by_expert // a], ((0, block), (0, 0)))
  # [L·E, F, ...] to rows [L·E·F, ...]; a bias that there is not is an empty tree.
  matrices = jax.tree.map(
    lambda w: w.reshape(-1, *w.shape[2:]), (weights.gate_up, weights.down, weights.gate_up_bias)
  )

  def of_expert(i, sorted_y):
    expert = hit[i]
    first, end = ends[expert] - counts[expert], ends[expert]

    def add(tiles, start, sorted_y):
      del start
      gate_up, down, bias = tiles
      # A tile is copied or widened here, once, and not in the loop over blocks.
      gate_up, down, bias = jax.lax.optimization_barrier(
        (_parts(gate_up, x.dtype), _parts(down, x.dtype), bias)
      )

      def of_rows(begin, size, sorted_y):
        rows = jax.lax.dynamic_slice_in_dim(sorted_x, begin, size)
        projected = sum(
          einsum("bd,tcd->bct", *part)
          for part in zip(jnp.split(rows, len(gate_up), axis=1), gate_up)
        )
        if bias is not None:
          projected += to_compute_dtype(bias).astype(jnp.float32).T[None]
        hidden = rounded(activation(projected[:, 0], projected[:, 1]), x.dtype)
        if size > 1:  # what follows the expert's own rows adds zeros to what lies there
          hidden = jnp.where((begin + jnp.arange(size) < end)[:, None], hidden, 0)
        y = jax.lax.dynamic_slice_in_dim(sorted_y, begin, size)
        y = y + jnp.concatenate([einsum("bt,td->bd", hidden, part) for part in down], axis=1)
        return jax.lax.dynamic_update_slice_in_dim(sorted_y, y, begin, 0)

      num_blocks = (counts[expert] + block - fewest) // block
      sorted_y = jax.lax.fori_loop(
        0, num_blocks, lambda b, y: of_rows(first + b * block, block, y), sorted_y
      )
      if fewest == 1:
        return sorted_y
      return jax.lax.fori_loop(
        first + num_blocks * block, end, lambda row, y: of_rows(row, 1, y), sorted_y
      )

    first_row = (layer * num_experts + expert) * width
    return loop_over_tiles(matrices, first_row, width, rows_of_tile, add, sorted_y)

  sorted_y = jnp.zeros((pairs + block, d), jnp.float32)
  if weights.down_bias is not None:
    bias = to_compute_dtype(weights.down_bias[layer * num_experts + flat_indices[by_expert]])
    sorted_y = sorted_y.at[:pairs].set(bias.astype(jnp.float32))
  sorted_y = jax.lax.fori_loop(0, jnp.count_nonzero(counts), of_expert, sorted_y)
  places = jnp.zeros(pairs, jnp.int32).at[by_expert].set(jnp.arange(pairs), unique_indices=True)
  return combine(sorted_y[places.reshape(n, a)], gates, x.dtype)


def _parts(tile, dtype):
  """A tile as it is multiplied, by stretches of D: few bits are widened.

  That is to float32 on CPUs, and to `dtype` elsewhere.
  """
  if not is_quantized(tile):
    return [tile]
  return dequantize_parts(tile) if jax.default_backend() == "cpu" else [dequantize(tile, dtype)]


def _block_size(num_pairs, num_experts, tile_elements):
  """Rows of a block, and from how many on rows are a block; fewer go one by one.

  Accelerators take blocks that are a matmul's least on GPUs, or larger. The sizes
  for CPUs were measured with D 1024, F 512 and 64 experts of 8, in units of the time to read
  the experts once, with blocks of 1, 4 and 16 rows. On one core: 1.48, 1.73 and
  more for 1 row; 1.77, 1.85 and more for 16; 2.54, 2.24 and 2.42 for 64; 18.3,
  11.3 and 10.0 for 1024: a block of 4 takes as long as 2.5 single rows. On two,
  where single rows are slow, with blocks of 1, 4, 8 and 16: 3.7, 2.6, 2.8 and
  3.3 for 16 rows; 8.9, 3.7, 3.1 and 3.3 for 64.
  """
  if jax.default_backend() != "cpu":
    return block_size(num_pairs, num_experts, least=16, most=128), 1
  mean = num_pairs / num_experts
  if num_cores() == 1:
    block, fewest = (4, 3) if mean <= 8 else (16, 1)
  else:
    block, fewest = (4 if mean <= 2 else 8 if mean <= 8 else 16), 1
  if block * tile_elements >= LEAST_WORK:
    return block, fewest
  while block * tile_elements < LEAST_WORK and block < min(2 * mean, 128):
    block *= 2
  return block, 1
