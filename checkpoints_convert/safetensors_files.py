"""Reads and writes folders of safetensors files, one tensor or part of a tensor at a time.

The safetensors library maps files into memory, where what was read stays resident, and writes only
whole files from tensors that are all in memory. So it only checks the headers here, before any
tensor is read; files are read with plain reads and written tensor by tensor.
"""

from collections.abc import Iterable, Iterator
import dataclasses
import json
import math
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from checkpoints_convert.common import ConversionError, Spans, note, some
from roe_jax import typed

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "U8": np.dtype(np.uint8),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# If a part of a tensor is scattered in shorter runs of bytes, reading all of it is faster.
SHORTEST_RUN = 64 << 10
AGAIN = "download the model again"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """The location of a tensor: `offset` bytes into `file`."""

  name: str
  file: pathlib.Path
  offset: int
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def stored_dtype(self) -> str:
    """The name of the dtype in the file."""
    return self.dtype.name

  def widened(self, shape: tuple[int, ...], spans: Spans) -> Spans:
    """Widens a part of the tensor to whole axes where its runs of bytes would be too short.

    Args:
      shape: the tensor's shape, where merged axes may be split.
      spans: the part to read, by axis.
    """
    return tuple(
      span if (span[1] - span[0]) * stride >= SHORTEST_RUN else (0, size)
      for span, size, stride in zip(spans, shape, self._strides(shape))
    )

  def read(self, shape: tuple[int, ...], spans: Spans) -> np.ndarray:
    """Reads a part of the tensor in its own dtype, and only the bytes of that part.

    Args:
      shape: the tensor's shape, where merged axes may be split.
      spans: the part to read, by axis.

    Raises:
      ConversionError: the file became shorter after its header was read.
    """
    array = np.empty([stop - start for start, stop in spans], self.dtype)
    cut = [i for i, (span, size) in enumerate(zip(spans, shape)) if span != (0, size)]
    outer = cut[-1] if cut else 0  # the axes after this one are one run of bytes
    strides = self._strides(shape)
    with open(self.file, "rb", buffering=0) as file:
      for index in np.ndindex(array.shape[:outer]):
        file.seek(
          self.offset
          + sum((i + start) * stride for i, (start, _), stride in zip((*index, 0), spans, strides))
        )
        target = _bytes(array[index])
        while target:
          count = file.readinto(target)
          if not count:
            raise ConversionError(f"{self.file} ends in the middle of {self.name}: {AGAIN}")
          target = target[count:]
    return array

  def _strides(self, shape):
    """Returns the number of bytes from one index of each axis to the next."""
    return [self.dtype.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _bytes(array: np.ndarray) -> memoryview:
  return memoryview(array.reshape(-1).view(np.uint8).data)


def read_headers(folder: pathlib.Path) -> dict[str, TensorInfo]:
  """Returns all tensors of a folder, after checking that its files are complete.

  As in transformers, `model.safetensors` has precedence over an index and its shards, and other
  files are ignored; a warning names them.

  Raises:
    ConversionError: there are no safetensors, a shard is missing, truncated or malformed, or the
      index contradicts the shards.
  """
  single, index = folder / SINGLE_FILE, folder / INDEX_FILE
  if single.is_file():
    tensors = _read_header(single)
  elif index.is_file():
    tensors = _read_shards(folder)
  else:
    raise ConversionError(_missing_weights(folder))
  used = {info.file.name for info in tensors.values()}
  unused = {path.name for path in folder.glob("model*.safetensors")} - used
  if unused or (single.is_file() and index.is_file()):
    note(
      f"{folder} has weights twice: {some(used)} {'are' if len(used) > 1 else 'is'} read, as "
      f"transformers does, and {some(unused | ({INDEX_FILE} if single.is_file() else set()))} "
      "ignored; delete what is out of date"
    )
  return tensors


def are_complete(folder: pathlib.Path) -> bool:
  """Whether a folder has all files with weights that `read_headers` reads."""
  if (folder / SINGLE_FILE).is_file():
    return True
  if not (folder / INDEX_FILE).is_file():
    return False
  return all((folder / name).is_file() for name in _read_index(folder).values())


def _missing_weights(folder: pathlib.Path) -> str:
  shards = sorted(p.name for p in folder.glob("*.safetensors"))
  if shards:
    return (
      f"{folder} has safetensors files ({some(shards)}) but neither {INDEX_FILE} nor "
      f"{SINGLE_FILE}: {AGAIN}"
    )
  pickles = sorted(
    p.name for suffix in ("bin", "pt", "pth", "ckpt") for p in folder.glob(f"*.{suffix}")
  )
  if pickles:
    return (
      f"{folder} has its weights only as pickles ({some(pickles)}), which can run arbitrary code "
      "when they are read: download the model as safetensors"
    )
  return f"{folder} has no safetensors files"


def _read_index(folder: pathlib.Path) -> dict[str, str]:
  """Returns the name of each tensor's shard."""
  path = folder / INDEX_FILE
  try:
    index = typed.read(path, {"weight_map": dict[str, str]})["weight_map"]
    if other := [shard for shard in index.values() if shard != pathlib.PurePath(shard).name]:
      raise ValueError(f"shards must be files in its folder, got {some(other, 1)}")
  except ValueError as error:
    raise ConversionError(f"{path} is not a safetensors index ({error}): {AGAIN}") from error
  return index


def _read_shards(folder: pathlib.Path) -> dict[str, TensorInfo]:
  index = _read_index(folder)
  shards = sorted(set(index.values()))
  paths = [folder / name for name in shards]
  missing = [p.name for p in paths if not p.is_file()]
  if missing:
    raise ConversionError(
      f"{folder} lacks {len(missing)} of the {len(shards)} shards in its index "
      f"({some(missing)}): {AGAIN}"
    )
  tensors = {}
  for path in paths:
    found = _read_header(path)
    promised = {name for name, shard in index.items() if shard == path.name}
    if promised - set(found):
      raise ConversionError(
        f"the index of {folder} lists tensors that {path.name} does not have: "
        f"{some(promised - set(found))}"
      )
    if set(found) - promised:
      raise ConversionError(
        f"{path} has tensors that the index does not list there: {some(set(found) - promised)}"
      )
    tensors |= found
  return tensors


def _read_header(path: pathlib.Path) -> dict[str, TensorInfo]:
  try:
    with safetensors.safe_open(path, "np"):
      pass  # checks the header, and that the tensors cover the file
  except safetensors.SafetensorError as error:
    raise ConversionError(
      f"{path} is not a complete safetensors file ({error}): {AGAIN}"
    ) from error
  with open(path, "rb") as file:
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
  header.pop("__metadata__", None)
  return {
    name: tensor_info(
      name, path, entry["dtype"], entry["shape"], 8 + length + entry["data_offsets"][0]
    )
    for name, entry in header.items()
  }


def tensor_info(
  name: str, path: pathlib.Path, dtype: str, shape: Iterable[int], offset: int = 0
) -> TensorInfo:
  """Returns the `TensorInfo` for an entry of a safetensors header.

  Raises:
    ConversionError: the dtype is not supported.
  """
  if dtype not in _DTYPES:
    raise ConversionError(f"{name} in {path} has dtype {dtype}; supported: {', '.join(_DTYPES)}")
  return TensorInfo(name, path, offset, tuple(shape), _DTYPES[dtype])


# The shape and dtype of a tensor.
Form = tuple[tuple[int, ...], np.dtype]


def plan_shards(
  tensors: Iterable[tuple[str, Form]], max_shard_bytes: int
) -> list[tuple[str, dict[str, Form]]]:
  """Returns file names with the forms of their tensors, in order.

  A shard has at most `max_shard_bytes`, or only one tensor.
  """
  shards: list[dict[str, Form]] = []
  filled = 0
  for name, form in tensors:
    size = _num_bytes(form)
    if not shards or filled + size > max_shard_bytes:
      shards.append({})
      filled = 0
    shards[-1][name] = form
    filled += size
  if len(shards) == 1:
    return [(SINGLE_FILE, shards[0])]
  return [
    (f"model-{i:05d}-of-{len(shards):05d}.safetensors", shard) for i, shard in enumerate(shards, 1)
  ]


def _num_bytes(form: Form) -> int:
  shape, dtype = form
  return math.prod(shape) * dtype.itemsize


def write_shards(
  folder: pathlib.Path, shards: list[tuple[str, dict[str, Form]]], arrays: Iterator[np.ndarray]
) -> None:
  """Writes the shards that do not exist yet, and an index if there are several shards.

  Args:
    folder: the folder to write into.
    shards: shards as `plan_shards` returns them.
    arrays: the tensors of the missing shards in order; each is released after it is written.
  """
  total = 0
  for file_name, forms in shards:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in forms.items():
      end = offset + _num_bytes((shape, dtype))
      header[name] = {
        "dtype": _DTYPE_NAMES[dtype],
        "shape": list(shape),
        "data_offsets": [offset, end],
      }
      offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    total += offset
    if (folder / file_name).exists():
      continue
    unfinished = folder / (file_name + ".partial")
    with open(unfinished, "wb") as file:
      file.write(len(text).to_bytes(8, "little") + text)
      for form in forms.values():
        array = next(arrays)
        assert (array.shape, array.dtype) == form, (array.shape, array.dtype, form)
        file.write(_bytes(array))
        del array
    unfinished.rename(folder / file_name)
  if len(shards) > 1:
    index = {
      "metadata": {"total_size": total},
      "weight_map": {name: file for file, forms in shards for name in forms},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
