"""Expert parallelism: each device applies the experts that it holds.

Inside `shard_map` (see `sharding`) a device holds some of the experts along the mesh axis
`expert`, and a shard of each expert's width along `tensor`. Tokens are either replicated
or sharded along `expert`:

* Replicated: each device applies its own experts to every token, and a psum completes
  the sum.
* Sharded: few tokens are all-gathered, and the sums reduce-scattered (`via_all_gather`).
  Many tokens are sent to the devices of their experts, and the results back, if that
  moves less data: without padding (`via_ragged_all_to_all`) where the backend supports
  it, else in arrays of fixed size (`via_all_to_all`).

No choice is ever dropped. On a device, a choice of another device's expert is replaced by
expert index E with gate 0, which sorts after all others.
"""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from roe_jax import collectives, kernel_check
from roe_jax.numerics import rounded
from roe_jax.params import ExpertParams

# `(x [N, D], indices [N, A], gates [N, A]) -> [N, D] float32` over this device's experts.
LocalExperts = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# Tokens per device from which an all-to-all exchange is considered, its capacity per
# device relative to uniform routing, and the largest fraction of all tokens that it may
# move (`via_all_gather` moves all of them).
MIN_EXCHANGED_TOKENS = 128
CAPACITY_FACTOR = 1.25
MAX_EXCHANGED_FRACTION = 0.75


def apply(
  local_experts: LocalExperts,
  num_experts: int,
  x: jax.Array,
  indices: jax.Array,
  gates: jax.Array,
  tokens_sharded: bool,
  differentiable: bool = False,
) -> jax.Array:
  """Returns the gate-weighted sum over the experts of several devices.

  Args:
    local_experts: applies this device's experts.
    num_experts: number of experts on this device.
    x: `[N, D]` tokens.
    indices: `[N, A]` int32 active experts, among those of all devices.
    gates: `[N, A]` float32.
    tokens_sharded: whether the devices along `expert` hold different tokens.
    differentiable: whether gradients are taken, which exchanges in rounds do not have: the tokens
      are all-gathered.

  Returns:
    `[N, D]` in the dtype of `x`; sums over experts and devices are in float32, rounded once.
  """
  devices = collectives.axis_size("expert")
  if not tokens_sharded:
    y = _apply_own(local_experts, num_experts, x, indices, gates)
    return rounded(collectives.psum(y, "expert", "tensor"), x.dtype)
  capacity = exchange_capacity(len(indices), indices.shape[1], devices)
  if capacity and not differentiable:
    exchange = via_ragged_all_to_all if _ragged_is_possible(x, indices) else via_all_to_all
    y = exchange(local_experts, num_experts, x, indices, gates, capacity)
  else:
    y = via_all_gather(local_experts, num_experts, x, indices, gates)
  return rounded(collectives.psum(y, "tensor"), x.dtype)


def exchange_capacity(num_tokens: int, choices: int, devices: int) -> int:
  """Returns how many tokens a device sends to each other per round; 0 to all-gather instead.

  With uniform routing a token has an active expert on a given device with probability
  `1 - (1 - 1/devices)^choices`.
  """
  fraction = CAPACITY_FACTOR * (1 - (1 - 1 / devices) ** choices)
  if num_tokens < MIN_EXCHANGED_TOKENS or fraction > MAX_EXCHANGED_FRACTION:
    return 0
  return min(num_tokens, -(-int(fraction * num_tokens) // 8) * 8)


def via_all_gather(
  local_experts: LocalExperts, num_experts: int, x: jax.Array, indices: jax.Array, gates: jax.Array
) -> jax.Array:
  """Returns `[N, D]` float32 sums of this device's tokens: all-gather, then reduce-scatter."""
  tokens = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x, indices, gates))
  y = _apply_own(local_experts, num_experts, *tokens)
  return jax.lax.psum_scatter(y, "expert", tiled=True)


