"""Many prompts through few slots: the same completions, and no slot left idle."""

import jax
import numpy as np
import pytest
import tiny

from roe_jax import decode, numerics, prefill
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler

pytestmark = pytest.mark.slow

# Some end at the context (48 tokens), some at a stop token, some at the limit.
PROMPTS = tiny.texts([5, 1, 46, 9, 3, 45, 17, 2, 36])
IDS = [40, 11, 2**32 - 1, 0, 7, 3, 500, 12, 9]
NEW = 12
STOPS = tuple(range(4))
SAMPLER = Sampler.create(1.0)


def run(model, prompts=PROMPTS, ids=IDS, chunk=32, **options):
  """Prefills chunks of one length, so that prompts of all lengths share a program."""
  config, params = model
  options = {"max_new_tokens": NEW, "stop_tokens": STOPS, "sampler": SAMPLER} | options
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prefill, "PREFILL_CHUNK", chunk)
    return decode.generate(params, config, prompts, request_ids=ids, **options)


def assert_same(completions, expected):
  for one, other in zip(completions, expected, strict=True):
    assert one.tokens == other.tokens
    assert one.clean_tokens == other.clean_tokens
    assert one.finish_reason == other.finish_reason
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=3e-5)


def schedule(counts, num_slots):
  """Decode steps, and the order in which texts of so many tokens finish."""
  waiting, slots, finished, steps = list(enumerate(counts)), [None] * num_slots, [], 0
  while waiting or any(slots):
    for slot in range(num_slots):
      if slots[slot] is None and waiting:
        slots[slot] = waiting.pop(0)
    steps += 1
    for slot, text in enumerate(slots):
      if text is not None:
        index, left = text
        slots[slot] = (index, left - 1) if left > 1 else None
        if left == 1:
          finished.append(index)
  return steps, finished


