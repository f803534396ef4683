"""Rosters: members, caches, settings."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import numpy_roster
import pytest
import recomputed
import tiny

import roe_jax
from roe_jax import (
  aggregation,
  attention,
  decode,
  perturbations,
  prefill,
  routing,
  scoring,
  sharding,
  transformer,
)
from roe_jax import members as members_lib
from roe_jax import noise as noise_lib
from roe_jax import params as params_lib
from roe_jax.cache_modes import CACHES
from roe_jax.layer_inputs import CacheAccess
from roe_jax.roster import Roster

# Largest error over largest logit: float32 against float64, some ten layers of
# operations deep. Cached and recomputed results differ in the order of sums.
TOLERANCE = 1e-5
LENGTH = 10
TOKENS = jnp.asarray(tiny.texts([LENGTH, LENGTH], seed=4))
REQUESTS = jnp.asarray([3, 2**32 - 2], jnp.uint32)


@functools.partial(jax.jit, static_argnames=("config", "keep"))
def member_states(params, config, roster, keep=()):
  """All members at all positions of `TOKENS`, through the roster's cache."""
  cache = members_lib.empty_cache(config, roster, 2, 16, rerun=16)
  run = of_tokens(params, config, roster)
  if roster.cache_mode.is_shared:
    cache = roster.cache_mode.prefill(run, cache)
  x, _, outputs = roster.cache_mode.states(run, cache, keep)
  return x, outputs


def of_tokens(params, config, roster):
  positions = jnp.tile(jnp.arange(LENGTH), (2, 1))
  return members_lib.RosterPass(params, config, roster, TOKENS, positions, REQUESTS)


@functools.partial(jax.jit, static_argnames="config")
def aggregate(params, config, roster, x):
  return of_tokens(params, config, roster).aggregate(x)


@functools.partial(jax.jit, static_argnames="config")
def recomputed_states(params, config, roster):
  return recomputed.member_states(params, config, roster, TOKENS, REQUESTS)


def logits(model, roster):
  config, params = model
  states = member_states(params, config, roster)[0]
  return np.asarray(of_tokens(params, config, roster).unembed_members(states))


def by_definition(model, roster):
  config, params = model
  return np.stack(
    [
      numpy_roster.member_logits(params, config, roster, np.asarray(tokens), int(request))
      for tokens, request in zip(TOKENS, REQUESTS)
    ],
    axis=1,
  )


def assert_close(actual, expected, tolerance=TOLERANCE):
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert np.abs(actual - expected).max() < tolerance * np.abs(expected).max()


# Against numpy, and caches against recomputing


@pytest.mark.parametrize(
  "model, cache",
  [
    # Parity is for every family; here are those that differ in routing, in what all members
    # share, in what the cache holds, or in how logits are scaled.
    ("olmoe", "clean"),
    ("mixtral", "standard"),
    ("gpt_oss", "clean"),
    ("qwen2_moe", "standard"),
    ("granitemoeshared", "clean"),
    ("glm4_moe", "clean"),
    ("deepseek_v2", "standard"),
    ("deepseek_v3", "clean"),
  ],
  indirect=["model"],
)
def test_members_are_those_of_the_definition(model, cache):
  config, params = model
  roster = Roster.create(config, 3, [0.0, 0.8, 0.4], seed=9, cache=cache)
  expected = by_definition(model, roster)
  # The members do differ, from each other and between the caches.
  assert np.abs(expected[1] - expected[2]).max() > 0.05 * np.abs(expected).max()
  assert_close(logits(model, roster), expected)
  if config.family == "olmoe" or (config.family == "deepseek_v2" and cache == "standard"):
    # The other reference of the tests, which recomputes what a cache keeps.
    assert_close(
      transformer.unembed(params, config, recomputed_states(params, config, roster)), expected
    )


def test_members_share_the_first_dense_layers():
  config = tiny.config("glm4_moe")
  for temperatures in (0.3, [0.3] * 3):
    roster = Roster.create(config, 3, temperatures)
    assert roster.noisy_layers == (1, 3) and roster.temperatures.tolist()[0] == 0
  with pytest.raises(ValueError, match="without temperatures all members"):
    Roster.create(config, 3)