def via_all_to_all(
  local_experts: LocalExperts,
  num_experts: int,
  x: jax.Array,
  indices: jax.Array,
  gates: jax.Array,
  capacity: int,
) -> jax.Array:
  """Returns `[N, D]` float32 sums of this device's tokens, by padded all-to-all exchanges.

  Each round sends up to `capacity` tokens to each device and the results back, until all
  are sent: one or two rounds, unless nearly all tokens choose the same experts.
  """
  (n, d), devices = x.shape, collectives.axis_size("expert")
  destination = jnp.arange(devices)
  wanted = _wanted(num_experts, indices, devices)
  place = jnp.cumsum(wanted, axis=0) - 1
  most = _max_over_mesh(wanted.sum(0))
  x, gates = (jnp.pad(a, ((0, 1), (0, 0))) for a in (x, gates))  # token N is padding
  indices = jnp.pad(indices, ((0, 1), (0, 0)), constant_values=-1)

  def exchange_round(state):
    sent, y = state
    column = jnp.where(wanted & (place >= sent), place - sent, capacity)
    tokens = (
      jnp.full((devices, capacity), n)
      .at[destination[None], column]
      .set(jnp.broadcast_to(jnp.arange(n)[:, None], column.shape), mode="drop")
      .reshape(-1)
    )
    received = (_all_to_all(a[tokens]) for a in (x, indices, gates))
    results = _all_to_all(_apply_own(local_experts, num_experts, *received))
    return sent + capacity, y.at[tokens].add(results, mode="drop")

  _, y = jax.lax.while_loop(
    lambda state: state[0] < most, exchange_round, (jnp.int32(0), jnp.zeros((n, d), jnp.float32))
  )
  return y


def via_ragged_all_to_all(
  local_experts: LocalExperts,
  num_experts: int,
  x: jax.Array,
  indices: jax.Array,
  gates: jax.Array,
  capacity: int,
) -> jax.Array:
  """Like `via_all_to_all`, but sends only actual tokens, without padding.

  Each device sorts its tokens by destination and shares the counts with all others. A
  device receives tokens in sender order, `capacity * devices` per round from any senders:
  one round, unless some device receives more than that; never more rounds than
  `via_all_to_all`. Receiving all at once would need as much memory as an all-gather.

  A device stores up to `N * min(A, devices)` sorted tokens and results, and those of a round.
  """
  n, devices = len(x), collectives.axis_size("expert")
  own, size = collectives.axis_index("expert"), capacity * devices
  most_wanted = min(indices.shape[1], devices)
  wanted = _wanted(num_experts, indices, devices)
  # Arrays [sender, receiver], here and below.
  counts = jax.lax.all_gather(wanted.sum(0), "expert")
  start_here = jnp.cumsum(counts, axis=1) - counts  # in the sender's order
  start_there = jnp.cumsum(counts, axis=0) - counts  # in the receiver's order
  most = _max_over_mesh(counts.sum(0))
  rank = start_here[own][None] + jnp.cumsum(wanted, axis=0) - 1
  place = jnp.where(wanted, rank, n * most_wanted)  # [N, devices]
  tokens = (
    jnp.zeros(n * most_wanted, jnp.int32)
    .at[place]
    .set(jnp.broadcast_to(jnp.arange(n)[:, None], place.shape), mode="drop")
  )
  x, indices, gates = (a[tokens] for a in (x, indices, gates))

  def exchange_round(state):
    taken, results = state
    begin, end = (jnp.clip(t, start_there, start_there + counts) for t in (taken, taken + size))
    sizes = end - begin
    here = start_here + begin - start_there
    there = jnp.where(sizes > 0, begin - taken, 0)

    def send(a, fill):
      buffer = jnp.full((size, a.shape[1]), fill, a.dtype)
      return _ragged_all_to_all(a, buffer, here[own], sizes[own], there[own], sizes[:, own])

    received = send(x, 0), send(indices, -1), send(gates, 0)
    y = _apply_own(local_experts, num_experts, *received)
    results = _ragged_all_to_all(y, results, there[:, own], sizes[:, own], here[:, own], sizes[own])
    return taken + size, results

  _, results = jax.lax.while_loop(
    lambda state: state[0] < most, exchange_round, (jnp.int32(0), jnp.zeros(x.shape, jnp.float32))
  )
  # Gather and add in a fixed order: a scatter on GPUs adds in any order.
  of_token = jnp.sort(place, axis=1)[:, :most_wanted]
  return results.at[of_token].get(mode="fill", fill_value=0).sum(1)


