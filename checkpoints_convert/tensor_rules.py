"""The tensors of each model family, and the parts of parameters that they are: rules as data.

The pattern of a rule, like `"D (H C) -> H C D"`, has the axes of the hub tensor on its left, where
parentheses merge axes, and the axes of one layer's parameter on its right. There, `expert` is the
index of the rule's expert, and a number is an index: `"F D -> expert F 1 D"` is the second half of
a fused projection. Letters are axis sizes (see `ModelConfig`; G is the shared expert's width, P
that of the MLP of the first dense layers, U the pair gate and up, I one, M and N the blocks of 32
in D and in F; of latent attention, Z is the latent's width, Q that of queries, W that of a cached
key, A that of a head without rotation, and X that of its values). Every pattern is a permutation,
so it can be inverted without loss.

Where a family stores experts in two forms, the rules apply to the config of the files, whose
`expert_format` says which form they have, and to their layout: transformers 5 saves the experts of
a layer in the fused arrays that it holds in memory if it is asked to.
"""

import dataclasses
from typing import Any

# The layouts of experts: as on the hub, usually separate matrices; one array for all gate and up
# projections of a layer; or, in GGUF files of some families, one for gate and one for up, or the
# two halves of what expands latents.
SEPARATE, FUSED, SPLIT = "separate", "fused", "split"


@dataclasses.dataclass(frozen=True)
class Rule:
  """One kind of hub tensor.

  Attributes:
    tensor: its name, with placeholders `{layer}`, `{expert}` and `{shared}`, the index of a shared
      expert that comes after the others.
    parameter: the parameter's name in its piece (`checkpoint.piece_shapes`).
    pattern: see the module docstring.
    when: a field of `ModelConfig`; the tensor exists only if it is set.
    unless: a field of `ModelConfig`; the tensor exists only if it is not set.
    layout: the layout in which the tensor exists; all by default.
    dense: whether the tensor exists in the first dense layers, and only in these.
    rows: how many rows the tensor has before and after the parameter's, each a sum of sizes such as
      "HK". Those that no parameter has are not read, and zeros are written.
    rows_of: the axis that these rows are of, an index among the axes on the pattern's left.
    stored: "numbers" of any floating-point dtype; "bytes" that are copied unchanged; or "blocks"
      of 4-bit codes (see `mxfp4`), which the parameter packs in pairs along its last axis. The
      pattern describes unpacked codes.
  """

  tensor: str
  parameter: str
  pattern: str
  when: str | None = None
  unless: str | None = None
  layout: str | None = None
  dense: bool = False
  rows: tuple[str, str] = ("", "")
  rows_of: int = 0
  stored: str = "numbers"


_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."
_GATE_UP, _DOWN = _MLP + "experts.gate_up_proj", _MLP + "experts.down_proj"

_WITHOUT_NORMS = (
  Rule("model.embed_tokens.weight", "embedding", "V D -> V D"),
  Rule("model.norm.weight", "final_norm", "D -> D"),
  Rule("lm_head.weight", "unembedding", "V D -> V D"),
  Rule(_ATTENTION + "q_proj.weight", "attention.query", "(H C) D -> H C D"),
  Rule(_ATTENTION + "k_proj.weight", "attention.key", "(K C) D -> K C D"),
  Rule(_ATTENTION + "v_proj.weight", "attention.value", "(K C) D -> K C D"),
  Rule(_ATTENTION + "o_proj.weight", "attention.output", "D (H C) -> H C D"),
)
_NORMS = (
  Rule(_LAYER + "input_layernorm.weight", "attention_norm", "D -> D"),
  Rule(_LAYER + "post_attention_layernorm.weight", "moe_norm", "D -> D"),
)
_COMMON = (*_WITHOUT_NORMS, *_NORMS)


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
  """Returns the rules of a router and its experts, in both layouts."""
  expert = block + "experts.{expert}."
  return (
    Rule(block + "gate.weight", "router", "E D -> E D", layout=SEPARATE),
    Rule(f"{expert}{gate}.weight", "experts.gate_up", "F D -> expert F 0 D", layout=SEPARATE),
    Rule(f"{expert}{up}.weight", "experts.gate_up", "F D -> expert F 1 D", layout=SEPARATE),
    Rule(f"{expert}{down}.weight", "experts.down", "D F -> expert F D", layout=SEPARATE),
    Rule(_MLP + "gate.weight", "router", "E D -> E D", layout=FUSED),
    Rule(_GATE_UP, "experts.gate_up", "E (U F) D -> E F U D", layout=FUSED),
    Rule(_DOWN, "experts.down", "E D F -> E F D", layout=FUSED),
  )


