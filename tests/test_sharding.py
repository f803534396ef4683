"""Models on meshes of forced host devices against one device."""

import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import tiny

from experiments.tasks import wordmath
from roe_jax import (
  batching,
  checkpoint,
  decode,
  members,
  model_formats,
  presets,
  scoring,
  sharding,
  transformer,
)
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.experts import expert_parallel
from roe_jax.quantization import FORMATS, find
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler

pytestmark = pytest.mark.slow

# Its sizes are such that every mesh of eight devices but tensor:8 fits.
CONFIG = ModelConfig(
  family="olmoe",
  vocab_size=64,
  num_layers=2,
  d_model=64,
  num_heads=4,
  num_kv_heads=4,
  head_dim=8,
  num_experts=8,
  experts_per_token=3,
  d_expert=64,
  context_length=64,
  normalize_gates=False,
  gates_in_model_dtype=True,
  qk_norm=True,
)


def make_mesh(config, data=1, expert=1, tensor=1):
  return sharding.make_mesh(config, data=data, expert=expert, tensor=tensor)


@pytest.fixture(scope="module")
def params():
  return tiny.params(CONFIG, scale=0.2)


# The table and the mesh.


def test_a_spec_follows_from_the_table():
  mesh = make_mesh(CONFIG, 2, 2, 2)
  specs = sharding.parameter_specs(mesh, CONFIG)
  assert specs.layers.experts.gate_up == P(None, "expert", "tensor", None, None)
  assert specs.layers.attention.query == P(None, "tensor", None, None)
  assert specs.layers.router == P(None, None, None)
  assert specs.unembedding == P(("expert", "tensor"), None)
  # A vocabulary of 61 is whole, by the rule's last alternative.
  odd = sharding.parameter_specs(mesh, CONFIG.replace(vocab_size=61))
  assert odd.unembedding == P(None, None)
  even = sharding.parameter_specs(mesh, CONFIG.replace(vocab_size=62))
  assert even.embedding == P("tensor", None)


@pytest.mark.parametrize(
  "num_members,batch,expected",
  [
    (8, 8, (None, ("data", "expert"))),
    (8, 2, ("expert", "data")),
    (3, 2, (None, "data")),
    (8, 1, (("data", "expert"), None)),
    (2, 1, ("data", None)),
    (3, 1, (None, None)),
    (3, 4, (None, ("data", "expert"))),
  ],
)
def test_members_take_the_mesh_that_a_small_batch_leaves(num_members, batch, expected):
  mesh = make_mesh(CONFIG, 2, 2, 2)
  hidden = sharding.spec(
    mesh, ("members", "batch", "positions", "embed"), (num_members, batch, 1, 64)
  )
  assert hidden == P(*expected, None, None)


@pytest.mark.parametrize("expert_format", [None, *FORMATS])
@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_axis_of_every_model_has_a_rule(name, expert_format):
  config = presets.PRESETS[name].replace(expert_format=expert_format)
  axis, place = ("tensor", 2) if config.num_experts == 1 else ("expert", 1)
  size = {axis: 3 if config.num_heads % 4 else 4}
  specs = sharding.parameter_specs(make_mesh(config, **size), config)
  for matrix in jax.tree.leaves((specs.layers.experts.gate_up, specs.layers.experts.down)):
    assert matrix[place] == axis


def test_an_axis_without_a_rule_is_an_error(monkeypatch):
  mesh = make_mesh(CONFIG)
  monkeypatch.delitem(sharding.RULES, "gate_up")
  with pytest.raises(ValueError, match="the axis 'gate_up' .* has no rule"):
    sharding.parameter_specs(mesh, CONFIG)


def test_two_axes_on_one_mesh_axis_are_an_error():
  with pytest.raises(ValueError, match="'expert_mlp' and 'heads' .* along the mesh axis 'tensor'"):
    sharding.spec(make_mesh(CONFIG), ("heads", "expert_mlp"), (4, 64))


