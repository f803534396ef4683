"""The same roster in Hugging Face transformers: what roe_jax is measured against.

A roster of OLMoE or Mixtral under Clean Cache in PyTorch, as fast as it gets with
what transformers 5 and torch offer, without writing kernels:

* All members of all texts are one forward pass. The members stand side by side
  on the sequence axis, so that the batch, and with it the cache, stays that of
  the texts.
* The members' own keys and values lie in scratch slots behind the clean ones,
  and a mask lets each row see the clean slots below its position and its own.
  Attention is then one call of torch's fused function (on a CPU 1.2 to 2 times
  faster than two parts put together), no cache is copied, and
  the clean member's slot is the one that the cache keeps.
* All layers' noise is drawn at once, on the device. Without noise the routers
  run transformers' own code.
* Products with few rows are taken the quicker way round.
* Every implementation of the experts that works can be timed: those of
  transformers, and two more written here with plain torch.
* On CUDA a step can be captured as a CUDA graph.

Layers before the first noisy one are computed for all members; roe_jax computes
them once. Compare at τ > 0 in the first layer, or count that as a difference.

Needs torch and transformers 5. Axis letters are those of roe_jax, and M = R·T
rows of a call: member by member, position by position.
"""

from collections.abc import Callable, Sequence
import math
import statistics
import time
import types

import numpy as np
import torch
from torch.nn import functional as F
import transformers
from transformers.integrations.moe import ExpertsInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from roe_jax import families
from roe_jax.config import ModelConfig

# deepgemm and sonicmoe need CUDA and the `kernels` package.
EXPERTS = ("eager", "grouped_mm", "batched_mm", "loop", "dense", "deepgemm", "sonicmoe")
RUNS = ("eager", "compile", "graph")


# Models


def build(
  config: ModelConfig, dtype: str = "float32", device: str = "cpu", seed: int = 0
) -> transformers.PreTrainedModel:
  """A model of this shape with random weights, made in place on the device."""
  values = families.to_hugging_face(config)
  values = {
    k: v for k, v in values.items() if k not in ("model_type", "architectures", "torch_dtype")
  }
  kind = {"olmoe": transformers.OlmoeConfig, "mixtral": transformers.MixtralConfig}[config.family]
  hf_config = kind(**values, attn_implementation="sdpa")
  with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=getattr(torch, dtype))
  model.to_empty(device=device)
  # Its frequencies are no weights, and are lost with the meta device.
  rotary = model.model.rotary_emb
  model.model.rotary_emb = type(rotary)(config=model.config).to(device)
  generator = torch.Generator(device).manual_seed(seed)
  with torch.no_grad():
    for weight in model.parameters():
      if weight.ndim == 1:
        weight.fill_(1.0)
      else:
        weight.normal_(std=config.initializer_range, generator=generator)
  return model.eval()


def load_params(model: transformers.PreTrainedModel, state: dict[str, np.ndarray]) -> None:
  """Copies weights, named as transformers names them, into the model."""
  model.load_state_dict({name: torch.from_numpy(w) for name, w in state.items()}, strict=True)


# Experts


