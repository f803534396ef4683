"""A Hugging Face folder to a roe_jax checkpoint."""

import math

from tqdm import tqdm

from checkpoints_convert import hub, reading
from checkpoints_convert.common import check_space
from roe_jax import checkpoint
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig


def convert_from_hugging_face(
  source: str,
  target: str,
  *,
  dtype: str = "source",
  quantize_experts: str | None = None,
  keep_mxfp4: bool = False,
  revision: str | None = None,
  overwrite: bool = False,
  piece_bytes: int = checkpoint.PIECE_BYTES,
) -> ModelConfig:
  """Converts and returns the model's config.

  An interrupted conversion, called again, goes on after the last finished piece.

  Args:
    source: a local Hugging Face folder, or a hub name.
    target: the checkpoint folder to write.
    dtype: "float32", "bfloat16" or "source"; see `hub.open_source`.
    quantize_experts: "int8", "int4" or None; see `hub.open_source`.
    keep_mxfp4: see `hub.open_source`.
    revision: branch, tag or commit on the hub.
    overwrite: whether an existing checkpoint at `target` is replaced.
    piece_bytes: how large a piece of several layers may become.

  Raises:
    ConversionError, ValueError: the source cannot be converted.
    FileExistsError: the target exists.
  """
  checkpoint.check_target(target, overwrite, checkpoint.MANIFEST_FILE)
  opened = hub.open_source(hub.find(source, revision), dtype, quantize_experts, keep_mxfp4)
  config = opened.config
  provenance = {
    "source": source,
    "revision": revision,
    "source_dtypes": list(opened.stored_dtypes),
    "dtype": config.dtype,
    "expert_format": config.expert_format,
  }
  writer = checkpoint.Writer(
    target,
    config,
    files=opened.folder,
    provenance=provenance,
    fingerprint=opened.fingerprint,
    piece_bytes=piece_bytes,
    overwrite=overwrite,
  )
  missing = [p for p in writer.pieces if not writer.is_written(p)]
  check_space(target, sum(_piece_bytes(config, p) for p in missing))
  with (
    writer,
    tqdm(
      total=params_lib.num_bytes(config), unit="B", unit_scale=True, desc="converting"
    ) as progress,
  ):
    for piece in writer.pieces:
      if piece in missing:
        writer.write(piece, reading.read(opened, piece))
      progress.update(_piece_bytes(config, piece))
  return config


def _piece_bytes(config: ModelConfig, piece: checkpoint.Piece) -> int:
  return sum(
    math.prod(s.shape) * s.dtype.itemsize for s in checkpoint.piece_shapes(config, piece).values()
  )
