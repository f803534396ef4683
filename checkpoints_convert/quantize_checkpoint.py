"""Quantizes the experts of a roe_jax checkpoint."""

import hashlib
import json
import pathlib

from checkpoints_convert import hub
from checkpoints_convert.common import ConversionError, write_pieces
from checkpoints_convert.expert_formats import recode
from roe_jax import checkpoint, quantization
from roe_jax.checkpoint_folder import resolved
from roe_jax.config import ModelConfig


def is_checkpoint(source: str) -> bool:
  """Whether the source is a roe_jax checkpoint, as opposed to a Hugging Face model."""
  return (pathlib.Path(source).expanduser() / checkpoint.CONFIG_FILE).is_file()


def check_format(quantize_experts: str) -> None:
  """Raises a ValueError if this is no format to quantize experts to."""
  if quantize_experts == "mxfp4":
    raise ConversionError(
      "--quantize_experts writes int8, int4 or nested:BASE-BITS; MXFP4 is kept with --keep_mxfp4"
    )
  quantization.find(quantize_experts)


def target_config(
  source: str, dtype: str, quantize_experts: str, keep_mxfp4: bool = False
) -> ModelConfig:
  """Returns the config of what `convert` writes.

  Raises:
    ConversionError, ValueError: the experts cannot be stored in the requested format.
  """
  stored = checkpoint.load_config(source)
  if stored.expert_format not in (None, "mxfp4"):
    raise ConversionError(
      f"the experts of {source} are already in {stored.expert_format}: quantize the checkpoint or "
      "the Hugging Face model that it was made from"
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
  """Quantizes the experts piece by piece and returns the config of what was written.

  An interrupted conversion resumes after the last finished piece when it is called again. The
  source is a checkpoint; for the other arguments see `convert_from_hugging_face`.

  Raises:
    ConversionError, ValueError: the experts cannot be stored in the requested format.
    FileNotFoundError: the source is not a complete checkpoint.
    FileExistsError: the target exists.
  """
  checkpoint.check_target(target, overwrite, checkpoint.MANIFEST_FILE, source)
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

  def read(names):
    for piece, arrays in checkpoint.iterate_pieces(source, names):
      shapes = checkpoint.piece_shapes(config, piece)
      arrays = recode(arrays, stored, config)
      yield piece, {n: a.astype(shapes[n].dtype, copy=False) for n, a in arrays.items()}
      del arrays  # or they would stay in memory while the next piece is read

  write_pieces(writer, read, "quantizing")
  return config


def fingerprint(source: str) -> str:
  """Returns a hash of a checkpoint that changes with its manifest or the manifest's time."""
  manifest = pathlib.Path(source) / checkpoint.MANIFEST_FILE
  facts = [str(resolved(manifest)), manifest.stat().st_mtime_ns, manifest.read_text("utf-8")]
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
