"""Saves and loads checkpoints: parameters, config, and tokenizer files.

Each piece of a checkpoint (see `checkpoint_folder`) is an Orbax checkpoint of its own, so that
reading and writing need memory for one piece at a time, although the loaded layers are stacked
arrays. The folder is built as `CKPT.partial` and renamed when it is complete; a `Writer` keeps
the finished pieces of an interrupted run.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import contextlib
import ctypes
import dataclasses
import json
import pathlib
import shutil
import sys
from typing import Any
import warnings

from flax import traverse_util
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from roe_jax import digests, merging, orbax_storage, plane_storage
from roe_jax import params as params_lib
from roe_jax.checkpoint_folder import (
  CARVING_FILE,
  COMPANION_FILES,
  CONFIG_FILE,
  FORMAT,
  MANIFEST_FILE,
  PIECE_BYTES,
  PLAN_FILE,
  TOP,
  PathLike,
  Piece,
  check_target,
  copy_companion_files,
  layers_piece,
  named_leaves,
  partial_folder,
  piece_arrays,
  piece_leaves,
  piece_shapes,
  plan_pieces,
  publish,
  read_manifest,
  start_partial,
)
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.text.tokenizer import Tokenizer


class Writer:
  """Writes a checkpoint piece by piece.

  As a context manager it calls `finish` on a normal exit; on an exception it leaves
  `PATH.partial`, from which a Writer with the same arguments resumes.

  Attributes:
    pieces: the pieces to write, in the order of `plan_pieces`.
  """

  def __init__(
    self,
    path: PathLike,
    config: ModelConfig,
    *,
    files: PathLike | None = None,
    provenance: Mapping[str, Any] | None = None,
    fingerprint: str = "",
    piece_bytes: int = PIECE_BYTES,
    pieces: tuple[Piece, ...] | None = None,
    overwrite: bool = False,
  ):
    """Creates `PATH.partial` or resumes from it.

    Args:
      path: the folder to write.
      config: the model's config; `config.dtype` is the dtype on disk.
      files: a folder from which `COMPANION_FILES` and `CARVING_FILE` are copied.
      provenance: JSON values for the manifest: where the parameters came from.
      fingerprint: identifies the origin of the parameters; unfinished work of another
        fingerprint, config or plan is discarded. An empty one never resumes.
      piece_bytes: maximum size of a piece of several layers.
      pieces: the pieces of another checkpoint, to be used in place of `piece_bytes`.
      overwrite: whether to replace an existing checkpoint at `path`.

    Raises:
      FileExistsError: `path` exists and may not be replaced.
    """
    self.path = pathlib.Path(path).absolute()
    self.config = config
    self.pieces = pieces or plan_pieces(config, piece_bytes)
    self._files = None if files is None else pathlib.Path(files)
    self._provenance = dict(provenance or {})
    check_target(self.path, overwrite, MANIFEST_FILE)
    self._partial = partial_folder(self.path)
    self._params = self._partial / "params"
    plan = json.dumps(
      {
        "format": FORMAT,
        "config": config.to_json(),
        "fingerprint": fingerprint,
        "pieces": [dataclasses.astuple(p) for p in self.pieces],
      },
      indent=2,
    )
    if jax.process_index() == 0:
      known = self._partial / PLAN_FILE
      if not (fingerprint and known.is_file() and known.read_text("utf-8") == plan):
        start_partial(self.path, PLAN_FILE, plan)
      self._params.mkdir(exist_ok=True)
    self._sync("start")
    self._written = {p.name for p in self.pieces if self._is_complete(p)}

  def is_written(self, piece: Piece) -> bool:
    """Whether the piece is complete, in this run or an earlier one."""
    return piece.name in self._written

  def write(self, piece: Piece, arrays: Mapping[str, jax.Array | np.ndarray]) -> None:
    """Writes one piece, with names, shapes and dtypes as in `piece_shapes`.

    Raises:
      ValueError: the arrays are not those of the piece, or the piece is already written.
    """
    if self.is_written(piece):
      raise ValueError(f"the piece {piece.name} is already written")
    expected = piece_shapes(self.config, piece)
    _check_leaves(f"the piece {piece.name}", arrays, expected)
    arrays = plane_storage.pack(self.config, piece, arrays)
    from orbax.checkpoint import v1 as ocp

    with orbax_storage.saving():
      # Overwrites only a piece that a killed run left half-written.
      ocp.save(
        str(self._params / piece.name),
        traverse_util.unflatten_dict(arrays, sep="."),
        overwrite=True,
      )
    digests.write(self._params / piece.name, arrays, int(piece.num_layers > 0))
    self._written.add(piece.name)

  def finish(self) -> None:
    """Completes the folder and renames it to its final name.

    Raises:
      ValueError: pieces are missing.
    """
    missing = [p.name for p in self.pieces if not self.is_written(p)]
    if missing:
      raise ValueError(f"cannot finish {self.path}: pieces not written: {', '.join(missing)}")
    self._sync("written")
    if jax.process_index() == 0:
      for stray in self._params.iterdir():
        if stray.name not in self._written:
          shutil.rmtree(stray)
      copy_companion_files(self._files, self._partial, (*COMPANION_FILES, CARVING_FILE))
      (self._partial / CONFIG_FILE).write_text(self.config.to_json(), encoding="utf-8")
      manifest = {
        "format": FORMAT,
        "pieces": [dataclasses.asdict(p) for p in self.pieces],
        "provenance": self._provenance,
      }
      (self._partial / MANIFEST_FILE).write_text(
        json.dumps(manifest, indent=2) + "\n", encoding="utf-8"
      )
      publish(self.path)
      (self.path / PLAN_FILE).unlink()
    self._sync("finish")

  def _is_complete(self, piece: Piece) -> bool:
    if not digests.are_written(self._params / piece.name):
      return False
    try:
      _check_piece(self._partial, piece, self.config)
    except ValueError:
      return False
    return True

  def _sync(self, name: str) -> None:
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f"roe_jax_checkpoint_{name}")

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, exception_type, exception, traceback) -> None:
    if exception_type is None:
      self.finish()


def save(
  path: PathLike,
  params: Params,
  config: ModelConfig,
  tokenizer: Tokenizer | None = None,
  *,
  files: PathLike | None = None,
  provenance: Mapping[str, Any] | None = None,
  piece_bytes: int = PIECE_BYTES,
  overwrite: bool = False,
) -> None:
  """Writes `params` (in `config.dtype`) as a checkpoint; see `Writer`.

  With `tokenizer`, its files and the model's other companion files are copied from the
  folder that it was loaded from; `files` names another folder. Without either, a warning
  says that programs will refuse the checkpoint.

  Raises:
    FileExistsError: `path` exists and may not be replaced.
    ValueError: the parameters are not those of `config`.
  """
  params_lib.validate(params, config)
  if files is None and tokenizer is not None:
    files = tokenizer.folder
  if files is None or not (pathlib.Path(files) / "tokenizer.json").is_file():
    warnings.warn(
      f"the checkpoint {path} is saved without a tokenizer, which programs need: pass the "
      "tokenizer of roe_jax.open_model, or files=FOLDER with a tokenizer.json",
      stacklevel=2,
    )
  with Writer(
    path, config, files=files, provenance=provenance, piece_bytes=piece_bytes, overwrite=overwrite
  ) as writer:
    for piece in writer.pieces:
      writer.write(piece, piece_arrays(params, piece))


def load_config(path: PathLike) -> ModelConfig:
  """Loads the model config of a checkpoint.

  Raises:
    FileNotFoundError: there is no complete checkpoint.
    ValueError: the config is malformed.
  """
  read_manifest(path)
  return ModelConfig.from_json((pathlib.Path(path) / CONFIG_FILE).read_text("utf-8"))


def load_provenance(path: PathLike) -> dict[str, Any]:
  """Returns the origin of a checkpoint, as recorded in its manifest."""
  return read_manifest(path)["provenance"]


def load_pieces(path: PathLike) -> tuple[Piece, ...]:
  """Returns the pieces of a checkpoint, "top" first; raises as `load`."""
  return _open(path)[1]


def load(
  path: PathLike,
  dtype: str | None = None,
  shardings: Params | jax.sharding.Sharding | None = None,
  task: int | str | None = None,
  scale: str = "sums",
) -> tuple[Params, ModelConfig]:
  """Reads a checkpoint onto devices, piece by piece.

  Each device reads only its part, in whole chunks of at most 32 MiB; no chunk contains two
  experts. In addition to the parameters, devices hold their part of one piece (by default 256 MiB,
  or one layer if that is larger), and the host at most two more pieces and 200 MB of Orbax caches.

  Args:
    path: the checkpoint folder.
    dtype: dtype to restore in; the checkpoint's own by default.
    shardings: of the stacked arrays, a `Params` tree or one for all; the default device by
      default.
    task: index or name of a task of merged fine-tunes; None: their base; "all": the base with all
      tasks, for rosters with `member_tasks`. See `merging`.
    scale: one of `merging.SCALES`.

  Returns:
    The parameters, and the config with `dtype` as restored.

  Raises:
    FileNotFoundError: there is no complete checkpoint, or a piece is missing.
    ValueError: the folder contradicts its config, a piece is damaged, a sharding splits the
      layer axis, or all tasks are to be on several devices.
  """
  stored, pieces = _open(path)
  config = stored if dtype is None else stored.replace(dtype=dtype)
  rebuild = lambda piece, arrays: arrays
  read_all = lambda params: params
  if task == merging.ALL:
    if shardings is not None:
      raise ValueError(f"{path}: a roster of tasks needs one device, and no mesh")
    all_tasks = merging.Tasks(path)
    read_all = lambda params: params.replace(tasks=all_tasks.read_all(pieces, scale))
  elif task is not None:
    tasks = merging.Tasks(path)
    index = tasks.index(task)
    of_task = index, tasks.scale(index, scale)
    rebuild = lambda piece, arrays: merging.rebuild(arrays, tasks.read(piece.name), *of_task)

  def read(piece, arrays):
    on_disk = piece_shapes(stored, piece)
    like = {n: s.update(dtype=on_disk[n].dtype) for n, s in arrays.items()}
    found = rebuild(piece, _read(path, stored, piece, like))
    return {n: x.astype(arrays[n].dtype) for n, x in found.items()}

  return read_all(assemble(config, pieces, read, shardings)), config


def assemble(
  config: ModelConfig,
  pieces: Sequence[Piece],
  read: Callable[[Piece, dict[str, jax.ShapeDtypeStruct]], dict[str, jax.Array]],
  shardings: Params | jax.sharding.Sharding | None = None,
) -> Params:
  """Assembles parameters on devices from pieces that are read one after the other.

  Args:
    config: config of the parameters.
    pieces: pieces as `plan_pieces` returns them.
    read: `read(piece, arrays)` returns the arrays of `piece_shapes`, given as
      `ShapeDtypeStruct`s with shardings.
    shardings: see `load`.

  Raises:
    ValueError: the shardings do not match the parameters.
  """
  abstract = params_lib.abstract(config)
  treedef = jax.tree.structure(abstract)
  tree: Any = jnp.zeros(()).sharding if shardings is None else shardings
  if isinstance(tree, jax.sharding.Sharding):
    tree = jax.tree.unflatten(treedef, [tree] * treedef.num_leaves)
  if jax.tree.structure(tree) != treedef:
    raise ValueError(
      f"shardings must be one Sharding or a Params tree like the model's {treedef}, "
      f"got {jax.tree.structure(tree)}"
    )

  placements = piece_leaves(tree, pieces[1])
  stacked = _with_shardings(piece_leaves(abstract, pieces[1]), placements)
  for name, leaf in stacked.items():
    if leaf.sharding.shard_shape(leaf.shape)[0] != leaf.shape[0]:
      raise ValueError(
        f"the sharding of layers.{name} splits the layer axis, which a device "
        f"must hold whole: {leaf.sharding}"
      )
  top = _with_shardings(piece_shapes(config, pieces[0]), piece_leaves(tree, pieces[0]))
  leaves = read(pieces[0], top)
  if len(pieces) == 2:
    layers = read(pieces[1], stacked)
  else:
    zeros = lambda: {n: jnp.zeros(s.shape, s.dtype) for n, s in stacked.items()}
    layers = jax.jit(zeros, out_shardings=placements)()
    insert = jax.jit(_insert, donate_argnums=0, out_shardings=placements)
    for piece in pieces[1:]:
      part = read(piece, _with_shardings(piece_shapes(config, piece), placements))
      # Waiting keeps the next piece from being read while this one is alive.
      layers = jax.block_until_ready(insert(layers, part, jnp.int32(piece.start)))
      del part
      _release_freed_memory()

  leaves |= {f"layers.{name}": leaf for name, leaf in layers.items()}
  names = named_leaves(abstract)
  return jax.tree.unflatten(treedef, [leaves[name] for name in names])


def _release_freed_memory() -> None:
  """Returns freed memory to the system, where the C library is glibc.

  glibc keeps an arena for each reading thread: loading a model of 700 MB onto eight host devices
  left 350 MB in them without this call, and 30 MB with it.
  """
  library = ctypes.CDLL(None) if sys.platform == "linux" else None
  if hasattr(library, "malloc_trim"):
    library.malloc_trim(0)


def iterate_pieces(
  path: PathLike, names: Collection[str] | None = None
) -> Iterator[tuple[Piece, dict[str, np.ndarray]]]:
  """Yields pieces with their arrays on the host, named as in `piece_shapes`.

  Args:
    path: the checkpoint folder.
    names: names of the pieces to read; all by default.

  Raises: as `load`.
  """
  config, pieces = _open(path)
  for piece in pieces:
    if names is not None and piece.name not in names:
      continue
    # Orbax restores to the host where the abstract leaf is a numpy array; a broadcast scalar is a
    # numpy array that takes no memory.
    like = lambda s: np.broadcast_to(np.zeros((), s.dtype), s.shape)
    yield piece, _read(path, config, piece, jax.tree.map(like, piece_shapes(config, piece)))


def _check_leaves(what, got, expected):
  if set(got) != set(expected):
    raise ValueError(
      f"{what} lacks the parameters {sorted(set(expected) - set(got))} and has "
      f"unknown parameters {sorted(set(got) - set(expected))}"
    )
  for name, want in expected.items():
    if got[name].shape != want.shape or got[name].dtype != want.dtype:
      raise ValueError(
        f"{what}: {name} is {got[name].dtype}{list(got[name].shape)}, but the model config "
        f"expects {want.dtype}{list(want.shape)}"
      )


def _open(path: PathLike) -> tuple[ModelConfig, tuple[Piece, ...]]:
  """Returns the config and the pieces, after checking every piece against the config."""
  manifest = read_manifest(path)
  config = load_config(path)
  pieces = tuple(Piece(**p) for p in manifest["pieces"])
  bounds = [0, *(p.stop for p in pieces[1:])]
  layers = config.num_expert_layers
  if pieces != (TOP, *map(layers_piece, bounds, bounds[1:])) or bounds[-1] != layers:
    raise ValueError(
      f"the pieces of the checkpoint {path} are {[p.name for p in pieces]}, not "
      f'"top" followed by the {layers} layers of its config in order'
    )
  for piece in pieces:
    if not _piece_folder(path, piece).is_dir():
      raise FileNotFoundError(
        f"the checkpoint {path} has no piece params/{piece.name}: copy, save or convert it again"
      )
    with _reading(path, piece):
      orbax_storage.check_files(_piece_folder(path, piece))
    _check_piece(path, piece, config)
  return config, pieces


def _check_piece(path: PathLike, piece: Piece, config: ModelConfig) -> None:
  """Compares the metadata of a piece with the config, without reading arrays."""
  from orbax.checkpoint import v1 as ocp

  with _reading(path, piece):
    metadata: Any = ocp.metadata(str(_piece_folder(path, piece))).metadata
    if metadata is None:
      raise orbax_storage.Damage("its metadata cannot be read")
    found = traverse_util.flatten_dict(metadata, sep=".")
  expected = plane_storage.stored(config, piece, piece_shapes(config, piece))
  _check_leaves(f"the piece params/{piece.name} of the checkpoint {path}", found, expected)


def _piece_folder(path: PathLike, piece: Piece) -> pathlib.Path:
  return pathlib.Path(path).absolute() / "params" / piece.name


def _read(
  path: PathLike, config: ModelConfig, piece: Piece, abstract: dict[str, Any]
) -> dict[str, Any]:
  """Reads and checks a piece's arrays."""
  from orbax.checkpoint import v1 as ocp

  folder, stored = _piece_folder(path, piece), plane_storage.stored(config, piece, abstract)
  tree = traverse_util.unflatten_dict(stored, sep=".")
  with _reading(path, piece):
    found = traverse_util.flatten_dict(ocp.load(str(folder), tree), sep=".")
    digests.check(folder, found, int(piece.num_layers > 0))
  return plane_storage.unpack(config, piece, found, abstract)


def _reading(path: PathLike, piece: Piece) -> contextlib.AbstractContextManager[None]:
  return orbax_storage.reading(
    f"the piece params/{piece.name} of the checkpoint {path}", "copy, save or convert it again"
  )


def _with_shardings(shapes, shardings):
  return {
    name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=shardings[name])
    for name, s in shapes.items()
  }


def _insert(stacked, part, start):
  return jax.tree.map(
    lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, start, 0), stacked, part
  )
