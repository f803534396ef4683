"""Finds or downloads Hugging Face folders and checks them without reading tensors."""

from collections.abc import Collection
import dataclasses
import hashlib
import json
import pathlib
import re
from typing import Any

import numpy as np

from checkpoints_convert import safetensors_files, tensor_names
from checkpoints_convert.common import ConversionError, some
from checkpoints_convert.safetensors_files import TensorInfo
from roe_jax import checkpoint
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.families import FAMILIES, from_hugging_face
from roe_jax.text.tokenizer import Tokenizer, check_vocabulary, read_json

HUB = "hf:"
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
# Not "*.safetensors": some repositories contain the weights a second time under other names.
_WEIGHT_PATTERNS = ("model.safetensors", "model-*.safetensors")
_OTHER_PATTERNS = ("*.json", "*.jinja", "tokenizer*")


@dataclasses.dataclass(frozen=True)
class Source:
  """A Hugging Face folder that was checked and can be read.

  Attributes:
    folder: its path.
    stored: the config with the expert format of the files and the dtype of `config`.
    config: the config of the model that is read.
    tensors: the tensors in its shards by name; exactly those that the model needs.
    stored_dtypes: names of the dtypes in the shards.
  """

  folder: pathlib.Path
  stored: ModelConfig
  config: ModelConfig
  tensors: dict[str, TensorInfo]
  stored_dtypes: tuple[str, ...]

  @property
  def fingerprint(self) -> str:
    """A hash that changes with the config, and with the size or time of a file."""
    files = {}
    for info in self.tensors.values():
      status = info.file.stat()
      files[info.file.name] = [status.st_size, status.st_mtime_ns]
    facts = [str(self.folder.resolve()), sorted(files.items()), self.config.to_json()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def find(source: str, revision: str | None = None, weights: bool = True) -> pathlib.Path:
  """Returns the folder of `source`, downloaded if it is a hub name.

  Args:
    source: a local folder, or a hub name: `org/name` or `org/name@revision`, optionally with
      `hf:` in front.
    revision: branch, tag or commit on the hub, if the name has none.
    weights: whether to download the weights too.

  Raises:
    ConversionError: `source` is neither, or the download fails.
  """
  folder = pathlib.Path(source).expanduser()
  if folder.is_dir():
    return folder
  match = _HUB_NAME.fullmatch(source.removeprefix(HUB))
  if not match or folder.exists():
    raise ConversionError(
      f"the source {source!r} is neither a folder nor a hub name like org/name or org/name@revision"
    )
  name, at = match.groups()
  if at and revision and at != revision:
    raise ConversionError(f"{source} names a revision and so does --revision={revision}: give one")
  import huggingface_hub.errors  # here, because local folders need no hub

  patterns = [*_OTHER_PATTERNS, *(_WEIGHT_PATTERNS if weights else ())]
  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(name, revision=at or revision, allow_patterns=patterns)
    )
  except Exception as error:  # downloads fail with many types of exceptions
    reason = str(error).strip().split("\n")[0]
    # The hub answers alike for models that are absent, private or gated.
    if isinstance(error, huggingface_hub.errors.RepositoryNotFoundError):
      reason += (
        "; check the name; for a gated or private model, request access on its page, then run "
        "`hf auth login` or set HF_TOKEN"
      )
    raise ConversionError(
      f"{source} is not a local folder and cannot be downloaded from the hub: {reason}"
    ) from error


def is_hugging_face(folder: str | pathlib.Path) -> bool:
  """Whether a folder is a Hugging Face model, as opposed to a roe_jax checkpoint."""
  folder = pathlib.Path(folder).expanduser()
  return (folder / "config.json").is_file() and not (folder / checkpoint.CONFIG_FILE).is_file()


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """Parses `config.json`.

  Raises:
    ConversionError, ValueError: it is missing or malformed.
  """
  if (folder / "config.json").is_file():
    return read_json(folder / "config.json")
  if (folder / checkpoint.CONFIG_FILE).is_file():
    raise ConversionError(
      f"{folder} is already a roe_jax checkpoint: to convert it back, add --to_hugging_face"
    )
  raise ConversionError(f"{folder} has no config.json: it is not a Hugging Face model folder")


def open_source(
  folder: pathlib.Path,
  dtype: str = "source",
  quantize_experts: str | None = None,
  keep_mxfp4: bool | None = False,
) -> Source:
  """Checks everything that can be checked without reading tensors.

  Args:
    folder: the Hugging Face folder.
    dtype: dtype of the parameters. "source" keeps the dtype of the tensors; if that is impossible
      (float16, or several dtypes) it means float32, which represents all of them exactly.
    quantize_experts: the format to quantize the experts to, or None.
    keep_mxfp4: whether to keep experts in MXFP4 or to decode them to `dtype`; None keeps them if
      there are any and they are not quantized.

  Raises:
    ConversionError, ValueError: the folder cannot be converted.
  """
  hf_config = read_config(folder)
  config = from_hugging_face(hf_config, dtype="float32")
  tensors = safetensors_files.read_headers(folder)
  stored = tuple(sorted({info.dtype.name for info in tensors.values()}))
  if dtype == "source":
    dtype = own_dtype(stored)
  found = config.replace(dtype=dtype, expert_format=_expert_format(folder, config, tensors))
  config = target_config(str(folder), found, quantize_experts, keep_mxfp4)
  tensor_names.check_table(found)
  _check_tensors(folder, found, tensors)
  if (folder / "tokenizer.json").is_file():
    check_vocabulary(Tokenizer.load(folder), config)
  return Source(folder, found, config, tensors, stored)


