"""The loss against independent formulas, and what a training step does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from roe_jax import params as params_lib
from roe_jax import training, transformer
from roe_jax.layer_inputs import RouterInputs

SETTINGS = training.TrainSettings(num_steps=40, warmup_steps=4, learning_rate=1e-2)
OPTIONS = dict(keep=("experts", "router_logits"), strategy="padded")


@pytest.fixture(scope="module")
def config():
  return tiny.config("olmoe", num_layers=2, experts_per_token=2)


@pytest.fixture(scope="module")
def params(config):
  return tiny.params(config)


@pytest.fixture(scope="module")
def batch(config):
  """Three texts of 9, 6 and 7 tokens, whose first three tokens weigh a quarter."""
  random = np.random.RandomState(1)
  tokens = random.randint(0, config.vocab_size, (3, 9)).astype(np.int32)
  weights = np.zeros((3, 9), np.float32)
  for row, length in enumerate((9, 6, 7)):
    weights[row, :3], weights[row, 3:length] = 0.25, 1.0
  return training.Batch(jnp.asarray(tokens), jnp.asarray(weights), jnp.arange(3, dtype=jnp.uint32))


@pytest.fixture(scope="module")
def loss(config):
  """The compiled loss, with settings that may be changed."""
  compiled = jax.jit(training.loss, static_argnums=(2, 3))
  return lambda params, batch, **changes: compiled(
    params, batch, config, dataclasses.replace(SETTINGS, **changes)
  )


def test_loss_parts_follow_their_formulas(config, params, batch, loss):
  total, parts = loss(params, batch)
  logits, outputs = jax.jit(lambda p, t: transformer.forward(p, config, t, **OPTIONS))(
    params, batch.tokens
  )
  logits, router = np.float64(logits), np.float64(outputs.router_logits)
  chosen, tokens, weights = map(np.asarray, (outputs.experts, batch.tokens, batch.weights))

  surprise = weight = 0.0
  for b in range(3):
    for t in range(1, 9):
      log_sum = np.log(np.exp(logits[b, t - 1]).sum())
      surprise += weights[b, t] * (log_sum - logits[b, t - 1, tokens[b, t]])
      weight += weights[b, t]
  assert parts["cross_entropy"] == pytest.approx(surprise / weight, rel=1e-5)

  real = [(b, t) for b in range(3) for t in range(9) if weights[b, t] > 0]
  balance, z, entropies = [], [], []
  for l in range(config.num_layers):
    count, mass, squared = np.zeros(config.num_experts), np.zeros(config.num_experts), 0.0
    for b, t in real:
      for e in chosen[l, b, t]:
        count[e] += 1
      odds = np.exp(router[l, b, t])
      mass += odds / odds.sum()
      squared += np.log(odds.sum()) ** 2
    share = count / count.sum()
    balance.append(config.num_experts * (share * mass / len(real)).sum())
    z.append(squared / len(real))
    entropies.append(-sum(f * np.log(f) for f in share if f) / np.log(config.num_experts))
  assert parts["balance_loss"] == pytest.approx(np.mean(balance), rel=1e-5)
  assert parts["z_loss"] == pytest.approx(np.mean(z), rel=1e-5)
  assert parts["load_entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
  assert total == pytest.approx(
    surprise / weight + 0.01 * np.mean(balance) + 0.001 * np.mean(z), rel=1e-5
  )


def test_balance_loss_is_one_when_balanced_and_e_when_collapsed():
  mask = jnp.ones((1, 4))
  loads = training.expert_loads(jnp.arange(4).reshape(1, 1, 4, 1), mask, 4)
  assert training.balance_loss(jnp.zeros((1, 1, 4, 4)), loads, mask) == pytest.approx(1.0)
  logits = jnp.zeros((1, 1, 4, 4)).at[..., 2].set(50.0)
  loads = training.expert_loads(jnp.full((1, 1, 4, 1), 2), mask, 4)
  assert training.balance_loss(logits, loads, mask) == pytest.approx(4.0)


def test_padding_has_no_influence(params, batch, loss):
  padding = batch.weights == 0
  other = batch.replace(tokens=jnp.where(padding, (batch.tokens + 7) % 61, batch.tokens))
  assert not np.array_equal(other.tokens, batch.tokens)
  expected, expected_parts = loss(params, batch)
  total, parts = loss(params, other)
  assert total == pytest.approx(float(expected), rel=1e-6)
  for name, value in expected_parts.items():
    assert parts[name] == pytest.approx(float(value), rel=1e-5), name


@pytest.fixture(scope="module")
def gradients(config, params, batch):
  """The loss's gradients by expert strategy."""
  compute = jax.jit(jax.grad(training.loss, has_aux=True), static_argnums=(2, 3))
  return {
    strategy: compute(params, batch, config, dataclasses.replace(SETTINGS, strategy=strategy))[0]
    for strategy in training.STRATEGIES
  }


