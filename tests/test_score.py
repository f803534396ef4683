"""Scoring against generation, and perplexity against its definition."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recomputed import RECOMPUTED
import tiny

from roe_jax import batching, checkpoint, decode, prefill, transformer
from roe_jax import scoring as score_lib
from roe_jax.numerics import naming_sequences
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler

pytestmark = pytest.mark.slow

PROMPTS = tiny.texts([5, 1, 9, 3])
STARTS = [len(p) for p in PROMPTS]
IDS = [4, 8, 2**32 - 1, 0]
# Absolute, in nats: log-probabilities are of order 10, and float32 sums of
# some ten layers of operations are taken in another order.
TOLERANCE = 3e-5

ROSTERS = {
  "plain": {},
  "clean": dict(num_members=3, temperatures=[0, 0.7, 0.4]),
  "one noisy member": dict(num_members=1, temperatures=0.6, include_clean=False),
  "clean, without the clean member": dict(
    num_members=2, temperatures=0.6, include_clean=False, gate_weights="noisy"
  ),
  "standard": dict(num_members=3, temperatures=0.6, cache="standard"),
  "standard, without the clean member": dict(
    num_members=2, temperatures=0.6, include_clean=False, cache="standard", aggregation="majority"
  ),
  "clean, recomputed": dict(num_members=3, temperatures=[0, 0.7, 0.4], cache=RECOMPUTED["clean"]),
  "standard, recomputed": dict(num_members=3, temperatures=0.6, cache=RECOMPUTED["standard"]),
  "none": dict(num_members=3, temperatures=0.6, cache="none"),
}


@functools.cache
def tiny_model(family):
  config = tiny.config(family)
  return config, tiny.params(config)


@functools.cache
def generated(family, name, sampled):
  """The texts that a roster made, and the completions."""
  config, params = tiny_model(family)
  roster = Roster.create(config, seed=6, **ROSTERS[name])
  sampler = Sampler.create(1.2, 0, 0.95) if sampled else Sampler.greedy()
  completions = decode.generate(
    params,
    config,
    PROMPTS,
    max_new_tokens=8,
    roster=roster,
    sampler=sampler,
    request_ids=IDS,
    stop_tokens=(),
  ).completions
  return [p + c.tokens for p, c in zip(PROMPTS, completions)], completions, roster


def score(family, texts, **options):
  """Scores of the texts; four at a time, whatever their number, so that few shapes compile."""
  config, params = tiny_model(family)
  options = {"min_shape": (4, prefill.MIN_CAPACITY)} | options
  return score_lib.score(params, config, texts, **options).sequences


def assert_scored_as_generated(scores, completions):
  for one, completion in zip(scores, completions):
    assert len(one.log_probs) == len(completion.tokens)
    np.testing.assert_allclose(one.log_probs[:, 0], completion.log_probs, atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(one.clean_greedy_tokens, completion.clean_tokens)


@pytest.mark.parametrize(
  "family, name",
  [
    *(("olmoe", name) for name in ("plain", "clean", "one noisy member", "none")),
    ("mixtral", "clean, without the clean member"),
    ("mixtral", "standard, without the clean member"),
  ],
)
def test_scores_are_the_probabilities_that_generation_chose_from(family, name):
  texts, completions, roster = generated(family, name, sampled=True)
  whole = score(family, texts, starts=STARTS, roster=roster, request_ids=IDS)
  assert_scored_as_generated(whole, completions)


@pytest.mark.parametrize("name", ["plain", "clean", "standard"])
def test_batches_and_chunks_do_not_matter(name):
  texts, completions, roster = generated("olmoe", name, sampled=True)
  # In another order, with other neighbors, paddings and chunks.
  order = [2, 0, 3, 1]
  again = score(
    "olmoe",
    [texts[i] for i in order],
    starts=[STARTS[i] for i in order],
    roster=roster,
    request_ids=[IDS[i] for i in order],
    batch_size=2,
    chunk_size=3,
    min_shape=(1, prefill.MIN_CAPACITY),
  )
  assert_scored_as_generated(again, [completions[i] for i in order])


def test_rosters_scored_together_share_a_cache_and_nothing_else(monkeypatch):
  texts, _, _ = generated("olmoe", "clean", sampled=True)
  config, params = tiny_model("olmoe")
  names = "plain", "standard", "clean", "clean, without the clean member"
  rosters = [Roster.create(config, seed=6, **ROSTERS[name]) for name in names]
  bias = np.zeros((config.num_layers, config.num_experts), np.float32)
  bias[:, 0] = -np.inf
  rosters.append(rosters[2].replace(router_bias=jnp.asarray(bias)))
  settings = dict(starts=STARTS, request_ids=IDS, output_temperatures=(1.0, 0.5))
  alone = [score("olmoe", texts, roster=roster, **settings) for roster in rosters]
  filled = []
  fill = prefill.fill_cache
  monkeypatch.setattr(
    prefill, "fill_cache", lambda *a, **k: filled.append(a[2].num_members) or fill(*a, **k)
  )
  shape = (4, prefill.MIN_CAPACITY)
  together = score_lib.score_rosters(params, config, texts, rosters, min_shape=shape, **settings)
  assert len(filled) == 2  # with and without the bias
  for scores, own, roster in zip(together, alone, rosters):
    assert scores.settings["roster"] == roster.settings()
    for one, other in zip(scores.sequences, own):
      if roster.is_baseline:  # its last keys and values are of another chunk
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=TOLERANCE, rtol=0)
      else:
        np.testing.assert_array_equal(one.log_probs, other.log_probs)
      np.testing.assert_array_equal(one.greedy_tokens, other.greedy_tokens)


@pytest.mark.parametrize("needed, chunk", [(1, 1), (2, 4), (4, 4), (5, 16), (64, 32), (5000, 256)])
def test_few_scored_positions_are_little_padded(needed, chunk):
  config, _ = tiny_model("olmoe")
  roster = Roster.create(config, 3, 0.5)
  assert score_lib.default_chunk_size(config, roster, 1, needed) == chunk


@pytest.mark.parametrize("name", ["plain", "standard"])
def test_greedy_generation_takes_the_most_probable_tokens(name):
  texts, completions, roster = generated("olmoe", name, sampled=False)
  scores = score(
    "olmoe", texts, starts=STARTS, roster=roster, request_ids=IDS, output_temperatures=(1.0, 0.5)
  )
  assert_scored_as_generated(scores, completions)
  for one, completion in zip(scores, completions):
    np.testing.assert_array_equal(one.greedy_tokens, completion.tokens)
    np.testing.assert_array_equal(one.greedy_log_probs, one.log_probs)
  texts = [t[:s] + [(x + 1) % 61 for x in t[s:]] for t, s in zip(texts, STARTS)]
  for one in score("olmoe", texts, starts=STARTS, roster=roster, request_ids=IDS):
    assert np.all(one.greedy_log_probs[0] > one.log_probs[0])


@pytest.mark.parametrize(
  "name, history", [("clean", "clean"), ("standard", "standard"), ("none", "standard")]
)
def test_caches_generate_what_recomputing_does(name, history):
  texts, completions, _ = generated("olmoe", name, sampled=True)
  recomputed_texts, recomputed, _ = generated("olmoe", history + ", recomputed", sampled=True)
  assert recomputed_texts == texts
  for one, other in zip(completions, recomputed):
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=TOLERANCE, rtol=0)
    assert one.clean_tokens == other.clean_tokens


@pytest.mark.parametrize("family, name", [("olmoe", "standard"), ("gpt_oss", "clean")])
def test_bfloat16_is_scored_as_generated(family, name):
  """Whatever is rounded, is rounded alike; other experts at near ties, after
  float32 sums in another order, may befall a few tokens. Also where layers slide."""
  config = tiny.config(family, dtype="bfloat16")
  params = tiny.params(config)
  roster = Roster.create(config, seed=6, **ROSTERS[name])
  completions = decode.generate(
    params, config, PROMPTS, max_new_tokens=8, roster=roster, stop_tokens=()
  ).completions
  texts = [p + c.tokens for p, c in zip(PROMPTS, completions)]
  scores = score_lib.score(params, config, texts, STARTS, roster=roster).sequences
  differences = np.concatenate(
    [s.log_probs[:, 0] - c.log_probs for s, c in zip(scores, completions)]
  )
  assert np.median(np.abs(differences)) < TOLERANCE


def test_rosters_are_worth_testing():
  """The members change the probabilities by far more than the tolerance, and
  the settings differ from one another."""
  texts, _, _ = generated("olmoe", "clean", sampled=True)
  results = [
    np.concatenate(
      [
        s.log_probs
        for s in score(
          "olmoe",
          texts,
          starts=STARTS,
          request_ids=IDS,
          roster=Roster.create(tiny_model("olmoe")[0], seed=6, **ROSTERS[name]),
        )
      ]
    )
    for name in ROSTERS
    if "recomputed" not in name and name != "none"  # which is "standard"
  ]
  for i in range(len(results)):
    for j in range(i):
      assert np.median(np.abs(results[i] - results[j])) > 100 * TOLERANCE


def test_request_ids_and_seed_matter():
  texts, _, roster = generated("olmoe", "clean", sampled=True)

  def log_probs(roster, ids):
    return np.concatenate(
      [s.log_probs for s in score("olmoe", texts, starts=STARTS, roster=roster, request_ids=ids)]
    )

  base = log_probs(roster, IDS)
  for other in (
    log_probs(roster, [i ^ 1 for i in IDS]),
    log_probs(roster.replace(seed=jnp.uint32(7)), IDS),
  ):
    assert np.median(np.abs(base - other)) > 100 * TOLERANCE


def test_output_temperatures_rescale_the_aggregated_distribution(olmoe):
  config, params = olmoe
  texts = tiny.texts([12, 12, 12, 12], seed=1)
  temperatures = (0.5, 1.0, 1.7)
  scores = score_lib.score(params, config, texts, output_temperatures=temperatures)
  log_probs = np.asarray(forward(params, config, jnp.asarray(texts)), np.float64)
  for row, text in enumerate(texts):
    for column, temperature in enumerate(temperatures):
      p = np.exp(log_probs[row, :-1] / temperature)
      expected = np.log(p[np.arange(11), text[1:]] / p.sum(-1))
      np.testing.assert_allclose(
        scores.sequences[row].log_probs[:, column], expected, atol=TOLERANCE / temperature, rtol=0
      )


def test_a_roster_is_rescaled_after_aggregation():
  """One token's probability at a temperature follows from all tokens' at 1."""
  texts, _, roster = generated("olmoe", "clean", sampled=True)
  text, vocabulary = texts[0][:6], range(61)
  scores = score(
    "olmoe",
    [text + [t] for t in vocabulary],
    starts=[6] * 61,
    roster=roster,
    request_ids=[4] * 61,
    output_temperatures=[1.0, 2.0],
    batch_size=61,
  )
  at_one, at_two = np.array([s.log_probs[-1] for s in scores], np.float64).T
  np.testing.assert_allclose(np.exp(at_one).sum(), 1, rtol=1e-5)
  expected = at_one / 2 - np.log(np.exp(at_one / 2).sum())
  np.testing.assert_allclose(at_two, expected, atol=TOLERANCE, rtol=0)


# Perplexity


@functools.partial(jax.jit, static_argnames="config")
def forward(params, config, tokens):
  return jax.nn.log_softmax(transformer.forward(params, config, tokens)[0])


@pytest.fixture(scope="module")
def text():
  return tiny.texts([83], seed=7)[0]


@pytest.mark.parametrize("window, stride", [(16, 8), (16, 15), (16, 1), (48, None)])
def test_every_token_but_the_first_is_scored_once_in_its_window(olmoe, text, window, stride):
  config, params = olmoe
  result = score_lib.perplexity(params, config, text, window=window, stride=stride, batch_size=4)
  stride = stride or window // 2
  assert result.nll.shape == (82, 1)
  # Windows as their definition has them: the first that holds a token scores it.
  expected, used = [], set()
  for token in range(1, len(text)):
    begin = next(b for b in range(0, len(text), stride) if token < b + window)
    assert begin == 0 or token - begin >= window - stride  # the promised context
    used.add(begin)
    expected.append((begin, token))
  assert result.num_windows == len(used)
  rows = np.zeros((len(text), 48), np.int32)  # one shape, so that it compiles once
  for row, begin in zip(rows, sorted(used)):
    row[: len(text[begin : begin + window])] = text[begin : begin + window]
  log_probs = dict(zip(sorted(used), np.asarray(forward(params, config, jnp.asarray(rows)))))
  expected = np.array([-log_probs[b][t - b - 1, text[t]] for b, t in expected])
  np.testing.assert_allclose(result.nll[:, 0], expected, atol=TOLERANCE, rtol=0)
  np.testing.assert_allclose(
    result.perplexity, np.exp(expected.astype(np.float64).mean()), rtol=TOLERANCE
  )
  assert result.settings["window"] == window and result.settings["stride"] == stride
  json.dumps(result.settings)


@pytest.mark.parametrize("length, window", [(12, 12), (12, 48), (2, 2)])
def test_a_window_that_holds_the_text_is_a_direct_score(text, length, window):
  config, params = tiny_model("olmoe")
  _, _, roster = generated("olmoe", "clean", sampled=True)
  result = score_lib.perplexity(
    params, config, text[:length], window=window, roster=roster, output_temperatures=(1.0, 1.3)
  )
  direct = score_lib.score(
    params, config, [text[:length]], roster=roster, output_temperatures=(1.0, 1.3)
  )
  np.testing.assert_array_equal(result.nll, -direct.sequences[0].log_probs)
  np.testing.assert_array_equal(
    np.log(result.perplexity).astype(np.float32), score_lib.mean_nll(direct).astype(np.float32)
  )
  assert result.num_windows == 1


def test_windows_of_a_roster_have_noise_of_their_own():
  """A window is a request: the same tokens in another window see other noise."""
  config, params = tiny_model("olmoe")
  _, _, roster = generated("olmoe", "clean", sampled=True)
  repeated = tiny.texts([8], seed=3)[0] * 4
  result = score_lib.perplexity(
    params,
    config,
    repeated,
    window=16,
    stride=8,
    roster=roster,
    batch_size=1,
    output_temperatures=(1.0, 1.3),
  )
  second, third = result.nll[15:23], result.nll[23:31]  # the same tokens and contexts
  assert np.median(np.abs(second - third)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["clean", "none"])
def test_candidates_for_the_last_token_are_scored_as_texts_of_their_own(name):
  _, _, roster = generated("olmoe", name, sampled=True)
  candidates = [[7, 3], [5, 1, 60], [9]]
  texts = [text[:-1] + [c[0]] for text, c in zip(tiny.texts([20, 6, 9], seed=5), candidates)]
  starts, ids = [18, 4, 3], [3, 1, 4]
  together = score(
    "olmoe",
    texts,
    starts=starts,
    roster=roster,
    request_ids=ids,
    candidates=candidates,
    chunk_size=4,
    output_temperatures=(1.0, 1.7),
  )
  for text, start, i, found, choices in zip(texts, starts, ids, together, candidates):
    alone = score(
      "olmoe",
      [text[:-1] + [c] for c in choices],
      starts=[start] * len(choices),
      roster=roster,
      request_ids=[i] * len(choices),
      chunk_size=8,
      output_temperatures=(1.0, 1.7),
    )
    assert found.candidate_log_probs.shape == (len(choices), 2)
    for candidate, one in zip(found.candidate_log_probs, alone):
      np.testing.assert_allclose(candidate, one.log_probs[-1], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(found.log_probs, alone[0].log_probs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["plain", "clean"])
def test_a_text_may_have_one_token_more_than_the_context(name):
  """The last token is only predicted; what comes before it is a text that fits."""
  _, _, roster = generated("olmoe", name, sampled=True)
  (text,) = tiny.texts([49], seed=6)
  (whole,) = score("olmoe", [text], starts=[40], roster=roster)
  (shorter,) = score("olmoe", [text[:-1]], starts=[40], roster=roster)
  assert whole.log_probs.shape == (9, 1)
  np.testing.assert_allclose(whole.log_probs[:-1], shorter.log_probs, atol=TOLERANCE, rtol=0)


def test_batches_padded_to_one_shape_share_their_programs():
  config, params = tiny_model("olmoe")
  roster = Roster.create(config, 2, 0.5)
  score = functools.partial(score_lib.score, params, config, roster=roster, min_shape=(4, 192))
  expected = score(tiny.texts([30, 20, 9, 30]), request_ids=[0, 1, 2, 3])
  functions = (prefill.prefill_chunk, score_lib.score_chunk)
  before = [f._cache_size() for f in functions]
  found = score(tiny.texts([30, 20, 9, 30])[:3], request_ids=[0, 1, 2])
  assert [f._cache_size() for f in functions] == before
  for one, other in zip(found.sequences, expected.sequences):
    np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-5)


def test_batches_by_length_hold_every_text_once_in_few_shapes():
  lengths = np.random.RandomState(0).randint(1, 700, 101).tolist()
  batches = batching.by_length(lengths, 8, 128)
  assert sorted(i for batch, _ in batches for i in batch) == list(range(101))
  assert {room for _, room in batches} == {128, 256, 512, 1024}
  for batch, room in batches:
    assert len(batch) <= 8
    assert all(room // 2 < max(lengths[i], 65) <= room for i in batch)
  assert sum(len(batch) < 8 for batch, _ in batches) <= 4  # one for each shape
  longest = [lengths[batch[0]] for batch, _ in batches]
  assert longest == sorted(longest, reverse=True)


# Errors


@pytest.mark.parametrize(
  "texts, options, message",
  [
    ([[]], {}, "sequence 0 is empty"),
    ([[1] * 50], {}, "50 tokens.*context of 48"),
    ([[1, 61]], {}, "token id 61"),
    ([[1, 2]], dict(starts=[1, 1]), "2 starts for 1 sequences"),
    ([[1, 2]], dict(starts=[0]), r"\[1, 2\], got 0"),
    ([[1, 2]], dict(starts=[3]), r"\[1, 2\], got 3"),
    ([[1, 2]], dict(output_temperatures=[]), "output_temperatures"),
    ([[1, 2]], dict(output_temperatures=[1.0, 0.0]), "output_temperatures"),
    ([[1, 2]], dict(output_temperatures=1.0), "output_temperatures"),
    ([[1, 2]], dict(batch_size=0), "batch_size"),
    ([[1, 2]], dict(chunk_size=0), "chunk_size"),
    ([[1, 2]], dict(request_ids=[1, 2]), "request ids"),
    ([[1, 2]], dict(candidates=[]), "candidates for 0 of 1"),
    ([[1, 2]], dict(candidates=[[61]]), "sequence 0: candidate 0 has token id 61"),
  ],
  ids=str,
)
def test_wrong_input_is_refused(texts, options, message):
  with pytest.raises(ValueError, match=message):
    score("olmoe", texts, **options)


@pytest.mark.parametrize(
  "length, options, message",
  [
    (1, {}, "two tokens"),
    (9, dict(window=1), "window"),
    (9, dict(window=49), "window.*48"),
    (9, dict(window=8, stride=8), "stride"),
    (9, dict(window=8, stride=0), "stride"),
  ],
  ids=str,
)
def test_wrong_windows_are_refused(olmoe, length, options, message):
  with pytest.raises(ValueError, match=message):
    score_lib.perplexity(olmoe[1], olmoe[0], [1] * length, **options)


def test_a_text_scored_from_its_end_has_no_scores():
  one, other = score("olmoe", [[1, 2, 3], [4, 5]], starts=[3, 1])
  assert one.log_probs.shape == (0, 1) and other.log_probs.shape == (1, 1)
  with pytest.raises(ValueError, match="no token"):
    config, params = tiny_model("olmoe")
    score_lib.mean_nll(score_lib.score(params, config, [[1, 2, 3]], starts=[3]))


def test_progress_and_settings():
  config, params = tiny_model("olmoe")
  counts = []
  scores = score_lib.score(
    params, config, tiny.texts([3, 4, 5]), batch_size=2, on_batch=counts.append
  )
  assert counts == [2, 1]
  settings = json.loads(json.dumps(scores.settings))
  assert settings["roster"] == Roster.create(config).settings()
  assert settings["output_temperatures"] == [1.0]


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda m, c: decode.generate(m, c, ["hello"], max_new_tokens=1), "prompt 0 is text, 'hello'"),
    (lambda m, c: decode.generate(m, c, "hello", max_new_tokens=1), "prompt 0 is text, 'hello'"),
    (
      lambda m, c: decode.generate(m, c, [1, 2], max_new_tokens=1),
      r"pass \[tokens\] for one prompt",
    ),
    (lambda m, c: next(decode.stream(m, c, "hello", max_new_tokens=1)), "tokenizer.encode"),
    (lambda m, c: score_lib.score(m, c, [1, 2]), r"pass \[tokens\] for one sequence"),
    (lambda m, c: score_lib.score(m, c, [[1.5, 2]]), "integer token ids, got float64"),
    (lambda m, c: score_lib.perplexity(m, c, "hello world"), "is text"),
    (
      lambda m, c: score_lib.perplexity(m, c, [[1, 2, 3]]),
      r"integer token ids, got int64 \[1, 3\]",
    ),
    (lambda m, c: transformer.forward(m, c, [1, 2]), r"integer token ids \[B, T\]"),
    (lambda m, c: transformer.forward(m, c, [[1, 2], [1]]), r"integer token ids \[B, T\]"),
    (lambda m, c: transformer.forward(m, c, "hello"), r"integer token ids \[B, T\]"),
    (
      lambda m, c: jax.grad(lambda m: transformer.forward(m, c, jnp.ones((1, 2), int))[0].sum())(m),
      'not differentiable.*strategy="padded"',
    ),
    (lambda m, c: checkpoint.load("embedded:wordmath_control"), "roe_jax.open_model"),
  ],
)
def test_misuse_gets_a_sentence(olmoe, call, message):
  config, params = olmoe
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    call(params, config)


def test_non_finite_logits_are_an_error_that_names_sequence_and_position(olmoe):
  config, params = olmoe
  params = params.replace(embedding=params.embedding.at[5].set(np.nan))
  roster = Roster.create(config, 2, 0.3)
  with pytest.raises(FloatingPointError, match="sequence 1 .* at position 2 are NaN"):
    score_lib.score(params, config, [[1, 2, 3], [3, 4, 5, 6]], [1, 3], roster=roster)
  with (
    pytest.raises(FloatingPointError, match="logits of the other at position 2 are NaN"),
    naming_sequences(["one", "the other"]),
  ):
    score_lib.score(params, config, [[1, 2, 3], [3, 4, 5, 6]], [1, 3], roster=roster)
