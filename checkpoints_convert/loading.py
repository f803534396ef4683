"""Loads parameters from Hugging Face files onto devices, without a conversion."""

import jax
from tqdm import tqdm

from checkpoints_convert import gguf_model, hub, reading
from roe_jax import checkpoint
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.model_formats import ModelFormat
from roe_jax.params import Params

PIECE_BYTES = 64 << 20  # larger pieces would not be faster, because they are not files
_SMALL = 1 << 28  # bytes; smaller models load without a progress bar


def load(
  source: str,
  dtype: str = "source",
  shardings: Params | jax.sharding.Sharding | None = None,
  *,
  quantize_experts: str | None = None,
  keep_mxfp4: bool | None = None,
  quantize_projections: str | None = None,
  revision: str | None = None,
  piece_bytes: int = PIECE_BYTES,
) -> tuple[Params, ModelConfig]:
  """Loads exactly what converting and then `checkpoint.load` would load, without writing files.

  A process reads only what its devices hold: of separate experts only its own, of a tensor that is
  split along its rows only these rows, but of a tensor that is split within its rows all of it.
  Layers are sent to the devices in pieces of 64 MiB or one layer. In addition to the parameters,
  the devices hold their part of one piece, and the host holds their part of one parameter in one
  piece (twice, if experts are decoded or quantized) and one hub tensor.

  Args:
    source: a local Hugging Face folder, a GGUF file, or a hub name.
    dtype: "float32", "bfloat16", or "source" for the dtype of the files.
    shardings: see `checkpoint.load`; made for the config that `load_config` returns for the same
      arguments.
    quantize_experts: "int8", "int4", "nested:BASE-BITS" or None.
    keep_mxfp4: whether to keep experts in MXFP4 or to decode them to `dtype`; kept by default
      unless they are quantized.
    quantize_projections: "int8", "int4" or None; see `ModelConfig.projection_format`.
    revision: branch, tag or commit on the hub.
    piece_bytes: maximum size of a piece of several layers.

  Raises:
    ConversionError, ValueError: the source cannot be read, or a sharding splits the layer axis.
  """
  opened = hub.open_source(
    hub.find(source, revision), dtype, quantize_experts, keep_mxfp4, quantize_projections
  )
  config = opened.config
  pieces = checkpoint.plan_pieces(config, piece_bytes)
  with tqdm(
    total=params_lib.num_bytes(config),
    unit="B",
    unit_scale=True,
    desc="reading",
    disable=jax.process_index() > 0 or params_lib.num_bytes(config) < _SMALL,
  ) as progress:

    def read(piece, placed):
      arrays = reading.read_sharded(opened, piece, placed)
      progress.update(sum(x.nbytes for x in arrays.values()))
      return arrays

    return checkpoint.assemble(config, pieces, read, shardings), config


HUGGING_FACE = ModelFormat(
  f"a Hugging Face folder, a .gguf file, {hub.HUB}org/name[@revision]",
  lambda name: name.startswith(hub.HUB) or gguf_model.is_gguf(name) or hub.is_hugging_face(name),
  lambda name, weights: hub.find(name, weights=weights),
  hub.load_config,
  lambda name, dtype, shardings: load(name, dtype or "source", shardings),
)
