"""How Orbax stores arrays: in what chunks, with what checksums, and how it fails."""

from collections.abc import Iterator
import contextlib
import functools
import gc
import logging
import os
import re
import sys
import traceback
from typing import Any
import warnings

_CHUNK_BYTES = 32 << 20


class Damage(ValueError):
  """A file is damaged; the message says what was found."""


@contextlib.contextmanager
def checksums() -> Iterator[None]:
  """Adds a CRC-32C to each chunk of the arrays that Orbax writes in this context.

  TensorStore checks it whenever it reads the chunk, in all versions of Orbax. Orbax has no option
  to write it, so its description of arrays is extended. It is for small arrays: see `digests`.
  """
  from orbax.checkpoint._src.serialization import tensorstore_utils  # slow

  name = "_build_zarr3_metadata"
  original: Any = getattr(tensorstore_utils, name, None)
  if original is None:
    warnings.warn("this version of Orbax writes checkpoints without checksums", stacklevel=3)
    yield
    return

  @functools.wraps(original)
  def described(*args, **kwargs):
    metadata = original(*args, **kwargs)
    metadata["codecs"][-1]["configuration"]["codecs"].append({"name": "crc32c"})
    return metadata

  setattr(tensorstore_utils, name, described)
  try:
    yield
  finally:
    setattr(tensorstore_utils, name, original)


@contextlib.contextmanager
def saving() -> Iterator[None]:
  """Sets how arrays are saved: uncompressed, with at most one expert in a chunk.

  Weights compress by only a fifth at a third of the speed. With chunks of one expert, a device
  reads little more than its part.
  """
  from orbax.checkpoint import v1 as ocp  # slow: not when only flags are read

  storage = ocp.options.ArrayOptions.Saving.StorageOptions

  def storage_options(key, value):
    del value
    by_expert = any(getattr(k, "key", None) == "experts" for k in key)
    return storage(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0, 1) if by_expert else None)

  context = ocp.Context()
  context.array.saving.use_compression = False
  context.array.saving.scoped_storage_options_creator = storage_options
  # No copies are needed: `save` blocks, so nothing changes the arrays while they are written.
  context.memory.deepcopy_host_arrays = False
  with context:
    yield


def check_files(folder: str | os.PathLike[str]) -> None:
  """Checks that a folder has files and folders only: reading a pipe would wait forever.

  Raises:
    Damage: it has something else, such as a pipe or a broken link.
  """
  with os.scandir(folder) as entries:
    for entry in entries:
      if entry.is_dir():
        check_files(entry)
      elif not entry.is_file():
        raise Damage(f"{entry.name} is not a file")


@contextlib.contextmanager
def reading(what: str, remedy: str) -> Iterator[None]:
  """Turns the exceptions of damaged files into one sentence, and silences their log messages.

  Args:
    what: what is read, such as "the piece params/top of the checkpoint model".
    remedy: what to do if it is damaged.

  Raises:
    ValueError: it is damaged.
  """
  loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
  levels = [logger.level for logger in loggers]
  for logger in loggers:
    logger.setLevel(logging.CRITICAL)
  try:
    yield
  except Exception as error:  # damaged files raise many types, even a bare Exception
    cause: BaseException = error
    while cause.__cause__ is not None:
      cause = cause.__cause__
    if isinstance(cause, (RuntimeError, MemoryError)):
      raise  # out of memory, not a damaged file
    _silence_other_reads()
    traceback.clear_frames(error.__traceback__)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      gc.collect()  # tasks of other arrays that failed write to the log when they are freed
    raise ValueError(
      f"{what} is damaged and cannot be read: {remedy} ({_reason(cause)})"
    ) from error
  finally:
    for logger, level in zip(loggers, levels):
      logger.setLevel(level)


@functools.cache
def _silence_other_reads() -> None:
  """Silences reads that end after the event loop, which a damaged array has closed."""
  previous = sys.unraisablehook

  def hook(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
      previous(unraisable)

  sys.unraisablehook = hook


def _reason(error: BaseException) -> str:
  text = str(error).strip().split("\n")[0]
  if isinstance(error, Damage):
    return text
  array = re.search(r'"([\w.]+)/c/[^"]*"', text)
  if array and "Digest mismatch" in text:
    return f"the checksum of {array[1]} is wrong"
  return f"{type(error).__name__}: {text[:200]}"
