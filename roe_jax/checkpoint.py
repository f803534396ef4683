"""Saving and loading of parameters, with config and tokenizer files beside.

Every piece of a checkpoint (see `checkpoint_folder`) is an Orbax checkpoint of
its own, so that a model can be written and read with one piece in memory at a
time, although in memory all layers are one stacked array. The folder is built
as `CKPT.partial` and renamed when it is complete; what an interrupted `Writer`
has finished is kept and not redone.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import contextlib
import ctypes
import dataclasses
import functools
import json
import pathlib
import shutil
import sys
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from roe_jax import params as params_lib
from roe_jax.checkpoint_folder import (
  COMPANION_FILES,
  CONFIG_FILE,
  FORMAT,
  MANIFEST_FILE,
  PIECE_BYTES,
  PLAN_FILE,
  PathLike,
  Piece,
  check_target,
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

_CHUNK_BYTES = 32 << 20


class Writer:
  """Writes a checkpoint piece by piece.

  As a context manager it calls `finish` on a normal exit; on an exception it
  leaves `PATH.partial`, which a Writer with the same arguments continues.

  Attributes:
    pieces: what is to be written, in the order of `plan_pieces`.
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
    """Creates or continues `PATH.partial`.

    Args:
      path: the folder to write.
      config: of the model; `config.dtype` is the dtype on disk.
      files: a folder from which `COMPANION_FILES` are copied.
      provenance: JSON values kept in the manifest: where this came from.
      fingerprint: identifies the parameters' origin; unfinished work of
        another fingerprint, config or plan is discarded, not continued. An
        empty one never continues anything.
      piece_bytes: how large a piece of several layers may become.
      pieces: instead of that, those of another checkpoint.
      overwrite: whether an existing checkpoint at `path` is replaced.

    Raises:
      FileExistsError: `path` exists and may not be replaced.
    """
    self.path = pathlib.Path(path).absolute()
    self.config = config
    self.pieces = pieces or plan_pieces(config, piece_bytes)
    self._files = None if files is None else pathlib.Path(files)
    self._provenance = dict(provenance or {})
    self._overwrite = overwrite
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
      if not (fingerprint and known.is_file() and known.read_text() == plan):
        start_partial(self.path, PLAN_FILE, plan)
      self._params.mkdir(exist_ok=True)
    self._sync("start")
    self._written = {p.name for p in self.pieces if self._is_complete(p)}

  def is_written(self, piece: Piece) -> bool:
    """Whether the piece is complete, here or in the run that is continued."""
    return piece.name in self._written

  def write(self, piece: Piece, arrays: Mapping[str, jax.Array | np.ndarray]) -> None:
    """Writes one piece, with names, shapes and dtypes as in `piece_shapes`.

    Raises:
      ValueError: the arrays are not those of the piece, or it is written.
    """
    if self.is_written(piece):
      raise ValueError(f"the piece {piece.name} is already written")
    expected = piece_shapes(self.config, piece)
    _check_leaves(f"the piece {piece.name}", arrays, expected)
    with _saving_context():
      # Only pieces that a killed run left half-written can be in the way.
      ocp.save(
        self._params / piece.name,
        traverse_util.unflatten_dict(dict(arrays), sep="."),
        overwrite=True,
      )
    self._written.add(piece.name)

  def finish(self) -> None:
    """Completes the folder and gives it its name.

    Raises:
      ValueError: pieces are missing.
    """
    missing = [p.name for p in self.pieces if not self.is_written(p)]
    if missing:
      raise ValueError(f"cannot finish {self.path}: pieces not written: {', '.join(missing)}")
    if jax.process_index() == 0:
      for stray in self._params.iterdir():
        if stray.name not in self._written:
          shutil.rmtree(stray)
      for name in COMPANION_FILES if self._files else ():
        if (self._files / name).is_file():
          shutil.copyfile(self._files / name, self._partial / name)
      (self._partial / CONFIG_FILE).write_text(self.config.to_json())
      (self._partial / MANIFEST_FILE).write_text(
        json.dumps(
          {
            "format": FORMAT,
            "pieces": [dataclasses.asdict(p) for p in self.pieces],
            "provenance": self._provenance,
          },
          indent=2,
        )
        + "\n"
      )
      publish(self.path)
      (self.path / PLAN_FILE).unlink()
    self._sync("finish")

  def _is_complete(self, piece: Piece) -> bool:
    if not (self._params / piece.name).is_dir():
      return False
    try:
      _check_piece(self._partial, piece, self.config)
    except ValueError:
      return False
    return True

  def _sync(self, name: str) -> None:
    if jax.process_count() > 1:
      ocp.multihost.sync_global_processes(f"roe_jax_checkpoint_{name}")

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, exception_type, exception, traceback) -> None:
    if exception_type is None:
      self.finish()


