"""Merged fine-tunes: a base, one vector, and one bit per weight and task (EMR-Merging, 2405.17461).

With `t_i = W_i - W` in float32, the unified vector u has per weight the sign of `sum_i t_i` and the
largest `|t_i|` with that sign. The mask of a task is `M_i = [t_i u > 0]`, and the task's model is
`W + s_i M_i u`, with one scale s_i for all weights; see `SCALES`. Parameters of the routers are
kept as each task has them, unless they are merged, too.

`TaskParams` holds all tasks next to their base, so that a roster's members can compute with them.
"""

from collections.abc import Mapping, Sequence
import hashlib
import io
import json
import pathlib
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import typed
from roe_jax.checkpoint_folder import PathLike, Piece, named_leaves
from roe_jax.numerics import to_compute_dtype
from roe_jax.params import Params
from roe_jax.quantization import to_float32

MERGE_FILE = "merge.json"
FOLDER = "tasks"
ALL = "all"  # in place of a task: all of them in shared storage
# Parameters that choose experts.
_ROUTERS = ("router", "correction_bias", "gate_scales")

# How the scale of a task is computed from sums over its weights, by name.
SCALES = {
  # The paper's equation: sum |t| / sum |M u|.
  "sums": lambda s: _ratio(s["t"], s["u"]),
  # Its published code: the same of sums over the mean of each array of a piece.
  "means": lambda s: _ratio(s["mean_t"], s["mean_u"]),
  # Minimizes the squared distance to the task's weights: <t, M u> / |M u|^2.
  "least_squares": lambda s: _ratio(s["tu"], s["uu"]),
  # No scale.
  "one": lambda s: 1.0,
}


def is_router(name: str) -> bool:
  """Whether a parameter of a piece belongs to the routers."""
  return name.split(".")[0].startswith(_ROUTERS)


def merge(
  base: np.ndarray, tasks: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, list[dict[str, float]]]:
  """Merges one array of several tasks.

  Returns:
    The unified vector, float32; the masks, bool `[N, ...]`, one of each task; and each task's sums
    that `SCALES` are made from.
  """
  base = to_float32(base)
  total, positive, negative = (np.zeros(base.shape, np.float32) for _ in range(3))
  for task in tasks:
    t = to_float32(task) - base
    total += t
    np.maximum(positive, t, out=positive)
    np.minimum(negative, t, out=negative)
  # Where the sum is zero, the tasks cancel out and there is no sign.
  unified = np.where(total > 0, positive, np.where(total < 0, negative, np.float32(0)))
  masks, sums = np.zeros((len(tasks), *base.shape), bool), []
  for task, mask in zip(tasks, masks):
    t = to_float32(task) - base
    mask[...] = t * np.sign(unified) > 0
    t, u = t.astype(np.float64), np.where(mask, unified, 0).astype(np.float64)
    found = {"t": np.abs(t), "u": np.abs(u), "tu": t * u, "uu": u * u}
    totals = {key: float(values.sum()) for key, values in found.items()}
    means = {"mean_t": totals["t"] / max(t.size, 1), "mean_u": totals["u"] / max(t.size, 1)}
    sums.append(totals | means)
  return unified, masks, sums


def merge_piece(
  base: Mapping[str, np.ndarray], tasks: Sequence[Mapping[str, np.ndarray]], merge_routers: bool
) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
  """Merges the arrays of a piece; returns those to store in the dtype of the base, and the sums."""
  arrays: dict[str, np.ndarray] = {}
  totals: list[dict[str, float]] = [{} for _ in tasks]
  for name, array in base.items():
    of_tasks = [task[name] for task in tasks]
    if is_router(name) and not merge_routers:
      arrays[f"own/{name}"] = np.stack(of_tasks)
      continue
    unified, masks, sums = merge(array, of_tasks)
    arrays[f"vector/{name}"] = unified.astype(array.dtype)
    arrays[f"masks/{name}"] = np.packbits(masks.reshape(len(masks), -1), axis=-1)
    for total, found in zip(totals, sums):
      for key, value in found.items():
        total[key] = total.get(key, 0.0) + value
  return arrays, totals


