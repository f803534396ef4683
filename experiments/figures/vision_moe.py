"""What a roster is worth in classification: a small V-MoE, trained plain, with noise, and as E3.

    python -m experiments.reproduce --figure=vision_moe

Digits of scikit-learn on a larger canvas ("digits"), and with shifts by a pixel and noise
("noisy"); also networks trained on digits and tested on digits with noise ("shift"). The noise is
the strongest of 0.05, 0.1, 0.2, 0.3 and 0.4 at which the plain network of seed 0 is right on at
least 60 % of validation items, in both conditions.

Networks are trained with several seeds; the two separate networks are those of a seed and of the
next one. τ of a roster is the one of `temperatures` with the lowest NLL on validation items, which
output temperatures are fitted on, too: items of the kind that the network was trained on. All
systems are given with their own fitted output temperature, and compared with the plain network
with its own.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.analysis import (
  calibration_error,
  drawing,
  output_temperatures,
  paired_statistics,
  report_page,
)
from experiments.benchmarks import timing
from experiments.figures import compared
from experiments.figures.figure_run import FigureRun, Measurements
from experiments.vision import network_training, routed_network, sample_digits
from experiments.vision.patch_transformer import Loss, PatchTransformer, partition_roster
from roe_jax.aggregation import MEAN_PROBABILITY
from roe_jax.roster import Roster

TITLE = "A vision Mixture of Experts: rosters, E3 and separate networks"
BACKGROUND = (
  "The paper's future work asks for hyper-parallel scaling outside language models. E3 (arXiv "
  "2110.03360) trains members on parts of the experts, and reports better calibration than a V-MoE."
)
NEEDS = ("sklearn",)
BASELINE = "plain"
# What is trained and tested on, by condition.
CONDITIONS = {
  "digits": ("digits", "digits"),
  "noisy": ("noisy", "noisy"),
  "shift": ("digits", "unshifted"),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    num_seeds: trainings of each network; noise has the seed of the training.
    num_steps, batch_size, learning_rate, weight_decay: of training.
    parts: M, members of E3; each chooses half of the plain network's experts per token for M = 2.
    train_tau: τ of the network that is trained with noise.
    num_members: n of rosters of random noise.
    temperatures: candidates for τ.
    shift: most pixels that noisy digits are shifted along each axis.
    noise: standard deviation of the noise on noisy digits, shifted or not.
  """

  num_seeds: int = 3
  num_steps: int = 600
  batch_size: int = 32
  learning_rate: float = 3e-3
  weight_decay: float = 0.05
  parts: int = 2
  train_tau: float = 0.5
  num_members: int = 8
  temperatures: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
  shift: int = 1
  noise: float = 0.1


CONFIGS = {"vision": Config()}
PLAIN, NOISE, E3 = BASELINE, "with router noise", "E3"


