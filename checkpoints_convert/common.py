"""What both directions of the conversion share."""

from collections.abc import Collection
import pathlib
import shutil

# For each axis of an array where a part of it starts and stops.
Spans = tuple[tuple[int, int], ...]


class ConversionError(ValueError):
  """What was given cannot be converted; the message says why in a sentence."""


def some(names: Collection[str], limit: int = 4) -> str:
  """The first few of `names`, and how many more there are."""
  shown = ", ".join(sorted(names)[:limit])
  return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def check_space(target: str, needed: int) -> None:
  """Raises ConversionError if the disk of `target` has less than `needed` bytes."""
  folders = pathlib.Path(target).absolute().parents
  free = shutil.disk_usage(next(p for p in folders if p.exists())).free
  if free < needed:
    raise ConversionError(
      f"writing {target} needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free"
    )
