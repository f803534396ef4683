"""A roe_jax checkpoint back to a Hugging Face folder."""

from collections.abc import Iterator
import json
import math
import pathlib
import shutil

import numpy as np
from tqdm import tqdm

from checkpoints_convert import quantize_checkpoint, safetensors_files, tensor_names
from checkpoints_convert.common import check_space
from roe_jax import checkpoint
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.families import to_hugging_face

MAX_SHARD_BYTES = 5 * 10**9
_MARKER = "unfinished_conversion.json"


def convert_to_hugging_face(
  source: str,
  target: str,
  *,
  dtype: str = "source",
  overwrite: bool = False,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ModelConfig:
  """Converts and returns the model's config.

  Interrupted, and called again, it goes on after the last finished file.

  Args:
    source: a roe_jax checkpoint.
    target: the folder to write, which `transformers` can load.
    dtype: "float32", "bfloat16", or "source" for the checkpoint's own. Experts in
      MXFP4 stay so.
    overwrite: whether an existing Hugging Face folder at `target` is replaced.
    max_shard_bytes: how large a safetensors file may become.

  Raises:
    ConversionError, ValueError: the model has no Hugging Face form.
    FileNotFoundError: the source is not a complete checkpoint.
    FileExistsError: the target exists.
  """
  checkpoint.check_target(target, overwrite, "config.json")
  config = checkpoint.load_config(source)
  if dtype != "source":
    config = config.replace(dtype=dtype)
  hf_config = to_hugging_face(config)
  tensor_names.check_table(config)
  tensors = [
    (part.tensor, (part.shape, _dtype(config, part)))
    for piece in checkpoint.load_pieces(source)
    for part in tensor_names.parts(config, piece)
  ]
  shards = safetensors_files.plan_shards(tensors, max_shard_bytes)
  plan = json.dumps(
    {
      "source": quantize_checkpoint.fingerprint(source),
      "config": config.to_json(),
      "shards": [[name, list(forms)] for name, forms in shards],
    }
  )
  partial = checkpoint.partial_folder(target)
  marker = partial / _MARKER
  if not (marker.is_file() and marker.read_text() == plan):
    checkpoint.start_partial(target, _MARKER, plan)
  missing = {tensor for name, forms in shards if not (partial / name).exists() for tensor in forms}
  sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in tensors}
  check_space(target, sum(sizes[name] for name in missing))
  with tqdm(
    total=params_lib.num_bytes(config), unit="B", unit_scale=True, desc="converting"
  ) as progress:
    progress.update(sum(size for name, size in sizes.items() if name not in missing))
    safetensors_files.write_shards(partial, shards, _arrays(source, config, missing, progress))
  for name in checkpoint.COMPANION_FILES:
    if (pathlib.Path(source) / name).is_file():
      shutil.copyfile(pathlib.Path(source) / name, partial / name)
  (partial / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
  checkpoint.publish(target)
  (pathlib.Path(target) / _MARKER).unlink()
  return config


def _dtype(config: ModelConfig, part: tensor_names.Part) -> np.dtype:
  return np.dtype(np.uint8 if part.is_bytes else config.dtype)


def _arrays(
  source: str, config: ModelConfig, tensors: set[str], progress: tqdm
) -> Iterator[np.ndarray]:
  parts = {
    piece.name: [part for part in tensor_names.parts(config, piece) if part.tensor in tensors]
    for piece in checkpoint.load_pieces(source)
  }
  wanted = [name for name, found in parts.items() if found]
  for piece, arrays in checkpoint.iterate_pieces(source, wanted):
    for part in parts[piece.name]:
      array = part.take(arrays[part.parameter]).astype(_dtype(config, part), copy=False)
      progress.update(array.nbytes)
      yield array
      del array
    del arrays  # or they would stay while the next piece is read
