"""A GGUF file as a Hugging Face folder: its metadata as JSON files, its tensors under hub names."""

from collections.abc import Iterator
import dataclasses
import functools
import json
import pathlib
import re
import tempfile
from typing import Any

import numpy as np

from checkpoints_convert import gguf_tokenizer
from checkpoints_convert.common import ConversionError, note, some
from checkpoints_convert.gguf_files import GgufFile, GgufTensor, experts, read_header
from roe_jax import typed

SUFFIX = ".gguf"
WEIGHTS = "model.gguf"  # in a folder that `expand` makes: a link to the file
_REQUIRED = object()
_NUMBER = bool | int | float
_ROPE_FACTORS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What is not in a file of an architecture of llama.cpp.

  Attributes:
    model_type: its family on the hub.
    block: the prefix of its router and experts in tensor names of the hub.
    experts: the hub's names of the experts' gate, up and down projections in `block`, without
      `{expert}` where all experts are one tensor.
    router: the hub's name of the router in `block`.
    shared_expert: the hub's names of the gate, up and down projections of the shared expert.
    interleaved: whether queries and keys are stored in pairs; see `GgufTensor`.
    expert_width: the key of the experts' width in `config.json`.
    has_window: whether llama.cpp applies `attention.sliding_window` in this architecture.
    settings: the values in `config.json` that llama.cpp has in its code.
  """

  model_type: str
  block: str = "mlp."
  experts: tuple[str, ...] = tuple(
    f"experts.{{expert}}.{name}_proj" for name in ("gate", "up", "down")
  )
  router: str = "gate"
  shared_expert: tuple[str, ...] = tuple(
    f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")
  )
  interleaved: bool = False
  expert_width: str = "intermediate_size"
  has_window: bool = False
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)


_JOINT_EXPERTS = ("experts.gate_proj", "experts.up_proj", "experts.down_proj")
_MIXTRAL = Architecture(
  "mixtral",
  block="block_sparse_moe.",
  experts=("experts.{expert}.w1", "experts.{expert}.w3", "experts.{expert}.w2"),
  interleaved=True,
)
ARCHITECTURES = {
  "llama": Architecture("llama", interleaved=True),
  "qwen2": Architecture("qwen2"),
  "qwen2moe": Architecture("qwen2_moe", expert_width="moe_intermediate_size"),
  "qwen3": Architecture("qwen3"),
  "qwen3moe": Architecture(
    "qwen3_moe", expert_width="moe_intermediate_size", settings={"norm_topk_prob": True}
  ),
  "olmoe": Architecture("olmoe"),
  "gpt-oss": Architecture("gpt_oss", experts=_JOINT_EXPERTS, router="router", has_window=True),
  "granitemoe": Architecture(
    "granitemoe",
    block="block_sparse_moe.",
    experts=_JOINT_EXPERTS,
    router="router.layer",
    shared_expert=("shared_mlp.gate_proj", "shared_mlp.up_proj", "shared_mlp.output_linear"),
    interleaved=True,
  ),
}
# Keys without their architecture, with keys of config.json and values for missing keys.
_KEYS = {
  "block_count": ("num_hidden_layers", _REQUIRED),
  "context_length": ("max_position_embeddings", _REQUIRED),
  "embedding_length": ("hidden_size", _REQUIRED),
  "feed_forward_length": ("intermediate_size", None),
  "expert_shared_feed_forward_length": ("shared_expert_intermediate_size", None),
  "expert_count": ("num_experts", None),
  "expert_used_count": ("num_experts_per_tok", None),
  "expert_weights_norm": ("norm_topk_prob", None),
  "attention.head_count": ("num_attention_heads", _REQUIRED),
  "attention.head_count_kv": ("num_key_value_heads", None),
  "attention.key_length": ("head_dim", None),
  "attention.layer_norm_rms_epsilon": ("rms_norm_eps", _REQUIRED),
  "attention.clamp_kqv": ("clip_qkv", None),
  "attention.scale": ("attention_multiplier", None),
  "embedding_scale": ("embedding_multiplier", None),
  "residual_scale": ("residual_multiplier", None),
  "logit_scale": ("logits_scaling", None),
  "rope.freq_base": ("rope_theta", 10000.0),
}
_ROPE_KEYS = {
  "rope.scaling.factor": "factor",
  "rope.scaling.original_context_length": "original_max_position_embeddings",
  "rope.scaling.attn_factor": "attention_factor",
  "rope.scaling.yarn_beta_fast": "beta_fast",
  "rope.scaling.yarn_beta_slow": "beta_slow",
}
# Keys that are read elsewhere, follow from others, or change no result.
_OTHER_KEYS = (
  "vocab_size",
  "expert_feed_forward_length",
  "expert_shared_count",
  "attention.value_length",
  "attention.sliding_window",
  "attention.causal",
  "rope.dimension_count",
  "rope.scaling.type",
  "rope.scaling.finetuned",
)
_TOP = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
}
_LAYER = {
  "attn_norm": "input_layernorm",
  "ffn_norm": "post_attention_layernorm",
  "post_attention_norm": "post_attention_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "attn_sinks": "self_attn.sinks",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
  "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_SHARED_EXPERT = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
_NAME = re.compile(r"blk\.(\d+)\.(\w+)(?:\.(\d+))?\.(weight|bias)")
# The scaling of Llama 3.1 to 3.3; the factor is in `_ROPE_FACTORS`.
_LLAMA3 = {
  "rope_type": "llama3",
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}


def is_gguf(name: str) -> bool:
  """Whether a source is named like a GGUF file."""
  return name.lower().endswith(SUFFIX) and not pathlib.Path(name).expanduser().is_dir()


def expand(source: str) -> pathlib.Path:
  """Returns a folder like one of the hub for a file: its JSON files, and a link to the weights.

  The folder is removed when the process ends.

  Raises:
    FileNotFoundError: there is no such file.
    ConversionError: it is not a whole GGUF file, or of an unsupported kind.
  """
  path = pathlib.Path(source).expanduser().absolute()
  if not path.is_file():
    raise FileNotFoundError(f"there is no file {source}")
  status = path.stat()
  return pathlib.Path(_expand(path, status.st_size, status.st_mtime_ns).name)


@functools.cache
def _expand(path: pathlib.Path, size: int, time: int) -> tempfile.TemporaryDirectory:
  file = read_header(path)
  files = {"config.json": config_json(file), **gguf_tokenizer.files(path, file.metadata)}
  folder = tempfile.TemporaryDirectory(prefix="roe_jax_gguf_")
  for name, content in files.items():
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    (pathlib.Path(folder.name) / name).write_text(text, encoding="utf-8")
  (pathlib.Path(folder.name) / WEIGHTS).symlink_to(path)
  return folder


def _architecture(file: GgufFile) -> tuple[str, Architecture]:
  name = file.metadata.get("general.architecture")
  if name not in ARCHITECTURES:
    raise ConversionError(
      f"{file.path} has the architecture {name!r}; supported: {', '.join(ARCHITECTURES)}"
    )
  if name == "llama" and file.metadata.get("llama.expert_count"):
    return name, _MIXTRAL
  architecture = ARCHITECTURES[name]
  if name == "granitemoe" and file.metadata.get(f"{name}.expert_shared_feed_forward_length"):
    architecture = dataclasses.replace(architecture, model_type="granitemoeshared")
  return name, architecture


def config_json(file: GgufFile) -> dict[str, Any]:
  """Returns what `config.json` of the model on the hub says, as far as it is known.

  Raises:
    ConversionError: the architecture is unknown, or the metadata lack a value.
  """
  name, architecture = _architecture(file)
  values = {
    key.removeprefix(name + "."): value
    for key, value in file.metadata.items()
    if key.startswith(name + ".")
  }
  for key in values.keys() & {*_KEYS, *_ROPE_KEYS, *_OTHER_KEYS}:
    kind = (
      str if key == "rope.scaling.type" else _NUMBER | list[_NUMBER] if key in _KEYS else _NUMBER
    )
    typed.check(f"{name}.{key} of {file.path}", values[key], kind)
  unused = set(values) - {*_KEYS, *_ROPE_KEYS, *_OTHER_KEYS}
  if unused:
    note(f"{file.path} has metadata that are not used: {some({f'{name}.{k}' for k in unused})}")
  config = {"model_type": architecture.model_type, **architecture.settings}
  for key, (target, default) in _KEYS.items():
    value = values.get(key, default)
    if value is _REQUIRED:
      raise ConversionError(f"{file.path} lacks the metadata {name}.{key}")
    if isinstance(value, list):
      if len(set(value)) != 1:
        raise ConversionError(f"{file.path} has different values of {name}.{key} in its layers")
      value = value[0]
    if isinstance(value, float):
      value = float(str(np.float32(value)))  # the shortest number, such as 1e-05
    if value is not None:
      config[target] = value
  for target in config.keys() & {"hidden_size", "num_attention_heads", "head_dim"}:
    typed.check(f"{target} of {file.path}", config[target], int)
    if config[target] < 1:
      raise ConversionError(f"{target} of {file.path} must be positive, got {config[target]}")
  width = values.get("expert_feed_forward_length", values.get("feed_forward_length"))
  config[architecture.expert_width] = width
  head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
  config["shared_intermediate_size"] = config.get("shared_expert_intermediate_size")
  config["partial_rotary_factor"] = values.get("rope.dimension_count", head_dim) / head_dim
  if architecture.has_window:
    config["sliding_window"] = values.get("attention.sliding_window")
  if "token_embd.weight" in file.tensors:
    config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
  config["tie_word_embeddings"] = "output.weight" not in file.tensors
  config["rope_scaling"] = _rope_scaling(file, values, config, head_dim)
  if architecture.interleaved:
    config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
  return config | gguf_tokenizer.special_ids(file.metadata)


def _rope_scaling(file, values, config, head_dim) -> dict[str, Any] | None:
  kind = values.get("rope.scaling.type", "none")
  scaling = None
  if kind != "none":
    scaling = {"rope_type": kind, "truncate": config["model_type"] != "gpt_oss"}
    scaling |= {target: values[key] for key, target in _ROPE_KEYS.items() if key in values}
  elif config["model_type"] == "gpt_oss":
    scaling = {"rope_type": "default"}  # the family's own default is YaRN
  if _ROPE_FACTORS in file.tensors:
    factors = _read(file.tensors[_ROPE_FACTORS])
    scaling = _LLAMA3 | {"factor": float(factors.max())}
    expected = _llama3_factors(config["rope_theta"], head_dim, scaling)
    if (
      kind != "none" or factors.shape != expected.shape or not np.allclose(factors, expected, 1e-4)
    ):
      raise ConversionError(
        f"{_ROPE_FACTORS} in {file.path} is not the RoPE scaling of Llama 3, the only one with "
        "factors of its own that is supported"
      )
  return scaling


def _llama3_factors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
  """Returns what the frequencies of Llama 3 are divided by, float64[C / 2]."""
  frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
  rotations = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
  low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
  kept = np.clip((rotations - low) / (high - low), 0, 1)
  return 1 / (kept + (1 - kept) / scaling["factor"])


def _read(tensor: GgufTensor) -> np.ndarray:
  return tensor.read(tensor.shape, tuple((0, size) for size in tensor.shape))


def hub_tensors(path: pathlib.Path) -> dict[str, GgufTensor]:
  """Returns the tensors of a file under the names that they have on the hub.

  Raises:
    ConversionError: the file cannot be read, or has a tensor of an unknown name.
  """
  file = read_header(path)
  _, architecture = _architecture(file)
  joint: dict[str, str] = dict(
    zip(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), architecture.experts)
  )
  kinds = {file.tensors[n].kind.name for n in file.tensors if n.endswith("_exps.weight")}
  keeps_codes = architecture.model_type == "gpt_oss" and kinds == {"MXFP4"}
  tensors: dict[str, GgufTensor] = {}
  for name, tensor in file.tensors.items():
    if name == _ROPE_FACTORS:
      continue  # see `_rope_scaling`
    for hub_name, part in _parts(architecture, joint, keeps_codes, name, tensor):
      if hub_name in tensors:
        raise ConversionError(f"{path} has {name} and {tensors[hub_name].name}: keep only one")
      tensors[hub_name] = part
  return tensors


def _parts(
  architecture: Architecture,
  joint: dict[str, str],
  keeps_codes: bool,
  name: str,
  tensor: GgufTensor,
) -> Iterator[tuple[str, GgufTensor]]:
  """Yields what a tensor is on the hub, with names."""
  if name in _TOP:
    yield _TOP[name], tensor
    return
  match = _NAME.fullmatch(name)
  layer, base, expert, suffix = match.groups() if match else ("", "", None, "")
  at = f"model.layers.{layer}."
  if expert is not None:  # files of before 2024 have one tensor for each expert
    base += "_exps"
  if base in joint:
    target = at + architecture.block + joint[base]
    if expert is not None:
      yield f"{target.format(expert=expert)}.{suffix}", tensor
    elif "{expert}" in target:
      for i, part in enumerate(experts(tensor)):
        yield f"{target.format(expert=i)}.{suffix}", part
    elif keeps_codes and suffix == "weight":
      *rows, width = tensor.shape
      yield target + "_blocks", _codes(tensor, "blocks", (*rows, width // 32, 16))
      yield target + "_scales", _codes(tensor, "scales", (*rows, width // 32))
    else:
      yield f"{target}.{suffix}", tensor
    return
  if base in _SHARED_EXPERT:
    yield f"{at}{architecture.shared_expert[_SHARED_EXPERT.index(base)]}.{suffix}", tensor
    return
  if base == "ffn_gate_inp":
    yield f"{at}{architecture.block}{architecture.router}.{suffix}", tensor
    return
  if base not in _LAYER or expert is not None:
    raise ConversionError(
      f"{tensor.file} has a tensor {name}, which is unknown in a {architecture.model_type} model"
    )
  if base in ("attn_q", "attn_k"):
    tensor = dataclasses.replace(tensor, interleaved=architecture.interleaved)
  if base == "ffn_gate_inp_shexp" and len(tensor.shape) == 1:
    tensor = dataclasses.replace(tensor, shape=(1, *tensor.shape))
  yield at + _LAYER[base] + ("" if base == "attn_sinks" else f".{suffix}"), tensor


def _codes(tensor: GgufTensor, part: str, shape: tuple[int, ...]) -> GgufTensor:
  return dataclasses.replace(tensor, part=part, shape=shape, dtype=np.dtype(np.uint8))
