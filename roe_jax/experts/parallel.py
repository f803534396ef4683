"""Experts over devices: each one computes the share of those that it holds.

Inside of a `shard_map` (see `sharding`) a device holds some of the experts along
the mesh axis `expert`, and a part of each one's inner width along `tensor`. The
rows are in one of two states, and what is done follows from it:

* All devices along `expert` hold the same rows. Each computes what its own
  experts add to each row, and a sum over devices completes it.
* Each holds rows of its own. Few are gathered first, and of the sums each device
  gets those of its rows back (`gathered`). Many are sent to where their experts
  are, and the results back (`exchanged`), if that moves less.

No choice is ever dropped. A choice of another device's expert becomes that of
no expert: index E (of this device), gate 0. It sorts behind all others.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from roe_jax import collectives
from roe_jax.numerics import rounded
from roe_jax.params import ExpertParams

# `(x [N, D], indices [N, A], gates [N, A]) -> [N, D]`, of the experts held here.
Share = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# Rows on each device from which on sending them to their experts is considered,
# the room for each device in units of what uniform routing sends there, and the
# part of all rows that may be moved at most: `gathered` moves all of them.
EXCHANGED_ROWS = 128
ROOM = 1.25
EXCHANGED_PART = 0.75


def apply(share: Share, num_experts: int, x: jax.Array, indices: jax.Array, gates: jax.Array,
          rows_split: bool) -> jax.Array:
  """The gate-weighted sum over the experts of all devices; `share` itself on one.

  Args:
    share: computes what the experts held here add.
    num_experts: how many those are.
    x: `[N, D]` rows.
    indices: `[N, A]` int32 chosen experts among those of all devices.
    gates: `[N, A]` float32.
    rows_split: whether the devices along `expert` hold different rows.

  Returns:
    `[N, D]`, dtype of `x`; the devices' shares are added in float32.
  """
  devices = collectives.parts("expert")
  if devices * collectives.parts("tensor") == 1:
    return share(x, indices, gates)
  if not rows_split:
    y = _own_share(share, num_experts, x, indices, gates)
    return rounded(collectives.add(y, "expert", "tensor"), x.dtype)
  if room := exchange_room(*indices.shape, devices):
    y = exchanged(share, num_experts, x, indices, gates, room)
  else:
    y = gathered(share, num_experts, x, indices, gates)
  return rounded(collectives.add(y, "tensor"), x.dtype)


def exchange_room(num_rows: int, choices: int, devices: int) -> int:
  """Rows that a device sends to each other one at a time; 0 where all are gathered.

  With uniform routing a row has an expert on a given device with probability
  `1 - (1 - 1/devices)^choices`.
  """
  part = ROOM * (1 - (1 - 1 / devices) ** choices)
  if num_rows < EXCHANGED_ROWS or part > EXCHANGED_PART:
    return 0
  return min(num_rows, -(-int(part * num_rows) // 8) * 8)


def gathered(share: Share, num_experts: int, x: jax.Array, indices: jax.Array,
             gates: jax.Array) -> jax.Array:
  """`[N, D]` float32 sums of this device's rows, by way of the rows of all devices."""
  rows = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x, indices, gates))
  return jax.lax.psum_scatter(_own_share(share, num_experts, *rows), "expert", tiled=True)


def exchanged(share: Share, num_experts: int, x: jax.Array, indices: jax.Array,
              gates: jax.Array, room: int) -> jax.Array:
  """`[N, D]` float32 sums of this device's rows, by way of the devices of their experts.

  Arrays of one size go to and fro, with room for `room` rows to each device,
  until the device with the most rows for another one has sent them all: once
  or twice, unless nearly all rows want the same experts.
  """
  (n, d), devices = x.shape, collectives.parts("expert")
  destination = jnp.arange(devices)
  wanted = (indices[..., None] // num_experts == destination[None, None]).any(1)  # [N, devices]
  place = jnp.cumsum(wanted, axis=0) - 1
  most = jax.lax.pmax(wanted.sum(0).max(), jax.sharding.get_abstract_mesh().manual_axes)
  x, gates = (jnp.pad(a, ((0, 1), (0, 0))) for a in (x, gates))  # row N stands for none
  indices = jnp.pad(indices, ((0, 1), (0, 0)), constant_values=-1)

  def turn(state):
    sent, y = state
    slot = jnp.where(wanted & (place >= sent), place - sent, room)
    rows = jnp.full((devices, room), n).at[destination[None], slot].set(
        jnp.broadcast_to(jnp.arange(n)[:, None], slot.shape), mode="drop").reshape(-1)
    arrived = (_to_and_fro(a[rows]) for a in (x, indices, gates))
    results = _to_and_fro(_own_share(share, num_experts, *arrived))
    return sent + room, y.at[rows].add(results, mode="drop")

  _, y = jax.lax.while_loop(lambda state: state[0] < most, turn,
                            (jnp.int32(0), jnp.zeros((n, d), jnp.float32)))
  return y


def biased_once(experts: ExpertParams) -> ExpertParams:
  """The experts with their last bias on one of the devices that share their width."""
  bias = experts.down_bias
  if bias is None or collectives.parts("tensor") == 1:
    return experts
  return experts.replace(
      down_bias=jnp.where(collectives.index("tensor") == 0, bias, jnp.zeros_like(bias)))


def _to_and_fro(rows):
  """Stretch i of every device's rows, of equal lengths, to device i of `expert`."""
  return jax.lax.all_to_all(rows, "expert", 0, 0, tiled=True)


def _own_share(share, num_experts, x, indices, gates):
  """`share` of rows whose choices are among the experts of all devices, in float32."""
  own = indices - collectives.index("expert") * num_experts
  is_own = (own >= 0) & (own < num_experts)
  own, gates = jnp.where(is_own, own, num_experts), jnp.where(is_own, gates, 0)
  if num_experts < indices.shape[1]:  # no more choices can be own ones
    order = jnp.argsort(own, axis=1)[:, :num_experts]
    own, gates = (jnp.take_along_axis(a, order, axis=1) for a in (own, gates))
  return share(x, own, gates).astype(jnp.float32)
