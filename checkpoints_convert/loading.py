"""Parameters straight from a Hugging Face folder, for those who only want to look."""

import jax
from tqdm import tqdm

from checkpoints_convert import hub, reading
from roe_jax import checkpoint
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.model_formats import ModelFormat
from roe_jax.params import Params

PIECE_BYTES = 64 << 20  # nothing is gained by more, as no piece is a file of its own
_SMALL = 1 << 28  # bytes that are read in less than a second or two: no progress bar


def load(
  source: str,
  dtype: str = "source",
  shardings: Params | jax.sharding.Sharding | None = None,
  *,
  quantize_experts: str | None = None,
  keep_mxfp4: bool | None = None,
  revision: str | None = None,
  piece_bytes: int = PIECE_BYTES,
) -> tuple[Params, ModelConfig]:
  """What converting and then `checkpoint.load` would give, bit by bit, with nothing written.

  A process reads of the files what its devices hold: of experts that are tensors
  of their own no other, of a tensor that is split along its rows only these, of one
  that is split within its rows all. Layers go to the devices in pieces of 64 MiB or
  one layer. Beside the parameters, the devices have their part of one piece, and
  the host what they hold of one parameter in one piece (twice, if experts are
  decoded or quantized on the way) and one hub tensor.

  Args:
    source: a local Hugging Face folder, or a hub name.
    dtype: "float32", "bfloat16", or "source" for that of the files.
    shardings: of the parameters, as for `checkpoint.load`. The config that they are
      made for is that of `load_config` with the same arguments.
    quantize_experts: "int8", "int4" or None.
    keep_mxfp4: whether experts in MXFP4 stay so, or are decoded to `dtype`; by
      default they stay so unless they are quantized.
    revision: branch, tag or commit on the hub.
    piece_bytes: how large a piece of several layers may become.

  Raises:
    ConversionError, ValueError: the source cannot be read, or a sharding splits the
      layer axis.
  """
  opened = hub.open_source(hub.find(source, revision), dtype, quantize_experts, keep_mxfp4)
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
  f"a Hugging Face folder, {hub.HUB}org/name[@revision]",
  lambda name: name.startswith(hub.HUB) or hub.is_hugging_face(name),
  lambda name, weights: hub.find(name, weights=weights),
  hub.load_config,
  lambda name, dtype, shardings: load(name, dtype or "source", shardings),
)
