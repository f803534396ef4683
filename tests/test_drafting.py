"""Self-speculative decoding gives the tokens of ordinary decoding, whatever is drafted."""

import numpy as np
import pytest
import tiny

from roe_jax import decode, drafting, scoring
from roe_jax.rope import Yarn
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler

PROMPTS = tiny.texts([13, 1, 5, 9, 2])
NEW = 20
SLIDING = dict(
  sliding_window=5,
  sliding_layers=(0, 2),
  attention_sinks=True,
  rope_scaling=Yarn(4.0, 8, 32.0, 1.0, False, 1.2),
)
CASES = {
  "sampled, contrasted": (
    {},
    dict(num_members=3, temperatures=[0, 0.4, 0], aggregation="contrast"),
    {"sampler": Sampler.create(0.8)},
  ),
  "sliding": (SLIDING, dict(num_members=4, temperatures=0.3), {"batch_size": 2}),
  "majority without the clean member, in batches of one": (
    {},
    dict(
      num_members=4, temperatures=0.3, include_clean=False, memory_budget=1, aggregation="majority"
    ),
    {"stop_tokens": range(0, 60, 7), "batch_size": 3},
  ),
  "adaptive, with latent attention": (
    dict(family="deepseek_v3", sliding_window=5, sliding_layers=(1,)),
    dict(num_members=5, temperatures=0.4, unsure="margin<0.6", member_stop="exact"),
    {},
  ),
}


def model(changes):
  family = "mixtral" if changes else "olmoe"
  config = tiny.config(**dict(family=family) | changes)
  return tiny.params(config), config


def assert_same(drafted, plain):
  for one, other in zip(drafted, plain, strict=True):
    assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
    assert (one.text, one.members) == (other.text, other.members)
    assert one.clean_tokens == other.clean_tokens
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=3e-5)


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_without_drafts(case):
  changes, roster, options = CASES[case]
  params, config = model(changes)
  options = {"max_new_tokens": NEW, "stop_tokens": ()} | options
  rosters = [Roster.create(config, seed=3, draft_tokens=count, **roster) for count in (0, 4)]
  roster = rosters[0]
  plain, drafted = (
    decode.generate(params, config, PROMPTS, roster=each, **options) for each in rosters
  )
  assert drafted.throughput.steps < plain.throughput.steps
  kept = sum(len(c.tokens) for c in plain.completions)
  assert kept < drafted.throughput.drafted  # some were not kept
  assert_same(drafted.completions, plain.completions)
  computed = sum(c.forward_passes for c in plain.completions)
  assert computed == sum(sum(c.members) for c in plain.completions)
  more = sum(c.forward_passes for c in drafted.completions)
  if case.startswith("adaptive"):
    sequences = [p + c.tokens for p, c in zip(PROMPTS, plain.completions)]
    scores = scoring.score(params, config, sequences, list(map(len, PROMPTS)), roster=roster)
    for completion, score in zip(plain.completions, scores.sequences):
      assert completion.members == score.members.tolist()
      np.testing.assert_allclose(completion.log_probs, score.log_probs[:, 0], atol=3e-5)
    assert len({m for c in plain.completions for m in c.members}) > 2 and more > computed
  else:
    assert more == drafted.throughput.drafted * len(roster.members)


@pytest.fixture(scope="module")
def greedy(olmoe):
  config, params = olmoe
  roster = Roster.create(config, 4, 0.3)
  return (params, config), roster, {"max_new_tokens": NEW, "stop_tokens": ()}


def test_neither_draft_lengths_nor_companions_matter(greedy):
  """The lengths are 6, 3 and 2: each is another program, and the first is too long."""
  arguments, roster, options = greedy
  plain = decode.generate(*arguments, PROMPTS, roster=roster, **options).completions
  steps = set()
  for count, batch_size, chosen in ((6, 2, [0, 1, 2, 3, 4]), (3, 2, [4, 2, 0]), (2, 2, [1, 3])):
    found = decode.generate(
      *arguments,
      [PROMPTS[i] for i in chosen],
      request_ids=chosen,
      batch_size=batch_size,
      roster=roster.replace(draft_tokens=count),
      **options,
    )
    assert_same(found.completions, [plain[i] for i in chosen])
    steps.add(found.throughput.steps)
  assert len(steps) == 3


def test_the_draft_length_follows_what_is_kept(olmoe):
  config, _ = olmoe
  length = drafting.DraftLength(Roster.create(config, 2, 0.3, draft_tokens=8))
  sizes = []
  for rate in [0.0] * 3 + [1.0] * 3:
    sizes.append(length.size)
    length.update(100, int(100 * (1 + rate * (length.size - 1))))
  assert sizes == [8, 4, 2, 2, 4, 8] and length.size == 8
  length.update(1, 1)  # too few to decide
  assert length.size == 8
  # Whatever is kept, there are few lengths: each is a program.
  random = np.random.default_rng(0)
  for most, lengths in ((6, {6, 3, 2}), (100, {100, 50, 25, 12, 6, 3, 2})):
    length, seen = drafting.DraftLength(Roster.create(config, 2, 0.3, draft_tokens=most)), set()
    for rate in random.choice([0.0, 0.7, 1.0], 200):
      seen.add(length.size)
      length.update(100, int(100 * (1 + rate * (length.size - 1))))
    assert seen == lengths
  # The baseline's own tokens need no check.
  assert drafting.DraftLength(Roster.create(config, 1, 0.3, draft_tokens=8)).size == 1


@pytest.mark.parametrize("stop_strings", [(), ("c",)])
def test_a_stream_yields_each_token(greedy, stop_strings):
  arguments, roster, options = greedy

  def run(draft_tokens):
    return list(
      decode.stream(
        *arguments,
        PROMPTS[0],
        stop_strings=stop_strings,
        decode=lambda tokens: "".join(chr(97 + t // 8) + str(t % 8) for t in tokens),
        roster=roster.replace(draft_tokens=draft_tokens),
        **options,
      )
    )

  plain, drafted = run(0), run(4)
  assert_same(drafted, plain)
  assert (plain[-1].finish_reason == "stop_string") == bool(stop_strings)


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"draft_tokens": 1}, "draft_tokens must be 0"),
    ({"draft_tokens": -2}, "draft_tokens must be 0"),
    ({"draft_tokens": 2.0}, "draft_tokens must be 0"),
    ({"draft_tokens": 4, "cache": "standard"}, "draft_tokens needs a cache that all members share"),
    ({"unsure": "margin<0.5", "cache": "none"}, "unsure needs a cache"),
    ({"member_stop": "exact", "cache": "standard"}, "member_stop needs a cache"),
    ({"unsure": "margin>0.5"}, "unsure must have one of the forms"),
    ({"unsure": "top_probability<nan"}, "unsure must have one of the forms"),
    ({"unsure": "surprise<1"}, "unsure must have one of the forms"),
    ({"member_stop": 0.5}, 'member_stop must be "exact" or an error rate'),
    ({"member_stop": "soon"}, 'member_stop must be "exact" or an error rate'),
    ({"member_stop": "exact", "aggregation": "mean_logit"}, "member_stop needs an aggregation"),
  ],
)
def test_wrong_settings_are_refused(olmoe, settings, message):
  with pytest.raises(ValueError, match=message):
    Roster.create(olmoe[0], 4, 0.3, **settings)
