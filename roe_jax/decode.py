"""Generation with a roster: prefill, and a jitted loop of decode steps over batch slots.

Many prompts share a fixed number of slots. When a sequence ends, the loop returns and
the next prompt takes its slot. Prompts are prefilled in small batches into a separate
state, and copied from there into free slots.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import batching, drafting, prefill
from roe_jax import params as params_lib
from roe_jax.completion import Completion, Generation, Throughput
from roe_jax.config import ModelConfig
from roe_jax.decode_state import DecodeState, decode_steps, insert_sequence, start
from roe_jax.numerics import NonFiniteLogits
from roe_jax.params import Params
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler
from roe_jax.stopping import OpenSequence, StopReader, Stops

# Maximum number of steps between checks for stop strings.
SEGMENT = 32
# Prefilling one prompt is hardly faster than prefilling several. So the next prompts, a
# quarter as many as there are slots, are prefilled together and kept ready.
READY_SHARE = 4


class _Slots:
  """The host side of a `DecodeState`: moves prompts through slots.

  Attributes:
    sequences: the sequence in each slot; None in a free slot.
    waiting: indices of prompts that are not prefilled yet.
    steps: decode steps taken.
    slot_steps: sum over those steps of the number of running slots.
    drafted: tokens drafted in running slots.
  """

  def __init__(
    self,
    params: Params,
    config: ModelConfig,
    roster: Roster,
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    request_ids: Sequence[int],
    stops: Stops,
    max_new_tokens: int,
    num_slots: int,
  ):
    self.sequences: list[OpenSequence | None] = [None] * num_slots
    self.waiting = deque(range(len(prompts)))
    self.steps = self.slot_steps = self.drafted = 0
    self._model = params_lib.in_storage_dtype(params), config, roster
    self._sampler, self._stops, self._stop_tokens = sampler, stops, stops.token_array()
    self._prompts, self._ids, self._max_new_tokens = prompts, request_ids, max_new_tokens
    self._capacity = prefill.capacity_for(config, prompts, max_new_tokens)
    self._state: DecodeState | None = None
    self._ready_state: DecodeState | None = None
    self._draft_length = drafting.DraftLength(roster)
    self._not_finite: dict[int, int] = {}  # {slot: first position with non-finite logits}
    self._ready: deque[tuple[int, int]] = deque()  # (slot in the ready state, prompt)

  @property
  def unfinished(self) -> bool:
    """Whether any prompt is in a slot or waiting."""
    return bool(self.waiting or self._ready or any(self.sequences))

  def fill(self) -> None:
    """Moves waiting prompts into free slots."""
    if self._state is None:
      indices, self._state = self._prefilled(len(self.sequences))
      for slot, index in enumerate(indices):
        self.sequences[slot] = self._opened(index)
    for slot, sequence in enumerate(self.sequences):
      if sequence is None and (self.waiting or self._ready):
        if not self._ready:
          self._ready_state = None  # frees its memory for the next one
          indices, self._ready_state = self._prefilled(max(1, len(self.sequences) // READY_SHARE))
          self._ready.extend(enumerate(indices))
        ready, index = self._ready.popleft()
        ready_slot = self._ready_state, np.int32(ready)
        self._state = insert_sequence(self._state, np.int32(slot), *ready_slot)
        self.sequences[slot] = self._opened(index)

  def _prefilled(self, num_slots):
    """Prefills the next prompts; returns their indices and a state of `num_slots` slots."""
    indices = [self.waiting.popleft() for _ in range(min(num_slots, len(self.waiting)))]
    return indices, start(
      *self._model,
      [self._prompts[i] for i in indices],
      [self._ids[i] for i in indices],
      self._max_new_tokens,
      num_slots,
      self._capacity,
    )

  def _opened(self, index):
    return OpenSequence(index, len(self._prompts[index]), self._stops)

  def advance(self, num_tokens: int) -> None:
    """Decodes until a sequence ends, for at most `num_tokens` tokens or a step."""
    assert self._state is not None
    size, running = self._draft_length.size, np.array([s is not None for s in self.sequences])
    arguments = np.int32(max(1, num_tokens // size)), size
    assert self._state is not None
    before = jax.device_get(self._state.lengths)
    state, steps = decode_steps(
      *self._model, self._sampler, self._state, self._stop_tokens, *arguments
    )
    self.steps += int(steps)
    slot_steps = int(steps) * int(running.sum())
    self.slot_steps += slot_steps
    if size > 1:
      self.drafted += slot_steps * size
      kept = (jax.device_get(state.lengths) - before)[running].sum()
      self._draft_length.update(slot_steps, int(kept))
    if self._stops.strings:
      tokens, lengths = jax.device_get((state.tokens, state.lengths))
      stopped = [
        sequence is not None and sequence.hits_stop_string(*rest)
        for sequence, *rest in zip(self.sequences, tokens, lengths)
      ]
      state = state.replace(done=state.done | jnp.asarray(np.array(stopped)))
    self._state = state

  def harvest(self) -> list[tuple[int, Completion]]:
    """Returns (prompt index, completion) of the sequences that have ended; frees their slots."""
    state = self._fetched()
    ended = []
    for slot, sequence in enumerate(self.sequences):
      if sequence is not None and state.done[slot] and slot not in self._not_finite:
        ended.append((sequence.index, self._completion(slot, state)))
        self.sequences[slot] = None
    return ended

  def completions(self, slot: int, start: int) -> Iterator[Completion]:
    """Yields the completion in a slot up to each of its tokens from the one of index `start` on."""
    state = self._fetched()
    last = self._completion(slot, state)
    for count in range(start + 1, len(last.tokens)):
      yield self._completion(slot, state, count)
    yield last

  def check_finite(self) -> None:
    """Checks the log-probabilities that were fetched last.

    Raises:
      NonFiniteLogits: those of a sequence are NaN or infinite.
    """
    for slot, position in self._not_finite.items():
      sequence = self.sequences[slot]
      assert sequence is not None
      raise NonFiniteLogits(sequence.index, position)

  def _fetched(self):
    assert self._state is not None
    state = jax.device_get(self._state.replace(cache=None))
    # A logit that is NaN or +inf makes all log-probabilities NaN, with every known aggregation.
    finite = np.isfinite(state.log_probs)
    self._not_finite = {
      slot: sequence.start - 1 + int(np.argmin(finite[slot, sequence.start : length]))
      for slot, (sequence, length) in enumerate(zip(self.sequences, state.lengths))
      if sequence is not None and not finite[slot, sequence.start : length].all()
    }
    return state

  def _completion(self, slot, state, count=None):
    """Returns the completion in a slot so far, or its first tokens."""
    sequence = self.sequences[slot]
    of_tokens = {
      name: getattr(state, name)[slot] for name in ("log_probs", "clean_tokens", "members")
    }
    length = int(state.lengths[slot]) if count is None else sequence.start + count
    done = count is None and bool(state.done[slot])
    context_length = self._model[1].context_length
    found = sequence.completion(state.tokens[slot], of_tokens, length, done, context_length)
    passes = state.passes[slot, sequence.start : sequence.start + len(found.tokens)]
    return dataclasses.replace(found, forward_passes=int(passes.sum()))


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
  stop_reader: Callable[[int], StopReader] | None = None,
  request_ids: Sequence[int] | None = None,
  batch_size: int = 16,
  on_finished: Callable[[int, Completion], None] = lambda index, completion: None,
) -> Generation:
  """Generates completions of prompts.

  `batch_size` slots decode together; when a sequence ends, the next prompt takes its slot.
  A completion is a function of the prompt, the settings and the request id, up to
  rounding: the order of the prompts, the number of slots and the other prompts do not
  matter.

  All slots, and a quarter as many for prompts that are ready, have room for the longest
  prompt and `max_new_tokens`, so one program decodes every prompt. If a few prompts are
  much longer than the others, separate calls need less memory. A call compiles at most
  eleven programs: the decode loop, and prefill in up to five chunk lengths, for all slots
  and for a quarter of them.

  Args:
    params: the model's parameters.
    config: its architecture.
    prompts: token ids of each prompt.
    max_new_tokens: maximum number of generated tokens per prompt.
    roster: the settings; the baseline by default.
    sampler: how tokens are chosen from the aggregated distribution; greedy by default.
    stop_tokens: tokens that end a sequence; `config.eos_token_ids` by default.
    stop_strings: strings that end a sequence; they need `decode`. Checked at least every
      `SEGMENT` steps; until then the sequence keeps its slot.
    decode: converts token ids to text, such as `Tokenizer.decode`.
    stop_reader: `stop_reader(index)` makes a reader of the text, in the completion of a prompt, in
      which stop strings are searched, such as `Chat.stop_reader`. By default that is what `decode`
      returns, with special tokens if it has a parameter `skip_special_tokens`.
    request_ids: addresses of the prompts' randomness, in [0, 2**32); 0, 1, ... by default.
    batch_size: number of slots.
    on_finished: called with the index of a prompt and its completion when it is finished.

  Raises:
    ValueError: a prompt is empty, too long or has a token outside the vocabulary, or a
      setting is out of range.
    NonFiniteLogits: logits are NaN or infinite; `on_finished` was called for the completions
      that ended before.
  """
  begin = time.perf_counter()
  roster, sampler, stops = _checked(
    config, prompts, max_new_tokens, roster, sampler, stop_tokens, stop_strings, decode, stop_reader
  )
  ids = batching.request_ids(request_ids, len(prompts))
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, got {batch_size}")
  num_slots = min(batch_size, batching.bucket(len(prompts)))
  slots = _Slots(params, config, roster, sampler, prompts, ids, stops, max_new_tokens, num_slots)
  completions: dict[int, Completion] = {}
  while slots.unfinished:
    slots.fill()
    slots.advance(SEGMENT)
    for index, completion in slots.harvest():
      completions[index] = completion
      on_finished(index, completion)
    slots.check_finite()
  throughput = Throughput(
    sum(len(c.tokens) for c in completions.values()),
    slots.steps,
    slots.slot_steps / max(1, slots.steps * len(slots.sequences)),
    time.perf_counter() - begin,
    slots.drafted,
  )
  return Generation(
    [completions[i] for i in range(len(prompts))],
    {
      "roster": roster.settings(),
      "sampler": sampler.settings(),
      "max_new_tokens": max_new_tokens,
      "stop_tokens": list(stops.tokens),
      "stop_strings": list(stops.strings),
      "model": dataclasses.asdict(config),
    },
    throughput,
  )


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
  stop_reader: Callable[[int], StopReader] | None = None,
  request_id: int = 0,
) -> Iterator[Completion]:
  """Generates the completion of one prompt; yields it so far after every token.

  Takes the arguments of `generate`. `finish_reason` is "" until the last completion,
  which equals the result of `generate`.
  """
  roster, sampler, stops = _checked(
    config,
    [prompt],
    max_new_tokens,
    roster,
    sampler,
    stop_tokens,
    stop_strings,
    decode,
    stop_reader,
  )
  ids = batching.request_ids([request_id], 1)
  slots = _Slots(params, config, roster, sampler, [prompt], ids, stops, max_new_tokens, 1)
  slots.fill()
  count, finish_reason = 0, ""
  while not finish_reason:
    slots.advance(1)
    for completion in slots.completions(0, count):
      slots.check_finite()  # what was fetched for it
      yield completion
    count, finish_reason = len(completion.tokens), completion.finish_reason


def _checked(
  config, prompts, max_new_tokens, roster, sampler, stop_tokens, strings, decode, reader
):
  """Validates the arguments; returns roster, sampler and stops with their defaults."""
  roster = roster or Roster.create(config)
  roster.check(config)
  batching.check_tokens(config, prompts, room=1)
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
  stops = Stops.create(config, stop_tokens, strings, decode, reader)
  return roster, sampler or Sampler.greedy(), stops