_QKV_BIASES = (
  Rule(_ATTENTION + "q_proj.bias", "attention.query_bias", "(H C) -> H C", when="qkv_bias"),
  Rule(_ATTENTION + "k_proj.bias", "attention.key_bias", "(K C) -> K C", when="qkv_bias"),
  Rule(_ATTENTION + "v_proj.bias", "attention.value_bias", "(K C) -> K C", when="qkv_bias"),
)
_QK_NORMS_PER_HEAD = (
  Rule(_ATTENTION + "q_norm.weight", "attention.query_norm", "C -> C", when="qk_norm"),
  Rule(_ATTENTION + "k_norm.weight", "attention.key_norm", "C -> C", when="qk_norm"),
)
_OUTPUT_BIAS = Rule(
  _ATTENTION + "o_proj.bias", "attention.output_bias", "D -> D", when="output_bias"
)
# The MLP of a dense model is its only expert.
_DENSE = (
  *_COMMON,
  *_QKV_BIASES,
  _OUTPUT_BIAS,
  Rule(_MLP + "gate_proj.weight", "experts.gate_up", "F D -> 0 F 0 D"),
  Rule(_MLP + "up_proj.weight", "experts.gate_up", "F D -> 0 F 1 D"),
  Rule(_MLP + "down_proj.weight", "experts.down", "D F -> 0 F D"),
  Rule(_MLP + "gate_proj.bias", "experts.gate_up_bias", "F -> 0 F 0", when="expert_bias"),
  Rule(_MLP + "up_proj.bias", "experts.gate_up_bias", "F -> 0 F 1", when="expert_bias"),
  Rule(_MLP + "down_proj.bias", "experts.down_bias", "D -> 0 D", when="expert_bias"),
)
_MLP_EXPERTS = _experts(_MLP, "gate_proj", "up_proj", "down_proj")
_SEPARATE_EXPERTS = (
  Rule(_MLP + "experts.{expert}.gate_proj.weight", "experts.gate_up", "F D -> expert F 0 D"),
  Rule(_MLP + "experts.{expert}.up_proj.weight", "experts.gate_up", "F D -> expert F 1 D"),
  Rule(_MLP + "experts.{expert}.down_proj.weight", "experts.down", "D F -> expert F D"),
)


def _every_token(block: str, width: str, **conditions: Any) -> tuple[Rule, ...]:
  """Returns the rules of an MLP that all tokens pass through; `width` is its axis."""
  gate_up, w = "shared_expert.gate_up", width
  return (
    Rule(block + "gate_proj.weight", gate_up, f"{w} D -> {w} 0 D", **conditions),
    Rule(block + "up_proj.weight", gate_up, f"{w} D -> {w} 1 D", **conditions),
    Rule(block + "down_proj.weight", "shared_expert.down", f"D {w} -> {w} D", **conditions),
  )


# As in DeepSeek-V3.
_SHARED_AND_DENSE = (
  *_every_token(_MLP + "shared_experts.", "G", when="d_shared_expert"),
  *_every_token(_MLP, "P", dense=True),
)
_CORRECTION_BIAS = Rule(_MLP + "gate.e_score_correction_bias", "correction_bias", "E -> E")
_GLM4_MOE = (
  *_COMMON,
  *_QKV_BIASES,
  *_QK_NORMS_PER_HEAD,
  *_MLP_EXPERTS,
  *_SHARED_AND_DENSE,
  _CORRECTION_BIAS,
)
# Multi-head latent attention.
_LATENT = (
  *(rule for rule in _COMMON if "self_attn" not in rule.tensor),
  Rule(_ATTENTION + "q_proj.weight", "attention.query", "(H C) D -> H C D", unless="q_lora_rank"),
  Rule(_ATTENTION + "q_a_proj.weight", "attention.query_down", "Q D -> Q D", when="q_lora_rank"),
  Rule(_ATTENTION + "q_a_layernorm.weight", "attention.query_norm", "Q -> Q", when="q_lora_rank"),
  Rule(_ATTENTION + "q_b_proj.weight", "attention.query", "(H C) Q -> H C Q", when="q_lora_rank"),
  Rule(_ATTENTION + "kv_a_proj_with_mqa.weight", "attention.key_down", "W D -> W D"),
  Rule(_ATTENTION + "kv_a_layernorm.weight", "attention.key_norm", "Z -> Z"),
  *(
    Rule(
      _ATTENTION + "kv_b_proj.weight",
      f"attention.{name}_up",
      f"(H {width}) Z -> H {width} Z",
      layout=layout,
      rows=rows,
      rows_of=1,
    )
    for layout in (SEPARATE, FUSED)
    for name, width, rows in (("key", "A", ("", "X")), ("value", "X", ("A", "")))
  ),
  # In GGUF files, for absorbed products.
  Rule(_ATTENTION + "k_b_proj.weight", "attention.key_up", "H Z A -> H A Z", layout=SPLIT),
  Rule(_ATTENTION + "v_b_proj.weight", "attention.value_up", "H X Z -> H X Z", layout=SPLIT),
  Rule(_ATTENTION + "o_proj.weight", "attention.output", "D (H X) -> H X D"),
)
_DEEPSEEK = (
  *_LATENT,
  *_MLP_EXPERTS,
  *(dataclasses.replace(rule, layout=SPLIT) for rule in _MLP_EXPERTS if rule.layout == SEPARATE),
  *_SHARED_AND_DENSE,
)
_BAILING = _LAYER + "attention."


