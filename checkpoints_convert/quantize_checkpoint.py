"""A roe_jax checkpoint to one with its experts in fewer bits."""

import hashlib
import json
import math
import pathlib

from tqdm import tqdm

from checkpoints_convert import hub
from checkpoints_convert.common import ConversionError, check_space
from checkpoints_convert.expert_formats import recode
from roe_jax import checkpoint
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig


def is_checkpoint(source: str) -> bool:
  """Whether the source is a roe_jax checkpoint rather than a Hugging Face model."""
  return (pathlib.Path(source).expanduser() / checkpoint.CONFIG_FILE).is_file()


def target_config(
  source: str, dtype: str, quantize_experts: str, keep_mxfp4: bool = False
) -> ModelConfig:
  """The config of what `convert` writes.

  Raises:
    ConversionError, ValueError: the experts cannot have the format asked for.
  """
  stored = checkpoint.load_config(source)
  if stored.expert_format not in (None, "mxfp4"):
    raise ConversionError(
      f"the experts of {source} are in {stored.expert_format} already: quantize the "
      "checkpoint or the Hugging Face model that it was made from"
    )
  if dtype != "source":
    stored = stored.replace(dtype=dtype)
  return hub.target_config(source, stored, quantize_experts, keep_mxfp4)


def convert(
  source: str,
  target: str,
  *,
  dtype: str = "source",
  quantize_experts: str,
  keep_mxfp4: bool = False,
  overwrite: bool = False,
) -> ModelConfig:
  """Quantizes the experts piece by piece; returns the config of what was written.

  Interrupted, and called again, it goes on after the last finished piece. For the
  arguments see `from_hugging_face.convert_from_hugging_face`; the source is a
  checkpoint.

  Raises:
    ConversionError, ValueError: the experts cannot have the format asked for.
    FileNotFoundError: the source is not a complete checkpoint.
    FileExistsError: the target exists.
  """
  checkpoint.check_target(target, overwrite, checkpoint.MANIFEST_FILE)
  config = target_config(source, dtype, quantize_experts, keep_mxfp4)
  stored = checkpoint.load_config(source)
  provenance = checkpoint.load_provenance(source) | {
    "quantized_from": source,
    "dtype": config.dtype,
    "expert_format": config.expert_format,
  }
  writer = checkpoint.Writer(
    target,
    config,
    files=source,
    provenance=provenance,
    fingerprint=fingerprint(source),
    pieces=checkpoint.load_pieces(source),
    overwrite=overwrite,
  )
  missing = {p.name for p in writer.pieces if not writer.is_written(p)}
  sizes = {
    p.name: sum(
      math.prod(s.shape) * s.dtype.itemsize for s in checkpoint.piece_shapes(config, p).values()
    )
    for p in writer.pieces
  }
  check_space(target, sum(sizes[name] for name in missing))
  with (
    writer,
    tqdm(
      total=params_lib.num_bytes(config), unit="B", unit_scale=True, desc="quantizing"
    ) as progress,
  ):
    progress.update(sum(size for name, size in sizes.items() if name not in missing))
    for piece, arrays in checkpoint.iterate_pieces(source, missing):
      arrays = recode(arrays, stored, config)
      shapes = checkpoint.piece_shapes(config, piece)
      writer.write(piece, {n: a.astype(shapes[n].dtype, copy=False) for n, a in arrays.items()})
      progress.update(sizes[piece.name])
      del arrays  # or they would stay while the next piece is read
  return config


def fingerprint(source: str) -> str:
  """Of a checkpoint; changes if its manifest or the time of that does."""
  manifest = pathlib.Path(source) / checkpoint.MANIFEST_FILE
  facts = [str(manifest.resolve()), manifest.stat().st_mtime_ns, manifest.read_text()]
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
