"""A roster in Hugging Face transformers as one would first write it.

The modules of transformers as they are. Noise is patched into the routers, the
prompt runs once, and the members are rows of the batch, each with a copy of the
prompt's cache; after each step the clean member's new key and value replace
those of the others (Clean Cache). `experiments.benchmarks.transformers_roster` is the
same roster with all that can be gained around the modules.

Needs torch and transformers 5. Axis letters are those of roe_jax.
"""

from collections.abc import Callable, Sequence
import copy
import math
import types

import numpy as np
import torch
import transformers

from experiments.benchmarks import transformers_roster
from roe_jax.params import Params

# Those of transformers alone.
EXPERTS = ("eager", "grouped_mm", "batched_mm")
CACHES = ("static", "dynamic")


def twin(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
  """Another model with the same weights in the same memory.

  For what patches modules, which it does to its own model then.
  """
  return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@torch.inference_mode()
def copy_params(params: Params, model: transformers.PreTrainedModel) -> None:
  """Copies roe_jax's weights into a model of the same shape, array by array."""
  targets = dict(model.named_parameters())

  def put(name, array):
    array = np.array(array)  # a copy: torch wants none that cannot be written
    if array.dtype.itemsize == 2:  # bfloat16, or its bits
      source = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
      source = torch.from_numpy(array)
    target = targets.pop(name)
    target.copy_(source.reshape(target.shape))

  put("model.embed_tokens.weight", params.embedding)
  put("model.norm.weight", params.final_norm)
  put("lm_head.weight", params.unembedding)
  layers = params.layers
  for l in range(layers.router.shape[0]):
    block, attention = f"model.layers.{l}.", layers.attention
    put(block + "input_layernorm.weight", layers.attention_norm[l])
    put(block + "post_attention_layernorm.weight", layers.moe_norm[l])
    for name, weight in (
      ("q_proj", attention.query),
      ("k_proj", attention.key),
      ("v_proj", attention.value),
    ):
      put(f"{block}self_attn.{name}.weight", weight[l])
    output = attention.output[l]
    put(block + "self_attn.o_proj.weight", output.reshape(-1, output.shape[-1]).T)
    if attention.query_norm is not None:
      put(block + "self_attn.q_norm.weight", attention.query_norm[l])
      put(block + "self_attn.k_norm.weight", attention.key_norm[l])
    put(block + "mlp.gate.weight", layers.router[l])
    put(block + "mlp.experts.gate_up_proj", layers.experts.gate_up[l].swapaxes(1, 2))
    put(block + "mlp.experts.down_proj", layers.experts.down[l].swapaxes(1, 2))
  if targets:
    raise ValueError(f"roe_jax has no weights for {', '.join(targets)}")


class StockRoster:
  """A roster over texts of equal length, with mean probability and clean gates.

  It patches the model's routers. `TransformersRoster` has the same methods.

  Attributes:
    length: number of positions in the cache; may be set back after a step.
    experts: implementation for the members' rows, one of `EXPERTS`; may be
      changed at any time.
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
    prefill_experts: str = "grouped_mm",
    seed: int = 0,
    draw: Callable[[Sequence[int], int, int], torch.Tensor] | None = None,
  ):
    """Sets the model up.

    Args:
      model: an OLMoE or Mixtral model.
      num_members: n; member 0 is noise-free.
      temperatures: τ, one number or one for each layer.
      batch_size: B, texts run together.
      capacity: positions that a static cache has room for; it is read whole.
      experts: see the class.
      cache: "static" writes into arrays of the capacity, "dynamic" makes new
        and longer ones in each step.
      prefill_experts: implementation for prefill.
      seed: of torch's default generator.
      draw: see `TransformersRoster`.
    """
    if cache not in CACHES:
      raise ValueError(f"unknown cache {cache!r}; choose one of {', '.join(CACHES)}")
    self.model, self.num_members, self.batch_size = model, num_members, batch_size
    self.experts, self.prefill_experts, self.capacity = experts, prefill_experts, capacity
    self.length, self._kind, self._cache, self._draw = 0, cache, None, draw
    self._temperatures = np.broadcast_to(
      np.asarray(temperatures, np.float32), model.config.num_hidden_layers
    )
    torch.manual_seed(seed)
    for layer in model.model.layers:
      gate = layer.mlp.gate
      gate.noise, gate.forward = None, types.MethodType(transformers_roster.route, gate)

  def _hidden(self, tokens, cache, start, experts):
    """Hidden states after the last norm of rows of tokens from `start` on."""
    if self.model.config._experts_implementation != experts:
      self.model.set_experts_implementation(experts)
    positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
    return self.model.model(
      input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state

  @torch.inference_mode()
  def prefill(self, tokens_BxT: torch.Tensor) -> torch.Tensor:
    """The texts' clean pass, `[B, T, D]`; gives each member a copy of its cache."""
    once = transformers.DynamicCache(config=self.model.config)
    x = self._hidden(tokens_BxT, once, 0, self.prefill_experts)
    self.length = tokens_BxT.shape[1]
    if self._kind == "dynamic":
      once.batch_repeat_interleave(self.num_members)
      self._cache = once
      return x
    self._cache = transformers.StaticCache(config=self.model.config, max_cache_len=self.capacity)
    for l, layer in enumerate(once.layers):
      self._cache.update(
        *(a.repeat_interleave(self.num_members, dim=0) for a in (layer.keys, layer.values)), l
      )
    return x

  def _set_length(self):
    """Makes the cache end where `length` says."""
    if self._kind == "dynamic":
      surplus = self._cache.get_seq_length() - self.length
      if surplus:
        self._cache.crop(-surplus)
    else:
      for layer in self._cache.layers:
        layer.cumulative_length.fill_(self.length)

  def _set_noise(self):
    """Draws the noise of a step, or takes it from `draw`."""
    members, drawn = range(self.num_members), None
    if self._draw is not None:
      drawn = self._draw(members, self.length, 1)
    for l, (layer, temperature) in enumerate(zip(self.model.model.layers, self._temperatures)):
      gate = layer.mlp.gate
      if temperature == 0 or self.num_members == 1:
        continue
      if drawn is None:
        shape = (self.batch_size, self.num_members, gate.num_experts)
        noise = torch.empty(shape, device=self.model.device).exponential_().log_()
        noise *= -float(temperature)
      else:
        noise = drawn[l][:, :, 0]
      noise[:, 0] = 0.0
      gate.noise = noise.reshape(-1, gate.num_experts)

  def _share(self):
    """Gives all members the clean one's new key and value."""
    for layer in self._cache.layers:
      for array in (layer.keys, layer.values):
        new = array.unflatten(0, (self.batch_size, self.num_members))[..., self.length, :]
        new[:, 1:] = new[:, :1].clone()

  @torch.inference_mode()
  def step(self, tokens_B: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[B, V]` float32 of what follows; keeps the clean keys and values."""
    if self._kind == "static" and self.length >= self.capacity:
      raise ValueError(f"the cache is full: it has room for {self.capacity} positions")
    self._set_length()
    self._set_noise()
    try:
      x = self._hidden(
        tokens_B.repeat_interleave(self.num_members)[:, None],
        self._cache,
        self.length,
        self.experts,
      )
    finally:
      for layer in self.model.model.layers:
        layer.mlp.gate.noise = None
    if self.num_members > 1:
      self._share()
    self.length += 1
    log_probs = torch.log_softmax(self.model.lm_head(x[:, -1]), dim=-1, dtype=torch.float32)
    members = log_probs.unflatten(0, (self.batch_size, self.num_members))
    return torch.logsumexp(members, dim=1) - math.log(self.num_members)
