"""Self-speculative decoding gives the tokens of ordinary decoding, whatever is drafted."""

import numpy as np
import pytest
import tiny

from roe_jax import decode, drafting
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
# Stop tokens, slots that are used again, all aggregations, and a clean member that is not averaged.
CASES = {
  "greedy": ({}, dict(num_members=4, temperatures=0.3), {}),
  "sampled": ({}, dict(num_members=3, temperatures=[0, 0.4, 0]), {"sampler": Sampler.create(0.8)}),
  "sliding": (SLIDING, dict(num_members=4, temperatures=0.3), {"batch_size": 2}),
  "no clean member": (
    {},
    dict(num_members=3, temperatures=0.3, include_clean=False, aggregation="mean_logit"),
    {"batch_size": 3},
  ),
  "members in batches": (
    {},
    dict(num_members=5, temperatures=0.3, memory_budget=1, aggregation="majority"),
    {"stop_tokens": range(0, 60, 7)},
  ),
  "contrast": ({}, dict(num_members=2, temperatures=0.5, aggregation="contrast"), {}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
  changes, roster, options = CASES[request.param]
  config = tiny.config("olmoe" if not changes else "mixtral", **changes)
  params, roster = tiny.params(config), Roster.create(config, seed=3, **roster)
  options = {"max_new_tokens": NEW, "stop_tokens": (), "roster": roster} | options

  def run(prompts=PROMPTS, **more):
    return decode.generate(params, config, prompts, **(options | more))

  return params, config, options, run, run()


@pytest.mark.parametrize("draft_tokens", [2, 5, 16])
def test_tokens_are_those_without_drafts(case, draft_tokens):
  *_, run, plain = case
  drafted = run(draft_tokens=draft_tokens)
  assert drafted.throughput.drafted and drafted.throughput.steps < plain.throughput.steps
  for one, other in zip(drafted.completions, plain.completions, strict=True):
    assert one.tokens == other.tokens and one.finish_reason == other.finish_reason
    assert one.clean_tokens == other.clean_tokens and one.members == other.members
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=3e-5)
