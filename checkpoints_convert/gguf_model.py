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
    names: the hub's names of tensors, where they are not those of `_NAMES`.
    interleaved: whether queries and keys are stored in pairs; see `GgufTensor`.
    expert_width: the key of the experts' width in `config.json`.
    has_window: whether llama.cpp applies `attention.sliding_window` in this architecture.
    settings: the values in `config.json` that llama.cpp has in its code, or takes for missing
      metadata.
  """

  model_type: str
  names: dict[str, str] = dataclasses.field(default_factory=dict)
  interleaved: bool = False
  expert_width: str = "intermediate_size"
  has_window: bool = False
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)


_KINDS = ("gate", "up", "down")
_EXPERTS = tuple(f"ffn_{kind}_exps" for kind in _KINDS)
# The hub's names of tensors: of the model, and of a layer. `{expert}` stands for one of the experts
# that a file has in one tensor.
_NAMES = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
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
  "ffn_gate_inp": "mlp.gate",
  "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
  **{f"ffn_{kind}_exps": f"mlp.experts.{{expert}}.{kind}_proj" for kind in _KINDS},
  **{f"ffn_{kind}_shexp": f"mlp.shared_expert.{kind}_proj" for kind in _KINDS},
}
_WITHOUT_SUFFIX = ("attn_sinks", "exp_probs_b")  # their names on the hub have none


def _joint_experts(block: str) -> dict[str, str]:
  """Returns the names where the hub has no tensors of single experts."""
  return {f"ffn_{kind}_exps": f"{block}experts.{kind}_proj" for kind in _KINDS}


_MIXTRAL = Architecture(
  "mixtral",
  {
    "ffn_gate_inp": "block_sparse_moe.gate",
    **{
      name: f"block_sparse_moe.experts.{{expert}}.{matrix}"
      for name, matrix in zip(_EXPERTS, ("w1", "w3", "w2"))
    },
  },
  interleaved=True,
)
_SHARED_EXPERTS = {f"ffn_{kind}_shexp": f"mlp.shared_experts.{kind}_proj" for kind in _KINDS}
# Without metadata about them, llama.cpp has no groups, no dense layers, and gates as they are.
_DEEPSEEK_SETTINGS = {
  "norm_topk_prob": False,
  "routed_scaling_factor": 1.0,
  "n_group": 1,
  "topk_group": 1,
  "first_k_dense_replace": 0,
  "n_shared_experts": 0,
}
ARCHITECTURES = {
  "llama": Architecture("llama", interleaved=True),
  "qwen2": Architecture("qwen2"),
  "qwen2moe": Architecture("qwen2_moe", expert_width="moe_intermediate_size"),
  "qwen3": Architecture("qwen3"),
  "qwen3moe": Architecture(
    "qwen3_moe", expert_width="moe_intermediate_size", settings={"norm_topk_prob": True}
  ),
  "olmoe": Architecture("olmoe"),
  "gpt-oss": Architecture(
    "gpt_oss", {"ffn_gate_inp": "mlp.router", **_joint_experts("mlp.")}, has_window=True
  ),
  "granitemoe": Architecture(
    "granitemoe",
    {
      "ffn_gate_inp": "block_sparse_moe.router.layer",
      **_joint_experts("block_sparse_moe."),
      "ffn_gate_shexp": "shared_mlp.gate_proj",
      "ffn_up_shexp": "shared_mlp.up_proj",
      "ffn_down_shexp": "shared_mlp.output_linear",
    },
    interleaved=True,
  ),
  # DeepSeek-V2 to V3.1, Moonlight, Kimi-K2: the gates say which; see `_architecture`. RoPE rotates
  # neighbors here and on the hub.
  "deepseek2": Architecture(
    "deepseek_v2",
    {
      "attn_q_a": "self_attn.q_a_proj",
      "attn_q_a_norm": "self_attn.q_a_layernorm",
      "attn_q_b": "self_attn.q_b_proj",
      "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
      "attn_kv_a_norm": "self_attn.kv_a_layernorm",
      # Files have the first, or since April 2025 the other two.
      "attn_kv_b": "self_attn.kv_b_proj",
      "attn_k_b": "self_attn.k_b_proj",
      "attn_v_b": "self_attn.v_b_proj",
      "exp_probs_b": "mlp.gate.e_score_correction_bias",
      **_SHARED_EXPERTS,
    },
    expert_width="moe_intermediate_size",
    settings=_DEEPSEEK_SETTINGS | {"q_lora_rank": None},
  ),
  "bailingmoe2": Architecture(
    "bailing_moe_v2",
    {
      "token_embd.weight": "model.word_embeddings.weight",
      "attn_qkv": "attention.query_key_value",
      "attn_output": "attention.dense",
      "attn_q_norm": "attention.query_layernorm",
      "attn_k_norm": "attention.key_layernorm",
      "exp_probs_b": "mlp.gate.expert_bias",
      **_SHARED_EXPERTS,
    },
    expert_width="moe_intermediate_size",
    settings=_DEEPSEEK_SETTINGS,
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
  "expert_weights_scale": ("routed_scaling_factor", None),
  "expert_shared_count": ("n_shared_experts", None),
  "expert_group_count": ("n_group", None),
  "expert_group_used_count": ("topk_group", None),
  "leading_dense_block_count": ("first_k_dense_replace", None),
  "nextn_predict_layers": ("num_nextn_predict_layers", None),
  "attention.head_count": ("num_attention_heads", _REQUIRED),
  "attention.head_count_kv": ("num_key_value_heads", None),
  "attention.key_length": ("head_dim", None),
  "attention.value_length": ("v_head_dim", None),
  "attention.q_lora_rank": ("q_lora_rank", None),
  "attention.kv_lora_rank": ("kv_lora_rank", None),
  "attention.layer_norm_rms_epsilon": ("rms_norm_eps", _REQUIRED),
  "attention.clamp_kqv": ("clip_qkv", None),
  "attention.scale": ("attention_multiplier", None),
  "embedding_scale": ("embedding_multiplier", None),
  "residual_scale": ("residual_multiplier", None),
  "logit_scale": ("logits_scaling", None),
  "rope.freq_base": ("rope_theta", 10000.0),
  "rope.dimension_count": ("qk_rope_head_dim", None),
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
  "expert_gating_func",
  "attention.key_length_mla",
  "attention.value_length_mla",
  "attention.sliding_window",
  "attention.causal",
  "rope.scaling.type",
  "rope.scaling.finetuned",
  "rope.scaling.yarn_log_multiplier",
)
_SIGMOID = 2
_GATING: dict[Any, str] = {1: "softmax", _SIGMOID: "sigmoid"}
_KV_HALF = re.compile("attn_[kv]_b")
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
  if name == "deepseek2" and file.metadata.get(f"{name}.expert_gating_func") == _SIGMOID:
    architecture = dataclasses.replace(architecture, model_type="deepseek_v3")
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
  known = {*_KEYS, *_ROPE_KEYS, *_OTHER_KEYS}
  for key in values.keys() & known:
    kind = (
      str if key == "rope.scaling.type" else _NUMBER | list[_NUMBER] if key in _KEYS else _NUMBER
    )
    typed.check(f"{name}.{key} of {file.path}", values[key], kind)
  if unused := set(values) - known:
    note(f"{file.path} has metadata that are not used: {some({f'{name}.{k}' for k in unused})}")
  for key in ("attention.key_length", "attention.value_length"):
    # Latent attention may be described by its cached keys, which all heads share, and its heads.
    values[key] = values.get(key + "_mla", values.get(key))
  config = {"model_type": architecture.model_type, **architecture.settings}
  for key, (target, default) in _KEYS.items():
    value = values.get(key, default)
    if value is _REQUIRED:
      raise ConversionError(f"{file.path} lacks the metadata {name}.{key}")
    if isinstance(value, list):
      if len(set(value)) != 1:
        raise ConversionError(f"{file.path} has different values of {name}.{key} in its layers")
      value = value[0]
    if value is not None:
      config[target] = _shortest(value) if isinstance(value, float) else value
  for target in config.keys() & {"hidden_size", "num_attention_heads", "head_dim"}:
    typed.check(f"{target} of {file.path}", config[target], int)
    if config[target] < 1:
      raise ConversionError(f"{target} of {file.path} must be positive, got {config[target]}")
  width = values.get("expert_feed_forward_length", values.get("feed_forward_length"))
  config[architecture.expert_width] = width
  head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
  rotary = config.get("qk_rope_head_dim", head_dim)
  config["partial_rotary_factor"], config["qk_nope_head_dim"] = rotary / head_dim, head_dim - rotary
  config["num_hidden_layers"] -= config.get("num_nextn_predict_layers", 0)
  # Families have names of their own for these, and each reads its own.
  shared = config.get("shared_expert_intermediate_size")
  config["shared_intermediate_size"] = config["moe_shared_expert_intermediate_size"] = shared
  config["num_shared_experts"] = config.get("n_shared_experts")
  gating = values.get("expert_gating_func")
  config["scoring_func"] = config["score_function"] = _GATING.get(gating, gating)
  in_groups = "greedy" if config.get("n_group", 1) <= 1 else "group_limited_greedy"
  config["topk_method"] = "noaux_tc" if gating == _SIGMOID else in_groups
  if architecture.has_window:
    config["sliding_window"] = values.get("attention.sliding_window")
  if "token_embd.weight" in file.tensors:
    config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
  config["tie_word_embeddings"] = "output.weight" not in file.tensors
  config["rope_scaling"] = _rope_scaling(file, values, config, head_dim)
  config["use_qkv_bias"] = "blk.0.attn_qkv.bias" in file.tensors
  if architecture.interleaved:
    config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
  return config | gguf_tokenizer.special_ids(file.metadata)


def _shortest(value: float) -> float:
  """Returns the shortest number that is the same in float32, such as 1e-05."""
  return float(str(np.float32(value)))


def _rope_scaling(file, values, config, head_dim) -> dict[str, Any] | None:
  kind = values.get("rope.scaling.type", "none")
  scaling = None
  if kind != "none":
    scaling = {"rope_type": kind, "truncate": config["model_type"] != "gpt_oss"}
    scaling |= {target: values[key] for key, target in _ROPE_KEYS.items() if key in values}
    if scale := values.get("rope.scaling.yarn_log_multiplier"):
      # A tenth of `mscale_all_dim` in DeepSeek's files. They lack `mscale`; published ones have the
      # same there.
      scaling["mscale"] = scaling["mscale_all_dim"] = _shortest(10 * _shortest(scale))
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
  # Layers for multi-token prediction keep their names, by which `hub` skips them.
  further = tuple({n.split("nextn.")[0] for n in file.tensors if ".nextn." in n})
  kinds = {file.tensors[n].kind.name for n in file.tensors if n.endswith("_exps.weight")}
  keeps_codes = architecture.model_type == "gpt_oss" and kinds == {"MXFP4"}
  tensors: dict[str, GgufTensor] = {}
  for name, tensor in file.tensors.items():
    if name == _ROPE_FACTORS:
      continue  # see `_rope_scaling`
    if _KV_HALF.search(name) and _KV_HALF.sub("attn_kv_b", name) in file.tensors:
      continue  # repeats a part of that
    if name.startswith(further):
      tensors[name.replace("blk", "model.layers", 1)] = tensor
      continue
    for hub_name, part in _parts(architecture, keeps_codes, name, tensor):
      if hub_name in tensors:
        raise ConversionError(f"{path} has {name} and {tensors[hub_name].name}: keep only one")
      tensors[hub_name] = part
  return tensors


def _parts(
  architecture: Architecture, keeps_codes: bool, name: str, tensor: GgufTensor
) -> Iterator[tuple[str, GgufTensor]]:
  """Yields what a tensor is on the hub, with names."""
  names = _NAMES | architecture.names
  if name in names:
    yield names[name], tensor
    return
  match = _NAME.fullmatch(name)
  layer, base, expert, suffix = match.groups() if match else ("", "", None, "")
  if expert is not None:  # files of before 2024 have one tensor for each expert
    base += "_exps"
  if base not in names:
    raise ConversionError(
      f"{tensor.file} has a tensor {name}, which is unknown in a {architecture.model_type} model"
    )
  target = f"model.layers.{layer}.{names[base]}"
  if base not in _WITHOUT_SUFFIX:
    target += f".{suffix}"
  if expert is not None:
    yield target.format(expert=expert), tensor
  elif "{expert}" in target:
    for i, part in enumerate(experts(tensor)):
      yield target.format(expert=i), part
  elif keeps_codes and base in _EXPERTS and suffix == "weight":
    target = target.removesuffix(".weight")
    *rows, width = tensor.shape
    yield target + "_blocks", _codes(tensor, "blocks", (*rows, width // 32, 16))
    yield target + "_scales", _codes(tensor, "scales", (*rows, width // 32))
  else:
    if base in ("attn_q", "attn_k"):
      tensor = dataclasses.replace(tensor, interleaved=architecture.interleaved)
    if base == "ffn_gate_inp_shexp" and len(tensor.shape) == 1:
      tensor = dataclasses.replace(tensor, shape=(1, *tensor.shape))
    yield target, tensor


def _codes(tensor: GgufTensor, part: str, shape: tuple[int, ...]) -> GgufTensor:
  return dataclasses.replace(tensor, part=part, shape=shape, dtype=np.dtype(np.uint8))
