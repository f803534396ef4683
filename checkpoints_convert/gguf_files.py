"""Reads GGUF files: the header, and tensors one at a time, dequantized.

The header is parsed here because the reader of the `gguf` package makes an array of each token:
6.0 s for 49,152 tokens and as many merges, where this takes 0.15 s.
"""

from collections.abc import Iterator
import dataclasses
import math
import pathlib
import re
import struct
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from checkpoints_convert import mxfp4
from checkpoints_convert.common import ConversionError, Spans
from checkpoints_convert.safetensors_files import AGAIN, TensorInfo
from roe_jax import typed
from roe_jax.lazy_modules import LazyModule

if TYPE_CHECKING:
  import gguf
else:
  gguf = LazyModule("gguf")

INSTALL = 'pip install "roe_jax[gguf]"'
VERSIONS = (2, 3)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
# Value types by number, as `struct` reads them.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_AXES = 4
# Types of the values that are read, where they are there.
_KINDS: dict[str, Any] = {
  "general.architecture": str,
  "general.alignment": int,
  "split.count": int,
  "tokenizer.chat_template": str,
  "tokenizer.ggml.model": str,
  "tokenizer.ggml.pre": str,
  "tokenizer.ggml.tokens": list[str],
  "tokenizer.ggml.merges": list[str],
  "tokenizer.ggml.token_type": list[int],
}
# Elements that are dequantized at once. The package takes 16 rows at a time, with which
# SmolLM2-135M (576 elements in a row) loads in 4.8 s of CPU time instead of 3.8 s.
_CHUNK = 1 << 16
# Types that numpy has, by the names in `Source.stored_dtypes`; others keep GGUF's name.
_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class GgufTensor(TensorInfo):
  """A tensor of the hub that is stored in a GGUF file: all of its tensor, or one expert of it.

  Attributes:
    kind: its `gguf.GGMLQuantizationType`.
    interleaved: whether the rows of each head are stored as pairs of the two halves that RoPE
      rotates (queries and keys of llama), not one half after the other.
    part: "numbers", or for MXFP4 the "blocks" of codes or their "scales".
  """

  kind: Any
  interleaved: bool = False
  part: str = "numbers"

  @property
  def stored_dtype(self) -> str:
    name: str = self.kind.name
    return "uint8" if self.part != "numbers" else _DTYPE_NAMES.get(name, name)

  def widened(self, shape: tuple[int, ...], spans: Spans) -> Spans:
    """Widens a part of the tensor to whole rows: blocks lie along the last axis."""
    first = spans[0] if len(self.shape) > 1 else (0, shape[0])
    return (first, *((0, size) for size in shape[1:]))

  def read(self, shape: tuple[int, ...], spans: Spans) -> np.ndarray:
    """Reads and dequantizes a part of the tensor that is whole except along the first axis."""
    block, size = gguf.GGML_QUANT_SIZES[self.kind]
    total = math.prod(shape) * (2 if self.part == "blocks" else 32 if self.part == "scales" else 1)
    num_bytes = total // block * size
    start, stop = (num_bytes * end // shape[0] for end in spans[0])
    raw = np.fromfile(self.file, np.uint8, stop - start, offset=self.offset + start)
    if raw.size < stop - start:
      raise ConversionError(f"{self.file} ends in the middle of {self.name}: {AGAIN}")
    shape = (spans[0][1] - spans[0][0], *shape[1:])
    if self.part == "scales":
      return raw.reshape(-1, size)[:, 0].reshape(shape)
    if self.part == "blocks":
      # A byte has an element of the block's first half in its low bits and one of its second half.
      codes = raw.reshape(-1, size)[:, 1:]
      return mxfp4.to_blocks(np.concatenate([codes & 15, codes >> 4], axis=-1)).reshape(shape)
    array = np.empty(shape, np.float32)
    flat, step = array.reshape(-1), block * (_CHUNK // block)
    for i in range(0, flat.size, step):
      part = raw[i // block * size : (i + step) // block * size]
      flat[i : i + step] = gguf.quants.dequantize(part.reshape(1, -1), self.kind)
    if self.interleaved:
      heads, width = shape[:2]
      array = array.reshape(heads, width // 2, 2, -1).swapaxes(1, 2).reshape(shape)
    return array


@dataclasses.dataclass(frozen=True)
class GgufFile:
  """The header of a GGUF file.

  Attributes:
    path: the file.
    metadata: its values by key.
    tensors: its tensors by their names in the file, with shapes in numpy's order.
  """

  path: pathlib.Path
  metadata: dict[str, Any]
  tensors: dict[str, GgufTensor]


def read_header(path: pathlib.Path) -> GgufFile:
  """Reads and checks the header of a file.

  Raises:
    ConversionError: the file is not a whole GGUF file of a known version and byte order, is
      truncated, or has a tensor that cannot be dequantized; or the `gguf` package is not installed.
  """
  try:
    gguf.GGML_QUANT_SIZES  # noqa: B018 - imports the package
  except ModuleNotFoundError as error:
    raise ConversionError(f"{path} needs the gguf package: run {INSTALL}") from error
  part = _PART.search(path.name)
  if part and int(part[2]) > 1:
    _refuse_part(path, int(part[2]))
  with open(path, "rb") as file:
    start = file.read(8)
    if start[:4] != b"GGUF":
      raise ConversionError(f"{path} is not a GGUF file: it starts with {start[:4]!r}")
    version = int.from_bytes(start[4:], "little")
    if version & 0xFFFF == 0 and version:
      raise ConversionError(f"{path} is a big-endian GGUF file: download the little-endian one")
    if version not in VERSIONS and len(start) == 8:
      known = " and ".join(map(str, VERSIONS))
      raise ConversionError(
        f"{path} is a GGUF file of version {version}, but only the versions {known} can be read"
      )
    try:
      num_tensors, num_values = _unpack(file, "QQ")
      metadata = {_string(file): _value(file, *_unpack(file, "I")) for _ in range(num_values)}
      entries = [_entry(file) for _ in range(num_tensors)]
    except (struct.error, UnicodeDecodeError, MemoryError, OverflowError, RecursionError) as error:
      raise ConversionError(
        f"{path} is truncated or damaged: its header cannot be read ({error}): {AGAIN}"
      ) from error
    header_end = file.tell()
    size = file.seek(0, 2)
  typed.check_keys(str(path), metadata, _KINDS, required=False, others=True)
  if metadata.get("split.count", 0) > 1:
    _refuse_part(path, metadata["split.count"])
  alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
  if alignment < 1:
    raise ConversionError(f"general.alignment of {path} must be positive, got {alignment}")
  data = -(-header_end // alignment) * alignment
  tensors, end = {}, 0
  for name, shape, kind, offset in entries:
    if name in tensors:
      raise ConversionError(f"{path} has two tensors named {name}: {AGAIN}")
    kind = _kind(path, name, kind)
    block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
      raise ConversionError(
        f"{name} in {path} has rows of {shape[-1]} elements, but {kind.name} has blocks of {block}"
      )
    end = max(end, data + offset + math.prod(shape) // block * num_bytes)
    tensors[name] = GgufTensor(name, path, data + offset, shape, np.dtype(np.float32), kind)
  if end > size:
    raise ConversionError(
      f"{path} is truncated: it has {size:,} bytes, but its header describes {end:,}: {AGAIN}"
    )
  return GgufFile(path, metadata, tensors)


def experts(tensor: GgufTensor) -> Iterator[GgufTensor]:
  """Yields the experts of a tensor whose first axis they are."""
  block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
  step = math.prod(tensor.shape[1:]) // block * size
  for i in range(tensor.shape[0]):
    yield dataclasses.replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + i * step)


def _refuse_part(path, count):
  raise ConversionError(
    f"{path} is one of the {count} parts of a split model: merge them into one file with "
    "llama-gguf-split --merge FIRST_PART MERGED_FILE of llama.cpp"
  )


def _kind(path, name, number):
  try:
    kind = gguf.GGMLQuantizationType(number)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    return kind
  except (ValueError, KeyError, NotImplementedError):
    names = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    raise ConversionError(
      f"{name} in {path} has the quantization {names.get(number, number)}, which the gguf package "
      "cannot dequantize: use a file in another one, such as Q8_0 or Q4_K_M"
    ) from None


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
  return struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))


def _string(file: BinaryIO) -> str:
  (length,) = _unpack(file, "Q")
  data = file.read(length)
  if len(data) < length:
    raise struct.error(f"a string has {len(data)} of {length} bytes")
  return data.decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
  if kind == _STRING:
    return _string(file)
  if kind == _ARRAY:
    kind, length = _unpack(file, "IQ")
    if kind in _SCALARS:
      return list(_unpack(file, f"{length}{_SCALARS[kind]}"))
    return [_value(file, kind) for _ in range(length)]
  if kind not in _SCALARS:
    raise struct.error(f"unknown value type {kind}")
  return _unpack(file, _SCALARS[kind])[0]


def _entry(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
  """Returns a tensor's name, its shape in numpy's order, type and offset in the data."""
  name = _string(file)
  (num_axes,) = _unpack(file, "I")
  if not 1 <= num_axes <= _MOST_AXES:
    raise struct.error(f"{name} has {num_axes} axes")
  *shape, kind, offset = _unpack(file, f"{num_axes}QIQ")
  if 0 in shape:
    raise struct.error(f"{name} has an axis of 0")
  return name, tuple(reversed(shape)), kind, offset
