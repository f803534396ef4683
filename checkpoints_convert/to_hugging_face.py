"""Writes a model as a Hugging Face folder."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
import itertools
import json
import math
import pathlib
from typing import Any

import numpy as np
from tqdm import tqdm

from checkpoints_convert import (
  carve_checkpoint,
  quantize_checkpoint,
  safetensors_files,
  tensor_names,
)
from checkpoints_convert.common import check_space, note
from roe_jax import checkpoint
from roe_jax import params as params_lib
from roe_jax.checkpoint import Piece
from roe_jax.checkpoint_folder import copy_companion_files
from roe_jax.config import ModelConfig
from roe_jax.families import to_hugging_face
from roe_jax.params import Params

MAX_SHARD_BYTES = 5 * 10**9
_MARKER = "unfinished_conversion.json"

# Yields the pieces of the given names with their arrays.
_Read = Callable[[list[str]], Iterable[tuple[Piece, Mapping[str, Any]]]]


def convert_to_hugging_face(
  source: str,
  target: str,
  *,
  dtype: str = "source",
  overwrite: bool = False,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ModelConfig:
  """Converts a roe_jax checkpoint and returns the model's config.

  An interrupted conversion resumes after the last finished file when it is called again.

  Args:
    source: a roe_jax checkpoint; one that was carved is written as the dense model, with a warning
      if its weights were trained afterwards.
    target: the folder to write, which `transformers` can load.
    dtype: "float32", "bfloat16", or "source" for the checkpoint's own. Experts in
      MXFP4 stay in MXFP4.
    overwrite: whether to replace an existing Hugging Face folder at `target`.
    max_shard_bytes: maximum size of a safetensors file.

  Raises:
    ConversionError, ValueError: the model has no Hugging Face form.
    FileNotFoundError: the source is not a complete checkpoint.
    FileExistsError: the target exists.
  """
  checkpoint.check_target(target, overwrite, "config.json", source)
  config = checkpoint.load_config(source)
  if dtype != "source":
    config = config.replace(dtype=dtype)
  pieces = checkpoint.load_pieces(source)
  read = lambda names: checkpoint.iterate_pieces(source, names)
  if carve_checkpoint.is_carved(config):
    if carve_checkpoint.FINE_TUNING in checkpoint.load_provenance(source):
      note(f"{source} was fine-tuned, so its dense form is not the model that it was carved from")
    carved, config = config, carve_checkpoint.dense_config(config)
    read = lambda names: carve_checkpoint.dense_pieces(source, carved, names)
  fingerprint = quantize_checkpoint.fingerprint(source)
  _write(target, config, pieces, read, source, fingerprint, max_shard_bytes)
  return config


def save_hugging_face(
  target: str | pathlib.Path,
  params: Params,
  config: ModelConfig,
  *,
  files: str | pathlib.Path | None = None,
  provenance: Mapping[str, Any] | None = None,
  overwrite: bool = False,
) -> None:
  """Writes `params` (in `config.dtype`) as a Hugging Face folder.

  Args:
    target: the folder to write, which `transformers` can load.
    params: the parameters.
    config: their config.
    files: a folder from which the tokenizer's files are copied (`COMPANION_FILES`).
    provenance: JSON values for `manifest.json`: where the model came from.
    overwrite: whether to replace an existing Hugging Face folder at `target`.

  Raises:
    ConversionError, ValueError: the model has no Hugging Face form.
    FileExistsError: the target exists.
  """
  checkpoint.check_target(target, overwrite, "config.json")
  params_lib.validate(params, config)
  pieces = checkpoint.plan_pieces(config)
  read = lambda names: ((p, checkpoint.piece_arrays(params, p)) for p in pieces if p.name in names)
  manifest = None if provenance is None else {"provenance": provenance}
  _write(target, config, pieces, read, files, manifest=manifest)


def _write(
  target: str | pathlib.Path,
  config: ModelConfig,
  pieces: Iterable[Piece],
  read: _Read,
  files: str | pathlib.Path | None,
  fingerprint: str = "",
  max_shard_bytes: int = MAX_SHARD_BYTES,
  manifest: dict[str, Any] | None = None,
) -> None:
  """Writes the folder, resuming unfinished work of the same fingerprint unless that is empty."""
  hf_config = to_hugging_face(config)
  tensor_names.check_table(config)
  parts = {piece.name: list(tensor_names.parts(config, piece)) for piece in pieces}
  float32 = tensor_names.float32_tensors(config)
  forms = {  # several parameters may be in one tensor
    part.tensor: (part.shape, _dtype(config, part, float32))
    for found in parts.values()
    for part in found
  }
  tensors = list(forms.items())
  shards = safetensors_files.plan_shards(tensors, max_shard_bytes)
  plan = json.dumps(
    {
      "source": fingerprint,
      "config": config.to_json(),
      "shards": [[name, list(forms)] for name, forms in shards],
    }
  )
  partial = checkpoint.partial_folder(target)
  marker = partial / _MARKER
  if not (fingerprint and marker.is_file() and marker.read_text("utf-8") == plan):
    checkpoint.start_partial(target, _MARKER, plan)
  missing = {tensor for name, forms in shards if not (partial / name).exists() for tensor in forms}
  dtypes = {name: dtype for name, (_, dtype) in tensors}
  sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in tensors}
  needed = sum(sizes[name] for name in missing)
  check_space(str(target), needed)
  parts = {
    name: own
    for name, found in parts.items()
    if (own := [part for part in found if part.tensor in missing])
  }
  with tqdm(
    total=params_lib.num_bytes(config),
    initial=sum(sizes.values()) - needed,
    unit="B",
    unit_scale=True,
    desc="converting",
    disable=not fingerprint,
  ) as progress:
    safetensors_files.write_shards(partial, shards, _tensors(dtypes, parts, read, progress))
  copy_companion_files(files, partial)
  for name, values in (("config.json", hf_config), (checkpoint.MANIFEST_FILE, manifest)):
    if values is not None:
      (partial / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
  checkpoint.publish(target)
  (pathlib.Path(target) / _MARKER).unlink()


def _dtype(config: ModelConfig, part: tensor_names.Part, float32: Container[str]) -> np.dtype:
  of_numbers = np.float32 if part.tensor in float32 else config.dtype
  return np.dtype(np.uint8 if part.is_bytes else of_numbers)


def _tensors(
  dtypes: Mapping[str, np.dtype],
  parts: dict[str, list[tensor_names.Part]],
  read: _Read,
  progress: tqdm,
) -> Iterator[np.ndarray]:
  for piece, arrays in read(list(parts)):
    for tensor, own in itertools.groupby(parts[piece.name], lambda part: part.tensor):
      first, *others = own
      array = first.take(np.asarray(arrays[first.parameter]))
      for part in others:
        part.take(np.asarray(arrays[part.parameter]), array)
      array = array.astype(dtypes[tensor], copy=False)
      progress.update(array.nbytes)
      yield array
      del array
    del arrays  # or they would stay in memory while the next piece is read
