"""Logits against transformers, in eager mode, on random checkpoints."""

import functools

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roe_jax import cache as kv_cache
from roe_jax import decode, families, prefill, transformer
from roe_jax import members as members_lib
from roe_jax import roster as roster_lib
from roe_jax.layer_inputs import CacheAccess, TokenBatch

pytestmark = pytest.mark.slow

pytest.importorskip("torch")
pytest.importorskip("transformers")

# Largest absolute error over largest absolute logit: about 30 float32 roundings.
TOLERANCE = 1e-5

CASES = {
  "olmoe": hf.config_json("olmoe"),
  "olmoe_normalized": hf.config_json("olmoe", norm_topk_prob=True),
  "olmoe_clipped": hf.config_json("olmoe", clip_qkv=0.8),
  "olmoe_one_head_a_key": hf.config_json("olmoe", num_key_value_heads=4, rms_norm_eps=1e-3),
  "mixtral": hf.config_json("mixtral"),
  "mixtral_wide_heads": hf.config_json(
    "mixtral", head_dim=12, rope_theta=1e6, num_key_value_heads=1
  ),
  "mixtral_window": hf.config_json("mixtral", sliding_window=6),
  "gpt_oss": hf.config_json("gpt_oss"),
  "gpt_oss_hardly_clamped": hf.config_json("gpt_oss", swiglu_limit=7.0),
  "gpt_oss_full_then_two_windows": hf.config_json(
    "gpt_oss",
    num_hidden_layers=3,
    sliding_window=3,
    layer_types=["full_attention", "sliding_attention", "sliding_attention"],
  ),
  "gpt_oss_truncated_ramp": hf.config_json(
    "gpt_oss",
    rope_scaling=dict(
      rope_type="yarn",
      factor=4.0,
      original_max_position_embeddings=16,
      beta_fast=4.0,
      beta_slow=0.5,
      truncate=True,
      attention_factor=0.9,
    ),
  ),
  "qwen2_moe": hf.config_json("qwen2_moe"),
  "qwen2_moe_windows": hf.config_json("qwen2_moe", use_sliding_window=True),
  "qwen2_moe_without_bias": hf.config_json("qwen2_moe", qkv_bias=False, norm_topk_prob=True),
  "qwen3_moe": hf.config_json("qwen3_moe"),
  "qwen3_moe_not_normalized": hf.config_json("qwen3_moe", norm_topk_prob=False),
  "qwen3_moe_window": hf.config_json("qwen3_moe", use_sliding_window=True),
  "qwen3_moe_yarn": hf.config_json(
    "qwen3_moe", rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8)
  ),
}


LLAMA3 = dict(
  rope_type="llama3",
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
)
CASES |= {
  "llama": hf.config_json("llama"),
  "llama_biases": hf.config_json("llama", attention_bias=True, mlp_bias=True, head_dim=12),
  "llama_llama3": hf.config_json("llama", rope_scaling=LLAMA3),
  "llama_linear": hf.config_json("llama", rope_scaling=dict(type="linear", factor=4.0)),
  "granitemoe": hf.config_json("granitemoe"),
  "granitemoe_biases": hf.config_json("granitemoe", attention_bias=True, head_dim=12),
  "granitemoeshared": hf.config_json("granitemoeshared"),
  "granitemoeshared_without": hf.config_json("granitemoeshared", shared_intermediate_size=0),
  "glm4_moe": hf.config_json("glm4_moe"),
  "glm4_moe_one_group": hf.config_json(
    "glm4_moe", n_group=1, topk_group=1, use_qk_norm=False, norm_topk_prob=False
  ),
  "dots1": hf.config_json("dots1"),
  "deepseek_v3": hf.config_json("deepseek_v3"),
  "deepseek_v3_halves": hf.config_json(
    "deepseek_v3",
    rope_interleave=False,
    q_lora_rank=None,
    rope_scaling=None,
    n_group=1,
    topk_group=1,
  ),
  "deepseek_v2": hf.config_json("deepseek_v2"),
  "mistral": hf.config_json("mistral"),
  "mistral_window": hf.config_json("mistral", sliding_window=6, head_dim=12),
  "qwen2": hf.config_json("qwen2"),
  "qwen2_windows": hf.config_json("qwen2", use_sliding_window=True, num_hidden_layers=3),
  "qwen3": hf.config_json("qwen3"),
  "qwen3_biases": hf.config_json("qwen3", attention_bias=True),
}


@functools.cache
def build(case, dtype="float32"):
  """transformers' model, and this library's config and parameters."""
  hf_config = CASES[case]
  state = hf.random_state(hf_config, seed=3)
  return (
    hf.to_model(hf_config, state, dtype),
    families.from_hugging_face(hf_config, dtype=dtype),
    hf.to_params(hf_config, state, dtype),
  )


@functools.partial(jax.jit, static_argnames="config")
def forward(params, config, x):
  return transformer.forward(params, config, x)[0]


