"""Trying a faster way on a small case before it is used.

The ways that need an accelerator were made without one at hand: one that the
installed compiler refuses, or that computes something else, is reported and not
used.
"""

from collections.abc import Callable
import concurrent.futures

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np


def passes(difference: Callable[[], float], tolerance: float, what: str, instead: str) -> bool:
  """Whether a way differs from another one by no more than a tolerance; else warns.

  Inside of a `shard_map` of several processes all find the same: it works for
  none of them unless it does for each. They must ask in the same order, as those
  do that trace the same programs.

  Args:
    difference: tries it, and returns the largest difference, relative to the largest value.
    tolerance: of that.
    what: the way's name in a warning.
    instead: what is used if it does not work.
  """
  together = jax.process_count() > 1 and bool(jax.sharding.get_abstract_mesh().manual_axes)
  # The choice is made while a program is traced; another thread is in no trace.
  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    failure = thread.submit(_failure, difference, tolerance, together).result()
  if failure:
    logging.warning(
      "%s does not work on this device (%s): using %s instead", what, failure, instead
    )
  return not failure


def _failure(difference, tolerance, together):
  """Why it does not work; empty if it does."""
  try:
    off = difference()
  except Exception as error:  # whatever a compiler or a driver raises
    lines = str(error).strip().splitlines() or [""]
    failure = f"{type(error).__name__}: {lines[0][:200]}"
  else:
    failure = "" if off <= tolerance else f"it is off by {off:.1e} of the largest value"
  if together:
    failed = multihost_utils.process_allgather(np.bool_(failure))
    if not failure and failed.any():
      failure = f"it does not in process {failed.argmax()}"
  return failure
