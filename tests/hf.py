"""Random checkpoints in the form that transformers 5 holds in memory.

Weights are numpy arrays by tensor name, made from a seed, so that the same
model can be built in transformers (`to_model`) and here (`to_params`). Only
`to_model` needs torch and transformers.
"""

import jax.numpy as jnp
import numpy as np

from roe_jax.params import AttentionParams, ExpertParams, LayerParams, Params

SMALL = dict(
    vocab_size=48, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu",
    tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def config_json(family, **changes):
  """The contents of a small model's config.json."""
  if family == "olmoe":
    specific = dict(num_experts=8, num_experts_per_tok=3, norm_topk_prob=False,
                    clip_qkv=None, attention_bias=False)
  else:
    specific = dict(num_local_experts=8, num_experts_per_tok=2, sliding_window=None)
  return SMALL | {"model_type": family} | specific | changes


def _sizes(hf):
  heads = hf["num_attention_heads"]
  return dict(
      layers=hf["num_hidden_layers"], d=hf["hidden_size"], f=hf["intermediate_size"],
      v=hf["vocab_size"], h=heads, k=hf["num_key_value_heads"],
      c=hf.get("head_dim") or hf["hidden_size"] // heads,
      e=hf.get("num_experts") or hf["num_local_experts"])


def random_state(hf, seed=0, scale=0.3):
  """Float32 weights by name; norms in [0.5, 1.5]."""
  # RandomState, because its streams are the same in all versions of numpy.
  random = np.random.RandomState(seed)
  n = _sizes(hf)
  shapes = {"model.embed_tokens.weight": (n["v"], n["d"]), "model.norm.weight": (n["d"],),
            "lm_head.weight": (n["v"], n["d"])}
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
    if hf["model_type"] == "olmoe":
      block |= {"self_attn.q_norm.weight": (n["h"] * n["c"],),
                "self_attn.k_norm.weight": (n["k"] * n["c"],)}
    shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
  return {
      name: (random.uniform(0.5, 1.5, shape) if len(shape) == 1
             else scale * random.standard_normal(shape)).astype(np.float32)
      for name, shape in shapes.items()}


def to_params(hf, state, dtype="float32"):
  """The weights as this library's parameters."""
  n = _sizes(hf)

  def stacked(name, reshape=lambda w: w):
    return jnp.asarray(np.stack([
        reshape(state[f"model.layers.{layer}.{name}"]) for layer in range(n["layers"])]), dtype)

  def by_head(heads):
    return lambda w: w.reshape(heads, n["c"], n["d"])

  norms = {}
  if hf["model_type"] == "olmoe":
    norms = dict(
        query_norm=stacked("self_attn.q_norm.weight", lambda w: w.reshape(n["h"], n["c"])),
        key_norm=stacked("self_attn.k_norm.weight", lambda w: w.reshape(n["k"], n["c"])))
  return Params(
      embedding=jnp.asarray(state["model.embed_tokens.weight"], dtype),
      layers=LayerParams(
          attention_norm=stacked("input_layernorm.weight"),
          attention=AttentionParams(
              query=stacked("self_attn.q_proj.weight", by_head(n["h"])),
              key=stacked("self_attn.k_proj.weight", by_head(n["k"])),
              value=stacked("self_attn.v_proj.weight", by_head(n["k"])),
              output=stacked("self_attn.o_proj.weight",
                             lambda w: w.T.reshape(n["h"], n["c"], n["d"])),
              **norms),
          moe_norm=stacked("post_attention_layernorm.weight"),
          router=stacked("mlp.gate.weight"),
          experts=ExpertParams(
              # The gate projection's rows come first.
              gate_up=stacked("mlp.experts.gate_up_proj",
                              lambda w: w.reshape(n["e"], 2, n["f"], n["d"]).swapaxes(1, 2)),
              down=stacked("mlp.experts.down_proj", lambda w: w.transpose(0, 2, 1)))),
      final_norm=jnp.asarray(state["model.norm.weight"], dtype),
      unembedding=jnp.asarray(state["lm_head.weight"], dtype))


def to_model(hf, state, dtype="float32"):
  """The weights in a transformers model with eager attention and experts."""
  import torch
  import transformers

  values = {k: v for k, v in hf.items() if k != "model_type"}
  kinds = {"olmoe": (transformers.OlmoeConfig, transformers.OlmoeForCausalLM),
           "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM)}
  make_config, make_model = kinds[hf["model_type"]]
  config = make_config(**values)
  config._attn_implementation = "eager"
  config._experts_implementation = "eager"
  model = make_model(config)
  # Strict: every name and shape is the one that transformers has.
  model.load_state_dict({name: torch.tensor(w) for name, w in state.items()}, strict=True)
  return model.to(getattr(torch, dtype)).eval()


def logits(model, tokens, mask=None):
  """Logits as float32 numpy."""
  import torch
  with torch.no_grad():
    mask = None if mask is None else torch.tensor(mask)
    return model(torch.tensor(tokens), attention_mask=mask).logits.float().numpy()