def save(
  path: PathLike,
  params: Params,
  config: ModelConfig,
  *,
  files: PathLike | None = None,
  provenance: Mapping[str, Any] | None = None,
  piece_bytes: int = PIECE_BYTES,
  overwrite: bool = False,
) -> None:
  """Writes `params` (in `config.dtype`) as a checkpoint; see `Writer`."""
  params_lib.validate(params, config)
  with Writer(
    path, config, files=files, provenance=provenance, piece_bytes=piece_bytes, overwrite=overwrite
  ) as writer:
    for piece in writer.pieces:
      writer.write(piece, piece_arrays(params, piece))


def load_config(path: PathLike) -> ModelConfig:
  """The model config of a checkpoint.

  Raises:
    FileNotFoundError: no complete checkpoint is there.
    ValueError: the config is malformed.
  """
  read_manifest(path)
  return ModelConfig.from_json((pathlib.Path(path) / CONFIG_FILE).read_text())


def load_provenance(path: PathLike) -> dict[str, Any]:
  """What the manifest says about the checkpoint's origin."""
  return read_manifest(path)["provenance"]


def load_pieces(path: PathLike) -> tuple[Piece, ...]:
  """The pieces of a checkpoint, "top" first; raises as `load`."""
  return _open(path)[1]


def load(
  path: PathLike, dtype: str | None = None, shardings: Params | jax.sharding.Sharding | None = None
) -> tuple[Params, ModelConfig]:
  """Reads a checkpoint onto devices, piece by piece.

  Each device reads its part only, in whole chunks of at most 32 MiB, none of which
  has two experts. Beside the parameters, devices have their part of one piece (256
  MiB, or one layer if that is more, unless it was written in others), and the host
  has two more of these and 200 MB of caches of Orbax at most.

  Args:
    path: the checkpoint folder.
    dtype: to restore in; that of the checkpoint by default.
    shardings: of the stacked arrays, a `Params` tree or one for all; each
      device reads only its part. The default is the default device.

  Returns:
    The parameters, and the config with its `dtype` as restored.

  Raises:
    FileNotFoundError: no complete checkpoint is there, or a piece is missing.
    ValueError: the folder contradicts its config, a piece is damaged, or a
      sharding splits the layer axis.
  """
  stored, pieces = _open(path)
  config = stored if dtype is None else stored.replace(dtype=dtype)
  read = functools.partial(_read, path)
  return assemble(config, pieces, read, shardings), config


def assemble(
  config: ModelConfig,
  pieces: Sequence[Piece],
  read: Callable[[Piece, dict[str, jax.ShapeDtypeStruct]], dict[str, jax.Array]],
  shardings: Params | jax.sharding.Sharding | None = None,
) -> Params:
  """Parameters on devices out of pieces that are read one after the other.

  Args:
    config: of the parameters.
    pieces: as `plan_pieces` plans them.
    read: `read(piece, arrays)` is what it is given, with values: the arrays of
      `piece_shapes` with their shardings.
    shardings: see `load`.

  Raises:
    ValueError: the shardings are not those of such parameters.
  """
  abstract = params_lib.abstract(config)
  treedef = jax.tree.structure(abstract)
  if shardings is None:
    shardings = jnp.zeros(()).sharding
  if isinstance(shardings, jax.sharding.Sharding):
    shardings = jax.tree.unflatten(treedef, [shardings] * treedef.num_leaves)
  if jax.tree.structure(shardings) != treedef:
    raise ValueError(
      f"shardings must be one Sharding or a Params tree like the model's {treedef}, "
      f"got {jax.tree.structure(shardings)}"
    )

  placements = piece_leaves(shardings, pieces[1])
  stacked = _with_shardings(piece_leaves(abstract, pieces[1]), placements)
  for name, leaf in stacked.items():
    if leaf.sharding.shard_shape(leaf.shape)[0] != leaf.shape[0]:
      raise ValueError(
        f"the sharding of layers.{name} splits the layer axis, which a device "
        f"must hold whole: {leaf.sharding}"
      )
  top = _with_shardings(piece_shapes(config, pieces[0]), piece_leaves(shardings, pieces[0]))
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
  """Hands what was freed back to the system, where the C library is glibc.

  It keeps an arena for each thread that reads: without this a model of 700 MB on
  eight devices of the host left 350 MB in them, with it 30.
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
    names: of the pieces; by default all.

  Raises: as `load`.
  """
  config, pieces = _open(path)
  for piece in pieces:
    if names is not None and piece.name not in names:
      continue
    shapes = piece_shapes(config, piece)
    # Orbax restores to the host where the abstract leaf is a numpy array; a
    # broadcast scalar is one without the memory.
    yield (
      piece,
      _read(
        path, piece, {n: np.broadcast_to(np.zeros((), s.dtype), s.shape) for n, s in shapes.items()}
      ),
    )


