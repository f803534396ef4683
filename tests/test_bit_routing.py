"""Bit routers: against the definition, one token and expert at a time; gradients; and training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_roster
import tiny

from experiments.training import bit_router_training
from roe_jax import bit_routing, checkpoint, experts, quantization, sharding, transformer
from roe_jax import params as params_lib
from roe_jax.roster import Roster


@pytest.fixture(scope="module")
def model():
  config = tiny.config("olmoe")
  params, config = params_lib.quantize(tiny.params(config), config, "nested:2-4")
  params, config = bit_routing.add(params, config, jax.random.key(0))
  return config, params


def test_members_read_experts_at_the_bits_of_the_routers(model):
  config, params = model
  roster = Roster.create(config, 2, [0.0, 0.8, 0.4], seed=9)
  expected = test_roster.by_definition(model, roster)
  test_roster.assert_close(test_roster.logits(model, roster), expected)
  whole = test_roster.by_definition(
    (config.replace(bit_router=False), bit_router_training.with_routers(params, None)), roster
  )
  assert np.abs(whole - expected).max() > 0.05 * np.abs(whole).max()
  # Members with bits of their own do not ask the routers.
  own = roster.replace(member_bits=3)
  test_roster.assert_close(test_roster.logits(model, own), test_roster.by_definition(model, own))


def test_bits_depend_on_no_other_token_and_are_the_same_on_a_mesh(model):
  config, params = model
  tokens = jnp.asarray(tiny.texts([8, 8, 8, 8]))
  run = jax.jit(lambda params, tokens: transformer.forward(params, config, tokens, keep=("bits",)))
  logits, found = run(params, tokens)
  assert sorted(np.unique(found.bits)) == [2, 3, 4]
  alone = run(params, tokens[:1])[1].bits
  np.testing.assert_array_equal(alone, found.bits[:, :1])
  mesh = sharding.make_mesh(config, data=2, expert=4)
  placed = jax.device_put(params, sharding.parameter_shardings(mesh, config))
  on_mesh, others = run(placed, tokens)
  np.testing.assert_array_equal(others.bits, found.bits)
  test_roster.assert_close(on_mesh, logits)


def test_the_gradient_is_that_of_the_softmax_at_the_chosen_bits(model):
  config, params = model
  random = np.random.RandomState(0)
  x = jnp.asarray(random.standard_normal((5, config.d_model)), jnp.float32)
  indices = jnp.asarray([random.permutation(config.num_experts)[:2] for _ in range(5)])
  gates = jnp.asarray(random.random((5, 2)), jnp.float32)
  weights = jnp.asarray(random.standard_normal((5, config.d_model)), jnp.float32)

  def compute(of, indices_NxA, gates_NxA):
    return experts.apply(of, 1, x, indices_NxA, gates_NxA, "dense")

  def run(routers, trains):
    layers = params.layers.replace(bit_router=routers)
    y, bits = bit_routing.apply(layers, 1, x, indices, gates, compute, trains)
    return (weights * y).sum() + bits.sum(), y

  routers = params.layers.bit_router
  _, hard = jax.jit(run, static_argnums=1)(routers, False)
  gradient, soft = jax.jit(jax.grad(run, has_aux=True), static_argnums=1)(routers, True)
  np.testing.assert_allclose(soft, hard, rtol=1e-5, atol=1e-5)

  def by_pair(routers):
    """The sum over pairs of p_w (w + <weights, gate y_w>), whose gradient it is."""
    logits = jnp.einsum("nd,nawd->naw", x, routers[1][indices])
    total = 0.0
    for i, bits in enumerate((2, 3, 4)):
      of = quantization.at_bits(params.layers.experts, bits)
      for a in range(2):
        y = compute(of, indices[:, a : a + 1], gates[:, a : a + 1])
        value = jax.lax.stop_gradient((weights * y).sum(-1)) + bits
        total += (jax.nn.softmax(logits)[:, a, i] * value).sum()
    return total

  np.testing.assert_allclose(gradient, jax.jit(jax.grad(by_pair))(routers), rtol=1e-3, atol=1e-4)


def test_training_moves_the_mean_bits_and_lowers_the_divergence(model):
  config, params = model
  settings = bit_router_training.Settings(3.5, steps=12, learning_rate=0.03)
  tokens = jnp.asarray(tiny.texts([12, 12]))
  state, used = bit_router_training.start(params, settings), jnp.ones(tokens.shape, bool)
  found = []
  for _ in range(settings.steps):
    state, values = bit_router_training.train_step(
      state, params, tokens, used, config=config, settings=settings
    )
    found.append(jax.tree.map(float, values))
  assert abs(found[-1]["bits"] - 3.5) < 0.5 * abs(found[0]["bits"] - 3.5)
  assert found[-1]["kl"] < 0.7 * found[0]["kl"]


@pytest.mark.filterwarnings("ignore:the checkpoint")
def test_a_checkpoint_keeps_the_routers(model, tmp_path):
  config, params = model
  checkpoint.save(tmp_path / "routed", params, config)
  loaded, own = checkpoint.load(tmp_path / "routed")
  assert own == config
  np.testing.assert_array_equal(loaded.layers.bit_router, params.layers.bit_router)
  with pytest.raises(ValueError, match="only experts in a nested format"):
    bit_routing.add(tiny.params(tiny.config("olmoe")), tiny.config("olmoe"), jax.random.key(0))
