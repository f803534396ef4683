"""Finds or downloads Hugging Face folders and checks them without reading tensors."""

from collections.abc import Collection, Iterator
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import re
from typing import Any

import numpy as np

from checkpoints_convert import gguf_model, safetensors_files, tensor_names
from checkpoints_convert.common import ConversionError, note, some
from checkpoints_convert.safetensors_files import TensorInfo
from roe_jax import checkpoint
from roe_jax import params as params_lib
from roe_jax.checkpoint_folder import resolved
from roe_jax.config import ModelConfig
from roe_jax.families import from_hugging_face
from roe_jax.family_table import FAMILIES
from roe_jax.text.tokenizer import Tokenizer, check_vocabulary, missing_tokenizer, read_json

HUB = "hf:"
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
# Which files have weights is in their index: their names vary, and some repositories contain the
# weights a second time under other names.
_OTHER_PATTERNS = ("*.json", "*.jinja", "tokenizer*")
_ORIGINAL_FILES = ("params.json", "consolidated.00.pth", "consolidated.safetensors")
_ADAPTER_FILE = "adapter_config.json"
_POINTER = b"version https://git-lfs.github.com/spec/"
_EMBEDDING, _UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"
# What tensors were saved from whose names have this in front.
_WRAPPERS = {
  "base_model.": "a PEFT model: save what its merge_and_unload() returns",
  "_orig_mod.": "a model after torch.compile: save its _orig_mod",
  "module.": "a model in DistributedDataParallel or DataParallel: save its module",
}


@dataclasses.dataclass(frozen=True)
class Source:
  """A Hugging Face folder that was checked and can be read.

  Attributes:
    folder: its path.
    stored: the config with the expert format of the files and the dtype of `config`.
    layout: the layout of the experts in the files; see `tensor_names`.
    config: the config of the model that is read.
    tensors: the tensors in its shards by name; exactly those that the model needs.
    stored_dtypes: names of the dtypes in the shards, and of GGUF's quantizations.
  """

  folder: pathlib.Path
  stored: ModelConfig
  layout: str
  config: ModelConfig
  tensors: dict[str, TensorInfo]
  stored_dtypes: tuple[str, ...]

  @property
  def fingerprint(self) -> str:
    """A hash that changes with the config, and with the size or time of a file."""
    files = {}
    for info in self.tensors.values():
      status = info.file.stat()
      path = resolved(info.file.parent) / info.file.name
      files[str(path)] = [status.st_size, status.st_mtime_ns]
    facts = [sorted(files.items()), self.config.to_json()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def find(source: str, revision: str | None = None, weights: bool = True) -> pathlib.Path:
  """Returns the folder of `source`, downloaded if it is a hub name.

  Args:
    source: a local folder, a GGUF file (see `gguf_model.expand`), or a hub name: `org/name` or
      `org/name@revision`, optionally with `hf:` in front.
    revision: branch, tag or commit on the hub, if the name has none.
    weights: whether to download the weights too; they are checked first, as in `open_source`.

  Raises:
    ConversionError: `source` is none of these, the download fails, or the weights cannot be read.
    FileNotFoundError: there is no such GGUF file.
  """
  if gguf_model.is_gguf(source):
    return gguf_model.expand(source)
  folder = pathlib.Path(source).expanduser()
  if folder.is_dir():
    return folder
  name, revision = _hub_name(source, revision)
  folder = _download(name, revision, _OTHER_PATTERNS)
  if weights and not safetensors_files.are_complete(folder):
    tensors = open_source(folder, keep_mxfp4=None, tensors=_remote_tensors(folder, name)).tensors
    _download(name, revision, sorted({info.file.name for info in tensors.values()}))
  return folder


def _hub_name(source: str, revision: str | None) -> tuple[str, str | None]:
  """Splits a hub name into the repository and the revision."""
  match = _HUB_NAME.fullmatch(source.removeprefix(HUB))
  if not match or pathlib.Path(source).expanduser().exists():
    raise ConversionError(
      f"the source {source!r} is neither a folder, a .gguf file nor a hub name like org/name or "
      "org/name@revision"
    )
  name, at = match.groups()
  if at and revision and at != revision:
    raise ConversionError(f"{source} names a revision and so does --revision={revision}: give one")
  return name, at or revision


def _download(name: str, revision: str | None, patterns: Collection[str]) -> pathlib.Path:
  import huggingface_hub  # here, because local folders need no hub

  with _hub_errors(name, revision):
    return pathlib.Path(
      huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns))
    )