@functools.cache
def ragged_passes(mesh: tuple[tuple[str, int], ...], dtype: str, width: int, choices: int) -> bool:
  """Checks `via_ragged_all_to_all` against `via_all_to_all` on these devices, on a few tokens.

  Args:
    mesh: names and sizes of the mesh's axes.
    dtype: dtype of the tokens.
    width: D.
    choices: A.
  """
  return kernel_check.passes(
    functools.partial(_ragged_error, mesh, jnp.dtype(dtype), width, choices),
    1e-5,
    what="the ragged exchange of tokens (`ragged_all_to_all`)",
    instead="padded exchanges",
  )


def _ragged_is_possible(x, indices):
  if jax.default_backend() == "cpu":  # ragged_all_to_all is not implemented there
    return False
  mesh = jax.sharding.get_abstract_mesh()
  return ragged_passes(tuple(mesh.shape.items()), str(x.dtype), x.shape[1], indices.shape[1])


def _ragged_error(mesh, dtype, width, choices):
  """Returns the largest error on a small case, relative to the largest value."""
  names, sizes = zip(*mesh)
  axis_types = (jax.sharding.AxisType.Auto,) * len(sizes)
  devices = jax.devices()[: math.prod(sizes)]
  mesh = jax.make_mesh(sizes, names, axis_types=axis_types, devices=devices)

  def local_experts(x, indices, gates):
    return x.astype(jnp.float32) * (gates * (1 + indices)).sum(1, keepdims=True)

  def error():
    # Devices that differ only along `tensor` hold the same tokens. Most tokens go to the
    # first devices along `expert`, so that some need several rounds.
    index = collectives.axis_index(*(a for a in names if a != "tensor"))
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), index), 3)
    x = jax.random.normal(keys[0], (16, width), dtype)
    most = choices * collectives.axis_size("expert")
    indices = (most * jax.random.uniform(keys[1], (16, choices)) ** 2).astype(jnp.int32)
    gates = jax.random.uniform(keys[2], (16, choices))
    actual, expected = (
      exchange(local_experts, choices, x, indices, gates, capacity=2)
      for exchange in (via_ragged_all_to_all, via_all_to_all)
    )
    return jax.lax.pmax(jnp.abs(actual - expected).max() / jnp.abs(expected).max(), names)

  # Like `sharding.map_shards`, this does not check replication.
  run = jax.shard_map(error, mesh=mesh, in_specs=(), out_specs=PartitionSpec(), check_vma=False)
  return float(jax.jit(run)())


def bias_on_one_device(experts: ExpertParams) -> ExpertParams:
  """Returns the experts with `down_bias` zeroed on all but one device along `tensor`."""
  bias = experts.down_bias
  if bias is None or collectives.axis_size("tensor") == 1:
    return experts
  return experts.replace(
    down_bias=jnp.where(collectives.axis_index("tensor") == 0, bias, jnp.zeros_like(bias))
  )


def _all_to_all(tokens):
  """Sends the i-th of equal chunks of every device's tokens to device i along `expert`."""
  return jax.lax.all_to_all(tokens, "expert", 0, 0, tiled=True)


def _ragged_all_to_all(tokens, buffer, *offsets_and_sizes):
  return jax.lax.ragged_all_to_all(tokens, buffer, *offsets_and_sizes, axis_name="expert")


def _wanted(num_experts, indices, devices):
  """`[N, devices]`: whether a token has an active expert there."""
  return (indices[..., None] // num_experts == jnp.arange(devices)[None, None]).any(1)


def _max_over_mesh(counts):
  """Returns the maximum over all devices, so that all run the same number of rounds."""
  return jax.lax.pmax(counts.max(), jax.sharding.get_abstract_mesh().manual_axes)


def _apply_own(local_experts, num_experts, x, indices, gates):
  """Applies `local_experts` to tokens with indices among the experts of all devices; float32."""
  own = indices - collectives.axis_index("expert") * num_experts
  is_own = (own >= 0) & (own < num_experts)
  own, gates = jnp.where(is_own, own, num_experts), jnp.where(is_own, gates, 0)
  if num_experts < indices.shape[1]:  # at most num_experts choices are on this device
    order = jnp.argsort(own, axis=1)[:, :num_experts]
    own, gates = (jnp.take_along_axis(a, order, axis=1) for a in (own, gates))
  return local_experts(x, own, gates)
