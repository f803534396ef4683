"""The --dry_run report: estimated memory, FLOPs and time of a run on a given machine.

Reads only the model's config and uses no device. `roe_jax.costs` documents what is exact
and what is assumed.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any

from jax.sharding import AbstractMesh

from roe_jax import batching, costs, decode, prefill, scoring, sharding
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.costs import DeviceCost, Memory, rounds
from roe_jax.costs.rounds import Round
from roe_jax.roster import Roster

# Fraction of device memory that a run can use; the rest is for the platform and fragmentation.
USABLE = 0.9
# Alternative meshes shown.
OTHERS = 5
# Largest number of devices tried when the model does not fit.
MOST_DEVICES = 4096


@dataclasses.dataclass(frozen=True)
class Plan:
  """A run to estimate.

  Attributes:
    config: the model's config.
    roster: the roster.
    batch_size: sequences per batch.
    length: tokens per sequence, including the prompt.
    scoring: whether sequences are scored instead of generated.
    accelerator: a name in `costs.ACCELERATORS`; None to estimate no times.
    overlap: see `costs.expected_unique_experts`.
    acceptance, unsure: see `rounds.generation_round`; None: at most.
  """

  config: ModelConfig
  roster: Roster
  batch_size: int
  length: int
  scoring: bool = False
  accelerator: str | None = None
  overlap: float | None = None
  acceptance: float | None = None
  unsure: float | None = None

  def __post_init__(self):
    if not self.roster.cache_mode.keeps_history:
      raise ValueError("--dry_run estimates rosters with a KV cache only: remove --cache=none")
    if not 2 <= self.length <= self.config.context_length:
      raise ValueError(
        f"--length must lie in [2, {self.config.context_length}] (the model's context), "
        f"got {self.length}"
      )
    shares = {"overlap": self.overlap, "acceptance": self.acceptance, "unsure_share": self.unsure}
    for name, share in shares.items():
      if share is not None and not 0 <= share <= 1:
        raise ValueError(f"--{name} must lie in [0, 1], got {share}")
    if self.acceptance is not None and (self.scoring or not self.roster.draft_tokens):
      raise ValueError(
        "--acceptance applies to generation with --draft_tokens only: add that or remove this"
      )
    if self.unsure is not None and self.roster.unsure is None:
      raise ValueError("--unsure_share applies to rosters with --unsure only: add it")

  @property
  def ordinary(self) -> "Plan":
    """The run without drafts, with all members at all positions."""
    roster = self.roster.replace(draft_tokens=0, unsure=None, member_stop=None)
    return dataclasses.replace(self, roster=roster, acceptance=None, unsure=None)

  @property
  def baseline(self) -> "Plan":
    """The run without a roster."""
    roster = Roster.create(self.config, memory_budget=self.roster.memory_budget)
    return dataclasses.replace(self.ordinary, roster=roster)

  @property
  def device(self) -> costs.Accelerator | None:
    return None if self.accelerator is None else costs.ACCELERATORS[self.accelerator]

  @property
  def usable(self) -> float | None:
    """Usable bytes per device."""
    return self.device and USABLE * self.device.memory

  @property
  def filled_first(self) -> bool:
    """Whether a prefill fills the cache before positions are scored."""
    return self.scoring and self.roster.cache_mode.fills_first(self.roster)

  @property
  def capacity(self) -> int:
    return batching.bucket(self.length + (not self.scoring), prefill.MIN_CAPACITY)

  @property
  def platform(self) -> str | None:
    return self.device and self.device.platform

  @property
  def prefill_positions(self) -> int:
    return min(prefill.PREFILL_CHUNK, self.length)

  def positions(self, mesh: AbstractMesh) -> int:
    """Returns the positions of each sequence in one forward pass of the roster."""
    if not self.scoring:
      return 1
    return scoring.default_chunk_size(
      self.config, self.roster, self.batch_size, self.length - 1, mesh, self.platform
    )

  def memory(self, mesh: AbstractMesh) -> Memory:
    """Returns the peak memory per device."""

    def of(roster, positions, kind):
      sizes = mesh, self.batch_size, self.capacity, positions
      return costs.memory(self.config, roster, *sizes, kind=kind, platform=self.platform)

    drafted = 0 if self.scoring or self.roster.is_baseline else self.roster.draft_tokens
    kind = "score" if self.scoring else "step"
    most = of(self.roster, max(drafted, self.positions(mesh)), kind)
    if self.scoring and not self.filled_first:
      return most
    prefill = of(self.roster.history(), self.prefill_positions, "prefill")
    return dataclasses.replace(most, activations=max(most.activations, prefill.activations))

  def prefill(self, mesh: AbstractMesh) -> DeviceCost:
    """Returns the cost of prefilling one chunk of all sequences, at half their length."""
    roster, middle = self.roster.history(), self.length // 2
    return self._cost(mesh, roster, middle, self.prefill_positions, "prefill")

  def call(self, mesh: AbstractMesh) -> DeviceCost:
    """Returns the cost of the last decode step, or of scoring a chunk at half the length."""
    context = self.length // 2 if self.scoring else self.length - 1
    kind = "score" if self.scoring else "step"
    return self._cost(mesh, self.roster, context, self.positions(mesh), kind)

  def _cost(self, mesh, roster, context, positions, kind):
    sizes = mesh, self.batch_size, context, positions
    return costs.call(
      self.config, roster, *sizes, kind=kind, overlap=self.overlap, platform=self.platform
    )

  def round(self, mesh: AbstractMesh) -> Round:
    """Returns the expected calls of a decode step, of a round of drafts, or of scoring a chunk."""
    unsure = 1.0 if self.unsure is None else self.unsure
    more: dict[str, Any] = dict(unsure=unsure, overlap=self.overlap, platform=self.platform)
    sizes = self.config, self.roster, mesh, self.batch_size
    if self.scoring:
      return rounds.scoring_round(*sizes, self.length // 2, self.positions(mesh), **more)
    acceptance = 1.0 if self.acceptance is None else self.acceptance
    return rounds.generation_round(*sizes, self.length - 1, acceptance=acceptance, **more)

  def seconds(self, mesh: AbstractMesh) -> float:
    """Returns the time of a token of each sequence, or of scoring a batch of sequences."""
    assert self.device  # without an accelerator there is no time
    of = self.round(mesh)
    call = of.seconds(self.device)
    if not self.scoring:
      return call / of.tokens
    chunks = -(-self.length // self.positions(mesh))
    fills = -(-self.length // self.prefill_positions) if self.filled_first else 0
    return chunks * call + fills * costs.seconds(self.prefill(mesh), self.device).total


def report(plan: Plan, mesh: AbstractMesh) -> str:
  """Returns the report as text."""
  sections = [_model(plan, mesh), _memory(plan, mesh), _work(plan, mesh)]
  if plan.roster.draft_tokens or plan.roster.unsure is not None:
    sections.append(_expected(plan, mesh))
  if plan.device:
    sections.append(_meshes(plan, mesh))
  return "\n\n".join("\n".join(lines) for lines in sections)


def sizes_of(mesh: AbstractMesh) -> str:
  """Formats a mesh as --mesh takes it."""
  return ",".join(f"{axis}:{size}" for axis, size in mesh.shape.items())


def _model(plan, mesh) -> Iterator[str]:
  config, roster = plan.config, plan.roster
  first, end = roster.noisy_layers
  what = config.formats or config.dtype
  yield (
    f"model    {config.family}: {params_lib.count(config) / 1e9:.1f} G parameters ({what}), "
    f"{config.num_layers} layers, {config.experts_per_token} of {config.num_experts} experts"
  )
  yield (
    f"roster   n = {roster.num_members}, {end - first} layers with noise, from layer {first}; "
    f"{roster.cache} cache"
    if end > first
    else "roster   none"
  )
  yield (
    f"batch    {'score' if plan.scoring else 'generate'} {plan.batch_size} sequences of "
    f"{plan.length} tokens"
  )
  yield f"mesh     {sizes_of(mesh)}, {mesh.size} x {plan.accelerator or 'device'}"


def _memory(plan, mesh) -> Iterator[str]:
  lines = _bytes(plan, mesh)
  yield f"{'memory per device':34}{'GB':>10}"
  for name, size in lines.items():
    yield f"  {name:32}{size / 1e9:10.3f}"
  total = sum(lines.values())
  yield f"  {'total':32}{total / 1e9:10.3f}"
  if plan.device:
    verdict = "fits" if total <= plan.usable else "DOES NOT FIT"
    yield (
      f"  {verdict}: {plan.usable / 1e9:.1f} GB usable ({100 * USABLE:.0f} % of "
      f"{plan.device.memory / 1e9:.0f} GB)"
    )


def _bytes(plan, mesh):
  """{name: bytes per device}."""
  found = plan.memory(mesh)
  lines = {"weights": found.weights, "KV cache": found.cache}
  if not plan.scoring:
    ready = max(1, plan.batch_size // decode.READY_SHARE)
    lines[f"KV cache of {ready} prefilled prompts"] = found.cache * ready // plan.batch_size
  return lines | {"tokens": found.tokens, "activations, about": found.activations}


def total_bytes(plan: Plan, mesh: AbstractMesh) -> int:
  """Returns the peak memory per device."""
  return sum(_bytes(plan, mesh).values())


def _work(plan, mesh) -> Iterator[str]:
  plans = [plan.ordinary]
  if not plan.roster.is_baseline:
    plans.append(plan.baseline)
  calls = [p.call(mesh) for p in plans]
  positions = plan.positions(mesh)
  what = f"{positions} positions per sequence" if plan.scoring else "one decode step"
  yield f"{what:34}" + "".join(f"{f'n = {p.roster.num_members}':>12}" for p in plans)

  def line(name, values, digits=3):
    return f"  {name:32}" + "".join(f"{v:12.{digits}f}" for v in values)

  tokens, num_experts = plan.batch_size * positions, plan.config.num_experts
  yield line(
    f"active experts of {num_experts}" + (", at most" if plan.overlap is None else ""),
    [
      costs.expected_unique_experts(plan.config, len(p.roster.members), tokens, plan.overlap)
      for p in plans
    ],
    1,
  )
  yield line("reads of the weights", [_num_batches(p, mesh) for p in plans], 0)
  yield line("TFLOPs per device", [c.flops / 1e12 for c in calls])
  for name in ("weights", "cache", "logits"):
    yield line(f"GB of {name} read", [getattr(c, name) / 1e9 for c in calls])
  yield line("collectives", [c.num_collectives for c in calls], 0)
  yield line("GB sent per device", [c.bytes_sent / 1e9 for c in calls])
  if plan.device:
    yield from _times(plans, mesh, calls, line)
  yield line("GFLOPs per token, all devices", [_token_flops(p) / 1e9 for p in plans])


def _expected(plan, mesh) -> Iterator[str]:
  """What drafts and sure positions save."""
  plans = {
    "as given": plan,
    f"n = {plan.roster.num_members}": plan.ordinary,
    "n = 1": plan.baseline,
  }
  of = [p.round(mesh) for p in plans.values()]
  yield f"{'expected per token':34}" + "".join(f"{name:>12}" for name in plans)

  def line(name, values, digits=3):
    return f"  {name:32}" + "".join(f"{v:12.{digits}f}" for v in values)

  if drafted := plan.roster.draft_tokens * (not plan.scoring):
    of_tokens = "tokens kept of" + (" (at most)" if plan.acceptance is None else "")
    yield line(f"{of_tokens} {drafted}", [of[0].tokens])
  if plan.roster.unsure is not None:
    name = "share of unsure positions" + (", at most" if plan.unsure is None else "")
    yield line(name, [1.0 if plan.unsure is None else plan.unsure])
  yield line("forward passes", [r.forward_passes / r.tokens for r in of], 2)
  yield line("GB read per device", [r.bytes_read() / r.tokens / 1e9 for r in of])
  yield line("TFLOPs per device", [r.flops() / r.tokens / 1e12 for r in of])
  if plan.device:
    times = [r.seconds(plan.device) / r.tokens for r in of]
    yield line("ms per token", [1e3 * t for t in times])
    yield line("time relative to n = 1", [t / times[-1] for t in times], 2)
    yield line("speedup of the roster", [times[1] / times[0]], 2)


def _num_batches(plan, mesh):
  """Number of batches of members, as the memory budget requires."""
  shape = plan.batch_size, plan.positions(mesh)
  mode, platform = plan.roster.cache_mode, plan.platform
  return 1 + mode.member_batches(plan.config, plan.roster, shape, mesh, platform)[1]


def _times(plans, mesh, calls, line):
  times = [costs.seconds(c, plans[0].device) for c in calls]
  for name in ("arithmetic", "reading", "communication"):
    yield line(f"ms of {name}", [1e3 * getattr(t, name) for t in times])
  yield line("ms in total", [1e3 * t.total for t in times])
  seconds = [p.seconds(mesh) for p in plans]
  yield line(
    "tokens/s" + (" with clean prefill" if plans[0].filled_first else ""),
    [p.batch_size * (p.length if p.scoring else 1) / s for p, s in zip(plans, seconds)],
    0,
  )
  yield line("time relative to n = 1", [s / seconds[-1] for s in seconds], 2)
  if not plans[0].scoring:
    yield line(
      "prefill, tokens/s",
      [
        p.batch_size * p.prefill_positions / costs.seconds(p.prefill(mesh), p.device).total
        for p in plans
      ],
      0,
    )


def _token_flops(plan):
  if plan.scoring:
    return costs.scoring_flops(plan.config, plan.roster, plan.length) / (plan.length - 1)
  return costs.forward_flops(plan.config, plan.roster, range(plan.length - 1, plan.length))


def _meshes(plan, mesh) -> Iterator[str]:
  """The fastest meshes of this size that fit, or else the smallest size with one."""
  found = _fitting(plan, mesh.size)
  if found:
    yield f"{f'{mesh.size}-device meshes that fit':34}{'GB':>10}{'ms':>12}"
    for other in sorted(found, key=plan.seconds)[:OTHERS]:
      yield (
        f"  {sizes_of(other):32}{total_bytes(plan, other) / 1e9:10.3f}"
        f"{1e3 * plan.seconds(other):12.3f}"
      )
    return
  devices = mesh.size
  while not found and devices < MOST_DEVICES:
    devices *= 2
    found = _fitting(plan, devices)
  if not found:
    yield (
      f"no mesh of up to {MOST_DEVICES} {plan.accelerator} fits: use a smaller --batch_size or "
      "--length, or quantize the experts"
    )
  else:
    best = min(found, key=plan.seconds)
    yield (
      f"no {mesh.size}-device mesh fits; with {devices} devices: --mesh={sizes_of(best)}, "
      f"{total_bytes(plan, best) / 1e9:.3f} GB, {1e3 * plan.seconds(best):.3f} ms"
    )


def _fitting(plan, num_devices):
  meshes = [
    sharding.abstract_mesh(plan.config, num_devices, **dict(zip(sharding.AXES, sizes)))
    for sizes in sharding.possible_sizes(plan.config, num_devices)
  ]
  return [m for m in meshes if total_bytes(plan, m) <= plan.usable]