@pytest.mark.slow
def test_gradients_reach_every_parameter(batch, gradients):
  used = np.unique(np.asarray(batch.tokens)[np.asarray(batch.weights) > 0])
  gradients = gradients["padded"]
  gradients = gradients.replace(embedding=gradients.embedding[used])
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.all(np.isfinite(gradient)), path
    assert np.all(np.any(gradient.reshape(gradient.shape[0], -1) != 0, axis=-1)), path


def test_strategies_have_equal_gradients(gradients):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    gradients["padded"],
    gradients["dense"],
  )


@pytest.fixture(scope="module")
def new_state(config):
  init = jax.jit(lambda key: training.init_state(config, SETTINGS, key))
  return lambda: init(jax.random.key(0))


def test_steps_lower_the_loss_and_count(config, batch, new_state):
  state, losses = new_state(), []
  for _ in range(40):
    state, metrics = training.train_step(state, batch, config=config, settings=SETTINGS)
    losses.append(float(metrics["cross_entropy"]))
  assert int(state.step) == 40
  assert losses[0] == pytest.approx(np.log(config.vocab_size), rel=0.1)
  assert losses[-1] < 0.2 * losses[0]
  assert metrics["learning_rate"] == pytest.approx(float(training.schedule(SETTINGS)(39)), rel=1e-5)


def test_a_step_consumes_its_state(config, batch, new_state):
  state = new_state()
  training.train_step(state, batch, config=config, settings=SETTINGS)
  assert state.params.embedding.is_deleted()


def test_learning_rate_rises_and_falls():
  rate = training.schedule(
    training.TrainSettings(
      num_steps=110, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1
    )
  )
  for step, expected in ((0, 0.0), (5, 0.5), (10, 1.0), (60, 0.55), (110, 0.1)):
    assert rate(step) == pytest.approx(expected, abs=1e-6)
  one_step = training.schedule(training.TrainSettings(num_steps=1, learning_rate=1.0))
  assert one_step(0) == 1.0


