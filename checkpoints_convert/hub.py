"""Hugging Face folders: found or downloaded, checked, and described; no tensor is read."""

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
from roe_jax.text.tokenizer import Tokenizer, check_vocabulary

HUB = "hf:"
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
# Not "*.safetensors": some repositories hold the weights a second time under
# other names.
_WEIGHT_PATTERNS = ("model.safetensors", "model-*.safetensors")
_OTHER_PATTERNS = ("*.json", "*.jinja", "tokenizer*")


@dataclasses.dataclass(frozen=True)
class Source:
  """A Hugging Face folder that was checked and can be read.

  Attributes:
    folder: where it lies.
    stored: config of the model in the expert format of the files, with the dtype
      that it will be read as.
    config: of the model that it will be read as.
    tensors: of its shards, by name; exactly those that the model needs.
    stored_dtypes: names of the dtypes in the shards.
  """

  folder: pathlib.Path
  stored: ModelConfig
  config: ModelConfig
  tensors: dict[str, TensorInfo]
  stored_dtypes: tuple[str, ...]

  @property
  def fingerprint(self) -> str:
    """Changes if the files may have, which are known by size and time, or the config."""
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
  except Exception as error:  # many kinds, all of them reasons for not getting it
    reason = str(error).strip().split("\n")[0]
    # The hub answers alike for models that are absent, private or gated.
    if isinstance(error, huggingface_hub.errors.RepositoryNotFoundError):
      reason += (
        "; check the name; for a gated or private model, request access on its page, then run "
        "`hf auth login` or set HF_TOKEN"
      )
    raise ConversionError(
      f"there is no local folder {source}, and it cannot be downloaded as a model from "
      f"the hub: {reason}"
    ) from error


def is_hugging_face(folder: str | pathlib.Path) -> bool:
  """Whether a folder is a Hugging Face model rather than a roe_jax checkpoint."""
  folder = pathlib.Path(folder).expanduser()
  return (folder / "config.json").is_file() and not (folder / checkpoint.CONFIG_FILE).is_file()


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """The parsed `config.json`.

  Raises:
    ConversionError: it is missing or malformed.
  """
  path = folder / "config.json"
  if not path.is_file():
    if (folder / checkpoint.CONFIG_FILE).is_file():
      raise ConversionError(
        f"{folder} is a roe_jax checkpoint already; to convert it back, add --to_hugging_face"
      )
    raise ConversionError(f"{folder} has no config.json: it is not a Hugging Face model folder")
  try:
    values = json.loads(path.read_text())
  except ValueError as error:
    raise ConversionError(f"{path} is not valid JSON: {error}") from error
  if not isinstance(values, dict):
    raise ConversionError(f"{path} must hold a JSON object")
  return values


def open_source(
  folder: pathlib.Path,
  dtype: str = "source",
  quantize_experts: str | None = None,
  keep_mxfp4: bool | None = False,
) -> Source:
  """Checks everything that can be checked without reading a tensor.

  Args:
    folder: the Hugging Face folder.
    dtype: of the parameters. "source" keeps the tensors' own; where it cannot
      be kept (float16, or several) it is float32, which holds them all exactly.
    quantize_experts: a format that the experts are quantized to, or None.
    keep_mxfp4: whether experts in MXFP4 stay so, or are decoded to `dtype`; None:
      they stay so where there are any and they are not quantized.

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
  """The config of what is written, or loaded.

  Args:
    source: its name.
    stored: its config, with the expert format of its files.
    quantize_experts: see `open_source`.
    keep_mxfp4: see `open_source`.

  Raises:
    ConversionError, ValueError: the experts cannot have the format asked for.
  """
  if keep_mxfp4 is None:
    keep_mxfp4 = stored.expert_format == "mxfp4" and not quantize_experts
  if keep_mxfp4 and quantize_experts:
    raise ConversionError(
      f"--keep_mxfp4 and --quantize_experts={quantize_experts} exclude each other: give one"
    )
  if keep_mxfp4 and stored.expert_format != "mxfp4":
    raise ConversionError(
      f"--keep_mxfp4 is for experts in MXFP4, and those of {source} are not: leave it out"
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
  """The config of what a source is read as; the weights of a hub name are not downloaded.

  For the arguments see `open_source`. What is on the hub is believed to be as
  its config.json says.

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
  """The dtype that holds all numbers in the files; bytes are not numbers."""
  return "bfloat16" if set(stored_dtypes) - {"uint8"} == {"bfloat16"} else "float32"


def _expert_format(folder, config, tensors):
  """The experts' format by the tensors that are there, whatever config.json says.

  If there are none of any form, what config.json says.
  """
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
      f"{folder} has experts in two forms ({' and '.join(some(found[f], 1) for f in forms)}): "
      "it mixes two downloads or was half converted; get the model again"
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
      f"{folder} lacks tensors that its config.json ({model}) calls for: "
      f"{some(set(expected) - set(tensors))}"
    )
  if set(tensors) - set(expected):
    raise ConversionError(
      f"{folder} has tensors that a {config.family} model with its config.json does not "
      f"have: {some(set(tensors) - set(expected))}"
    )
  for name, part in expected.items():
    found = tensors[name]
    if found.shape != part.shape:
      raise ConversionError(
        f"{name} in {found.file} has shape {list(found.shape)}, config.json "
        f"calls for {list(part.shape)}"
      )
    if (found.dtype == np.uint8) != part.is_bytes:
      raise ConversionError(
        f"{name} in {found.file} has dtype {found.dtype}, a {config.family} model has "
        f"{'uint8' if part.is_bytes else 'floating-point numbers'} there"
      )
