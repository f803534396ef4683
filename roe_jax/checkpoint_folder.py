"""The layout of a checkpoint folder, and the steps that make writing one atomic.

CKPT/model_config.json              ModelConfig.to_json()
CKPT/tokenizer.json, ...            COMPANION_FILES, copied where they exist
CKPT/params/top/                    embedding, final_norm, unembedding, dense_layers
CKPT/params/layers_00000_00004/     the first four layers with experts, stacked on a leading axis
CKPT/carving.json                   which neuron went where, if experts were carved
CKPT/manifest.json                  format, pieces, provenance; written last
"""

import dataclasses
import math
import os
import pathlib
import shutil
from typing import Any

import jax

from roe_jax import params as params_lib
from roe_jax import typed
from roe_jax.config import ModelConfig
from roe_jax.params import Params

FORMAT = 2
CONFIG_FILE = "model_config.json"
MANIFEST_FILE = "manifest.json"
PLAN_FILE = "plan.json"  # only in a folder that is being written
CARVING_FILE = "carving.json"  # which neuron of a dense model went where
COMPANION_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "tokenizer.model",
  "special_tokens_map.json",
  "added_tokens.json",
  "generation_config.json",
  "chat_template.jinja",
  "chat_template.json",
)

PIECE_BYTES = 256 << 20

PathLike = str | os.PathLike


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of the parameters that is stored as one Orbax checkpoint.

  Attributes:
    name: name of its folder in `params/`.
    start, stop: the layers it holds, counted without the first dense ones; both 0 for the
      parameters outside of these layers.
  """

  name: str
  start: int = 0
  stop: int = 0

  @property
  def num_layers(self) -> int:
    return self.stop - self.start


TOP = Piece("top")


def layers_piece(start: int, stop: int) -> Piece:
  """Returns the piece of the layers from `start` to `stop`."""
  return Piece(f"layers_{start:05d}_{stop:05d}", start, stop)


def plan_pieces(config: ModelConfig, piece_bytes: int = PIECE_BYTES) -> tuple[Piece, ...]:
  """Returns the "top" piece, then pieces of as many layers as fit in `piece_bytes` (at least 1)."""
  step = max(1, piece_bytes // piece_num_bytes(config, Piece("", 0, 1)))
  layers = config.num_expert_layers
  bounds = [(i, min(i + step, layers)) for i in range(0, layers, step)]
  return (TOP, *(layers_piece(a, b) for a, b in bounds))


def piece_shapes(config: ModelConfig, piece: Piece) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the arrays of a piece: {"attention.query": float32[layers of the piece, ...]}.

  Names are those of `LayerParams`, or of `Params` for the "top" piece.
  """
  return {
    name: jax.ShapeDtypeStruct((piece.num_layers, *leaf.shape[1:]), leaf.dtype)
    if piece.num_layers
    else leaf
    for name, leaf in piece_leaves(params_lib.abstract(config), piece).items()
  }


def piece_num_bytes(config: ModelConfig, piece: Piece) -> int:
  """Returns the size of a piece."""
  return sum(math.prod(s.shape) * s.dtype.itemsize for s in piece_shapes(config, piece).values())