def test_what_does_not_divide_is_an_error_that_says_what_would():
  with pytest.raises(ValueError, match="'heads' has size 6, .* of size 4 .* may be 1, 2, 3, 6$"):
    sharding.spec(make_mesh(CONFIG, tensor=4), ("heads",), (6,))
  with pytest.raises(ValueError, match="expert of size 3 does not fit .* may be 1, 2, 4, 8$"):
    make_mesh(CONFIG, expert=3)
  with pytest.raises(ValueError, match="tensor of size 8 .* tensor may be 1, 2, 4$"):
    make_mesh(CONFIG, tensor=8)
  # 64 weights share a scale, so that the width of 192 has three groups.
  config = CONFIG.replace(d_expert=192, expert_format="int4")
  with pytest.raises(ValueError, match="tensor of size 2 .* tensor may be 1$"):
    make_mesh(config, tensor=2)
  for sizes in ((3, 8, 1), (0, 1, 1)):
    with pytest.raises(ValueError, match="at most 8, the number of devices"):
      make_mesh(CONFIG, *sizes)


@pytest.mark.parametrize(
  "changes,expected",
  [
    ({}, (1, 8, 1)),
    (dict(num_experts=4), (1, 4, 2)),
    (dict(num_experts=6), (1, 2, 4)),
    (dict(num_experts=6, num_kv_heads=2), (2, 2, 2)),
    (dict(num_experts=3, num_kv_heads=1), (8, 1, 1)),
  ],
)
def test_a_mesh_is_chosen_from_devices_and_model(changes, expected):
  assert sharding.make_mesh(CONFIG.replace(**changes)).devices.shape == expected


@pytest.mark.parametrize(
  "name,devices,expected",
  [
    ("mixtral-8x7b", 16, (1, 8, 2)),
    ("mixtral-8x7b", 32, (1, 8, 4)),
    ("mixtral-8x7b", 64, (1, 8, 8)),
    ("mixtral-8x7b", 128, (2, 8, 8)),
    ("qwen3-30b-a3b", 64, (1, 64, 1)),
    ("gpt-oss-120b", 64, (1, 64, 1)),
    ("qwen1.5-moe-a2.7b", 8, (1, 4, 2)),
  ],
)
def test_more_devices_than_experts_share_their_widths(name, devices, expected):
  assert sharding.choose_sizes(presets.PRESETS[name], devices) == expected


def test_a_mesh_is_the_same_with_and_without_its_devices():
  for sizes in ({}, {"tensor": 2}, {"data": 2, "expert": 4}):
    made = sharding.make_mesh(CONFIG, **sizes)
    expected = sharding.abstract_mesh(CONFIG, 8, **sizes)
    assert (made.shape, made.axis_types) == (expected.shape, expected.axis_types)
  with pytest.raises(ValueError, match="tensor may be 1, 2, 4$"):
    sharding.abstract_mesh(CONFIG, 64, tensor=8)
  with pytest.raises(ValueError, match="at least 1, got 0"):
    sharding.abstract_mesh(CONFIG, 0)


def test_memory_decides_where_the_first_choice_does_not_fit():
  """Experts over all devices leave attention whole on each."""
  config = CONFIG.replace(num_heads=64, num_kv_heads=64)

  def held(sizes):
    mesh = sharding.abstract_mesh(config, 8, **dict(zip(sharding.AXES, sizes)))
    return sharding.bytes_on_device(
      mesh, params_lib.abstract(config), sharding.parameter_specs(mesh, config)
    )

  first, second = (1, 8, 1), (1, 4, 2)
  assert sharding.possible_sizes(config, 8)[:2] == [first, second]
  assert held(second) < held(first)
  placed = sharding.shard_params(tiny.params(config), config, make_mesh(config, *second))
  assert held(second) == sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(placed))
  assert sharding.choose_sizes(config, 8) == first
  assert sharding.choose_sizes(config, 8, held(first) / 0.89) == first
  assert sharding.choose_sizes(config, 8, held(second) / 0.89) == second
  assert sharding.choose_sizes(config, 8, 1) == first  # none fits


