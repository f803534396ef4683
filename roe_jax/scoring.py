"""Teacher-forced scoring: log-probabilities of given sequences, and perplexity."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import batching, prefill, reference, sharding
from roe_jax import members as members_lib
from roe_jax import params as params_lib
from roe_jax.cache import KVCache
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster


@dataclasses.dataclass(frozen=True)
class SequenceScore:
  """Scores of one text's tokens from its start on.

  Attributes:
    log_probs: `[X, G]` float32, of each scored token at each output
      temperature.
    greedy_tokens: `[X]` int32, the most probable token in each place.
    greedy_log_probs: `[X, G]` float32, of that token.
    clean_greedy_tokens: `[X]` int32, that of the clean member (-1 where it is
      not computed).
    candidate_log_probs: `[K, G]` float32, of each candidate for the last place.
  """

  log_probs: np.ndarray
  greedy_tokens: np.ndarray
  greedy_log_probs: np.ndarray
  clean_greedy_tokens: np.ndarray
  candidate_log_probs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores in the order of the sequences, and the settings that made them."""

  sequences: list[SequenceScore]
  settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Perplexity:
  """Perplexity of one long text.

  Attributes:
    perplexity: exp of the mean negative log-probability, `[G]`.
    nll: `[X, G]` float32, negative log-probability of each scored token, nats.
    num_windows: how many windows the text was cut into.
    settings: of the roster, and window and stride.
  """

  perplexity: np.ndarray
  nll: np.ndarray
  num_windows: int
  settings: dict[str, Any]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def score_chunk(
  params: Params,
  config: ModelConfig,
  roster: Roster,
  cache: KVCache | None,
  tokens_BxT: jax.Array,
  targets_BxT: jax.Array,
  starts_B: jax.Array,
  request_ids_B: jax.Array,
  output_temperatures_G: jax.Array,
  candidates_BxK: jax.Array | None = None,
) -> tuple[KVCache | None, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """Scores targets, and candidates in their place, at T consecutive positions of each text.

  Under Clean Cache with a roster the (donated) cache must hold all earlier
  clean keys and values, which stay as they are. Otherwise the chunk is part of
  a pass over the whole text, which writes the cache.

  Returns:
    The cache, log-probabilities `[B, T, G]`, the most probable tokens of
    the roster `[B, T]` with their log-probabilities `[B, T, G]`, those of the
    clean member `[B, T]`, and log-probabilities of the candidates, `[B, T, K, G]`.
  """
  positions = starts_B[:, None] + jnp.arange(tokens_BxT.shape[1])[None]
  if roster.recompute:
    x = reference.member_states(params, config, roster, tokens_BxT, request_ids_B)
    outputs = members_lib.aggregate(params, config, roster, x)
  elif _filled_first(roster):
    outputs, _ = members_lib.against_clean_cache(
      params, config, roster, cache, tokens_BxT, positions, request_ids_B
    )
  else:
    cache, x = members_lib.prefill_cache(
      params, config, roster, cache, tokens_BxT, positions, request_ids_B
    )
    outputs = members_lib.aggregate(params, config, roster, x)
  log_probs = outputs.log_probs

  greedy = jnp.argmax(log_probs, axis=-1)
  wanted = jnp.stack([targets_BxT, greedy], axis=-1)
  if candidates_BxK is not None:
    shape = (*targets_BxT.shape, candidates_BxK.shape[1])
    wanted = jnp.concatenate([wanted, jnp.broadcast_to(candidates_BxK[:, None], shape)], axis=-1)

  def at_temperature(temperature):
    scaled = log_probs / temperature
    chosen = jnp.take_along_axis(scaled, wanted, axis=-1)
    return chosen - jax.nn.logsumexp(scaled, axis=-1, keepdims=True)

  scores = jnp.moveaxis(jax.lax.map(at_temperature, output_temperatures_G), 0, -1)
  # Whole on every device, as every process of several reads them.
  return cache, *sharding.with_sharding_constraint(
    params, (scores[..., 0, :], greedy, scores[..., 1, :], outputs.clean_tokens, scores[..., 2:, :])
  )


def _filled_first(roster):
  """Whether positions are scored in parallel against a cache filled before."""
  return roster.cache == "clean" and not roster.is_baseline


def score(
  params: Params,
  config: ModelConfig,
  sequences: Sequence[Sequence[int]],
  starts: Sequence[int] | None = None,
  *,
  roster: Roster | None = None,
  request_ids: Sequence[int] | None = None,
  output_temperatures: Sequence[float] = (1.0,),
  candidates: Sequence[Sequence[int]] | None = None,
  batch_size: int = 16,
  min_shape: tuple[int, int] = (1, prefill.MIN_CAPACITY),
  chunk_size: int | None = None,
  on_batch: Callable[[int], None] = lambda count: None,
) -> Scores:
  """Log-probability of each token of each text from its start on.

  The probability of a token is the one that `decode.generate` would choose it
  from, with the same settings and request id, to rounding: neither batching
  nor chunking matters. As the last token is only predicted, a text may have one
  more than the model's context.

  Args:
    params: the model's parameters.
    config: its architecture.
    sequences: token ids.
    starts: index of the first token scored in each text, at least 1 (the first
      token has no predecessor to predict it); 1 by default.
    roster: the settings; the plain model by default.
    request_ids: see `decode.generate`.
    output_temperatures: `[G]` divisors of the aggregated log-probabilities
      (renormalized); the calibration of one temperature is read off a grid.
    candidates: tokens that are scored, too, in the place of each text's last one:
      choices that differ in their last token cost as much as one.
    batch_size: sequences scored together.
    min_shape: rows and positions that a batch is padded to at least, so that
      batches of different sizes and lengths share compiled programs.
    chunk_size: positions scored together; by default what the roster's memory
      budget holds.
    on_batch: called with the number of sequences in each finished batch.

  Raises:
    ValueError: a text is empty, too long or outside the vocabulary, or a
      setting is out of its range.
  """
  params = params_lib.in_storage_dtype(params)
  roster = roster or Roster.create(config)
  roster.check(config)
  batching.check_tokens(config, sequences, room=-1, what="text")
  if candidates is not None:
    if len(candidates) != len(sequences):
      raise ValueError(f"got candidates for {len(candidates)} of {len(sequences)} sequences")
    for i, some in enumerate(candidates):
      batching.check_tokens(config, [[token] for token in some], what=f"text {i}: candidate")
  starts = [1] * len(sequences) if starts is None else list(starts)
  if len(starts) != len(sequences):
    raise ValueError(f"got {len(starts)} starts for {len(sequences)} sequences")
  for i, (text, start) in enumerate(zip(sequences, starts)):
    if not 1 <= start <= len(text):
      raise ValueError(
        f"the first scored token of text {i} must have an index in [1, {len(text)}], got {start}"
      )
  temperatures = np.asarray(output_temperatures, np.float32)
  if (
    temperatures.ndim != 1
    or temperatures.size == 0
    or not np.all(np.isfinite(temperatures) & (temperatures > 0))
  ):
    raise ValueError(
      f"output_temperatures must be a list of positive numbers, got {output_temperatures}"
    )
  if batch_size < 1 or (chunk_size is not None and chunk_size < 1):
    raise ValueError("batch_size and chunk_size must be at least 1")
  ids = batching.request_ids(request_ids, len(sequences))
  scored = []
  for first in range(0, len(sequences), batch_size):
    batch = slice(first, first + batch_size)
    scored += _score_batch(
      params,
      config,
      sequences[batch],
      starts[batch],
      roster,
      ids[batch],
      jnp.asarray(temperatures),
      candidates and candidates[batch],
      min_shape,
      chunk_size,
    )
    on_batch(len(sequences[batch]))
  return Scores(
    scored,
    {
      "roster": roster.settings(),
      "output_temperatures": [float(t) for t in output_temperatures],
      "model": dataclasses.asdict(config),
    },
  )


def _score_batch(
  params,
  config,
  sequences,
  starts,
  roster,
  request_ids,
  temperatures,
  candidates,
  min_shape,
  chunk_size,
):
  batch_size = batching.bucket(len(sequences), min_shape[0])
  longest = max(map(len, sequences))
  capacity = batching.bucket(longest - 1, min_shape[1])
  tokens = batching.pad(sequences, batch_size, capacity + 1)
  ids = np.zeros(batch_size, np.uint32)
  ids[: len(sequences)] = request_ids
  ids = jnp.asarray(ids)
  counts = [0] * len(sequences) if candidates is None else [len(c) for c in candidates]
  if candidates is not None:
    candidates = batching.pad(candidates, batch_size, batching.power_of_two(max(counts)))
  cache = batching.init_sharded(
    params,
    members_lib.empty_cache,
    config,
    roster,
    batch_size=batch_size,
    capacity=capacity,
    whole=_filled_first(roster),
  )
  # The token at index i is predicted at position i - 1.
  offsets = np.zeros(batch_size, np.int32)
  ends = np.zeros(batch_size, np.int32)
  ends[: len(sequences)] = [len(t) - 1 for t in sequences]
  begins = np.zeros(batch_size, np.int32)
  begins[: len(sequences)] = [s - 1 for s in starts]
  if roster.recompute:
    chunk_size = capacity
  elif _filled_first(roster):
    cache = prefill.fill_cache(
      params, config, roster, cache, tokens[:, :capacity], longest - 1, ids
    )
    offsets = begins
  needed = int(np.max(ends - offsets))
  chunk = chunk_size or default_chunk_size(config, roster, batch_size, needed)
  found = [[] for _ in sequences]
  earliest = int(begins[: len(sequences)].min())
  for step in range(0, needed, chunk):
    if not (roster.recompute or _filled_first(roster)) and step + chunk <= earliest:
      cache = prefill.prefill_chunk(
        params,
        config,
        roster.history(),
        cache,
        tokens[:, step : step + chunk],
        jnp.asarray(offsets + step),
        ids,
      )
      continue
    columns = (offsets + step)[:, None] + np.arange(chunk)
    inputs = jnp.take_along_axis(tokens, jnp.minimum(columns, capacity), axis=1)
    targets = jnp.take_along_axis(tokens, jnp.minimum(columns + 1, capacity), axis=1)
    cache, *results = score_chunk(
      params,
      config,
      roster,
      cache,
      inputs,
      targets,
      jnp.asarray(offsets + step),
      ids,
      temperatures,
      candidates,
    )
    results = [np.asarray(r) for r in results]
    for row in range(len(sequences)):
      low = max(0, begins[row] - offsets[row] - step)
      high = min(chunk, ends[row] - offsets[row] - step)
      if low < high:
        found[row].append([r[row, low:high] for r in results])
  return [_joined(pieces, len(temperatures), count) for pieces, count in zip(found, counts)]


def _joined(pieces, num_temperatures, num_candidates):
  if not pieces:
    none, no_tokens = np.zeros((0, num_temperatures), np.float32), np.zeros(0, np.int32)
    return SequenceScore(none, no_tokens, none, no_tokens, none)
  *parts, candidates = (np.concatenate(part) for part in zip(*pieces))
  return SequenceScore(*parts, candidates[-1, :num_candidates])


def default_chunk_size(
  config: ModelConfig, roster: Roster, batch_size: int, needed: int, platform: str | None = None
) -> int:
  """How many positions are scored together.

  The largest power of two, at most 256, of which the budget holds a member's
  chunk and little is padding: few shapes to compile.

  Args:
    config: the model's architecture.
    roster: the settings.
    batch_size: sequences scored together.
    needed: positions of the longest of them.
    platform: see `members.tokens_within_budget`.
  """
  within = members_lib.tokens_within_budget(config, roster.memory_budget, platform)
  fitting = max(1, within // batch_size)
  return min(
    prefill.PREFILL_CHUNK,
    1 << (fitting.bit_length() - 1),
    batching.power_of_two(needed // 4 + 1, 16),
  )


@dataclasses.dataclass(frozen=True)
class Windows:
  """A long text cut into sequences that `score` can take.

  Attributes:
    sequences: token ids of each window.
    starts: where each begins to score.
    window: tokens in a window.
    stride: tokens from one window's start to the next.
  """

  sequences: list[list[int]]
  starts: list[int]
  window: int
  stride: int


def windows(
  config: ModelConfig, text: Sequence[int], window: int | None = None, stride: int | None = None
) -> Windows:
  """Cuts a text as `perplexity` does, whose arguments these are.

  Raises:
    ValueError: the text is too short, or a setting is out of its range.
  """
  window = config.context_length if window is None else window
  if not 2 <= window <= config.context_length:
    raise ValueError(
      f"window must lie in [2, {config.context_length}] (the model's context), got {window}"
    )
  stride = max(1, window // 2) if stride is None else stride
  if not 1 <= stride < window:
    raise ValueError(f"stride must lie in [1, {window - 1}] (less than the window), got {stride}")
  if len(text) < 2:
    raise ValueError(f"a perplexity needs at least two tokens, got {len(text)}")
  sequences, starts, scored_to = [], [], 1
  for begin in range(0, len(text), stride):
    end = min(begin + window, len(text))
    sequences.append(list(text[begin:end]))
    starts.append(scored_to - begin)
    scored_to = end
    if end == len(text):
      break
  return Windows(sequences, starts, window, stride)


def perplexity(
  params: Params,
  config: ModelConfig,
  text: Sequence[int],
  *,
  window: int | None = None,
  stride: int | None = None,
  roster: Roster | None = None,
  output_temperatures: Sequence[float] = (1.0,),
  batch_size: int = 8,
  chunk_size: int | None = None,
  on_batch: Callable[[int], None] = lambda count: None,
) -> Perplexity:
  """Perplexity of a text of any length, by strided windows.

  Windows of `window` tokens start every `stride` tokens; each scores the
  tokens that no earlier window has scored, so that every token but the first
  is scored once, with at least `window - stride` tokens of context (fewer only
  at the text's beginning). A window is a text of its own: its positions count
  from 0, and its request id is its index.

  Args:
    params: the model's parameters.
    config: its architecture.
    text: token ids, at least two.
    window: tokens in a window, at most the model's context, which is the
      default.
    stride: tokens from one window's start to the next, in [1, window - 1]; half
      a window by default.
    roster: see `score`.
    output_temperatures: see `score`.
    batch_size: windows scored together.
    chunk_size: see `score`.
    on_batch: see `score`.

  Raises:
    ValueError: the text is too short, or a setting is out of its range.
  """
  cut = windows(config, text, window, stride)
  scores = score(
    params,
    config,
    cut.sequences,
    cut.starts,
    roster=roster,
    output_temperatures=output_temperatures,
    batch_size=batch_size,
    chunk_size=chunk_size,
    on_batch=on_batch,
  )
  nll = -np.concatenate([s.log_probs for s in scores.sequences])
  return Perplexity(
    np.exp(nll.mean(axis=0, dtype=np.float64)),
    nll,
    len(cut.sequences),
    scores.settings | {"window": cut.window, "stride": cut.stride},
  )


def mean_nll(scores: Scores) -> np.ndarray:
  """Mean negative log-probability over all scored tokens, `[G]`, nats."""
  nll = -np.concatenate([s.log_probs for s in scores.sequences])
  if not math.prod(nll.shape):
    raise ValueError("no token was scored")
  return nll.mean(axis=0, dtype=np.float64)