def _check_leaves(what, got, expected):
  if set(got) != set(expected):
    raise ValueError(
      f"{what} lacks the parameters {sorted(set(expected) - set(got))} and has "
      f"unknown ones {sorted(set(got) - set(expected))}"
    )
  for name, want in expected.items():
    if got[name].shape != want.shape or got[name].dtype != want.dtype:
      raise ValueError(
        f"{what}: {name} is {got[name].dtype}{list(got[name].shape)}, the model "
        f"config expects {want.dtype}{list(want.shape)}"
      )


def _saving_context() -> ocp.Context:
  """How arrays are stored.

  Uncompressed (weights compress by a fifth at a third of the speed); in chunks,
  so that a device reads little beside its part: one expert is never in a chunk
  with another.
  """
  storage = ocp.options.ArrayOptions.Saving.StorageOptions

  def storage_options(key_path, value):
    del value
    by_expert = any(getattr(k, "key", None) == "experts" for k in key_path)
    return storage(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0, 1) if by_expert else None)

  context = ocp.Context()
  context.array.saving.use_compression = False
  context.array.saving.scoped_storage_options_creator = storage_options
  # `save` blocks, so that nothing changes the arrays while they are written.
  context.memory.deepcopy_host_arrays = False
  return context


def _open(path: PathLike) -> tuple[ModelConfig, tuple[Piece, ...]]:
  """Config and pieces, after checking every piece against the config."""
  manifest = read_manifest(path)
  config = load_config(path)
  pieces = tuple(Piece(**p) for p in manifest["pieces"])
  bounds = [0, *(p.stop for p in pieces[1:])]
  if pieces[0].num_layers or bounds != [*(p.start for p in pieces[1:]), config.num_layers]:
    raise ValueError(
      f"the pieces of the checkpoint {path} are {[p.name for p in pieces]}, which is not "
      f'"top" and then the {config.num_layers} layers of its config in order'
    )
  for piece in pieces:
    if not _piece_folder(path, piece).is_dir():
      raise FileNotFoundError(
        f"the checkpoint {path} lacks its piece params/{piece.name}: copy, save or convert it again"
      )
    _check_piece(path, piece, config)
  return config, pieces


def _check_piece(path: PathLike, piece: Piece, config: ModelConfig) -> None:
  """Compares the piece's own description with the config; reads no array."""
  with _reading(path, piece) as folder:
    found = traverse_util.flatten_dict(ocp.metadata(folder).metadata, sep=".")
  _check_leaves(
    f"the piece params/{piece.name} of the checkpoint {path}", found, piece_shapes(config, piece)
  )


def _piece_folder(path: PathLike, piece: Piece) -> pathlib.Path:
  return pathlib.Path(path).absolute() / "params" / piece.name


def _read(path: PathLike, piece: Piece, abstract: dict[str, Any]) -> dict[str, Any]:
  tree = traverse_util.unflatten_dict(abstract, sep=".")
  with _reading(path, piece) as folder:
    return traverse_util.flatten_dict(ocp.load(folder, tree), sep=".")


@contextlib.contextmanager
def _reading(path: PathLike, piece: Piece) -> Iterator[pathlib.Path]:
  """Yields the piece's folder; turns what Orbax raises into one sentence."""
  try:
    yield _piece_folder(path, piece)
  except (RuntimeError, MemoryError):
    raise  # a lack of memory, not of a file
  except Exception as error:  # damaged files raise all kinds, even a bare Exception
    reason = str(error).strip().split("\n")[0][:200]
    raise ValueError(
      f"the piece params/{piece.name} of the checkpoint {path} cannot be read, the folder "
      f"is damaged: copy, save or convert it again ({type(error).__name__}: {reason})"
    ) from error


def _with_shardings(shapes, shardings):
  return {
    name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=shardings[name])
    for name, s in shapes.items()
  }


def _insert(stacked, part, start):
  return jax.tree.map(
    lambda whole, rows: jax.lax.dynamic_update_slice_in_dim(whole, rows, start, 0), stacked, part
  )
