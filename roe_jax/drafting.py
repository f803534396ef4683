"""Self-speculative decoding: the clean member drafts tokens, and the whole roster verifies them.

Noise and sampling are addressed by (request, position), so the distributions at drafted positions
are those of ordinary decoding as long as the tokens before are the same: the longest prefix that
the roster agrees with is kept, and its own token where it first differs.
"""

from typing import Any

import jax
import jax.numpy as jnp

from roe_jax import sampling
from roe_jax.config import ModelConfig
from roe_jax.members import RosterOutputs, RosterPass
from roe_jax.params import Params
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler


def draft_and_verify(
  params: Params,
  config: ModelConfig,
  roster: Roster,
  sampler: Sampler,
  tokens_B: jax.Array,
  positions_B: jax.Array,
  request_ids_B: jax.Array,
  running_B: jax.Array,
  cache: Any,
  count: int,
) -> tuple[RosterOutputs, jax.Array, Any]:
  """Drafts J tokens of each sequence, and runs the roster at their positions together.

  Args:
    params: the model's parameters.
    config: its architecture.
    roster: the settings.
    sampler: how drafted tokens are chosen.
    tokens_B: int32, the last token of each sequence.
    positions_B: int32, where it is.
    request_ids_B: uint32.
    running_B: bool, whether the sequence is unfinished.
    cache: holds earlier positions.
    count: J.

  Returns:
    The roster's outputs at J positions from the last token's on, which hold as long as the drafted
    tokens before are the roster's; the tokens drafted there, int32 `[B, J]`; and the cache with
    these positions written.
  """
  mode = roster.cache_mode

  def draft(carry, offset):
    tokens, cache = carry
    positions = positions_B + offset
    run = RosterPass.of_step(params, config, roster, tokens, positions, request_ids_B)
    drafted, cache = mode.draft(run, cache)
    drafted = jax.tree.map(lambda a: a[:, 0], drafted)
    log_probs = jax.nn.log_softmax(drafted.logits, axis=-1)
    token = sampling.choose(sampler, roster.seed, log_probs, request_ids_B, positions)
    return (token, cache), (tokens, token, drafted)

  offsets = jnp.arange(count)
  (_, cache), found = jax.lax.scan(draft, (tokens_B, cache), offsets)
  inputs_BxJ, drafted_BxJ, drafts = jax.tree.map(lambda a: a.swapaxes(0, 1), found)
  positions_BxJ = positions_B[:, None] + offsets[None]
  run = RosterPass(params, config, roster, inputs_BxJ, positions_BxJ, request_ids_B)
  run = run.replace(needed_BxT=jnp.broadcast_to(running_B[:, None], positions_BxJ.shape))
  return mode.verify(run, cache, drafts), drafted_BxJ, cache


class DraftLength:
  """How many tokens to draft: follows the share of them that is kept.

  The lengths are `roster.draft_tokens`, half of it and so on down to 2: each is one program.
  """

  # Chosen so that J becomes 8 at an acceptance rate of 0.9, and 4 at 0.7; not tuned by time.
  _GROW, _SHRINK = 0.8, 0.55
  _WINDOW = 64  # drafted tokens between decisions

  def __init__(self, roster: Roster):
    """Starts with the longest; the baseline needs no drafts."""
    self._sizes = [1 if roster.is_baseline else max(1, roster.draft_tokens)]
    while self._sizes[-1] > 2:
      self._sizes.append(max(2, self._sizes[-1] // 2))
    self._index = self._kept = self._drafted = 0

  @property
  def size(self) -> int:
    """J of the next rounds; 1 if nothing is drafted."""
    return self._sizes[self._index]

  def update(self, rounds: int, kept: int) -> None:
    """Counts rounds of single sequences, and the tokens that they kept."""
    self._kept += kept
    self._drafted += rounds * self.size
    if self.size == 1 or self._drafted < self._WINDOW:
      return
    share = self._kept / self._drafted
    self._kept = self._drafted = 0
    if share > self._GROW:
      self._index = max(0, self._index - 1)
    elif share < self._SHRINK:
      self._index = min(len(self._sizes) - 1, self._index + 1)