@pytest.mark.parametrize(
  "cache, noise",
  [("clean", "on_state(scale=0.7,logits=true)"), ("standard", "on_state(scale=1.5,logits=false)")],
)
def test_states_of_recurrent_routers_follow_their_members(cache, noise):
  """Through layers before the noise, those with it, and those after it; also with more norms."""
  norms = cache == "standard"
  config = tiny.config("mixtral", router="recurrent", router_state=6, sandwich_norm=norms)
  model = config, tiny.params(config)
  roster = Roster.create(config, 3, [0.0, 0.8, 0.0], seed=9, cache=cache, noise=noise)
  assert roster.noise == noise
  expected = by_definition(model, roster)
  assert np.abs(expected[1] - expected[2]).max() > 0.05 * np.abs(expected).max()
  assert_close(logits(model, roster), expected)
  params = model[1]
  # The state matters.
  forgetful = params.replace(router_cell=jax.tree.map(jnp.zeros_like, params.router_cell))
  assert np.abs(logits((config, forgetful), roster) - expected).max() > 0.1


@pytest.mark.parametrize(
  "noise, cache, gate_weights",
  [
    ("gaussian", "standard", "noisy"),
    ("swap", "clean", "noisy"),
    ("second_expert", "standard", "clean_rescaled"),
  ],
)
@pytest.mark.slow
def test_members_of_every_noise_and_gate_weights_are_those_of_the_definition(
  olmoe, noise, cache, gate_weights
):
  model, config = olmoe, olmoe[0]
  roster = Roster.create(
    config, 3, [0.0, 0.8, 0.4], seed=9, cache=cache, noise=noise, gate_weights=gate_weights
  )
  expected = by_definition(model, roster)
  assert np.abs(expected[0] - expected[1]).max() > 0.05 * np.abs(expected).max()
  assert_close(logits(model, roster), expected)


@pytest.mark.slow
def test_more_experts_per_token_are_those_of_the_definition(olmoe):
  config, params = olmoe
  more = routing.with_experts(config, config.experts_per_token + 1, "rescaled")
  assert_close(
    logits((more, params), Roster.create(more)), by_definition((more, params), Roster.create(more))
  )


@pytest.mark.parametrize("cache, tau", [("clean", None), ("standard", [0.0, 0.8, 0.4])])
@pytest.mark.slow
def test_members_with_their_own_numbers_of_experts_are_those_of_the_definition(olmoe, cache, tau):
  config, params = olmoe
  more = routing.with_experts(config, config.experts_per_token + 1)
  counts = [3, [3, 2, 4], [3, 4, 1]]
  roster = Roster.create(more, 3, tau, experts_by_layer=counts, cache=cache, seed=9)
  assert roster.noisy_layers == (1, 3)  # the first layer is that of all members
  expected = by_definition((more, params), roster)
  assert np.abs(expected[1] - expected[2]).max() > 0.05 * np.abs(expected).max()
  assert_close(logits((more, params), roster), expected)
  if tau is None:  # the clean member is the model's own
    assert_close(expected[:1], by_definition(olmoe, Roster.create(config)))
    # Other numbers compile nothing, and are those of models with so many experts.
    fewer = roster.replace(experts_by_layer=[2, [2, 3, 3], [2, 3, 3]])
    programs = member_states._cache_size()
    found = logits((more, params), fewer)
    assert member_states._cache_size() == programs
    own = routing.with_experts(config, 2)
    assert_close(found[:1], by_definition((own, params), Roster.create(own)))


@pytest.mark.parametrize(
  "settings", [dict(temperatures=[0.0, 0.8, 0.4], member_bits=2), dict(member_bits="3-2")], ids=str
)
@pytest.mark.slow
def test_members_at_fewer_bits_are_those_of_the_definition(olmoe, settings):
  config, params = params_lib.quantize(olmoe[1], olmoe[0], "nested:2-4")[::-1]
  roster = Roster.create(config, 3, seed=9, **settings)
  assert roster.noisy_layers == (0, 3)
  expected = by_definition((config, params), roster)
  assert np.abs(expected[1] - expected[2]).max() > 0.05 * np.abs(expected).max()
  assert_close(logits((config, params), roster), expected)
  # As scored, clean first and then by bits, or members one by one; and on three bits alone.
  averaged = np.log(np.mean(np.asarray(jax.nn.softmax(jnp.asarray(expected))), axis=0))
  targets = np.asarray(TOKENS)[:, 1:, None]
  wanted = np.take_along_axis(averaged[:, :-1], targets, axis=-1)[..., 0]
  for budget in (2**28, 1) if "temperatures" in settings else (2**28,):
    each = roster.replace(memory_budget=budget)
    found = scoring.score(
      params, config, TOKENS.tolist(), roster=each, request_ids=REQUESTS.tolist()
    )
    scored = [s.log_probs[:, 0] for s in found.sequences]
    np.testing.assert_allclose(scored, wanted, atol=1e-4)