def target_config(
  source: str, stored: ModelConfig, quantize_experts: str | None, keep_mxfp4: bool | None
) -> ModelConfig:
  """Returns the config of the model that is written or loaded.

  Args:
    source: the name of the source, for error messages.
    stored: the config with the expert format of the files.
    quantize_experts: see `open_source`.
    keep_mxfp4: see `open_source`.

  Raises:
    ConversionError, ValueError: the experts cannot be stored in the requested format.
  """
  if keep_mxfp4 is None:
    keep_mxfp4 = stored.expert_format == "mxfp4" and not quantize_experts
  if keep_mxfp4 and quantize_experts:
    raise ConversionError(
      f"--keep_mxfp4 and --quantize_experts={quantize_experts} exclude each other: give only one"
    )
  if keep_mxfp4 and stored.expert_format != "mxfp4":
    raise ConversionError(
      f"--keep_mxfp4 is for experts in MXFP4, but the experts of {source} are not: leave it out"
    )
  config = stored.replace(expert_format="mxfp4" if keep_mxfp4 else quantize_experts)
  params_lib.describe(config)  # checks the sizes
  return config


def load_config(
  source: str,
  *,
  dtype: str = "source",
  quantize_experts: str | None = None,
  keep_mxfp4: bool | None = None,
  revision: str | None = None,
) -> ModelConfig:
  """Loads the config of the model that `load` loads, without downloading weights.

  For the arguments see `open_source`. The config.json of a model on the hub is trusted, because its
  tensors cannot be checked without a download.

  Raises:
    ConversionError, ValueError: the source cannot be read.
  """
  folder = find(source, revision, weights=False)
  if pathlib.Path(source).expanduser().is_dir():
    return open_source(folder, dtype, quantize_experts, keep_mxfp4).config
  found = from_hugging_face(read_config(folder), None if dtype == "source" else dtype)
  tensor_names.check_table(found)
  return target_config(source, found, quantize_experts, keep_mxfp4)


def own_dtype(stored_dtypes: Collection[str]) -> str:
  """Returns the dtype that represents all numbers in the files; uint8 holds codes, not numbers."""
  return "bfloat16" if set(stored_dtypes) - {"uint8"} == {"bfloat16"} else "float32"


def _expert_format(folder, config, tensors):
  """Infers the experts' format from the tensors, or takes it from config.json if it has none."""
  layers = checkpoint.Piece("", 0, config.num_layers)
  names = {
    f: {part.tensor for part in tensor_names.parts(config.replace(expert_format=f), layers)}
    for f in (None, *FAMILIES[config.family].formats)
  }
  common = set.intersection(*names.values())
  found = {f: (expected - common) & set(tensors) for f, expected in names.items()}
  forms = [f for f, own in found.items() if own]
  if len(names) > 1 and len(forms) > 1:
    raise ConversionError(
      f"{folder} has experts in two forms ({' and '.join(some(found[f], 1) for f in forms)}), "
      "so it mixes two downloads or was partly converted: download the model again"
    )
  return forms[0] if len(names) > 1 and forms else config.expert_format


def _check_tensors(
  folder: pathlib.Path, config: ModelConfig, tensors: dict[str, TensorInfo]
) -> None:
  expected = {
    part.tensor: part
    for piece in checkpoint.plan_pieces(config)
    for part in tensor_names.parts(config, piece)
  }
  model = f"{config.family}, {config.num_layers} layers"
  if config.expert_format:
    model += f", experts in {config.expert_format}"
  if set(expected) - set(tensors):
    raise ConversionError(
      f"{folder} lacks tensors that its config.json ({model}) requires: "
      f"{some(set(expected) - set(tensors))}"
    )
  if set(tensors) - set(expected):
    raise ConversionError(
      f"{folder} has tensors that a {config.family} model with its config.json does not have: "
      f"{some(set(tensors) - set(expected))}"
    )
  for name, part in expected.items():
    found = tensors[name]
    if found.shape != part.shape:
      raise ConversionError(
        f"{name} in {found.file} has shape {list(found.shape)}, but config.json requires "
        f"{list(part.shape)}"
      )
    if (found.dtype == np.uint8) != part.is_bytes:
      raise ConversionError(
        f"{name} in {found.file} has dtype {found.dtype}, but a {config.family} model requires "
        f"{'uint8' if part.is_bytes else 'floating-point numbers'}"
      )
