"""Generation: where texts end, and that batching does not matter."""

import pathlib
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import roe_jax
from roe_jax import batching, decode, experts, members, prefill, scoring
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler

PROMPTS = tiny.texts([5, 1, 9, 3])
NEW = 10


def to_text(tokens):
  """Two characters for each token, so that strings are found across tokens."""
  return "".join(f"{chr(97 + t // 8)}{t % 8}" for t in tokens)


@pytest.fixture(scope="module")
def generate(olmoe):
  config, params = olmoe

  def run(prompts=PROMPTS, **options):
    options = {"max_new_tokens": NEW, "stop_tokens": ()} | options
    return decode.generate(params, config, prompts, **options).completions

  return run


@pytest.fixture(scope="module")
def stream(olmoe):
  config, params = olmoe

  def run(prompt, **options):
    options = {"max_new_tokens": NEW, "stop_tokens": ()} | options
    return list(decode.stream(params, config, prompt, **options))

  return run


@pytest.fixture(scope="module")
def unstopped(generate):
  """Sampled texts, which do not repeat themselves as greedy ones do."""
  completions = generate(sampler=Sampler.create(1.0))
  assert all(c.finish_reason == "length" and len(c.tokens) == NEW for c in completions)
  return completions


SAMPLER = Sampler.create(1.0)


def expected(base, stop_tokens=(), stop_strings=()):
  """What stopping makes of an unstopped completion, token by token."""
  for count in range(1, len(base.tokens) + 1):
    tokens = base.tokens[:count]
    ends = tokens[-1] in stop_tokens
    text = to_text(tokens[:-1] if ends else tokens)
    places = [text.find(s) for s in stop_strings if s in text]
    if places:
      return tokens, "stop_string", text[: min(places)]
    if ends:
      return tokens, "stop_token", text
  return base.tokens, "length", to_text(base.tokens)


def assert_stopped(completions, bases, **stops):
  for completion, base in zip(completions, bases):
    tokens, reason, text = expected(base, **stops)
    assert (completion.tokens, completion.finish_reason) == (tokens, reason)
    assert completion.text == text
    np.testing.assert_allclose(completion.log_probs, base.log_probs[: len(tokens)], atol=3e-5)
    assert completion.clean_tokens == base.clean_tokens[: len(tokens)]


def test_stop_tokens(generate, unstopped):
  stops = (unstopped[0].tokens[4], unstopped[1].tokens[0], unstopped[2].tokens[-1])
  completions = generate(sampler=SAMPLER, stop_tokens=stops, decode=to_text)
  assert_stopped(completions, unstopped, stop_tokens=stops)
  assert {c.finish_reason for c in completions} >= {"stop_token"}
  assert len(completions[1].tokens) == 1


def test_stop_tokens_of_the_config_are_the_default(olmoe):
  config, params = olmoe
  config = config.replace(eos_token_ids=(5, 9))
  settings = decode.generate(params, config, [], max_new_tokens=1).settings
  assert settings["stop_tokens"] == [5, 9]


@pytest.mark.parametrize("segment, batch_size", [(32, 16), (4, 16), (1, 16), (4, 2), (3, 1)])
def test_stop_strings(generate, unstopped, monkeypatch, segment, batch_size):
  """Strings over several tokens, that begin and end within one, wherever the
  end of a segment falls and whatever a text's slot held before."""
  monkeypatch.setattr(decode, "SEGMENT", segment)
  strings = (
    to_text(unstopped[0].tokens[2:5])[1:-1],
    to_text(unstopped[2].tokens[5:7]),
    to_text(unstopped[3].tokens[:1]),
  )
  completions = generate(
    sampler=SAMPLER, stop_strings=strings, decode=to_text, batch_size=batch_size
  )
  assert_stopped(completions, unstopped, stop_strings=strings)
  assert [c.finish_reason for c in completions].count("stop_string") >= 3
  assert len(completions[3].tokens) == 1 and completions[3].text == ""


@pytest.mark.parametrize("segment", [32, 2])
def test_a_stop_token_is_no_part_of_the_text(generate, unstopped, monkeypatch, segment):
  monkeypatch.setattr(decode, "SEGMENT", segment)
  # A place where two tokens in a row are new to their text.
  row, i = next(
    (row, i)
    for row, c in enumerate(unstopped)
    for i in range(3, NEW - 1)
    if c.tokens[i] not in c.tokens[:i] and c.tokens[i + 1] not in c.tokens[: i + 1]
  )
  base = unstopped[row]
  string = to_text(base.tokens[i - 1 : i + 1])
  # The string would be completed by the stop token itself: the token ends the text.
  # The string is complete before the stop token: the string ends it.
  for stop_token, reason in ((base.tokens[i], "stop_token"), (base.tokens[i + 1], "stop_string")):
    stops = dict(stop_tokens=(stop_token,), stop_strings=(string,))
    completions = generate(sampler=SAMPLER, decode=to_text, **stops)
    assert_stopped(completions, unstopped, **stops)
    assert completions[row].finish_reason == reason
    assert len(completions[row].tokens) == i + 1