@functools.cache
def _remote_tensors(snapshot: pathlib.Path, name: str) -> dict[str, TensorInfo]:
  """Returns the tensors of a model on the hub from the headers of its files.

  Args:
    snapshot: the folder of the downloaded revision, whose name is its commit.
    name: the repository.
  """
  import huggingface_hub  # here, because local folders need no hub

  with _hub_errors(name, snapshot.name):
    files = huggingface_hub.get_safetensors_metadata(name, revision=snapshot.name).files_metadata
  return {
    tensor: safetensors_files.tensor_info(tensor, pathlib.Path(file), info.dtype, info.shape)
    for file, metadata in sorted(files.items())
    for tensor, info in metadata.tensors.items()
  }


@contextlib.contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
  """Turns exceptions of the hub's library into one sentence."""
  from huggingface_hub import errors

  page = f"https://huggingface.co/{name}"
  log_in = "run `hf auth login` or set HF_TOKEN"
  try:
    yield
  except Exception as error:  # downloads fail with many types of exceptions
    # Where files are not in the cache either, the reason is the cause.
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
    causes = (error, cause)
    responses = [getattr(e, "response", None) for e in causes]
    status = next((response.status_code for response in responses if response is not None), None)
    if isinstance(error, errors.GatedRepoError):
      reason = f"it is gated: accept its terms on {page}, then {log_in} of that account"
    elif isinstance(error, errors.RepositoryNotFoundError):
      reason = f"there is no such model, or it is private: check the name, or {log_in}"
    elif isinstance(error, errors.RevisionNotFoundError):
      reason = f"it has no revision {revision!r}: choose one of {page}/tree/main"
    elif isinstance(error, errors.NotASafetensorsRepoError):
      reason = "it has no safetensors files: choose a repository with model.safetensors"
    elif status == 429:
      reason = f"the hub limits the number of requests (429): wait some minutes, or {log_in}"
    elif status in (401, 403):
      reason = f"access is denied ({status}): {log_in} with a token that may read it"
    elif isinstance(error, errors.LocalEntryNotFoundError):
      reason = "it is not in the cache, and the hub cannot be reached: check the connection"
      if isinstance(cause, errors.OfflineModeIsEnabled):
        reason = "it is not in the cache: unset HF_HUB_OFFLINE"
    else:
      reason = str(error).strip().split("\n")[0]
    raise ConversionError(
      f"{name} is not a local folder and cannot be downloaded from the hub: {reason}"
    ) from error


def is_hugging_face(folder: str | pathlib.Path) -> bool:
  """Whether a folder is a Hugging Face model (or adapter), as opposed to a roe_jax checkpoint."""
  folder = pathlib.Path(folder).expanduser()
  names = ("config.json", _ADAPTER_FILE)
  return (
    any((folder / name).is_file() for name in names)
    and not (folder / checkpoint.CONFIG_FILE).is_file()
  )


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """Parses `config.json`.

  Raises:
    ConversionError, ValueError: it is missing or malformed, or the folder is not a whole model.
  """
  pointers = [
    path.name
    for path in sorted(folder.iterdir())
    if path.suffix in (".json", ".jinja", ".model", ".safetensors") and _is_pointer(path)
  ]
  if pointers:
    raise ConversionError(
      f"{folder} has Git LFS pointers in place of the files {some(pointers)}: run "
      "`git lfs install` and `git lfs pull` in it"
    )
  if (folder / _ADAPTER_FILE).is_file():
    base = read_json(folder / _ADAPTER_FILE).get("base_model_name_or_path")
    raise ConversionError(
      f"{folder} is a PEFT adapter (such as LoRA) of {base}, not a model: merge it into that "
      "model with PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(FOLDER), and "
      "give FOLDER"
    )
  if (folder / "config.json").is_file():
    return read_json(folder / "config.json")
  if (folder / checkpoint.CONFIG_FILE).is_file():
    raise ConversionError(
      f"{folder} is already a roe_jax checkpoint: to convert it back, add --to_hugging_face"
    )
  message = f"{folder} has no config.json: it is not a Hugging Face model folder"
  inner = [path.parent.name for path in folder.glob("*/config.json")]
  original = [path.name for path in folder.iterdir() if path.name in _ORIGINAL_FILES]
  gguf = [path.name for path in folder.glob("*.gguf")]
  if inner:
    message += f", but it has such folders ({some(inner)}): give one of them"
  elif gguf or original:
    what, use = "GGUF", "give that file"
    if not gguf:
      what, use = "its authors' format", "use the safetensors version"
    message += f" but has a model in {what} ({some(gguf or original)}): {use}"
  raise ConversionError(message)


