"""The same tokens on all meshes: the embedded models' 200 problems, and what is said of others."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import programs
import pytest

from experiments import meshes
from roe_jax import diagnostics, members, transformer
from roe_jax import params as params_lib

pytestmark = pytest.mark.slow

SETTINGS = dict(num_members=2, tau=0.3, seed=0)


def test_problems_are_solved_alike_on_every_mesh():
  """Tokens, and log-probabilities to 1e-5, but for ties of tokens or of experts.

  `python -m experiments.meshes` does it for 200 problems, both models and more members.
  """
  results = meshes.measure(
    "embedded:wordmath_control",
    meshes.MESHES[:1] + meshes.MESHES[-2:],
    rounds=0,
    num_examples=16,
    max_new_tokens=32,
    **SETTINGS,
  )
  assert [found["devices"] for found in results.values()] == [1, 8, 8]
  _, *others = results.values()
  for found in others:
    comparison = found["comparison"]
    assert found["same"], comparison
    assert comparison["num_identical"] + len(comparison["parted"]) == 16
    assert comparison["num_tokens"] > 250
    assert len(comparison["parted"]) + len(comparison["outliers"]) <= 2
    # A mesh of eight moves something in a step, and holds less on a device.
    assert sum(m["count"] for m in found["collectives"].values())
    assert found["argument_bytes"] < results["data:1"]["argument_bytes"]
    json.dumps(found)


@pytest.fixture(scope="module")
def model():
  return meshes.open_model(
    "embedded:wordmath_control", "data:1", num_examples=2, max_new_tokens=12, **SETTINGS
  )


@pytest.fixture(scope="module")
def completions(model):
  return model.complete()


def altered(completion, place, token=None, change=0.0):
  log_probs = list(completion.log_probs)
  log_probs[place] += change
  tokens = list(completion.tokens)
  tokens[place] = tokens[place] if token is None else token
  return dataclasses.replace(completion, tokens=tokens, log_probs=log_probs)


def test_what_is_the_same_is_found_to_be(model, completions):
  found = meshes.compare_completions(model, completions, completions)
  assert found.is_same and found.difference == 0 and not found.parted
  assert found.num_tokens == sum(len(c.tokens) for c in completions)


def test_another_token_that_is_no_tie_is_reported_with_how_much_worse_it_is(model, completions):
  worse = completions[1].tokens[3] + 1
  found = meshes.compare_completions(
    model, completions, [completions[0], altered(completions[1], 3, worse)]
  )
  (tie,) = found.parted
  assert (tie.text, tie.place, tie.tokens) == (1, 3, (completions[1].tokens[3], worse))
  assert model.gap(1, completions[1].tokens[:3], tie.tokens[:1] * 2) == 0 < 0.1 < tie.gap
  assert not found.is_same and found.num_identical == 1
  assert found.num_tokens == len(completions[0].tokens) + 4


def test_another_log_probability_is_no_rounding_unless_experts_tie(model, completions, monkeypatch):
  other = [altered(completions[0], 5, change=3e-5), completions[1]]
  found = meshes.compare_completions(model, completions, other)
  (outlier,) = found.outliers
  assert (outlier.text, outlier.place) == (0, 5)
  assert outlier.difference == pytest.approx(3e-5, rel=0.1)
  assert outlier.margin > meshes.ROUTING_TOLERANCE and not found.is_same
  monkeypatch.setattr(meshes, "ROUTING_TOLERANCE", outlier.margin)
  assert found.is_same


def test_margins_are_distances_between_chosen_and_other_experts(model):
  """Of the clean member those of the plain model's logits; of the others those with noise."""
  text = model.prompts[0][:9]
  margins = diagnostics.routing_margins(model.params, model.config, model.roster, [text], [7])
  assert margins.shape == (4, 2, 1, 9)
  tokens, positions = jnp.asarray([text]), jnp.arange(9)[None]
  _, outputs = transformer.forward(
    params_lib.in_storage_dtype(model.params), model.config, tokens, keep=("router_logits",)
  )
  for member in range(2):  # in the first layer the members differ in their noise only
    noise = members.routing_noise(model.roster, jnp.asarray([7], jnp.uint32), positions, member)
    ranked = np.sort(noise.perturb(0, outputs.router_logits[0], 4)[0])[:, ::-1]
    np.testing.assert_allclose(margins[0, member, 0], ranked[:, 3] - ranked[:, 4], atol=1e-5)
  ranked = np.sort(outputs.router_logits[:, 0])[..., ::-1]
  np.testing.assert_allclose(margins[:, 0, 0], ranked[..., 3] - ranked[..., 4], atol=1e-5)


def test_the_program_writes_a_table_and_says_what_it_found(tmp_path):
  done = programs.call(
    "experiments.meshes",
    f"--output={tmp_path}",
    "--num_examples=4",
    "--checkpoints=embedded:wordmath_control",
    "--mesh=data:1",
    "--mesh=data:2,tensor:2",
    "--max_new_tokens=8",
    "--rounds=1",
    "--num_members=2",
  )
  assert done.returncode == 0, done.errors
  assert "Equal to data:1 on all meshes" in done.output
  found = json.loads((tmp_path / "results.json").read_text())["models"]["embedded:wordmath_control"]
  assert found["data:2,tensor:2"]["comparison"]["num_identical"] == 4
  assert len(found["data:1"]["seconds"]) == 3
  table = (tmp_path / "table.md").read_text()
  assert table.count("\n| data:") == 2
