"""The model of costs against counted sums, compiled programs and brute force."""

from collections import Counter
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from roe_jax import costs, presets, sharding
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.costs import hlo, rounds
from roe_jax.costs.hlo import Collective
from roe_jax.roster import Roster

pytestmark = pytest.mark.slow

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


# FLOPs.


def test_members_at_fewer_bits_read_fewer_bytes():
  config = CONFIG.replace(expert_format="nested:2-4")
  expert = 3 * 64 * 64  # weights of an expert; groups of 64 have a step, an offset, and two scales
  assert costs.calls.bytes_per_expert(config) == expert * (4 / 8 + 4 * 2 / 64)
  assert costs.calls.bytes_per_expert(config, 2) == expert * (2 / 8 + 2 * 2 / 64)
  mesh = sharding.abstract_mesh(config, 1)
  full, fewer = (
    costs.calls.call(config, Roster.create(config, 3, 0.5, member_bits=bits), mesh, 1, 8)
    for bits in (None, 2)
  )
  clean = costs.calls.call(config, Roster.create(config), mesh, 1, 8)
  # The clean member and the noisy ones read their experts one after the other.
  unique = costs.expected_unique_experts(config, 2, 1)
  noisy = clean.weights - config.num_layers * 3 * expert * (4 / 8 + 4 * 2 / 64)
  noisy += config.num_layers * unique * expert * (2 / 8 + 2 * 2 / 64)
  assert fewer.weights == pytest.approx(clean.weights + noisy)
  assert fewer.flops == pytest.approx(full.flops)


def test_quantized_projections_read_fewer_bytes_on_each_device():
  config = CONFIG.replace(projection_format="int8")
  d, c, item = config.d_model, config.head_dim, jnp.dtype(config.dtype).itemsize
  of_heads = d * c * (2 * config.num_heads + 2 * config.num_kv_heads) * config.num_layers
  into, out = of_heads - d * c * config.num_heads * config.num_layers, config.vocab_size * d
  back = of_heads - into
  # Codes, and a scale for each group along D; along a head's width in the output projection.
  saved = (into + out) * (item - 1 - 2 / math.gcd(128, d)) + back * (
    item - 1 - 2 / math.gcd(128, c)
  )
  for devices in (1, 2):
    mesh = sharding.abstract_mesh(config, devices, tensor=devices)
    full, fewer = (
      costs.calls.call(each, Roster.create(each), mesh, 1, 8).weights for each in (CONFIG, config)
    )
    assert full - fewer == pytest.approx(saved / devices)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "qwen2_moe", "glm4_moe", "deepseek_v3"])
def test_flops_are_two_for_each_weight_that_a_position_passes(family):
  config = tiny.config(family)
  sizes = {
    "/".join(str(k.name) for k in path): leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(params_lib.abstract(config))
  }
  expected = 0
  for name, size in sizes.items():
    if "norm" in name or "bias" in name or "sinks" in name or name == "embedding":
      continue
    part = config.experts_per_token / config.num_experts if "layers/experts" in name else 1
    expected += 2 * size * part
  # A position that sees itself: a score and a value of each head.
  expected += config.num_layers * 4 * config.num_heads * config.cached_head_dim
  assert costs.forward_flops(config, Roster.create(config), range(1)) == expected


def test_flops_of_attention_end_at_the_window():
  config = tiny.config("gpt_oss")
  plain, window = Roster.create(config), config.sliding_window
  per_seen = 4 * config.num_heads * config.head_dim

  def step(position):
    return costs.forward_flops(config, plain, range(position, position + 1))

  whole = config.num_layers - len(config.sliding_layers)
  assert step(1) - step(0) == config.num_layers * per_seen
  assert step(window + 5) - step(window + 4) == whole * per_seen
  assert costs.forward_flops(config, plain, range(3, 30)) == sum(map(step, range(3, 30)))


