"""Gumbel-top-k routing: which experts are chosen, and their gates."""

import itertools

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny

from roe_jax import noise as noise_lib
from roe_jax import routers, routing, transformer

LOGITS = np.array([1.2, 0.4, 0.0, -0.3, 0.9, -1.1])


def set_probabilities(logits, temperature, count):
  """Probability of each set of `count` experts drawn without replacement from
  softmax(logits / temperature), summed over the orders of drawing."""
  p = np.exp(logits / temperature)
  p /= p.sum()
  probabilities = {}
  for order in itertools.permutations(range(len(p)), count):
    left, probability = 1.0, 1.0
    for expert in order:
      probability *= p[expert] / left
      left -= p[expert]
    chosen = tuple(sorted(order))
    probabilities[chosen] = probabilities.get(chosen, 0) + probability
  assert abs(sum(probabilities.values()) - 1) < 1e-12
  return probabilities


def drawn_sets(config, temperature, num_draws=40_000):
  count = config.experts_per_token
  key = noise_lib.stream_key(5, noise_lib.ROUTING)
  keys = noise_lib.position_keys(
    key, jnp.arange(4, dtype=jnp.uint32), jnp.tile(jnp.arange(num_draws // 4), (4, 1))
  )
  noise = noise_lib.RoutingNoise(keys, jnp.full(2, temperature), jnp.int32(1))
  logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (4, num_draws // 4, 6))
  experts, _ = routing.route(config, logits, noise.perturb(jnp.int32(1), logits, count))
  return np.sort(np.asarray(experts).reshape(num_draws, -1))


@pytest.mark.parametrize("family", hf.ROUTED)
@pytest.mark.parametrize("count, temperature", [(2, 1.0), (2, 0.3), (3, 0.5)])
def test_sets_are_drawn_without_replacement_from_the_softmax(family, count, temperature):
  config = tiny.config(family, num_experts=6, experts_per_token=count)
  sets = drawn_sets(config, temperature)

  def p_value(temperature):
    probabilities = set_probabilities(LOGITS, temperature, count)
    observed = np.array([np.sum(np.all(sets == s, axis=-1)) for s in probabilities])
    expected = len(sets) * np.array(list(probabilities.values()))
    # Sets too rare for the chi-square distribution are taken together.
    rare = expected < 10
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    use = expected > 0
    return scipy.stats.chisquare(observed[use], expected[use]).pvalue

  assert p_value(temperature) > 0.01
  # The same statistic tells temperatures 10 % apart.
  assert p_value(1.1 * temperature) < 1e-6
  assert p_value(temperature / 1.1) < 1e-6

  probabilities = set_probabilities(LOGITS, temperature, count)
  for expert in range(6):
    expected = sum(p for s, p in probabilities.items() if expert in s)
    deviation = np.sqrt(expected * (1 - expected) / len(sets))
    assert abs(np.mean(np.any(sets == expert, axis=-1)) - expected) < 4 * deviation


def gates_by_formula(logits, noise, experts, normalize, gate_weights):
  """The three gate rules in float64; a loop over rows."""
  gates = []
  for r, g, chosen in zip(logits, noise, experts):
    source = np.exp(r + g) if gate_weights == "noisy" else np.exp(r)
    p = source / source.sum()
    gate = p[chosen]
    if normalize:
      gate = gate / gate.sum()
    elif gate_weights == "clean_rescaled":
      clean_mass = np.sort(p)[-len(chosen) :].sum()
      gate = gate * clean_mass / gate.sum()
    gates.append(gate)
  return np.array(gates)


def random_rows(num_rows=500, num_experts=8, temperature=0.7):
  random = np.random.RandomState(0)
  logits = random.standard_normal((num_rows, num_experts)).astype(np.float32)
  return logits, (temperature * random.gumbel(size=logits.shape)).astype(np.float32)


@pytest.mark.parametrize("gate_weights", routing.GATE_WEIGHTS)
@pytest.mark.parametrize(
  "family, normalize",
  [
    ("olmoe", False),
    ("olmoe", True),
    ("mixtral", True),
    ("gpt_oss", True),
    ("qwen2_moe", False),
    ("qwen3_moe", True),
  ],
)
def test_gates_follow_the_formulas(family, normalize, gate_weights):
  config = tiny.config(family, normalize_gates=normalize)
  logits, noise = random_rows()
  experts, gates = routing.route(
    config, jnp.asarray(logits), jnp.asarray(logits + noise), gate_weights
  )
  perturbed = logits + noise  # float32, as the choice is made
  np.testing.assert_array_equal(experts, np.argsort(-perturbed, axis=-1)[:, :3])
  expected = gates_by_formula(
    logits.astype(np.float64),
    noise.astype(np.float64),
    np.asarray(experts),
    normalize,
    gate_weights,
  )
  np.testing.assert_allclose(gates, expected, rtol=2e-6)


@pytest.mark.parametrize("gate_weights", ["clean", "noisy"])
def test_scaled_gates_are_one_plus_a_share_of_the_softmax(gate_weights):
  config = tiny.config("olmoe", unit_gates=True, gate_scales=True, gates_in_model_dtype=False)
  logits, noise = random_rows(num_rows=20)
  scales = np.linspace(-1, 2, 8).astype(np.float32)
  experts, gates = routing.route(
    config, jnp.asarray(logits), jnp.asarray(logits + noise), gate_weights, jnp.asarray(scales)
  )
  p = np.exp(np.float64(logits + noise if gate_weights == "noisy" else logits))
  p /= p.sum(-1, keepdims=True)
  expected = np.take_along_axis(1 + scales * p, np.asarray(experts), axis=-1)
  np.testing.assert_allclose(gates, expected, rtol=1e-5)
  _, ones = routing.route(config, jnp.asarray(logits), scales=jnp.zeros(8))
  np.testing.assert_array_equal(ones, np.ones((20, 3)))


def test_the_gate_rules_differ_where_they_should():
  logits, noise = map(jnp.asarray, random_rows())

  def gates(config):
    return [
      np.asarray(routing.route(config, logits, logits + noise, w)[1]) for w in routing.GATE_WEIGHTS
    ]

  clean, noisy, rescaled = gates(tiny.config("olmoe"))
  assert np.abs(noisy - clean).max() > 0.1 and np.abs(rescaled - clean).max() > 0.1
  clean, noisy, rescaled = gates(tiny.config("mixtral"))
  assert np.abs(noisy - clean).max() > 0.1
  np.testing.assert_allclose(rescaled, clean, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_rescaled_gates_have_the_mass_of_the_clean_choice(temperature):
  config = tiny.config("olmoe")
  logits, noise = map(jnp.asarray, random_rows(temperature=temperature))
  _, clean = routing.route(config, logits)
  _, rescaled = routing.route(config, logits, logits + noise, "clean_rescaled")
  np.testing.assert_allclose(rescaled.sum(-1), clean.sum(-1), rtol=1e-6)


@pytest.mark.parametrize(
  "family, normalize",
  [
    ("olmoe", False),
    ("olmoe", True),
    ("mixtral", True),
    ("gpt_oss", True),
    ("qwen2_moe", False),
    ("qwen3_moe", True),
  ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rescaled_gates_are_bitwise_the_clean_ones_where_the_clean_experts_are_chosen(
  family, normalize, dtype
):
  config = tiny.config(family, normalize_gates=normalize, dtype=dtype)
  logits, noise = map(jnp.asarray, random_rows(2000, temperature=0.1))
  clean_experts, _ = routing.route(config, logits)
  experts, clean = routing.route(config, logits, logits + noise, "clean")
  _, rescaled = routing.route(config, logits, logits + noise, "clean_rescaled")
  same = np.all(np.sort(experts) == np.sort(clean_experts), axis=-1)
  reordered = same & np.any(experts != clean_experts, axis=-1)
  assert reordered.sum() > 100 and (~same).sum() > 100
  np.testing.assert_array_equal(np.asarray(rescaled)[same], np.asarray(clean)[same])


@pytest.mark.parametrize("family", hf.ROUTED)
@pytest.mark.parametrize("gate_weights", routing.GATE_WEIGHTS)
def test_zero_noise_is_bitwise_no_noise(family, gate_weights):
  config = tiny.config(family)
  logits = jnp.asarray(random_rows()[0])
  plain = routing.route(config, logits)
  for actual, expected in zip(routing.route(config, logits, logits + 0.0, gate_weights), plain):
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("gate_weights", routing.GATE_WEIGHTS)
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_an_expert_at_minus_infinity_has_no_weight(family, gate_weights):
  logits = random_rows()[0]
  alone = np.where(np.arange(8) == 5, logits, -np.inf)
  experts, gates = routing.route(
    tiny.config(family), jnp.asarray(logits), jnp.asarray(alone), gate_weights
  )
  np.testing.assert_array_equal(experts[:, 0], 5)
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expected = {
    "clean": p[:, 5],
    "noisy": np.ones(len(p)),
    "clean_rescaled": np.sort(p)[:, -3:].sum(1),
  }[gate_weights]
  if family == "mixtral":
    expected = np.ones(len(p))
  np.testing.assert_allclose(gates, np.stack([expected, 0 * expected, 0 * expected], 1), rtol=2e-6)


@pytest.mark.parametrize("family, normalized", [("olmoe", False), ("mixtral", True)])
@pytest.mark.parametrize("gates", routing.EXTRA_GATES)
def test_more_experts_are_weighted_as_asked(family, normalized, gates):
  config = routing.with_experts(tiny.config(family), 5, gates)  # 3 of 8 before
  logits = random_rows()[0]
  experts, weights = routing.route(config, jnp.asarray(logits))
  order = np.argsort(-logits)
  np.testing.assert_array_equal(experts, order[:, :5])
  p = np.exp(logits.astype(np.float64))
  p = np.sort(p / p.sum(-1, keepdims=True))[:, ::-1][:, :5]
  mass = (
    np.ones((len(p), 1))
    if normalized or gates == "renormalized"
    else p[:, : {"model": 5, "rescaled": 3}[gates]].sum(-1, keepdims=True)
  )
  np.testing.assert_allclose(weights, p / p.sum(-1, keepdims=True) * mass, rtol=2e-6)


def test_as_many_experts_as_before_change_nothing():
  config, logits = tiny.config("olmoe"), jnp.asarray(random_rows()[0])
  for gates in ("model", "rescaled"):
    for actual, expected in zip(
      routing.route(routing.with_experts(config, 3, gates), logits), routing.route(config, logits)
    ):
      np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("gate_weights", ["clean", "clean_rescaled"])
def test_a_roster_of_more_experts_keeps_the_mass_of_the_models_own(gate_weights):
  config, own = routing.with_experts(tiny.config("olmoe"), 5, "rescaled"), tiny.config("olmoe")
  logits, noise = random_rows()
  perturbed = jnp.asarray(logits + noise)
  _, gates = routing.route(config, jnp.asarray(logits), perturbed, gate_weights)
  _, expected = routing.route(own, jnp.asarray(logits), perturbed, gate_weights)
  np.testing.assert_allclose(gates.sum(-1), expected.sum(-1), rtol=2e-6)


@pytest.mark.parametrize(
  "count, gates, message",
  [
    (9, "model", r"must lie in \[1, 8\] for a model with 8 experts, got 9"),
    (2, "rescaled", r"must lie in \[3, 8\]"),
    (0, "model", r"\[1, 8\]"),
    (4, "mean", "unknown gates 'mean'; choose one of model, rescaled, renormalized"),
  ],
)
def test_impossible_numbers_of_experts_are_refused(count, gates, message):
  with pytest.raises(ValueError, match=message):
    routing.with_experts(tiny.config("olmoe"), count, gates)


def test_all_but_mixtral_round_their_gates_to_the_models_dtype():
  logits = jnp.asarray(random_rows()[0])
  for family in hf.ROUTED:
    rounds = family != "mixtral"
    _, gates = routing.route(tiny.config(family, dtype="bfloat16"), logits)
    _, exact = routing.route(tiny.config(family), logits)
    assert gates.dtype == jnp.float32
    expected = exact.astype(jnp.bfloat16).astype(jnp.float32) if rounds else exact
    np.testing.assert_array_equal(gates, expected)


def test_a_dense_model_does_not_route():
  """No choice, no sorting of tokens by expert, and no weights of a router."""
  config = tiny.config("llama")
  params = tiny.params(config)
  program = str(
    jax.make_jaxpr(lambda x: transformer.forward(params, config, x)[0])(jnp.zeros((1, 4), int))
  )
  assert params.layers.router is None
  assert not [name for name in ("top_k", "sort", "custom_vmap") if f"{name}[" in program]
  routed = tiny.config("olmoe")
  weights = tiny.params(routed)
  program = str(
    jax.make_jaxpr(lambda x: transformer.forward(weights, routed, x, strategy="tiled_loop")[0])(
      jnp.zeros((1, 4), int)
    )
  )
  assert "top_k[" in program and "sort[" in program


SIGMOID = tiny.config(
  "glm4_moe", num_experts=12, experts_per_token=3, expert_groups=4, groups_per_token=2
)


def deepseek_gate(logits, noisy, bias, config, gate_weights):
  """The experts and gates of DeepSeek-V3's router in float64, as a loop over tokens and groups.

  Noise is in the logits by which experts are chosen.
  """
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  all_experts, all_gates = [], []
  for clean, perturbed in zip(logits.astype(np.float64), noisy.astype(np.float64)):

    def best(values):
      score = [-np.inf if np.isneginf(v) else sigmoid(v) + b for v, b in zip(values, bias)]
      groups = np.split(np.arange(len(score)), config.expert_groups)
      totals = [
        sum(sorted((score[e] for e in group if np.isfinite(score[e])), reverse=True)[:2])
        if np.isfinite([score[e] for e in group]).any()
        else -np.inf
        for group in groups
      ]
      kept = np.argsort(totals)[::-1][: config.groups_per_token]
      left = [e for g in kept for e in groups[g]]
      return sorted(left, key=lambda e: -score[e])[: config.experts_per_token]

    experts = best(perturbed)
    source = sigmoid(perturbed if gate_weights == "noisy" else clean)
    gates = np.array([0 if np.isneginf(perturbed[e]) else source[e] for e in experts])
    if config.normalize_gates:
      gates = gates / gates.sum()
    elif gate_weights == "clean_rescaled":
      gates = gates * sum(sigmoid(clean)[e] for e in best(clean)) / gates.sum()
    all_experts.append(experts)
    all_gates.append(config.gate_multiplier * gates)
  return np.array(all_experts), np.array(all_gates)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("gate_weights", routing.GATE_WEIGHTS)
def test_sigmoid_routers_choose_with_noise_bias_and_groups(normalize, gate_weights):
  config = SIGMOID.replace(normalize_gates=normalize)
  logits, noise = random_rows(num_experts=12)
  bias = np.random.RandomState(1).uniform(-0.5, 0.5, 12).astype(np.float32)
  noisy = logits + noise
  noisy[:50, ::3] = -np.inf  # one expert of each group is banned,
  noisy[50:100, :5] = -np.inf  # or one whole group and some of another
  expected = deepseek_gate(logits, noisy, bias, config, gate_weights)
  arguments = *map(jnp.asarray, (logits, noisy)), gate_weights
  experts, gates = routing.route(config, *arguments, bias=jnp.asarray(bias))
  np.testing.assert_array_equal(experts, expected[0])
  np.testing.assert_allclose(gates, expected[1], rtol=3e-6)
  # The noise changes groups, and the bias does what it should not for gates.
  assert np.mean(experts // 3 != routing.route(config, arguments[0])[0] // 3) > 0.1
  assert np.any(experts != routing.route(config, *arguments)[0])


@pytest.mark.parametrize("gate_weights", routing.GATE_WEIGHTS)
def test_zero_noise_of_a_sigmoid_router_is_bitwise_no_noise(gate_weights):
  logits, bias = jnp.asarray(random_rows(num_experts=12)[0]), jnp.linspace(-1, 1, 12)
  expected = routing.route(SIGMOID, logits, bias=bias)
  actual = routing.route(SIGMOID, logits, logits + 0.0, gate_weights, bias=bias)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_an_only_expert_of_a_sigmoid_router_gets_all_weight():
  """Where every expert but one is at -inf, its group wins whatever the biases are."""
  logits, bias = random_rows(num_experts=12)[0], jnp.full(12, -3.0).at[:6].set(3.0)
  alone = jnp.where(jnp.arange(12) == 7, jnp.asarray(logits), -jnp.inf)
  experts, gates = routing.route(SIGMOID, jnp.asarray(logits), alone, bias=bias)
  np.testing.assert_array_equal(experts[:, 0], 7)
  np.testing.assert_allclose(gates, [[2.5, 0, 0]] * len(logits), rtol=1e-6)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(expert_groups=5), "must divide num_experts"),
    (dict(expert_groups=12), "groups of at least two"),
    (dict(groups_per_token=5), "groups_per_token must be at most expert_groups"),
    (dict(experts_per_token=7), "enough for experts_per_token"),
    (dict(router="linear"), "are for router 'sigmoid'"),
    (dict(first_dense_layers=3), "less than num_layers"),
    (dict(d_dense=0), "positive with d_dense"),
    (dict(rotary_dim=5), "rotary_dim must be even"),
  ],
)
def test_impossible_sigmoid_routers_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    SIGMOID.replace(**changes)


def test_a_recurrent_router_is_a_gated_recurrent_unit():
  torch = pytest.importorskip("torch")
  config = tiny.config("mixtral", router="recurrent", router_state=6)
  params = tiny.params(config)
  cell = params.router_cell
  reference = torch.nn.GRUCell(6, 6)
  stacked = lambda array: torch.tensor(np.asarray(array).reshape(18, *array.shape[2:]))
  reference.load_state_dict(
    {
      "weight_ih": stacked(cell.input),
      "weight_hh": stacked(cell.state),
      "bias_ih": stacked(cell.input_bias),
      "bias_hh": stacked(cell.state_bias),
    }
  )
  random = np.random.RandomState(0)
  x, state = (random.standard_normal((5, n)).astype(np.float32) for n in (config.d_model, 6))
  projections = params.layers.router_projection
  found = routers.advance(cell, projections, 1, jnp.asarray(x), jnp.asarray(state))
  u = x @ np.asarray(projections[1]).T
  with torch.no_grad():
    expected = reference(torch.tensor(u), torch.tensor(state)).numpy()
  np.testing.assert_allclose(found, expected, atol=1e-6)
  # Without U and with z = 0 the router knows its own layer only.
  local = cell.replace(
    state=0 * cell.state,
    input_bias=cell.input_bias.at[1].set(-100.0),
    state_bias=0 * cell.state_bias,
  )
  states = [routers.advance(local, projections, 1, jnp.asarray(x), s) for s in (found, 9 * found)]
  np.testing.assert_array_equal(*states)


@pytest.mark.parametrize("changes", [dict(router_state=0), dict(router="linear", router_state=6)])
def test_a_recurrent_router_has_a_state_and_no_other_has(changes):
  with pytest.raises(ValueError, match="router_state must be positive with router 'recurrent'"):
    tiny.config("mixtral", **(dict(router="recurrent", router_state=6) | changes))