def _setups(config: Config) -> dict[str, tuple[PatchTransformer, Loss]]:
  """Returns networks and losses by how they are trained."""
  network = PatchTransformer()
  of_member = dataclasses.replace(
    network, experts_per_token=max(1, network.experts_per_token // config.parts)
  )
  return {
    PLAIN: (network, Loss()),
    NOISE: (network, Loss(tau=config.train_tau)),
    E3: (of_member, Loss(parts=config.parts)),
  }


def _draw(config: Config, data: str) -> Callable[[np.random.Generator], Any]:
  """Returns a function that draws a batch of images, labels and noise addresses."""
  digits = sample_digits.load("train")

  def draw(rng):
    chosen = rng.integers(len(digits), size=config.batch_size)
    images = _on_canvas(config, data, digits.images[chosen], rng)
    return images, digits.labels[chosen], rng.integers(2**32, size=len(chosen), dtype=np.uint32)

  return draw


def _on_canvas(config, data, images, rng):
  shift = config.shift if data == "noisy" else 0
  noise = 0.0 if data == "digits" else config.noise
  return sample_digits.on_canvas(images, rng, shift, noise)


@functools.cache
def _items(config: Config, data: str, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns images, labels and addresses of validation or test items, with fixed noise."""
  digits = sample_digits.load(split)
  images = _on_canvas(config, data, digits.images, np.random.default_rng(1))
  return images, digits.labels, routed_network.image_ids(images)


@dataclasses.dataclass(frozen=True)
class System:
  """Something that predicts digits.

  Attributes:
    trained: how its networks are trained.
    predict: `(networks, images, ids, tau, seed) -> log-probabilities [B, V]`, where networks are
      (network, parameters) of as many seeds as it needs.
    has_tau: whether τ is chosen.
    networks: number of networks.
  """

  trained: str
  predict: Callable[..., jax.Array]
  has_tau: bool = False
  networks: int = 1


def _alone(networks, images, ids, tau, seed):
  del ids, tau, seed
  outputs = [routed_network.outputs_of(n, params, jnp.asarray(images)) for n, params in networks]
  return MEAN_PROBABILITY(jnp.stack(outputs))


def _roster(config, networks, images, ids, tau, seed):
  ((network, params),) = networks
  roster = Roster.create(network.routing, config.num_members, tau, seed=seed)
  return routed_network.predict(network, params, images, roster, ids)


def _partition(config, networks, images, ids, tau, seed):
  ((network, params),) = networks
  n = config.num_members if tau else config.parts
  roster = partition_roster(network, config.parts, n, tau or 0.0, seed)
  return routed_network.predict(network, params, images, roster, ids)


def _systems(config: Config) -> dict[str, System]:
  roster, parts = (functools.partial(f, config) for f in (_roster, _partition))
  n, m = config.num_members, config.parts
  return {
    BASELINE: System(PLAIN, _alone),
    f"plain, roster of {n}": System(PLAIN, roster, has_tau=True),
    f"plain, {m} parts of its experts": System(PLAIN, parts),
    "two separate networks": System(PLAIN, _alone, networks=2),
    "noise-trained": System(NOISE, _alone),
    f"noise-trained, roster of {n}": System(NOISE, roster, has_tau=True),
    f"E3, {m} members": System(E3, parts),
    f"E3, {n} members with noise": System(E3, parts, has_tau=True),
  }


def _train(run: FigureRun, data: str, trained: str, seed: int) -> tuple[PatchTransformer, Any]:
  config: Config = run.config
  network, loss = _setups(config)[trained]
  schedule = network_training.Schedule(
    config.num_steps, config.batch_size, config.learning_rate, config.weight_decay, seed
  )
  name = f"{data}_{trained.replace(' ', '_')}_{seed}"
  folder = run.folder / "networks" / name
  return network, network_training.trained(folder, network, loss, _draw(config, data), schedule)


class _Networks:
  """Trained networks, each read once."""

  def __init__(self, run: FigureRun):
    self._run, self._known = run, {}

  def get(self, data: str, system: System, seed: int) -> list[tuple[PatchTransformer, Any]]:
    run = self._run
    seeds = [
      run.seeds[(run.seeds.index(seed) + i) % len(run.seeds)] for i in range(system.networks)
    ]
    for s in seeds:
      key = data, system.trained, s
      if key not in self._known:
        self._known[key] = _train(self._run, *key)
    return [self._known[data, system.trained, s] for s in seeds]


def _nll(log_probs: np.ndarray, labels: np.ndarray, temperatures: np.ndarray) -> np.ndarray:
  """Returns `[X, G]` nats at each output temperature."""
  scaled = jax.nn.log_softmax(log_probs[:, None] / np.array(temperatures)[:, None])
  return -np.asarray(jnp.take_along_axis(scaled, labels[:, None, None], axis=-1))[..., 0]


def _predict(run, networks, condition, system, seed, tau, split):
  config = run.config
  trained_on, tested_on = CONDITIONS[condition]
  # What a network is used on may differ from what its settings were chosen on.
  images, labels, ids = _items(config, trained_on if split == "validation" else tested_on, split)
  log_probs = system.predict(networks.get(trained_on, system, seed), images, ids, tau, seed)
  return np.asarray(jax.nn.log_softmax(log_probs)), labels


def _measure(run, keep: Measurements, networks: _Networks, condition: str, name: str) -> list[dict]:
  """Returns, for each seed, "tau", "temperature", and of test items "nll", "fitted_nll", "right",
  "confidence" and "fitted_confidence"."""
  config: Config = run.config
  system = _systems(config)[name]

  def of_seed(seed):
    on_validation = {}
    for tau in config.temperatures if system.has_tau else (None,):
      log_probs, labels = _predict(run, networks, condition, system, seed, tau, "validation")
      on_validation[tau] = _nll(log_probs, labels, output_temperatures.GRID)
    one = len(output_temperatures.GRID) // 2  # T = 1
    tau = min(on_validation, key=lambda t: on_validation[t][:, one].sum())
    temperature = output_temperatures.fit(on_validation[tau])
    log_probs, labels = _predict(run, networks, condition, system, seed, tau, "test")
    nll = _nll(log_probs, labels, np.array([1.0, temperature]))
    scaled = np.asarray(jax.nn.softmax(log_probs / temperature))
    return {
      "tau": tau,
      "temperature": temperature,
      "nll": nll[:, 0].round(6).tolist(),
      "fitted_nll": nll[:, 1].round(6).tolist(),
      "right": (log_probs.argmax(-1) == labels).tolist(),
      "confidence": np.exp(log_probs.max(-1)).round(6).tolist(),
      "fitted_confidence": scaled.max(-1).round(6).tolist(),
    }

  return [keep.get(f"{condition}, {name}, seed {s}", lambda s=s: of_seed(s)) for s in run.seeds]


def _passes(run, networks) -> dict[str, float]:
  """Returns the time of each system to predict the test items, relative to the plain network's."""

  def call(system):
    tau = 1.0 if system.has_tau else None
    return lambda: _predict(run, networks, "digits", system, run.seeds[0], tau, "test")[0]

  systems = _systems(run.config)
  return timing.ratios({name: call(system) for name, system in systems.items()}, BASELINE)


def measure(run: FigureRun) -> list[dict[str, Any]]:
  config, keep, networks, found = run.config, run.measurements(), _Networks(run), []
  systems = _systems(config)
  for condition in CONDITIONS:
    measured = {name: _measure(run, keep, networks, condition, name) for name in systems}
    found += [
      _record(condition, name, of_seeds, measured[BASELINE]) for name, of_seeds in measured.items()
    ]
  passes = keep.get("passes", lambda: _passes(run, networks))
  found = [r | {"passes": passes[r["system"]]} for r in found]
  for name in ("accuracy_difference", "fitted_difference"):
    differences = paired_statistics.corrected([r[name] for r in found])
    found = [r | {name: d} for r, d in zip(found, differences)]
  return found


def _record(condition, name, of_seeds, of_baseline):
  """Returns the record of a system: means over seeds, compared item by item with the baseline."""
  ours, theirs = (
    {key: np.array([of[key] for of in seeds], float).T for key in ("nll", "fitted_nll", "right")}
    for seeds in (of_seeds, of_baseline)
  )
  events, fitted, baseline = (
    _events(seeds, key)
    for seeds, key in (
      (of_seeds, "confidence"),
      (of_seeds, "fitted_confidence"),
      (of_baseline, "fitted_confidence"),
    )
  )
  right, accuracy = ours["right"], None
  differences: dict[str, Any] = dict.fromkeys(("fitted_difference", "ece_difference"))
  if of_seeds is not of_baseline:
    test = paired_statistics.paired_test(right, theirs["right"])
    accuracy = paired_statistics.paired_accuracy(right, theirs["right"])
    accuracy = paired_statistics.tested(accuracy, test)
    differences = {
      "fitted_difference": paired_statistics.paired_mean(ours["fitted_nll"], theirs["fitted_nll"]),
      "ece_difference": _percent(calibration_error.paired_calibration_error(fitted, baseline)),
    }
  return {
    "condition": condition,
    "system": name,
    "items": len(right),
    "taus": [of["tau"] for of in of_seeds],
    "temperatures": [of["temperature"] for of in of_seeds],
    "accuracy": paired_statistics.accuracy(right),
    "accuracy_difference": accuracy,
    "nll": paired_statistics.mean(ours["nll"]),
    "fitted": paired_statistics.mean(ours["fitted_nll"]),
    "ece": _percent(calibration_error.expected_calibration_error(events)),
    "fitted_ece": _percent(calibration_error.expected_calibration_error(fitted)),
    **differences,
  }


def _events(of_seeds, key):
  """Returns the events of all seeds, those of an item as one example."""
  confidences = np.array([of[key] for of in of_seeds]).T
  right = np.array([of["right"] for of in of_seeds]).T
  return calibration_error.Events.of(confidences.tolist(), right.tolist(), len(of_seeds))


def _percent(estimate):
  return (
    estimate.scaled(100)
    if type(estimate) is paired_statistics.Estimate
    else (
      paired_statistics.Difference(100 * estimate.value, 100 * estimate.low, 100 * estimate.high)
    )
  )


def table(records: list[dict[str, Any]]) -> str:
  values = lambda name: lambda r: ", ".join(f"{v:.2g}" for v in r[name] if v is not None)
  columns = {
    "tested": "condition",
    "system": "system",
    "passes": lambda r: f"{r['passes']:.1f}",
    "τ": values("taus"),
    "accuracy (%)": lambda r: compared.cell(r["accuracy"], 1),
    "difference (points)": lambda r: compared.cell(r["accuracy_difference"], 2, True),
    "NLL, T = 1": lambda r: compared.cell(r["nll"], 3),
    "T": values("temperatures"),
    "NLL, fitted T": lambda r: compared.cell(r["fitted"], 3),
    "difference": lambda r: compared.cell(r["fitted_difference"], 4, True),
    "ECE, T = 1 (%)": lambda r: compared.cell(r["ece"], 2),
    "ECE, fitted T (%)": lambda r: compared.cell(r["fitted_ece"], 2),
    "difference in ECE (points)": lambda r: compared.cell(r["ece_difference"], 2, True),
  }
  return (
    f"{report_page.table_of(records, columns)}\n\n{records[0]['items']} test items; NLL in nats; "
    "means over trainings. T and τ of each training. Differences are from the plain network at its "
    "fitted T. Brackets: 95 % bootstrap intervals over items, differences paired by item; *: "
    "significant after Holm's correction over the table (accuracy and NLL). Passes: measured time "
    "relative to the plain network, which members share the blocks before the first router with."
  )


def findings(records: list[dict[str, Any]]) -> str:
  sentences = []
  for condition in compared.unique(records, "condition"):
    some = [r for r in records if r["condition"] == condition and r["accuracy_difference"]]
    parts = []
    for what, key, places, unit in (
      ("accuracy", "accuracy_difference", 2, " points"),
      ("NLL", "fitted_difference", 4, ""),
    ):
      significant = [
        f"{r['system']} {report_page.difference(r[key], places, unit)}"
        for r in some
        if r[key].is_significant
      ]
      parts.append(f"in {what} {'; '.join(significant) or 'none'}")
    sentences.append(
      f"{condition}: significant differences from the plain network at fitted output temperatures: "
      f"{', and '.join(parts)}."
    )
  return " ".join(sentences)


def draw(records: list[dict[str, Any]]):
  """Draws differences in accuracy, NLL and ECE from the plain network at its fitted T."""
  figure, axes = drawing.axes(3, width=4.0, height=3.6)
  conditions = compared.unique(records, "condition")
  names = [s for s in compared.unique(records, "system") if s != BASELINE]
  of = {(r["condition"], r["system"]): r for r in records}
  panels = {
    "accuracy_difference": "accuracy: difference (points)",
    "fitted_difference": "NLL at fitted T: difference (nats)",
    "ece_difference": "ECE at fitted T: difference (points)",
  }
  for axis, (key, label) in zip(axes[0], panels.items()):
    drawing.zero(axis)
    drawing.dots(axis, conditions, {n: [of[c, n][key] for c in conditions] for n in names})
    axis.set_ylabel(label)
  drawing.legend(figure, axes[0, 0], 3)
  return figure
