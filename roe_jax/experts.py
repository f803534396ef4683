"""The expert feed-forward networks: several strategies behind one function.

All strategies compute, for each row, the gate-weighted sum of the outputs of
its chosen experts, `down(silu(gate x) * up x)`, and drop nothing. They differ
in how often they read an expert's weights and in what they can be used for:

* `pairs`: a loop over (row, choice) pairs; fewest bytes for few rows.
* `blocks`: rows sorted by expert, and a loop over blocks of rows of one
  expert, so that an expert chosen by several rows is read once a block.
* `padded`: the same blocks as one batched matmul over gathered weights.
  Differentiable; for training, and for small models.
* `dense`: every expert for every row as batched matmuls; for rosters on
  accelerators, where most experts are hit anyway.
"""

import functools

import jax
import jax.numpy as jnp

from roe_jax.numerics import einsum, tile_rows, walk
from roe_jax.params import ExpertParams

STRATEGIES = ("pairs", "blocks", "padded", "dense")


def check_strategy(strategy: str | None) -> None:
  """Raises a ValueError for a name that is not in `STRATEGIES`."""
  if strategy is not None and strategy not in STRATEGIES:
    raise ValueError(
        f"unknown expert strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")


def choose_strategy(num_rows: int, experts_per_token: int, num_experts: int,
                    platform: str | None = None) -> str:
  """The strategy for a static number of rows on `platform` (default: the backend)."""
  platform = platform or jax.default_backend()
  if platform != "cpu":
    return "dense"
  return "pairs" if num_rows == 1 else "blocks"


def apply(experts: ExpertParams, layer: jax.Array | int, x_NxD: jax.Array,
          indices_NxA: jax.Array, gates_NxA: jax.Array,
          strategy: str | None = None) -> jax.Array:
  """Gate-weighted sum of the chosen experts' outputs.

  Under `vmap` with shared weights, as in a roster, the mapped axis is folded
  into the rows (row-major, member-minor), so that an expert's weights are read
  once for all members. That rule has no reverse mode; `padded` and `dense`
  outside of `vmap` do not go through it and are differentiable.

  Args:
    experts: weights of all layers.
    layer: which layer's experts to use; may be traced.
    x_NxD: rows.
    indices_NxA: int32 chosen experts of each row.
    gates_NxA: float32 weights of the chosen experts.
    strategy: one of `STRATEGIES`, or None to choose by platform and shapes.

  Returns:
    `[N, D]`, dtype of `x_NxD`; products are accumulated in float32.

  Raises:
    ValueError: an unknown strategy.
  """
  check_strategy(strategy)
  l, e = experts.gate_up.shape[:2]
  gate_up = experts.gate_up.reshape(l * e, *experts.gate_up.shape[2:])
  down = experts.down.reshape(l * e, *experts.down.shape[2:])
  return _folding(e, strategy)(gate_up, down, jnp.asarray(layer), x_NxD,
                               indices_NxA, gates_NxA)


@functools.cache
def _folding(num_experts, strategy):
  """The strategy's function with a vmap rule that folds the mapped axis into rows."""

  def compute(gate_up, down, layer, x, indices, gates):
    chosen = strategy or choose_strategy(*indices.shape, num_experts)
    return _FUNCTIONS[chosen](num_experts, gate_up, down, layer, x, indices, gates)

  if strategy in ("padded", "dense"):
    return compute
  folding = jax.custom_batching.custom_vmap(compute)

  @folding.def_vmap
  def _(axis_size, in_batched, gate_up, down, layer, x, indices, gates):
    if any(in_batched[:3]):
      raise ValueError("experts.apply can be mapped over rows, not over weights or layers")
    def fold(a, is_batched):
      a = a if is_batched else jnp.broadcast_to(a, (axis_size, *a.shape))
      return a.swapaxes(0, 1).reshape(-1, a.shape[-1])
    y = folding(gate_up, down, layer,
                *(fold(a, b) for a, b in zip((x, indices, gates), in_batched[3:])))
    return y.reshape(-1, axis_size, y.shape[-1]).swapaxes(0, 1), True

  return folding


def _hidden(x, gate_up):
  """Gated inner values of a tile: `[B, D]` rows and `[T, 2, D]` weights give `[B, T]`."""
  projected = einsum("bd,tcd->bct", x, gate_up)
  return (jax.nn.silu(projected[:, 0]) * projected[:, 1]).astype(x.dtype)


def _pairs(num_experts, gate_up, down, layer, x, indices, gates):
  n, a = indices.shape
  width, d = down.shape[1:]
  flat = gate_up.reshape(-1, 2, d), down.reshape(-1, d)

  def body(pair, total):
    row, choice = pair // a, pair % a
    x_row = jax.lax.dynamic_slice_in_dim(x, row, 1)
    add = lambda tiles, start, y: y + einsum("bt,td->bd", _hidden(x_row, tiles[0]), tiles[1])
    y = walk(flat, (layer * num_experts + indices[row, choice]) * width, width,
             tile_rows(width, 2 * d), add, jnp.zeros((1, d), jnp.float32))
    return total.at[row].add(gates[row, choice] * y[0])

  total = jax.lax.fori_loop(0, n * a, body, jnp.zeros(x.shape, jnp.float32))
  return total.astype(x.dtype)