@pytest.mark.parametrize(
  "expert_format, settings, message",
  [
    (None, {"member_bits": 2}, "only experts in a nested format can be read with fewer bits"),
    ("nested:2-4", {"member_bits": 5}, "read with 2 to 4 bits, got 5"),
    ("nested:2-4", {"member_bits": "2-3"}, "one for each of the 3 noisy members"),
    ("nested:2-4", {"member_bits": 0}, "member_bits must be an integer of at least 1"),
    ("nested:2-4", {"member_bits": 2, "cache": "standard"}, "member_bits needs a cache"),
    ("nested:2-4", {"member_bits": "2-2-3", "member_stop": "exact"}, "read equal weights"),
  ],
)
def test_bits_that_members_cannot_read(expert_format, settings, message):
  with pytest.raises(ValueError, match=message):
    Roster.create(tiny.config("olmoe", expert_format=expert_format), 4, 0.3, **settings)


@pytest.mark.slow
def test_contrast_with_the_second_expert_is_scmoe(mixtral):
  """Greedy decoding with both passes' full texts in float64 at every step."""
  config, params = mixtral
  roster = Roster.create(
    config, 2, 1.0, noise="second_expert", cache="standard", aggregation="contrast"
  )
  prompt = tiny.texts([6])[0]
  text, plain = list(prompt), []
  for _ in range(8):
    strong, weak = numpy_roster.member_logits(params, config, roster, text, 0)[:, -1]
    plain.append(int(np.argmax(strong)))
    plausible = strong >= np.log(0.1) + strong.max()
    text.append(int(np.argmax(np.where(plausible, 1.5 * strong - 0.5 * weak, -np.inf))))
  generated = decode.generate(params, config, [prompt], max_new_tokens=8, roster=roster)
  completion = generated.completions[0]
  assert completion.tokens == text[6:]
  assert completion.tokens != plain  # the contrast matters
  assert completion.clean_tokens == plain


def test_the_two_caches_differ_in_what_members_remember(olmoe):
  clean, standard = (
    logits(olmoe, Roster.create(olmoe[0], 3, [0.0, 0.8, 0.4], seed=9, cache=cache))
    for cache in ("clean", "standard")
  )
  assert_close(clean[0], standard[0])  # member 0 has no noise in either
  assert_close(clean[:, :, 0], standard[:, :, 0])  # no past at position 0
  assert np.abs(clean[1:, :, 1:] - standard[1:, :, 1:]).max() > 0.01 * np.abs(clean).max()


# The plain model


ONE_MEMBER = [
  dict(temperatures=[0.5, 0.0, 2.0], gate_weights="noisy"),
  dict(temperatures=0.3, seed=5, aggregation="majority", noisy_layers=(0, 3)),
]


@pytest.mark.parametrize(
  "model, settings", list(zip(["gpt_oss", "qwen2_moe"], ONE_MEMBER)), indirect=["model"], ids=str
)
@pytest.mark.slow
def test_one_member_is_bitwise_the_plain_model(model, settings):
  config, params = model
  roster = Roster.create(config, 1, **settings)
  prompts = tiny.texts([5, 1, 9, 3])
  plain, single = (
    decode.generate(params, config, prompts, max_new_tokens=6, roster=r) for r in (None, roster)
  )
  assert plain.completions == single.completions
  texts = [p + c.tokens for p, c in zip(prompts, plain.completions)]
  plain, single = (scoring.score(params, config, texts, roster=r) for r in (None, roster))
  for one, other in zip(plain.sequences, single.sequences):
    np.testing.assert_array_equal(one.log_probs, other.log_probs)


def test_the_plain_model_is_the_forward_function(model):
  config, params = model
  texts = tiny.texts([12, 12, 12, 12])
  scores = scoring.score(params, config, texts)
  log_probs = jax.nn.log_softmax(
    jax.jit(lambda x: transformer.forward(params, config, x)[0])(jnp.asarray(texts))
  )
  for row, text in enumerate(texts):
    expected = log_probs[row, jnp.arange(11), jnp.asarray(text[1:])]
    assert_close(scores.sequences[row].log_probs[:, 0], expected)


@pytest.mark.parametrize("family, cache", [("olmoe", "clean"), ("mixtral", "standard")])
@pytest.mark.slow
def test_at_temperature_zero_all_members_are_the_plain_model(request, family, cache):
  config, params = model = request.getfixturevalue(family)
  roster = Roster.create(config, 4, 0.0, cache=cache, noisy_layers=(0, config.num_layers))
  members = logits(model, roster)
  for member in members[1:]:
    np.testing.assert_array_equal(member, members[0])
  forward = jax.jit(lambda params: transformer.forward(params, config, TOKENS)[0])
  assert_close(members[0], forward(params))