@functools.partial(jax.jit, static_argnames="config")
def prefill_piece(params, config, x, start, cache):
  positions = jnp.broadcast_to(start + jnp.arange(x.shape[1]), x.shape)
  tokens, access = TokenBatch(positions), CacheAccess(cache, write=True)
  x = transformer.embed(params, config, x)
  hidden, cache, _ = transformer.run_layers(params, config, x, tokens, access)
  return transformer.unembed(params, config, hidden), cache


def tokens(shape=(16, 20), seed=0):
  return np.random.RandomState(seed).randint(0, hf.SMALL["vocab_size"], shape)


def assert_close(actual, expected):
  assert np.abs(np.asarray(actual) - expected).max() < TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_whole_texts(case):
  model, config, params = build(case)
  x = tokens()
  assert_close(forward(params, config, x), hf.logits(model, x))


def test_clipping_changes_the_logits():
  # So that agreement above is not that of a bound out of reach.
  x = tokens()
  clipped, free = (hf.logits(build(case)[0], x) for case in ("olmoe_clipped", "olmoe"))
  assert np.abs(clipped - free).max() > 0.01 * np.abs(free).max()


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_right_padded_batch(family):
  model, config, params = build(family)
  x, lengths = tokens(), np.array([20, 1, 7, 13] + list(range(5, 17)))
  mask = np.arange(20) < lengths[:, None]
  logits = forward(params, config, x)
  expected = hf.logits(model, x, mask.astype(np.int64))
  assert_close(np.asarray(logits)[mask], expected[mask])


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_prefill_in_chunks(family):
  model, config, params = build(family)
  x = tokens((2, 20))
  cache = kv_cache.empty(config, 2, 24)
  start, pieces = 0, []
  for size in (9, 2, 9):
    piece = jnp.asarray(x[:, start : start + size])
    logits, cache = prefill_piece(params, config, piece, start, cache)
    pieces.append(logits)
    start += size
  assert_close(jnp.concatenate(pieces, axis=1), hf.logits(model, x))


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_decoding_token_by_token(family):
  model, config, params = build(family)
  x, lengths = tokens((3, 20)), [5, 1, 12]
  roster = roster_lib.Roster.create(config)
  ids = jnp.arange(3, dtype=jnp.uint32)
  cache = prefill.fill_cache(
    params,
    config,
    roster,
    kv_cache.empty(config, 3, 24),
    jnp.asarray(x),
    np.array(lengths) - 1,
    ids,
  )
  expected = np.asarray(jax.nn.log_softmax(hf.logits(model, x)))
  step = jax.jit(roster.cache_mode.step)
  for offset in range(8):
    positions = np.array(lengths) - 1 + offset
    rows = np.arange(3)
    tokens_B = jnp.asarray(x[rows, positions])
    run = members_lib.RosterPass.of_step(
      params, config, roster, tokens_B, jnp.asarray(positions), ids
    )
    outputs, cache = step(run, cache)
    assert_close(outputs.log_probs[:, 0], expected[rows, positions])


def test_greedy_generation():
  model, config, params = build("olmoe")
  prompts = [row[:length].tolist() for row, length in zip(tokens((3, 9), seed=5), (9, 4, 1))]
  generated = decode.generate(params, config, prompts, max_new_tokens=6, stop_tokens=())
  for prompt, completion in zip(prompts, generated.completions):
    text = list(prompt)
    for token, log_prob in zip(completion.tokens, completion.log_probs):
      expected = np.asarray(jax.nn.log_softmax(hf.logits(model, [text])[0, -1]))
      assert token == expected.argmax()
      assert abs(log_prob - expected[token]) < TOLERANCE * np.abs(expected).max()
      text.append(token)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_bfloat16_is_as_close_to_float32_as_transformers_is(family):
  """Two bfloat16 models round at slightly different places and choose other
  experts at near ties, so that single logits cannot agree. What can be asked
  is that ours loses no more precision than theirs, beyond what the sample
  allows."""
  x = tokens()
  model16, config16, params16 = build(family, "bfloat16")
  # The exact answer is float32 arithmetic on the same (rounded) weights.
  params = jax.tree.map(lambda w: w.astype(jnp.float32), params16)
  exact = forward(params, config16.replace(dtype="float32"), x)
  ours = forward(params16, config16, x)

  def error(logits):
    # Of each position; the median ignores positions with other experts.
    return np.sqrt(np.mean(np.square(np.asarray(logits) - exact), axis=-1))

  ours, theirs = error(ours), error(hf.logits(model16, x))
  scale = np.sqrt(np.mean(np.square(exact)))
  assert np.median(theirs) > 1e-3 * scale  # bfloat16 indeed
  assert np.median(ours) < 1.15 * np.median(theirs)
  assert np.mean(ours > 0.1 * scale) < 1.5 * np.mean(theirs > 0.1 * scale) + 0.02
