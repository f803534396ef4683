"""Teacher-forced scoring: log-probabilities of sequences, and perplexity."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import batching, prefill, sharding
from roe_jax import members as members_lib
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.numerics import NonFiniteLogits, naming_sequences
from roe_jax.params import Params
from roe_jax.roster import Roster


@dataclasses.dataclass(frozen=True)
class SequenceScore:
  """Scores of one sequence's tokens, X from its start on, at G output temperatures.

  Attributes:
    log_probs: `[X, G]` float32, log-probability of each scored token.
    greedy_tokens: `[X]` int32, the most probable token at each scored position.
    greedy_log_probs: `[X, G]` float32, its log-probability.
    clean_greedy_tokens: `[X]` int32, the clean member's most probable token (-1 if that
      member is not computed).
    members: `[X]` int32, how many members were computed at each scored position.
    candidate_log_probs: `[K, G]` float32, log-probability of each candidate last token.
  """

  log_probs: np.ndarray
  greedy_tokens: np.ndarray
  greedy_log_probs: np.ndarray
  clean_greedy_tokens: np.ndarray
  members: np.ndarray
  candidate_log_probs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores in the order of the sequences, and the settings used."""

  sequences: list[SequenceScore]
  settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Perplexity:
  """Perplexity of one long sequence.

  Attributes:
    perplexity: `[G]`, exp of the mean negative log-probability.
    nll: `[X, G]` float32, negative log-probability of each scored token, in nats.
    num_windows: number of windows.
    settings: the settings of `Scores`, window and stride.
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
  cache: Any,
  tokens_BxT: jax.Array,
  targets_BxT: jax.Array,
  starts_B: jax.Array,
  request_ids_B: jax.Array,
  output_temperatures_G: jax.Array | None,
  candidates_BxK: jax.Array | None = None,
  needed_BxT: jax.Array | None = None,
) -> tuple[Any, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """Scores targets, and candidates in their place, at T positions of each sequence.

  See `CacheMode.score` for what the (donated) cache must hold. Without output temperatures
  (G = 1, a temperature of 1) nothing is renormalized. `needed_BxT` is that of `RosterPass`.

  Returns:
    The cache, log-probabilities `[B, T, G]`, the roster's most probable tokens `[B, T]`
    and their log-probabilities `[B, T, G]`, the clean member's `[B, T]`, how many members were
    computed `[B, T]`, and log-probabilities of the candidates `[B, T, K, G]`.
  """
  positions = starts_B[:, None] + jnp.arange(tokens_BxT.shape[1])[None]
  run = members_lib.RosterPass(params, config, roster, tokens_BxT, positions, request_ids_B)
  run = run.replace(needed_BxT=needed_BxT)
  outputs, cache = roster.cache_mode.score(run, cache)
  log_probs = outputs.log_probs

  greedy = jnp.argmax(log_probs, axis=-1)
  wanted = jnp.stack([targets_BxT, greedy], axis=-1)
  if candidates_BxK is not None:
    shape = (*targets_BxT.shape, candidates_BxK.shape[1])
    wanted = jnp.concatenate([wanted, jnp.broadcast_to(candidates_BxK[:, None], shape)], axis=-1)

  chosen = jnp.take_along_axis(log_probs, wanted, axis=-1)[..., None]
  if output_temperatures_G is None:
    scores = chosen
  else:

    def log_total(temperature):
      return jax.nn.logsumexp(log_probs / temperature, axis=-1, keepdims=True)

    log_totals = jnp.moveaxis(jax.lax.map(log_total, output_temperatures_G), 0, -1)
    scores = chosen / output_temperatures_G.reshape(1, 1, 1, -1) - log_totals
  # Replicated: every process reads them.
  of_clean = outputs.clean_tokens, outputs.members
  found = scores[..., 0, :], greedy, scores[..., 1, :], *of_clean, scores[..., 2:, :]
  return cache, *sharding.with_sharding_constraint(params, found)


def log_probs(
  params: Params,
  config: ModelConfig,
  tokens_BxT: jax.Array,
  roster: Roster,
  request_ids_B: jax.Array | None = None,
) -> jax.Array:
  """Computes a roster's distributions at all positions; pure, for use inside `jax.jit`.

  Args:
    params: the model's parameters.
    config: its architecture.
    tokens_BxT: int32 tokens from position 0 on, padded on the right.
    roster: the settings; temperatures, seed and router bias may be traced.
    request_ids_B: uint32 addresses of the noise; 0, 1, ... by default.

  Returns:
    Log-probabilities of the next token, float32 `[B, T, V]`.
  """
  b, t = tokens_BxT.shape
  ids = jnp.arange(b, dtype=jnp.uint32) if request_ids_B is None else request_ids_B
  positions = jnp.broadcast_to(jnp.arange(t), (b, t))
  run = members_lib.RosterPass(params, config, roster, tokens_BxT, positions, ids)
  mode = roster.cache_mode
  cache = mode.empty(config, roster, b, t, rerun=t)
  if mode.fills_first(roster):
    cache = mode.prefill(run.replace(roster=roster.history()), cache)
  return mode.score(run, cache)[0].log_probs


def score(
  params: Params,
  config: ModelConfig,
  sequences: Sequence[Sequence[int]],
  starts: Sequence[int] | None = None,
  *,
  roster: Roster | None = None,
  **options: Any,
) -> Scores:
  """Computes the log-probability of each token of each sequence from its start on.

  A token's probability is the one that `decode.generate` samples it with, given the same
  settings and request id, up to rounding: batching and chunking do not matter. Since the
  last token is only predicted, a sequence may have one more than the model's context.

  Args:
    params: the model's parameters.
    config: its architecture.
    sequences: token ids.
    starts: index of the first scored token of each sequence, at least 1 (nothing predicts
      the first token); 1 by default.
    roster: the settings; the baseline by default.
    **options: of `score_rosters`.

  Raises:
    ValueError, NonFiniteLogits: as `score_rosters`.
  """
  roster = roster or Roster.create(config)
  return score_rosters(params, config, sequences, [roster], starts, **options)[0]


def score_rosters(
  params: Params,
  config: ModelConfig,
  sequences: Sequence[Sequence[int]],
  rosters: Sequence[Roster],
  starts: Sequence[int] | None = None,
  *,
  request_ids: Sequence[int] | None = None,
  output_temperatures: Sequence[float] = (1.0,),
  candidates: Sequence[Sequence[int]] | None = None,
  batch_size: int = 16,
  min_shape: tuple[int, int] = (1, prefill.MIN_CAPACITY),
  chunk_size: int | None = None,
  on_batch: Callable[[int], None] = lambda count: None,
) -> list[Scores]:
  """Computes what `score` does for several rosters, each batch with all of them.

  Rosters with a Clean Cache attend to one, which is filled once for each batch: where few tokens
  of long sequences are scored, a roster more costs little.

  Args:
    params, config, sequences, starts: see `score`.
    rosters: the settings.
    request_ids: see `decode.generate`.
    output_temperatures: `[G]` divisors of the aggregated log-probabilities
      (renormalized); several at once are cheap, to calibrate the temperature.
    candidates: alternatives to the last token of each sequence, scored too: choices that
      differ in their last token cost as much as one.
    batch_size: sequences scored together.
    min_shape: minimum batch size and length to pad to, so that different batches share
      compiled programs.
    chunk_size: positions scored together; by default what fits the roster's memory budget.
    on_batch: called with the number of sequences in each finished batch.

  Raises:
    ValueError: a sequence is empty, too long or has a token outside the vocabulary, or a
      setting is out of range.
    NonFiniteLogits: logits are NaN or infinite.
  """
  params = params_lib.in_storage_dtype(params)
  for roster in rosters:
    roster.check(config)
  batching.check_tokens(config, sequences, room=-1, what="sequence")
  if candidates is not None:
    if len(candidates) != len(sequences):
      raise ValueError(f"got candidates for {len(candidates)} of {len(sequences)} sequences")
    for i, some in enumerate(candidates):
      batching.check_tokens(config, [[token] for token in some], what=f"sequence {i}: candidate")
  starts = [1] * len(sequences) if starts is None else list(starts)
  if len(starts) != len(sequences):
    raise ValueError(f"got {len(starts)} starts for {len(sequences)} sequences")
  for i, (sequence, start) in enumerate(zip(sequences, starts)):
    if not 1 <= start <= len(sequence):
      raise ValueError(f"the start of sequence {i} must lie in [1, {len(sequence)}], got {start}")
  temperatures = np.asarray(output_temperatures, np.float32)
  positive = np.isfinite(temperatures) & (temperatures > 0)
  if temperatures.ndim != 1 or temperatures.size == 0 or not positive.all():
    raise ValueError(
      f"output_temperatures must be a list of positive numbers, got {output_temperatures}"
    )
  if batch_size < 1 or (chunk_size is not None and chunk_size < 1):
    raise ValueError("batch_size and chunk_size must be at least 1")
  ids = batching.request_ids(request_ids, len(sequences))
  score_batch = functools.partial(
    _score_batch,
    params,
    config,
    rosters,
    None if np.all(temperatures == 1) and len(temperatures) == 1 else jnp.asarray(temperatures),
    min_shape,
    chunk_size,
  )
  scored = [[] for _ in rosters]
  for first in range(0, len(sequences), batch_size):
    batch = slice(first, first + batch_size)
    some = candidates and candidates[batch]
    with naming_sequences(range(first, first + batch_size)):
      found = score_batch(sequences[batch], starts[batch], ids[batch], some)
    for of_roster, more in zip(scored, found):
      of_roster += more
    on_batch(len(sequences[batch]))
  also = {
    "output_temperatures": [float(t) for t in output_temperatures],
    "model": dataclasses.asdict(config),
  }
  return [
    Scores(of_roster, {"roster": roster.settings(), **also})
    for roster, of_roster in zip(rosters, scored)
  ]


def _score_batch(
  params, config, rosters, temperatures, min_shape, chunk_size, sequences, starts, ids, candidates
):
  """Returns for each roster the `SequenceScore` of each sequence."""
  count, longest = len(sequences), max(map(len, sequences))
  batch_size = batching.bucket(count, min_shape[0])
  capacity = batching.bucket(longest - 1, min_shape[1])
  tokens = batching.pad(sequences, batch_size, capacity + 1)
  num_candidates = [0] * count if candidates is None else [len(c) for c in candidates]
  if candidates is not None:
    width = batching.power_of_two(max(num_candidates))
    candidates = batching.pad(candidates, batch_size, width)
  # The token at index i is predicted at position i - 1.
  padded_ids = np.zeros(batch_size, np.uint32)
  padded_ids[:count] = ids
  begins, ends = np.zeros((2, batch_size), np.int32)
  begins[:count] = [s - 1 for s in starts]
  ends[:count] = [len(s) - 1 for s in sequences]
  ids, earliest = jnp.asarray(padded_ids), int(begins[:count].min())
  mesh = sharding.mesh_of(params.layers)
  num_temperatures = 1 if temperatures is None else len(temperatures)
  found: list[list[SequenceScore]] = [[]] * len(rosters)
  cache = history = None
  # Those that only read the cache come first.
  for i in sorted(range(len(rosters)), key=lambda i: not _fills_first(rosters[i])):
    roster = rosters[i]
    fills_first = _fills_first(roster)
    if history is None or history != _shared_history(roster):
      cache = batching.init_sharded(
        params,
        members_lib.empty_cache,
        config,
        roster,
        batch_size=batch_size,
        capacity=capacity,
        rerun=capacity * fills_first,
      )
      history = None
      if fills_first:
        prompts = tokens[:, :capacity]
        cache = prefill.fill_cache(params, config, roster, cache, prompts, longest - 1, ids)
        history = _shared_history(roster)
    offsets = np.zeros_like(begins) if history is None else begins
    needed = int(np.max(ends - offsets))
    chunk = chunk_size or default_chunk_size(config, roster, batch_size, needed, mesh)
    pieces = [[] for _ in sequences]
    for step in range(0, needed, chunk):
      first = jnp.asarray(offsets + step)
      if history is None and step + chunk <= earliest:
        inputs = tokens[:, step : step + chunk]
        cache = prefill.prefill_chunk(params, config, roster.history(), cache, inputs, first, ids)
        continue
      columns = (offsets + step)[:, None] + np.arange(chunk)
      inputs = jnp.take_along_axis(tokens, jnp.minimum(columns, capacity), axis=1)
      targets = jnp.take_along_axis(tokens, jnp.minimum(columns + 1, capacity), axis=1)
      wanted = jnp.asarray((columns >= begins[:, None]) & (columns < ends[:, None]))
      settings = temperatures, candidates, wanted
      cache, *results = score_chunk(
        params, config, roster, cache, inputs, targets, first, ids, *settings
      )
      results = [np.asarray(r) for r in results]
      for b in range(count):
        low = max(0, begins[b] - offsets[b] - step)
        high = min(chunk, ends[b] - offsets[b] - step)
        if low < high:
          pieces[b].append([r[b, low:high] for r in results])
          # The greatest one: a single token may have probability zero.
          finite = np.isfinite(results[2][b, low:high]).all(axis=-1)
          if not finite.all():
            raise NonFiniteLogits(b, int(columns[b, low + np.argmin(finite)]))
    found[i] = [_joined(some, num_temperatures, k) for some, k in zip(pieces, num_candidates)]
  return found


def _fills_first(roster):
  return roster.cache_mode.fills_first(roster)


def _shared_history(roster):
  """Returns what the roster's history depends on, if all members share it; else None."""
  if not roster.cache_mode.is_shared:
    return None
  of_noise = {"temperatures": None, "seed": None, "noisy_layers": None}
  return roster.history().settings() | of_noise