# The members


@pytest.mark.slow
def test_computing_shared_layers_once_changes_nothing(olmoe):
  config, params = olmoe
  temperatures = [0.0, 0.9, 0.0]
  run = functools.partial(member_states, params, config, keep=("experts", "keys"))
  late, kept_late = run(Roster.create(config, 4, temperatures))
  full, kept_full = run(Roster.create(config, 4, temperatures, noisy_layers=(0, 3)))
  assert_close(late, full)
  np.testing.assert_array_equal(kept_late.experts, kept_full.experts)
  assert kept_late.experts.shape == (3, 4, 2, LENGTH, 3)
  assert_close(kept_late.keys, kept_full.keys)
  # All members are one before the first noise, and differ after.
  np.testing.assert_array_equal(kept_full.experts[0, 0], kept_full.experts[0, 3])
  assert np.any(kept_full.experts[1, 0] != kept_full.experts[1, 3])


@pytest.mark.parametrize("cache", CACHES)
def test_more_members_do_not_change_the_earlier_ones(olmoe, cache):
  few, many = (logits(olmoe, Roster.create(olmoe[0], n, 0.7, cache=cache)) for n in (2, 4))
  assert_close(many[:2], few)
  for i in range(1, 4):
    assert np.abs(many[i] - many[i - 1]).max() > 0.05 * np.abs(many).max()


def test_members_without_the_clean_one(olmoe):
  config, params = olmoe
  with_clean = Roster.create(config, 4, 0.7)
  members = np.asarray(jax.nn.log_softmax(logits(olmoe, with_clean)), np.float64)
  x, _ = member_states(params, config, with_clean)
  for cache, expected in (("clean", (0, 1, 2, 3)), ("standard", (1, 2, 3))):
    roster = Roster.create(config, 3, 0.7, include_clean=False, cache=cache)
    assert roster.members == expected and not roster.is_baseline
  # The clean member keeps the cache, and has no part in the average.
  roster = Roster.create(config, 3, 0.7, include_clean=False)
  outputs = aggregate(params, config, roster, x)
  assert_close(outputs.log_probs, np.log(np.exp(members[1:]).mean(0)))
  np.testing.assert_array_equal(outputs.clean_tokens, np.argmax(members[0], -1))
  standard = Roster.create(config, 3, 0.7, include_clean=False, cache="standard")
  outputs = aggregate(params, config, standard, x[1:])
  assert_close(outputs.log_probs, np.log(np.exp(members[1:]).mean(0)))
  assert np.all(outputs.clean_tokens == -1)


@pytest.mark.slow
def test_changing_temperatures_or_seed_compiles_nothing(olmoe):
  config, params = olmoe
  prompts = tiny.texts([5, 3])

  def run(temperatures, seed):
    roster = Roster.create(config, 3, temperatures, seed=seed, noisy_layers=(1, 3))
    generated = decode.generate(params, config, prompts, max_new_tokens=4, roster=roster)
    texts = [p + c.tokens for p, c in zip(prompts, generated.completions)]
    scoring.score(params, config, texts, roster=roster)
    return [c.log_probs for c in generated.completions]

  first = run([0, 0.5, 0.9], 0)
  functions = (decode.decode_steps, prefill.prefill_chunk, scoring.score_chunk)
  sizes = [f._cache_size() for f in functions]
  assert all(sizes)
  assert run([0, 0.0, 0.9], 0) != first
  assert run([0, 0.5, 0.9], 1) != first
  run([0, 0, 0], 2)
  assert [f._cache_size() for f in functions] == sizes


# Settings