def _is_pointer(path: pathlib.Path) -> bool:
  if not path.is_file():
    return False
  with open(path, "rb") as file:
    return file.read(len(_POINTER)) == _POINTER


def open_source(
  folder: pathlib.Path,
  dtype: str = "source",
  quantize_experts: str | None = None,
  keep_mxfp4: bool | None = False,
  quantize_projections: str | None = None,
  tensors: dict[str, TensorInfo] | None = None,
) -> Source:
  """Checks everything that can be checked without reading tensors.

  Args:
    folder: the Hugging Face folder.
    dtype: dtype of the parameters. "source" keeps the dtype of the tensors; if that is impossible
      (float16, or several dtypes) it means float32, which represents all of them exactly.
    quantize_experts: the format to quantize the experts to, or None.
    keep_mxfp4: whether to keep experts in MXFP4 or to decode them to `dtype`; None keeps them if
      there are any and they are not quantized.
    quantize_projections: the format to quantize the other matrices to, or None; see
      `ModelConfig.projection_format`.
    tensors: the tensors of the model, if its files are not in the folder.

  Raises:
    ConversionError, ValueError: the folder cannot be converted.
  """
  hf_config = read_config(folder)
  config = from_hugging_face(hf_config, dtype="float32")
  source, gguf = folder, folder / gguf_model.WEIGHTS
  if gguf.is_file():
    source = resolved(gguf)
    tensors = dict(gguf_model.hub_tensors(source))
  elif tensors is None:
    tensors = safetensors_files.read_headers(folder)
  tensors = _model_tensors(source, hf_config, tensors)
  always_float32 = tensor_names.float32_tensors(config)
  stored = {info.stored_dtype for name, info in tensors.items() if name not in always_float32}
  stored = tuple(sorted(stored))
  if dtype == "source":
    dtype = own_dtype(stored)
  expert_format, layout = _expert_form(source, config, tensors)
  found = config.replace(dtype=dtype, expert_format=expert_format)
  config = target_config(str(source), found, quantize_experts, keep_mxfp4, quantize_projections)
  tensor_names.check_table(found)
  _check_tensors(source, found, layout, tensors)
  if (folder / "tokenizer.json").is_file():
    check_vocabulary(Tokenizer.load(folder), config)
  else:
    note(f"{source} {missing_tokenizer(folder)}; without it, the model takes token ids only")
  return Source(folder, found, layout, config, tensors, stored)


