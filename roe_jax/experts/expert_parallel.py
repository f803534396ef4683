"""Experts over devices: each one computes the share of those that it holds.

Inside of a `shard_map` (see `sharding`) a device holds some of the experts along
the mesh axis `expert`, and a part of each one's inner width along `tensor`. The
rows are in one of two states, and what is done follows from it:

* All devices along `expert` hold the same rows. Each computes what its own
  experts add to each row, and a sum over devices completes it.
* Each holds rows of its own. Few are gathered first, and of the sums each device
  gets those of its rows back (`via_all_gather`). Many are sent to where their experts
  are, and the results back, if that moves less: as many as there are
  (`via_ragged_all_to_all`) where the backend can do so, else arrays of one size
  (`via_all_to_all`).

No choice is ever dropped. A choice of another device's expert becomes that of
no expert: index E (of this device), gate 0. It sorts behind all others.
"""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from roe_jax import collectives
from roe_jax.experts import kernel_check
from roe_jax.numerics import rounded
from roe_jax.params import ExpertParams

# `(x [N, D], indices [N, A], gates [N, A]) -> [N, D]`, of the experts held here.
Share = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# Rows on each device from which on sending them to their experts is considered,
# the room for each device in units of what uniform routing sends there, and the
# part of all rows that may be moved at most: `via_all_gather` moves all of them.
MIN_EXCHANGED_TOKENS = 128
CAPACITY_FACTOR = 1.25
MAX_EXCHANGED_FRACTION = 0.75


def apply(
  share: Share,
  num_experts: int,
  x: jax.Array,
  indices: jax.Array,
  gates: jax.Array,
  tokens_sharded: bool,
) -> jax.Array:
  """The gate-weighted sum over the experts of all devices; `share` itself on one.

  Args:
    share: computes what the experts held here add.
    num_experts: how many those are.
    x: `[N, D]` rows.
    indices: `[N, A]` int32 chosen experts among those of all devices.
    gates: `[N, A]` float32.
    tokens_sharded: whether the devices along `expert` hold different rows.

  Returns:
    `[N, D]`, dtype of `x`; the devices' shares are added in float32.
  """
  devices = collectives.axis_size("expert")
  if devices * collectives.axis_size("tensor") == 1:
    return share(x, indices, gates)
  if not tokens_sharded:
    y = _own_share(share, num_experts, x, indices, gates)
    return rounded(collectives.psum(y, "expert", "tensor"), x.dtype)
  if room := exchange_capacity(*indices.shape, devices):
    exchange = via_ragged_all_to_all if _ragged_is_possible(x, indices) else via_all_to_all
    y = exchange(share, num_experts, x, indices, gates, room)
  else:
    y = via_all_gather(share, num_experts, x, indices, gates)
  return rounded(collectives.psum(y, "tensor"), x.dtype)


def exchange_capacity(num_rows: int, choices: int, devices: int) -> int:
  """Rows that a device has room for of each other one; 0 where all are gathered.

  With uniform routing a row has an expert on a given device with probability
  `1 - (1 - 1/devices)^choices`.
  """
  part = CAPACITY_FACTOR * (1 - (1 - 1 / devices) ** choices)
  if num_rows < MIN_EXCHANGED_TOKENS or part > MAX_EXCHANGED_FRACTION:
    return 0
  return min(num_rows, -(-int(part * num_rows) // 8) * 8)


def via_all_gather(
  share: Share, num_experts: int, x: jax.Array, indices: jax.Array, gates: jax.Array
) -> jax.Array:
  """`[N, D]` float32 sums of this device's rows, by way of the rows of all devices."""
  rows = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x, indices, gates))
  return jax.lax.psum_scatter(_own_share(share, num_experts, *rows), "expert", tiled=True)