def _joined(pieces, num_temperatures, num_candidates):
  if not pieces:
    none, no_tokens = np.zeros((0, num_temperatures), np.float32), np.zeros(0, np.int32)
    return SequenceScore(none, no_tokens, none, no_tokens, no_tokens, none)
  *parts, candidates = (np.concatenate(part) for part in zip(*pieces))
  return SequenceScore(*parts, candidate_log_probs=candidates[-1, :num_candidates])


def default_chunk_size(
  config: ModelConfig,
  roster: Roster,
  batch_size: int,
  needed: int,
  mesh: sharding.AnyMesh | None = None,
  platform: str | None = None,
) -> int:
  """Returns how many positions to score together.

  The largest power of two, at most 256, that fits the memory budget for one member with
  little padding, of those below 16 only 1 and 4: few shapes to compile. Without a history all:
  each chunk computes the whole sequence again.

  Args:
    config: the model's architecture.
    roster: the settings.
    batch_size: sequences scored together.
    needed: positions to score in the longest of them.
    mesh: the mesh that they run on, if any.
    platform: see `members.tokens_within_budget`.
  """
  if not roster.cache_mode.keeps_history:
    return batching.bucket(needed)
  within = members_lib.tokens_within_budget(config, roster.memory_budget, platform)
  of_members, of_sequences = members_lib.token_shards(mesh, 1, batch_size)
  fitting = max(1, within * of_members * of_sequences // batch_size)
  fewest = next((size for size in (1, 4) if needed <= size), 16)
  return min(
    prefill.PREFILL_CHUNK,
    1 << (fitting.bit_length() - 1),
    batching.power_of_two(needed // 4 + 1, fewest),
  )


@dataclasses.dataclass(frozen=True)
class Windows:
  """A long sequence cut into windows for `score`.

  Attributes:
    sequences: token ids of each window.
    starts: index of the first scored token in each.
    window: tokens per window.
    stride: tokens from one window's start to the next.
  """

  sequences: list[list[int]]
  starts: list[int]
  window: int
  stride: int


def windows(
  config: ModelConfig, tokens: Sequence[int], window: int | None = None, stride: int | None = None
) -> Windows:
  """Cuts a sequence into windows; see `perplexity`, which takes the same arguments.

  Raises:
    ValueError: the sequence is too short, or a setting is out of range.
  """
  window = config.context_length if window is None else window
  if not 2 <= window <= config.context_length:
    raise ValueError(
      f"window must lie in [2, {config.context_length}] (the model's context), got {window}"
    )
  stride = max(1, window // 2) if stride is None else stride
  if not 1 <= stride < window:
    raise ValueError(f"stride must lie in [1, {window - 1}] (less than the window), got {stride}")
  if len(tokens) < 2:
    raise ValueError(f"perplexity needs at least two tokens, got {len(tokens)}")
  sequences, starts, scored_to = [], [], 1
  for begin in range(0, len(tokens), stride):
    end = min(begin + window, len(tokens))
    sequences.append(list(tokens[begin:end]))
    starts.append(scored_to - begin)
    scored_to = end
    if end == len(tokens):
      break
  return Windows(sequences, starts, window, stride)


def perplexity(
  params: Params,
  config: ModelConfig,
  tokens: Sequence[int],
  *,
  window: int | None = None,
  stride: int | None = None,
  roster: Roster | None = None,
  output_temperatures: Sequence[float] = (1.0,),
  batch_size: int = 8,
  chunk_size: int | None = None,
  on_batch: Callable[[int], None] = lambda count: None,
) -> Perplexity:
  """Computes the perplexity of a sequence of any length with strided windows.

  A window of `window` tokens starts every `stride` tokens and scores those that no
  earlier window has scored. Every token but the first is scored once, with at least
  `window - stride` tokens of context (fewer only at the beginning). Each window is a
  sequence of its own: positions count from 0, and its request id is its index.

  Args:
    params: the model's parameters.
    config: its architecture.
    tokens: token ids, at least two.
    window: tokens per window; by default the model's context, which is the maximum.
    stride: tokens from one window's start to the next, in [1, window - 1]; half a window
      by default.
    roster, output_temperatures, chunk_size, on_batch: see `score`.
    batch_size: windows scored together.

  Raises:
    ValueError: the sequence is too short, or a setting is out of range.
  """
  batching.check_tokens(
    config.replace(context_length=max(1, len(tokens))), [tokens], what="sequence"
  )
  cut = windows(config, tokens, window, stride)
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
  """Returns the mean negative log-probability over all scored tokens, `[G]`, in nats."""
  nll = -np.concatenate([s.log_probs for s in scores.sequences])
  if not math.prod(nll.shape):
    raise ValueError("no token was scored: every start is at the end of its sequence")
  return nll.mean(axis=0, dtype=np.float64)
