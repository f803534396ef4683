"""Random checkpoints in the form that transformers 5 holds in memory.

Weights are numpy arrays by tensor name, made from a seed, so that the same
model can be built in transformers (`to_model`) and here (`to_params`). Only
`to_model` needs torch and transformers.
"""

import functools

import jax.numpy as jnp
import numpy as np

from roe_jax.params import (
  AttentionParams,
  ExpertParams,
  LatentAttentionParams,
  LayerParams,
  Params,
  SharedExpertParams,
)

SMALL = dict(
  vocab_size=48,
  hidden_size=32,
  intermediate_size=16,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
  rms_norm_eps=1e-5,
  rope_theta=10000.0,
  hidden_act="silu",
  tie_word_embeddings=False,
  pad_token_id=0,
  bos_token_id=1,
  eos_token_id=2,
)


# What each family's config.json says beyond that; the keys are those of the hub.
# Windows, original contexts and limits are such that the tests go beyond them.
SPECIFIC = {
  "olmoe": dict(
    num_experts=8, num_experts_per_tok=3, norm_topk_prob=False, clip_qkv=None, attention_bias=False
  ),
  "mixtral": dict(num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
  "gpt_oss": dict(
    num_local_experts=8,
    num_experts_per_tok=3,
    head_dim=8,
    attention_bias=True,
    sliding_window=5,
    swiglu_limit=1.5,
    rope_theta=150000.0,
    rope_scaling=dict(
      rope_type="yarn",
      factor=32.0,
      original_max_position_embeddings=8,
      beta_fast=32.0,
      beta_slow=1.0,
      truncate=False,
    ),
  ),
  "qwen2_moe": dict(
    num_experts=8,
    num_experts_per_tok=3,
    norm_topk_prob=False,
    intermediate_size=24,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=20,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    use_sliding_window=False,
    sliding_window=4,
    max_window_layers=1,
  ),
  "qwen3_moe": dict(
    num_experts=8,
    num_experts_per_tok=3,
    norm_topk_prob=True,
    intermediate_size=24,
    moe_intermediate_size=16,
    head_dim=12,
    attention_bias=False,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    use_sliding_window=False,
    sliding_window=4,
    max_window_layers=1,
  ),
}
SPECIFIC["llama"] = dict(attention_bias=False, mlp_bias=False)
SPECIFIC["mistral"] = dict(sliding_window=None)
SPECIFIC["qwen2"] = dict(use_sliding_window=False, sliding_window=4, max_window_layers=1)
SPECIFIC["qwen3"] = SPECIFIC["qwen2"] | dict(head_dim=12, attention_bias=False)
SPECIFIC["granitemoe"] = dict(
  num_local_experts=8,
  num_experts_per_tok=3,
  attention_bias=False,
  embedding_multiplier=3.0,
  attention_multiplier=0.3,
  residual_multiplier=0.7,
  logits_scaling=2.5,
)
SPECIFIC["granitemoeshared"] = SPECIFIC["granitemoe"] | dict(shared_intermediate_size=20)
SPECIFIC["glm4_moe"] = dict(
  num_hidden_layers=3,
  first_k_dense_replace=1,
  intermediate_size=24,
  moe_intermediate_size=16,
  n_routed_experts=8,
  num_experts_per_tok=3,
  n_shared_experts=1,
  n_group=4,
  topk_group=2,
  norm_topk_prob=True,
  routed_scaling_factor=2.5,
  head_dim=12,
  partial_rotary_factor=0.5,
  use_qk_norm=True,
  attention_bias=True,
)
SPECIFIC["dots1"] = {
  k: v for k, v in SPECIFIC["glm4_moe"].items() if k not in ("partial_rotary_factor", "use_qk_norm")
} | dict(n_shared_experts=2, n_group=2, topk_group=1, sliding_window=5, max_window_layers=2)
_LATENT = dict(
  num_key_value_heads=4,
  kv_lora_rank=10,
  qk_nope_head_dim=6,
  qk_rope_head_dim=4,
  v_head_dim=7,
  # Moonlight's norms of latents keep an epsilon of their own.
  rms_norm_eps=1e-3,
  rope_scaling=dict(
    rope_type="yarn",
    factor=40.0,
    original_max_position_embeddings=8,
    beta_fast=32,
    beta_slow=1,
    mscale=0.9,
    mscale_all_dim=0.707,
  ),
)
SPECIFIC["deepseek_v3"] = (
  {
    k: v
    for k, v in SPECIFIC["glm4_moe"].items()
    if k not in ("partial_rotary_factor", "use_qk_norm", "head_dim", "attention_bias")
  }
  | _LATENT
  | dict(q_lora_rank=9)
)
SPECIFIC["deepseek_v2"] = {
  k: v
  for k, v in SPECIFIC["deepseek_v3"].items()
  if k not in ("n_group", "topk_group", "norm_topk_prob")
} | dict(q_lora_rank=None, n_shared_experts=2, topk_method="greedy")
# One of two stands for both.
FAMILIES = tuple(family for family in SPECIFIC if family not in ("dots1", "deepseek_v2"))
# Not in transformers: its other tests are in test_families.
SPECIFIC["emo"] = dict(
  num_experts=9, num_experts_per_tok=3, num_shared_experts=1, norm_topk_prob=False
)
SPECIFIC["bailing_moe_v2"] = {
  k: v
  for k, v in SPECIFIC["glm4_moe"].items()
  if k not in ("n_routed_experts", "n_shared_experts", "attention_bias")
} | dict(num_experts=8, num_shared_experts=1, use_qkv_bias=True, use_bias=False)
DENSE = ("llama", "mistral", "qwen2", "qwen3")
# Sigmoid routers after a dense layer.
SIGMOID = ("glm4_moe", "dots1", "deepseek_v3")
LATENT = ("deepseek_v2", "deepseek_v3")
ROUTED = tuple(family for family in FAMILIES if family not in (*DENSE, *SIGMOID))
# Its classes in transformers begin with this.
PREFIX = {
  "olmoe": "Olmoe",
  "mixtral": "Mixtral",
  "gpt_oss": "GptOss",
  "qwen2_moe": "Qwen2Moe",
  "qwen3_moe": "Qwen3Moe",
  "granitemoe": "GraniteMoe",
  "granitemoeshared": "GraniteMoeShared",
  "llama": "Llama",
  "mistral": "Mistral",
  "qwen2": "Qwen2",
  "qwen3": "Qwen3",
  "glm4_moe": "Glm4Moe",
  "dots1": "Dots1",
  "deepseek_v2": "DeepseekV2",
  "deepseek_v3": "DeepseekV3",
}
# Where hub files have the experts one by one: the block, and gate, up and down.
HUB_EXPERTS = {
  "olmoe": ("mlp", "gate_proj", "up_proj", "down_proj"),
  "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
  "qwen2_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
  "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
  "glm4_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
  "dots1": ("mlp", "gate_proj", "up_proj", "down_proj"),
  "deepseek_v2": ("mlp", "gate_proj", "up_proj", "down_proj"),
  "deepseek_v3": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def config_json(family, **changes):
  """The contents of a small model's config.json."""
  return SMALL | {"model_type": family} | SPECIFIC[family] | changes


def _sizes(hf):
  heads = hf["num_attention_heads"]
  return dict(
    layers=hf["num_hidden_layers"],
    d=hf["hidden_size"],
    f=hf.get("moe_intermediate_size") or hf["intermediate_size"],
    g=hf.get("shared_expert_intermediate_size")
    or hf.get("shared_intermediate_size")
    or hf.get("n_shared_experts", 0) * hf.get("moe_intermediate_size", 0),
    first=hf.get("first_k_dense_replace", 0),
    p=hf["intermediate_size"],
    v=hf["vocab_size"],
    h=heads,
    k=hf["num_key_value_heads"],
    c=hf.get("head_dim") or hf["hidden_size"] // heads,
    e=hf.get("num_experts") or hf.get("n_routed_experts") or hf.get("num_local_experts", 1),
  )


def random_state(hf, seed=0, scale=0.3):
  """Float32 weights by name; norms in [0.5, 1.5]."""
  # RandomState, because its streams are the same in all versions of numpy.
  random = np.random.RandomState(seed)
  n = _sizes(hf)
  shapes = {
    "model.embed_tokens.weight": (n["v"], n["d"]),
    "model.norm.weight": (n["d"],),
    "lm_head.weight": (n["v"], n["d"]),
  }
  for layer in range(n["layers"]):
    block = {
      "input_layernorm.weight": (n["d"],),
      "post_attention_layernorm.weight": (n["d"],),
      "self_attn.q_proj.weight": (n["h"] * n["c"], n["d"]),
      "self_attn.k_proj.weight": (n["k"] * n["c"], n["d"]),
      "self_attn.v_proj.weight": (n["k"] * n["c"], n["d"]),
      "self_attn.o_proj.weight": (n["d"], n["h"] * n["c"]),
      "mlp.gate.weight": (n["e"], n["d"]),
      "mlp.experts.gate_up_proj": (n["e"], 2 * n["f"], n["d"]),
      "mlp.experts.down_proj": (n["e"], n["d"], n["f"]),
    }
    attention_biases = {
      "self_attn.q_proj.bias": (n["h"] * n["c"],),
      "self_attn.k_proj.bias": (n["k"] * n["c"],),
      "self_attn.v_proj.bias": (n["k"] * n["c"],),
    }
    if hf["model_type"] in DENSE:
      for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        del block["mlp." + name]
      block |= {
        "mlp.gate_proj.weight": (n["f"], n["d"]),
        "mlp.up_proj.weight": (n["f"], n["d"]),
        "mlp.down_proj.weight": (n["d"], n["f"]),
      }
      if hf.get("mlp_bias"):
        biases = {name: shape[:1] for name, shape in block.items() if name.startswith("mlp.")}
        block |= {name.replace("weight", "bias"): shape for name, shape in biases.items()}
      if hf.get("attention_bias"):
        block |= attention_biases | {"self_attn.o_proj.bias": (n["d"],)}
    if hf["model_type"] in LATENT:
      block = {name: shape for name, shape in block.items() if "self_attn" not in name}
      block |= _latent_shapes(hf, n)
    norms_per_head = {"self_attn.q_norm.weight": (n["c"],), "self_attn.k_norm.weight": (n["c"],)}
    block |= {
      "llama": {},
      "mistral": {},
      "qwen2": attention_biases,
      "qwen3": norms_per_head,
      "olmoe": {
        "self_attn.q_norm.weight": (n["h"] * n["c"],),
        "self_attn.k_norm.weight": (n["k"] * n["c"],),
      },
      "mixtral": {},
      "gpt_oss": {
        **attention_biases,
        "self_attn.o_proj.bias": (n["d"],),
        "self_attn.sinks": (n["h"],),
        "mlp.router.weight": (n["e"], n["d"]),
        "mlp.router.bias": (n["e"],),
        "mlp.experts.gate_up_proj": (n["e"], n["d"], 2 * n["f"]),
        "mlp.experts.gate_up_proj_bias": (n["e"], 2 * n["f"]),
        "mlp.experts.down_proj": (n["e"], n["f"], n["d"]),
        "mlp.experts.down_proj_bias": (n["e"], n["d"]),
      },
      "qwen2_moe": {
        **attention_biases,
        "mlp.shared_expert.gate_proj.weight": (n["g"], n["d"]),
        "mlp.shared_expert.up_proj.weight": (n["g"], n["d"]),
        "mlp.shared_expert.down_proj.weight": (n["d"], n["g"]),
        "mlp.shared_expert_gate.weight": (1, n["d"]),
      },
      "qwen3_moe": norms_per_head,
      "granitemoe": attention_biases | {"self_attn.o_proj.bias": (n["d"],)}
      if hf.get("attention_bias")
      else {},
      "glm4_moe": {
        **(norms_per_head if hf.get("use_qk_norm") else {}),
        **attention_biases,
        "mlp.gate.e_score_correction_bias": (n["e"],),
      },
      "dots1": {
        **norms_per_head,
        **attention_biases,
        "self_attn.o_proj.bias": (n["d"],),
        "mlp.gate.e_score_correction_bias": (n["e"],),
      },
      "deepseek_v2": {},
      "deepseek_v3": {"mlp.gate.e_score_correction_bias": (n["e"],)},
      "granitemoeshared": {
        "shared_mlp.input_linear.weight": (2 * n["g"], n["d"]),
        "shared_mlp.output_linear.weight": (n["d"], n["g"]),
      }
      if n["g"]
      else {},
    }[hf["model_type"]]
    if hf["model_type"] in (*SIGMOID, *LATENT):
      for name in ("gate_proj", "up_proj", "down_proj"):
        shape = (n["g"], n["d"]) if name != "down_proj" else (n["d"], n["g"])
        block[f"mlp.shared_experts.{name}.weight"] = shape
    if layer < n["first"]:
      block = {name: shape for name, shape in block.items() if not name.startswith("mlp.")} | {
        "mlp.gate_proj.weight": (n["p"], n["d"]),
        "mlp.up_proj.weight": (n["p"], n["d"]),
        "mlp.down_proj.weight": (n["d"], n["p"]),
      }
    if hf["model_type"] == "gpt_oss":
      del block["mlp.gate.weight"]
    if hf["model_type"].startswith("granite"):
      block["mlp.router.weight"] = block.pop("mlp.gate.weight")
      block = {
        name.replace("mlp.", "block_sparse_moe.", name.startswith("mlp.")): shape
        for name, shape in block.items()
      }
    if not hf.get("qkv_bias", True):
      block = {name: shape for name, shape in block.items() if not name.endswith("bias")}
    shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
  return {
    name: (
      random.uniform(0.5, 1.5, shape) if "norm" in name else scale * random.standard_normal(shape)
    ).astype(np.float32)
    for name, shape in shapes.items()
  }


def _latent_shapes(hf, n):
  """The weights of multi-head latent attention."""
  h, q, z, r = n["h"], hf["q_lora_rank"], hf["kv_lora_rank"], hf["qk_rope_head_dim"]
  c = hf["qk_nope_head_dim"] + r
  shapes = {
    "q_proj.weight": (h * c, n["d"]),
    "kv_a_proj_with_mqa.weight": (z + r, n["d"]),
    "kv_a_layernorm.weight": (z,),
    "kv_b_proj.weight": (h * (c - r + hf["v_head_dim"]), z),
    "o_proj.weight": (n["d"], h * hf["v_head_dim"]),
  }
  if q:
    del shapes["q_proj.weight"]
    shapes |= {
      "q_a_proj.weight": (q, n["d"]),
      "q_a_layernorm.weight": (q,),
      "q_b_proj.weight": (h * c, q),
    }
  return {"self_attn." + name: shape for name, shape in shapes.items()}


def hub_state(hf, state):
  """The weights under the names and in the shapes of the hub's files."""
  if hf["model_type"].startswith("granite"):
    names = {
      "experts.gate_up_proj": "input_linear.weight",
      "experts.down_proj": "output_linear.weight",
      "router.weight": "router.layer.weight",
    }
    return {
      functools.reduce(lambda name, pair: name.replace(*pair), names.items(), name): weight
      for name, weight in state.items()
    }
  if hf["model_type"] not in HUB_EXPERTS:
    return state
  block, gate, up, down = HUB_EXPERTS[hf["model_type"]]
  hub = {}
  for name, weight in state.items():
    name = name.replace(".mlp.gate.", f".{block}.gate.")
    prefix = name.rsplit(".mlp.", 1)[0]
    if name.endswith("experts.gate_up_proj"):
      for expert, both in enumerate(weight):
        for kind, half in zip((gate, up), np.split(both, 2)):
          hub[f"{prefix}.{block}.experts.{expert}.{kind}.weight"] = half.copy()
    elif name.endswith("experts.down_proj"):
      for expert, matrix in enumerate(weight):
        hub[f"{prefix}.{block}.experts.{expert}.{down}.weight"] = matrix
    else:
      hub[name] = weight
  return hub


def to_params(hf, state, dtype="float32"):
  """The weights as this library's parameters."""
  n = _sizes(hf)
  layers = range(n["first"], n["layers"])

  def stacked(name, reshape=lambda w: w, dtype=dtype):
    return jnp.asarray(
      np.stack([reshape(state[f"model.layers.{layer}.{name}"]) for layer in layers]), dtype
    )

  if hf["model_type"].startswith("granite"):
    state = {name.replace("block_sparse_moe.", "mlp."): w for name, w in state.items()}

  def by_head(heads):
    return lambda w: w.reshape(heads, n["c"], n["d"])

  def if_any(name, reshape=lambda w: w):
    return stacked(name, reshape) if f"model.layers.{n['layers'] - 1}.{name}" in state else None

  def by_head_if_any(name, heads):
    return if_any(name, lambda w: w.reshape((heads, n["c"]) if w.size > n["c"] else n["c"]))

  if hf["model_type"] == "gpt_oss":
    experts = ExpertParams(
      # Gate and up projection alternate.
      gate_up=stacked(
        "mlp.experts.gate_up_proj", lambda w: w.swapaxes(1, 2).reshape(n["e"], n["f"], 2, n["d"])
      ),
      down=stacked("mlp.experts.down_proj"),
      gate_up_bias=stacked("mlp.experts.gate_up_proj_bias", lambda w: w.reshape(n["e"], n["f"], 2)),
      down_bias=stacked("mlp.experts.down_proj_bias"),
    )
  elif hf["model_type"] in DENSE:

    def pair(name):
      return jnp.stack([stacked(f"mlp.{p}_proj.{name}") for p in ("gate", "up")], axis=2)[:, None]

    biased = hf.get("mlp_bias")
    experts = ExpertParams(
      gate_up=pair("weight"),
      down=stacked("mlp.down_proj.weight", lambda w: w.T[None]),
      gate_up_bias=pair("bias") if biased else None,
      down_bias=stacked("mlp.down_proj.bias", lambda w: w[None]) if biased else None,
    )
  else:
    experts = ExpertParams(
      # The gate projection's rows come first.
      gate_up=stacked(
        "mlp.experts.gate_up_proj", lambda w: w.reshape(n["e"], 2, n["f"], n["d"]).swapaxes(1, 2)
      ),
      down=stacked("mlp.experts.down_proj", lambda w: w.transpose(0, 2, 1)),
    )

  def every_token(block):
    return SharedExpertParams(
      gate_up=jnp.stack([stacked(f"{block}{name}_proj.weight") for name in ("gate", "up")], axis=2),
      down=stacked(block + "down_proj.weight", lambda w: w.T),
    )

  shared = None
  if n["g"] and hf["model_type"] == "granitemoeshared":
    shared = SharedExpertParams(
      gate_up=stacked(
        "shared_mlp.input_linear.weight", lambda w: w.reshape(2, n["g"], n["d"]).swapaxes(0, 1)
      ),
      down=stacked("shared_mlp.output_linear.weight", lambda w: w.T),
    )
  elif n["g"]:
    of_sigmoid = hf["model_type"] in (*SIGMOID, *LATENT)
    shared = every_token("mlp.shared_experts." if of_sigmoid else "mlp.shared_expert.")
    if not of_sigmoid:
      shared = shared.replace(gate=stacked("mlp.shared_expert_gate.weight"))
  is_named_router = hf["model_type"] in ("gpt_oss", "granitemoe", "granitemoeshared")
  router = "mlp.router" if is_named_router else "mlp.gate"

  def latent_attention():
    a, plain = "self_attn.", hf["qk_nope_head_dim"]

    def of_heads(weight):
      return weight.reshape(n["h"], -1, weight.shape[-1])

    return LatentAttentionParams(
      query=stacked(a + ("q_b_proj.weight" if hf["q_lora_rank"] else "q_proj.weight"), of_heads),
      key_down=stacked(a + "kv_a_proj_with_mqa.weight"),
      key_norm=stacked(a + "kv_a_layernorm.weight"),
      key_up=stacked(a + "kv_b_proj.weight", lambda w: of_heads(w)[:, :plain]),
      value_up=stacked(a + "kv_b_proj.weight", lambda w: of_heads(w)[:, plain:]),
      output=stacked(a + "o_proj.weight", lambda w: of_heads(w.T)),
      query_down=if_any(a + "q_a_proj.weight"),
      query_norm=if_any(a + "q_a_layernorm.weight"),
    )

  def blocks(**parts):
    return LayerParams(
      attention_norm=stacked("input_layernorm.weight"),
      attention=latent_attention()
      if hf["model_type"] in LATENT
      else AttentionParams(
        query=stacked("self_attn.q_proj.weight", by_head(n["h"])),
        key=stacked("self_attn.k_proj.weight", by_head(n["k"])),
        value=stacked("self_attn.v_proj.weight", by_head(n["k"])),
        output=stacked("self_attn.o_proj.weight", lambda w: w.T.reshape(n["h"], n["c"], n["d"])),
        query_norm=by_head_if_any("self_attn.q_norm.weight", n["h"]),
        key_norm=by_head_if_any("self_attn.k_norm.weight", n["k"]),
        query_bias=by_head_if_any("self_attn.q_proj.bias", n["h"]),
        key_bias=by_head_if_any("self_attn.k_proj.bias", n["k"]),
        value_bias=by_head_if_any("self_attn.v_proj.bias", n["k"]),
        output_bias=if_any("self_attn.o_proj.bias"),
        sinks=if_any("self_attn.sinks"),
      ),
      moe_norm=stacked("post_attention_layernorm.weight"),
      **parts,
    )

  correction = "mlp.gate.e_score_correction_bias"
  routed = blocks(
    router=if_any(router + ".weight"),
    router_bias=if_any(router + ".bias"),
    correction_bias=stacked(correction, dtype="float32") if hf["model_type"] in SIGMOID else None,
    experts=experts,
    shared_expert=shared,
  )
  layers = range(n["first"])
  return Params(
    embedding=jnp.asarray(state["model.embed_tokens.weight"], dtype),
    layers=routed,
    final_norm=jnp.asarray(state["model.norm.weight"], dtype),
    unembedding=jnp.asarray(state["lm_head.weight"], dtype),
    dense_layers=blocks(experts=None, shared_expert=every_token("mlp.")) if layers else None,
  )


def to_model(hf, state, dtype="float32"):
  """The weights in a transformers model with eager attention and experts."""
  import torch
  import transformers

  values = {k: v for k, v in hf.items() if k != "model_type"}
  prefix = PREFIX[hf["model_type"]]
  config = getattr(transformers, prefix + "Config")(**values)
  config._attn_implementation = "eager"
  config._experts_implementation = "eager"
  model = getattr(transformers, prefix + "ForCausalLM")(config)
  # Strict: every name and shape is the one that transformers has.
  model.load_state_dict({name: torch.tensor(w) for name, w in state.items()}, strict=True)
  return model.to(getattr(torch, dtype)).eval()


def logits(model, tokens, mask=None):
  """Logits as float32 numpy."""
  import torch

  with torch.no_grad():
    mask = None if mask is None else torch.tensor(mask)
    return model(torch.tensor(tokens), attention_mask=mask).logits.float().numpy()
