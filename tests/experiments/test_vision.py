"""Rosters of networks that are not language models."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import extras
from experiments.figures import vision_moe, vision_sr
from experiments.vision import (
  expected_gates,
  network_training,
  patch_transformer,
  routed_network,
  sample_digits,
  sample_pictures,
)
from experiments.vision import super_resolution as sr
from experiments.vision.expected_gates import MeanRoute
from experiments.vision.routed_network import MEAN_VALUE, MemberRoute
from roe_jax import routing
from roe_jax.roster import Roster


@functools.cache
def small(selector):
  network = sr.SuperResolution(2, selector, width=4, window=2)
  image = sample_pictures.procedural(0, 80)[:, :8]
  params = jax.jit(network.init)(jax.random.key(0), image[None])
  # Else the skip connection would hide the features.
  return (
    network,
    jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(1), p.shape), params),
    image,
  )


def roster_of(network, n, tau, **settings):
  gates = getattr(network, "gate_weights", routing.CLEAN)
  return Roster.create(network.routing, n, tau, gate_weights=gates, **settings)


@functools.cache
def transformer():
  network = patch_transformer.PatchTransformer(width=8, heads=2, hidden=8, num_experts=4)
  digits = np.random.default_rng(0).uniform(size=(3, 8, 8))
  images = sample_digits.on_canvas(digits, np.random.default_rng(0), shift=2, noise=0.3)
  return network, jax.jit(network.init)(jax.random.key(0), images), images


def test_members_without_noise_are_the_network_itself():
  network, params, image = small("top1")
  roster = roster_of(network, 2, 0.0, aggregation=MEAN_VALUE)
  clean = np.asarray(routed_network.outputs_of(network, params, image[None]))
  np.testing.assert_array_equal(routed_network.predict(network, params, image[None], roster), clean)
  noisy = roster_of(network, 2, 1.0, aggregation=MEAN_VALUE)
  (members,) = routed_network.member_outputs(network, params, image[None], noisy)
  np.testing.assert_array_equal(members[0], clean)
  assert np.abs(members[1] - clean).max() > 1e-3
  mean = routed_network.predict(network, params, image[None], noisy)
  np.testing.assert_allclose(mean, np.mean(members, 0), atol=1e-6)


def test_the_gates_of_members_have_the_mean_that_is_computed():
  logits = jnp.array([0.3, -0.4, 1.1]).reshape(1, 1, 1, 3)
  tau, count = 0.7, 6000
  for chosen, weights in ((1, "clean"), (2, "clean"), (3, "noisy")):
    config = routed_network.routing_config(1, 3, chosen, normalize_gates=True)
    roster = Roster.create(config, 2, tau, gate_weights=weights)

    @jax.vmap
    def member(index):
      where = jnp.zeros(1, jnp.uint32), jnp.zeros((1, 2), jnp.int32)
      route = MemberRoute(roster, *where, index, config)
      return routed_network.dense_gates(*route(0, logits), 3)[0, 0, 0]

    drawn = np.asarray(member(jnp.arange(1, count + 1)))
    experts, mean = MeanRoute(tau, config, weights)(0, logits)
    assert experts.ravel().tolist() == [0, 1, 2]
    error = drawn.std(0) / np.sqrt(count)
    np.testing.assert_array_less(np.abs(drawn.mean(0) - mean[0, 0, 0]), 4 * error + 1e-3)
    if chosen == 1:  # Gumbel-max
      np.testing.assert_allclose(mean, jax.nn.softmax(logits / tau), rtol=1e-5)
  some = routed_network.routing_config(1, 3, 2, normalize_gates=True)
  with pytest.raises(ValueError, match="only if all experts are chosen"):
    MeanRoute(tau, some, "noisy")(0, logits)


def test_ordered_choices_have_the_probabilities_of_draws_without_replacement():
  scaled = np.log([0.5, 0.3, 0.2])
  of = {
    order: float(expected_gates.order_probability(jnp.asarray(scaled), order))
    for order in itertools.permutations(range(3), 2)
  }
  assert of[0, 1] == pytest.approx(0.5 * 0.3 / 0.5) and of[2, 0] == pytest.approx(0.2 * 0.5 / 0.8)
  assert sum(of.values()) == pytest.approx(1)


def test_the_soft_selector_is_that_of_a_torch_module():
  torch = pytest.importorskip("torch")
  rng, width = np.random.default_rng(0), 4
  stages = [rng.normal(size=(2, 3, 5, width)).astype(np.float32) for _ in range(3)]
  network = sr.SuperResolution(2, "soft", width=width)
  selector, route = sr.Selector(network.routing), routed_network.CleanRoute(network.routing)
  params = selector.init(jax.random.key(0), stages, route)
  convolutions = {}
  for name, p in params["params"].items():
    convolution = convolutions[name] = torch.nn.Conv2d(width, width, 1)
    convolution.weight.data = torch.tensor(np.array(p["kernel"].T))[..., None, None]
    convolution.bias.data = torch.tensor(np.array(p["bias"]))
  e = [torch.tensor(s).movedim(-1, 1) for s in stages]
  logits = torch.stack([convolutions[f"gate_{j}"](x) for j, x in enumerate(e)])
  mixed = (torch.softmax(logits, 0) * torch.stack(e)).sum(0)
  wanted = (convolutions["fuse"](mixed) + mixed).movedim(1, -1).detach().numpy()
  np.testing.assert_allclose(selector.apply(params, stages, route), wanted, atol=1e-5)


def test_a_hard_selector_takes_the_best_stages_and_its_router_learns():
  network = sr.SuperResolution(2, "top1", width=2)
  selector, route = sr.Selector(network.routing), routed_network.CleanRoute(network.routing)
  stages = [jnp.full((1, 1, 1, 2), value) for value in (1.0, 2.0, 3.0)]
  params = selector.init(jax.random.key(0), stages, route)
  params["params"]["fuse"] = jax.tree.map(jnp.zeros_like, params["params"]["fuse"])
  params["params"]["gate_1"]["bias"] += 50.0
  gate_1 = params["params"]["gate_1"]
  of = jax.jit(lambda p: selector.apply(p, stages, route))
  np.testing.assert_array_equal(of(params), stages[1])
  # The channels of a pixel share its noise: those with equal logits have equal members.
  params["params"] |= {f"gate_{i}": jax.tree.map(jnp.zeros_like, gate_1) for i in range(3)}
  pixels = [jnp.full((1, 6, 6, 2), value) for value in (1.0, 2.0, 3.0)]
  roster, ids = roster_of(network, 2, 1.0), jnp.zeros(1, jnp.uint32)
  member = MemberRoute(roster, ids, jnp.zeros((1, 2), jnp.int32), jnp.int32(1), network.routing)
  chosen = np.asarray(selector.apply(params, pixels, member))
  np.testing.assert_array_equal(chosen[..., 0], chosen[..., 1])
  assert set(chosen.ravel()) == {1.0, 2.0, 3.0}
  params["params"]["gate_1"] = gate_1 | {"bias": gate_1["bias"] - 49.5}
  assert (
    float(jnp.abs(jax.grad(lambda p: of(p).sum())(params)["params"]["gate_1"]["bias"]).max()) > 0
  )


def test_noise_belongs_to_a_place_of_an_image_whatever_the_batch_or_tile():
  config = routed_network.routing_config(2, 3, 1)
  roster = Roster.create(config, 2, 1.0, seed=3)
  ids, member = jnp.array([7, 8, 9], jnp.uint32), jnp.int32(1)
  zeros = jnp.zeros((3, 2), jnp.int32)
  whole = MemberRoute(roster, ids, zeros, member, config).perturb(1, jnp.zeros((3, 6, 5, 3)))
  tile = MemberRoute(roster, ids[1:2], jnp.array([[2, 1]]), member, config)
  found = tile.perturb(1, jnp.zeros((1, 3, 4, 3)))
  np.testing.assert_array_equal(found, whole[1:2, 2:5, 1:5])
  assert len(np.unique(whole)) == whole.size, "two addresses share noise"
  other = MemberRoute(roster, ids, zeros, member, config).perturb(0, jnp.zeros((3, 6, 5, 3)))
  assert not np.isin(other, whole).any()


def test_an_image_in_tiles_is_enlarged_as_at_once():
  network, params, image = small("top1")
  roster = roster_of(network, 2, 1.0, aggregation=MEAN_VALUE)
  image = image[:78, :7]  # padded to multiples of the unit
  at_once = sr.upscale(network, params, image, roster)
  assert at_once.shape == (156, 14) and network.margin == 32
  np.testing.assert_allclose(sr.upscale(network, params, image, roster, tile=8), at_once, atol=1e-5)
  with pytest.raises(ValueError, match="tile must be a positive multiple of 4 pixels, got 6"):
    sr.upscale(network, params, image, roster, tile=6)


def test_predictions_do_not_depend_on_the_batch():
  network, params, images = transformer()
  roster = roster_of(network, 3, 0.5)
  together = routed_network.predict(network, params, images, roster)
  np.testing.assert_allclose(jnp.exp(together).sum(-1), 1, rtol=1e-5)
  alone = routed_network.predict(network, params, images[1:2], roster)
  np.testing.assert_allclose(together[1:2], alone, atol=1e-5)
  wrong = Roster.create(routed_network.routing_config(3, 4, 2), 2, 0.5)
  with pytest.raises(ValueError, match="temperatures for 3 layers and the model has 2"):
    routed_network.predict(network, params, images, wrong)


def test_members_of_e3_have_their_own_experts_and_each_a_loss():
  network, params, images = transformer()
  network = dataclasses.replace(network, experts_per_token=1)
  labels, ids = np.array([3, 1, 4], np.int32), np.arange(3, dtype=np.uint32)
  roster = patch_transformer.partition_roster(network, 2)
  (members,) = routed_network.member_outputs(network, params, images, roster, ids)
  assert len(members) == 2
  own = -np.take_along_axis(np.asarray(jax.nn.log_softmax(members)), labels[None, :, None], -1)
  loss_of = jax.jit(patch_transformer.Loss(parts=2), static_argnums=2)
  loss = loss_of(params, (images, labels, ids), network)
  # A balance loss of one or more per layer is added.
  assert 0 < float(loss) - own.mean() < 4 * patch_transformer.BALANCE

  @jax.jit
  def keep(params, member):
    route = MemberRoute(
      roster, jnp.asarray(ids), jnp.zeros((3, 2), jnp.int32), member, network.routing
    )
    return network.apply(params, images, route, mutable="intermediates")[1]

  for member, part in ((1, (0, 1)), (2, (2, 3))):
    kept = keep(params, jnp.int32(member))
    chosen = np.concatenate(
      [
        np.ravel(c)
        for c in jax.tree.leaves({k: v["chosen"] for k, v in kept["intermediates"].items()})
      ]
    )
    assert set(chosen) <= set(part)


def test_a_self_ensemble_averages_what_the_function_returns_for_turned_images():
  images = np.random.default_rng(0).uniform(size=(2, 3, 3)).astype(np.float32)
  np.testing.assert_allclose(sr.self_ensemble(lambda x: x, images), images, atol=1e-6)
  corner = lambda x: jnp.zeros_like(x).at[:, 0, 0].set(1.0)  # not equivariant
  found = sr.self_ensemble(corner, images)[0]
  np.testing.assert_allclose(found, np.array([[1, 0, 1], [0, 0, 0], [1, 0, 1]]) / 4, atol=1e-6)


class Line(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(1)(x)[..., 0]


def line_loss(params, batch, network):
  x, y = batch
  return ((network.apply(params, x) - y) ** 2).mean()


def test_a_trained_network_is_kept_and_another_is_refused(tmp_path):
  drawn = []

  def draw(rng):
    drawn.append(x := rng.normal(size=(8, 2)).astype(np.float32))
    return x, x @ np.float32([2, -1])

  schedule = network_training.Schedule(60, 8, 0.3)
  params = network_training.trained(tmp_path / "line", Line(), line_loss, draw, schedule)
  kernel = params["params"]["Dense_0"]["kernel"]
  np.testing.assert_allclose(kernel.ravel(), [2, -1], atol=0.1)
  steps = len(drawn)
  again = network_training.trained(tmp_path / "line", Line(), line_loss, draw, schedule)
  np.testing.assert_array_equal(again["params"]["Dense_0"]["kernel"], kernel)
  assert len(drawn) == steps + 1  # only the shape of a batch
  other = dataclasses.replace(schedule, seed=1)
  with pytest.raises(ValueError, match=r"another config \(it differs in schedule.seed\)"):
    network_training.trained(tmp_path / "line", Line(), line_loss, draw, other)


def test_a_record_of_classification_is_paired_with_the_baseline_at_its_fitted_temperature():
  rng = np.random.default_rng(0)

  def of_seed(lift):
    return {
      "tau": None,
      "temperature": 1.5,
      "nll": (1 + noise).tolist(),
      "fitted_nll": (0.5 + noise - lift).tolist(),
      "right": (np.arange(200) % 10 < 8).tolist(),
      "confidence": [0.9] * 200,
      "fitted_confidence": [0.8] * 200,
    }

  noise = rng.normal(size=200).round(3)
  baseline, better = [of_seed(0.0)] * 2, [of_seed(0.1)] * 2
  r = vision_moe._record("digits", "x", better, baseline)
  assert r["accuracy"].value == pytest.approx(80) and r["accuracy_difference"].value == 0
  assert r["fitted_difference"].value == pytest.approx(-0.1) and r["fitted_difference"].p < 0.001
  assert r["ece"].value == pytest.approx(10) and r["fitted_ece"].value == pytest.approx(0, abs=1e-6)
  plain = vision_moe._record("digits", "plain", baseline, baseline)
  assert plain["fitted_difference"] is plain["ece_difference"] is None


def test_gains_in_quality_are_paired_with_the_network_that_the_system_is_made_of():
  values = np.random.default_rng(0).uniform(20, 30, (2, 12, 2))  # seeds, images, metrics
  of = lambda gain: (values + gain).tolist()
  measured = {
    "none": {
      "tau": None,
      "validation": {},
      "passes": {"network": 1.0},
      "values": {"network": of(0)},
    },
    "top1": {
      "tau": 0.3,
      "validation": {},
      "passes": {"network": 1.0, "roster, n = 8": 2.0},
      "values": {"network": of(0.5), "roster, n = 8": of(0.75)},
    },
  }
  found = vision_sr._records(2, measured, values[0] - 3, np.arange(12) < 5)
  gains = [r["psnr_difference"].value if "psnr_difference" in r else None for r in found]
  assert gains[1] is None and gains[2:] == pytest.approx([0.5, 0.25])
  assert found[3]["psnr_difference"].p < 0.001 and found[3]["to"] == "network"


def test_an_optional_package_is_installed_by_its_extra():
  assert extras.install("skimage") == 'pip install "roe_jax[vision]"'
  assert extras.install("optuna") == 'pip install "roe_jax[experiments]"'
