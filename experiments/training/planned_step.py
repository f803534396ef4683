"""The --dry_run report of a training step: memory per device, and bytes that collectives send.

Reads only the model's config and allocates nothing; see `costs.train_steps`. A compiled step can be
measured next to the estimates: on forced host devices, for any number of devices.
"""

from collections import Counter
from collections.abc import Iterator
import dataclasses

import jax
from jax.sharding import AbstractMesh

from experiments.cli import dry_run
from roe_jax import costs, sharding
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.costs import hlo, train_steps
from roe_jax.costs.train_steps import TrainingMemory
from roe_jax.training import TrainSettings


@dataclasses.dataclass(frozen=True)
class Plan:
  """A training step to estimate.

  Attributes:
    config: the model's config.
    settings: the training settings.
    batch_size: sequences per step.
    length: tokens per sequence.
    accelerator: a name in `costs.ACCELERATORS`; None to compare with no memory.
  """

  config: ModelConfig
  settings: TrainSettings
  batch_size: int
  length: int
  accelerator: str | None = None

  def __post_init__(self):
    if not 2 <= self.length <= self.config.context_length:
      raise ValueError(
        f"--length must lie in [2, {self.config.context_length}] (the model's context), "
        f"got {self.length}"
      )
    if self.config.formats:
      raise ValueError(
        f"quantized weights ({self.config.formats}) are not trained: choose a model without them"
      )
    if self.settings.members > 1:
      raise ValueError("--dry_run estimates training without --members: remove it")
    if self.batch_size % self.settings.balance_groups:
      raise ValueError(
        f"--balance_groups={self.settings.balance_groups} must divide the batch of "
        f"{self.batch_size}"
      )

  @property
  def usable(self) -> float | None:
    """Usable bytes per device."""
    if self.accelerator is None:
      return None
    return dry_run.USABLE * costs.ACCELERATORS[self.accelerator].memory

  def memory(self, mesh: AbstractMesh) -> TrainingMemory:
    """Returns the peak memory per device."""
    return train_steps.training_memory(
      self.config, self.settings, mesh, self.batch_size, self.length
    )

  def fits(self, mesh: AbstractMesh) -> bool:
    return self.usable is None or self.memory(mesh).total <= self.usable

  def rematerialized(self) -> "Plan":
    """Returns the step with the settings that take the least memory."""
    settings = dataclasses.replace(self.settings, rematerialize=True, strategy="dense")
    return dataclasses.replace(self, settings=settings)


@dataclasses.dataclass(frozen=True)
class CompiledStep:
  """What the compiler says of a training step on one device.

  Attributes:
    arguments: bytes of parameters, moments and the batch.
    temporaries: bytes of gradients and activations.
    collectives: how often each collective runs.
  """

  arguments: int
  temporaries: int
  collectives: Counter[hlo.Collective]


def compile_step(plan: Plan, mesh: AbstractMesh) -> CompiledStep:
  """Compiles a training step for the host's devices, as many as the mesh has.

  Raises:
    ValueError: there are fewer.
  """
  if len(jax.devices()) < mesh.size:
    raise ValueError(f"a mesh of {mesh.size} devices needs as many, and {len(jax.devices())} exist")
  devices = sharding.make_mesh(plan.config, **mesh.shape)
  sizes = plan.batch_size, plan.length
  done = train_steps.lower_step(plan.config, plan.settings, devices, *sizes).compile()
  memory, text = done.memory_analysis(), done.as_text()
  assert memory is not None and text is not None
  bytes_of = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  return CompiledStep(*bytes_of, hlo.count_collectives(text))


def report(plan: Plan, mesh: AbstractMesh, compiled: CompiledStep | None = None) -> str:
  """Returns the report as text."""
  sections = [_step(plan, mesh), _memory(plan, mesh, compiled)]
  if mesh.size > 1:
    sections.append(_sent(plan, mesh, compiled))
  if plan.usable is not None and not plan.fits(mesh):
    sections.append(_alternatives(plan, mesh))
  return "\n\n".join("\n".join(lines) for lines in sections)


