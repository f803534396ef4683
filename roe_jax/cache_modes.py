"""Cache modes: the history that a roster's members attend to, and how it is kept.

A mode is an object that allocates, prefills, steps and scores a roster's cache, and counts
what that costs; `roster_caches` has the three of `CACHES`. `Roster.cache_mode` is the
object, and all programs ask it.
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

from flax import struct
import jax

from roe_jax.config import ModelConfig


class Pass(NamedTuple):
  """Positions of one sequence that a roster computes.

  Attributes:
    roster: the `roster.Roster`.
    positions: consecutive positions.
    predicted: at how many of them next-token distributions are computed.
  """

  roster: Any
  positions: range
  predicted: int

  @property
  def tokens(self) -> int:
    """Forward passes: tokens x members."""
    return len(self.positions) * len(self.roster.members)


class Draft(struct.PyTreeNode):
  """What the clean member computed at T positions.

  Attributes:
    x: `[B, T, D]`, its hidden states before the first noise, which all members share.
    logits: `[B, T, V]` float32.
  """

  x: jax.Array
  logits: jax.Array


class CacheMode:
  """A way to keep the history of sequences; subclasses define at least `empty` and `states`.

  Modes are hashable and hold no arrays: compiled functions are cached by them. In all
  methods `roster` is the `roster.Roster`, and `run` a `members.RosterPass`: T tokens of
  each sequence at consecutive positions. A cache is any pytree of arrays with the batch axis
  at -4; keys and values `[..., B, K, S, C]` are sharded on a mesh, others replicated.

  Attributes:
    is_shared: whether all members attend to one history, which member 0 writes. A shared
      cache is prefilled before `states`; others are written by it.
    keeps_history: whether a step computes one position of each sequence; else all again.
    can_draft: whether it has `draft` and `verify`, for drafted tokens and adaptive rosters.
  """

  is_shared = False
  can_draft = False
  keeps_history = True

  def empty(
    self, config: ModelConfig, roster: Any, batch_size: int, capacity: int, rerun: int = 0
  ) -> Any:
    """Returns an empty cache.

    Args:
      config: the model's architecture.
      roster: the settings.
      batch_size: B.
      capacity: S, the number of positions it can hold.
      rerun: how many of the newest positions are run against it again (drafted tokens; all
        of them in scoring and diagnostics): sliding layers keep so many more.
    """
    raise NotImplementedError

  def states(self, run: Any, cache: Any, keep: tuple[str, ...] = ()) -> tuple[jax.Array, Any, Any]:
    """Runs all members at the T positions.

    Args:
      run: the tokens.
      cache: holds the history at earlier positions.
      keep: names of `transformer.BlockOutputs`: "experts", "router_logits" or both.

    Returns:
      Hidden states after the last block, `[R, B, T, D]`; the cache, which holds the T
      positions too unless it is shared; and the `BlockOutputs`, `[L, R, B, T, ...]`.
    """
    raise NotImplementedError

  def prefill(self, run: Any, cache: Any) -> Any:
    """Returns the cache with the T positions written, by the roster of `Roster.history`."""
    return self.states(run, cache)[1]

  def step(self, run: Any, cache: Any) -> tuple[Any, Any]:
    """Returns the `members.RosterOutputs` of T = 1 positions, and the cache with them written."""
    x, cache, _ = self.states(run, cache)
    return run.aggregate(x), cache

  def score(self, run: Any, cache: Any) -> tuple[Any, Any]:
    """Returns the `members.RosterOutputs` of T positions, and the cache.

    If the roster `fills_first`, all positions are in the cache already; else they are
    written here.
    """
    return self.step(run, cache)

  def draft(self, run: Any, cache: Any) -> tuple[Draft, Any]:
    """Runs the clean member alone at T = 1 positions and writes the cache; if it `can_draft`."""
    raise NotImplementedError

  def verify(self, run: Any, cache: Any, draft: Draft) -> Any:
    """Returns the `members.RosterOutputs` of T positions that are drafted; if it `can_draft`.

    Args:
      run: the tokens: the last one, and those drafted after it.
      cache: as the last `draft` returned it.
      draft: what the clean member computed at these positions.
    """
    raise NotImplementedError

  def fills_first(self, roster: Any) -> bool:
    """Returns whether a prefill of whole sequences comes before any position is scored."""
    del roster
    return False

  def bytes(
    self, config: ModelConfig, roster: Any, batch_size: int, capacity: int, rerun: int = 0
  ) -> int:
    """Returns the memory of `empty` in bytes."""
    shapes = jax.eval_shape(lambda: self.empty(config, roster, batch_size, capacity, rerun))
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(shapes))

  def histories(self, num_members: int) -> int:
    """Returns how many cached histories so many members of a sequence read."""
    return 1 if self.is_shared else num_members

  def member_batches(
    self,
    config: ModelConfig,
    roster: Any,
    shape: Sequence[int],
    mesh: Any = None,
    platform: str | None = None,
  ) -> tuple[int, int, int]:
    """Returns in which batches the members run, as `members.batch_sizes`: here as one."""
    del config, shape, mesh, platform
    return len(roster.members), 0, 0

  def generation(self, roster: Any, prompt_length: int, num_new_tokens: int) -> list[Pass]:
    """Returns what is computed to generate tokens after a prompt."""
    last = prompt_length - 1
    return [
      Pass(roster.history(), range(last), 0),
      Pass(roster, range(last, last + num_new_tokens), num_new_tokens),
    ]

  def scoring(self, roster: Any, length: int, start: int = 1) -> list[Pass]:
    """Returns what is computed to score a sequence's tokens from index `start`."""
    before, scored = length - 1 if self.fills_first(roster) else start - 1, length - start
    return [
      Pass(roster.history(), range(before), 0),
      Pass(roster, range(start - 1, length - 1), scored),
    ]


# By name. `Roster.create(cache=)` and `--cache` accept each entry.
CACHES: dict[str, CacheMode] = {}
