"""Expected cost of drafted tokens and of members that run only where the clean one is unsure."""

import dataclasses
from typing import Any

from jax.sharding import AbstractMesh

from roe_jax import settling
from roe_jax.config import ModelConfig
from roe_jax.costs import calls as calls_lib
from roe_jax.costs.accelerators import Accelerator
from roe_jax.costs.calls import DeviceCost
from roe_jax.roster import Roster


@dataclasses.dataclass(frozen=True)
class Round:
  """What advances all sequences of a batch by some tokens; expected values.

  Attributes:
    calls: how often each call runs, one after the other.
    tokens: tokens that each sequence gains.
    forward_passes: tokens x members that each sequence takes.
  """

  calls: tuple[tuple[float, DeviceCost], ...]
  tokens: float
  forward_passes: float

  def seconds(self, accelerator: Accelerator) -> float:
    """Bounds the time of the round; see `calls.seconds`."""
    return sum(n * calls_lib.seconds(cost, accelerator).total for n, cost in self.calls)

  def bytes_read(self) -> float:
    """Returns the bytes that a device reads in the round."""
    return sum(n * cost.bytes_read for n, cost in self.calls)

  def flops(self) -> float:
    """Returns the FLOPs of a device in the round."""
    return sum(n * cost.flops for n, cost in self.calls)


def kept_tokens(count: int, acceptance: float) -> float:
  """Returns how many of J drafted tokens are kept on average: `sum_{j<J} acceptance^j`.

  The roster's own token replaces the first that it does not choose, so one is kept at least
  (arXiv 2211.17192, equation 1, where one more is kept of a round that is accepted as a whole).

  Args:
    count: J.
    acceptance: probability that the roster chooses a drafted token, if it chose those before.
  """
  return sum(acceptance**j for j in range(count))


def expected_pieces(positions: int, size: int, unsure: float) -> float:
  """Returns how many pieces of gathered positions run on average; see `settling.complete`.

  The smaller pieces of a rest, which CPUs have, count as a whole one.

  Args:
    positions: of all sequences.
    size: positions in a piece.
    unsure: the share of positions where members run, each independently of the others.
  """
  import scipy.stats  # slow to import

  return sum(scipy.stats.binom.sf(range(0, positions, size), positions, unsure).tolist())


def generation_round(
  config: ModelConfig,
  roster: Roster,
  mesh: AbstractMesh,
  batch_size: int,
  context: int,
  *,
  acceptance: float = 1.0,
  unsure: float = 1.0,
  overlap: float | None = None,
  platform: str | None = None,
) -> Round:
  """Returns a decode step, or with `roster.draft_tokens` J steps of the clean member and a check.

  Assumptions, in addition to those of `calls.call`: J stays the roster's, tokens are accepted and
  positions are unsure independently of each other, and `roster.member_stop` stops nothing.

  Args:
    config: the model's architecture.
    roster: the settings.
    mesh: see `calls.call`.
    batch_size: sequences.
    context: positions of each sequence before this round.
    acceptance: see `kept_tokens`; matters with `roster.draft_tokens` only.
    unsure: share of the positions where members run; matters with `roster.unsure` only.
    overlap: see `flops.expected_unique_experts`.
    platform: see `calls.call`.
  """
  sizes = mesh, batch_size, context
  more: dict[str, Any] = dict(overlap=overlap, platform=platform)
  num_drafted = 0 if roster.is_baseline else roster.draft_tokens
  if not (num_drafted or roster.clean_runs_first):
    cost = calls_lib.call(config, roster, *sizes, kind="step", **more)
    return Round(((1, cost),), 1, len(roster.members))
  count = max(1, num_drafted)
  clean = calls_lib.call(config, roster.history(), *sizes, kind="step", **more)
  verify = _verify(config, roster, *sizes, count, unsure, **more)
  passes = count * (1 + _share(roster, unsure) * (len(roster.members) - 1))
  return Round(((count, clean), *verify), kept_tokens(count, acceptance), passes)


def scoring_round(
  config: ModelConfig,
  roster: Roster,
  mesh: AbstractMesh,
  batch_size: int,
  context: int,
  positions: int,
  *,
  unsure: float = 1.0,
  overlap: float | None = None,
  platform: str | None = None,
) -> Round:
  """Returns the scoring of a chunk of positions, without the prefill before it.

  The arguments and assumptions are those of `generation_round` and `calls.call`.
  """
  sizes = mesh, batch_size, context
  more: dict[str, Any] = dict(overlap=overlap, platform=platform)
  if not roster.clean_runs_first:
    cost = calls_lib.call(config, roster, *sizes, positions, kind="score", **more)
    return Round(((1, cost),), positions, positions * len(roster.members))
  clean = calls_lib.call(config, roster.history(), *sizes, positions, kind="score", **more)
  verify = _verify(config, roster, *sizes, positions, unsure, **more)
  passes = positions * (1 + _share(roster, unsure) * (len(roster.members) - 1))
  return Round(((1, clean), *verify), positions, passes)


def _share(roster, unsure):
  """Returns the share of the positions where members run."""
  return 1.0 if roster.unsure is None else unsure


def _verify(config, roster, mesh, batch_size, context, positions, unsure, **more):
  """Returns the calls of the noisy members after the clean one; see `CleanCache.verify`."""
  share, kind = _share(roster, unsure), "verify"
  if roster.is_adaptive and mesh.size == 1:
    rows = batch_size * positions
    size = settling.piece_size(config, roster, rows, more["platform"])
    times, shape = expected_pieces(rows, size, share), (size, context, 1)
  else:
    if mesh.size > 1 and not roster.clean_runs_first:
      kind = "score"  # all members: their number fits the mesh
    any_unsure = 1 - (1 - share) ** (batch_size * positions)
    times, shape = any_unsure, (batch_size, context, positions)
  return ((times, calls_lib.call(config, roster, mesh, *shape, kind=kind, **more)),)