def via_all_to_all(
  share: Share, num_experts: int, x: jax.Array, indices: jax.Array, gates: jax.Array, room: int
) -> jax.Array:
  """`[N, D]` float32 sums of this device's rows, by way of the devices of their experts.

  Arrays of one size go to and fro, with room for `room` rows to each device,
  until the device with the most rows for another one has sent them all: once
  or twice, unless nearly all rows want the same experts.
  """
  (n, d), devices = x.shape, collectives.axis_size("expert")
  destination = jnp.arange(devices)
  wanted = _wanted(num_experts, indices, devices)
  place = jnp.cumsum(wanted, axis=0) - 1
  most = _most(wanted.sum(0))
  x, gates = (jnp.pad(a, ((0, 1), (0, 0))) for a in (x, gates))  # row N stands for none
  indices = jnp.pad(indices, ((0, 1), (0, 0)), constant_values=-1)

  def turn(state):
    sent, y = state
    slot = jnp.where(wanted & (place >= sent), place - sent, room)
    rows = (
      jnp.full((devices, room), n)
      .at[destination[None], slot]
      .set(jnp.broadcast_to(jnp.arange(n)[:, None], slot.shape), mode="drop")
      .reshape(-1)
    )
    arrived = (_to_and_fro(a[rows]) for a in (x, indices, gates))
    results = _to_and_fro(_own_share(share, num_experts, *arrived))
    return sent + room, y.at[rows].add(results, mode="drop")

  _, y = jax.lax.while_loop(
    lambda state: state[0] < most, turn, (jnp.int32(0), jnp.zeros((n, d), jnp.float32))
  )
  return y


def via_ragged_all_to_all(
  share: Share, num_experts: int, x: jax.Array, indices: jax.Array, gates: jax.Array, room: int
) -> jax.Array:
  """As `via_all_to_all`, but no more is sent than the rows that there are.

  Each device orders its rows by where they go, and tells all others how many go
  to each. What comes to a device, one sender after the other, it takes in
  stretches of `room` rows for each device, whoever sends them: one, unless more
  come to some device than to all of them in `via_all_to_all`, which never takes fewer.
  To take all at once would need room for the rows of all devices, as if they
  were gathered.

  A device holds up to `N * min(A, devices)` rows and results in order, and those of
  the stretch.
  """
  n, devices = len(x), collectives.axis_size("expert")
  own, size = collectives.axis_index("expert"), room * devices
  most_wanted = min(indices.shape[1], devices)
  wanted = _wanted(num_experts, indices, devices)
  counts = jax.lax.all_gather(wanted.sum(0), "expert")  # [from, to], as all below
  start_here = jnp.cumsum(counts, axis=1) - counts  # in the order of the one that sends
  start_there = jnp.cumsum(counts, axis=0) - counts  # and of the one that takes
  most = _most(counts.sum(0))
  place = jnp.where(
    wanted, start_here[own][None] + jnp.cumsum(wanted, axis=0) - 1, n * most_wanted
  )  # [N, devices]
  rows = (
    jnp.zeros(n * most_wanted, jnp.int32)
    .at[place]
    .set(jnp.broadcast_to(jnp.arange(n)[:, None], place.shape), mode="drop")
  )
  x, indices, gates = (a[rows] for a in (x, indices, gates))

  def turn(state):
    taken, results = state
    begin, end = (jnp.clip(t, start_there, start_there + counts) for t in (taken, taken + size))
    sizes = end - begin
    here = start_here + begin - start_there
    there = jnp.where(sizes > 0, begin - taken, 0)
    arrived = (
      _send(
        a,
        jnp.full((size, a.shape[1]), none, a.dtype),
        here[own],
        sizes[own],
        there[own],
        sizes[:, own],
      )
      for a, none in ((x, 0), (indices, -1), (gates, 0))
    )
    y = _own_share(share, num_experts, *arrived)
    return taken + size, _send(y, results, there[:, own], sizes[:, own], here[:, own], sizes[own])

  _, results = jax.lax.while_loop(
    lambda state: state[0] < most, turn, (jnp.int32(0), jnp.zeros(x.shape, jnp.float32))
  )
  # Gathered and added in one order: a scatter on GPUs would add in any.
  of_row = jnp.sort(place, axis=1)[:, :most_wanted]
  return results.at[of_row].get(mode="fill", fill_value=0).sum(1)