@pytest.mark.parametrize(
  "family, settings, options, sizes",
  [
    ("olmoe", {}, {}, ((2, 1), (9, 2))),
    ("mixtral", {"cache": "standard"}, {"sampler": Sampler.greedy()}, ((3, 2),)),
    ("olmoe", {"cache": "none"}, {}, ((2, 2),)),
  ],
  ids=["clean", "standard greedy", "none"],
)
def test_neither_slots_nor_order_matter(request, monkeypatch, family, settings, options, sizes):
  """Each prompt is continued as if it were alone."""
  model = request.getfixturevalue(family)
  options = options | {"roster": Roster.create(model[0], 3, 0.6, seed=2, **settings)}
  alone = [run(model, [prompt], [i], **options).completions[0] for prompt, i in zip(PROMPTS, IDS)]
  reasons = {c.finish_reason for c in alone}
  assert reasons == {"context", "length", "stop_token"} or "sampler" in options
  assert len({len(c.tokens) for c in alone}) > 2
  for size, num_ready in sizes:
    monkeypatch.setattr(decode, "READY_SHARE", size // num_ready)
    assert_same(run(model, batch_size=size, **options).completions, alone)
  order = [8, 2, 0, 5, 3, 7, 1, 6, 4]
  permuted = run(
    model, [PROMPTS[i] for i in order], [IDS[i] for i in order], batch_size=sizes[-1][0], **options
  )
  assert_same(permuted.completions, [alone[i] for i in order])


@pytest.mark.parametrize("num_slots", [1, 2, 9])
def test_a_slot_is_refilled_at_once(olmoe, num_slots):
  """Steps, occupancy and the order of finishing are those of a schedule in
  which no slot is free while prompts wait."""
  calls = []
  generation = run(olmoe, batch_size=num_slots, on_finished=lambda *call: calls.append(call))
  counts = [len(c.tokens) for c in generation.completions]
  steps, finished = schedule(counts, num_slots)
  assert [index for index, _ in calls] == finished
  assert all(completion is generation.completions[index] for index, completion in calls)
  found = generation.throughput
  assert (found.tokens, found.steps) == (sum(counts), steps)
  assert found.occupancy == pytest.approx(sum(counts) / (steps * num_slots))
  assert found.tokens_per_second == found.tokens / found.seconds > 0
  if num_slots == 2:
    batches = [max(counts[i : i + num_slots]) for i in range(0, len(counts), num_slots)]
    assert steps < sum(batches)


def test_the_schedule_by_hand():
  # Slot 0: three steps of text 0, then two of text 2; slot 1: text 1, then four of text 3.
  assert schedule([3, 4, 2, 4], 2) == (8, [0, 1, 2, 3])
  assert schedule([5, 1, 2, 2], 2) == (5, [1, 2, 0, 3])


def test_occupancy_counts_steps_behind_a_stop_string(olmoe):
  """A text keeps its slot until the host looks."""
  decode_text = lambda tokens: "." * len(tokens)
  generation = run(
    olmoe, PROMPTS[:2], IDS[:2], stop_tokens=(), stop_strings=("...",), decode=decode_text
  )
  assert [len(c.tokens) for c in generation.completions] == [3, 3]
  found = generation.throughput
  assert (found.tokens, found.steps, found.occupancy) == (6, NEW, 1.0)


def test_a_finished_completion_is_handed_over_before_the_next_is_begun(olmoe):
  """What has been handed over is all that an interruption leaves."""

  def interrupt(index, completion):
    seen.append((index, completion))
    if len(seen) == 4:
      raise KeyboardInterrupt

  whole, seen = run(olmoe, batch_size=2), []
  with pytest.raises(KeyboardInterrupt):
    run(olmoe, batch_size=2, on_finished=interrupt)
  assert len({index for index, _ in seen}) == 4
  for index, completion in seen:
    assert completion == whole.completions[index]


def test_more_prompts_compile_nothing(olmoe, caplog):
  """Two lengths of prefill, of both slots and of one: nothing else comes."""
  prompts = tiny.texts([40, 3, 40, 3, 3])
  run(olmoe, prompts, range(5), chunk=64, batch_size=2)
  lengths = np.random.RandomState(1).randint(1, 47, 30)
  with jax.log_compiles():
    run(olmoe, tiny.texts(lengths), range(30), chunk=64, batch_size=2)
  assert [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")] == []


def test_prefill_comes_in_five_lengths_at_most(monkeypatch):
  sizes, covered = set(), 0

  def prefill_chunk(params, config, roster, cache, tokens, starts, ids, lengths):
    nonlocal covered
    assert starts[0] == covered
    sizes.add(tokens.shape[1])
    covered += tokens.shape[1]

  monkeypatch.setattr(prefill, "prefill_chunk", prefill_chunk)
  roster = Roster.create(tiny.config("olmoe"))
  for capacity in (128, 160, 448, 1280):
    sizes.clear()
    for length in (*range(0, capacity, 5), capacity - 1):
      covered = 0
      prefill.fill_cache(None, None, roster, None, np.zeros((1, capacity), np.int32), length, None)
      assert length <= covered <= capacity
    assert len(sizes) <= 5


def test_no_prompts_need_no_time(olmoe):
  found = run(olmoe, [], []).throughput
  assert (found.tokens, found.steps, found.occupancy) == (0, 0, 0.0)


def test_there_is_room_for_the_longest_prompt_wherever_it_comes(olmoe, monkeypatch):
  monkeypatch.setattr(prefill, "MIN_CAPACITY", 1)
  config, _ = olmoe
  for lengths in ((3, 20, 5), (20, 3, 5), (3, 5, 20)):
    assert prefill.capacity_for(config, tiny.texts(lengths), NEW) >= 20 + NEW + 1
    # Not more than the context, and one place to point to.
    assert prefill.capacity_for(config, tiny.texts((*lengths, 47)), NEW) in range(49, 57)


@pytest.mark.parametrize("dtype, cache", [("bfloat16", "clean"), ("float32", "standard")])
def test_a_text_is_placed_as_it_is_and_no_other_changes(dtype, cache):
  config = tiny.config("olmoe", dtype=dtype)
  params = tiny.params(config)
  roster = Roster.create(config, 2, [0, 0.5, 0.5], cache=cache)

  def start(prompts, ids):
    state = decode.start(params, config, roster, prompts, ids, NEW, len(prompts), 128)
    # The batch axis first, wherever it is; float32 holds bfloat16 exactly.
    first = jax.tree.map(lambda a: np.moveaxis(np.asarray(a, np.float32), -4, 0), state.cache)
    texts = jax.tree.map(np.array, state.replace(cache=None))
    return state, jax.tree.leaves((first, texts))

  state, before = start(PROMPTS[:3], IDS[:3])
  other, source = start(PROMPTS[3:5], IDS[3:5])
  after = decode.insert_sequence(state, np.int32(2), other, np.int32(1))
  assert jax.tree.leaves(after.cache)[0].dtype == numerics.storage_dtype(dtype)
  first = jax.tree.map(lambda a: np.moveaxis(np.asarray(a, np.float32), -4, 0), after.cache)
  for found, old, new in zip(
    jax.tree.leaves((first, after.replace(cache=None))), before, source, strict=True
  ):
    np.testing.assert_array_equal(found, np.stack([old[0], old[1], new[1]]))
