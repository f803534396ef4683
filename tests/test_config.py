"""Reading, refusing and writing model configs."""

import copy
import dataclasses
import json
import math
import re

import hf
import pytest
import tiny

from roe_jax.config import ModelConfig
from roe_jax.families import COMMON_KEYS, FAMILIES, from_hugging_face, to_hugging_face
from roe_jax.presets import PRESETS
from roe_jax.rope import Yarn


def test_olmoe_config_is_read():
  config = from_hugging_face(hf.config_json("olmoe", clip_qkv=8.0, torch_dtype="bfloat16"))
  assert config == ModelConfig(
    family="olmoe",
    vocab_size=48,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=8,
    experts_per_token=3,
    d_expert=16,
    context_length=64,
    normalize_gates=False,
    gates_in_model_dtype=True,
    qk_norm=True,
    clip_qkv=8.0,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    initializer_range=0.02,
    bos_token_id=1,
    pad_token_id=0,
    eos_token_ids=(2,),
    dtype="bfloat16",
  )


def test_mixtral_config_is_read():
  config = from_hugging_face(hf.config_json("mixtral", head_dim=12, eos_token_id=[2, 7]))
  assert config == ModelConfig(
    family="mixtral",
    vocab_size=48,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    num_experts=8,
    experts_per_token=2,
    d_expert=16,
    context_length=64,
    normalize_gates=True,
    gates_in_model_dtype=False,
    qk_norm=False,
    clip_qkv=None,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    initializer_range=0.02,
    bos_token_id=1,
    pad_token_id=0,
    eos_token_ids=(2, 7),
    dtype="float32",
  )


def test_gpt_oss_config_is_read():
  """A config.json with the values of gpt-oss-20b."""
  types = ["sliding_attention", "full_attention"] * 12
  config = from_hugging_face(
    {
      "model_type": "gpt_oss",
      "attention_bias": True,
      "eos_token_id": 200002,
      "head_dim": 64,
      "hidden_act": "silu",
      "hidden_size": 2880,
      "initial_context_length": 4096,
      "intermediate_size": 2880,
      "layer_types": types,
      "max_position_embeddings": 131072,
      "num_attention_heads": 64,
      "num_experts_per_tok": 4,
      "num_hidden_layers": 24,
      "num_key_value_heads": 8,
      "num_local_experts": 32,
      "pad_token_id": 199999,
      "quantization_config": {"quant_method": "mxfp4"},
      "rms_norm_eps": 1e-05,
      "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
      },
      "rope_theta": 150000,
      "sliding_window": 128,
      "swiglu_limit": 7.0,
      "tie_word_embeddings": False,
      "vocab_size": 201088,
    },
    dtype="bfloat16",
  )
  assert config == PRESETS["gpt-oss-20b"].replace(bos_token_id=None)
  assert config.expert_format == "mxfp4"
  assert config.sliding_layers == tuple(range(0, 24, 2))
  assert config.rope_scaling.attention_factor == pytest.approx(1.34657, abs=1e-5)


def test_qwen_configs_are_read():
  hf_config = hf.config_json("qwen3_moe")
  config = from_hugging_face(hf_config)
  assert config == ModelConfig(
    family="qwen3_moe",
    vocab_size=48,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    num_experts=8,
    experts_per_token=3,
    d_expert=16,
    context_length=64,
    normalize_gates=True,
    gates_in_model_dtype=True,
    qk_norm=True,
    qk_norm_per_head=True,
    bos_token_id=1,
    pad_token_id=0,
    eos_token_ids=(2,),
  )
  del hf_config["rms_norm_eps"]
  assert from_hugging_face(hf_config).rms_norm_eps == 1e-6
  config = from_hugging_face(hf.config_json("qwen2_moe"))
  assert (config.d_expert, config.d_shared_expert) == (16, 20)
  assert config.qkv_bias and not config.output_bias and not config.qk_norm


@pytest.mark.parametrize(
  "family, changes, layers",
  [
    ("mixtral", {"sliding_window": 32}, (0, 1)),
    ("mixtral", {"sliding_window": None}, ()),
    ("mixtral", {"sliding_window": 64}, ()),  # as wide as the context
    ("gpt_oss", {}, (0,)),
    ("gpt_oss", {"num_hidden_layers": 5}, (0, 2, 4)),
    ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"]}, (1,)),
    ("qwen2_moe", {}, ()),
    (
      "qwen2_moe",
      {"use_sliding_window": True, "num_hidden_layers": 5, "max_window_layers": 3},
      (0, 2),
    ),
    ("qwen3_moe", {}, ()),
    ("qwen3_moe", {"use_sliding_window": True}, (0, 1)),
  ],
)
def test_which_layers_have_a_window(family, changes, layers):
  config = from_hugging_face(hf.config_json(family, **changes))
  assert config.sliding_layers == layers
  assert (config.sliding_window is None) == (not layers)