def test_parameters_on_another_mesh_are_refused(params):
  for mesh in (
    jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)),
    jax.make_mesh((2, 2, 2), sharding.AXES, axis_types=(AxisType.Explicit,) * 3),
  ):
    elsewhere = jax.device_put(params, NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match="place them with sharding.shard_params"):
      transformer.forward(elsewhere, CONFIG, jnp.zeros((1, 2), jnp.int32))


def test_a_checkpoint_is_restored_straight_onto_the_mesh(params, tmp_path):
  checkpoint.save(tmp_path / "c", params, CONFIG)
  mesh = make_mesh(CONFIG, 1, 4, 2)
  restored, _ = checkpoint.load(
    tmp_path / "c", shardings=sharding.parameter_shardings(mesh, CONFIG)
  )
  placed = sharding.shard_params(params, CONFIG, mesh)
  for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(placed)):
    assert a.sharding == b.sharding
    np.testing.assert_array_equal(a, b)
  part = restored.layers.experts.gate_up.addressable_shards[0].data
  assert part.shape == (2, 2, 32, 2, 64)


# Results.


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe", "glm4_moe", "deepseek_v3"])
def test_families_by_parts(family):
  config = tiny.config(family, vocab_size=64)
  check_forward(config, tiny.params(config))


def test_recurrent_routers_by_parts():
  """Members with noise on the state generate on a mesh what one device scores."""
  config = tiny.config("mixtral", vocab_size=64, router="recurrent", router_state=6)
  params, prompts = tiny.params(config), tiny.texts([7, 3, 5, 2], vocab_size=64)
  roster = Roster.create(config, 2, 0.5, noise="on_state")
  on_mesh = sharding.shard_params(params, config, make_mesh(config, 2, 2, 2))
  generated = decode.generate(
    on_mesh, config, prompts, max_new_tokens=5, roster=roster, stop_tokens=(), request_ids=range(4)
  ).completions
  for noise, same in (("on_state", True), ("gumbel", False)):
    scored = scoring.score(
      params,
      config,
      [p + c.tokens for p, c in zip(prompts, generated)],
      list(map(len, prompts)),
      roster=roster.replace(noise=noise),
      request_ids=range(4),
    ).sequences
    pairs = zip(scored, generated, strict=True)
    found = [np.allclose(s.log_probs[:, 0], c.log_probs, atol=1e-5) for s, c in pairs]
    assert found == [same] * 4


def test_experts_of_few_bits_by_parts():
  config = of_few_bits("int4")
  check_forward(config, params_lib.initialize(config, jax.random.key(0)))


def of_few_bits(expert_format):
  """A model whose experts' width is two groups, with windows, sinks and all biases."""
  return tiny.config(
    "gpt_oss",
    vocab_size=64,
    d_expert=2 * find(expert_format).group,
    expert_format=expert_format,
    initializer_range=0.3,
  )


