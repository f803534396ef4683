"""Requests in batches, answered once, and what they cost."""

import dataclasses
import hashlib
import json
import time
import types

import jax
import numpy as np
import pytest
import tiny

from experiments.evaluation import engine as engine_lib
from experiments.evaluation import requests as requests_lib
from experiments.evaluation.answers import Answers
from experiments.evaluation.engine import Engine, Stopwatch
from experiments.evaluation.requests import Continuation, Prompt, request_id
from experiments.records.cost import Cost
from roe_jax import scoring as score_lib
from roe_jax.roster import Roster

pytestmark = pytest.mark.slow

TOLERANCE = 3e-5  # nats, of float32 sums in another order


class Letters:
  """A tokenizer whose tokens are letters and signs."""

  def decode(self, ids):
    return "".join(chr(48 + i) for i in ids)


@pytest.fixture(scope="module")
def roster(olmoe):
  return Roster.create(olmoe[0], 3, [0, 0.7, 0.4], seed=5)


class Answering:
  """An engine and its answers."""

  def __init__(self, olmoe, roster, saved=None, batch_size=4):
    config, params = olmoe
    self.engine = Engine(params, config, Letters(), roster, batch_size)
    self.saved = saved or Answers()

  def answer(self, requests, on_answered=lambda count: None):
    return self.saved.complete(self.engine, requests, on_answered)


def requests():
  """Questions with choices of one and of two tokens, and prompts."""
  contexts = [tuple(t) for t in tiny.texts([9, 3, 20, 14, 7, 30], seed=1)]
  made = []
  for i, context in enumerate(contexts):
    made += [
      Continuation(context, tokens, request_id(str(context)))
      for tokens in ((5,), (6,), (7, i), (7, 60))
    ]
  made += [Prompt(context, request_id(str(context)), 6, stop=("5",)) for context in contexts]
  return made


@pytest.fixture(scope="module")
def answered(olmoe, roster):
  """Requests, and their answers all at once."""
  made = requests()
  return made, Answering(olmoe, roster).answer(made)


def assert_same(one, other):
  for found, expected in zip(one, other, strict=True):
    assert found.keys() == expected.keys()
    assert found["log_prob"] == pytest.approx(expected["log_prob"], abs=TOLERANCE)
    assert {k: v for k, v in found.items() if k not in ("log_prob", "cost")} == {
      k: v for k, v in expected.items() if k not in ("log_prob", "cost")
    }


def test_addresses_are_bits_of_a_hash_of_the_text():
  digest = hashlib.blake2b(b"0\nWhat is 1+1?", digest_size=4).hexdigest()
  little = "".join(digest[i : i + 2] for i in (6, 4, 2, 0))
  assert request_id("What is 1+1?") == int(little, 16)
  addresses = {request_id(f"question {i}", sample) for i in range(1000) for sample in range(3)}
  assert len(addresses) == 3000 and all(0 <= a < 2**32 for a in addresses)


def test_neither_order_nor_batches_nor_a_limit_matter(olmoe, roster, answered):
  made, expected = answered
  order = np.random.RandomState(0).permutation(len(made))[:17]
  found = Answering(olmoe, roster, batch_size=3).answer([made[i] for i in order])
  assert_same(found, [expected[i] for i in order])
  assert len({a["text"] for a in expected[-6:]}) > 1


def test_choices_are_scored_as_texts_of_their_own(olmoe, roster, answered):
  config, params = olmoe
  for request, answer in list(zip(*answered))[:24]:
    (scores,) = score_lib.score(
      params,
      config,
      [request.context + request.tokens],
      [len(request.context)],
      roster=roster,
      request_ids=[request.request_id],
      min_shape=(4, 128),
    ).sequences
    assert answer["log_prob"] == pytest.approx(float(scores.log_probs.sum()), abs=TOLERANCE)
    assert answer["is_greedy"] == (scores.greedy_tokens.tolist() == list(request.tokens))
    assert answer["tokens"] == len(request.tokens)


def test_choices_that_differ_in_the_last_token_are_one_text(olmoe, roster, monkeypatch):
  counts = []
  original = score_lib.score

  def counting(params, config, texts, *args, **kwargs):
    counts.append(len(texts))
    return original(params, config, texts, *args, **kwargs)

  monkeypatch.setattr(engine_lib.scoring, "score", counting)
  made = requests()[:24]  # six questions with choices a, b, cd, ce
  made += made[:3]  # and some of them again
  Answering(olmoe, roster).answer(made)
  assert sum(counts) == 12 and max(counts) <= 4


def test_a_sample_has_noise_and_draws_of_its_own(olmoe, roster):
  context = tuple(tiny.texts([12])[0])
  made = [
    Prompt(context, request_id("context", sample), 8, sampler=(1.0, 0, 1.0)) for sample in (0, 1, 0)
  ]
  first, second, again = Answering(olmoe, roster).answer(made)
  assert first == again and first["text"] != second["text"]


