"""Opens models by name, whatever their format.

A name is the folder of a roe_jax checkpoint, `FOLDER#TASK` for a task of merged fine-tunes (or
`FOLDER#all`, see `checkpoint.load`), `embedded:NAME`, or a name that another
`ModelFormat` matches: `checkpoints_convert` adds Hugging Face folders, GGUF files and
`hf:org/name`. A package adds a format with an entry point in the group `roe_jax.model_formats`, a
program with `register`.
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import re

import jax

from roe_jax import assets, checkpoint, merging
from roe_jax.checkpoint_folder import CONFIG_FILE, PLAN_FILE, PathLike, partial_folder
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.text.tokenizer import Tokenizer, check_vocabulary

EMBEDDED = "embedded:"
ENTRY_POINTS = "roe_jax.model_formats"

Shardings = Params | jax.sharding.Sharding | None


@dataclasses.dataclass(frozen=True)
class ModelFormat:
  """How models of one format are recognized and read.

  Attributes:
    names: what their names look like, for error messages.
    matches: `matches(name)`: whether a model of that name is of this format.
    find_folder: `find_folder(name, weights)`: the folder with its files, downloaded if necessary;
      without `weights`, only the config and the tokenizer's files need to be there.
    load_config: `load_config(name)`; downloads no weights.
    load_params: `load_params(name, dtype, shardings)`: the parameters and their config.
  """

  names: str
  matches: Callable[[str], bool]
  find_folder: Callable[[str, bool], pathlib.Path]
  load_config: Callable[[str], ModelConfig]
  load_params: Callable[[str, str | None, Shardings], tuple[Params, ModelConfig]]


def split_task(name: str) -> tuple[str, str | None]:
  """Returns the folder and the task of a name FOLDER#TASK; None without a task."""
  folder, mark, task = name.rpartition("#")
  return (folder, task) if mark and not pathlib.Path(name).exists() else (name, None)


def _is_checkpoint(name: str) -> bool:
  path = pathlib.Path(split_task(name)[0])
  return any((path / file).is_file() for file in (CONFIG_FILE, PLAN_FILE)) or (
    not path.exists() and partial_folder(path).is_dir()  # its error says how to resume
  )


def _load_config(name: str) -> ModelConfig:
  folder, task = split_task(name)
  if task not in (None, merging.ALL):
    merging.Tasks(folder).index(task)
  return checkpoint.load_config(folder)


_FORMATS = {
  "roe_jax": ModelFormat(
    "a roe_jax checkpoint folder",
    _is_checkpoint,
    lambda name, weights: pathlib.Path(split_task(name)[0]),
    _load_config,
    lambda name, *where: checkpoint.load(split_task(name)[0], *where, task=split_task(name)[1]),
  )
}


def register(name: str, model_format: ModelFormat) -> None:
  """Adds a format, or replaces the one of that name."""
  _FORMATS[name] = model_format


def open_model(
  name: PathLike, dtype: str | None = None, shardings: Shardings = None
) -> tuple[Params, ModelConfig, Tokenizer]:
  """Opens a model.

  Args:
    name: a roe_jax checkpoint folder, a Hugging Face folder, a GGUF file,
      `hf:org/name[@revision]`, `embedded:NAME` (one of `assets.NAMES`), or `FOLDER#TASK`.
    dtype: "float32" or "bfloat16"; the stored dtype by default.
    shardings: of the parameters, a `Params` tree (see `sharding.parameter_shardings`) or one for
      all; each device reads only its part. The default device by default.

  Returns:
    The parameters, the config (with the dtype of the parameters), and the tokenizer.

  Raises:
    FileNotFoundError: there is no such model, or it is incomplete.
    ValueError: its files are damaged or unsupported, or contradict each other.
  """
  tokenizer = load_tokenizer(name)
  return *load_params(name, dtype, shardings), tokenizer


def load_params(
  name: PathLike, dtype: str | None = None, shardings: Shardings = None
) -> tuple[Params, ModelConfig]:
  """Loads the parameters and the config of a model; see `open_model`."""
  model_format, name = _resolve(name)
  return model_format.load_params(name, dtype, shardings)


def load_config(name: PathLike) -> ModelConfig:
  """Loads the config of a model; see `open_model`. Downloads no weights."""
  model_format, name = _resolve(name)
  return model_format.load_config(name)


def load_tokenizer(name: PathLike) -> Tokenizer:
  """Loads the tokenizer of a model and checks it against the config; see `open_model`."""
  config = load_config(name)
  tokenizer = Tokenizer.load(find_folder(name))
  check_vocabulary(tokenizer, config)
  return tokenizer


def find_folder(name: PathLike, weights: bool = False) -> pathlib.Path:
  """Returns the folder with a model's files, such as `Chat.load` takes.

  Args:
    name: see `open_model`.
    weights: whether to download the weights of `hf:org/name` too.
  """
  model_format, name = _resolve(name)
  return model_format.find_folder(name, weights)


@functools.cache  # finding them takes 20 ms
def _entry_points() -> tuple[importlib.metadata.EntryPoint, ...]:
  return tuple(importlib.metadata.entry_points(group=ENTRY_POINTS))


def _resolve(name: PathLike) -> tuple[ModelFormat, str]:
  """Returns a model's format, and its name there."""
  name = os.fspath(name)
  if name.startswith(EMBEDDED):
    name = str(assets.path(name.removeprefix(EMBEDDED)))
  name = os.path.expanduser(name)
  for entry in _entry_points():
    if entry.name not in _FORMATS:
      register(entry.name, entry.load())
  for model_format in _FORMATS.values():
    if model_format.matches(name):
      return model_format, name
  found = "the folder {} has no model" if os.path.isdir(name) else "there is no model {!r}"
  names = ", ".join(model_format.names for model_format in _FORMATS.values())
  hint = f" (did you mean hf:{name}?)" if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) else ""
  raise FileNotFoundError(
    f"{found.format(name)}{hint}: give {names}, or {EMBEDDED}NAME with NAME one of "
    f"{', '.join(assets.NAMES)}"
  )