def check_forward(config, params):
  """Logits and outputs of the blocks on a mesh and on one device."""
  tokens = jnp.asarray(tiny.texts([7] * 4))
  forward = jax.jit(transformer.forward, static_argnames=("config", "keep"))
  expected, of_one = forward(params, config, tokens, keep=("experts", "keys"))
  mesh = make_mesh(config, 2, 2, 2)
  actual, outputs = forward(
    sharding.shard_params(params, config, mesh), config, tokens, keep=("experts", "keys")
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_array_equal(outputs.experts, of_one.experts)
  np.testing.assert_allclose(outputs.keys, of_one.keys, rtol=1e-4, atol=1e-4)


def same_tokens(actual, expected, tolerance=1e-5):
  """Whether completions agree; False at a place where two tokens were equally good.

  Fails where they differ otherwise, or where log-probabilities do.
  """
  for place, (token, other) in enumerate(zip(actual.tokens, expected.tokens)):
    difference = abs(actual.log_probs[place] - expected.log_probs[place])
    assert difference < tolerance, (place, difference)
    if token != other:
      return False  # the best log-probabilities agree: two tokens have them
  assert len(actual.tokens) == len(expected.tokens)
  return True


@pytest.fixture(scope="module")
def on_one_device():
  params, config, tokenizer = model_formats.open_model("embedded:wordmath_control", "float32")
  prompts = [tokenizer.encode(wordmath.prompt(p)) for p in wordmath.problems("test", 3)]
  return prompts, config, generate(params, config, prompts)


def generate(params, config, prompts):
  return decode.generate(
    params, config, prompts, max_new_tokens=12, roster=Roster.create(config, 4, 0.3), batch_size=2
  ).completions


@pytest.mark.parametrize("sizes", [(1, 2, 4)], ids=str)
def test_the_embedded_model_says_the_same_on_every_mesh(on_one_device, sizes):
  prompts, config, expected = on_one_device
  mesh = make_mesh(config, *sizes)
  params, _ = model_formats.load_params(
    "embedded:wordmath_control", "float32", sharding.parameter_shardings(mesh, config)
  )
  before = decode.decode_steps._cache_size()
  actual = generate(params, config, prompts)
  assert decode.decode_steps._cache_size() == before + 1  # one program for all steps
  ties = sum(not same_tokens(a, b) for a, b in zip(actual, expected))
  assert ties == 0


@pytest.mark.parametrize("cache", ["clean", "standard"])
def test_caches_are_made_where_they_lie(params, cache):
  placed = sharding.shard_params(params, CONFIG, make_mesh(CONFIG, 2, 2, 2))
  roster = Roster.create(CONFIG, 3, [0, 0.5], cache=cache)
  made = batching.init_sharded(
    placed, members.empty_cache, CONFIG, roster, batch_size=4, capacity=128
  )
  # A quarter of the texts, a half of the heads.
  for array in jax.tree.leaves(made):
    assert array.addressable_shards[0].data.shape[-4:] == (1, 2, 128, 8)
  put = batching.device_put_like(placed, members.empty_cache(CONFIG, roster, 4, 128))
  assert jax.tree.map(lambda a: a.sharding, made) == jax.tree.map(lambda a: a.sharding, put)


@pytest.mark.parametrize(
  "sizes,num_members,texts,settings",
  [
    ((2, 2, 2), 8, 1, {"noise": "stratified"}),
    ((2, 4, 1), 3, 4, {"cache": "standard", "experts_by_layer": [3, [3, 2], [3, 1]]}),
  ],
  ids=str,
)
def test_rosters_by_parts(params, sizes, num_members, texts, settings):
  """Members over the mesh with one text; else texts over both axes."""
  roster = Roster.create(CONFIG, num_members, [0, 0.5], **settings)
  prompts = tiny.texts([5, 9, 3, 7][:texts], 64)

  def run(params):
    completions = decode.generate(
      params, CONFIG, prompts, max_new_tokens=8, roster=roster, stop_tokens=()
    ).completions
    return completions, scoring.score(
      params, CONFIG, tiny.texts([9, 12, 4, 7][:texts], 64), roster=roster
    ).sequences

  placed = sharding.shard_params(params, CONFIG, make_mesh(CONFIG, *sizes))
  (actual, scores), (expected, expected_scores) = run(placed), run(params)
  assert all(same_tokens(a, b) for a, b in zip(actual, expected))
  for a, b in zip(scores, expected_scores):
    np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)
    np.testing.assert_array_equal(a.clean_greedy_tokens, b.clean_greedy_tokens)


@pytest.mark.parametrize("expert_format, member_bits", [("mxfp4", None), ("nested:2-4", 2)])
def test_windows_and_few_bits_by_parts(expert_format, member_bits):
  """Texts that are longer than the window, and more of them than slots."""
  config = of_few_bits(expert_format)
  params = params_lib.initialize(config, jax.random.key(0))
  placed = sharding.shard_params(params, config, make_mesh(config, 2, 2, 2))
  completions = [
    decode.generate(
      p,
      config,
      tiny.texts([5, 9, 12, 7, 3], 64),
      max_new_tokens=8,
      batch_size=4,
      roster=Roster.create(config, 2, 0.5, member_bits=member_bits),
    ).completions
    for p in (placed, params)
  ]
  assert all(same_tokens(a, b) for a, b in zip(*completions))


