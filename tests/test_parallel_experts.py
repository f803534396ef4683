"""Experts over devices against all experts on one."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from roe_jax import experts as experts_lib, sharding
from roe_jax.experts import parallel
from roe_jax.params import ExpertParams

L, E, D, F, A = 2, 8, 16, 12, 3
_WEIGHTS = ExpertParams(P(None, "expert", "tensor"), P(None, "expert", "tensor"),
                        P(None, "expert", "tensor"), P(None, "expert"))


def mesh(expert, tensor=1, data=1):
  return jax.make_mesh((data, expert, tensor), sharding.AXES,
                       axis_types=(jax.sharding.AxisType.Auto,) * 3,
                       devices=jax.devices()[:data * expert * tensor])


def weights(bias=True, dtype="float32"):
  random = np.random.RandomState(0)
  make = lambda *shape: jnp.asarray(0.5 * random.standard_normal(shape), dtype)
  return ExpertParams(make(L, E, F, 2, D), make(L, E, F, D),
                      *((make(L, E, F, 2), make(L, E, D)) if bias else ()))


def rows(n, lead=(), hot=None):
  """Inputs, distinct experts and gates; `hot` are experts that all rows choose."""
  random = np.random.RandomState(1)
  indices = np.argsort(random.uniform(size=(*lead, n, E)), axis=-1)[..., :A]
  if hot is not None:
    indices = np.broadcast_to(hot, indices.shape)
  return (jnp.asarray(random.standard_normal((*lead, n, D)), jnp.float32),
          jnp.asarray(indices, jnp.int32),
          jnp.asarray(random.uniform(0.1, 1, (*lead, n, A)), jnp.float32))


def over_devices(on, strategy, params, args, rows_split, layer=1):
  """`experts.apply` by parts, on a mesh; a leading axis of the rows is mapped."""
  lead = (None,) * (args[0].ndim - 2)
  row_spec = P(*lead, "expert" if rows_split else None)

  def part(experts, *args):
    run = functools.partial(experts_lib.apply, parallel.biased_once(experts), layer,
                            strategy=strategy, rows_split=rows_split)
    return (jax.vmap(run) if lead else run)(*args)

  specs = jax.tree.map(lambda spec, _: spec, _WEIGHTS.replace(
      **{n: None for n in ("gate_up_bias", "down_bias") if params.down_bias is None}), params)
  return jax.jit(sharding.by_parts(part, on, (specs, row_spec, row_spec, row_spec), row_spec))(
      params, *args)


@functools.partial(jax.jit, static_argnums=0)
def on_one(strategy, params, layer, *args):
  return experts_lib.apply(params, layer, *args, strategy)


def assert_close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
  assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("rows_split", [False, True])
@pytest.mark.parametrize("expert,tensor", [(8, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("strategy", experts_lib.STRATEGIES)
def test_devices_together_compute_what_one_does(strategy, expert, tensor, rows_split):
  params, args = weights(), rows(16)
  expected = on_one("dense", params, 1, *args)
  actual = over_devices(mesh(expert, tensor), strategy, params, args, rows_split and expert > 1)
  assert_close(actual, expected)


@pytest.mark.parametrize("rows_split", [False, True])
def test_members_of_a_roster_are_folded_into_the_rows(rows_split):
  params, args = weights(bias=False), rows(8, lead=(3,))
  actual = over_devices(mesh(4, 2), "blocks", params, args, rows_split)
  for i in range(3):
    assert_close(actual[i], on_one("dense", params, 1, *(a[i] for a in args)))


@pytest.mark.parametrize("hot", [None, (0, 1, 2), (7, 0, 6), (4, 5, 3)], ids=str)
@pytest.mark.parametrize("room", [1, 3, 32])
@pytest.mark.parametrize("expert,tensor", [(4, 2), (8, 1), (2, 1)])
def test_exchanged_rows_all_come_to_their_experts(monkeypatch, expert, tensor, room, hot):
  monkeypatch.setattr(parallel, "exchange_room", lambda *sizes: room)
  params, args = weights(), rows(32, hot=hot)
  actual = over_devices(mesh(expert, tensor), "blocks", params, args, True)
  assert_close(actual, on_one("dense", params, 1, *args))


def test_devices_with_different_numbers_of_turns_wait_for_each_other(monkeypatch):
  """Only one of two groups of devices has rows that take more than one turn."""
  monkeypatch.setattr(parallel, "exchange_room", lambda *sizes: 2)
  params, (x, indices, gates) = weights(), rows(64)
  indices = indices.at[:32].set(jnp.asarray([0, 1, 2]))
  spec = P(("data", "expert"))
  run = jax.jit(sharding.by_parts(
      lambda params, *args: experts_lib.apply(params, 0, *args, "blocks", rows_split=True),
      mesh(4, data=2), (_WEIGHTS, spec, spec, spec), spec))
  assert_close(run(params, x, indices, gates), on_one("dense", params, 0, x, indices, gates))


def test_what_is_exchanged_and_what_is_gathered():
  assert parallel.exchange_room(127, 2, 8) == 0  # few rows
  assert parallel.exchange_room(128, 8, 8) == 0  # of which most would go to most devices
  assert parallel.exchange_room(128, 2, 8) == 40  # 1.25 * 128 * (1 - (7/8)^2) = 37.5
  assert parallel.exchange_room(4096, 8, 64) == 608


def test_an_exchange_moves_less_than_a_gathering():
  n, devices = 128, 8
  args = rows(n * devices)
  moved = {}
  for room in (0, parallel.exchange_room(n, 2, devices)):
    args = args[0], args[1][:, :2], args[2][:, :2]
    text = _lowered(mesh(devices), weights(bias=False), args, room)
    moved[room] = max(_rows_moved(text))
  assert moved == {0: n * devices, 40: 40 * devices}


def _lowered(on, params, args, room):
  def part(params, *args):
    share = functools.partial(_dense, params)
    if room:
      return parallel.exchanged(share, E // 8, *args, room)
    return parallel.gathered(share, E // 8, *args)

  specs = _WEIGHTS.replace(gate_up_bias=None, down_bias=None)
  run = sharding.by_parts(part, on, (specs, P("expert"), P("expert"), P("expert")), P("expert"))
  return jax.jit(run).lower(params, *args).compile().as_text()


def _dense(params, *args):
  return experts_lib.apply(params, 0, *args, "dense")


def _rows_moved(text):
  """Rows of width D in the results of all collectives of a compiled program."""
  for line in text.splitlines():
    if any(f" {name}(" in line for name in ("all-gather", "all-to-all")):
      shapes = [s.split("]")[0] for s in line.split("(%")[0].split("f32[")[1:]]
      sizes = [int(np.prod([int(d) for d in s.split(",")])) for s in shapes]
      if sum(sizes) % D == 0:
        yield sum(sizes) // D