def test_a_killed_run_goes_on_and_ends_with_the_same_answers(olmoe, roster, answered, tmp_path):
  made, expected = answered
  path = tmp_path / "answers.jsonl"

  def interrupted(count):
    if path.read_text().count("\n") > 8:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    Answering(olmoe, roster, Answers(path, {"a": 1})).answer(made, interrupted)
  there = path.read_text().count("\n") - 1
  assert 0 < there < len(made)
  with path.open("a") as file:  # as if it had been killed within a line
    file.write('{"key": "12')
  counts = []
  going_on = Answering(olmoe, roster, Answers(path))
  found = going_on.answer(made, counts.append)
  assert counts[0] == there and sum(counts) == len(made)
  assert [f | {"cost": None} for f in found] == [e | {"cost": None} for e in expected]
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert lines[0] == {"settings": {"a": 1}} and len(lines) == len(made) + 1
  whole = Answering(olmoe, roster)
  whole.answer(made)
  costs = [dataclasses.asdict(e.saved.cost(made)) for e in (going_on, whole)]
  assert all(cost.pop("seconds") > 0 for cost in costs)
  assert costs[0] == costs[1]


def test_answers_of_other_settings_are_in_another_file(tmp_path):
  one, other = ({"roster": {"seed": seed}} for seed in (0, 1))
  request = Continuation((1,), (2,), 3)
  answer = types.SimpleNamespace(to_json=lambda: {"log_prob": 1.0})
  engine = types.SimpleNamespace(
    answer=lambda requests, known, on_answers: on_answers(dict.fromkeys(requests, answer))
  )
  assert Answers.of(tmp_path, one).complete(engine, [request]) == [{"log_prob": 1.0}]
  assert request in Answers.of(tmp_path, one) and request not in Answers.of(tmp_path, other)


@pytest.mark.parametrize(
  "settings, before, scored, prompt, generated",
  [
    # Rows of 9 tokens before 2 that are scored, and of 9 before 6 that are generated:
    # the first token's distribution comes from the context's last token.
    (dict(num_members=1), 1, 1, 1, 1),
    (dict(num_members=3, temperatures=0.5), 1, 3, 1, 3),
    (dict(num_members=3, temperatures=0.5, cache="standard"), 3, 3, 3, 3),
  ],
)
def test_forward_rows_against_counts_by_hand(olmoe, settings, before, scored, prompt, generated):
  config, _ = olmoe
  context = tuple(tiny.texts([9])[0])
  made = [Continuation(context, (7, 1), 0), Continuation(context, (7, 2), 0), Prompt(context, 0, 6)]
  answering = Answering(olmoe, Roster.create(config, **settings))
  answering.answer(made)
  score, generate = answering.saved.cost(made[:2]), answering.saved.cost(made[2:])
  filled_first = settings["num_members"] > 1 and settings.get("cache") != "standard"
  assert score.forward_passes == (10 if filled_first else 8) * before + 2 * scored
  assert score.tokens == 3  # one shared, and a last one each
  assert generate.forward_passes == 8 * prompt + 6 * generated
  assert generate.tokens == 6
  assert 0 < score.flops and 0 < generate.flops and 0 < score.peak_bytes


def test_experts_are_counted_where_tokens_are_predicted(olmoe, roster, answered):
  """The plain model reads A experts a layer; without noise in layer 0 a roster does so there."""
  config, _ = olmoe
  made = [*answered[0][:2], answered[0][-1]]
  for setting, bounds in ((Roster.create(config), (3, 3)), (roster, (3.5, (3 + 8 + 8) / 3))):
    answering = Answering(olmoe, setting)
    answering.answer(made)
    found = answering.saved.experts_read(answering.engine, made)
    assert found.steps == 1 + 1 + answering.answer(made)[2]["tokens"]
    assert bounds[0] <= found.unique_experts_read / found.steps <= bounds[1]
  recomputing = Roster.create(config, 2, 0.5, cache="none")
  assert Answering(olmoe, recomputing).engine.experts_read(made[:2], [(), ()]) == Cost()


def test_compiling_is_not_counted():
  watch = Stopwatch()
  watch.lap()
  begin = time.perf_counter()
  time.sleep(0.03)
  inner, outer = 0.01, 0.02  # the inner span lies within the outer one
  for seconds in (inner, outer):
    jax.monitoring.record_event_duration_secs("/jax/core/compile/some_duration", seconds)
  jax.monitoring.record_event_duration_secs("/jax/another_duration", 0.01)
  seconds = watch.lap()
  assert seconds == pytest.approx(time.perf_counter() - begin - outer, abs=0.005)
  assert watch.lap() < 0.01


def test_requests_are_known_by_all_that_their_answers_depend_on():
  prompt = Prompt((1, 2), 3, 4, ("a",), (0.0, 0, 1.0), (5,), (6,))
  changes = dict(
    tokens=(1,),
    request_id=4,
    max_new_tokens=5,
    stop=("b",),
    sampler=(1.0, 0, 1.0),
    stop_tokens=(6,),
    opening=None,
  )
  assert changes.keys() == {f.name for f in dataclasses.fields(Prompt)}
  keys = {requests_lib.key(dataclasses.replace(prompt, **{k: v})) for k, v in changes.items()}
  assert len(keys | {requests_lib.key(prompt)}) == len(changes) + 1
