"""Helpers of all conversions."""

from collections.abc import Callable, Collection, Iterable
import functools
import pathlib
import shutil

from absl import logging
import numpy as np
from tqdm import tqdm

from checkpoints_convert import command_line
from roe_jax import checkpoint
from roe_jax import params as params_lib
from roe_jax.checkpoint_folder import piece_num_bytes

# (start, stop) for each axis of an array.
Spans = tuple[tuple[int, int], ...]


class ConversionError(ValueError):
  """The given model cannot be converted; the message says why in one sentence."""


def some(names: Collection[str], limit: int = 4) -> str:
  """Returns the first few of `names`, and how many more there are."""
  shown = ", ".join(sorted(names)[:limit])
  return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


@functools.cache
def note(message: str) -> None:
  """Logs a warning, once in a process."""
  logging.warning("%s", command_line.printable(message))


def check_space(target: str, needed: int) -> None:
  """Raises ConversionError if the disk of `target` has less than `needed` bytes."""
  folders = pathlib.Path(target).absolute().parents
  free = shutil.disk_usage(next(p for p in folders if p.exists())).free
  if free < needed:
    raise ConversionError(
      f"writing {target} needs {needed / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free"
    )


def write_pieces(
  writer: checkpoint.Writer,
  read: Callable[[list[str]], Iterable[tuple[checkpoint.Piece, dict[str, np.ndarray]]]],
  description: str,
) -> None:
  """Writes the pieces that are missing, with a progress bar, and finishes the checkpoint.

  Args:
    writer: writes the checkpoint.
    read: yields the pieces of the given names with their arrays.
    description: shown before the progress bar.

  Raises:
    ConversionError: the disk is too small.
  """
  config = writer.config
  missing = [piece for piece in writer.pieces if not writer.is_written(piece)]
  needed = sum(piece_num_bytes(config, piece) for piece in missing)
  check_space(str(writer.path), needed)
  total = params_lib.num_bytes(config)
  progress = tqdm(total=total, initial=total - needed, unit="B", unit_scale=True, desc=description)
  with writer, progress:
    for piece, arrays in read([piece.name for piece in missing]):
      writer.write(piece, arrays)
      progress.update(piece_num_bytes(config, piece))
      del arrays  # or they would stay in memory while the next piece is read