def test_scoring_sends_rows_to_their_experts(params, monkeypatch):
  traced = []
  exchanged = expert_parallel.via_all_to_all
  monkeypatch.setattr(expert_parallel, "MIN_EXCHANGED_TOKENS", 1)
  monkeypatch.setattr(
    expert_parallel, "via_all_to_all", lambda *a: traced.append(a) or exchanged(*a)
  )
  config = CONFIG.replace(context_length=65)  # no program of another test
  texts = tiny.texts([9, 12, 4, 7, 8, 5, 11, 6], 64)
  roster = Roster.create(config, 2, 0.5, experts_by_layer=[[3, 2], [1, 3]])
  placed = sharding.shard_params(params, config, make_mesh(config, expert=8))
  actual = scoring.score(placed, config, texts, roster=roster).sequences
  assert traced
  for a, b in zip(actual, scoring.score(params, config, texts, roster=roster).sequences):
    np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)


def test_a_text_that_is_streamed_on_a_mesh(params):
  placed = sharding.shard_params(params, CONFIG, make_mesh(CONFIG, 2, 2, 2))
  arguments = dict(max_new_tokens=5, roster=Roster.create(CONFIG, 4, 0.5), stop_tokens=())
  *_, actual = decode.stream(placed, CONFIG, [3, 1, 4, 1, 5], **arguments)
  *_, expected = decode.stream(params, CONFIG, [3, 1, 4, 1, 5], **arguments)
  assert same_tokens(actual, expected)


def test_no_cache_on_a_mesh(params):
  roster = Roster.create(CONFIG, 2, 0.5, cache="none")
  texts = tiny.texts([6, 4], 64)
  placed = sharding.shard_params(params, CONFIG, make_mesh(CONFIG, 2, 2, 2))
  actual, expected = (
    scoring.score(p, CONFIG, texts, roster=roster).sequences for p in (placed, params)
  )
  for a, b in zip(actual, expected):
    np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)


@pytest.mark.parametrize("sizes, num_texts", [((1, 8, 1), 8), ((2, 2, 2), 1)], ids=str)
def test_no_weight_is_moved_between_devices(sizes, num_texts):
  """No collective of a step moves as much as a device's part of a layer's smallest matrix."""
  config = CONFIG.replace(d_model=256, head_dim=32, d_expert=256, vocab_size=512)
  mesh = make_mesh(config, *sizes)
  placed = sharding.shard_params(tiny.params(config), config, mesh)
  attention = placed.layers.attention.key.addressable_shards[0].data
  expert = placed.layers.experts.down.addressable_shards[0].data
  smallest = min(
    attention[0].size, expert[0, 0].size, placed.unembedding.addressable_shards[0].data.size
  )
  state = decode.start(
    placed,
    config,
    Roster.create(config, 2, [0, 0.5]),
    [[1, 2, 3]] * num_texts,
    range(num_texts),
    8,
    num_texts,
    64,
  )
  text = (
    decode.decode_steps.lower(
      placed,
      config,
      Roster.create(config, 2, [0, 0.5]),
      Sampler.greedy(),
      state,
      jnp.full(8, -1),
      np.int32(1),
    )
    .compile()
    .as_text()
  )
  moved = list(elements_moved(text))
  assert len(moved) > 5
  assert max(moved) < smallest


def elements_moved(text):
  """Elements in the result of each collective of a compiled program."""
  for result in re.findall(
    r"= (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(", text
  ):
    yield sum(
      int(np.prod([int(d) for d in shape.split(",") if d]))
      for shape in re.findall(r"\[([\d,]*)\]", result)
    )