def test_layers_before_the_noise_are_counted_once():
  layer, head = 10, 2 * CONFIG.vocab_size * CONFIG.d_model
  plain = costs.forward_flops(CONFIG, Roster.create(CONFIG), range(1))
  layer = (plain - head) // 2
  late = costs.forward_flops(CONFIG, Roster.create(CONFIG, 5, [0, 0.3]), range(1))
  assert late == layer + 5 * (layer + head)
  apart = Roster.create(CONFIG, 5, 0.3, include_clean=False)  # the clean member, too, is run
  assert costs.forward_flops(CONFIG, apart, range(1)) == 6 * plain


def test_members_with_fewer_experts_cost_less():
  most, layers = CONFIG.experts_per_token, CONFIG.num_layers
  plain = costs.forward_flops(CONFIG, Roster.create(CONFIG), range(3))
  expert = 3 * 6 * CONFIG.d_model * CONFIG.d_expert
  one = costs.forward_flops(CONFIG, Roster.create(CONFIG, experts_by_layer=1), range(3))
  assert one == plain - layers * (most - 1) * expert
  counts = [[most] * layers, [1] * layers, [most] * (layers - 1) + [1]]
  own = costs.forward_flops(CONFIG, Roster.create(CONFIG, 3, experts_by_layer=counts), range(3))
  assert own == 3 * plain - (layers + 1) * (most - 1) * expert


def test_generation_and_scoring_are_sums_of_their_passes():
  roster, plain = Roster.create(CONFIG, 4, 0.3), Roster.create(CONFIG)

  def prefill(*positions):
    return costs.forward_flops(CONFIG, plain, range(*positions), predicted=0)

  assert costs.generation_flops(CONFIG, roster, 7, 3) == prefill(6) + costs.forward_flops(
    CONFIG, roster, range(6, 9)
  )
  assert costs.scoring_flops(CONFIG, roster, 9, 4) == prefill(8) + costs.forward_flops(
    CONFIG, roster, range(3, 8)
  )
  assert costs.scoring_flops(CONFIG, plain, 9, 4) == prefill(3) + costs.forward_flops(
    CONFIG, plain, range(3, 8)
  )


# Drafts, and members where they are needed.


