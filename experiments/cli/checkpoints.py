"""What --checkpoint may name: a checkpoint, an embedded model, or a Hugging Face model.

Or, where no parameters are needed, a preset.
"""

import pathlib
import sys
import time

import jax

import checkpoints_convert
from checkpoints_convert import hub
from roe_jax import assets, checkpoint, presets
from roe_jax.config import ModelConfig
from roe_jax.params import Params

EMBEDDED = "embedded:"
HUB = "hf:"
PRESET = "preset:"


def path(name: str, weights: bool = False) -> pathlib.Path:
  """The folder that --checkpoint names.

  Args:
    name: its value.
    weights: whether to download those of a hub name, too, and not the files
      beside them alone.

  Raises:
    ValueError: an unknown embedded model, a preset, or a hub name that cannot be
      downloaded.
  """
  if name.startswith(PRESET):
    raise ValueError(f"--checkpoint={name} has sizes and no parameters: give --dry_run with it")
  if name.startswith(EMBEDDED):
    return assets.path(name.removeprefix(EMBEDDED))
  if name.startswith(HUB):
    return hub.find(name.removeprefix(HUB), weights=weights)
  return pathlib.Path(name).expanduser()


def load_config(name: str) -> ModelConfig:
  """The config of what --checkpoint names; of a hub name no weights are downloaded.

  Raises:
    FileNotFoundError, ValueError: it is neither a complete checkpoint nor a
      Hugging Face model that can be read, nor a known preset.
  """
  if name.startswith(PRESET):
    name = name.removeprefix(PRESET)
    if name not in presets.PRESETS:
      raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(presets.PRESETS)}")
    return presets.PRESETS[name]
  if name.startswith(HUB):
    return checkpoints_convert.load_config(name.removeprefix(HUB))
  folder = path(name)
  if checkpoints_convert.is_hugging_face(folder):
    return checkpoints_convert.load_config(str(folder))
  return checkpoint.load_config(folder)


def load(
  folder: pathlib.Path, dtype: str | None = None, shardings: Params | None = None
) -> tuple[Params, ModelConfig]:
  """Parameters and config of a folder of `path`, which has its weights.

  Experts of a Hugging Face model stay in the format of its files.

  Args:
    folder: a checkpoint or a Hugging Face folder.
    dtype: the value of --dtype.
    shardings: see `roe_jax.load`.

  Raises:
    FileNotFoundError, ValueError: it cannot be read.
  """
  if not checkpoints_convert.is_hugging_face(folder):
    return checkpoint.load(folder, dtype, shardings)
  begin = time.perf_counter()
  loaded = jax.block_until_ready(
    checkpoints_convert.load(str(folder), dtype or "source", shardings)
  )
  print(
    f"[read straight from Hugging Face files in {time.perf_counter() - begin:.1f} s; python -m "
    f"checkpoints_convert --source={folder} --target=NEW_FOLDER makes a checkpoint of them, "
    "with experts in int8 or int4 if asked]",
    file=sys.stderr,
  )
  return loaded
