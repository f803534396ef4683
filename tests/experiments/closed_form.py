"""A search over temperatures whose optimum is known; as a program, one of its workers.

    python closed_form.py FOLDER NUM_TRIALS SECONDS

prints the temperatures of each trial that it makes. A trial takes 4 * SECONDS.
"""

import json
import pathlib
import sys
import time

import numpy as np

from experiments.records.cost import Cost
from experiments.tuning.trials import Search, Space

SPACE = Space(num_layers=4, fixed_layers=1, max_tau=0.5)
OPTIMUM = (0.4, 0.1)  # of layers 1 and 2
NUM_EXAMPLES = 40
BATCHES = [slice(i, i + 10) for i in range(0, NUM_EXAMPLES, 10)]


class Quadratic:
  """Examples whose numbers are their own level, the squared distance to the optimum, and noise.

  The noise grows with τ, differs from example to example, and is zero in the mean.

  Attributes:
    calls: (temperatures, examples) of each measurement.
  """

  name = "loss"

  def __init__(
    self, maximize=False, noise=0.02, seconds=0.0, optimum=OPTIMUM, examples=NUM_EXAMPLES
  ):
    rng = np.random.default_rng(0)
    self.maximize, self._seconds, self._optimum = maximize, seconds, np.array(optimum)
    self._levels = rng.normal(size=examples)
    slopes = rng.normal(size=examples)
    self._slopes = noise * (slopes - slopes.mean())
    self.calls = []

  def measure(self, temperatures, part):
    time.sleep(self._seconds)
    self.calls.append((tuple(temperatures), part))
    values = (self._levels + self.exact(temperatures) + self._slopes * sum(temperatures))[part]
    return (-values if self.maximize else values), Cost(len(values), 2 * len(values))

  def exact(self, temperatures):
    return float(((np.array(temperatures)[1:-1] - self._optimum) ** 2).sum())

  def value(self, values):
    return float(values.mean())


class Telling(Quadratic):
  """Prints each trial's temperatures when it begins."""

  def measure(self, temperatures, part):
    if part.start == 0:
      print(json.dumps(list(temperatures)), flush=True)
    return super().measure(temperatures, part)


def main(folder, num_trials, seconds):
  search = Search(pathlib.Path(folder), SPACE, int(num_trials), maximize=False)
  search.run(Telling(seconds=float(seconds)), BATCHES, prune=False)


if __name__ == "__main__":
  main(*sys.argv[1:])
