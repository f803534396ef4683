import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import sqlite3
import time

import closed_form
from closed_form import BATCHES, OPTIMUM, SPACE, Quadratic
import numpy as np
import programs
import pytest
import tiny

from experiments.tuning import trials
from experiments.tuning.trials import TRIALS, BetaSpace, Search, Space
from roe_jax.roster import Roster

pytestmark = pytest.mark.slow


def searched(folder, num_trials, prune=False, objective=None, space=SPACE, batches=BATCHES):
  objective = objective or Quadratic()
  search = Search(folder, space, num_trials, objective.maximize)
  search.run(objective, batches, prune)
  return search, objective


def start(tmp_path, name, num_trials, seconds):
  """A worker of the search in `tmp_path/study`."""
  arguments = [str(tmp_path / "study"), str(num_trials), str(seconds)]
  return programs.Run("closed_form", arguments, tmp_path / name)


def wait_for_trials(worker, path, count):
  """Until it has begun so many, and runs."""
  deadline = time.monotonic() + 60
  while not path.exists() or path.read_text().count("\n") < count:
    assert worker.process.is_alive() and time.monotonic() < deadline, worker.errors
    time.sleep(0.005)


def test_the_search_finds_the_optimum_of_a_closed_form(tmp_path):
  search, objective = searched(tmp_path, 40, objective=Quadratic(True))
  best, uniform = search.best(), search.best("sweep")
  np.testing.assert_allclose(best.temperatures[1:3], OPTIMUM, atol=0.05)
  # The best uniform τ is known, too, and by how much it is worse.
  assert uniform.temperatures[1] == pytest.approx(np.mean(OPTIMUM))
  assert abs(best.value - uniform.value) == pytest.approx(
    objective.exact(uniform.temperatures), abs=0.005
  )


def test_the_first_and_last_layers_stay_at_zero_and_the_others_within_bounds(tmp_path):
  space = Space(num_layers=7, fixed_layers=2, max_tau=0.3)
  search, _ = searched(tmp_path, 12, space=space, objective=Quadratic(optimum=(0.0,) * 5))
  temperatures = np.array([t.temperatures for t in search.trials()])
  assert temperatures.shape == (12, 7)
  assert np.all(temperatures[:, [0, 1, 5, 6]] == 0)
  free = temperatures[:, 2:5]
  assert np.all((free >= 0) & (free <= 0.3)) and len(np.unique(free[6:])) == 18
  assert space.noisy_layers == (2, 5)


def test_a_search_begins_with_the_sweep(tmp_path):
  search, _ = searched(tmp_path, 12)
  made = search.trials()
  assert [t.kind for t in made] == 10 * ["sweep"] + 2 * ["tpe"]
  steps = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5]
  assert [t.temperatures for t in made[:10]] == [[0, step, step, 0] for step in steps]


def test_a_sweep_is_the_objective_as_a_function_of_temperature(tmp_path):
  search, objective = searched(tmp_path, 10)
  assert len(search.trials()) == 10
  for trial in search.trials():
    expected = objective._levels.mean() + objective.exact(trial.temperatures)
    assert trial.value == pytest.approx(expected) and trial.state == "complete"


@pytest.mark.parametrize("limit,steps", [(0.12, [0.05, 0.1]), (0.03, [0.03]), (0.15, 3 * [None])])
def test_the_steps_of_a_sweep(limit, steps):
  found = Space(2, 0, limit).sweep()
  assert len(found) == len(steps) and found[-1] <= limit
  assert steps[0] is None or found == steps


def test_a_search_for_beta_finds_it_and_its_settings_make_the_contrast(tmp_path):
  class OfBeta(Quadratic):
    def measure(self, temperatures, part, aggregation):
      assert list(temperatures) == [0, 0.5, 0.5, 0]
      beta = float(re.fullmatch(r"contrast\(alpha=0.2,beta=(.*)\)", aggregation)[1])
      return self._levels[part] + (beta - 0.37) ** 2, closed_form.Cost()

  search, _ = searched(tmp_path, 30, objective=OfBeta(), space=BetaSpace(4, 1, 0.5, 0.2, 1.0))
  made = search.trials()
  assert [t.kind for t in made] == 20 * ["sweep"] + 10 * ["tpe"]
  assert made[0].settings == {"aggregation": "contrast(alpha=0.2,beta=0.05)"}
  config = dataclasses.replace(tiny.config("mixtral"), num_layers=4)
  roster = Roster.create(config, 2, search.best().temperatures, **search.best().settings)
  _, _, beta = roster.settings()["aggregation"].rpartition("beta=")
  assert float(beta[:-1]) == pytest.approx(0.37, abs=0.03)
  with pytest.raises(ValueError, match="max_beta must be finite and above 0"):
    BetaSpace(4, 1, 0.5, 0.2, 0.0)


