"""Merges fine-tunes of one base into a checkpoint with a task for each; see `roe_jax.merging`."""

from collections.abc import Iterator, Sequence
import hashlib
import json
import pathlib

import numpy as np

from checkpoints_convert import quantize_checkpoint
from checkpoints_convert.common import ConversionError, write_pieces
from roe_jax import checkpoint, merging
from roe_jax.checkpoint_folder import named_leaves, partial_folder
from roe_jax.config import ModelConfig


def target_config(tasks: Sequence[str], base: str) -> ModelConfig:
  """Returns the config of what `convert` writes, the base's.

  Raises:
    ConversionError: the models are not fine-tunes of one architecture.
  """
  config = checkpoint.load_config(base)
  if config.formats:
    raise ConversionError(
      f"{base} is quantized ({config.formats}): merge the models that were quantized"
    )
  for task in tasks:
    own = checkpoint.load_config(task)
    if own.replace(dtype=config.dtype) != config:
      raise ConversionError(
        f"{task} and {base} have different configs: only fine-tunes of the base can be merged"
      )
  return config


def convert(
  tasks: Sequence[str],
  base: str,
  target: str,
  *,
  merge_routers: bool = False,
  overwrite: bool = False,
) -> ModelConfig:
  """Merges checkpoints piece by piece and returns the config of what was written.

  Without a task, the target is the base. An interrupted merge resumes after the last finished
  piece when it is called again.

  Args:
    tasks: checkpoints of fine-tunes.
    base: the checkpoint that they started from.
    target: the folder to write.
    merge_routers: whether routers are merged, too; by default each task keeps its own.
    overwrite: whether to replace an existing checkpoint.

  Raises:
    ConversionError, ValueError: the models cannot be merged.
    FileNotFoundError: a source is not a complete checkpoint.
    FileExistsError: the target exists.
  """
  config = target_config(tasks, base)
  for source in (base, *tasks):
    checkpoint.check_target(target, overwrite, checkpoint.MANIFEST_FILE, source)
  prints = [quantize_checkpoint.fingerprint(source) for source in (base, *tasks)]
  provenance = {"merged": list(tasks), "base": base, "merge_routers": merge_routers}
  writer = checkpoint.Writer(
    target,
    config,
    files=base,
    provenance=checkpoint.load_provenance(base) | provenance,
    fingerprint=hashlib.sha256(json.dumps([prints, merge_routers]).encode()).hexdigest(),
    pieces=checkpoint.load_pieces(base),
    overwrite=overwrite,
  )
  folder = partial_folder(pathlib.Path(target).absolute())

  def read(names):
    of_tasks = [_pieces(task, writer.pieces, names) for task in tasks]
    for (piece, arrays), *others in zip(checkpoint.iterate_pieces(base, names), *of_tasks):
      merging.write_piece(folder, piece.name, *merging.merge_piece(arrays, others, merge_routers))
      yield piece, arrays
      del arrays, others
    merging.finish(folder, [piece.name for piece in writer.pieces], tasks)

  write_pieces(writer, read, "merging")
  return config


def _pieces(
  path: str, pieces: Sequence[checkpoint.Piece], names: Sequence[str]
) -> Iterator[dict[str, np.ndarray]]:
  """Yields the arrays of some pieces; reads a checkpoint with other pieces whole."""
  if checkpoint.load_pieces(path) == tuple(pieces):
    for _, arrays in checkpoint.iterate_pieces(path, names):
      yield arrays
    return
  params, _ = checkpoint.load(path)
  for piece in pieces:
    if piece.name in names:
      yield {n: np.asarray(a) for n, a in checkpoint.piece_arrays(params, piece).items()}


def num_bytes(target: str) -> tuple[int, int]:
  """Returns the bytes of a merged checkpoint's arrays, and of the separate checkpoints'."""
  params, _ = checkpoint.load(target)
  base = sum(a.nbytes for a in named_leaves(params).values())
  folder = pathlib.Path(target) / merging.FOLDER
  added = sum(file.stat().st_size for file in folder.glob("*.npz"))
  return base + added, base * len(merging.Tasks(target).names)
