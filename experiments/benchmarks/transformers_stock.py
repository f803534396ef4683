"""A roster in Hugging Face transformers as a user would first write it.

The modules of transformers are unchanged. Noise is patched into the routers, the prompt runs
once, and the members are sequences of the batch, each with a copy of the prompt's cache. After
each step the clean member's new key and value replace those of the others (Clean Cache).

Needs torch and transformers 5. Axis letters are those of roe_jax.
"""

from collections.abc import Callable, Sequence
import math
import types
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
import transformers

from roe_jax import families
from roe_jax.config import ModelConfig
from roe_jax.params import AttentionParams, Params

EXPERTS = ("eager", "grouped_mm", "batched_mm")
CACHES = ("static", "dynamic")


def build(
  config: ModelConfig, dtype: str = "float32", device: str = "cpu"
) -> transformers.PreTrainedModel:
  """Returns a model of this shape on the device, with uninitialized weights."""
  values = families.to_hugging_face(config)
  values = {
    k: v for k, v in values.items() if k not in ("model_type", "architectures", "torch_dtype")
  }
  kind = {"olmoe": transformers.OlmoeConfig, "mixtral": transformers.MixtralConfig}[config.family]
  hf_config = kind(**values, attn_implementation="sdpa")
  with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=getattr(torch, dtype))
  model.to_empty(device=device)
  # The rotary frequencies are not weights: to_empty leaves them uninitialized.
  model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
  return model.eval()


@torch.inference_mode()
def copy_params(params: Params, model: transformers.PreTrainedModel) -> None:
  """Copies roe_jax's weights into a model of the same shape, one array at a time."""
  targets = dict(model.named_parameters())

  def put(name, array):
    array = np.array(array)  # torch needs a writable copy
    if array.dtype.itemsize == 2:  # bfloat16, or its bits
      source = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
      source = torch.from_numpy(array)
    target = targets.pop(name)
    target.copy_(source.reshape(target.shape))

  put("model.embed_tokens.weight", params.embedding)
  put("model.norm.weight", params.final_norm)
  put("lm_head.weight", params.unembedding)
  layers, attention = params.layers, params.layers.attention
  assert isinstance(attention, AttentionParams)
  for l in range(layers.router.shape[0]):
    block = f"model.layers.{l}."
    put(block + "input_layernorm.weight", layers.attention_norm[l])
    put(block + "post_attention_layernorm.weight", layers.moe_norm[l])
    put(block + "self_attn.q_proj.weight", attention.query[l])
    put(block + "self_attn.k_proj.weight", attention.key[l])
    put(block + "self_attn.v_proj.weight", attention.value[l])
    output = attention.output[l]
    put(block + "self_attn.o_proj.weight", output.reshape(-1, output.shape[-1]).T)
    if attention.query_norm is not None:
      put(block + "self_attn.q_norm.weight", attention.query_norm[l])
      put(block + "self_attn.k_norm.weight", attention.key_norm[l])
    put(block + "mlp.gate.weight", layers.router[l])
    put(block + "mlp.experts.gate_up_proj", layers.experts.gate_up[l].swapaxes(1, 2))
    put(block + "mlp.experts.down_proj", layers.experts.down[l].swapaxes(1, 2))
  if targets:
    raise ValueError(f"roe_jax has no weights for {', '.join(targets)} of this model")


def route(self, hidden_states):
  """Forward function of a router whose choice is noisy and whose gates are clean.

  `self.noise` is `[B·R, E]` float32, or None for the router of transformers.
  """
  if self.noise is None:
    return type(self).forward(self, hidden_states)
  logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
  probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
  chosen = torch.topk(logits + self.noise, self.top_k, dim=-1).indices
  gates = probabilities.gather(-1, chosen)
  # Mixtral has no such setting: it always normalizes, and keeps float32 gates.
  if getattr(self, "norm_topk_prob", True):
    gates = gates / gates.sum(dim=-1, keepdim=True)
  if hasattr(self, "norm_topk_prob"):
    gates = gates.to(logits.dtype)
  return logits, gates, chosen