@pytest.mark.parametrize(
  "scaling, expected",
  [
    (
      dict(factor=4.0, original_max_position_embeddings=16),
      Yarn(4.0, 16, 32.0, 1.0, True, 0.1 * math.log(4) + 1),
    ),
    (
      dict(factor=4.0, attention_factor=0.5, beta_fast=8, beta_slow=2, truncate=False),
      Yarn(4.0, 64, 8.0, 2.0, False, 0.5),
    ),
    (
      dict(factor=4.0, mscale=2.0, mscale_all_dim=1.0),
      Yarn(4.0, 64, 32.0, 1.0, True, (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
    ),
  ],
)
def test_yarn_is_read(scaling, expected):
  for changes in (
    {"rope_scaling": {"rope_type": "yarn"} | scaling},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4} | scaling},
  ):
    config = from_hugging_face(hf.config_json("qwen3_moe", **changes))
    assert config.rope_scaling == expected
    assert from_hugging_face(to_hugging_face(config)) == config


def test_gpt_oss_without_scaling_says_so():
  """A missing key would mean YaRN."""
  plain = tiny.config("gpt_oss", rope_scaling=None)
  assert from_hugging_face(to_hugging_face(plain)) == plain


@pytest.mark.parametrize(
  "spelling",
  [
    {"rope_theta": 5e5},
    {"rope_theta": 5e5, "rope_scaling": None},
    {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
    {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
  ],
)
def test_both_spellings_of_rope_are_read(spelling):
  assert from_hugging_face(hf.config_json("mixtral", **spelling)).rope_theta == 5e5


@pytest.mark.parametrize("family", hf.ROUTED)
@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_both_names_of_the_expert_count_are_read(family, name):
  hf_config = hf.config_json(family)
  for old in ("num_experts", "num_local_experts"):
    hf_config.pop(old, None)
  assert from_hugging_face(hf_config | {name: 16}).num_experts == 16


YARN = dict(
  rope_type="yarn",
  rope_theta=55.0,
  factor=4.0,
  original_max_position_embeddings=12,
  beta_fast=8.0,
  beta_slow=2.0,
  truncate=False,
  attention_factor=0.5,
)
LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=55.0,
  factor=8.0,
  original_max_position_embeddings=12,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
)
LINEAR = dict(type="linear", rope_theta=55.0, factor=4.0)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_missing_keys_mean_what_they_mean_to_transformers(family):
  """Every key is left out or null in turn; no value is its default, so that each matters."""
  pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  Config = type(transformers.AutoConfig.for_model(family))

  def standardized(values):
    parsed = Config.from_dict(values)
    kind = parsed.rope_parameters["rope_type"]
    if kind != "default":  # standardizes the keys as its models do
      transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](parsed)
    return parsed.to_dict() | {"original_max_position_embeddings": None}

  changes = dict(
    clip_qkv=0.5,
    head_dim=12,
    initializer_range=0.5,
    hidden_size=256,
    num_attention_heads=64,  # divisible by every default of num_key_value_heads
    norm_topk_prob=True,
    num_hidden_layers=5,
    rms_norm_eps=0.25,
    rope_theta=77.0,
    torch_dtype="bfloat16",
  )
  if FAMILIES[family].has_window:
    changes |= dict(sliding_window=7, use_sliding_window=True)
  if family in hf.SIGMOID:  # each default fits with the other values
    changes |= dict(n_routed_experts=32, topk_group=1)
  kinds = ["sliding_attention", "full_attention", "full_attention"]
  bases = [
    hf.config_json(family, **changes),
    hf.config_json(family, **changes, layer_types=(kinds * 2)[:5]),
    hf.config_json(family, **changes | dict(rope_scaling=YARN)),
    hf.config_json(family, **changes | dict(rope_scaling=None, rope_parameters=YARN)),
    hf.config_json(
      family, **changes | dict(rope_scaling=YARN, original_max_position_embeddings=16)
    ),
    hf.config_json(family, **changes | dict(rope_scaling=LLAMA3)),
    hf.config_json(family, **changes | dict(rope_scaling=None, rope_parameters=LINEAR)),
  ]
  cases, of_positions = [], re.compile("rope|rotary|position|head|hidden_size|layer")
  for base in bases:
    # The forms of rotary embeddings only with what may bear on them.
    keys = base if base in bases[:2] else list(filter(of_positions.search, base))
    cases += [base | {key: None} for key in keys]
    cases += [{k: v for k, v in base.items() if k != key} for key in keys]
    for name in ("rope_scaling", "rope_parameters"):
      rope = base.get(name) or {}
      cases += [
        base | {name: {k: v for k, v in rope.items() if k != key}, "rope_theta": 77.0}
        for key in rope
      ]
  compared = 0
  for case in cases:
    try:
      want = standardized(copy.deepcopy(case))
    except Exception:  # what transformers refuses may be refused
      continue
    case["model_type"] = family
    assert from_hugging_face(case) == from_hugging_face(want), case
    compared += 1
  assert compared > 120


