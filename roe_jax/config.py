"""The architecture of a transformer as data: Mixture-of-Experts, or dense as one expert per layer.

`ModelConfig` is all that the forward pass knows about a model. `families` converts
it to and from Hugging Face configs.
"""

import dataclasses
import json

from roe_jax import quantization, rope, typed
from roe_jax.rope import RopeScaling
from roe_jax.routers import LINEAR, RECURRENT, ROUTERS, SIGMOID

DTYPES = ("float32", "bfloat16")
# Tables are built for each layer and expert, also of a config that no file belongs to.
MAXIMUM = {"num_layers": 2000, "num_experts": 8192}
_POSITIVE = (
  "vocab_size num_layers d_model num_heads num_kv_heads head_dim num_experts experts_per_token "
  "d_expert context_length rope_theta clip_qkv swiglu_limit embedding_multiplier "
  "attention_multiplier residual_multiplier logits_scaling expert_groups groups_per_token "
  "gate_multiplier rotary_dim"
).split()
_NOT_NEGATIVE = (
  "d_shared_expert first_dense_layers d_dense router_state rms_norm_eps initializer_range "
  "kv_lora_rank q_lora_rank v_head_dim "
  "bos_token_id pad_token_id"
).split()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer; a dense one has one expert per layer and no router.

  Sizes use the axis letters of the shapes throughout the library.

  Attributes:
    family: the Hugging Face architecture, a name in `family_table.FAMILIES`.
    vocab_size: V.
    num_layers: L; every layer has attention and, except for the `first_dense_layers`, an MoE
      block.
    d_model: D.
    num_heads: H, query heads.
    num_kv_heads: K, key/value heads; divides H.
    head_dim: C; even, for rotary embeddings.
    kv_lora_rank: width of the latent from which keys and values are computed (multi-head latent
      attention, see `latent_attention`); 0: keys and values have their own projections. With a
      latent, `num_kv_heads` is 1, `head_dim` is the width of queries, and the last `rotary_dim` of
      its dimensions are rotated.
    q_lora_rank: width of the latent from which queries are computed; 0: of the hidden state.
    v_head_dim: width of a head's values with latent attention; 0 without.
    rotary_interleaved: whether latent attention rotates neighbors, in place of the two halves.
    num_experts: E, per layer.
    experts_per_token: A, active experts per token.
    d_expert: F, hidden width of one expert.
    context_length: maximum sequence length, in tokens.
    router: kind of router, a name in `routers.ROUTERS`.
    router_state: width of the state of a recurrent router; 0 for other kinds.
    unit_gates: whether the chosen experts have gates of one (dense models) instead of a softmax.
    gate_scales: whether these gates are 1 + u p, with a learned scale u of each expert and the
      softmax p over all experts (fine-tuned carved models).
    normalize_gates: whether the gates of the chosen experts are scaled to sum to one
      (Mixtral; `norm_topk_prob`) or remain a softmax over all experts.
    gate_mass_experts: scales gates that are not normalized to the sum of the gates of
      this many best experts; None: no scaling. No released model sets it: see
      `routing.with_experts`.
    expert_mass: if set, a token's experts are the fewest whose router probabilities (of a sigmoid
      router, the shares of its scores without bias) sum to this (XMoE, arXiv 2403.18926), at most
      `experts_per_token` and at least one. None, as in all released models: always
      `experts_per_token`.
    expert_mass_of: whether these probabilities are of the logits with noise ("noisy") or without
      ("clean"); the order is that of the logits with noise.
    gate_multiplier: factor on all gates (DeepSeek-V3's `routed_scaling_factor`).
    correction_bias: whether a sigmoid router has a bias of each expert that is added to the
      scores by which experts are chosen, and not to their gates (arXiv 2408.15664).
    expert_groups, groups_per_token: a sigmoid router chooses among the experts of
      `groups_per_token` of so many groups of neighbors, those whose two largest scores have the
      largest sum (DeepSeek-V3).
    gates_in_model_dtype: whether gates are rounded to `dtype` before use (OLMoE) or kept
      in float32 (Mixtral).
    qk_norm: RMSNorm of queries and keys: over all heads (OLMoE) or, with
      `qk_norm_per_head`, over each head (Qwen3).
    clip_qkv: bound on the absolute value of queries, keys and values, or None.
    qkv_bias, output_bias: biases of the query, key and value projections, and of the
      output projection of attention.
    attention_sinks: one learned logit per query head that takes part in the softmax
      without a value (GPT-OSS).
    sliding_window: attention window of the layers in `sliding_layers`, including the
      current position; None without such layers.
    sliding_layers: indices of those layers, ascending.
    router_bias, expert_bias: biases of the router, and of both projections of every expert.
    swiglu_limit, swiglu_alpha: parameters of GPT-OSS's clamped activation (see
      `experts.Activation`); limit None: SwiGLU.
    d_shared_expert: hidden width of an expert that processes every token; 0: none.
    shared_expert_gate: whether its own gate weights it (Qwen2-MoE).
    first_dense_layers: number of layers at the start with an MLP, of width `d_dense`, in place of
      experts.
    d_dense: hidden width of that MLP.
    embedding_multiplier: factor on embedded tokens (Granite).
    attention_multiplier: factor on attention scores; None: `C**-0.5`.
    residual_multiplier: factor on what attention and the MoE block add to the residual stream.
    logits_scaling: divides the logits.
    rope_theta: base of the rotary embedding.
    rotary_dim: how many dimensions at the start of each head are rotated, even; None: all.
    rope_scaling: its extension to a longer context, or None.
    rms_norm_eps: added to the mean square in every RMSNorm.
    norm_weight_in_float32: whether the result of an RMSNorm is rounded to `dtype` after
      its weight is applied (GPT-OSS) or before.
    expert_format: storage format of the experts' matrices: a name that `quantization.find`
      knows, or None for `dtype`.
    projection_format: storage format of the other matrices that a token is multiplied with:
      attention's projections, shared experts, the MLPs of the first dense layers, and the output
      head; one of `quantization.PROJECTION_FORMATS`, or None for `dtype`. Embeddings, routers and
      what latent attention expands latents with have `dtype`.
    expert_bits: how many bits of a nested format each expert has, of each layer with experts, up
      to those of the format; None: all. See `bit_plans`.
    bit_router: whether a linear router of each expert, in a nested format, chooses how many of its
      bits are read for a token (see `bit_routing`).
    sandwich_norm: whether what attention and the MoE block add to the residual stream is
      normalized too (depth-scaled sandwich norm, arXiv 2504.07866).
    initializer_range: standard deviation of the initial weights.
    tiny_init: whether it is sqrt(1 / (2 D L)) of all matrices instead, and 0.5 of the embedding
      (TinyInit, arXiv 2504.07866).
    bos_token_id, pad_token_id: token ids, or None where the model has none.
    eos_token_ids: tokens that end a sequence.
    dtype: dtype of parameters and activations, one of `DTYPES`.
  """

  family: str
  vocab_size: int
  num_layers: int
  d_model: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  num_experts: int
  experts_per_token: int
  d_expert: int
  context_length: int
  normalize_gates: bool
  gates_in_model_dtype: bool
  qk_norm: bool
  kv_lora_rank: int = 0
  q_lora_rank: int = 0
  v_head_dim: int = 0
  rotary_interleaved: bool = False
  router: str = LINEAR
  router_state: int = 0
  unit_gates: bool = False
  gate_scales: bool = False
  gate_multiplier: float = 1.0
  correction_bias: bool = False
  expert_groups: int = 1
  groups_per_token: int = 1
  qk_norm_per_head: bool = False
  clip_qkv: float | None = None
  qkv_bias: bool = False
  output_bias: bool = False
  attention_sinks: bool = False
  sliding_window: int | None = None
  sliding_layers: tuple[int, ...] = ()
  router_bias: bool = False
  expert_bias: bool = False
  swiglu_limit: float | None = None
  swiglu_alpha: float = 1.0
  d_shared_expert: int = 0
  shared_expert_gate: bool = True
  first_dense_layers: int = 0
  d_dense: int = 0
  embedding_multiplier: float = 1.0
  attention_multiplier: float | None = None
  residual_multiplier: float = 1.0
  logits_scaling: float = 1.0
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  rotary_dim: int | None = None
  rms_norm_eps: float = 1e-5
  norm_weight_in_float32: bool = False
  expert_format: str | None = None
  projection_format: str | None = None
  expert_bits: tuple[tuple[int, ...], ...] | None = None
  bit_router: bool = False
  gate_mass_experts: int | None = None
  expert_mass: float | None = None
  expert_mass_of: str = "noisy"
  sandwich_norm: bool = False
  initializer_range: float = 0.02
  tiny_init: bool = False
  bos_token_id: int | None = None
  pad_token_id: int | None = None
  eos_token_ids: tuple[int, ...] = ()
  dtype: str = "float32"

  def __post_init__(self):
    for name in ("eos_token_ids", "sliding_layers"):
      if isinstance(getattr(self, name), list):  # from JSON
        object.__setattr__(self, name, tuple(getattr(self, name)))
    if isinstance(self.expert_bits, list):  # from JSON
      rows = (tuple(row) if isinstance(row, list) else row for row in self.expert_bits)
      object.__setattr__(self, "expert_bits", tuple(rows))
    if isinstance(self.rope_scaling, dict):  # from JSON
      object.__setattr__(self, "rope_scaling", rope.from_fields(self.rope_scaling))
    typed.check_fields(self, _POSITIVE, _NOT_NEGATIVE)
    for name, most in MAXIMUM.items():
      if getattr(self, name) > most:
        raise ValueError(f"{name} must be at most {most}, got {getattr(self, name)}")
    if any(token < 0 for token in self.eos_token_ids):
      raise ValueError(f"eos_token_ids must be at least 0, got {list(self.eos_token_ids)}")
    if self.rope_scaling is not None:
      zero = [n for n in ("mscale_all_dim",) if hasattr(self.rope_scaling, n)]
      names = [f.name for f in dataclasses.fields(self.rope_scaling)]
      positive = [n for n in names if n not in ("truncate", *zero)]
      typed.check_fields(self.rope_scaling, positive, zero)
    if self.expert_format is not None:
      quantization.find(self.expert_format)  # checks the name
    if self.projection_format not in (None, *quantization.PROJECTION_FORMATS):
      raise ValueError(
        f"projections can be in {' or '.join(quantization.PROJECTION_FORMATS)}, got "
        f"{self.projection_format!r}"
      )
    if self.expert_bits is not None:
      format = quantization.nested_format(self.expert_format)
      bits, shape = self.expert_bits, (self.num_expert_layers, self.num_experts)
      if (len(bits), *{len(row) for row in bits}) != shape or not all(
        format.base <= b <= format.bits for row in bits for b in row
      ):
        raise ValueError(
          f"expert_bits must be {shape[0]} lists (layers) of {shape[1]} numbers (experts) from "
          f"{format.base} to {format.bits}, got {bits}"[:300]
        )
    if self.router not in ROUTERS:
      raise ValueError(f"unknown router {self.router!r}; choose one of {', '.join(ROUTERS)}")
    if self.dtype not in DTYPES:
      raise ValueError(f"unsupported dtype {self.dtype!r}; choose one of {', '.join(DTYPES)}")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
    if (self.rotary_dim or 2) % 2 or (self.rotary_dim or 2) > self.head_dim:
      raise ValueError(
        f"rotary_dim must be even and at most head_dim ({self.head_dim}), got {self.rotary_dim}"
      )
    if self.experts_per_token > self.num_experts:
      raise ValueError(
        f"experts_per_token ({self.experts_per_token}) exceeds num_experts ({self.num_experts})"
      )
    if (self.router == RECURRENT) != (self.router_state > 0):
      raise ValueError(
        f"router_state must be positive with router {RECURRENT!r} and 0 without, got "
        f"{self.router_state} with router {self.router!r}"
      )
    self._check_choice()
    self._check_latent()
    if not (
      self.first_dense_layers < self.num_layers
      and (self.first_dense_layers > 0) == (self.d_dense > 0)
      and (self.first_dense_layers == 0 or ROUTERS[self.router].axes is not None)
    ):
      raise ValueError(
        f"first_dense_layers must be 0, or positive with d_dense and a router and less than "
        f"num_layers ({self.num_layers}), got {self.first_dense_layers} with d_dense {self.d_dense}"
      )
    if ROUTERS[self.router].axes is None and not (self.num_experts == 1 and self.unit_gates):
      raise ValueError(
        f"a model with router {self.router!r} has one expert per layer with a gate of one, got "
        f"num_experts {self.num_experts} and unit_gates {self.unit_gates}"
      )
    if self.gate_scales and (ROUTERS[self.router].axes is None or not self.unit_gates):
      raise ValueError(
        f"gate_scales scale the gates of one of a model with a router, got router {self.router!r} "
        f"and unit_gates {self.unit_gates}"
      )
    if not 1 <= (self.gate_mass_experts or 1) <= self.experts_per_token:
      raise ValueError(
        f"gate_mass_experts must be None or lie in [1, {self.experts_per_token}] "
        f"(experts_per_token), got {self.gate_mass_experts}"
      )
    if not 0 < (1 if self.expert_mass is None else self.expert_mass) <= 1:
      raise ValueError(f"expert_mass must be None or lie in (0, 1], got {self.expert_mass}")
    if self.expert_mass_of not in ("clean", "noisy"):
      raise ValueError(f"expert_mass_of must be clean or noisy, got {self.expert_mass_of!r}")
    layers = self.sliding_layers
    window = self.sliding_window
    if (window is None) == bool(layers) or (window is not None and window < 1):
      raise ValueError(
        f"sliding_window must be at least 1 with sliding_layers and None without, got "
        f"{window} with sliding_layers {list(layers)}"
      )
    if list(layers) != sorted(set(layers) & set(range(self.num_layers))):
      raise ValueError(
        f"sliding_layers must be ascending indices of the {self.num_layers} "
        f"layers, got {list(layers)}"
      )

  def _check_choice(self):
    groups, of_token = self.expert_groups, self.groups_per_token
    if self.router != SIGMOID and (self.correction_bias or groups > 1):
      raise ValueError(
        f"correction_bias and expert_groups are for router {SIGMOID!r}, got {self.router!r}"
      )
    size, rest = divmod(self.num_experts, groups)
    if rest or (groups > 1 and size < 2):
      raise ValueError(
        f"expert_groups must divide num_experts ({self.num_experts}) into groups of at least two, "
        f"got {groups}"
      )
    if not (of_token <= groups and self.experts_per_token <= of_token * size):
      raise ValueError(
        f"groups_per_token must be at most expert_groups ({groups}) and enough for "
        f"experts_per_token ({self.experts_per_token}) of {size} experts each, got {of_token}"
      )

  def _check_latent(self):
    if not self.kv_lora_rank:
      own = ("q_lora_rank", "v_head_dim", "rotary_interleaved")
      if wrong := [name for name in own if getattr(self, name)]:
        raise ValueError(f"{' and '.join(wrong)} are of latent attention: set kv_lora_rank, too")
      return
    if not (self.num_kv_heads == 1 and self.v_head_dim and self.rotary_dim):
      raise ValueError(
        "latent attention (kv_lora_rank) needs num_kv_heads 1, v_head_dim and rotary_dim, got "
        f"{self.num_kv_heads}, {self.v_head_dim} and {self.rotary_dim}"
      )
    if self.rotary_dim == self.head_dim:
      raise ValueError(
        f"latent attention needs dimensions without rotation, got rotary_dim = head_dim = "
        f"{self.head_dim}"
      )
    extras = ("qk_norm", "clip_qkv", "qkv_bias", "output_bias", "attention_sinks")
    if wrong := [name for name in extras if getattr(self, name)]:
      raise ValueError(f"latent attention (kv_lora_rank) has no {' or '.join(wrong)}")

  @property
  def cached_head_dim(self) -> int:
    """The width of a cached key: `head_dim`, or that of a latent and its rotary key."""
    return self.kv_lora_rank + (self.rotary_dim or 0) if self.kv_lora_rank else self.head_dim

  @property
  def cached_size(self) -> int:
    """How many numbers of a position a layer's cache holds: keys and values, or keys alone."""
    return (1 if self.kv_lora_rank else 2) * self.num_kv_heads * self.cached_head_dim

  @property
  def attention_scale(self) -> float:
    """The factor on attention scores."""
    given = self.attention_multiplier
    scale = self.head_dim**-0.5 if given is None else given
    return scale if self.rope_scaling is None else scale * self.rope_scaling.score_factor

  @property
  def num_expert_layers(self) -> int:
    """The number of layers with experts: all but the `first_dense_layers`."""
    return self.num_layers - self.first_dense_layers

  def split(self, layers: range) -> tuple[range, range]:
    """Splits a range of layers into those without and those with experts."""
    at = min(max(layers.start, self.first_dense_layers), layers.stop)
    return range(layers.start, at), range(at, layers.stop)

  def replace(self, **changes) -> "ModelConfig":
    """Returns a config with other values; one with another `expert_format` has no `expert_bits`."""
    if "expert_format" in changes:
      changes = {"expert_bits": None} | changes
    return dataclasses.replace(self, **changes)

  def unquantized(self) -> "ModelConfig":
    """Returns the config with all matrices in `dtype`."""
    return self.replace(expert_format=None, projection_format=None)

  @property
  def formats(self) -> str:
    """The formats of quantized matrices in words; empty without any."""
    found = {"experts": self.expert_format, "projections": self.projection_format}
    return ", ".join(f"{what} in {format}" for what, format in found.items() if format)

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

  @classmethod
  def from_json(cls, text: str) -> "ModelConfig":
    """Parses the output of `to_json`.

    Raises:
      ValueError: invalid JSON, or missing or unknown keys.
    """
    values = typed.parse(text, "the model config")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    missing = sorted(
      name for name, f in fields.items() if name not in values and f.default is dataclasses.MISSING
    )
    if unknown or missing:
      raise ValueError(f"the model config has unknown keys {unknown} and lacks {missing}")
    return cls(**values)