def rebuild(
  base: Mapping[str, Any], stored: Mapping[str, np.ndarray], task: int, scale: float
) -> dict[str, Any]:
  """Returns a task's arrays of a piece, placed and in the dtype of the base's.

  Args:
    base: the base's arrays, on the host or on devices.
    stored: what `merge_piece` returned.
    task: index of the task.
    scale: its scale.
  """
  found = {}
  for name, array in base.items():
    if (own := stored.get(f"own/{name}")) is not None:
      new = own[task].astype(array.dtype)
    else:
      vector, bits = stored[f"vector/{name}"], stored[f"masks/{name}"][task]
      new = _with_change(np, np.asarray(array), vector, bits, np.float32(scale))
    found[name] = jax.device_put(new, array.sharding) if isinstance(array, jax.Array) else new
  return found


def _with_change(library, base, vector, bits, scale):
  """Returns `base + scale * mask * vector` in the base's dtype; `library` is numpy or JAX's."""
  mask = library.unpackbits(bits, count=vector.size).reshape(vector.shape) == 1
  change = library.where(mask, scale * vector.astype("float32"), library.float32(0))
  return (base.astype("float32") + change).astype(base.dtype)


class TaskParams(struct.PyTreeNode):
  """The tasks of merged fine-tunes, as `Params.tasks` of their base; on one device.

  Names are those of the base's parameters, such as "layers.attention.query".

  Attributes:
    vector: {name: unified vector}, in the shapes and dtypes that were stored.
    masks: {name: `[N, ceil(size / 8)]` uint8}, the bits of each task.
    own: {name: `[N, ...]`}, parameters that each task keeps.
    scales: `[N]` float32.
  """

  vector: dict[str, Any]
  masks: dict[str, Any]
  own: dict[str, Any]
  scales: Any


def params_of_task(params: Params, task: int) -> Params:
  """Returns the parameters of a task, computed from the base's; also within a compiled function.

  Raises:
    ValueError: `params.tasks` lacks the task.
  """
  tasks: TaskParams | None = params.tasks
  count = 0 if tasks is None else len(tasks.scales)
  if tasks is None or task >= count:
    raise ValueError(
      f"members are to compute with task {task}, and the parameters have {count} tasks: open a "
      f"checkpoint of merged fine-tunes as FOLDER#{ALL}"
    )
  base = params.replace(tasks=None)
  leaves = []
  for name, array in named_leaves(base).items():
    array = to_compute_dtype(array)
    if name in tasks.own:
      leaves.append(to_compute_dtype(tasks.own[name][task]).astype(array.dtype))
    else:
      vector = to_compute_dtype(tasks.vector[name])
      of_task = tasks.masks[name][task], tasks.scales[task]
      leaves.append(_with_change(jnp, array, vector, *of_task))
  return jax.tree.unflatten(jax.tree.structure(base), leaves)


def write_piece(
  folder: pathlib.Path,
  name: str,
  arrays: Mapping[str, np.ndarray],
  sums: Sequence[Mapping[str, float]],
) -> None:
  """Writes what `merge_piece` returned for the piece of this name; complete or not at all."""
  data = io.BytesIO()
  dtypes = {key: str(a.dtype) for key, a in arrays.items()}
  bits: dict[str, Any] = {
    key: a.view(np.uint16) if a.dtype.itemsize == 2 else a for key, a in arrays.items()
  }
  np.savez(data, **bits)
  (folder / FOLDER).mkdir(exist_ok=True)
  facts = {
    "sums": list(sums),
    "dtypes": dtypes,
    "sha256": hashlib.sha256(data.getvalue()).hexdigest(),
  }
  for suffix, content in ((".npz", data.getvalue()), (".json", json.dumps(facts).encode())):
    partial = folder / FOLDER / f"{name}{suffix}.partial"
    partial.write_bytes(content)
    partial.replace(partial.with_suffix(""))