@pytest.mark.parametrize(
  "name, changes",
  [
    ("gpt2", {"model_type": "gpt2"}),
    ("None", {"model_type": None}),
    (
      "layer_types",
      {
        "model_type": "gpt_oss",
        "sliding_window": 8,
        "attention_bias": True,
        "layer_types": ["full_attention"],
      },
    ),
    ("decoder_sparse_step", hf.config_json("qwen3_moe", decoder_sparse_step=2)),
    ("mlp_only_layers", hf.config_json("qwen2_moe", mlp_only_layers=[1])),
    ("dynamic", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    ("attention_bias", {"attention_bias": True}),
    ("rope_parameters", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
    ("quantization_config", {"quantization_config": {"quant_method": "mxfp4"}}),
    (
      "quantization_config = 'fp8'; supported: mxfp4",
      hf.config_json("gpt_oss", quantization_config={"quant_method": "fp8"}),
    ),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("float8", {"torch_dtype": "float8"}),
  ],
)
def test_unsupported_settings_are_refused_by_name(name, changes):
  with pytest.raises(ValueError, match=f"unsupported .*{name}"):
    from_hugging_face(hf.config_json("mixtral", **changes))


def test_dtype_is_what_the_file_names_unless_given():
  def dtype(given=None, **changes):
    return from_hugging_face(hf.config_json("olmoe", **changes), dtype=given).dtype

  assert dtype() == "float32"
  assert dtype(torch_dtype="bfloat16") == dtype(dtype="bfloat16") == "bfloat16"
  assert dtype(torch_dtype="float16") == "float32"
  assert dtype("bfloat16", torch_dtype="float32") == "bfloat16"


@pytest.mark.parametrize(
  "changes",
  [
    {"clip_qkv": 2.5, "normalize_gates": True},
    {"family": "mixtral", "head_dim": 12},
    {
      "eos_token_ids": (3, 5),
      "bos_token_id": 1,
      "dtype": "bfloat16",
      "rope_theta": 123.0,
      "rms_norm_eps": 1e-6,
      "initializer_range": 0.1,
    },
  ],
)
def test_round_trip_through_hugging_face(changes):
  config = tiny.config(**({"family": "olmoe"} | changes))
  text = json.dumps(to_hugging_face(config))
  assert from_hugging_face(json.loads(text)) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_round_trips_through_hugging_face(family):
  config = tiny.config(family)
  if family == "olmoe":
    assert "head_dim" not in to_hugging_face(config)
  assert from_hugging_face(json.loads(json.dumps(to_hugging_face(config)))) == config
  windows = dict(sliding_window=4, sliding_layers=(0, 1, 2), num_layers=3)
  if FAMILIES[family].has_window:
    config = config.replace(**windows)
    assert from_hugging_face(to_hugging_face(config)) == config


@pytest.mark.parametrize(
  "config, message",
  [
    (tiny.config("olmoe", head_dim=12), "head_dim"),
    (tiny.config("olmoe", qk_norm=False), "qk_norm"),
    (tiny.config("mixtral", normalize_gates=False), "normalize_gates"),
    (tiny.config("mixtral", clip_qkv=1.0), "clip_qkv"),
    (tiny.config("mixtral", sliding_window=4, sliding_layers=(1,)), "the same sliding_window"),
    (tiny.config("olmoe", sliding_window=4, sliding_layers=(1,)), "no sliding_window"),
    (tiny.config("qwen3_moe", attention_sinks=True), "attention_sinks"),
    (tiny.config("olmoe", expert_format="int8"), "int8 have no Hugging Face form"),
    (tiny.config("mixtral").replace(family="llama"), "llama"),
  ],
)
def test_what_a_family_cannot_express_is_not_written(config, message):
  with pytest.raises(ValueError, match=message):
    to_hugging_face(config)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_both_forms(name):
  config = PRESETS[name]
  assert ModelConfig.from_json(config.to_json()) == config
  if name == "pangu-ultra-moe":  # a shape of no family of the hub
    with pytest.raises(ValueError, match="sandwich_norm = True has no Hugging Face form"):
      to_hugging_face(config)
    return
  assert from_hugging_face(to_hugging_face(config)) == config


def test_json_with_unknown_or_missing_keys_is_refused():
  values = json.loads(tiny.config("olmoe").to_json())
  del values["d_model"]
  values["color"] = "blue"
  with pytest.raises(ValueError, match=r"unknown keys \['color'\] and lacks \['d_model'\]"):
    ModelConfig.from_json(json.dumps(values))
  with pytest.raises(ValueError, match="not valid JSON"):
    ModelConfig.from_json("{")
  with pytest.raises(ValueError, match="JSON object"):
    ModelConfig.from_json("[]")


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"dtype": "float16"}, "float16"),
    ({"num_layers": 0}, "num_layers"),
    ({"vocab_size": 2.0}, "vocab_size"),
    ({"num_experts": True}, "num_experts"),
    ({"num_kv_heads": 3}, "num_kv_heads"),
    ({"head_dim": 7}, "head_dim"),
    ({"experts_per_token": 9}, "experts_per_token"),
    ({"sliding_window": 4}, "sliding_layers"),
    ({"sliding_layers": (1,)}, "sliding_window"),
    ({"sliding_window": 4, "sliding_layers": (3,)}, "indices of the 3 layers"),
    ({"expert_format": "int3"}, "int3.*int8, int4, mxfp4"),
    ({"gate_scales": True}, "gate_scales scale the gates of one"),
  ],
)
def test_impossible_sizes_are_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    tiny.config("olmoe").replace(**changes)