def target_config(
  source: str,
  stored: ModelConfig,
  quantize_experts: str | None,
  keep_mxfp4: bool | None,
  quantize_projections: str | None = None,
) -> ModelConfig:
  """Returns the config of the model that is written or loaded.

  Args:
    source: the name of the source, for error messages.
    stored: the config with the expert format of the files.
    quantize_experts: see `open_source`.
    keep_mxfp4: see `open_source`.
    quantize_projections: see `open_source`.

  Raises:
    ConversionError, ValueError: the matrices cannot be stored in the requested formats.
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
  config = stored.replace(
    expert_format="mxfp4" if keep_mxfp4 else quantize_experts,
    projection_format=quantize_projections,
  )
  params_lib.describe(config)  # checks the sizes
  return config


def open_without_weights(source: str, revision: str | None = None, **options: Any) -> Source:
  """Opens a folder, or a model on the hub of whose weights only the headers are downloaded.

  Args:
    source: see `find`.
    revision: see `find`.
    **options: see `open_source`.

  Raises:
    ConversionError, ValueError: the source cannot be read.
  """
  folder = find(source, revision, weights=False)
  tensors = None
  is_local = gguf_model.is_gguf(source) or pathlib.Path(source).expanduser().is_dir()
  if not (is_local or safetensors_files.are_complete(folder)):
    tensors = _remote_tensors(folder, _hub_name(source, revision)[0])
  return open_source(folder, tensors=tensors, **options)


def load_config(
  source: str,
  *,
  dtype: str = "source",
  quantize_experts: str | None = None,
  keep_mxfp4: bool | None = None,
  quantize_projections: str | None = None,
  revision: str | None = None,
) -> ModelConfig:
  """Loads the config of the model that `load` loads, without downloading weights.

  For the arguments see `open_source`. The dtype is that of the files, on the hub too.

  Raises:
    ConversionError, ValueError: the source cannot be read.
  """
  return open_without_weights(
    source,
    revision,
    dtype=dtype,
    quantize_experts=quantize_experts,
    keep_mxfp4=keep_mxfp4,
    quantize_projections=quantize_projections,
  ).config


def own_dtype(stored_dtypes: Collection[str]) -> str:
  """Returns the dtype that represents all numbers in the files; uint8 holds codes, not numbers."""
  return "bfloat16" if set(stored_dtypes) - {"uint8"} == {"bfloat16"} else "float32"


def _model_tensors(
  folder: pathlib.Path, hf_config: dict[str, Any], tensors: dict[str, TensorInfo]
) -> dict[str, TensorInfo]:
  """Returns the tensors without buffers, and with those that are tied to others."""
  buffers = [name for name in tensors if name.endswith("rotary_emb.inv_freq")]
  if buffers:
    note(f"skipping buffers of {folder} that follow from its config.json: {some(buffers)}")
  later = [name for name in tensors if _is_of_later_layer(name, hf_config)]
  if later:
    note(f"skipping the layers of {folder} that predict further tokens: {some(later)}")
  tensors = {name: info for name, info in tensors.items() if name not in {*buffers, *later}}
  if hf_config.get("tie_word_embeddings"):
    for name, other in ((_EMBEDDING, _UNEMBEDDING), (_UNEMBEDDING, _EMBEDDING)):
      if other in tensors:
        tensors.setdefault(name, tensors[other])
  return tensors


def _is_of_later_layer(name: str, hf_config: dict[str, Any]) -> bool:
  """Whether a tensor is of a layer after the last, for multi-token prediction."""
  further = hf_config.get("num_nextn_predict_layers")
  match = re.match(r"model\.layers\.(\d+)\.", name)
  if match is None or not isinstance(further, int):
    return False
  last = hf_config["num_hidden_layers"]
  return last <= int(match[1]) < last + further


def _expert_form(
  folder: pathlib.Path, config: ModelConfig, tensors: dict[str, TensorInfo]
) -> tuple[str | None, str]:
  """Returns the experts' format and layout in the tensors, or config.json's if they have none."""
  layers = checkpoint.Piece("", 0, config.num_expert_layers)
  formats = (None, *FAMILIES[config.family].formats)
  # More tensors are never in these files, however many layers and experts config.json claims.
  most = 4 * len(tensors) + 1000
  names = {}
  for f, layout in itertools.product(formats, tensor_names.layouts(config.family)):
    parts = tensor_names.parts(config.replace(expert_format=f), layers, layout)
    found = {part.tensor for part in itertools.islice(parts, most + 1)}
    if len(found) <= most:
      names[f, layout] = found
  if not names:
    raise ConversionError(
      f"{folder} has {len(tensors):,} tensors, but the {config.num_layers:,} layers and "
      f"{config.num_experts:,} experts of its config.json require more than {most:,}"
    )
  common = set.intersection(*names.values()) if len(names) > 1 else set()
  present = (set.union(*names.values()) - common) & set(tensors)
  form = max(names, key=lambda form: len(names[form] & present))
  if rest := present - names[form]:
    other = max(names, key=lambda form: len(names[form] & rest))
    raise ConversionError(
      f"{folder} has experts in two forms ({some(rest, 1)} and "
      f"{some((present & names[form]) - names[other], 1)}), so it mixes two downloads or was "
      "partly converted: download the model again"
    )
  if present:
    return form
  return config.expert_format, tensor_names.SEPARATE


def _check_names(folder: pathlib.Path, tensors: Collection[str]) -> None:
  """Checks that the tensors are those of a whole model under its own names."""
  adapters = [name for name in tensors if ".lora_" in name]
  if adapters:
    raise ConversionError(
      f"{folder} has a LoRA adapter that is not merged into its model ({some(adapters, 1)}): save "
      "what merge_and_unload() of the PEFT model returns"
    )
  suffix = _EMBEDDING.removeprefix("model.")
  other = [name for name in tensors if name.endswith(suffix) and name != _EMBEDDING]
  if other and _EMBEDDING not in tensors:
    outer = other[0].removesuffix(suffix)
    default = "a model within another: save the inner one"
    if not outer:
      default = "the model without its lm_head: save the ForCausalLM model"
    what = next((what for prefix, what in _WRAPPERS.items() if prefix in outer), default)
    raise ConversionError(
      f"{folder} has {other[0]} in place of {_EMBEDDING}, so it was saved from {what}"
    )


def _check_tensors(
  folder: pathlib.Path, config: ModelConfig, layout: str, tensors: dict[str, TensorInfo]
) -> None:
  _check_names(folder, tensors)
  expected = {
    part.tensor: part
    for piece in checkpoint.plan_pieces(config)
    for part in tensor_names.parts(config, piece, layout)
  }
  model = f"{config.family}, {config.num_layers} layers"
  if config.formats:
    model += f", {config.formats}"
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
