"""Generation with a roster: prefill, and a jitted loop of steps."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import batching, params as params_lib, roster as roster_lib, sampling
from roe_jax.cache import KVCache
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler

PREFILL_CHUNK = 256
# Slots are cheap and compiling is not: short texts share one shape.
MIN_CAPACITY = 128
# Steps between looks at stop strings and at whether all texts have ended.
SEGMENT = 32


@dataclasses.dataclass(frozen=True)
class Completion:
  """What was generated for one prompt.

  Attributes:
    tokens: the generated tokens, a final stop token included; up to the token
      that completed a stop string.
    log_probs: of each token under the aggregated distribution, before any
      sampling temperature, float32.
    clean_tokens: the token that the clean member would have chosen greedily at
      each position (-1 where no clean member is computed).
    finish_reason: "stop_token", "stop_string", "length" (the token limit) or
      "context" (the end of the model's context).
    text: the decoded tokens without stop token, cut before a stop string; None
      if no `decode` function was given.
  """

  tokens: list[int]
  log_probs: list[float]
  clean_tokens: list[int]
  finish_reason: str
  text: str | None = None


@dataclasses.dataclass(frozen=True)
class Generation:
  """Completions in the order of the prompts, and the settings that made them."""

  completions: list[Completion]
  settings: dict[str, Any]


@struct.dataclass
class DecodeState:
  """A batch of texts while they grow.

  Attributes:
    tokens: `[B, S]` int32, prompts and what was generated.
    log_probs: `[B, S]` float32 of the token in the same place.
    clean_tokens: `[B, S]` int32, the clean member's choice for that place.
    lengths: `[B]` int32, tokens so far.
    limits: `[B]` int32, length at which a text ends.
    done: `[B]` bool.
    request_ids: `[B]` uint32.
    cache: see `roster.empty_cache`; holds positions below `lengths - 1`.
  """

  tokens: jax.Array
  log_probs: jax.Array
  clean_tokens: jax.Array
  lengths: jax.Array
  limits: jax.Array
  done: jax.Array
  request_ids: jax.Array
  cache: KVCache | None


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill_chunk(params: Params, config: ModelConfig, roster: Roster, cache: KVCache,
                  tokens_BxT: jax.Array, starts_B: jax.Array,
                  request_ids_B: jax.Array) -> KVCache:
  """Puts T tokens from `starts_B` on into the (donated) cache."""
  positions = starts_B[:, None] + jnp.arange(tokens_BxT.shape[1])[None]
  return roster_lib.prefill(params, config, roster, cache, tokens_BxT, positions,
                            request_ids_B)[0]


def fill_cache(params: Params, config: ModelConfig, roster: Roster, cache: KVCache,
               tokens_BxS: jax.Array, length: int, request_ids_B: jax.Array) -> KVCache:
  """Prefills positions below `length` in chunks of few shapes."""
  start = 0
  while start < length:
    size = min(PREFILL_CHUNK, batching.power_of_two(length - start, 32),
               tokens_BxS.shape[1] - start)
    cache = prefill_chunk(
        params, config, roster.history(), cache, tokens_BxS[:, start:start + size],
        jnp.full(tokens_BxS.shape[0], start), request_ids_B)
    start += size
  return cache


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode_steps(params: Params, config: ModelConfig, roster: Roster, sampler: Sampler,
                 state: DecodeState, stop_tokens: jax.Array, num_steps: jax.Array) -> DecodeState:
  """Up to `num_steps` tokens for every text that is not done.

  Args:
    params: the model's parameters.
    config: its architecture.
    roster: the settings.
    sampler: how tokens are chosen.
    state: donated.
    stop_tokens: `[X]` int32, padded with -1.
    num_steps: int32 scalar, traced.
  """
  rows = jnp.arange(state.tokens.shape[0])

  def step(carry):
    count, state = carry
    positions = state.lengths - 1
    outputs, cache = roster_lib.step(
        params, config, roster, state.cache, state.tokens[rows, positions], positions,
        state.request_ids, state.tokens)
    log_probs = outputs.log_probs[:, 0]
    token = sampling.choose(sampler, roster.seed, log_probs, state.request_ids, positions)
    clean = outputs.clean_tokens[:, 0]

    def put(array, value):
      kept = array[rows, state.lengths]
      return array.at[rows, state.lengths].set(jnp.where(state.done, kept, value))

    lengths = jnp.where(state.done, state.lengths, state.lengths + 1)
    ended = jnp.isin(token, stop_tokens) | (lengths >= state.limits)
    return count + 1, state.replace(
        tokens=put(state.tokens, token), log_probs=put(state.log_probs, log_probs[rows, token]),
        clean_tokens=put(state.clean_tokens, clean), lengths=lengths,
        done=state.done | ended, cache=cache)

  def unfinished(carry):
    count, state = carry
    return (count < num_steps) & ~jnp.all(state.done)

  return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]


def start(params: Params, config: ModelConfig, roster: Roster, prompts: Sequence[Sequence[int]],
          request_ids: Sequence[int], max_new_tokens: int) -> DecodeState:
  """The state after prefill, with rows and capacity rounded up to buckets.

  The last token of each prompt is left for the first step.
  """
  num_rows = batching.bucket(len(prompts))
  longest = max(map(len, prompts))
  # One slot more than the longest text, so that rows that are done have a
  # place to point to.
  capacity = batching.bucket(
      min(longest + max_new_tokens, config.context_length) + 1, MIN_CAPACITY)
  lengths = np.ones(num_rows, np.int32)
  lengths[:len(prompts)] = [len(p) for p in prompts]
  ids = np.zeros(num_rows, np.uint32)
  ids[:len(prompts)] = request_ids
  tokens, ids = batching.pad(prompts, num_rows, capacity), jnp.asarray(ids)
  cache = batching.beside(params, roster_lib.empty_cache(config, roster, num_rows, capacity))
  if cache is not None:
    cache = fill_cache(params, config, roster, cache, tokens, longest - 1, ids)
  state = DecodeState(
      tokens=tokens, log_probs=jnp.zeros(tokens.shape, jnp.float32),
      clean_tokens=jnp.full(tokens.shape, -1, jnp.int32), lengths=jnp.asarray(lengths),
      limits=jnp.asarray(np.minimum(lengths + max_new_tokens, config.context_length)),
      done=jnp.arange(num_rows) >= len(prompts), request_ids=ids, cache=cache)
  return batching.beside(params, state)


def generate(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    roster: Roster | None = None,
    sampler: Sampler | None = None,
    stop_tokens: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    request_ids: Sequence[int] | None = None,
    batch_size: int = 16,
    on_batch: Callable[[list[Completion]], None] = lambda completions: None,
) -> Generation:
  """Continues prompts.

  A completion is a function of the prompt, the settings and the request id, to
  rounding; which other prompts are in its batch does not matter.

  Args:
    params: the model's parameters.
    config: its architecture.
    prompts: token ids of each prompt.
    max_new_tokens: at most this many tokens are generated for each.
    roster: the settings; the plain model by default.
    sampler: how tokens are chosen from the aggregated distribution; greedy by
      default.
    stop_tokens: tokens that end a text; `config.eos_token_ids` by default.
    stop_strings: strings that end a text; they need `decode`.
    decode: from token ids to text.
    request_ids: addresses of the prompts' randomness, in [0, 2**32); 0, 1, ...
      by default.
    batch_size: prompts decoded together.
    on_batch: called with each batch's completions as soon as it is finished.

  Raises:
    ValueError: a prompt is empty, too long or outside the vocabulary, or a
      setting is out of its range.
  """
  params = params_lib.held(params)
  roster = roster or Roster.create(config)
  roster.check(config)
  sampler = sampler or Sampler.greedy()
  ids = batching.request_ids(request_ids, len(prompts))
  stop_tokens = _check(config, prompts, max_new_tokens, stop_tokens, stop_strings, decode)
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, got {batch_size}")
  completions = []
  for first in range(0, len(prompts), batch_size):
    batch = prompts[first:first + batch_size]
    state = start(params, config, roster, batch, ids[first:first + batch_size], max_new_tokens)
    progress = _Progress(batch, stop_tokens, stop_strings, decode)
    for state in _segments(params, config, roster, sampler, state, stop_tokens,
                           max_new_tokens, SEGMENT, progress):
      pass
    finished = progress.completions(state, config)
    on_batch(finished)
    completions += finished
  return Generation(completions, {
      "roster": roster.settings(), "sampler": sampler.settings(),
      "max_new_tokens": max_new_tokens, "stop_tokens": list(stop_tokens),
      "stop_strings": list(stop_strings), "model": dataclasses.asdict(config)})


def stream(
    params: Params,
    config: ModelConfig,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    roster: Roster | None = None,
    sampler: Sampler | None = None,
    stop_tokens: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    request_id: int = 0,
) -> Iterator[Completion]:
  """Continues one prompt; yields the completion so far after every token.

  The arguments are those of `generate`. `finish_reason` is "" until the last
  completion, which equals the one that `generate` returns.
  """
  params = params_lib.held(params)
  roster = roster or Roster.create(config)
  roster.check(config)
  sampler = sampler or Sampler.greedy()
  stop_tokens = _check(config, [prompt], max_new_tokens, stop_tokens, stop_strings, decode)
  ids = batching.request_ids([request_id], 1)
  state = start(params, config, roster, [prompt], ids, max_new_tokens)
  progress = _Progress([prompt], stop_tokens, stop_strings, decode)
  for state in _segments(params, config, roster, sampler, state, stop_tokens,
                         max_new_tokens, 1, progress):
    yield progress.completions(state, config)[0]


def _check(config, prompts, max_new_tokens, stop_tokens, stop_strings, decode):
  batching.check_tokens(config, prompts, room=1)
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
  if stop_strings and decode is None:
    raise ValueError("stop_strings need a decode function, to see them in the text")
  if any(not s for s in stop_strings):
    raise ValueError("a stop string is empty: it would end every text at once")
  return tuple(config.eos_token_ids if stop_tokens is None else stop_tokens)


def _segments(params, config, roster, sampler, state, stop_tokens, max_new_tokens,
              segment, progress):
  """Yields the state after every segment of steps until all texts are done."""
  width = batching.bucket(max(1, len(stop_tokens)), 4)
  stops = jnp.asarray(list(stop_tokens) + [-1] * (width - len(stop_tokens)), jnp.int32)
  for first in range(0, max_new_tokens, segment):
    steps = min(segment, max_new_tokens - first)
    state = decode_steps(params, config, roster, sampler, state, stops, jnp.int32(steps))
    if progress.watches_text:
      state = state.replace(done=state.done | jnp.asarray(progress.stopped(state)))
    yield state
    if bool(np.all(state.done)):
      return


class _Progress:
  """Finds stop strings, and cuts texts at them."""

  def __init__(self, prompts, stop_tokens, stop_strings, decode):
    self._starts = [len(p) for p in prompts]
    self._stop_tokens = set(stop_tokens)
    self._stop_strings = stop_strings
    self._decode = decode
    self._stops = {}  # row -> number of tokens that complete its stop string
    self._seen = [0] * len(prompts)

  @property
  def watches_text(self):
    return bool(self._stop_strings)

  def _generated(self, tokens, row, length):
    return tokens[row, self._starts[row]:length].tolist()

  def stopped(self, state):
    """Which rows `[B]` have completed a stop string."""
    tokens, lengths = np.asarray(state.tokens), np.asarray(state.lengths)
    stopped = np.zeros(len(lengths), bool)
    for row in range(len(self._starts)):
      if row not in self._stops:
        generated = self._generated(tokens, row, lengths[row])
        if self._find(self._text(generated)) is not None:
          # The stop may lie anywhere in the segment: find its first token.
          count = next(n for n in range(self._seen[row] + 1, len(generated) + 1)
                       if self._find(self._text(generated[:n])) is not None)
          self._stops[row] = count
        self._seen[row] = len(generated)
      stopped[row] = row in self._stops
    return stopped

  def _text(self, generated):
    if generated and generated[-1] in self._stop_tokens:
      generated = generated[:-1]
    return self._decode(generated)

  def _find(self, text):
    found = [i for i in (text.find(s) for s in self._stop_strings) if i >= 0]
    return min(found) if found else None

  def completions(self, state, config):
    """The completions as they stand; unfinished ones without a reason."""
    tokens, lengths = np.asarray(state.tokens), np.asarray(state.lengths)
    log_probs, clean = np.asarray(state.log_probs), np.asarray(state.clean_tokens)
    done = np.asarray(state.done)
    completions = []
    for row, first in enumerate(self._starts):
      end = first + self._stops[row] if row in self._stops else lengths[row]
      generated = self._generated(tokens, row, end)
      text = None if self._decode is None else self._text(generated)
      if row in self._stops:
        reason, text = "stop_string", text[:self._find(text)]
      elif not done[row]:
        reason = ""
      elif generated and generated[-1] in self._stop_tokens:
        reason = "stop_token"
      else:
        reason = "context" if end >= config.context_length else "length"
      completions.append(Completion(
          generated, log_probs[row, first:end].tolist(), clean[row, first:end].tolist(),
          reason, text))
    return completions
