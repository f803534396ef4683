"""Sliding layers and their ring of slots in the whole model, with sinks, biases and YaRN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recomputed import RECOMPUTED
import tiny

from roe_jax import decode, diagnostics, prefill, scoring, transformer
from roe_jax import members as members_lib
from roe_jax import params as params_lib
from roe_jax.rope import Yarn
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler

pytestmark = pytest.mark.slow

WINDOW = 5
# The ring wraps several times within the longest of them, and never in the shortest.
PROMPTS = tiny.texts([31, 1, 4, 17, 6])
IDS = [4, 0, 9, 2**32 - 1, 7]
NEW = 12
LAYERS = {"alternating": (0, 2), "all": (0, 1, 2), "one": (1,)}


def config(layers="alternating", family="mixtral", **changes):
  return tiny.config(
    family,
    **(
      dict(
        sliding_window=WINDOW,
        sliding_layers=LAYERS[layers],
        attention_sinks=True,
        qkv_bias=True,
        output_bias=True,
        rope_scaling=Yarn(4.0, 8, 32.0, 1.0, False, 1.2),
      )
      | changes
    ),
  )


def run(config, prompts=PROMPTS, ids=IDS, **options):
  options = {"max_new_tokens": NEW, "stop_tokens": (), "sampler": Sampler.create(1.0)} | options
  return decode.generate(
    tiny.params(config), config, prompts, request_ids=ids, **options
  ).completions


def assert_same(completions, expected):
  for one, other in zip(completions, expected, strict=True):
    assert one.tokens == other.tokens
    assert one.clean_tokens == other.clean_tokens
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=3e-5)


# Members begin to differ in an odd layer, in an even one, in a sliding one.
SETTINGS = [("alternating", "clean", [0, 0.6, 0]), ("all", "standard", [0.6, 0, 0.6])]


def with_chunks(*sizes):
  """Settings of the tests above, whose programs are compiled, and a size for each."""
  return pytest.mark.parametrize(
    "layers, cache, temperatures, chunk", [(*s, size) for s, size in zip(SETTINGS, sizes)]
  )


@pytest.mark.parametrize("layers, cache, temperatures", SETTINGS)
def test_generation_is_that_without_a_cache(layers, cache, temperatures):
  c = config(layers)
  roster = Roster.create(c, 3, temperatures, seed=2, cache=cache)
  assert_same(run(c, roster=roster), run(c, roster=roster.replace(cache=RECOMPUTED[cache])))


@with_chunks(3, None)
def test_scores_are_those_of_generation_in_chunks_of_any_size(layers, cache, temperatures, chunk):
  c = config(layers)
  roster = Roster.create(c, 3, temperatures, seed=2, cache=cache)
  generated = run(c, roster=roster)
  texts = [p + g.tokens for p, g in zip(PROMPTS, generated)]
  scores = scoring.score(
    tiny.params(c),
    c,
    texts,
    [len(p) for p in PROMPTS],
    roster=roster,
    request_ids=IDS,
    chunk_size=chunk,
    batch_size=3,
    min_shape=(4, prefill.MIN_CAPACITY),  # of the second batch, too
  )
  for found, expected in zip(scores.sequences, generated):
    np.testing.assert_allclose(found.log_probs[:, 0], expected.log_probs, atol=3e-5)
    assert found.clean_greedy_tokens.tolist() == expected.clean_tokens


@with_chunks(3, 16)
def test_prefill_in_chunks_shorter_and_longer_than_the_window(
  monkeypatch, layers, cache, temperatures, chunk
):
  c = config(layers)
  roster = Roster.create(c, 3, temperatures, seed=2, cache=cache)
  expected = run(c, roster=roster)
  monkeypatch.setattr(prefill, "PREFILL_CHUNK", chunk)
  assert_same(run(c, roster=roster), expected)


def test_slots_of_other_texts_and_those_used_again_do_not_matter():
  c = config()
  roster = Roster.create(c, 3, [0, 0.6, 0], seed=2)
  alone, options = run(c, roster=roster), {"batch_size": 2, "roster": roster}
  assert_same(run(c, **options), alone)
  order = [2, 4, 1, 0, 3]
  assert_same(
    run(c, [PROMPTS[i] for i in order], [IDS[i] for i in order], **options),
    [alone[i] for i in order],
  )


@pytest.mark.parametrize("layers", LAYERS)
def test_the_plain_model_without_a_cache(layers):
  """The forward pass of training gives the scores, and what a row does not see
  does not influence it."""
  c = config(layers)
  params, text = tiny.params(c), tiny.texts([40])[0]
  logits, _ = transformer.forward(params, c, jnp.asarray([text]), strategy="dense")
  log_probs = np.asarray(jax.nn.log_softmax(logits[0]))[np.arange(39), text[1:]]
  found = scoring.score(params, c, [text]).sequences[0].log_probs[:, 0]
  np.testing.assert_allclose(found, log_probs, atol=3e-5)


def test_a_row_sees_as_far_back_as_its_layers_reach():
  for sliding_window, layers, reach in (
    (5, (0, 1, 2), 12),
    (2, (0, 1, 2), 3),
    (1, (0, 1, 2), 0),
    (2, (0, 2), 19),
  ):
    c = config(sliding_window=sliding_window, sliding_layers=layers)
    params, tokens = tiny.params(c), np.asarray(tiny.texts([20]))
    changed = np.repeat(tokens, 20, 0)
    changed[np.arange(20), np.arange(20)] += 1
    changed %= c.vocab_size
    logits, _ = transformer.forward(
      params, c, jnp.asarray(np.concatenate([tokens, changed])), strategy="dense"
    )
    seen = np.abs(logits[1:, -1] - logits[:1, -1]).max(-1) > 1e-6
    np.testing.assert_array_equal(seen, np.arange(20)[::-1] <= reach)


def test_gradients_with_sinks_and_windows_are_finite_and_reach_every_parameter():
  c = config()
  tokens = jnp.asarray(tiny.texts([20]))
  loss = lambda params: jnp.mean(
    transformer.forward(params, c, tokens, strategy="dense")[0][..., :5] ** 2
  )
  gradients = jax.jit(jax.grad(loss))(tiny.params(c)).layers.attention
  for gradient in jax.tree.leaves(gradients):
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_routing_agreement_of_one_text_is_that_of_its_batch():
  c = config()
  params, texts = tiny.params(c), tiny.texts([40, 36])  # of one padded length
  roster = Roster.create(c, 3, 0.5)
  agreement = lambda texts, ids: diagnostics.routing_agreement(
    params, c, roster, texts, request_ids=ids
  )
  both = agreement(texts, [0, 1])
  apart = [agreement([t], [i]) for i, t in enumerate(texts)]
  np.testing.assert_allclose(both, (39 * apart[0] + 35 * apart[1]) / 74, atol=1e-6)


def test_a_window_does_not_grow_with_the_context():
  def num_bytes(layers, capacity, **options):
    c = config(layers)
    roster = Roster.create(c, 3, [0, 0.5, 0.5], cache=options.pop("cache", "clean"))
    return roster.cache_mode.bytes(c, roster, 4, capacity, **options)

  for cache in ("clean", "standard"):
    assert num_bytes("all", 64, cache=cache) == num_bytes("all", 65536, cache=cache)
  slot, position = 2 * 4 * 2 * 8 * 4, 4 * 4
  assert num_bytes("alternating", 1024) == 1024 * slot + 2 * WINDOW * (slot + position)
  assert num_bytes("alternating", 1024, rerun=1024) == 1024 * (3 * slot + 2 * position)
  assert num_bytes("all", 3) == 3 * 3 * (slot + position)


def test_generation_holds_the_window_only():
  c = config("all", context_length=2048)
  state = decode.start(
    tiny.params(c),
    c,
    Roster.create(c),
    PROMPTS[:2],
    [0, 1],
    1500,
    2,
    prefill.capacity_for(c, PROMPTS[:2], 1500),
  )
  assert state.tokens.shape[1] > 1500
  assert state.cache.keys.size == 0
  assert state.cache.sliding.keys.shape == (3, 2, 2, WINDOW, 8)


@pytest.mark.parametrize("cache", ["clean", "standard"])
def test_no_step_copies_a_cache(cache):
  """Layers of both kinds in one loop: temporaries are smaller than a layer's keys."""
  c = config(num_heads=2, head_dim=64, sliding_window=2048, context_length=4096)
  params = jax.eval_shape(lambda: params_lib.in_storage_dtype(tiny.params(c)))
  roster = Roster.create(c, 2, [0.5] * 3, cache=cache)
  state = jax.eval_shape(
    lambda: decode.DecodeState(
      *(jnp.zeros((2, 4096), t) for t in (jnp.int32, jnp.float32, *[jnp.int32] * 3)),
      *(jnp.zeros(2, t) for t in (jnp.int32, jnp.int32, bool, jnp.uint32)),
      members_lib.empty_cache(c, roster, 2, 4096),
    )
  )
  shape = lambda *s, dtype=jnp.int32: jax.ShapeDtypeStruct(s, dtype)
  step = decode.decode_steps.lower(params, c, roster, Sampler.greedy(), state, shape(1), shape())
  prefilling = prefill.prefill_chunk.lower(
    params,
    c,
    roster.history(),
    state.cache,
    shape(2, 8),
    shape(2),
    shape(2, dtype=jnp.uint32),
    shape(2),
  )
  keys_of_a_window = 2 * 2 * 2048 * 64 * 4
  for program in (step, prefilling):
    assert program.compile().memory_analysis().temp_size_in_bytes < keys_of_a_window


def test_a_call_compiles_the_model_no_more_often(caplog):
  c = config()
  options = {"batch_size": 2, "roster": Roster.create(c, 3, [0, 0.6, 0], seed=2)}
  prompts = tiny.texts([40, 3, 40, 3, 3])
  run(c, prompts, range(5), **options)
  lengths = [40, *np.random.RandomState(1).randint(1, 47, 12)]
  with jax.log_compiles():
    run(c, tiny.texts(lengths), range(13), **options)
  assert [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")] == []
