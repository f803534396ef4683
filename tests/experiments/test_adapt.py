"""The threshold of an adaptive roster is the lowest that loses few enough tokens."""

import numpy as np
import programs
import pytest

from experiments import adapt, roster_speed
from roe_jax import load_config, temperature_profiles
from roe_jax.completion import Completion
from roe_jax.roster import Roster


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5])
def test_the_threshold_is_the_lowest_that_loses_few_enough(share):
  random = np.random.default_rng(1)
  top = random.random(1000).astype(np.float32)
  found = adapt.Tokens(top, random.random(1000) < 0.1 * (1 - top))
  at = adapt.threshold(found, share)
  allowed = share * 1000
  assert found.lost(at) <= allowed
  lower = [t for t in top if t < at]
  if lower:  # the next lower one loses too many
    assert found.lost(float(max(lower))) > allowed and found.unsure(at) == len(lower) / 1000
  else:
    assert at == 0 and found.changed.sum() <= allowed


def test_tokens_are_compared_up_to_the_first_that_differs():
  texts = [[[1, 2, 3], [4, 5]], [[1, 7, 3, 3], [4, 5, 6]]]
  expected, found = ([Completion(t, [], [], "length") for t in some] for some in texts)
  assert roster_speed.changed_tokens(expected, found) == (1, 4)


def test_times_are_compared_with_the_line_between_the_first_and_the_last_threshold():
  seconds = {"roster": (9.0, 1.0), "a": (2.0, 0.0), "b": (4.4, 0.25), "c": (10.0, 1.0)}
  scores = {name: dict(seconds=s, unsure=share) for name, (s, share) in seconds.items()}
  roster_speed.add_proportional(scores, ["a", "b", "c"])
  found = {name: s.get("of_proportional") for name, s in scores.items()}
  assert found == {"roster": None, "a": 1.0, "b": pytest.approx(1.1), "c": 1.0}
  assert "| b | 4.40 | 25.0 % | 1.10 |" in roster_speed.scoring_table(scores)


@pytest.mark.slow
def test_a_profile_says_where_members_run(tmp_path):
  model = "embedded:wordmath_control"
  flags = ["--num_members=3", "--tau=2", "--max_new_tokens=8", "--batch_size=4"]
  sizes = ["--num_examples=4", "--num_confirm=3", f"--output={tmp_path}"]
  programs.run("experiments.adapt", [f"--checkpoint={model}", *flags, *sizes], devices=1)
  roster = Roster.from_profile(tmp_path / "profile.json", load_config(model))
  assert roster.num_members == 3
  assert roster.unsure is None or roster.unsure.measure == "top_probability"


@pytest.mark.slow
def test_a_profile_has_one_temperature_in_units_of_the_routers(tmp_path):
  model, path = "embedded:wordmath_control", tmp_path / "margin.json"
  flags = ["--unit=margin", "--tau=0.5", "--num_examples=3", f"--output={path}"]
  programs.run("experiments.scale_tau", [f"--checkpoint={model}", *flags], devices=1)
  profile = temperature_profiles.read(path)
  assert profile.units["unit"] == "margin" and min(profile.units["scales"]) > 0
  np.testing.assert_allclose(profile.temperatures, 0.5 * np.array(profile.units["scales"]))
  roster = Roster.from_profile(path, load_config(model), num_members=2)
  np.testing.assert_allclose(roster.temperatures, profile.temperatures, rtol=1e-6)