def _fused_qkv(tensor: str, parameter: str, axes: str, when: str | None = None) -> tuple[Rule, ...]:
  """Returns the rules of a tensor with the rows of queries, then keys, then values."""
  return tuple(
    Rule(
      _BAILING + tensor,
      f"attention.{name}{parameter}",
      f"({heads} C){axes} -> {heads} C{axes}",
      when,
      rows=rows,
    )
    for name, heads, rows in (
      ("query", "H", ("", "KK")),
      ("key", "K", ("H", "K")),
      ("value", "K", ("HK", "")),
    )
  )


def _mxfp4(
  tensor: str, parameter: str, pattern: str, stored: str, layout: str | None = SEPARATE
) -> Rule:
  return Rule(_MLP + tensor, parameter, pattern, when="expert_format", layout=layout, stored=stored)


def _split_gate_up(name: str, i: int) -> tuple[Rule, ...]:
  """Returns the rules of the gate (0) or up (1) projections of a GGUF file."""
  at, gate_up = f"experts.{name}", "experts.gate_up"
  return (
    Rule(
      f"{_MLP}{at}.weight", gate_up, f"E F D -> E F {i} D", unless="expert_format", layout=SPLIT
    ),
    _mxfp4(at + "_blocks", gate_up + ".codes", f"E F D -> E F {i} D", "blocks", SPLIT),
    _mxfp4(at + "_scales", gate_up + ".scales", f"E F M -> E F {i} M", "bytes", SPLIT),
    Rule(f"{_MLP}{at}.bias", gate_up + "_bias", f"E F -> E F {i}", layout=SPLIT),
  )


_GPT_OSS_EXPERTS = (
  Rule(
    _GATE_UP, "experts.gate_up", "E D (F U) -> E F U D", unless="expert_format", layout=SEPARATE
  ),
  Rule(_DOWN, "experts.down", "E F D -> E F D", unless="expert_format", layout=SEPARATE),
  _mxfp4("experts.gate_up_proj_blocks", "experts.gate_up.codes", "E (F U) D -> E F U D", "blocks"),
  _mxfp4("experts.gate_up_proj_scales", "experts.gate_up.scales", "E (F U) M -> E F U M", "bytes"),
  _mxfp4("experts.down_proj_blocks", "experts.down.codes", "E D F -> E F D", "blocks", None),
  _mxfp4("experts.down_proj_scales", "experts.down.scales", "E D N -> E N D", "bytes", None),
  Rule(_GATE_UP + "_bias", "experts.gate_up_bias", "E (F U) -> E F U", layout=SEPARATE),
  Rule(_DOWN + "_bias", "experts.down_bias", "E D -> E D", layout=SEPARATE),
  *_split_gate_up("gate_proj", 0),
  *_split_gate_up("up_proj", 1),
  Rule(_DOWN + ".weight", "experts.down", "E D F -> E F D", unless="expert_format", layout=SPLIT),
  Rule(_DOWN + ".bias", "experts.down_bias", "E D -> E D", layout=SPLIT),
)

_SPARSE = _LAYER + "block_sparse_moe."
_GRANITE = (
  *_COMMON,
  *_QKV_BIASES,
  _OUTPUT_BIAS,
  Rule(_SPARSE + "router.layer.weight", "router", "E D -> E D", layout=SEPARATE),
  Rule(_SPARSE + "input_linear.weight", "experts.gate_up", "E (U F) D -> E F U D", layout=SEPARATE),
  Rule(_SPARSE + "output_linear.weight", "experts.down", "E D F -> E F D", layout=SEPARATE),
  Rule(_SPARSE + "router.weight", "router", "E D -> E D", layout=FUSED),
  Rule(_SPARSE + "experts.gate_up_proj", "experts.gate_up", "E (U F) D -> E F U D", layout=FUSED),
  Rule(_SPARSE + "experts.down_proj", "experts.down", "E D F -> E F D", layout=FUSED),
  Rule(_SPARSE + "router.layer.weight", "router", "E D -> E D", layout=SPLIT),
  Rule(_SPARSE + "experts.gate_proj.weight", "experts.gate_up", "E F D -> E F 0 D", layout=SPLIT),
  Rule(_SPARSE + "experts.up_proj.weight", "experts.gate_up", "E F D -> E F 1 D", layout=SPLIT),
  Rule(_SPARSE + "experts.down_proj.weight", "experts.down", "E D F -> E F D", layout=SPLIT),
)
_SHARED_MLP = _LAYER + "shared_mlp."