def test_a_new_aggregation_is_available_by_its_name(olmoe, monkeypatch):
  config, params = olmoe
  last_member = aggregation.Aggregation(
    lambda state, member_logits: member_logits[-1], lambda state, n: jax.nn.log_softmax(state)
  )
  monkeypatch.setitem(aggregation.AGGREGATIONS, "last_member", last_member)
  roster = Roster.create(config, 4, 0.7, aggregation="last_member")
  x, _ = member_states(params, config, Roster.create(config, 4, 0.7))
  outputs = aggregate(params, config, roster, x)
  np.testing.assert_allclose(
    outputs.log_probs, jax.nn.log_softmax(transformer.unembed(params, config, x[-1])), rtol=1e-5
  )


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(num_members=0), "num_members.*at least 1.*0"),
    (dict(num_members=2.0), "num_members"),
    (dict(num_members=True), "num_members"),
    (dict(temperatures=[0.1, 0.2]), r"list of 3 .*shape \[2\]"),
    (dict(temperatures=[[0.1, 0.2, 0.3]]), r"shape \[1, 3\]"),
    (dict(temperatures=-0.1), "negative"),
    (dict(temperatures=[0, float("nan"), 0]), "finite"),
    (dict(temperatures=float("inf")), "finite"),
    (dict(seed=-1), "seed"),
    (dict(seed=2**32), "seed"),
    (dict(cache="shared"), "cache 'shared'.*clean, standard"),
    (dict(aggregation="median"), "aggregation 'median'.*mean_probability"),
    (dict(gate_weights="soft"), "gate_weights 'soft'.*clean, noisy"),
    (dict(noisy_layers=(0, 4)), r"noisy_layers.*\(0, 3\)"),
    (dict(noisy_layers=(2, 1)), "noisy_layers"),
    (dict(noise="on_state"), "on the state of a recurrent router, and this model's is 'linear'"),
    (dict(noise="on_state(scale=0)"), "scale must be positive"),
    (dict(temperatures=[0, 0.1, 0.1], noisy_layers=(1, 2)), "leaves out"),
  ],
  ids=str,
)
def test_wrong_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    Roster.create(tiny.config("olmoe"), **settings)


def test_the_noisy_stretch_is_where_temperatures_are():
  def stretch(*args, **kwargs):
    return Roster.create(tiny.config("olmoe"), *args, **kwargs).noisy_layers

  assert stretch(2, [0, 0.5, 0]) == (1, 2)
  assert stretch(2, [0.5, 0, 0.5]) == stretch(2, 0.5) == (0, 3)
  assert stretch(2, 0.0) == stretch(1, 0.5) == (3, 3)
  assert stretch(1, 0.5, include_clean=False) == (0, 3)
  assert stretch(2, 0.0, noisy_layers=(1, 3)) == (1, 3)


def test_settings_are_plain_values_that_make_the_same_roster():
  config = tiny.config("olmoe")
  roster = Roster.create(
    config,
    np.int64(5),
    [0, 0.3, 0.25],
    seed=2**32 - 1,
    include_clean=False,
    cache="none",
    aggregation="majority",
    gate_weights="noisy",
    noise="uniform",
    noisy_layers=(0, 3),
  )
  settings = json.loads(json.dumps(roster.settings()))
  assert settings == dict(
    num_members=5,
    temperatures=[0, 0.3, 0.25],
    seed=2**32 - 1,
    include_clean=False,
    cache="none",
    aggregation="majority",
    gate_weights="noisy",
    noise="uniform",
    noisy_layers=[0, 3],
  )
  again = Roster.create(config, **settings)
  assert again.settings() == settings
  np.testing.assert_array_equal(again.temperatures, roster.temperatures)


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(noise="pink"), "unknown noise 'pink'; choose one of gumbel, gaussian, uniform"),
    (dict(noise="swap", temperatures=1.5), "the probability that an expert is replaced"),
    (dict(noise="uniform_choice", temperatures=2), "that experts are chosen evenly at random"),
    (dict(aggregation="contrast", include_clean=False), "it needs include_clean"),
  ],
)
def test_settings_that_do_not_fit_each_other_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    Roster.create(tiny.config("olmoe"), **dict(num_members=3, temperatures=0.5) | settings)


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda c: Roster.create(c, temperatures=0.2), "temperatures without num_members"),
    (lambda c: Roster.create(c, 4), "without temperatures all members are equal"),
    (lambda c: Roster.create(c, include_clean=False), "without temperatures"),
    (lambda c: Roster.create(c).replace(temperatures=0.2), "temperatures without num_members"),
    (lambda c: Roster.create(c).replace(num_members=4), "without temperatures"),
    (lambda c: Roster.create(c, 2, 0.1).replace(noise="pink"), "unknown noise 'pink'"),
    (lambda c: Roster.create(c, 2, 0.1).replace(tau=0.1), "unknown tau"),
    (lambda c: Roster.create(c, 2, "profile.json"), "use Roster.from_profile"),
    (lambda c: Roster.create(c, 2, {"temperatures": [0.1]}), "use Roster.from_profile"),
    (lambda c: Roster.create(4, 0.3), "must be the model's ModelConfig, got int"),
    (lambda c: Roster.create(c, 2, 0.1, noise=lambda key, x, tau, a: x[:2]), "returned float32"),
    (lambda c: Roster.create(c, 2, 0.1, noise=lambda key, x, tau, a: x > 0), "returned bool"),
    (lambda c: Roster.create(c, 2, 0.1, noise=lambda x: x), r"function of \(key, logits"),
    (lambda c: Roster.create(c, 2, 0.1, noise="nowhere:draw"), "No module named 'nowhere'"),
    (lambda c: Roster.create(c, 2, 0.1, noise="math:draw"), "no attribute 'draw'"),
    (lambda c: Roster.create(c, 2, 0.1, aggregation="math:pi"), "unknown aggregation"),
    (
      lambda c: Roster.create(
        c, 2, 0.1, aggregation=aggregation.Aggregation(lambda s, x: x[0], lambda s, n: s[0])
      ),
      "must return float32 log-probabilities",
    ),
  ],
)
def test_misused_rosters_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make(tiny.config("olmoe"))


