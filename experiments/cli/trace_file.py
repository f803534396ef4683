"""The file of --trace: what the members of a roster compute for each sequence, as arrays."""

from collections.abc import Sequence
import io
import pathlib
import zipfile

from absl import flags
import numpy as np

from experiments.cli import distributed
from roe_jax import diagnostics
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster

FLAGS = flags.FLAGS


def define_flag() -> None:
  flags.DEFINE_string(
    "trace",
    None,
    "NPZ file of what each member computes for every line of --input, such as 0/logits [R, S, V], "
    "0/router_logits [L, R, S, E], 0/experts and 0/gates [L, R, S, A] and 0/tokens [S] of the "
    "first line. Large: 4 x R x S x V bytes of logits per line.",
  )


def check() -> None:
  """Checks the flag.

  Raises:
    ValueError: the file has another ending.
  """
  if FLAGS.trace is not None and pathlib.Path(FLAGS.trace).suffix != ".npz":
    raise ValueError(f"--trace must be a file that ends in .npz, got {FLAGS.trace}")


def write(
  params: Params, config: ModelConfig, roster: Roster, sequences: Sequence[Sequence[int]]
) -> None:
  """Writes the traces of sequences, whose request ids are their indices, if --trace is given."""
  if FLAGS.trace is None:
    return
  path = pathlib.Path(FLAGS.trace).expanduser().resolve()
  partial = path.with_name(path.name + ".partial")
  is_first = distributed.is_first_process()
  if is_first:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)
  for i, tokens in enumerate(sequences):  # one at a time: traces are large
    found = diagnostics.trace(params, config, [tokens], roster=roster, request_ids=[i])
    if is_first:
      arrays = {name: array[..., 0, :, :] for name, array in found._asdict().items()}
      with zipfile.ZipFile(partial, "a") as file:
        for name, array in ({"tokens": np.asarray(tokens, np.int32)} | arrays).items():
          content = io.BytesIO()
          np.lib.format.write_array(content, np.ascontiguousarray(array))
          file.writestr(f"{i}/{name}.npy", content.getbuffer())
  if is_first:
    partial.replace(path)