def _product(x_MxD: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
  """`F.linear` of rows; on a CPU, few rows are quicker as columns.

  Measured with MKL and oneDNN on one core: 1.25 times in float32, 1.35 times in
  bfloat16.
  """
  if x_MxD.device.type == "cpu" and x_MxD.shape[0] <= 32:
    if x_MxD.dtype == torch.bfloat16 and x_MxD.shape[0] == 1:
      return torch.mm(weight, x_MxD.repeat(2, 1).T).T[:1]  # Two rows are quicker than one.
    if x_MxD.dtype == torch.bfloat16 or x_MxD.shape[0] >= 4:
      return torch.mm(weight, x_MxD.T).T
  return F.linear(x_MxD, weight)


def loop_experts(
  self, x_MxD: torch.Tensor, experts_MxA: torch.Tensor, gates_MxA: torch.Tensor
) -> torch.Tensor:
  """Rows sorted by expert, one expert after the other, `[M, D]`.

  What `grouped_mm` is on a CPU, without visits to experts that nobody chose.
  """
  order = experts_MxA.flatten().argsort()
  counts = torch.bincount(experts_MxA.flatten(), minlength=self.num_experts).tolist()
  rows = order // experts_MxA.shape[1]

  def of_each(x, weights):
    y, start = x.new_empty(x.shape[0], weights.shape[1]), 0
    for expert, count in enumerate(counts):
      if count:
        rows_here = slice(start, start + count)
        y[rows_here] = _product(x[rows_here], weights[expert])
        start += count
    return y

  y = of_each(self._apply_gate(of_each(x_MxD[rows], self.gate_up_proj)), self.down_proj)
  y *= gates_MxA.flatten()[order, None]
  return torch.zeros_like(x_MxD).index_add_(0, rows, y)


def dense_experts(
  self, x_MxD: torch.Tensor, experts_MxA: torch.Tensor, gates_MxA: torch.Tensor
) -> torch.Tensor:
  """All experts on all rows, `[M, D]`; those not chosen have a gate of zero."""
  rows, count = x_MxD.shape[0], self.num_experts
  gates = gates_MxA.new_zeros(rows, count).scatter_(1, experts_MxA, gates_MxA)
  inner = self._apply_gate(F.linear(x_MxD, self.gate_up_proj.flatten(0, 1)).view(rows, count, -1))
  inner = (inner * gates[..., None]).to(x_MxD.dtype)
  return torch.bmm(inner.transpose(0, 1), self.down_proj.transpose(1, 2)).sum(0)


ExpertsInterface.register("loop", loop_experts)
ExpertsInterface.register("dense", dense_experts)


@torch.inference_mode()
def experts_implementations(model: transformers.PreTrainedModel, num_rows: int = 2) -> list[str]:
  """Those of `EXPERTS` that run this model's experts on `num_rows` rows here."""
  block = model.model.layers[0].mlp
  weight = block.experts.gate_up_proj
  x = torch.randn(num_rows, weight.shape[2], device=weight.device).to(weight.dtype)
  _, gates, chosen = block.gate(x)
  before, works = model.config._experts_implementation, []
  for name in EXPERTS:
    if name in ("deepgemm", "sonicmoe") and weight.device.type != "cuda":
      continue
    try:
      model.set_experts_implementation(name)
      block.experts(x, chosen, gates)
      works.append(name)
    except Exception:  # Whatever a missing kernel or too little memory raises.
      pass
  model.set_experts_implementation(before)
  return works


def time_each(
  call: Callable[[str], object],
  names: Sequence[str],
  repeats: int = 3,
  synchronize: Callable[[], None] = lambda: None,
) -> dict[str, float]:
  """Median seconds of `call(name)` for each name, fastest first.

  The names take turns. Each one's first call is not counted.
  """
  seconds = {name: [] for name in names}
  for turn in range(repeats + 1):
    for name in names:
      synchronize()
      start = time.perf_counter()
      call(name)
      synchronize()
      if turn:
        seconds[name].append(time.perf_counter() - start)
  medians = {name: statistics.median(values) for name, values in seconds.items()}
  return dict(sorted(medians.items(), key=lambda item: item[1]))


# What the roster changes in the model


def route(self, hidden_states):
  """A router's forward function with noise on its choice; gates stay clean.

  `self.noise` is `[B·M, E]` float32, or None.
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


def _linear(self, x):
  """A `Linear`'s forward function by `_product`: no model here has biases."""
  return _product(x.flatten(0, -2), self.weight).contiguous().unflatten(0, x.shape[:-1])


def _attend(module, query, key, value, attention_mask, scaling=None, rows=None, **kwargs):
  """Attention of `[B, H, M, C]` queries to the shared slots, `[B, M, H, C]`."""
  keys, values = rows.put(module.layer_idx, key, value)
  if rows.mask is None:
    return sdpa_attention_forward(module, query, keys, values, None, scaling=scaling)
  b, h, m, c = query.shape
  # Queries of one key/value head side by side, so that no head is repeated.
  packed = query.reshape(b, keys.shape[1], -1, c)
  heads = F.scaled_dot_product_attention(packed, keys, values, attn_mask=rows.mask, scale=scaling)
  return heads.view(b, h, m, c).transpose(1, 2), None


transformers.AttentionInterface.register("roster", _attend)


class _Rows:
  """One call's rows: where their keys and values go, and what they see.

  Attributes:
    cache: `[2, L, B, K, S, C]`.
    slots: of the M rows, a slice or an index tensor.
    seen: number of slots that attention reads.
    mask: additive `[G·M, seen]`, or None for a causal text or a single row.
  """

  def __init__(self, cache, slots, seen, mask):
    self.cache, self.slots, self.seen, self.mask = cache, slots, seen, mask

  def put(self, layer, key_BxKxMxC, value_BxKxMxC):
    """Writes the rows' own; returns the slots that they read, as views."""
    keys, values = self.cache[0, layer], self.cache[1, layer]
    if isinstance(self.slots, slice):
      keys[:, :, self.slots], values[:, :, self.slots] = key_BxKxMxC, value_BxKxMxC
    else:
      keys.index_copy_(2, self.slots, key_BxKxMxC)
      values.index_copy_(2, self.slots, value_BxKxMxC)
    return keys[:, :, : self.seen], values[:, :, : self.seen]


class TransformersRoster:
  """A roster over texts of equal length, with mean probability and clean gates.

  It takes the model over: attention, routers and linear maps are set to the
  roster's. With
  `num_members=1` it is the plain model.

  Attributes:
    cache: `[2, L, B, K, S, C]` clean keys and values and scratch slots.
    length: number of positions in the cache.
    experts: implementation for the members' rows; may be changed at any time,
      except after the first step where `run` is "compile" or "graph".
    prefill_experts: implementation for prefill.
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
    prefill_experts: str = "grouped_mm",
    run: str = "eager",
    seed: int = 0,
    draw: Callable[[Sequence[int], int, int], torch.Tensor] | None = None,
  ):
    """Sets the model up.

    Args:
      model: an OLMoE or Mixtral model.
      num_members: n; member 0 is noise-free.
      temperatures: τ, one number or one for each layer.
      batch_size: B, texts run together.
      capacity: positions that the cache has room for.
      experts: see the class.
      prefill_experts: see the class.
      run: how steps are run, one of `RUNS`. "compile" is torch.compile (on a
        CPU slower than "eager", and minutes to compile) and "graph" a CUDA
        graph; both read the whole capacity at each step, so it should be no
        larger than needed.
      seed: of torch's default generator, which a CUDA graph can use.
      draw: noise by `(members, first position, T)`, `[L, B, R, T, E]` times τ;
        by default torch's. Only for `run="eager"`.
    """
    if run not in RUNS:
      raise ValueError(f"unknown run {run!r}; choose one of {', '.join(RUNS)}")
    config = model.config
    self.model, self.num_members, self.run = model, num_members, run
    self.experts, self.prefill_experts = experts, prefill_experts
    self.batch_size, self.capacity, self.length = batch_size, capacity, 0
    self._device, self._dtype = model.device, model.dtype
    self._groups = config.num_attention_heads // config.num_key_value_heads
    self._temperatures = np.broadcast_to(
      np.asarray(temperatures, np.float32), config.num_hidden_layers
    )
    self._noisy = [l for l, t in enumerate(self._temperatures) if t > 0 and num_members > 1]
    self._scale = torch.tensor(self._temperatures[self._noisy], device=self._device)
    self._draw, self._step, self._inputs = draw, None, None
    torch.manual_seed(seed)
    model.set_attn_implementation("roster")
    for layer in model.model.layers:
      layer.mlp.gate.noise = None
      layer.mlp.gate.forward = types.MethodType(route, layer.mlp.gate)
    for module in model.modules():
      if isinstance(module, torch.nn.Linear):
        module.forward = types.MethodType(_linear, module)
    self._reserve(num_members)

  def _reserve(self, num_scratch):
    """Allocates the cache: slots for the texts and for the rows of a call."""
    config = self.model.config
    attention = self.model.model.layers[0].self_attn
    with torch.inference_mode():
      self.cache = torch.zeros(
        2,
        config.num_hidden_layers,
        self.batch_size,
        config.num_key_value_heads,
        self.capacity + num_scratch,
        attention.head_dim,
        dtype=self._dtype,
        device=self._device,
      )

  def _hidden(self, tokens_BxM, positions_M, rows, experts):
    """Hidden states after the last norm, `[B, M, D]`."""
    if self.model.config._experts_implementation != experts:
      self.model.set_experts_implementation(experts)
    return self.model.model(
      input_ids=tokens_BxM, position_ids=positions_M[None], use_cache=False, rows=rows
    ).last_hidden_state

  @torch.inference_mode()
  def prefill(self, tokens_BxT: torch.Tensor) -> torch.Tensor:
    """The texts' clean pass from position 0 on; fills the cache.

    Returns:
      Clean hidden states after the last norm, `[B, T, D]`.
    """
    self.length = tokens_BxT.shape[1]
    if tokens_BxT.shape[0] != self.batch_size or self.length > self.capacity:
      raise ValueError(
        f"{list(tokens_BxT.shape)} tokens do not fit into the cache of "
        f"{self.batch_size} texts of {self.capacity} positions"
      )
    positions = torch.arange(self.length, device=self._device)
    rows = _Rows(self.cache, slice(0, self.length), self.length, None)
    return self._hidden(tokens_BxT, positions, rows, self.prefill_experts)

  def _set_noise(self, members, start, length):
    """Draws the noise of all layers for the rows of a call."""
    if not self._noisy:
      return
    gates = [layer.mlp.gate for layer in self.model.model.layers]
    experts = gates[0].num_experts
    if self._draw is None:
      shape = (len(self._noisy), self.batch_size, len(members), length, experts)
      # Minus the logarithm of an exponential variable is a Gumbel variable.
      noise = torch.empty(shape, device=self._device).exponential_().log_()
      noise *= -self._scale.view(-1, 1, 1, 1, 1)
    else:
      noise = self._draw(members, start, length)[self._noisy]
    if members[0] == 0:
      noise[:, :, 0] = 0.0
    for layer, of_layer in zip(self._noisy, noise):
      gates[layer].noise = of_layer.reshape(-1, experts)

  def _run_members(self, tokens_BxT, members, start, first_slot, static=False):
    """Hidden states `[B, R, T, D]` of members at T positions from `start` on."""
    length, count = tokens_BxT.shape[1], len(members)
    offsets = torch.arange(length, device=self._device)
    positions = (start + offsets).repeat(count)
    size = count * length
    slots = first_slot + torch.arange(size, device=self._device)
    seen = self.cache.shape[-2] if static else first_slot + size
    mask = None
    if size > 1 or static:
      every = torch.arange(seen, device=self._device)
      visible = (every < positions[:, None]) | (every == slots[:, None])
      mask = torch.zeros(visible.shape, dtype=self._dtype, device=self._device)
      mask = mask.masked_fill_(~visible, -math.inf).repeat(self._groups, 1)
    rows = _Rows(self.cache, slots if static else slice(first_slot, seen), seen, mask)
    self._set_noise(members, start, length)
    try:
      x = self._hidden(tokens_BxT.repeat(1, count), positions, rows, self.experts)
    finally:
      for layer in self.model.model.layers:
        layer.mlp.gate.noise = None
    return x.unflatten(1, (count, length))

  def _distribution(self, tokens_B, position, static=False):
    """The roster's log-probabilities `[B, V]` at one position."""
    x = self._run_members(tokens_B[:, None], range(self.num_members), position, position, static)
    log_probs = torch.log_softmax(self.model.lm_head(x[:, :, 0]), dim=-1, dtype=torch.float32)
    if self.num_members == 1:
      return log_probs[:, 0]
    return torch.logsumexp(log_probs, dim=1) - math.log(self.num_members)

  @torch.inference_mode()
  def step(self, tokens_B: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[B, V]` float32 of what follows; keeps the clean keys and values."""
    if self.length >= self.capacity:
      raise ValueError(f"the cache is full: it has room for {self.capacity} positions")
    if self.run == "eager":
      log_probs = self._distribution(tokens_B, self.length)
    else:
      if self._step is None:
        self._step = self._compiled() if self.run == "compile" else self._captured()
      tokens, position = self._inputs
      tokens.copy_(tokens_B)
      position.fill_(self.length)
      log_probs = self._step(tokens, position)
    self.length += 1
    return log_probs

  def _static_inputs(self):
    self._inputs = (
      torch.zeros(self.batch_size, dtype=torch.long, device=self._device),
      torch.full((), self.length, dtype=torch.long, device=self._device),
    )
    return self._inputs

  def _compiled(self):
    self._static_inputs()
    return torch.compile(lambda tokens, position: self._distribution(tokens, position, True))

  def _captured(self):
    inputs = self._static_inputs()
    # Slots from the current position on are overwritten by these calls; the
    # next one's position is theirs.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
      for _ in range(3):
        self._distribution(*inputs, True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
      log_probs = self._distribution(*inputs, True)

    def replay(tokens, position):
      graph.replay()
      return log_probs.clone()  # The next step writes to the same place.

    return replay

  @torch.inference_mode()
  def score(self, tokens_BxT: torch.Tensor, rows_per_chunk: int = 512) -> torch.Tensor:
    """Teacher-forced log-probabilities `[B, T-1]` of each token but the first.

    A clean pass fills the cache and is member 0; the other members follow in
    chunks of positions.
    """
    inputs, targets = tokens_BxT[:, :-1], tokens_BxT[:, 1:]
    length, noisy = inputs.shape[1], range(1, self.num_members)
    chunk = max(1, rows_per_chunk // (self.num_members * self.batch_size))
    if self.cache.shape[-2] < length + len(noisy) * chunk:
      self._reserve(len(noisy) * chunk)
    clean = self.prefill(inputs)[:, None]
    scores = []
    for start in range(0, length, chunk):
      here = slice(start, start + chunk)
      x = clean[:, :, here]
      if noisy:
        x = torch.cat([x, self._run_members(inputs[:, here], noisy, start, length)], dim=1)
      logits = self.model.lm_head(x).float()
      wanted = targets[:, None, here, None].expand(-1, self.num_members, -1, -1)
      log_probs = logits.gather(-1, wanted)[..., 0] - torch.logsumexp(logits, dim=-1)
      scores.append(torch.logsumexp(log_probs, dim=1) - math.log(self.num_members))
    return torch.cat(scores, dim=1)