def test_all_but_norms_decay(config, params):
  settings = dataclasses.replace(SETTINGS, warmup_steps=0, weight_decay=0.5)
  optimizer = training.optimizer(config, settings)

  @jax.jit
  def update(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return optimizer.update(zeros, optimizer.init(params), params)[0]

  def check(spec, update, value):
    rate = 0.0 if spec.init == "ones" else settings.learning_rate * settings.weight_decay
    np.testing.assert_allclose(update, -rate * value, rtol=1e-5)

  jax.tree.map(check, params_lib.describe(config), update(params), params)


def test_noise_changes_routing_by_address(params, batch, loss):
  def cross_entropy(batch=batch, **changes):
    return float(loss(params, batch, **changes)[1]["cross_entropy"])

  plain = cross_entropy()
  noisy = cross_entropy(noise_temperature=1.0)
  assert cross_entropy(noise_temperature=0.0) == plain
  assert noisy != pytest.approx(plain, rel=1e-3)
  # The same texts in another order meet the same noise, under other ids another.
  turned = jax.tree.map(lambda a: a[::-1], batch)
  assert cross_entropy(turned, noise_temperature=1.0) == pytest.approx(noisy, rel=1e-5)
  renamed = batch.replace(ids=batch.ids + 3)
  assert cross_entropy(renamed, noise_temperature=1.0) != pytest.approx(noisy, rel=1e-4)


def test_the_number_of_experts_is_drawn_for_each_step(config, params, batch):
  settings = dataclasses.replace(SETTINGS, min_experts=1)
  compute = jax.jit(training.loss, static_argnums=(2, 3))
  counts = np.array([training.experts_of_step(config, settings, i)[0] for i in range(200)])
  shares = [np.mean(np.all(counts == pair, axis=1)) for pair in ((1, 1), (1, 2), (2, 1), (2, 2))]
  np.testing.assert_allclose(shares, 0.25, atol=0.12)  # four standard deviations
  for few in (1, 2):  # all layers with as many: a model with so many experts per token
    step = int(np.flatnonzero((counts == few).all(1))[0])
    found, parts = compute(params, batch, config, settings, step)
    own = config.replace(experts_per_token=few)
    expected, _ = compute(params, batch, own, SETTINGS, 0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
  alike = dataclasses.replace(settings, experts_drawn_by="batch")
  drawn = np.array([training.experts_of_step(config, alike, i)[0] for i in range(20)])
  assert (drawn[:, 0] == drawn[:, 1]).all() and set(drawn[:, 0]) == {1, 2}
  assert training.experts_of_step(config, SETTINGS, 0) is None
  with pytest.raises(ValueError, match="min_experts 3 exceeds the model's experts_per_token 2"):
    training.experts_of_step(config, dataclasses.replace(SETTINGS, min_experts=3), 0)


@pytest.mark.slow
def test_each_member_of_a_partition_has_its_own_loss(config, params, batch, loss):
  """As plain models that may not use the other parts' experts."""
  total, parts = loss(params, batch, members=2)
  compute = jax.jit(
    lambda p, t, bias: transformer.forward(p, config, t, router=RouterInputs(bias), **OPTIONS)
  )
  expected = []
  for member in (0, 1):
    part = np.arange(config.num_experts) * 2 // config.num_experts == member
    bias = np.broadcast_to(np.where(part, 0, -np.inf), (2, config.num_experts))
    logits, outputs = compute(params, batch.tokens, jnp.asarray(bias, jnp.float32))
    assert part[np.asarray(outputs.experts)].all()
    weights, mask = batch.weights[:, 1:], batch.weights > 0
    loads = training.expert_loads(outputs.experts, mask, config.num_experts)
    expected.append(
      [
        (weights * training.cross_entropy(logits, batch.tokens)).sum() / weights.sum(),
        training.balance_loss(outputs.router_logits, loads, mask) / 2,
        training.z_loss(outputs.router_logits, mask),
      ]
    )
  found = [parts[name] for name in ("cross_entropy", "balance_loss", "z_loss")]
  np.testing.assert_allclose(found, np.mean(expected, axis=0), rtol=1e-5)
  assert np.isfinite(total)


def test_groups_have_their_own_balance(config, params, batch, loss):
  _, outputs = jax.jit(lambda p, t: transformer.forward(p, config, t, **OPTIONS))(
    params, batch.tokens
  )
  rows = []
  for row in range(3):
    mask = batch.weights[row : row + 1] > 0
    loads = training.expert_loads(outputs.experts[:, row : row + 1], mask, config.num_experts)
    rows.append(training.balance_loss(outputs.router_logits[:, row : row + 1], loads, mask))
  _, parts = loss(params, batch, balance_groups=3)
  assert float(parts["balance_loss"]) == pytest.approx(np.mean(rows), rel=1e-5)
  with pytest.raises(ValueError, match="3 sequences cannot be split into 2 balance_groups"):
    loss(params, batch, balance_groups=2)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(members=0), "members must be at least 1"),
    (dict(min_experts=-1), "min_experts must not be negative"),
    (dict(experts_drawn_by="row"), "experts_drawn_by must be layer or batch"),
    (dict(num_steps=0), "num_steps must be at least 1, got 0"),
    (dict(warmup_steps=-1), "warmup_steps must not be negative"),
    (dict(noise_temperature=-0.1), "noise_temperature must not be negative"),
    (dict(strategy="blocks"), "'blocks' is not differentiable; choose one of padded"),
  ],
)
def test_settings_out_of_range(changes, message):
  with pytest.raises(ValueError, match=message):
    training.TrainSettings(**({"num_steps": 1} | changes))