class StockRoster:
  """A roster over sequences of equal length, with mean probability and clean gates.

  It patches the model's routers.

  Attributes:
    length: number of positions in the cache; may be set back after a step.
    experts: implementation for decode steps, one of `EXPERTS`; may be changed at any time.
  """

  def __init__(
    self,
    model: transformers.PreTrainedModel,
    num_members: int,
    temperatures: float | Sequence[float],
    *,
    batch_size: int = 1,
    capacity: int = 2048,
    experts: str = "grouped_mm",
    cache: str = "static",
    seed: int = 0,
    draw: Callable[[int], torch.Tensor] | None = None,
  ):
    """Sets the model up.

    Args:
      model: an OLMoE or Mixtral model.
      num_members: n; member 0 is noise-free.
      temperatures: τ, one number or one for each layer.
      batch_size: B, sequences decoded together.
      capacity: positions of a static cache, all of which are read in each step.
      experts: see the class.
      cache: "static" writes into arrays of the capacity, "dynamic" allocates longer ones in
        each step.
      seed: seed for torch's default generator.
      draw: returns the noise of a position times τ, `[L, B, R, E]`; torch's noise by default.
    """
    if cache not in CACHES:
      raise ValueError(f"unknown cache {cache!r}: choose one of {', '.join(CACHES)}")
    self.model, self.num_members, self.batch_size = model, num_members, batch_size
    self.experts, self.capacity = experts, capacity
    self.length, self._kind, self._draw = 0, cache, draw
    self._cache: Any = None  # of transformers, whose kinds of caches share no interface
    self._temperatures = np.broadcast_to(
      np.asarray(temperatures, np.float32), model.config.num_hidden_layers
    )
    torch.manual_seed(seed)
    for layer in model.model.layers:
      gate = layer.mlp.gate
      gate.noise, gate.forward = None, types.MethodType(route, gate)

  def _hidden(self, tokens, cache, start, experts):
    """Hidden states after the last norm, of tokens from position `start`."""
    if self.model.config._experts_implementation != experts:
      self.model.set_experts_implementation(experts)
    positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
    return self.model.model(
      input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state

  @torch.inference_mode()
  def prefill(self, tokens_BxT: torch.Tensor) -> torch.Tensor:
    """Runs the sequences once and gives each member a copy of the cache; `[B, T, D]`."""
    once: Any = transformers.DynamicCache(config=self.model.config)
    x = self._hidden(tokens_BxT, once, 0, "grouped_mm")
    self.length = tokens_BxT.shape[1]
    if self._kind == "dynamic":
      once.batch_repeat_interleave(self.num_members)
      self._cache = once
      return x
    self._cache = transformers.StaticCache(config=self.model.config, max_cache_len=self.capacity)
    for l, layer in enumerate(once.layers):
      self._cache.update(
        *(a.repeat_interleave(self.num_members, dim=0) for a in (layer.keys, layer.values)),
        layer_idx=l,
      )
    return x

  def _set_length(self):
    """Makes the cache end at `length`."""
    if self._kind == "dynamic":
      surplus = self._cache.get_seq_length() - self.length
      if surplus:
        self._cache.crop(-surplus)
    else:
      for layer in self._cache.layers:
        layer.cumulative_length.fill_(self.length)

  def _set_noise(self):
    """Sets the routers' noise for one step."""
    drawn = self._draw(self.length) if self._draw else None
    for l, (layer, temperature) in enumerate(zip(self.model.model.layers, self._temperatures)):
      gate = layer.mlp.gate
      if temperature == 0 or self.num_members == 1:
        continue
      if drawn is None:
        shape = (self.batch_size, self.num_members, gate.num_experts)
        # Minus the logarithm of an exponential variable is a Gumbel variable.
        noise = torch.empty(shape, device=self.model.device).exponential_().log_()
        noise *= -float(temperature)
      else:
        noise = drawn[l]
      noise[:, 0] = 0.0
      gate.noise = noise.reshape(-1, gate.num_experts)

  def _share(self):
    """Gives all members the clean member's new key and value."""
    for layer in self._cache.layers:
      for array in (layer.keys, layer.values):
        new = array.unflatten(0, (self.batch_size, self.num_members))[..., self.length, :]
        new[:, 1:] = new[:, :1].clone()

  @torch.inference_mode()
  def step(self, tokens_B: torch.Tensor) -> torch.Tensor:
    """Returns log-probabilities `[B, V]` float32 of the next token and extends the cache."""
    if self._kind == "static" and self.length >= self.capacity:
      raise ValueError(f"the cache is full: its capacity is {self.capacity} positions")
    self._set_length()
    self._set_noise()
    try:
      tokens = tokens_B.repeat_interleave(self.num_members)[:, None]
      x = self._hidden(tokens, self._cache, self.length, self.experts)
    finally:
      for layer in self.model.model.layers:
        layer.mlp.gate.noise = None
    if self.num_members > 1:
      self._share()
    self.length += 1
    log_probs = torch.log_softmax(self.model.lm_head(x[:, -1]), dim=-1, dtype=torch.float32)
    members = log_probs.unflatten(0, (self.batch_size, self.num_members))
    return torch.logsumexp(members, dim=1) - math.log(self.num_members)