def test_replaced_settings_make_the_roster_that_create_makes():
  config = tiny.config("olmoe")
  for roster in (
    Roster.create(config),
    Roster.create(config, 2, [0, 0.1, 0]),
    Roster.create(config, 1, 0.5, noise="swap"),
  ):
    changed = roster.replace(num_members=3, temperatures=0.3, noise="gaussian", seed=4)
    expected = Roster.create(config, 3, 0.3, noise="gaussian", seed=4)
    assert changed.settings() == expected.settings()
    assert jax.tree.structure(changed) == jax.tree.structure(expected)
  # A range that contains the noise is kept, so that nothing is compiled again.
  roster = Roster.create(config, 2, 0.3, noisy_layers=(0, 3))
  assert roster.replace(temperatures=[0, 0.2, 0]).noisy_layers == (0, 3)


def negated(key, logits, temperature, count):
  """A noise of this module: chooses the least probable experts."""
  del key, count
  return jnp.where(temperature > 0, -logits, logits)


def test_a_noise_is_the_function_that_its_name_has_when_the_roster_is_created(olmoe, monkeypatch):
  config, params = olmoe

  def chosen(noise):
    roster = Roster.create(config, 2, 1.0, noise=noise, noisy_layers=(0, 3))
    _, kept = member_states(params, config, roster, keep=("experts",))
    return np.asarray(kept.experts[0, 1])

  keep = lambda key, logits, temperature, count: logits
  monkeypatch.setitem(perturbations.FAMILIES, "mine", keep)
  kept = chosen("mine")
  # Defined again under its name, as in a notebook.
  monkeypatch.setitem(perturbations.FAMILIES, "mine", negated)
  np.testing.assert_array_equal(chosen("mine"), chosen(f"{__name__}:negated"))
  assert not np.intersect1d(kept[0, 0], chosen("mine")[0, 0]).size
  np.testing.assert_array_equal(chosen(keep), kept)
  monkeypatch.delitem(perturbations.FAMILIES, "mine")
  roster = Roster.create(config, 2, 1.0, noise=negated)
  assert roster.noise == f"{__name__}:negated"
  assert Roster.create(config, **roster.settings()).perturb is negated


def test_an_aggregation_is_the_object_that_its_name_has_when_the_roster_is_created(
  olmoe, monkeypatch
):
  config, params = olmoe
  x = jax.random.normal(jax.random.key(1), (2, 1, 1, config.d_model))
  run = aggregate
  found = []
  for member in (0, 1):
    only = aggregation.Aggregation(
      lambda state, logits, member=member: logits[member % len(logits)],
      lambda state, n: jax.nn.log_softmax(state),
    )
    monkeypatch.setitem(aggregation.AGGREGATIONS, "only", only)
    for given in ("only", only):
      roster = Roster.create(config, 2, 0.7, aggregation=given)
      found.append(run(params, config, roster, x).log_probs)
    expected = jax.nn.log_softmax(transformer.unembed(params, config, x[member]))
    assert_close(found[-1], expected)
    assert_close(found[-2], expected)


def test_a_roster_for_a_model_of_another_depth_is_refused(olmoe):
  config, params = olmoe
  other = Roster.create(config.replace(num_layers=config.num_layers + 1), 2, 0.3)
  for use in (
    lambda: decode.generate(params, config, [[1]], max_new_tokens=1, roster=other),
    lambda: next(decode.stream(params, config, [1], max_new_tokens=1, roster=other)),
    lambda: scoring.score(params, config, [[1, 2]], roster=other),
  ):
    with pytest.raises(ValueError, match="temperatures for"):
      use()


def budget(config, members, rows):
  """Bytes for so many members of so many rows each."""
  return (
    members
    * rows
    * 4
    * (
      config.vocab_size
      + 2 * config.experts_per_token * config.d_model
      + config.num_heads * attention.block_size()
    )
  )