def test_detaching_the_state_of_recurrent_routers_changes_gradients_only(batch):
  config = tiny.config("olmoe", num_layers=2, router="recurrent", router_state=6)
  params = tiny.params(config)
  values, gradients = {}, {}
  for detach in (False, True):
    settings = training.TrainSettings(num_steps=1, detach_router_state=detach)
    loss = lambda p: training.loss(p, batch, config, settings)[0]
    values[detach], gradients[detach] = jax.jit(jax.value_and_grad(loss))(params)
  assert values[True] == values[False]
  of_first, others = (
    [np.asarray(g.layers.router_projection[i]) for g in (gradients[False], gradients[True])]
    for i in (0, 1)
  )
  # Only the second layer's router comes after the first layer's state.
  assert np.abs(of_first[0] - of_first[1]).max() > 1e-3 * np.abs(of_first[0]).max()
  np.testing.assert_allclose(*others, rtol=1e-4, atol=1e-7)


def test_correction_biases_move_against_the_loads(batch):
  config = tiny.config("glm4_moe", num_layers=2)
  settings = training.TrainSettings(num_steps=9, learning_rate=0.0, bias_rate=0.05)
  state = training.init_state(config, settings, jax.random.key(0)).replace(
    params=tiny.params(config)
  )
  bias, entropies = np.array(state.params.layers.correction_bias), []
  _, outputs = transformer.forward(state.params, config, batch.tokens, keep=("experts",))
  chosen = np.asarray(outputs.experts[0])[np.asarray(batch.weights) > 0]
  counts = np.bincount(chosen.reshape(-1), minlength=config.num_experts)
  for step in range(9):
    state, metrics = training.train_step(state, batch, config=config, settings=settings)
    entropies.append(float(metrics["load_entropy"]))
    if step == 0:
      expected = bias[0] + 0.05 * np.sign(counts.mean() - counts)
      np.testing.assert_allclose(state.params.layers.correction_bias[0], expected, rtol=1e-6)
  assert entropies[-1] > entropies[0]


def test_initial_scales_of_deep_models():
  """Closed forms of arXiv 2504.07866: TinyInit, and gammas of the depth-scaled sandwich norm."""
  config = tiny.config(
    "olmoe", num_layers=4, d_model=64, vocab_size=512, sandwich_norm=True, tiny_init=True
  )
  params = params_lib.initialize(config, jax.random.key(0))
  layers, deviation = params.layers, (2 * 64 * 4) ** -0.5
  for matrix in (layers.attention.query, layers.attention.output, layers.experts.gate_up):
    assert np.std(matrix) == pytest.approx(deviation, rel=0.05)
  for matrix in (layers.experts.down, params.unembedding):
    assert np.std(matrix) == pytest.approx(deviation, rel=0.05)
  assert np.std(params.embedding) == pytest.approx(0.5, rel=0.05)
  np.testing.assert_allclose(layers.attention_output_norm, 0.283 / 2, rtol=1e-6)
  np.testing.assert_allclose(layers.moe_output_norm, 0.432 / 2, rtol=1e-6)
  np.testing.assert_array_equal(layers.moe_norm, 1)
  usual = params_lib.initialize(config.replace(tiny_init=False), jax.random.key(0))
  assert np.std(usual.embedding) == pytest.approx(config.initializer_range, rel=0.05)
  ratio = np.std(usual.layers.experts.down) / np.std(usual.layers.experts.gate_up)
  assert ratio == pytest.approx((2 * 4) ** -0.5, rel=0.05)
