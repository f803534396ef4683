"""Digests of the arrays of a checkpoint's piece, by which a read detects damage.

An array is divided into blocks, one for each layer and expert, and these along the axis that
meshes split into units. A process checks the blocks that it reads whole, and of others the units.
The digest is XXH3; TensorStore's CRC-32C takes more than a tenth of the time of a load.
"""

from collections.abc import Iterator, Mapping
import math
import pathlib
from typing import Any

import jax
import numpy as np
import xxhash

from roe_jax.orbax_storage import Damage

_MOST_UNITS = 16  # along an axis; so meshes of 2, 4, 8 and 16 devices split no unit
_EXPERTS = "experts."


def write(folder: pathlib.Path, arrays: Mapping[str, Any], num_lead: int) -> None:
  """Writes the digests of what this process holds of a piece's arrays.

  Args:
    folder: the piece's folder.
    arrays: the arrays, named as in `checkpoint_folder.piece_shapes`.
    num_lead: number of leading axes of layers, 0 or 1.
  """
  found = {}
  for name, array in arrays.items():
    units = _Units(name, array.shape, num_lead)
    found[name] = np.zeros(units.grid, np.uint64)  # 0: of another process
    for unit, digest in units.digests(array, all_units=True):
      found[name][unit] = digest
  partial = _file(folder).with_suffix(".partial")
  with open(partial, "wb") as file:
    np.savez(file, allow_pickle=False, **found)
  partial.rename(_file(folder))


def are_written(folder: pathlib.Path) -> bool:
  """Whether this process has written its digests."""
  return _file(folder).is_file()


def _file(folder):
  return folder / f"digests_{jax.process_index()}.npz"


def check(folder: pathlib.Path, arrays: Mapping[str, Any], num_lead: int) -> None:
  """Checks what this process holds of a piece's arrays, if the piece has digests.

  Raises:
    Damage: a digest is wrong; the message names the array.
  """
  known: dict[str, np.ndarray] = {}
  for path in folder.glob("digests_*.npz"):
    with np.load(path, allow_pickle=False) as file:
      for name in file:
        known[name] = np.maximum(known.get(name, np.uint64(0)), file[name])
  for name, array in arrays.items() if known else ():
    units = _Units(name, array.shape, num_lead)
    if known[name].shape != units.grid:
      raise Damage(f"the digests of {name} are of another array")
    for unit, digest in units.digests(array):
      if known[name][unit] not in (0, digest):
        raise Damage(f"the checksum of {name} is wrong")


class _Units:
  """The blocks and units of an array.

  Attributes:
    grid: shape of the digests. The first axes are layers and experts, if the array has them; on the
      last one, the digest of a block precedes those of its units.
  """

  def __init__(self, name: str, shape: tuple[int, ...], num_lead: int):
    self._lead = min(num_lead + name.startswith(_EXPERTS), len(shape) - 1)
    size = shape[self._lead]
    count = size if size <= _MOST_UNITS else math.gcd(size, _MOST_UNITS)
    self._rows = size // count
    self.grid = (*shape[: self._lead], 1 + count)

  def digests(self, array: Any, all_units: bool = False) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yields indices in `grid` and digests of what is whole on this process's devices.

    Args:
      array: the array.
      all_units: whether to yield the units of whole blocks too.
    """
    boxes, whole = {}, tuple((0, size) for size in array.shape)
    for shard in array.addressable_shards if isinstance(array, jax.Array) else ():
      spans = tuple(s.indices(size)[:2] for s, size in zip(shard.index, array.shape))
      boxes.setdefault(spans, shard.data)
    if not isinstance(array, jax.Array):
      boxes[whole] = array
    for spans, data in boxes.items():
      if spans[self._lead + 1 :] != whole[self._lead + 1 :]:
        continue
      *starts, first = (start for start, _ in spans[: self._lead + 1])
      stop = spans[self._lead][1]
      rows = {}  # by the last index in the grid
      if stop - first == array.shape[self._lead]:
        rows[0] = slice(None)
      if all_units or not rows:
        for unit in range(-(-first // self._rows), stop // self._rows):
          start = unit * self._rows - first
          rows[1 + unit] = slice(start, start + self._rows)
      data = np.ascontiguousarray(data).view(np.uint8)
      for index in np.ndindex(data.shape[: self._lead]):
        block = data[index]
        for last, part in rows.items():
          digest = xxhash.xxh3_64_intdigest(block[part].data)
          yield (*(i + start for i, start in zip(index, starts)), last), digest