@pytest.mark.parametrize(
  "setting",
  [
    *(dict(aggregation=name) for name in aggregation.AGGREGATIONS),
    dict(include_clean=False),
    dict(cache="standard", include_clean=False),
  ],
  ids=str,
)
@pytest.mark.slow
def test_batches_of_members_are_aggregated_as_all_at_once(olmoe, setting):
  config, params = olmoe
  results = []
  for members, largest in ((100, 8), (3, 3), (1, 2)):
    roster = Roster.create(config, 7, 0.7, memory_budget=budget(config, members, 6), **setting)
    first, others = members_lib.batches(config, roster, (2, 3))
    assert first.size + others.size == len(roster.members)
    assert max(first.size, others.shape[1] if len(others) else 0) <= largest
    x = jax.random.normal(jax.random.key(1), (len(roster.members), 2, 3, config.d_model))
    results.append(aggregate(params, config, roster, x))
  assert not len(members_lib.batches(config, roster.replace(memory_budget=2**30), (2, 3))[1])
  for other in results[1:]:
    np.testing.assert_allclose(other.log_probs, results[0].log_probs, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(other.clean_tokens, results[0].clean_tokens)


@pytest.mark.parametrize(
  "num_members, fitting, sequences, expected",
  [
    (8, 2, 4, (8, 0, 8)),  # each of four devices has one sequence of all eight members
    (8, 1, 1, (4, 1, 4)),  # one member each
    (6, 1, 1, (2, 2, 2)),  # four devices do not divide six members, but two do
    (7, 3, 1, (1, 2, 3)),  # nothing is split
  ],
)
def test_the_memory_budget_is_that_of_a_device(olmoe, num_members, fitting, sequences, expected):
  config, _ = olmoe
  mesh = sharding.abstract_mesh(config, 4, data=2, expert=2)
  memory = budget(config, fitting, sequences)
  roster = Roster.create(config, num_members, 0.7, memory_budget=memory)
  assert members_lib.batch_sizes(config, roster, (sequences, 1), mesh) == expected


@pytest.mark.parametrize("include_clean", [True, False])
@pytest.mark.slow
def test_batches_of_members_are_computed_as_all_at_once(olmoe, include_clean):
  config, params = olmoe
  results = []
  for members in (100, 2):
    roster = Roster.create(
      config,
      5,
      [0, 0.7, 0],
      include_clean=include_clean,
      memory_budget=budget(config, members, 2 * LENGTH),
    )
    mode, cache = roster.cache_mode, members_lib.empty_cache(config, roster, 2, 16)
    cache = mode.prefill(of_tokens(params, config, roster.history()), cache)
    run = of_tokens(params, config, roster)
    x, shared = mode._run_shared(run, cache, ("keys",))
    first, _ = members_lib.batches(config, roster, TOKENS.shape)
    _, kept = mode._run_members(run, CacheAccess(cache), x, shared, first, ("keys",))
    results.append((jax.jit(mode.score)(run, cache)[0], kept))
  (one, one_kept), (other, other_kept) = results
  np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(one.clean_tokens, other.clean_tokens)
  # The clean member's.
  np.testing.assert_allclose(one_kept.keys, other_kept.keys, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(
    one_kept.keys[2].swapaxes(1, 2), cache.keys[2][:, :, :LENGTH], rtol=1e-4, atol=1e-4
  )


@pytest.mark.slow
def test_memory_of_scoring_does_not_grow_with_the_members():
  config = tiny.config("olmoe", vocab_size=4096, context_length=4096, num_heads=2, num_kv_heads=2)
  params = params_lib.abstract(config)

  def temporaries(n):
    roster = Roster.create(config, n, 0.5, memory_budget=8 * 2**20)
    shape = lambda s, dtype=jnp.int32: jax.ShapeDtypeStruct(s, dtype)
    cache = jax.eval_shape(lambda: members_lib.empty_cache(config, roster, 1, 4096))
    compiled = scoring.score_chunk.lower(
      params,
      config,
      roster,
      cache,
      shape((1, 128)),
      shape((1, 128)),
      shape((1,)),
      shape((1,), jnp.uint32),
      shape((1,), jnp.float32),
    ).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  few, many = temporaries(8), temporaries(64)
  assert many < 1.1 * few
  # Less than the logits of all members would take.
  assert many < 64 * 128 * 4096 * 4 / 4


@pytest.mark.slow
def test_layers_before_the_first_noise_share_one_standard_cache(olmoe):
  config, params = olmoe
  roster = Roster.create(config, 5, [0, 0, 0.7], cache="standard")
  cache = members_lib.empty_cache(config, roster, 2, 16)
  assert cache.shared.keys.shape == (2, 2, 2, 16, 8)
  assert cache.own.keys.shape == (5, 1, 2, 2, 16, 8)
  forced = Roster.create(config, 5, [0, 0, 0.7], cache="standard", noisy_layers=(0, 3))
  texts = tiny.texts([9, 6])
  shared, alone = (
    scoring.score(params, config, texts, roster=r).sequences for r in (roster, forced)
  )
  for one, other in zip(shared, alone):
    np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-5, atol=1e-5)


# From user code


def test_a_router_bias_is_that_of_the_model():
  """GPT-OSS has a bias on its router logits."""
  config = tiny.config("gpt_oss")
  params = tiny.params(config)
  bias = np.random.RandomState(5).standard_normal((3, config.num_experts)).astype(np.float32)
  own = params.replace(
    layers=params.layers.replace(router_bias=params.layers.router_bias + jnp.asarray(bias))
  )
  roster = Roster.create(config, 3, [0, 0.7, 0.4], seed=9)
  run = jax.jit(scoring.log_probs, static_argnums=1)
  biased = run(params, config, TOKENS, roster.replace(router_bias=bias), REQUESTS)
  assert_close(biased, run(own, config, TOKENS, roster, REQUESTS))
  assert np.abs(np.asarray(biased - run(params, config, TOKENS, roster, REQUESTS))).max() > 0.01


def test_a_router_bias_is_recorded_and_checked(olmoe):
  config, _ = olmoe
  bias = np.zeros((3, config.num_experts), np.float32)
  bias[1, 2] = -np.inf
  roster = Roster.create(config, 2, 0.5, router_bias=bias)
  settings = json.loads(json.dumps(roster.settings(), allow_nan=False))
  np.testing.assert_array_equal(Roster.create(config, **settings).router_bias, bias)
  assert "router_bias" not in Roster.create(config).settings()
  for wrong in (bias[:2], bias[:, :-1], bias + np.nan, np.inf - bias, np.full_like(bias, -np.inf)):
    with pytest.raises(ValueError, match="router_bias"):
      Roster.create(config, 2, 0.5, router_bias=wrong)


@pytest.mark.parametrize("noise", ["swap", "uniform_choice", "gumbel"])
def test_no_noise_chooses_a_banned_expert(noise):
  logits = jnp.array([3.0, -jnp.inf, 1.0, 0.0, 2.0])
  keys = jax.random.split(noise_lib.stream_key(0, noise_lib.ROUTING), 20)
  perturb = lambda key: perturbations.FAMILIES[noise](key, logits, jnp.float32(1), 2)
  assert (jax.vmap(perturb)(keys)[:, 1] == -jnp.inf).all()


@dataclasses.dataclass(frozen=True)
class HalfCache(roe_jax.CleanCache):
  def empty(self, config, *sizes, **options):
    return super().empty(config.replace(dtype="bfloat16"), *sizes, **options)


def test_noise_aggregation_and_cache_are_registered_by_name(olmoe, monkeypatch):
  """Gumbel noise, means of probabilities and a Clean Cache with keys in bfloat16, in one jit."""
  config, params = olmoe
  gumbel = lambda key, logits, tau, count: logits + tau * jax.random.gumbel(key, logits.shape)
  mean = roe_jax.Aggregation(
    add=lambda state, z: jnp.exp(jax.nn.log_softmax(z)).sum(0) + (0 if state is None else state),
    finish=lambda state, n: jnp.log(state / n),
  )
  monkeypatch.setitem(roe_jax.NOISES, "mine", gumbel)
  monkeypatch.setitem(roe_jax.AGGREGATIONS, "mine", mean)
  monkeypatch.setitem(roe_jax.CACHES, "half", HalfCache())
  roster = Roster.create(config, 3, [0.3, 0.8, 0.4], seed=9)
  mine = roster.replace(noise="mine", aggregation="mine", cache="half")
  assert mine.settings()["cache"] == "half"
  whole, half = (r.cache_mode.bytes(config, r, 2, 16) for r in (roster, mine))
  assert half == whole / 2

  @jax.jit
  def log_probs(params, roster, tau):
    return roe_jax.log_probs(params, config, TOKENS, roster.replace(temperatures=tau), REQUESTS)

  tau = jnp.asarray([0.3, 0.8, 0.4])
  found, expected = (log_probs(params, r, tau) for r in (mine, roster))
  clean = log_probs(params, roster, 0 * tau)
  assert np.median(np.abs(found - expected)) < 0.02 < np.median(np.abs(clean - expected))