def named_leaves(tree: Any) -> dict[str, Any]:
  """Returns {"layers.attention.query": leaf}, in the order of `jax.tree.leaves`."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in flat}


def piece_leaves(params: Params, piece: Piece) -> dict[str, Any]:
  """Returns the stacked leaves with the layers of the piece, or the leaves outside the layers."""
  if piece.num_layers:
    return named_leaves(params.layers)
  return named_leaves(params.replace(layers=None))


def piece_arrays(params: Params, piece: Piece) -> dict[str, Any]:
  """Returns the arrays of a piece, sliced from the parameters of the whole model."""
  leaves = piece_leaves(params, piece)
  if not piece.num_layers:
    return leaves
  return {name: leaf[piece.start : piece.stop] for name, leaf in leaves.items()}


def read_manifest(path: PathLike) -> dict[str, Any]:
  """Reads the manifest of a complete checkpoint.

  Raises:
    FileNotFoundError: there is no complete checkpoint; the message says what was found.
    ValueError: the manifest is malformed or has another format version.
  """
  path = pathlib.Path(path)
  partial = partial_folder(path)
  rerun = "is an unfinished checkpoint: rerun the command that wrote it to resume"
  if not path.is_dir():
    hint = f"; {partial} {rerun}" if partial.is_dir() else ""
    if str(path).startswith(("embedded:", "hf:")):
      hint = ": models of other kinds are opened with roe_jax.open_model or roe_jax.load_params"
    raise FileNotFoundError(f"there is no checkpoint folder {path}{hint}")
  if (path / PLAN_FILE).is_file() and not (path / MANIFEST_FILE).is_file():
    raise FileNotFoundError(f"{path} {rerun}")
  if not (path / CONFIG_FILE).is_file():
    if (path / "config.json").is_file():
      raise FileNotFoundError(
        f"{path} is a Hugging Face folder, not a roe_jax checkpoint: open it with "
        f"roe_jax.open_model, or convert it with python -m checkpoints_convert --source={path} "
        "--target=NEW_FOLDER"
      )
    raise FileNotFoundError(f"{path} has no {CONFIG_FILE}: it is not a roe_jax checkpoint folder")
  if not (path / MANIFEST_FILE).is_file():
    raise FileNotFoundError(
      f"the checkpoint {path} has no {MANIFEST_FILE}, so it is incomplete: copy, save or convert "
      "it again"
    )
  manifest = typed.read(path / MANIFEST_FILE, {"format": int})
  if manifest["format"] != FORMAT:
    raise ValueError(
      f"the checkpoint {path} has format {manifest['format']}, but this version of roe_jax reads "
      f"format {FORMAT}"
    )
  what = str(path / MANIFEST_FILE)
  typed.check_keys(what, manifest, {"pieces": list[dict], "provenance": dict}, others=True)
  for piece in manifest["pieces"]:
    typed.check_keys(f"a piece in {what}", piece, typed.hints(Piece))
  return manifest


def partial_folder(target: PathLike) -> pathlib.Path:
  """Returns the folder in which `target` is built before it is renamed."""
  target = resolved(target)
  return target.with_name(target.name + ".partial")


def check_target(
  target: PathLike, overwrite: bool, marker: str, source: PathLike | None = None
) -> None:
  """Checks that `target` may be written: absent, empty, or replaceable.

  Args:
    target: the folder to write.
    overwrite: whether an existing folder may be replaced.
    marker: a file that a replaceable folder contains, so that a mistyped target never deletes
      an unrelated folder.
    source: a folder or file that is read meanwhile, so that the target must not contain it.

  Raises:
    FileExistsError: it may not be written.
  """
  target = resolved(target)
  if not target.exists() or (target.is_dir() and not any(target.iterdir())):
    return
  if not overwrite:
    complete = " and is complete" if (target / marker).is_file() else ""
    raise FileExistsError(
      f"the target {target} exists{complete}: choose another, or replace it with --overwrite"
    )
  if not (target / marker).is_file():
    raise FileExistsError(
      f"the target {target} exists and has no {marker}, so this program did not write it and does "
      "not replace it: choose another target"
    )
  found = None if source is None else resolved(source)
  if found and found.exists() and target in (found, *found.parents):
    raise FileExistsError(f"the target {target} has the source {source} in it: choose another")
  if _replaced_folder(target).exists():
    raise FileExistsError(
      f"{_replaced_folder(target)} is needed to replace {target}, but it exists: move it away"
    )


def start_partial(target: PathLike, marker: str, text: str) -> pathlib.Path:
  """Empties the partial folder of `target` and writes `text` to the file `marker` in it.

  Raises:
    FileExistsError: the folder exists without `marker`, so something else wrote it.
  """
  partial = partial_folder(target)
  if partial.exists() and any(partial.iterdir()) and not (partial / marker).is_file():
    raise FileExistsError(
      f"{partial} is needed to write {target}, but it exists and was not left by an interrupted "
      "run of this program: move it away"
    )
  partial.mkdir(parents=True, exist_ok=True)
  # The marker is kept throughout: a run killed here leaves a folder that is known to be ours.
  (partial / marker).touch()
  for stray in partial.iterdir():
    if stray.is_dir():
      shutil.rmtree(stray)
    elif stray.name != marker:
      stray.unlink()
  (partial / marker).write_text(text, encoding="utf-8")
  return partial


def copy_companion_files(
  source: PathLike | None, target: PathLike, names: tuple[str, ...] = COMPANION_FILES
) -> None:
  """Copies the files of these names that `source` has, if it is given."""
  for name in names if source is not None else ():
    file = pathlib.Path(source or "") / name
    if file.is_file():
      shutil.copyfile(file, pathlib.Path(target) / name)


def publish(target: PathLike) -> None:
  """Renames the partial folder of `target` to `target`, replacing an existing folder."""
  target = resolved(target)
  replaced = _replaced_folder(target)
  if target.exists():
    target.rename(replaced)
  partial_folder(target).rename(target)
  shutil.rmtree(replaced, ignore_errors=True)


def resolved(path: PathLike) -> pathlib.Path:
  """Follows symbolic links; unlike `Path.resolve`, never fails where they point to each other."""
  return pathlib.Path(os.path.realpath(path))


def _replaced_folder(target: pathlib.Path) -> pathlib.Path:
  return target.with_name(target.name + ".replaced")
