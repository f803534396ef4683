"""Checks a faster implementation on a small case before it is used.

Implementations for accelerators were developed largely without one. One that the
installed compiler rejects, or that computes something else, is reported and not used.
"""

from collections.abc import Callable
import concurrent.futures

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np


def passes(error: Callable[[], float], tolerance: float, what: str, instead: str) -> bool:
  """Returns whether an implementation agrees with its reference; warns if not.

  Inside a `shard_map` over several processes the answer is the same in all of them: true
  only if the check passes in each. The processes must run checks in the same order, as
  they do when they trace the same programs.

  Args:
    error: runs the check and returns the largest error, relative to the largest value.
    tolerance: largest error that passes.
    what: name of the implementation, for the warning.
    instead: name of what is used if the check fails.
  """
  together = jax.process_count() > 1 and bool(jax.sharding.get_abstract_mesh().manual_axes)
  # This is called while a program is traced; another thread has no trace.
  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    failure = thread.submit(_failure, error, tolerance, together).result()
  if failure:
    logging.warning(
      "%s does not work on this device (%s): using %s instead", what, failure, instead
    )
  return not failure


def _failure(error, tolerance, together):
  """Returns why the check fails, "" if it passes."""
  try:
    found = error()
  except Exception as exception:  # any error of a compiler or a driver
    lines = str(exception).strip().splitlines() or [""]
    failure = f"{type(exception).__name__}: {lines[0][:200]}"
  else:
    failure = "" if found <= tolerance else f"it is off by {found:.1e} of the largest value"
  if together:
    failed = multihost_utils.process_allgather(np.bool_(failure))
    if not failure and failed.any():
      failure = f"it fails in process {failed.argmax()}"
  return failure