def test_rounds_are_what_their_tokens_make_them():
  """Tokens and pieces by brute force over all outcomes; reads of OLMoE on an H200 by hand."""
  count, accept, share = 5, 0.8, 0.3
  outcomes = [np.array(o) for o in itertools.product([0, 1], repeat=count)]

  def mean(value, p):
    return sum(value(o) * p ** o.sum() * (1 - p) ** (count - o.sum()) for o in outcomes)

  kept = mean(lambda o: min(count, int(np.cumprod(o).sum()) + 1), accept)
  assert rounds.kept_tokens(count, accept) == pytest.approx(kept)
  for size in (1, 2, 5):
    pieces = mean(lambda o, size=size: -(-int(o.sum()) // size), share)
    assert rounds.expected_pieces(count, size, share) == pytest.approx(pieces)

  config, device = presets.PRESETS["olmoe-1b-7b"], costs.ACCELERATORS["h200"]
  sizes = sharding.abstract_mesh(config, 1), 1, 1023
  layer = 4 * 2048**2 + 2048 * 64  # weights of attention and router
  expert, head = 3 * 2048 * 1024, 2048 * 50304

  def read(num_members, positions):
    rows = num_members * positions
    unique = costs.expected_unique_experts(config, num_members, positions)
    cache = 16 * 2 * 2048 * (1023 + positions)
    logits = 4 * 4 * 50304 * rows  # written once and read three times in float32
    return 2 * (16 * (layer + unique * expert) + head + cache) + logits

  def round_of(acceptance=1.0, share=1.0, **settings):
    roster = Roster.create(config, 32, 0.2, **settings)
    more = dict(acceptance=acceptance, unsure=share, platform="gpu")
    return rounds.generation_round(config, roster, *sizes, **more)

  drafts, ordinary = round_of(0.9, draft_tokens=8), round_of()
  expected = 8 * read(1, 1) + read(31, 8)
  assert drafts.bytes_read() == pytest.approx(expected)
  assert drafts.seconds(device) == pytest.approx(expected / device.bandwidth)
  assert drafts.tokens == pytest.approx((1 - 0.9**8) / 0.1)
  assert ordinary.bytes_read() == pytest.approx(read(32, 1))
  assert drafts.forward_passes == 8 * 32 and ordinary.forward_passes == 32
  # Each member runs once at each position; the newest attend to a few more.
  assert drafts.flops() == pytest.approx(8 * ordinary.flops(), rel=1e-3)
  kept_all = round_of(draft_tokens=8).seconds(device) / 8
  assert 3 < ordinary.seconds(device) / kept_all < 3.3

  # Gathered positions are one piece, which runs if any is unsure; each reads the history.
  unsure = round_of(1, 0.1, draft_tokens=8, unsure="margin<0.5")
  assert unsure.bytes_read() == pytest.approx(
    8 * read(1, 1) + (1 - 0.9**8) * (read(31, 8) + 2 * 16 * 2 * 2048 * 7 * 1023)
  )
  assert unsure.forward_passes == pytest.approx(8 * (1 + 0.1 * 31))
  alone = round_of(1, 0.25, unsure="margin<0.5")
  assert alone.bytes_read() == pytest.approx(read(1, 1) + 0.25 * read(31, 1))
  scored = [
    rounds.scoring_round(config, roster, *sizes, 64, unsure=0.0, platform="gpu")
    for roster in (Roster.create(config), Roster.create(config, 32, 0.2, unsure="margin<0.5"))
  ]
  assert scored[0].bytes_read() == scored[1].bytes_read()
  assert scored[1].forward_passes == scored[1].tokens == 64


# Experts that are hit.


@pytest.mark.parametrize("overlap,members,rows", [(None, 4, 3), (0.74, 8, 1), (0.5, 3, 2)])
def test_experts_hit_are_those_of_drawn_rosters(overlap, members, rows):
  config = CONFIG.replace(num_experts=16, experts_per_token=4)
  e, a = 16, 4
  random = np.random.RandomState(0)
  counts = []
  for _ in range(4000):
    hit = set()
    for _ in range(rows):
      clean = random.permutation(e)[:a]
      hit |= set(clean)
      for _ in range(members - 1):
        if overlap is None:
          hit |= set(random.permutation(e)[:a])
        else:  # as many of the others as there are on average
          others = random.permutation([i for i in range(e) if i not in clean])
          expected = (1 - overlap) * a
          hit |= set(others[: int(expected) + (random.uniform() < expected % 1)])
    counts.append(len(hit))
  found = costs.expected_unique_experts(config, members, rows, overlap)
  assert found == pytest.approx(np.mean(counts), abs=4 * np.std(counts) / 4000**0.5)


def test_experts_hit_are_all_or_those_of_one():
  assert costs.expected_unique_experts(CONFIG, 1) == 3
  assert costs.expected_unique_experts(CONFIG, 9, overlap=1) == 3
  assert costs.expected_unique_experts(CONFIG, 64, 64) == pytest.approx(8)
  assert costs.expected_unique_experts(CONFIG.replace(experts_per_token=8), 2) == 8


# The collectives of a compiled program.


def test_collectives_are_counted_as_often_as_they_run():
  """Of each kind one, some of them in loops."""
  mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  spec = jax.sharding.PartitionSpec(("a", "b"))

  def part(x):  # [8, 16] on each device
    x = jax.lax.fori_loop(0, 5, lambda i, x: jax.lax.psum(x, "b") / 4 + i, x)
    x = jax.lax.fori_loop(
      0, 3, lambda i, x: jax.lax.fori_loop(0, 2, lambda j, x: x * jax.lax.pmax(x, ("a", "b")), x), x
    )
    y = jax.lax.all_gather(x, "a", tiled=True)  # [16, 16]
    y = jax.lax.psum_scatter(y, "a", tiled=True)
    return jax.lax.all_to_all(y, "b", 0, 0, tiled=True)

  run = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
  text = run.lower(jax.ShapeDtypeStruct((64, 16), jnp.float32)).compile().as_text()
  size = 8 * 16 * 4
  assert hlo.count_collectives(text) == Counter(
    {
      Collective("all-reduce", size, 4): 5,
      Collective("all-reduce", size, 8): 6,
      Collective("all-gather", 2 * size, 2): 1,
      Collective("reduce-scatter", 2 * size, 2): 1,
      Collective("all-to-all", size, 4): 1,
    }
  )
  with pytest.raises(ValueError, match="not the text of a compiled program"):
    hlo.count_collectives("")


def test_groups_are_read_in_every_form():
  line = " %x = f32[4,2]{{1,0}} all-gather(%y), replica_groups={}, dimensions={{0}}"
  for groups in (
    "{{0,1,2},{3,4,5}}",
    "[2,3]<=[6]",
    "mesh['axis_0'=2,'axis_1'=3] {'axis_1'}",
    "mesh['axis_0'=2,'axis_1'=3], device_ids=([2,3]T(1,0)) {'axis_1'}",
  ):
    text = "ENTRY %main () -> f32[] {\n" + line.format(groups) + "\n}"
    assert hlo.count_collectives(text) == Counter({Collective("all-gather", 32, 3): 1}), groups


def test_a_ring_sends_all_but_the_own_part():
  assert Collective("all-gather", 800, 8).bytes_sent == 700
  assert Collective("all-reduce", 800, 8).bytes_sent == 1400
  assert Collective("collective-permute", 800, 2).bytes_sent == 800


# Programs of published sizes, compiled for 64 devices. Of scoring, Mixtral's rows are
# exchanged and those of the others are summed over devices; steps gather them.
STEP, SCORE = ("step", 64, 16, 1), ("score", 16, 4, 64)
CASES = [
  ("mixtral-8x7b", *SCORE),
  ("qwen3-30b-a3b", *SCORE),
  ("pangu-ultra-moe", *STEP),
  ("gpt-oss-120b", *STEP),
]


@pytest.fixture(scope="module")
def programs():
  here = pathlib.Path(__file__).parent
  done = subprocess.run(
    [sys.executable, here / "sixty_four_devices.py", json.dumps(CASES)],
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": str(here.parent)},
  )
  assert done.returncode == 0, done.stderr
  return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(c[:2]))
def test_bytes_on_a_device_are_those_of_compiled_programs(programs, case):
  """Arguments to 0.1 %; temporaries to 0.4 to 1.5 times and 32 MiB; all to 10 %."""
  name, kind, texts, members, positions = case
  config, found = presets.PRESETS[name], programs[case]
  expected = costs.memory(
    config,
    Roster.create(config, members, 0.3),
    sharding.abstract_mesh(config, 64),
    texts,
    1024,
    positions,
    kind=kind,
  )
  # A chunk of scoring is given the tokens of its positions only.
  held = expected.weights + expected.cache + (expected.tokens if kind == "step" else 0)
  assert found["arguments"] == pytest.approx(held, rel=1e-3)
  assert expected.activations * 0.4 < found["temporaries"] < 1.5 * expected.activations + 2**25
  assert found["arguments"] + found["temporaries"] == pytest.approx(expected.total, rel=0.1)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(c[:2]))
def test_collectives_are_those_of_compiled_programs_and_move_no_weights(programs, case):
  """All bytes that are sent to 2 %."""
  name, kind, texts, members, positions = case
  config, found = presets.PRESETS[name], programs[case]
  mesh = sharding.abstract_mesh(config, 64)
  # On CPUs XLA moves bfloat16 rows as float32.
  expected = costs.call(
    config.replace(dtype="float32"),
    Roster.create(config, members, 0.3),
    mesh,
    texts,
    1023,
    positions,
    kind=kind,
  )
  collectives = Counter(
    {Collective(c["kind"], c["num_bytes"], c["devices"]): c["count"] for c in found["collectives"]}
  )
  sent = sum(c.bytes_sent * count for c, count in collectives.items())
  assert 0 <= collectives.total() - expected.num_collectives <= 8
  assert sent == pytest.approx(expected.bytes_sent, rel=0.02)
  # Weights are held in 8 or 16 bits; nothing else is moved in these but embedded tokens.
  assert found["narrow"] == [f"{texts},{positions},{config.d_model}"]
