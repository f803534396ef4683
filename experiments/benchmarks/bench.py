"""A model, of random weights by default, and calls of roe_jax on it to time."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import random_models, timing
from roe_jax import batching, drafting, model_formats, prefill, sampling, scoring
from roe_jax import members as members_lib
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.members import RosterPass
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler

# Steps take turns on this many tokens with different noise.
NUM_SAMPLES = 8
# Positions per chunk when scoring.
SCORE_CHUNK = 64
# Positions after the context that a cache has room for: the most tokens that a round drafts.
ROOM = 16


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def decode_step(params, config, roster, sampler, cache, tokens_B, positions_B, request_ids_B):
  """Runs a decode step; returns the (donated) cache and tokens `[B]`."""
  run = RosterPass.of_step(params, config, roster, tokens_B, positions_B, request_ids_B)
  outputs, cache = roster.cache_mode.step(run, cache)
  log_probs = outputs.log_probs[:, 0]
  return cache, sampling.choose(sampler, roster.seed, log_probs, request_ids_B, positions_B)


@functools.partial(jax.jit, static_argnames=("config", "count"), donate_argnames="cache")
def draft_round(params, config, roster, sampler, count, cache, tokens_B, positions_B, ids_B):
  """Drafts and verifies `count` tokens; returns the (donated) cache and tokens `[B, count]`."""
  inputs = tokens_B, positions_B, ids_B, jnp.ones(tokens_B.shape, bool), cache
  outputs, _, cache = drafting.draft_and_verify(params, config, roster, sampler, *inputs, count)
  return cache, outputs.log_probs.argmax(axis=-1)


@functools.partial(jax.jit, static_argnames="config")
def chosen_experts(params, config, roster, cache, tokens_B, positions_B, request_ids_B):
  """Returns the experts of all members at one position, `[L, R, B, 1, A]`."""
  run = RosterPass.of_step(params, config, roster, tokens_B, positions_B, request_ids_B)
  return roster.cache_mode.states(run, cache, keep=("experts",))[2].experts


@functools.partial(jax.jit, static_argnames="config")
def step_log_probs(params, config, roster, cache, tokens_B, positions_B, request_ids_B):
  """Returns the log-probabilities `[B, V]` after a decode step, which does not write the cache."""
  run = RosterPass.of_step(params, config, roster, tokens_B, positions_B, request_ids_B)
  return roster.cache_mode.step(run, cache)[0].log_probs[:, 0]


@dataclasses.dataclass
class Box:
  """A cache with room for its context and at least `ROOM` more positions.

  Attributes:
    cache: donated to each program, and replaced by what the program returns.
    context: number of filled positions.
    batch_size: B.
  """

  cache: Any
  context: int
  batch_size: int


@dataclasses.dataclass(frozen=True)
class Call:
  """A call to time.

  Attributes:
    run: makes the call `count` times and waits for the results.
    memory: bytes, see `timing.memory`.
    hlo: text of the compiled program.
  """

  run: Callable[[int], None]
  memory: dict[str, int] = dataclasses.field(default_factory=dict)
  hlo: Callable[[], str] = lambda: ""


class Bench:
  """The model, its sequences and its caches.

  Attributes:
    config: the architecture.
    params: its weights.
    checkpoint: where they are from; None: they are random.
    temperature: τ of the noisy rosters.
  """

  def __init__(
    self, config: ModelConfig, temperature: float, seed: int, checkpoint: str | None = None
  ):
    self.config, self.temperature, self._seed = config, temperature, seed
    self.checkpoint = checkpoint
    if checkpoint is None:
      self.params = random_models.random_params(config, seed)
    else:
      params, stored = model_formats.load_params(checkpoint, config.dtype)
      if stored.formats != config.formats:
        formats = config.expert_format, config.projection_format
        params, _ = params_lib.quantize(params, stored, *formats)
      self.params = params_lib.in_storage_dtype(params)
    self._boxes = {}

  def roster(self, num_members: int, temperature: float | Sequence[float], **settings) -> Roster:
    """Returns a roster whose members all run all layers, as in the paper, even at τ = 0."""
    settings = {"noisy_layers": (0, self.config.num_layers), "seed": self._seed} | settings
    return Roster.create(self.config, num_members, temperature, **settings)

  def text(self, batch_size: int, length: int) -> np.ndarray:
    """Returns random tokens `[B, length]`, the same in each call."""
    random = np.random.default_rng([self._seed, batch_size])
    return random.integers(0, self.config.vocab_size, (batch_size, length), np.int32)

  def samples(self, batch_size: int) -> np.ndarray:
    """Returns random tokens for decode steps, `[NUM_SAMPLES, B]`, the same in each call."""
    random = np.random.default_rng([self._seed, batch_size, 1])
    return random.integers(0, self.config.vocab_size, (NUM_SAMPLES, batch_size), np.int32)

  def empty(self, roster: Roster, context: int, batch_size: int) -> Box:
    """Returns an empty cache of the capacity that generation would choose."""
    capacity = batching.bucket(context + ROOM, prefill.MIN_CAPACITY)
    cache = members_lib.empty_cache(self.config, roster, batch_size, capacity)
    return Box(batching.device_put_like(self.params, cache), context, batch_size)

  def clean_history(self, context: int, batch_size: int = 1) -> Box:
    """Returns a filled Clean Cache, shared by rosters since all write the same into it."""
    if (context, batch_size) not in self._boxes:
      roster = self.roster(1, 0.0)
      box = self.empty(roster, context, batch_size)
      self.fill(roster, box).run(1)
      self._boxes[context, batch_size] = box
    return self._boxes[context, batch_size]

  def forget(self) -> None:
    """Frees the filled caches."""
    self._boxes.clear()

  def fill(self, roster: Roster, box: Box) -> Call:
    """Returns a call that fills a cache with the whole context."""
    history = roster.history()
    text = self.text(box.batch_size, box.context)
    ids = jnp.arange(box.batch_size, dtype=jnp.uint32)
    chunks = []
    for start in range(0, box.context, prefill.PREFILL_CHUNK):
      tokens = jnp.asarray(text[:, start : start + prefill.PREFILL_CHUNK])
      starts = jnp.full(box.batch_size, start)
      program = timing.compiled(
        prefill.prefill_chunk, self.params, self.config, history, box.cache, tokens, starts, ids
      )
      chunks.append((program, tokens, starts))

    def run(count):
      for _ in range(count):
        for program, tokens, starts in chunks:
          box.cache = program(self.params, history, box.cache, tokens, starts, ids)
      jax.block_until_ready(box.cache)

    return Call(run, timing.memory(chunks[0][0]))

  def _inputs(self, box):
    """Tokens, positions and request ids of the step after the context, for each sample."""
    positions = jnp.full(box.batch_size, box.context)
    return [
      (
        jnp.asarray(tokens),
        positions,
        jnp.arange(i * box.batch_size, (i + 1) * box.batch_size, dtype=jnp.uint32),
      )
      for i, tokens in enumerate(self.samples(box.batch_size))
    ]

  def step(
    self, roster: Roster, box: Box, sampler: Sampler | None = None, drafts: int | None = None
  ) -> Call:
    """Returns a call of the decode step after the context, greedy by default.

    With drafts, of a round that drafts and verifies so many tokens.
    """
    inputs, sampler = self._inputs(box), sampler or Sampler.greedy()
    function, settings = (decode_step, ()) if drafts is None else (draft_round, (drafts,))
    program = timing.compiled(
      function, self.params, self.config, roster, sampler, *settings, box.cache, *inputs[0]
    )
    turns = itertools.cycle(inputs)

    def run(count):
      for _ in range(count):
        box.cache, chosen = program(self.params, roster, sampler, box.cache, *next(turns))
      jax.block_until_ready((box.cache, chosen))

    return Call(run, timing.memory(program), program.as_text)

  def log_probs(self, roster: Roster, box: Box, sample: int) -> np.ndarray:
    """Returns log-probabilities `[B, V]` float32 after one of the tokens of `samples`."""
    args = roster, box.cache, *self._inputs(box)[sample]
    return np.asarray(step_log_probs(self.params, self.config, *args))

  def recomputed_step(self, roster: Roster, context: int) -> Call:
    """Returns a call of a step without a cache, which runs the whole sequence for each token.

    With the standard cache every member runs the sequence with its own noise. With Clean Cache
    the history is clean, and one pass serves all members. Both fill a cache again in each call.
    """
    box = self.empty(roster, context, 1)
    fill, step = self.fill(roster, box), self.step(roster, box)

    def run(count):
      for _ in range(count):
        fill.run(1)
        step.run(1)

    return Call(run, max(fill.memory, step.memory, key=lambda m: m.get("temp_bytes", 0)))

  def score_chunk(self, roster: Roster, box: Box) -> Call:
    """Returns a call that scores a chunk in the middle of a sequence as long as the context."""
    return self._score_chunk(roster, box)[0]

  def top_probabilities(self, box: Box) -> np.ndarray:
    """Returns the clean member's largest probability at each position of that chunk."""
    call, scores = self._score_chunk(self.roster(1, 0.0), box)
    call.run(1)
    return np.exp(np.asarray(scores[2])).reshape(-1)

  def _score_chunk(self, roster, box):
    """Returns the call of `score_chunk`, and a list that it fills with `scoring.score_chunk`'s."""
    size = min(SCORE_CHUNK, box.context)
    start = (box.context - size) // 2
    text = self.text(box.batch_size, box.context + 1)
    tokens, targets = (jnp.asarray(text[:, s : s + size]) for s in (start, start + 1))
    inputs = (
      tokens,
      targets,
      jnp.full(box.batch_size, start),
      jnp.arange(box.batch_size, dtype=jnp.uint32),
      None,
    )
    program = timing.compiled(
      scoring.score_chunk, self.params, self.config, roster, box.cache, *inputs
    )

    scores = []

    def run(count):
      for _ in range(count):
        box.cache, *scores[:] = program(self.params, roster, box.cache, *inputs)
      jax.block_until_ready((box.cache, scores))

    return Call(run, timing.memory(program)), scores

  def unique_experts(
    self, num_members: Sequence[int], temperature: float | Sequence[float], box: Box
  ) -> dict[int, float]:
    """Counts a step's unique active experts per layer, for each n.

    Means over layers and over the tokens of `samples`. Members do not depend on n, so the largest
    roster gives the counts of all.
    """
    roster = self.roster(max(num_members), temperature)
    found = {n: [] for n in num_members}
    for inputs in self._inputs(box):
      args = roster, box.cache, *inputs
      program = timing.compiled(chosen_experts, self.params, self.config, *args)
      experts = np.asarray(program(self.params, *args))
      for n in num_members:
        found[n].append(random_models.count_unique_experts(experts, n))
    return {n: float(np.mean(values)) for n, values in found.items()}