@functools.cache
def ragged_passes(mesh: tuple[tuple[str, int], ...], dtype: str, width: int, choices: int) -> bool:
  """Whether `via_ragged_all_to_all` agrees with `via_all_to_all`, tried on a few tokens.

  Args:
    mesh: names and sizes of the mesh's axes.
    dtype: of the rows.
    width: D.
    choices: A.
  """
  return kernel_check.passes(
    functools.partial(_difference_to_exchanged, mesh, jnp.dtype(dtype), width, choices),
    1e-5,
    what="exchanging as many rows as there are (`ragged_all_to_all`)",
    instead="exchanges of one size",
  )


def _ragged_is_possible(x, indices):
  """Whether this backend has it; that of CPUs does not."""
  mesh = jax.sharding.get_abstract_mesh()
  return jax.default_backend() != "cpu" and ragged_passes(
    tuple(mesh.shape.items()), str(x.dtype), x.shape[1], indices.shape[1]
  )


def _difference_to_exchanged(mesh, dtype, width, choices):
  """Largest difference on a small case, relative to the largest value."""
  names, sizes = zip(*mesh)
  mesh = jax.make_mesh(
    sizes,
    names,
    axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
    devices=jax.devices()[: math.prod(sizes)],
  )

  def share(x, indices, gates):
    return x.astype(jnp.float32) * (gates * (1 + indices)).sum(1, keepdims=True)

  def part():
    # Devices that differ only along `tensor` hold the same rows. Most rows
    # go to the first devices along `expert`, so that some take several turns.
    index = collectives.axis_index(*(a for a in names if a != "tensor"))
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), index), 3)
    x = jax.random.normal(keys[0], (16, width), dtype)
    most = choices * collectives.axis_size("expert")
    indices = (most * jax.random.uniform(keys[1], (16, choices)) ** 2).astype(jnp.int32)
    gates = jax.random.uniform(keys[2], (16, choices))
    actual, expected = (
      exchange(share, choices, x, indices, gates, room=2)
      for exchange in (via_ragged_all_to_all, via_all_to_all)
    )
    return jax.lax.pmax(jnp.abs(actual - expected).max() / jnp.abs(expected).max(), names)

  # Checks nothing of what differs between devices, as `sharding.map_shards`.
  return float(
    jax.jit(
      jax.shard_map(part, mesh=mesh, in_specs=(), out_specs=PartitionSpec(), check_vma=False)
    )()
  )


def bias_on_one_device(experts: ExpertParams) -> ExpertParams:
  """The experts with their last bias on one of the devices that share their width."""
  bias = experts.down_bias
  if bias is None or collectives.axis_size("tensor") == 1:
    return experts
  return experts.replace(
    down_bias=jnp.where(collectives.axis_index("tensor") == 0, bias, jnp.zeros_like(bias))
  )


def _to_and_fro(rows):
  """Stretch i of every device's rows, of equal lengths, to device i of `expert`."""
  return jax.lax.all_to_all(rows, "expert", 0, 0, tiled=True)


def _send(rows, into, *where):
  """`jax.lax.ragged_all_to_all` along `expert`; `where` are its four arrays."""
  return jax.lax.ragged_all_to_all(rows, into, *where, axis_name="expert")


def _wanted(num_experts, indices, devices):
  """`[N, devices]`: whether a row has an expert there."""
  return (indices[..., None] // num_experts == jnp.arange(devices)[None, None]).any(1)


def _most(counts):
  """The largest on any device of the mesh: all take as many turns as the last one."""
  return jax.lax.pmax(counts.max(), jax.sharding.get_abstract_mesh().manual_axes)


def _own_share(share, num_experts, x, indices, gates):
  """`share` of rows whose choices are among the experts of all devices, in float32."""
  own = indices - collectives.axis_index("expert") * num_experts
  is_own = (own >= 0) & (own < num_experts)
  own, gates = jnp.where(is_own, own, num_experts), jnp.where(is_own, gates, 0)
  if num_experts < indices.shape[1]:  # no more choices can be own ones
    order = jnp.argsort(own, axis=1)[:, :num_experts]
    own, gates = (jnp.take_along_axis(a, order, axis=1) for a in (own, gates))
  return share(x, own, gates).astype(jnp.float32)
