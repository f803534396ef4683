"""A Hugging Face folder to a roe_jax checkpoint."""

import dataclasses
import hashlib
import json
import pathlib
import re
from typing import Any

import numpy as np
from tqdm import tqdm

from checkpoints_convert import rules
from checkpoints_convert import safetensors_files
from checkpoints_convert.common import ConversionError, check_space, some
from checkpoints_convert.safetensors_files import TensorInfo
from roe_jax import checkpoint
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.families import from_hugging_face
from roe_jax.tokenizer import Tokenizer, check_vocabulary

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Not "*.safetensors": some repositories hold the weights a second time under
# other names.
_WEIGHT_PATTERNS = ("model.safetensors", "model-*.safetensors")
_OTHER_PATTERNS = ("*.json", "*.jinja", "tokenizer*")


@dataclasses.dataclass(frozen=True)
class Source:
  """A Hugging Face folder that was checked and can be converted.

  Attributes:
    folder: where it lies.
    config: of the model, with the dtype that it will be converted to.
    tensors: of its shards, by name; exactly those that the model needs.
    stored_dtypes: names of the dtypes in the shards.
  """

  folder: pathlib.Path
  config: ModelConfig
  tensors: dict[str, TensorInfo]
  stored_dtypes: tuple[str, ...]


def find(source: str, revision: str | None = None, weights: bool = True) -> pathlib.Path:
  """The folder of `source`, downloaded if it is a hub name like `org/model`.

  Args:
    source: a local folder, or a hub name.
    revision: branch, tag or commit on the hub.
    weights: whether to download the weights, too.

  Raises:
    ConversionError: neither, or the download fails.
  """
  folder = pathlib.Path(source).expanduser()
  if folder.is_dir():
    return folder
  if not _HUB_NAME.fullmatch(source) or folder.exists():
    raise ConversionError(
        f"the source {source!r} is neither a folder nor a hub name like org/model")
  import huggingface_hub  # here, because local folders need no hub
  patterns = [*_OTHER_PATTERNS, *(_WEIGHT_PATTERNS if weights else ())]
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(
        source, revision=revision, allow_patterns=patterns))
  except Exception as error:  # many kinds, all of them reasons for not getting it
    reason = str(error).strip().split("\n")[0]
    raise ConversionError(
        f"there is no local folder {source}, and it cannot be downloaded as a model from "
        f"the hub: {reason}") from error


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """The parsed `config.json`.

  Raises:
    ConversionError: it is missing or malformed.
  """
  path = folder / "config.json"
  if not path.is_file():
    if (folder / checkpoint.CONFIG_FILE).is_file():
      raise ConversionError(
          f"{folder} is a roe_jax checkpoint already; to convert it back, add --to_hugging_face")
    raise ConversionError(f"{folder} has no config.json: it is not a Hugging Face model folder")
  try:
    values = json.loads(path.read_text())
  except ValueError as error:
    raise ConversionError(f"{path} is not valid JSON: {error}") from error
  if not isinstance(values, dict):
    raise ConversionError(f"{path} must hold a JSON object")
  return values


def open_source(folder: pathlib.Path, dtype: str = "source") -> Source:
  """Checks everything that can be checked without reading a tensor.

  Args:
    folder: the Hugging Face folder.
    dtype: of the checkpoint. "source" keeps the tensors' own; where it cannot
      be kept (float16, or several) it is float32, which holds them all exactly.

  Raises:
    ConversionError, ValueError: the folder cannot be converted.
  """
  hf_config = read_config(folder)
  config = from_hugging_face(hf_config, dtype="float32")
  tensors = safetensors_files.read_headers(folder)
  stored = tuple(sorted({info.dtype.name for info in tensors.values()}))
  if dtype == "source":
    dtype = "bfloat16" if stored == ("bfloat16",) else "float32"
  config = config.replace(dtype=dtype)
  rules.check_table(config)
  _check_tensors(folder, config, tensors)
  if (folder / "tokenizer.json").is_file():
    check_vocabulary(Tokenizer.load(folder), config)
  return Source(folder, config, tensors, stored)


