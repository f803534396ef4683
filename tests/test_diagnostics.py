"""What routing does inside the model, against one member and one position at a time."""

import numpy as np
import numpy_roster
import pytest
import tiny

from roe_jax import diagnostics
from roe_jax.roster import Roster

TEXTS = tiny.texts([9, 6, 8, 7])
STARTS = [4, 2, 6, 3]
IDS = [7, 0, 2**32 - 1, 5]


def experts_by_definition(model, roster):
  """{(layer, text, position): experts of all members}, from the float64 model."""
  config, params = model
  found = {}
  for row, (text, request) in enumerate(zip(TEXTS, IDS)):

    def record(layer, position, chosen):
      found.setdefault((layer, row, position), []).append(chosen.tolist())

    numpy_roster.member_logits(params, config, roster, text, request, record)
  return found


@pytest.mark.parametrize(
  "settings",
  [
    dict(num_members=3, temperatures=[0.0, 0.8, 0.4], seed=9),
    dict(num_members=3, temperatures=[0.0, 0.8, 0.0], seed=9, cache="standard"),
    dict(experts_by_layer=[3, 2, 1]),
  ],
  ids=str,
)
@pytest.mark.slow
def test_unique_experts_are_counted(olmoe, settings):
  config, params = olmoe
  roster = Roster.create(config, **settings)
  found = experts_by_definition(olmoe, roster)
  by_position, by_step, per_member = [], [], []
  for layer in range(config.num_layers):
    sets, steps, counts = [], {}, []
    for row, (text, start) in enumerate(zip(TEXTS, STARTS)):
      for step, position in enumerate(range(start - 1, len(text) - 1)):
        experts = set(np.ravel(found[layer, row, position]).tolist())
        sets.append(len(experts))
        counts += map(len, found[layer, row, position])
        steps.setdefault(step, set()).update(experts)
    by_position.append(np.mean(sets))
    by_step.append(np.mean([len(s) for s in steps.values()]))
    per_member.append(np.mean(counts))
  unique = diagnostics.unique_experts(params, config, roster, TEXTS, STARTS, IDS, batch_size=2)
  assert unique.num_steps == 5
  np.testing.assert_allclose(unique.by_position, by_position)
  np.testing.assert_allclose(unique.by_step, by_step)
  np.testing.assert_allclose(unique.per_member, per_member)
  if "seed" in settings:
    # Without noise in the first layer all members are one.
    assert unique.by_position[0] == config.experts_per_token < unique.by_position[1]


def test_what_cannot_be_counted_is_refused(olmoe):
  config, params = olmoe
  with pytest.raises(ValueError, match="rosters with a cache"):
    diagnostics.unique_experts(params, config, Roster.create(config, cache="none"), TEXTS)
  with pytest.raises(ValueError, match="no token is predicted"):
    diagnostics.unique_experts(params, config, Roster.create(config), [[1, 2]], [2])
  with pytest.raises(ValueError, match="no token is predicted"):
    diagnostics.router_scales(params, config, [[1, 2]], [2])
  with pytest.raises(ValueError, match="uses all of its 3 experts"):
    diagnostics.router_scales(params, config.replace(num_experts=3), TEXTS)


def assert_scales(params, config, texts, logits_LxBxSxE):
  """The scales of router logits, and the gates of the last position, by hand."""
  scales = diagnostics.router_scales(params, config, texts, [3, 1])
  rows = [logits_LxBxSxE[:, 0, 2 : len(texts[0]) - 1], logits_LxBxSxE[:, 1, : len(texts[1]) - 1]]
  logits = np.sort(np.concatenate(rows, axis=1), axis=-1).astype(np.float64)
  count = config.experts_per_token
  np.testing.assert_allclose(scales["spread"], logits.std(-1).mean(1), rtol=1e-4)
  margin = (logits[..., -count] - logits[..., -count - 1]).mean(1)
  np.testing.assert_allclose(scales["margin"], margin, rtol=1e-4)
  np.testing.assert_array_equal(scales["logits"], np.ones(config.num_layers))
  gates = diagnostics.last_gates(params, config, Roster.create(config), texts)
  for i, text in enumerate(texts):
    p = np.exp(logits_LxBxSxE[:, i, len(text) - 1].astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    expected = np.where(p >= np.sort(p)[:, -count, None], p, 0)
    np.testing.assert_allclose(gates[i], expected, rtol=1e-4)


@pytest.mark.parametrize("cache", ["clean", "standard", "none"])
def test_logits_and_routing_of_members_are_those_of_the_definition(olmoe, cache):
  config, params = olmoe
  roster = Roster.create(config, 3, [0.0, 0.8, 0.4], seed=9, cache=cache, gate_weights="noisy")
  texts, ids = [TEXTS[0], TEXTS[0][:3]], [3, 8]
  arguments = dict(roster=roster, request_ids=ids)
  logits = diagnostics.member_logits(params, config, texts, all_positions=True, **arguments)
  last = diagnostics.member_logits(params, config, texts, **arguments)
  after = diagnostics.next_token_distributions(params, config, texts, **arguments)
  for i, text in enumerate(texts):
    expected = numpy_roster.member_logits(params, config, roster, text, ids[i])
    np.testing.assert_allclose(logits[:, i, : len(text)], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(last[:, i], expected[:, -1], rtol=1e-4, atol=1e-4)
    mean = np.mean([np.exp(z) / np.exp(z).sum() for z in expected[:, -1]], axis=0)
    np.testing.assert_allclose(after[i], np.log(mean), rtol=1e-4, atol=1e-4)
  trace = diagnostics.trace(params, config, texts, **arguments)
  for i, text in enumerate(texts):
    np.testing.assert_allclose(
      trace.logits[:, i, : len(text)], logits[:, i, : len(text)], rtol=1e-4, atol=1e-4
    )
  if cache == "clean":
    assert_scales(params, config, texts, trace.router_logits[:, 0])
  # No noise in the first layer and in the clean member: the best of the softmax, by hand.
  best = np.argsort(-trace.router_logits[0], axis=-1)[..., : config.experts_per_token]
  length = len(texts[1])
  np.testing.assert_array_equal(trace.experts[0][:, :, :length], best[:, :, :length])
  probabilities = np.exp(trace.router_logits[0])
  probabilities /= probabilities.sum(-1, keepdims=True)
  gates = np.take_along_axis(probabilities, trace.experts[0], -1)
  np.testing.assert_allclose(trace.gates[0], gates, rtol=1e-5)
  assert np.any(trace.experts[1, 1, 0, : len(TEXTS[0])] != trace.experts[1, 0, 0, : len(TEXTS[0])])


def test_last_logits_do_not_depend_on_where_a_prefill_chunk_ends(olmoe):
  """The first ends a chunk of 32 positions within its last four."""
  config, params = olmoe
  roster, texts = Roster.create(config, 2, 0.6, seed=9), tiny.texts([35, 30])
  arguments = dict(request_ids=[3, 8])
  expected = diagnostics.member_logits(
    params, config, texts, roster=roster, all_positions=True, **arguments
  )
  (last,) = diagnostics.last_member_logits(
    params, config, texts, [roster], num_positions=4, **arguments
  )
  for i, text in enumerate(texts):
    wanted = expected[:, i, len(text) - 4 : len(text)]
    np.testing.assert_allclose(last[:, i], wanted, rtol=1e-4, atol=1e-4)