class Tasks:
  """The tasks of a merged checkpoint.

  Attributes:
    names: where each task's parameters came from.
    scales: each task's scale, by the names of `SCALES`.
  """

  def __init__(self, path: PathLike):
    """Opens the tasks of a checkpoint.

    Raises:
      ValueError: it has none, or its files are damaged.
    """
    self._folder = pathlib.Path(path)
    file = self._folder / MERGE_FILE
    if not file.is_file():
      raise ValueError(
        f"the checkpoint {path} has no tasks: merge some with checkpoints_convert --merge=A,B "
        "--base=P, or load it without a task"
      )
    facts = typed.parse(file.read_text("utf-8"), f"the file {file}")
    self.names, self.scales = tuple(facts["tasks"]), facts["scales"]

  def index(self, task: int | str) -> int:
    """Returns the index of a task that is given by index or name.

    Raises:
      ValueError: there is no such task.
    """
    if task in self.names:
      return self.names.index(task)
    if not str(task).isdecimal() or int(task) >= len(self.names):
      listed = ", ".join(f"{i} ({name})" for i, name in enumerate(self.names))
      raise ValueError(f"there is no task {task!r} in {self._folder}; choose one of {listed}")
    return int(task)

  def scale(self, task: int, kind: str) -> float:
    """Returns a task's scale; raises a ValueError if `kind` is not in `SCALES`."""
    if kind not in SCALES:
      raise ValueError(f"unknown scale {kind!r}; choose one of {', '.join(SCALES)}")
    return self.scales[kind][task]

  def read(self, piece: str) -> dict[str, np.ndarray]:
    """Reads what `merge_piece` returned for the piece of this name."""
    return read_piece(self._folder, piece)[0]

  def read_all(self, pieces: Sequence[Piece], kind: str) -> TaskParams:
    """Reads all tasks, with the scales of a kind in `SCALES`."""
    parts: dict[str, list[np.ndarray]] = {}
    for piece in pieces:
      for key, array in self.read(piece.name).items():
        kind_of, _, name = key.partition("/")
        name = f"{kind_of}/layers.{name}" if piece.num_layers else key
        parts.setdefault(name, []).append(array)
    found: dict[str, dict[str, Any]] = {"vector": {}, "masks": {}, "own": {}}
    for key, arrays in parts.items():
      kind_of, _, name = key.partition("/")
      if kind_of == "masks":  # the bits of a piece are padded to whole bytes
        sizes = [a.size for a in parts[f"vector/{name}"]]
        bits = [np.unpackbits(a, axis=-1, count=size) for a, size in zip(arrays, sizes)]
        joined = np.packbits(np.concatenate(bits, axis=-1), axis=-1)
      else:
        joined = np.concatenate(arrays, axis=int(kind_of == "own"))
      found[kind_of][name] = jnp.asarray(joined)
    scales = [self.scale(task, kind) for task in range(len(self.names))]
    return TaskParams(**found, scales=jnp.asarray(scales, jnp.float32))


def read_piece(folder: pathlib.Path, name: str) -> tuple[dict[str, np.ndarray], list[dict]]:
  """Reads what `write_piece` wrote.

  Raises:
    ValueError: it is missing or damaged.
  """
  files = [folder / FOLDER / f"{name}{suffix}" for suffix in (".npz", ".json")]
  try:
    facts, content = json.loads(files[1].read_text("utf-8")), files[0].read_bytes()
  except (OSError, ValueError) as error:
    raise ValueError(f"the tasks of {folder} lack {name}: merge them again") from error
  if hashlib.sha256(content).hexdigest() != facts["sha256"]:
    raise ValueError(f"the file {files[0]} is damaged: merge the tasks again")
  with np.load(io.BytesIO(content)) as found:
    arrays = {key: found[key].view(np.dtype(facts["dtypes"][key])) for key in found.files}
  return arrays, facts["sums"]


def finish(folder: pathlib.Path, pieces: Sequence[str], names: Sequence[str]) -> None:
  """Writes `MERGE_FILE` after all pieces."""
  totals: list[dict[str, float]] = [{} for _ in names]
  for piece in pieces:
    for total, found in zip(totals, read_piece(folder, piece)[1]):
      for key, value in found.items():
        total[key] = total.get(key, 0.0) + value
  scales = {kind: [float(scale(total)) for total in totals] for kind, scale in SCALES.items()}
  facts = {"tasks": list(names), "scales": scales}
  (folder / MERGE_FILE).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")


def _ratio(a, b):
  return a / b if b else 1.0
