"""Experts over devices against all experts on one."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from roe_jax import experts as experts_lib
from roe_jax import kernel_check, sharding
from roe_jax.experts import expert_parallel
from roe_jax.params import ExpertParams

pytestmark = pytest.mark.slow

L, E, D, F, A = 2, 8, 16, 12, 3
_WEIGHTS = ExpertParams(
  P(None, "expert", "tensor"),
  P(None, "expert", "tensor"),
  P(None, "expert", "tensor"),
  P(None, "expert"),
)


def mesh(expert, tensor=1, data=1):
  return jax.make_mesh(
    (data, expert, tensor),
    sharding.AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
    devices=jax.devices()[: data * expert * tensor],
  )


def weights(bias=True, dtype="float32"):
  random = np.random.RandomState(0)
  make = lambda *shape: jnp.asarray(0.5 * random.standard_normal(shape), dtype)
  return ExpertParams(
    make(L, E, F, 2, D), make(L, E, F, D), *((make(L, E, F, 2), make(L, E, D)) if bias else ())
  )


def rows(n, lead=(), hot=None):
  """Inputs, distinct experts and gates; `hot` are experts that all rows choose."""
  random = np.random.RandomState(1)
  indices = np.argsort(random.uniform(size=(*lead, n, E)), axis=-1)[..., :A]
  if hot is not None:
    indices = np.broadcast_to(hot, indices.shape)
  return (
    jnp.asarray(random.standard_normal((*lead, n, D)), jnp.float32),
    jnp.asarray(indices, jnp.int32),
    jnp.asarray(random.uniform(0.1, 1, (*lead, n, A)), jnp.float32),
  )


def over_devices(on, strategy, params, args, tokens_sharded, layer=1):
  """`experts.apply` by parts, on a mesh; a leading axis of the rows is mapped."""
  lead = (None,) * (args[0].ndim - 2)
  row_spec = P(*lead, "expert" if tokens_sharded else None)

  def part(experts, *args):
    run = functools.partial(
      experts_lib.apply,
      expert_parallel.bias_on_one_device(experts),
      layer,
      strategy=strategy,
      tokens_sharded=tokens_sharded,
    )
    return (jax.vmap(run) if lead else run)(*args)

  specs = jax.tree.map(
    lambda spec, _: spec,
    _WEIGHTS.replace(
      **{n: None for n in ("gate_up_bias", "down_bias") if params.down_bias is None}
    ),
    params,
  )
  return jax.jit(sharding.map_shards(part, on, (specs, row_spec, row_spec, row_spec), row_spec))(
    params, *args
  )


@functools.partial(jax.jit, static_argnums=0)
def on_one(strategy, params, layer, *args):
  return experts_lib.apply(params, layer, *args, strategy)


def assert_close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
  assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize(
  "expert,tensor,tokens_sharded", [(8, 1, True), (2, 2, False), (2, 2, True), (1, 4, False)]
)
@pytest.mark.parametrize("strategy", experts_lib.STRATEGIES)
def test_devices_together_compute_what_one_does(strategy, expert, tensor, tokens_sharded):
  params, args = weights(), rows(16)
  expected = on_one("dense", params, 1, *args)
  actual = over_devices(mesh(expert, tensor), strategy, params, args, tokens_sharded and expert > 1)
  assert_close(actual, expected)


@pytest.mark.parametrize("tokens_sharded", [False, True])
def test_sums_over_devices_are_rounded_once(tokens_sharded):
  """In bfloat16, almost all values equal those of one device: partial sums are float32."""
  params, (x, *rest) = weights(dtype="bfloat16"), rows(64)
  args = x.astype(jnp.bfloat16), *rest
  actual = over_devices(mesh(8), "padded", params, args, tokens_sharded)
  assert np.mean(np.asarray(actual) != np.asarray(on_one("padded", params, 1, *args))) < 0.01


@pytest.mark.parametrize("tokens_sharded", [False, True])
def test_members_of_a_roster_are_folded_into_the_rows(tokens_sharded):
  params, args = weights(bias=False), rows(8, lead=(3,))
  actual = over_devices(mesh(4, 2), "tiled_loop", params, args, tokens_sharded)
  for i in range(3):
    assert_close(actual[i], on_one("dense", params, 1, *(a[i] for a in args)))


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
  """`jax.lax.ragged_all_to_all` as its documentation defines it, for CPUs.

  Where that asks for something (sizes that agree, slices within their arrays)
  and does not get it, all values are wrong.
  """
  gather = functools.partial(jax.lax.all_gather, axis_name=axis_name)
  begins, sizes, places = (
    gather(a)[:, jax.lax.axis_index(axis_name)] for a in (input_offsets, send_sizes, output_offsets)
  )
  slot = jnp.arange(len(output))
  result = output
  for operand_i, begin, size, place in zip(gather(operand), begins, sizes, places):
    found = operand_i[jnp.clip(slot - place + begin, 0, len(operand) - 1)]
    result = jnp.where(((slot >= place) & (slot < place + size))[:, None], found, result)
  right = (
    (sizes == recv_sizes).all()
    & (jnp.minimum(begins, places) >= 0).all()
    & (begins + sizes <= len(operand)).all()
    & (places + sizes <= len(output)).all()
  )
  return jnp.where(right, result, jnp.full_like(result, -7))


@pytest.fixture(params=["via_all_to_all", "via_ragged_all_to_all"])
def exchange(request, monkeypatch):
  """The name of the exchange of rows that is chosen."""
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
  monkeypatch.setattr(
    expert_parallel, "_ragged_is_possible", lambda *args: request.param == "via_ragged_all_to_all"
  )
  return request.param


@pytest.mark.parametrize("room, hot", [(1, None), (1, (7, 0, 6)), (3, (0, 1, 2))], ids=str)
@pytest.mark.parametrize("expert,tensor", [(4, 2), (8, 1)])
def test_exchanged_rows_all_come_to_their_experts(monkeypatch, exchange, expert, tensor, room, hot):
  monkeypatch.setattr(expert_parallel, "exchange_capacity", lambda *sizes: room)
  params, args = weights(), rows(32, hot=hot)
  actual = over_devices(mesh(expert, tensor), "tiled_loop", params, args, True)
  assert_close(actual, on_one("dense", params, 1, *args))


def test_rows_without_experts_and_devices_without_rows(monkeypatch, exchange):
  """Choices of no expert, on one device for all of its rows."""
  monkeypatch.setattr(expert_parallel, "exchange_capacity", lambda *sizes: 4)
  params, (x, indices, gates) = weights(), rows(32, hot=(0, 1, 6))
  none = (jnp.arange(32) % 5 == 0) | ((jnp.arange(32) >= 8) & (jnp.arange(32) < 16))
  args = x, jnp.where(none[:, None], E, indices), jnp.where(none[:, None], 0, gates)
  actual = over_devices(mesh(4), "tiled_loop", params, args, True)
  assert_close(actual, on_one("dense", params, 1, *args))
  assert not actual[none].any()


def test_members_are_folded_into_the_rows_that_are_exchanged(monkeypatch, exchange):
  monkeypatch.setattr(expert_parallel, "exchange_capacity", lambda n, *sizes: n // 2)
  params, args = weights(bias=False), rows(16, lead=(3,))
  actual = over_devices(mesh(4, 2), "tiled_loop", params, args, True)
  for i in range(3):
    assert_close(actual[i], on_one("dense", params, 1, *(a[i] for a in args)))


def test_devices_with_different_numbers_of_turns_wait_for_each_other(monkeypatch, exchange):
  """Only one of two groups of devices has rows that take more than one turn."""
  monkeypatch.setattr(expert_parallel, "exchange_capacity", lambda *sizes: 6)
  params, (x, _, gates) = weights(), rows(64)
  # Each device's 8 rows go to two devices, or 4 of them to each.
  first, others = jnp.zeros(32, jnp.int32), jnp.arange(32, dtype=jnp.int32)
  indices = (jnp.concatenate([first, others])[:, None] + jnp.arange(A)[None]) % E
  spec = P(("data", "expert"))
  run = jax.jit(
    sharding.map_shards(
      lambda params, *args: experts_lib.apply(params, 0, *args, "tiled_loop", tokens_sharded=True),
      mesh(4, data=2),
      (_WEIGHTS, spec, spec, spec),
      spec,
    )
  )
  assert_close(run(params, x, indices, gates), on_one("dense", params, 0, x, indices, gates))


MESH = (("data", 2), ("expert", 4), ("tensor", 1))


@pytest.fixture
def tried_anew():
  expert_parallel.ragged_passes.cache_clear()
  yield
  expert_parallel.ragged_passes.cache_clear()


def test_a_ragged_exchange_that_works_is_found_to_do_so(monkeypatch, tried_anew):
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
  # Asked while a program is traced, as the choice is.
  jax.jit(lambda x: x if expert_parallel.ragged_passes(MESH, "bfloat16", 32, 2) else 1 / 0)(1.0)


def _shifted(operand, output, *where, **kwargs):
  return jnp.roll(emulated(operand, output, *where, **kwargs), 1, axis=0)


@pytest.mark.parametrize(
  "broken,reason",
  [
    (jax.lax.ragged_all_to_all, "ragged-all-to-all"),  # CPUs have none
    (_shifted, "off by"),
  ],
  ids=["missing", "wrong"],
)
def test_a_ragged_exchange_that_does_not_work_is_not_used(
  monkeypatch, caplog, tried_anew, broken, reason
):
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", broken)
  assert not expert_parallel.ragged_passes(MESH, "float32", 32, 2)
  assert reason in caplog.text and "using padded exchanges instead" in caplog.text


def test_processes_decide_alike(monkeypatch, caplog):
  """What works here is not used if it fails in another process of the same mesh."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(
    kernel_check.multihost_utils, "process_allgather", lambda failed: np.asarray([failed, True])
  )
  found = []

  def works(x):
    found.append(kernel_check.passes(lambda: 0.0, 1e-5, "it", "another"))
    return x

  jax.jit(works)(1.0)
  jax.jit(sharding.map_shards(works, mesh(2), P(), P()))(1.0)
  assert found == [True, False] and "fails in process 1" in caplog.text


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_what_is_lowered_for_an_accelerator(monkeypatch, platform):
  """One exchange each of rows, choices and gates, and one of results."""
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu" if platform == "tpu" else "gpu")
  monkeypatch.setattr(expert_parallel, "ragged_passes", lambda *args: True)
  monkeypatch.setattr(expert_parallel, "exchange_capacity", lambda *sizes: 8)
  spec = P("expert")
  run = jax.jit(
    sharding.map_shards(
      lambda params, *args: experts_lib.apply(params, 0, *args, "ragged_dot", tokens_sharded=True),
      mesh(8),
      (_WEIGHTS, spec, spec, spec),
      spec,
    )
  )
  text = run.trace(weights(), *rows(64)).lower(lowering_platforms=(platform,)).as_text()
  assert text.count("@ragged_all_to_all") == 4 and 'all_to_all"' not in text


