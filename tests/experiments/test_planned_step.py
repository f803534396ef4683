"""Estimates of training steps against compiled ones, and the report of `train --dry_run`."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import programs
import pytest

from experiments.training import planned_step
from roe_jax import params as params_lib
from roe_jax import presets, sharding, training
from roe_jax.costs import train_steps

pytestmark = pytest.mark.slow

PANGU = presets.PRESETS["pangu-ultra-moe"]
SMALL = PANGU.replace(
  dtype="float32",
  num_layers=6,
  first_dense_layers=2,
  d_model=512,
  num_heads=16,
  head_dim=96,
  rotary_dim=32,
  v_head_dim=64,
  kv_lora_rank=128,
  q_lora_rank=128,
  num_experts=16,
  d_expert=256,
  d_shared_expert=256,
  d_dense=1024,
  vocab_size=4096,
)
SETTINGS = training.TrainSettings(num_steps=100, rematerialize=True, strategy="dense")


@pytest.mark.parametrize(
  "sizes, changes", [((1, 8, 1), {}), ((2, 2, 2), dict(rematerialize=False))], ids=str
)
def test_estimates_are_those_of_a_compiled_step(sizes, changes):
  """Arguments to 0.1 %, temporaries to 20 %, all bytes that are sent to 7 %."""
  mesh = sharding.abstract_mesh(SMALL, 8, **dict(zip(sharding.AXES, sizes)))
  settings = dataclasses.replace(SETTINGS, **changes)
  plan = planned_step.Plan(SMALL, settings, 32, 128)
  compiled, found = planned_step.compile_step(plan, mesh), plan.memory(mesh)
  assert compiled.arguments == pytest.approx(found.weights + found.moments, rel=1e-3)
  temporaries = found.gradients + found.sums + found.activations
  assert compiled.temporaries == pytest.approx(temporaries, rel=0.2)
  sent = train_steps.training_collectives(SMALL, settings, mesh, 32, 128)
  total = sum(c.bytes_sent * n for of in sent.values() for c, n in of.items())
  measured = sum(c.bytes_sent * n for c, n in compiled.collectives.items())
  assert measured == pytest.approx(total, rel=0.07)
  lines = planned_step.report(plan, mesh, compiled).splitlines()
  (line,) = [line for line in lines if line.startswith("  parameters and moments")]
  assert line.split()[-1] == f"{compiled.arguments / 1e9:.3f}"


def test_moments_are_split_like_parameters_and_nothing_else_is_held():
  """Against the sizes of the arrays of a state that is made on a mesh."""
  config = SMALL.replace(num_layers=3, first_dense_layers=1)
  mesh = sharding.make_mesh(config, data=2, expert=2, tensor=2)
  params = jax.tree.map(
    lambda a, s: jax.device_put(jnp.zeros(a.shape, a.dtype), s),
    params_lib.abstract(config),
    sharding.parameter_shardings(mesh, config),
  )
  moments = training.optimizer(config, SETTINGS).init(params)
  expected = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(moments))
  abstract = sharding.abstract_mesh(config, 8, **mesh.shape)
  found = train_steps.training_memory(config, SETTINGS, abstract, 8, 16)
  assert found.moments == expected
  held = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(params))
  assert (found.weights, found.gradients) == (held, held)


def plan_of(batch_size, accelerator="h100", **changes):
  settings = dataclasses.replace(SETTINGS, **changes)
  return planned_step.Plan(PANGU, settings, batch_size, 512, accelerator)


def test_what_does_not_fit_says_what_would(monkeypatch):
  def report(plan, devices, **sizes):
    mesh = sharding.abstract_mesh(PANGU, devices, **sizes)
    return plan.fits(mesh), planned_step.report(plan, mesh)

  fits, text = report(plan_of(256), 256, expert=256)
  assert not fits and "DOES NOT FIT: 72.0 GB usable of each h100" in text
  found = re.findall(
    r"^(\d+) h100 fit, (\S+) GB on each, with --mesh=data:(\d+),expert:(\d+),tensor:(\d+)"
    r"(?: --batch_size=(\d+))?$",
    text,
    re.M,
  )
  assert len(found) == 2  # a smaller batch, or more devices
  for devices, size, *sizes, batch in found:
    devices = int(devices)
    assert (devices > 256) == (not batch)
    plan = dataclasses.replace(plan_of(256), batch_size=int(batch or 256))
    mesh = sharding.abstract_mesh(PANGU, devices, **dict(zip(sharding.AXES, map(int, sizes))))
    assert plan.fits(mesh) and size == f"{plan.memory(mesh).total / 1e9:.1f}"
  text = report(plan_of(64, rematerialize=False), 256)[1]
  assert re.search(r"^256 h100 fit, .* --rematerialize --strategy=dense$", text, re.M)
  monkeypatch.setattr(planned_step.dry_run, "MOST_DEVICES", 64)
  assert "no mesh of up to 64 t4 fits" in report(plan_of(64, accelerator="t4"), 64)[1]


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(length=1), r"--length must lie in \[2, 131072\]"),
    (dict(config=PANGU.replace(expert_format="int8")), r"experts in int8\) are not trained"),
    (dict(settings=dataclasses.replace(SETTINGS, members=2)), "without --members"),
    (dict(settings=dataclasses.replace(SETTINGS, balance_groups=3)), "--balance_groups=3 must"),
  ],
)
def test_impossible_steps_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(plan_of(64), **changes)


@pytest.mark.parametrize(
  "arguments, expected",
  [
    (
      ["--config=preset:mixtral-8x7b", "--dry_run", "--num_devices=64", "--mesh=expert:8,tensor:8"],
      "step     131072 tokens, 64 sequences of 2048; not rematerialized, experts padded",
    ),
    (["--config=wordmath_tiny", "--mesh=data:2"], "--mesh applies to --dry_run only"),
    (["--config=preset:mixtral-8x7b"], "--output is missing"),
    (["--config=preset:mistral", "--dry_run"], "unknown preset 'mistral'"),
  ],
)
def test_the_program_reports_or_refuses(arguments, expected):
  done = programs.call("experiments.train", *arguments)
  assert expected in done.output + done.errors and "Traceback" not in done.errors