FAMILIES: dict[str, tuple[Rule, ...]] = {
  "olmoe": (
    *_COMMON,
    Rule(_ATTENTION + "q_norm.weight", "attention.query_norm", "(H C) -> H C"),
    Rule(_ATTENTION + "k_norm.weight", "attention.key_norm", "(K C) -> K C"),
    *_MLP_EXPERTS,
  ),
  "emo": (
    *_WITHOUT_NORMS,
    Rule(_LAYER + "pre_attention_layernorm.weight", "attention_norm", "D -> D"),
    Rule(_LAYER + "pre_feedforward_layernorm.weight", "moe_norm", "D -> D"),
    *_QKV_BIASES,
    _OUTPUT_BIAS,
    Rule(_MLP + "gate.weight", "router", "E D -> E D", rows=("", "S")),
    *_SEPARATE_EXPERTS,
    *_every_token(_MLP + "experts.{shared}.", "G", when="d_shared_expert"),
  ),
  "mixtral": (*_COMMON, *_experts(_LAYER + "block_sparse_moe.", "w1", "w3", "w2")),
  "gpt_oss": (
    *_COMMON,
    *_QKV_BIASES,
    _OUTPUT_BIAS,
    Rule(_ATTENTION + "sinks", "attention.sinks", "H -> H"),
    Rule(_MLP + "router.weight", "router", "E D -> E D"),
    Rule(_MLP + "router.bias", "router_bias", "E -> E"),
    *_GPT_OSS_EXPERTS,
  ),
  "qwen2_moe": (
    *_COMMON,
    *_QKV_BIASES,
    *_MLP_EXPERTS,
    *_every_token(_MLP + "shared_expert.", "G"),
    Rule(_MLP + "shared_expert_gate.weight", "shared_expert.gate", "I D -> I D"),
  ),
  "qwen3_moe": (*_COMMON, *_QK_NORMS_PER_HEAD, *_MLP_EXPERTS),
  "deepseek_v2": _DEEPSEEK,
  "deepseek_v3": (*_DEEPSEEK, _CORRECTION_BIAS),
  "glm4_moe": _GLM4_MOE,
  "dots1": (*_GLM4_MOE, _OUTPUT_BIAS),
  # As published in github.com/inclusionAI/Ling-V2; not in transformers.
  "bailing_moe_v2": (
    Rule("model.word_embeddings.weight", "embedding", "V D -> V D"),
    Rule("model.norm.weight", "final_norm", "D -> D"),
    Rule("lm_head.weight", "unembedding", "V D -> V D"),
    *_NORMS,
    *_fused_qkv("query_key_value.weight", "", " D"),
    *_fused_qkv("query_key_value.bias", "_bias", "", when="qkv_bias"),
    Rule(_BAILING + "dense.weight", "attention.output", "D (H C) -> H C D"),
    Rule(_BAILING + "dense.bias", "attention.output_bias", "D -> D", when="output_bias"),
    Rule(_BAILING + "query_layernorm.weight", "attention.query_norm", "C -> C", when="qk_norm"),
    Rule(_BAILING + "key_layernorm.weight", "attention.key_norm", "C -> C", when="qk_norm"),
    Rule(_MLP + "gate.weight", "router", "E D -> E D"),
    Rule(_MLP + "gate.expert_bias", "correction_bias", "E -> E"),
    *_SEPARATE_EXPERTS,
    *_SHARED_AND_DENSE,
  ),
  "granitemoe": _GRANITE,
  "granitemoeshared": (
    *_GRANITE,
    *(
      Rule(
        _SHARED_MLP + "input_linear.weight",
        "shared_expert.gate_up",
        "(U G) D -> G U D",
        when="d_shared_expert",
        layout=layout,
      )
      for layout in (SEPARATE, FUSED)
    ),
    *(
      Rule(
        f"{_SHARED_MLP}{name}_proj.weight",
        "shared_expert.gate_up",
        f"G D -> G {i} D",
        when="d_shared_expert",
        layout=SPLIT,
      )
      for i, name in enumerate(("gate", "up"))
    ),
    Rule(
      _SHARED_MLP + "output_linear.weight",
      "shared_expert.down",
      "D G -> G D",
      when="d_shared_expert",
    ),
  ),
  "llama": _DENSE,
  "mistral": _DENSE,
  "qwen2": _DENSE,
  "qwen3": (*_DENSE, *_QK_NORMS_PER_HEAD),
}