def convert_from_hugging_face(
    source: str, target: str, *, dtype: str = "source", revision: str | None = None,
    overwrite: bool = False, piece_bytes: int = checkpoint.PIECE_BYTES) -> ModelConfig:
  """Converts and returns the model's config.

  An interrupted conversion, called again, goes on after the last finished piece.

  Args:
    source: a local Hugging Face folder, or a hub name.
    target: the checkpoint folder to write.
    dtype: "float32", "bfloat16" or "source"; see `open_source`.
    revision: branch, tag or commit on the hub.
    overwrite: whether an existing checkpoint at `target` is replaced.
    piece_bytes: how large a piece of several layers may become.

  Raises:
    ConversionError, ValueError: the source cannot be converted.
    FileExistsError: the target exists.
  """
  checkpoint.check_target(target, overwrite, checkpoint.MANIFEST_FILE)
  opened = open_source(find(source, revision), dtype)
  config = opened.config
  provenance = {
      "source": source, "revision": revision, "source_dtypes": list(opened.stored_dtypes),
      "dtype": config.dtype}
  writer = checkpoint.Writer(
      target, config, files=opened.folder, provenance=provenance,
      fingerprint=_fingerprint(opened), piece_bytes=piece_bytes, overwrite=overwrite)
  missing = [p for p in writer.pieces if not writer.is_written(p)]
  check_space(target, sum(_piece_bytes(config, p) for p in missing))
  with writer, tqdm(total=params_lib.num_bytes(config), unit="B", unit_scale=True,
                    desc="converting") as progress:
    for piece in writer.pieces:
      if piece in missing:
        writer.write(piece, _read_piece(opened, piece))
      progress.update(_piece_bytes(config, piece))
  return config


def _piece_bytes(config: ModelConfig, piece: checkpoint.Piece) -> int:
  return sum(int(np.prod(s.shape)) * s.dtype.itemsize
             for s in checkpoint.piece_shapes(config, piece).values())


def _read_piece(source: Source, piece: checkpoint.Piece) -> dict[str, np.ndarray]:
  """The piece's arrays, filled tensor by tensor in the order of the files."""
  arrays = {name: np.empty(s.shape, s.dtype)
            for name, s in checkpoint.piece_shapes(source.config, piece).items()}
  parts = list(rules.parts(source.config, piece))
  location = lambda part: source.tensors[part.tensor]
  for part in sorted(parts, key=lambda p: (location(p).file, location(p).offset)):
    part.fill(arrays[part.parameter], safetensors_files.read(location(part)))
  return arrays


def _check_tensors(
    folder: pathlib.Path, config: ModelConfig, tensors: dict[str, TensorInfo]) -> None:
  expected = {part.tensor: part.shape
              for piece in checkpoint.plan_pieces(config) for part in rules.parts(config, piece)}
  if set(expected) - set(tensors):
    raise ConversionError(
        f"{folder} lacks tensors that its config.json ({config.family}, "
        f"{config.num_layers} layers) calls for: {some(set(expected) - set(tensors))}")
  if set(tensors) - set(expected):
    raise ConversionError(
        f"{folder} has tensors that a {config.family} model with its config.json does not "
        f"have: {some(set(tensors) - set(expected))}")
  for name, shape in expected.items():
    if tensors[name].shape != shape:
      raise ConversionError(
          f"{name} in {tensors[name].file} has shape {list(tensors[name].shape)}, config.json "
          f"calls for {list(shape)}")


def _fingerprint(source: Source) -> str:
  """Changes if the source's files may have: they are known by size and time."""
  files = {}
  for info in source.tensors.values():
    status = info.file.stat()
    files[info.file.name] = [status.st_size, status.st_mtime_ns]
  facts = [str(source.folder.resolve()), sorted(files.items()), source.config.to_json()]
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