def test_all_trials_are_written_with_what_they_cost(tmp_path):
  search, objective = searched(tmp_path, 11)
  lines = [json.loads(line) for line in (tmp_path / TRIALS).read_text().splitlines()]
  assert [line["number"] for line in lines] == list(range(11))
  for line in lines:
    assert line["examples"] == line["tokens"] == 40 and line["forward_passes"] == 80
    assert line["seconds"] >= 0 and line["state"] == "complete"
  assert len(objective.calls) == 4 * 11


def test_the_best_of_equal_trials_is_the_first(tmp_path):
  class Flat(Quadratic):
    def exact(self, temperatures):
      return 0.0

  search, _ = searched(tmp_path, 11, objective=Flat(noise=0.0))
  assert search.best().number == 0


def test_pruning_saves_work_and_keeps_the_winner(tmp_path):
  """The best uniform τ is 0.25; noise is as large as the differences between neighbors."""
  saved = []
  for i in range(3):
    objective = Quadratic(noise=0.1, examples=100)
    order = np.random.default_rng(i).permutation(100)
    objective._levels, objective._slopes = objective._levels[order], objective._slopes[order]
    search, _ = searched(
      tmp_path / str(i),
      10,
      prune=True,
      objective=objective,
      batches=[slice(j, j + 10) for j in range(0, 100, 10)],
    )
    assert search.best().temperatures[1] == 0.25
    states = {t.state for t in search.trials()}
    measured = sum(t.examples for t in search.trials())
    assert measured == sum(part.stop - part.start for _, part in objective.calls)
    saved.append(1 - measured / 1000)
    assert states <= {"complete", "pruned"} and search.num_finished == 10
  assert np.mean(saved) > 0.1


def test_a_pruned_trial_is_told_as_if_the_rest_differed_as_what_it_saw(tmp_path):
  # Without noise the estimate is exact, however much the examples' levels differ.
  search, objective = searched(tmp_path, 10, prune=True, objective=Quadratic(noise=0.0))
  pruned = [t for t in search.trials() if t.state == "pruned"]
  assert pruned
  for trial in pruned:
    assert trial.examples < 40
    assert trial.value == pytest.approx(
      objective._levels.mean() + objective.exact(trial.temperatures)
    )
  assert search.best().temperatures[1] == 0.25


@pytest.mark.parametrize("maximize", [False, True])
def test_few_trials_that_are_no_worse_are_given_up_and_most_that_are(maximize):
  def share_given_up(worse):
    rng, given_up = np.random.default_rng(0), 0
    for _ in range(150):
      best = rng.normal(size=100)
      values = best + rng.normal(size=100) + (-worse if maximize else worse)
      given_up += any(
        trials.is_hopeless(values[:seen], best, maximize, 9) for seen in range(10, 100, 10)
      )
    return given_up / 150

  assert share_given_up(0.0) < trials.PRUNING_ERROR
  assert share_given_up(0.5) > 0.9
  assert share_given_up(-0.5) == 0


def test_a_trial_that_is_worse_in_most_examples_but_better_in_the_mean_is_kept():
  worse = np.full(40, 0.1)
  worse[0] = -10.0
  assert trials.is_hopeless(worse[1:], np.zeros(40), False, 1)
  assert not trials.is_hopeless(worse, np.zeros(40), False, 1)


def test_equally_right_examples_neither_keep_nor_end_a_trial():
  values, best = np.ones(60), np.ones(60)
  assert not trials.is_hopeless(values, best, True, 1)
  values[:15] = 0
  assert trials.is_hopeless(values, best, True, 1)