def _block_size(num_pairs, num_experts):
  return min(128, max(4, 1 << (max(1, num_pairs // num_experts) - 1).bit_length()))


def _blocks(num_experts, gate_up, down, layer, x, indices, gates):
  n, a = indices.shape
  pairs, (width, d) = n * a, down.shape[1:]
  block = _block_size(pairs, num_experts)
  by_expert = jnp.argsort(indices.reshape(pairs), stable=True)
  counts = jnp.bincount(indices.reshape(pairs), length=num_experts)
  ends = jnp.cumsum(counts)
  hit = jnp.nonzero(counts, size=min(num_experts, pairs), fill_value=0)[0]
  sorted_x = jnp.pad(x[by_expert // a], ((0, block), (0, 0)))
  flat = gate_up.reshape(-1, 2, d), down.reshape(-1, d)

  def of_expert(i, sorted_y):
    expert = hit[i]
    first, end = ends[expert] - counts[expert], ends[expert]

    def add(tiles, start, sorted_y):
      del start
      tiles = jax.lax.optimization_barrier(tiles)

      def of_block(b, sorted_y):
        begin = first + b * block
        rows = jax.lax.dynamic_slice_in_dim(sorted_x, begin, block)
        rows = jnp.where((begin + jnp.arange(block) < end)[:, None], rows, 0)
        y = jax.lax.dynamic_slice_in_dim(sorted_y, begin, block)
        y = y + einsum("bt,td->bd", _hidden(rows, tiles[0]), tiles[1])
        return jax.lax.dynamic_update_slice_in_dim(sorted_y, y, begin, 0)

      return jax.lax.fori_loop(0, -(-counts[expert] // block), of_block, sorted_y)

    return walk(flat, (layer * num_experts + expert) * width, width,
                tile_rows(width, 2 * d), add, sorted_y)

  sorted_y = jnp.zeros((pairs + block, d), jnp.float32)
  sorted_y = jax.lax.fori_loop(0, jnp.count_nonzero(counts), of_expert, sorted_y)
  places = jnp.zeros(pairs, jnp.int32).at[by_expert].set(jnp.arange(pairs), unique_indices=True)
  return _combine(sorted_y, places.reshape(n, a), gates, x.dtype)


def _combine(packed, slots, gates, dtype):
  return jnp.einsum("nad,na->nd", packed[slots], gates,
                    precision=jax.lax.Precision.HIGHEST).astype(dtype)


def _plan(indices, num_experts, block):
  """Where each (row, choice) pair goes when pairs are packed into blocks of one expert.

  Returns:
    rows `[max_blocks · block]`: the row in each slot, N in an empty one;
    slots `[N, A]`: the slot of each pair;
    block_experts `[max_blocks]`: the expert of each block.
  """
  n, a = indices.shape
  pairs = n * a
  max_blocks = pairs // block + min(num_experts, pairs)
  flat = indices.reshape(pairs)
  order = jnp.argsort(flat, stable=True)
  counts = jnp.bincount(flat, length=num_experts)
  last_block = jnp.cumsum(-(-counts // block))
  first_block = last_block - -(-counts // block)
  first_pair = jnp.cumsum(counts) - counts
  expert = flat[order]
  slot = first_block[expert] * block + jnp.arange(pairs) - first_pair[expert]
  rows = jnp.full(max_blocks * block, n).at[slot].set(order // a, unique_indices=True)
  slots = jnp.zeros(pairs, jnp.int32).at[order].set(slot, unique_indices=True)
  block_experts = jnp.searchsorted(last_block, jnp.arange(max_blocks), side="right")
  return rows, slots.reshape(n, a), jnp.minimum(block_experts, num_experts - 1)


def _padded(num_experts, gate_up, down, layer, x, indices, gates):
  block = _block_size(indices.size, num_experts)
  rows, slots, block_experts = _plan(indices, num_experts, block)
  x_blocks = x.at[rows.reshape(-1, block)].get(mode="fill", fill_value=0)
  expert = layer * num_experts + block_experts
  projected = einsum("kbd,kfcd->kbcf", x_blocks, gate_up[expert])
  hidden = (jax.nn.silu(projected[:, :, 0]) * projected[:, :, 1]).astype(x.dtype)
  packed = einsum("kbf,kfd->kbd", hidden, down[expert])
  return _combine(packed.reshape(-1, x.shape[1]), slots, gates, x.dtype)


def _dense(num_experts, gate_up, down, layer, x, indices, gates):
  def of_layer(w):
    return jax.lax.dynamic_slice_in_dim(w, layer * num_experts, num_experts)

  n = x.shape[0]
  weights = jnp.zeros((n, num_experts), jnp.float32).at[
      jnp.arange(n)[:, None], indices].set(gates)
  projected = einsum("nd,efcd->encf", x, of_layer(gate_up))
  hidden = jax.nn.silu(projected[:, :, 0]) * projected[:, :, 1]
  # Weighting before `down` leaves one contraction over experts and width.
  hidden = (hidden * weights.T[..., None]).astype(x.dtype)
  return einsum("enf,efd->nd", hidden, of_layer(down)).astype(x.dtype)


_FUNCTIONS = {"pairs": _pairs, "blocks": _blocks, "padded": _padded, "dense": _dense}
