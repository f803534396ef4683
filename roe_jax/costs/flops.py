"""FLOPs of a roster for one text, and how many experts its rows choose."""

from roe_jax.config import ModelConfig
from roe_jax.roster import Roster


def forward_flops(
  config: ModelConfig, roster: Roster, positions: range, predict: bool = True
) -> int:
  """FLOPs of a roster's matmuls at some positions of one text.

  A multiplication and an addition are two. Norms, softmax, rotations and the
  noise are left out. Layers before the first noise are computed once for all
  members.

  Args:
    config: the model's architecture.
    roster: the settings. One that recomputes is counted as if it had a cache.
    positions: consecutive; each sees those before it, in sliding layers the last
      of them, and itself.
    predict: whether distributions are computed, or the cache is filled only.
  """
  first, members = roster.noisy_layers[0], len(roster.members)
  once, of_members = (
    len(positions) * len(layers) * _layer_flops(config)
    + sum(
      attention_flops(config) * sum(seen_by(config, layer, p) for p in positions)
      for layer in layers
    )
    for layers in (range(first), range(first, config.num_layers))
  )
  head = 2 * config.vocab_size * config.d_model * len(positions) if predict else 0
  return once + members * (of_members + head)


def generation_flops(
  config: ModelConfig, roster: Roster, prompt_length: int, num_new_tokens: int
) -> int:
  """FLOPs of a prompt's prefill and of a step for each new token; see `forward_flops`."""
  last = prompt_length - 1
  return forward_flops(config, roster.history(), range(last), predict=False) + forward_flops(
    config, roster, range(last, last + num_new_tokens)
  )


def scoring_flops(config: ModelConfig, roster: Roster, length: int, start: int = 1) -> int:
  """FLOPs of scoring a text's tokens from index `start` on; see `forward_flops`.

  Against a Clean Cache all positions are run twice, clean to fill it and then as a
  roster.
  """
  filled_first = roster.cache == "clean" and not roster.is_baseline
  return forward_flops(
    config, roster.history(), range(length - 1 if filled_first else start - 1), predict=False
  ) + forward_flops(config, roster, range(start - 1, length - 1))


def _layer_flops(config):
  """Of one position in one layer, without attention to other positions."""
  return (
    projection_flops(config)
    + 2 * config.num_experts * config.d_model
    + config.experts_per_token * 6 * config.d_model * config.d_expert
    + shared_expert_flops(config)
  )


def projection_flops(config: ModelConfig) -> int:
  """Of one position in one layer: to queries, keys and values, and back."""
  return 4 * config.d_model * config.head_dim * (config.num_heads + config.num_kv_heads)


def shared_expert_flops(config: ModelConfig) -> int:
  """Of one position in one layer; 0 without such an expert."""
  width = config.d_shared_expert
  return (6 * width + 2) * config.d_model if width else 0


def attention_flops(config: ModelConfig) -> int:
  """Scores and mixed values of one position and one that it sees."""
  return 4 * config.num_heads * config.head_dim


def seen_by(config: ModelConfig, layer: int, position: int) -> int:
  """How many positions a row sees in a layer, itself included."""
  seen = position + 1
  return min(seen, config.sliding_window) if layer in config.sliding_layers else seen


def expected_unique_experts(
  config: ModelConfig, num_members: int, num_rows: int = 1, overlap: float | None = None
) -> float:
  """Different experts of a layer that are expected to be chosen.

  Without a measured overlap all rows choose uniformly and independently, by which
  `E (1 - (1 - A/E)^rows)` are hit. Of all ways of independent rows that
  is the most; real routing is skewed, and members of one row are alike. With an
  overlap, noisy members choose that share of their experts among the clean
  member's A, and the others uniformly among the rest; rows stay independent.

  Args:
    config: the model's architecture.
    num_members: of the roster, the clean one among them.
    num_rows: texts times positions.
    overlap: between 0 and 1, the share of a noisy member's experts that the clean
      member has chosen, too.
  """
  e, a = config.num_experts, config.experts_per_token
  if overlap is None:
    overlap = a / e
  of_row = a
  if a < e:
    of_row += (e - a) * (1 - (1 - (1 - overlap) * a / (e - a)) ** (num_members - 1))
  return e * (1 - (1 - of_row / e) ** num_rows)
