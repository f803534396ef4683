"""The layout of a checkpoint folder, and how a folder comes to be in one step.

CKPT/model_config.json              ModelConfig.to_json()
CKPT/tokenizer.json, ...            copied where they exist (COMPANION_FILES)
CKPT/params/top/                    embedding, final_norm, unembedding
CKPT/params/layers_00000_00004/     layers 0 to 3, stacked on a leading axis
CKPT/manifest.json                  format, pieces, provenance; written last
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
from typing import Any

import jax

from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.params import Params

FORMAT = 2
CONFIG_FILE = "model_config.json"
MANIFEST_FILE = "manifest.json"
PLAN_FILE = "plan.json"  # only in a folder that is being written
COMPANION_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "tokenizer.model",
  "special_tokens_map.json",
  "generation_config.json",
  "chat_template.jinja",
)

PIECE_BYTES = 256 << 20

PathLike = str | os.PathLike


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of the parameters that is one Orbax checkpoint.

  Attributes:
    name: of its folder in `params/`.
    start, stop: the layers it holds; both 0 for what lies outside the layers.
  """

  name: str
  start: int = 0
  stop: int = 0

  @property
  def num_layers(self) -> int:
    return self.stop - self.start


def plan_pieces(config: ModelConfig, piece_bytes: int = PIECE_BYTES) -> tuple[Piece, ...]:
  """The "top" piece, and then the layers in order.

  A piece has as many layers as fit in `piece_bytes`, but at least one.
  """
  one = piece_shapes(config, Piece("", 0, 1))
  layer_bytes = sum(math.prod(s.shape) * s.dtype.itemsize for s in one.values())
  step = max(1, piece_bytes // layer_bytes)
  bounds = [(i, min(i + step, config.num_layers)) for i in range(0, config.num_layers, step)]
  return (Piece("top"), *(Piece(f"layers_{a:05d}_{b:05d}", a, b) for a, b in bounds))


def piece_shapes(config: ModelConfig, piece: Piece) -> dict[str, jax.ShapeDtypeStruct]:
  """The arrays of a piece: {"attention.query": float32[layers of the piece, ...]}.

  Names are those of `LayerParams`, or of `Params` for the "top" piece.
  """
  return {
    name: jax.ShapeDtypeStruct((piece.num_layers, *leaf.shape[1:]), leaf.dtype)
    if piece.num_layers
    else leaf
    for name, leaf in piece_leaves(params_lib.abstract(config), piece).items()
  }


def named_leaves(tree: Any) -> dict[str, Any]:
  """{"layers.attention.query": leaf}, in the order of `jax.tree.leaves`."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in flat}


def piece_leaves(params: Params, piece: Piece) -> dict[str, Any]:
  """The leaves that the piece takes its layers from, or those outside of the layers."""
  if piece.num_layers:
    return named_leaves(params.layers)
  return named_leaves(params.replace(layers=None))


def piece_arrays(params: Params, piece: Piece) -> dict[str, Any]:
  """The arrays of a piece out of the parameters of the whole model."""
  leaves = piece_leaves(params, piece)
  if not piece.num_layers:
    return leaves
  return {name: leaf[piece.start : piece.stop] for name, leaf in leaves.items()}


def read_manifest(path: PathLike) -> dict[str, Any]:
  """The manifest of a complete checkpoint.

  Raises:
    FileNotFoundError: no complete checkpoint is there; the message says what is.
    ValueError: the manifest is malformed or of another format.
  """
  path = pathlib.Path(path)
  partial = partial_folder(path)
  if not path.is_dir():
    hint = (
      f"; {partial} is an unfinished one: run the command that wrote it again"
      if partial.is_dir()
      else ""
    )
    raise FileNotFoundError(f"there is no checkpoint folder {path}{hint}")
  if (path / PLAN_FILE).is_file() and not (path / MANIFEST_FILE).is_file():
    raise FileNotFoundError(
      f"{path} is an unfinished checkpoint: run the command that wrote it again"
    )
  if not (path / CONFIG_FILE).is_file():
    if (path / "config.json").is_file():
      raise FileNotFoundError(
        f"{path} looks like a Hugging Face folder, not a roe_jax checkpoint: convert it "
        f"first with python -m checkpoints_convert --source={path} --target=NEW_FOLDER, or open "
        "it as it is with checkpoints_convert.load"
      )
    raise FileNotFoundError(f"{path} has no {CONFIG_FILE}: it is not a roe_jax checkpoint folder")
  if not (path / MANIFEST_FILE).is_file():
    raise FileNotFoundError(
      f"the checkpoint {path} has no {MANIFEST_FILE}: it is incomplete; copy, save or "
      "convert it again"
    )
  try:
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    found = manifest["format"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path / MANIFEST_FILE} is not a checkpoint manifest: {error}") from error
  if found != FORMAT:
    raise ValueError(
      f"the checkpoint {path} has format {found}, this version of roe_jax reads format {FORMAT}"
    )
  return manifest


def partial_folder(target: PathLike) -> pathlib.Path:
  """Where `target` is built before it is renamed."""
  target = pathlib.Path(target)
  return target.with_name(target.name + ".partial")


def check_target(target: PathLike, overwrite: bool, marker: str) -> None:
  """Whether `target` may be written: absent, empty, or replaceable.

  Args:
    target: the folder to be written.
    overwrite: whether an existing one may be replaced.
    marker: a file that a replaceable folder has, so that a mistyped target
      never costs anyone another folder.

  Raises:
    FileExistsError: it may not.
  """
  target = pathlib.Path(target)
  if not target.exists() or (target.is_dir() and not any(target.iterdir())):
    return
  if not overwrite:
    raise FileExistsError(
      f"the target {target} exists; choose another, or ask to replace it (--overwrite)"
    )
  if not (target / marker).is_file():
    raise FileExistsError(
      f"the target {target} exists and has no {marker}, so it is not what this "
      "program writes and is not replaced; choose another target"
    )
  if _replaced_folder(target).exists():
    raise FileExistsError(
      f"{_replaced_folder(target)} is needed to replace {target}, but it exists; move it away"
    )


def start_partial(target: PathLike, marker: str, text: str) -> pathlib.Path:
  """Empties the partial folder of `target` and puts the file `marker` there.

  Raises:
    FileExistsError: the folder exists without `marker`: it is someone else's.
  """
  partial = partial_folder(target)
  if partial.exists():
    if any(partial.iterdir()) and not (partial / marker).is_file():
      raise FileExistsError(
        f"{partial} is needed to write {target}, but it exists and was not left by "
        "an interrupted run of this program; move it away"
      )
  partial.mkdir(parents=True, exist_ok=True)
  # The marker stays until the last: what is killed here leaves a folder of this program.
  (partial / marker).touch()
  for stray in partial.iterdir():
    if stray.is_dir():
      shutil.rmtree(stray)
    elif stray.name != marker:
      stray.unlink()
  (partial / marker).write_text(text)
  return partial


def publish(target: PathLike) -> None:
  """Renames the partial folder of `target` to `target`, replacing what is there."""
  target = pathlib.Path(target)
  replaced = _replaced_folder(target)
  if target.exists():
    target.rename(replaced)
  partial_folder(target).rename(target)
  shutil.rmtree(replaced, ignore_errors=True)


def _replaced_folder(target: pathlib.Path) -> pathlib.Path:
  return target.with_name(target.name + ".replaced")