def _step(plan, mesh) -> Iterator[str]:
  config, settings = plan.config, plan.settings
  yield (
    f"model    {config.family}: {params_lib.count(config) / 1e9:.1f} G parameters ({config.dtype}, "
    f"also moments and gradients), {config.num_layers} layers, {config.experts_per_token} of "
    f"{config.num_experts} experts"
  )
  yield (
    f"step     {plan.batch_size * plan.length} tokens, {plan.batch_size} sequences of "
    f"{plan.length}; {'' if settings.rematerialize else 'not '}rematerialized, experts "
    f"{settings.strategy}"
  )
  yield f"mesh     {dry_run.sizes_of(mesh)}, {mesh.size} x {plan.accelerator or 'device'}"


def _line(name, *values):
  return f"  {name:32}" + "".join(f"{v / 1e9:12.3f}" for v in values)


def _memory(plan, mesh, compiled) -> Iterator[str]:
  found = plan.memory(mesh)
  temporaries = found.gradients + found.sums + found.activations
  yield f"{'memory per device':34}{'GB':>12}" + f"{'compiled':>12}" * (compiled is not None)
  yield _line("parameters", found.weights)
  yield _line("moments of the optimizer", found.moments)
  yield _line("gradients", found.gradients)
  yield _line("gradients summed over devices", found.sums)
  yield _line("activations, about", found.activations)
  if compiled is not None:
    yield _line("parameters and moments", found.weights + found.moments, compiled.arguments)
    yield _line("gradients and activations", temporaries, compiled.temporaries)
  total = () if compiled is None else (compiled.arguments + compiled.temporaries,)
  yield _line("total", found.total, *total)
  if plan.usable is not None:
    verdict = "fits" if found.total <= plan.usable else "DOES NOT FIT"
    yield f"  {verdict}: {plan.usable / 1e9:.1f} GB usable of each {plan.accelerator}"


def _sent(plan, mesh, compiled) -> Iterator[str]:
  sizes = plan.batch_size, plan.length
  found = train_steps.training_collectives(plan.config, plan.settings, mesh, *sizes)
  yield f"{'sent per device and step':34}{'GB':>12}" + f"{'compiled':>12}" * (compiled is not None)
  for name, of in found.items():
    yield _line(name, _bytes(of))
  columns = [sum(found.values(), Counter())]
  if compiled is not None:
    columns.append(compiled.collectives)
  for kind in hlo.KINDS:
    if any(values := [_bytes(c, kind) for c in columns]):
      yield _line(f"by {kind}", *values)
  yield _line("total", *map(_bytes, columns))


def _bytes(collectives, kind=None):
  return sum(c.bytes_sent * n for c, n in collectives.items() if kind in (None, c.kind))


def _alternatives(plan, mesh) -> Iterator[str]:
  """What would fit: rematerialization, a smaller batch on as many devices, more devices."""
  least, devices = plan.rematerialized(), mesh.size
  smaller, fewer = plan.batch_size // 2, None
  while not (found := _fitting(plan, devices, least)) and devices < dry_run.MOST_DEVICES:
    if devices == mesh.size:
      while smaller and not (fewer := _fitting(_of_batch(least, smaller), devices)):
        smaller //= 2
      if fewer:
        yield fewer + f" --batch_size={smaller}"
    devices *= 2
  yield found or (
    f"no mesh of up to {dry_run.MOST_DEVICES} {plan.accelerator} fits with this --batch_size"
  )


def _of_batch(plan, batch_size):
  settings = dataclasses.replace(plan.settings, balance_groups=1)
  return dataclasses.replace(plan, settings=settings, batch_size=batch_size)


def _fitting(plan, devices, least=None):
  """Names the mesh that takes the least memory, if a step fits on it; `least` is tried next."""
  meshes = [
    sharding.abstract_mesh(plan.config, devices, **dict(zip(sharding.AXES, sizes)))
    for sizes in sharding.possible_sizes(plan.config, devices)
  ]
  for other in filter(None, (plan, least)):
    total, best = min(((other.memory(m).total, m) for m in meshes), key=lambda pair: pair[0])
    if total <= plan.usable:
      how = "" if other.settings == plan.settings else " --rematerialize --strategy=dense"
      sizes = f"--mesh={dry_run.sizes_of(best)}{how}"
      return f"{devices} {plan.accelerator} fit, {total / 1e9:.1f} GB on each, with {sizes}"
  return None