NONSENSE = ("x", [], {}, True, -1, 0, math.nan, math.inf, 2.5, [[1]], {"a": 1}, 10**9)


@pytest.mark.parametrize("family", FAMILIES)
def test_nonsense_in_a_config_is_refused_in_a_sentence(family):
  """Or it is a config that a model may have; never another error, and never NaN."""
  keys = COMMON_KEYS | FAMILIES[family].keys
  others = ("rope_scaling", "layer_types", "eos_token_id", "torch_dtype", "model_type")
  nested = ("factor", "original_max_position_embeddings", "rope_theta", "rope_type")
  for key in (*keys.values(), *others, *nested):
    for value in NONSENSE:
      rope = {"rope_type": "yarn", "factor": 2.0}
      hf = {"model_type": family, "rope_scaling": rope | ({key: value} if key in nested else {})}
      try:
        config = from_hugging_face(hf | ({} if key in nested else {key: value}))
      except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        continue
      for name, read in dataclasses.asdict(config).items():
        assert read is None or not isinstance(read, float) or math.isfinite(read), name
      assert config.rope_theta > 0 and config.rms_norm_eps >= 0 and config.num_kv_heads > 0


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("rms_norm_eps", -1, "rms_norm_eps must be at least 0, got -1"),
    ("rms_norm_eps", math.nan, "rms_norm_eps must be a finite number, got nan"),
    ("rms_norm_eps", 10**400, "rms_norm_eps must be a finite number, got 1000"),
    ("rope_theta", 0, "rope_theta must be positive, got 0"),
    ("sliding_window", True, "sliding_window must be an integer or null, got True"),
    ("num_hidden_layers", "2", "num_hidden_layers must be an integer, got '2'"),
    ("num_hidden_layers", 10**9, "num_hidden_layers must be at most"),
    ("eos_token_id", 2.5, "eos_token_ids must be a list whose items are integers"),
    ("eos_token_id", -1, "eos_token_ids must be at least 0"),
    ("rope_scaling", {"rope_type": "yarn", "factor": math.inf}, "factor .* must be a finite"),
    ("rope_scaling", {"rope_type": "yarn", "factor": -2.0}, "factor must be positive"),
  ],
)
def test_nonsense_is_named(key, value, message):
  with pytest.raises(ValueError, match=message):
    from_hugging_face({"model_type": "mixtral", key: value})