def test_texts_end_with_the_token_limit_or_the_context(olmoe, generate):
  context = olmoe[0].context_length
  prompts = tiny.texts([context - 4, 5, context - 1, context - NEW - 1])
  completions = generate(prompts)
  assert [len(c.tokens) for c in completions] == [4, NEW, 1, NEW]
  assert [c.finish_reason for c in completions] == ["context", "length", "context", "length"]
  assert [len(c.log_probs) for c in completions] == [4, NEW, 1, NEW]


def test_greedy_tokens_are_the_clean_members_of_the_plain_model(generate):
  for completion in generate():
    assert completion.tokens == completion.clean_tokens
    assert all(p <= 0 for p in completion.log_probs)


@pytest.mark.parametrize("options", [{}, dict(stop=True)], ids=["to the limit", "to a stop string"])
def test_streaming_ends_in_what_generate_returns(generate, stream, options):
  prompt = PROMPTS[2]
  common = dict(sampler=SAMPLER, decode=to_text)
  if options:
    tokens = generate([prompt], request_ids=[7], **common)[0].tokens
    common["stop_strings"] = (to_text(tokens[3:5]),)
  whole = generate([prompt], request_ids=[7], **common)[0]
  parts = stream(prompt, request_id=7, **common)
  assert parts[-1] == whole
  assert whole.finish_reason == ("stop_string" if options else "length")
  assert [c.tokens for c in parts] == [whole.tokens[: i + 1] for i in range(len(whole.tokens))]
  assert [c.finish_reason for c in parts[:-1]] == [""] * (len(parts) - 1)


@pytest.mark.parametrize("family, cache", [("olmoe", "clean"), ("mixtral", "standard")])
@pytest.mark.slow
def test_batches_do_not_matter(request, family, cache):
  """The same tokens and probabilities, to rounding, in another order, with
  other neighbors and other padding."""
  config, params = request.getfixturevalue(family)
  roster = Roster.create(config, 3, 0.6, seed=2, cache=cache)
  options = dict(max_new_tokens=NEW, roster=roster, sampler=SAMPLER)
  ids = [40, 11, 2**32 - 1, 0]
  whole = decode.generate(params, config, PROMPTS, request_ids=ids, **options)
  order = [2, 0, 3, 1]
  pairs = decode.generate(
    params,
    config,
    [PROMPTS[i] for i in order],
    batch_size=2,
    request_ids=[ids[i] for i in order],
    **options,
  )
  for i, completion in zip(order, pairs.completions):
    assert completion.tokens == whole.completions[i].tokens
    assert completion.clean_tokens == whole.completions[i].clean_tokens
    np.testing.assert_allclose(completion.log_probs, whole.completions[i].log_probs, atol=3e-5)
  # Other requests draw other tokens from other rosters.
  others = decode.generate(params, config, PROMPTS, request_ids=[i ^ 1 for i in ids], **options)
  for one, other in zip(whole.completions, others.completions):
    assert one.tokens != other.tokens
    assert one.log_probs[0] != other.log_probs[0]


def test_few_programs_are_compiled_for_many_lengths(generate):
  functions = (decode.decode_steps, prefill.prefill_chunk)
  generate([tiny.texts([3])[0]], max_new_tokens=3)
  before = [f._cache_size() for f in functions]
  for length in (1, 2, 4, 7, 11, 15, 16, 17):
    generate([tiny.texts([length])[0]], max_new_tokens=length % 5 + 1, stop_tokens=(length,))
  assert [f._cache_size() for f in functions] == before


def test_the_state_is_donated(olmoe):
  config, params = olmoe
  roster = Roster.create(config)
  state = decode.start(
    params, config, roster, PROMPTS, range(4), NEW, 4, prefill.capacity_for(config, PROMPTS, NEW)
  )
  stops = np.full(4, -1, np.int32)
  after, steps = decode.decode_steps(
    params, config, roster, Sampler.greedy(), state, stops, np.int32(2)
  )
  assert state.cache.keys.is_deleted() and state.tokens.is_deleted()
  assert steps == 2
  np.testing.assert_array_equal(after.lengths, np.array([len(p) for p in PROMPTS]) + 2)


@pytest.mark.parametrize(
  "prompts, options, message",
  [
    ([[1], []], {}, "prompt 1 is empty"),
    ([[1] * 48], {}, "48 tokens.*context of 48"),
    ([[1], [3, 61]], {}, "prompt 1 has token id 61.*vocabulary of 61"),
    ([[-1]], {}, "token id -1"),
    ([[1]], dict(max_new_tokens=0), "max_new_tokens"),
    ([[1]], dict(batch_size=0), "batch_size"),
    ([[1]], dict(stop_strings=("a",)), "decode function"),
    ([[1]], dict(stop_strings=("",), decode=to_text), "empty"),
    ([[1]], dict(request_ids=[1, 2]), "2 request ids for 1"),
    ([[1]], dict(request_ids=[2**32]), "request ids"),
    ([[1]], dict(request_ids=[-1]), "request ids"),
  ],
)
def test_wrong_input_is_refused(generate, prompts, options, message):
  with pytest.raises(ValueError, match=message):
    generate(prompts, **options)