def test_a_killed_search_ends_as_one_that_was_not(tmp_path):
  """Killed in the middle of a trial, which is lost, and made again."""
  worker = start(tmp_path, "worker", 14, 0.05)
  wait_for_trials(worker, tmp_path / "worker" / "output", 12)
  worker.process.kill()
  assert worker.exit_code() == -signal.SIGKILL
  search = Search(tmp_path / "study", SPACE, 14, maximize=False)
  assert search.num_finished < 14
  lost = [t for t in search.trials() if t.state == "running"]
  assert len(lost) == 1
  search.run(Quadratic(), BATCHES, prune=False)
  made = search.trials()
  assert [t for t in made if t.state == "failed"] == [t for t in made if t.number == lost[0].number]
  whole, _ = searched(tmp_path / "whole", 14)
  # Same temperatures, same values, same best; only the lost one has another number.
  assert [(t.temperatures, t.value) for t in made if t.state == "complete"] == [
    (t.temperatures, t.value) for t in whole.trials()
  ]
  assert search.best().value == whole.best().value
  assert not list((tmp_path / "study" / "running").iterdir())


def test_a_finished_search_is_not_made_further(tmp_path):
  searched(tmp_path, 11)
  search, objective = searched(tmp_path, 11)
  assert not objective.calls and search.num_finished == 11


def test_two_workers_share_a_study_and_make_each_trial_once(tmp_path):
  workers = [start(tmp_path, name, 16, 0.03) for name in ("one", "other")]
  assert all(worker.exit_code(120) == 0 for worker in workers)
  made = [worker.output.splitlines() for worker in workers]
  assert all(made), "both took part"
  search = Search(tmp_path / "study", SPACE, 16, maximize=False)
  found = search.trials()
  assert len(found) == 16 and {t.state for t in found} == {"complete"}
  assert sorted(sum(made, [])) == sorted(json.dumps(t.temperatures) for t in found)
  assert len(set(sum(made, []))) == 16


def test_a_worker_makes_the_trial_that_another_lost_while_it_ran(tmp_path):
  lost = start(tmp_path, "lost", 12, 60)
  wait_for_trials(lost, tmp_path / "lost" / "output", 1)
  other = start(tmp_path, "other", 12, 0.05)
  wait_for_trials(other, tmp_path / "other" / "output", 1)
  lost.process.kill()
  assert lost.exit_code() == -signal.SIGKILL and other.exit_code(120) == 0
  states = [t.state for t in Search(tmp_path / "study", SPACE, 12, maximize=False).trials()]
  assert states.count("complete") == 12 and states.count("failed") == 1


def test_a_model_without_finite_values_is_an_error(tmp_path):
  class Broken(Quadratic):
    def measure(self, temperatures, part):
      return np.full(part.stop - part.start, np.nan), closed_form.Cost()

  with pytest.raises(ValueError, match=r"no finite loss at τ = \[0.0, 0.05"):
    searched(tmp_path, 11, objective=Broken())


@pytest.mark.parametrize(
  "space,message",
  [
    ((4, 2, 0.5), "give 0 to 1, got 2"),
    ((5, -1, 0.5), "0 to 2, got -1"),
    ((4, 0, 0.0), "above 0, got 0"),
    ((4, 0, float("nan")), "finite"),
    ((4, 0, -0.1), "above 0, got -0.1"),
  ],
)
def test_a_space_without_room_is_refused(space, message):
  with pytest.raises(ValueError, match=message):
    Space(*space)


def test_a_budget_below_the_sweep_is_refused(tmp_path):
  with pytest.raises(ValueError, match="at least 10, the steps of 0.05 up to 0.5"):
    Search(tmp_path, SPACE, 9, maximize=False)
  assert not list(pathlib.Path(tmp_path).iterdir())


def flip(path):
  data = bytearray(path.read_bytes())
  data[: len(data) // 2 : 97] = b"\xff" * len(data[: len(data) // 2 : 97])
  path.write_bytes(data)


def execute(command):
  def damage(path):
    with contextlib.closing(sqlite3.connect(path)) as database:
      database.execute(command)
      database.commit()

  return damage


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp("finished")
  searched(folder, 10)
  return folder


@pytest.mark.parametrize(
  "damage",
  [
    lambda path: path.write_bytes(b"no database" * 100),
    lambda path: os.truncate(path, path.stat().st_size // 2),
    flip,
    execute("UPDATE trial_user_attributes SET value_json = '{'"),
    execute("DELETE FROM trial_user_attributes"),
    execute("UPDATE trial_user_attributes SET value_json = '1' WHERE key = 'made'"),
  ],
)
def test_a_damaged_study_is_refused_in_a_sentence(finished, tmp_path, damage):
  shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
  damage(tmp_path / "study.db")
  with pytest.raises(ValueError, match="study.db is damaged .*: restore it, or delete") as error:
    Search(tmp_path, SPACE, 12, maximize=False)
  assert "\n" not in str(error.value)
