"""Converts a Hugging Face folder to a roe_jax checkpoint."""

from checkpoints_convert import hub, reading
from checkpoints_convert.common import write_pieces
from roe_jax import checkpoint
from roe_jax.config import ModelConfig


def convert_from_hugging_face(
  source: str,
  target: str,
  *,
  dtype: str = "source",
  quantize_experts: str | None = None,
  keep_mxfp4: bool = False,
  quantize_projections: str | None = None,
  revision: str | None = None,
  overwrite: bool = False,
  piece_bytes: int = checkpoint.PIECE_BYTES,
) -> ModelConfig:
  """Converts a model and returns its config.

  An interrupted conversion resumes after the last finished piece when it is called again.

  Args:
    source: a local Hugging Face folder, a GGUF file, or a hub name; see `hub.find`.
    target: the checkpoint folder to write.
    dtype: "float32", "bfloat16" or "source"; see `hub.open_source`.
    quantize_experts: "int8", "int4", "nested:BASE-BITS" or None; see `hub.open_source`.
    keep_mxfp4: see `hub.open_source`.
    quantize_projections: "int8", "int4" or None; see `hub.open_source`.
    revision: branch, tag or commit on the hub.
    overwrite: whether to replace an existing checkpoint at `target`.
    piece_bytes: maximum size of a piece of several layers.

  Raises:
    ConversionError, ValueError: the source cannot be converted.
    FileExistsError: the target exists.
  """
  checkpoint.check_target(target, overwrite, checkpoint.MANIFEST_FILE, source)
  opened = hub.open_source(
    hub.find(source, revision), dtype, quantize_experts, keep_mxfp4, quantize_projections
  )
  provenance = {
    "source": source,
    "revision": revision,
    "source_dtypes": list(opened.stored_dtypes),
    "dtype": opened.config.dtype,
    "expert_format": opened.config.expert_format,
    "projection_format": opened.config.projection_format,
  }
  writer = checkpoint.Writer(
    target,
    opened.config,
    files=opened.folder,
    provenance=provenance,
    fingerprint=opened.fingerprint,
    piece_bytes=piece_bytes,
    overwrite=overwrite,
  )
  read = lambda names: ((p, reading.read(opened, p)) for p in writer.pieces if p.name in names)
  write_pieces(writer, read, "converting")
  return opened.config