def test_streaming_refuses_wrong_input(stream):
  with pytest.raises(ValueError, match="prompt 0 is empty"):
    stream([])
  with pytest.raises(ValueError, match="request ids"):
    stream([1], request_id=-1)


def test_settings_go_with_the_completions(olmoe):
  config, params = olmoe
  roster = Roster.create(config)
  generation = decode.generate(
    params, config, PROMPTS, max_new_tokens=NEW, roster=roster, sampler=SAMPLER, stop_tokens=(7,)
  )
  settings = generation.settings
  assert settings["roster"] == roster.settings()
  assert settings["sampler"] == SAMPLER.settings()
  assert settings["max_new_tokens"] == NEW and settings["stop_tokens"] == [7]
  assert settings["model"]["d_model"] == config.d_model


def test_no_prompts_are_no_completions(generate):
  assert generate([]) == []


def test_buckets_are_few_and_waste_little():
  for size in range(1, 3000):
    bucket = batching.bucket(size)
    assert size <= bucket and (bucket - size) / bucket <= 0.2
    assert batching.bucket(bucket) == bucket
  octave = {batching.bucket(size) for size in range(1025, 2049)}
  assert len(octave) == 4
  assert batching.bucket(3, 64) == 64


@pytest.mark.slow
def test_parameters_of_a_checkpoint_compile_nothing_twice(olmoe):
  """Restored arrays are committed to their device, and so is what a step returns."""
  config, params = olmoe
  params = jax.device_put(params, jax.devices()[0])
  functions = (decode.decode_steps, scoring.score_chunk)
  before = [f._cache_size() for f in functions]
  roster = Roster.create(config, 5, 0.3)  # a size that no other test uses
  decode.generate(
    params, config, [[1, 2, 3]], max_new_tokens=decode.SEGMENT + 4, roster=roster, stop_tokens=()
  )
  scoring.score(params, config, [[1, 2, 3] * 8], roster=roster, chunk_size=8)
  assert [f._cache_size() for f in functions] == [size + 1 for size in before]


def test_non_finite_logits_are_an_error_that_names_sequence_and_position(olmoe):
  config, params = olmoe
  embedding = params.embedding.at[5].set(np.nan)
  params = params.replace(embedding=embedding)
  finished = {}
  with pytest.raises(FloatingPointError, match="sequence 1 .* at position 2 are NaN") as raised:
    decode.generate(
      params,
      config,
      [[1, 2], [3, 4, 5], [2, 1]],
      max_new_tokens=1,
      on_finished=finished.__setitem__,
    )
  assert (raised.value.sequence, raised.value.position) == (1, 2)
  assert sorted(finished) == [0, 2]  # nothing computed is lost
  with pytest.raises(FloatingPointError, match="sequence 0"):
    list(decode.stream(params, config, [5], max_new_tokens=1))


@pytest.mark.parametrize("cache", ["clean", "standard"])
def test_the_step_reaches_the_experts_in_few_calls(olmoe, monkeypatch, cache):
  """At most 13 functions of the package, from the decode step to the one that multiplies."""
  config, params = olmoe
  package, found = str(pathlib.Path(roe_jax.__file__).parent), []
  for name, function in experts._FUNCTIONS.items():

    def recorded(*arguments, function=function):
      calls = [f.name for f in traceback.extract_stack() if f.filename.startswith(package)]
      found.append([*calls, "strategy"])
      return function(*arguments)

    monkeypatch.setitem(experts._FUNCTIONS, name, recorded)
  roster = Roster.create(config, 3, [0, 0.5, 0.3], cache=cache, expert_strategy="tiled_loop")
  shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)
  arrays = [shape(t, 2, 128) for t in (jnp.int32, jnp.float32, *[jnp.int32] * 3)]
  arrays += [shape(t, 2) for t in (jnp.int32, jnp.int32, bool, jnp.uint32)]
  state = decode.DecodeState(
    *arrays, jax.eval_shape(lambda: members.empty_cache(config, roster, 2, 128))
  )
  step = lambda *rest: decode.decode_steps.__wrapped__(params, config, roster, *rest)
  experts._with_member_folding.cache_clear()
  jax.eval_shape(step, Sampler.greedy(), state, shape(jnp.int32, 1), shape(jnp.int32))
  assert found and found[0][0] == "decode_steps"
  assert max(map(len, found)) <= 13, max(found, key=len)
