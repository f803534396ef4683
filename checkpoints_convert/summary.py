"""Describes what a conversion would write."""

from collections.abc import Callable
import math
import os
from typing import Any

import jax

from checkpoints_convert import hub
from roe_jax import checkpoint
from roe_jax import params as params_lib
from roe_jax.checkpoint_folder import piece_num_bytes
from roe_jax.config import ModelConfig


def describe_source(
  source: str,
  revision: str | None,
  change: Callable[[ModelConfig], ModelConfig] = lambda config: config,
  **options: Any,
) -> str:
  """Describes a Hugging Face source; of a model on the hub only headers are downloaded.

  Args:
    source: a local folder, or a hub name.
    revision: branch, tag or commit on the hub.
    change: changes the config of the source to that of what would be written.
    **options: see `hub.open_source`.

  Raises:
    ConversionError, ValueError: the source cannot be converted.
  """
  opened = hub.open_without_weights(source, revision, **options)
  stored = ", ".join(opened.stored_dtypes)
  return f"source: {source} (dtypes in its files: {stored})\n" + describe(change(opened.config))


def describe(config: ModelConfig) -> str:
  """Describes the parameters, pieces and sizes of a model, and this machine's devices."""
  rows = [("parameter", "shape", "dtype", "bytes")]
  leaves = checkpoint.named_leaves(params_lib.abstract(config))
  for name, leaf in leaves.items():
    rows.append((name, str(list(leaf.shape)), str(leaf.dtype), f"{_num_bytes(leaf):,}"))
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  lines = [
    f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}".rstrip()
    for a, b, c, d in rows
  ]
  pieces = checkpoint.plan_pieces(config)
  largest = max(piece_num_bytes(config, piece) for piece in pieces)
  total = params_lib.num_bytes(config)
  formats = f", {config.formats}" if config.formats else ""
  lines += [
    "",
    f"model: {config.family}, {params_lib.count(config):,} parameters in {config.dtype}{formats}",
    f"pieces: {len(pieces)}, the largest {_gib(largest)}",
    f"on disk and in memory: {_gib(total)}; while loading at most {_gib(total + largest)}",
    f"host memory: {_gib(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))}",
    "devices:",
    *(f"  {_device(device)}" for device in jax.devices()),
  ]
  return "\n".join(lines)


def _num_bytes(array: jax.ShapeDtypeStruct) -> int:
  return math.prod(array.shape) * array.dtype.itemsize


def _gib(size: int) -> str:
  return f"{size / 2**30:.2f} GiB"


def _device(device) -> str:
  statistics = device.memory_stats() or {}
  limit = statistics.get("bytes_limit")
  memory = f"{_gib(limit)} usable" if limit else "memory unknown"
  return f"{device.device_kind} {device.id}: {memory}"
