"""The architecture of a Mixture-of-Experts transformer as data.

`ModelConfig` says everything that the forward function needs to know about a
model. What the model families of the hub make of it is in `families`.
"""

import dataclasses
import json

from roe_jax.quantization import FORMATS

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Yarn:
  """Rotary embeddings stretched to a longer context (YaRN, arXiv 2309.00071).

  Attributes:
    factor: how many times longer the context is than the original one.
    original_context: tokens that the model was trained on first.
    beta_fast, beta_slow: rotations within the original context from which on a
      dimension keeps its frequency, and up to which it is divided by `factor`.
    truncate: whether the bounds of the ramp between them are whole dimensions.
    attention_factor: cosines and sines are multiplied by it.
  """

  factor: float
  original_context: int
  beta_fast: float
  beta_slow: float
  truncate: bool
  attention_factor: float


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only MoE transformer.

  Sizes carry the axis letters used in shapes throughout the library.

  Attributes:
    family: which hub architecture this is, a name in `families.FAMILIES`.
    vocab_size: V.
    num_layers: L; every layer has attention and an MoE block.
    d_model: D.
    num_heads: H, query heads.
    num_kv_heads: K, key/value heads; divides H.
    head_dim: C; even, for rotary embeddings.
    num_experts: E, per layer.
    experts_per_token: A, active experts per token.
    d_expert: F, inner width of one expert.
    context_length: longest sequence the model was made for, in tokens.
    normalize_gates: whether the gates of the chosen experts are scaled to sum
      to one (Mixtral; `norm_topk_prob`), or stay a softmax over all experts.
    gate_mass_experts: scale gates that are not normalized so that they sum to what
      those of so many best experts alone would; None: do not. No model has it:
      see `routing.with_experts`.
    gates_in_model_dtype: whether gates are rounded to `dtype` before use
      (OLMoE) or kept in float32 (Mixtral).
    qk_norm: RMSNorm of the queries and of the keys: over all heads (OLMoE), or
      with `qk_norm_per_head` over each (Qwen3).
    clip_qkv: bound on the absolute value of queries, keys and values, or None.
    qkv_bias, output_bias: biases of the projections to queries, keys and
      values, and of that back to the model width.
    attention_sinks: a learned score for each query head that takes part in the
      softmax and has no value (GPT-OSS).
    sliding_window: how many positions, its own included, a row sees in the
      layers of `sliding_layers`; None where there are none.
    sliding_layers: indices of those layers, ascending.
    router_bias, expert_bias: biases of the router, and of both projections of
      every expert.
    swiglu_limit, swiglu_alpha: of the clamped activation of GPT-OSS (see
      `experts.Activation`); no limit: SwiGLU.
    d_shared_expert: inner width of an expert that every token passes through,
      weighted by a gate of its own (Qwen2-MoE); 0: there is none.
    rope_theta: base of the rotary embedding.
    rope_scaling: how it is stretched to a longer context, or None.
    rms_norm_eps: added to the mean square in every RMSNorm.
    norm_weight_in_float32: whether the result of an RMSNorm is rounded to
      `dtype` after its weight is applied (GPT-OSS), or before.
    expert_format: how the experts' matrices are held: a name in
      `quantization.FORMATS`, or None for `dtype`.
    initializer_range: standard deviation of the initial weights.
    bos_token_id, pad_token_id: token ids, or None where the model has none.
    eos_token_ids: tokens that end a text.
    dtype: of parameters and activations, one of `DTYPES`.
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
  rope_theta: float = 10000.0
  rope_scaling: Yarn | None = None
  rms_norm_eps: float = 1e-5
  norm_weight_in_float32: bool = False
  expert_format: str | None = None
  gate_mass_experts: int | None = None
  initializer_range: float = 0.02
  bos_token_id: int | None = None
  pad_token_id: int | None = None
  eos_token_ids: tuple[int, ...] = ()
  dtype: str = "float32"

  def __post_init__(self):
    for name in ("eos_token_ids", "sliding_layers"):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    if isinstance(self.rope_scaling, dict):  # as it comes out of JSON
      object.__setattr__(self, "rope_scaling", Yarn(**self.rope_scaling))
    if self.expert_format is not None and self.expert_format not in FORMATS:
      raise ValueError(
        f"unknown expert_format {self.expert_format!r}; choose one of {', '.join(FORMATS)}, or none"
      )
    if self.dtype not in DTYPES:
      raise ValueError(f"unsupported dtype {self.dtype!r}; choose one of {', '.join(DTYPES)}")
    for name in (
      "vocab_size",
      "num_layers",
      "d_model",
      "num_heads",
      "num_kv_heads",
      "head_dim",
      "num_experts",
      "experts_per_token",
      "d_expert",
      "context_length",
    ):
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
    if self.experts_per_token > self.num_experts:
      raise ValueError(
        f"experts_per_token ({self.experts_per_token}) exceeds num_experts ({self.num_experts})"
      )
    if not 1 <= (self.gate_mass_experts or 1) <= self.experts_per_token:
      raise ValueError(
        f"gate_mass_experts must be None or lie in [1, {self.experts_per_token}] "
        f"(experts_per_token), got {self.gate_mass_experts}"
      )
    layers = self.sliding_layers
    if (self.sliding_window is None) == bool(layers) or (layers and self.sliding_window < 1):
      raise ValueError(
        f"sliding_layers {list(layers)} need a sliding_window of at least 1, and none "
        f"without them; got {self.sliding_window}"
      )
    if list(layers) != sorted(set(layers) & set(range(self.num_layers))):
      raise ValueError(
        f"sliding_layers must be ascending indices of the {self.num_layers} "
        f"layers, got {list(layers)}"
      )

  def replace(self, **changes) -> "ModelConfig":
    return dataclasses.replace(self, **changes)

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

  @classmethod
  def from_json(cls, text: str) -> "ModelConfig":
    """The config written by `to_json`.

    Raises:
      ValueError: not JSON, or keys missing or unknown.
    """
    try:
      values = json.loads(text)
    except json.JSONDecodeError as error:
      raise ValueError(f"the model config is not valid JSON: {error}") from error
    if not isinstance(values, dict):
      raise ValueError("the model config must be a JSON object")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    missing = sorted(
      name for name, f in fields.items() if name not in values and f.default is dataclasses.MISSING
    )
    if unknown or missing:
      raise ValueError(f"the model config has unknown keys {unknown} and lacks {missing}")
    return cls(**values)