def test_what_is_exchanged_and_what_is_gathered():
  assert expert_parallel.exchange_capacity(127, 2, 8) == 0  # few rows
  assert expert_parallel.exchange_capacity(128, 8, 8) == 0  # of which most would go to most devices
  assert expert_parallel.exchange_capacity(128, 2, 8) == 40  # 1.25 * 128 * (1 - (7/8)^2) = 37.5
  assert expert_parallel.exchange_capacity(4096, 8, 64) == 608


def test_an_exchange_moves_less_than_a_gathering():
  n, devices = 128, 8
  args = rows(n * devices)
  moved = {}
  for room in (0, expert_parallel.exchange_capacity(n, 2, devices)):
    args = args[0], args[1][:, :2], args[2][:, :2]
    text = _lowered(mesh(devices), weights(bias=False), args, room)
    moved[room] = max(_rows_moved(text))
  assert moved == {0: n * devices, 40: 40 * devices}


def _lowered(on, params, args, room):
  def part(params, *args):
    share = functools.partial(_dense, params)
    if room:
      return expert_parallel.via_all_to_all(share, E // 8, *args, room)
    return expert_parallel.via_all_gather(share, E // 8, *args)

  specs = _WEIGHTS.replace(gate_up_bias=None, down_bias=None)
  run = sharding.map_shards(part, on, (specs, P("expert"), P("expert"), P("expert")), P("expert"))
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
