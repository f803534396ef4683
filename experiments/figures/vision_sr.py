"""What a roster is worth in super-resolution: an SSIU-like network whose selector mixes stages.

    python -m experiments.reproduce --figure=vision_sr

Networks without selector, and with a soft one, a hard one of one stage and of two, are trained with
several seeds on sample pictures of packages and on procedural ones, and tested on other pictures. τ
of each network is the one of `temperatures` with the highest PSNR on validation pictures. All are
compared with bicubic interpolation, with the closed-form mean gate of the roster, and with the mean
over flips and rotations of the input (geometric self-ensemble). Costs are measured times in passes
of the network without a roster.
"""

import base64
from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.analysis import drawing, paired_statistics, report_page
from experiments.benchmarks import timing
from experiments.cli.extras import skimage
from experiments.figures import compared
from experiments.figures.figure_run import FigureRun, Measurements
from experiments.vision import network_training, routed_network, sample_pictures
from experiments.vision import super_resolution as sr
from experiments.vision.expected_gates import MeanRoute
from experiments.vision.routed_network import MEAN_VALUE
from roe_jax.roster import Roster

TITLE = "Super-resolution with a selector of stages"
BACKGROUND = (
  "The paper's future work asks for hyper-parallel scaling outside language models. SSIU (arXiv "
  "2506.11823) mixes the stages of a network by a softmax for each pixel and channel."
)
NEEDS = ("skimage", "sklearn")
METRICS = ("psnr", "ssim")
BICUBIC, CLEAN, MEAN_GATE = "bicubic", "network", "mean gate"
SPLITS = ("train", "validation", "test")
BATCH = 4  # pictures at once


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    scales: enlargements.
    selectors: names in `super_resolution.SELECTORS`.
    num_seeds: trainings of each network; noise has the seed of the training.
    num_steps, batch_size, learning_rate: of training.
    patch: side of training patches before enlargement.
    size: side of the central part of test and validation pictures that is enlarged to.
    num_procedural: procedural pictures of each split: "train", "validation" and "test".
    members: n of the rosters; the first is that of the choice of τ.
    transforms: flips and rotations of self-ensembles.
    temperatures: candidates for τ.
    shown: names of test pictures to show.
  """

  scales: tuple[int, ...] = (2, 4)
  selectors: tuple[str, ...] = tuple(sr.SELECTORS)
  num_seeds: int = 3
  num_steps: int = 300
  batch_size: int = 8
  learning_rate: float = 3e-3
  patch: int = 16
  size: int = 96
  num_procedural: tuple[int, int, int] = (12, 5, 11)
  members: tuple[int, ...] = (8, 16)
  transforms: tuple[int, ...] = (4, 8)
  temperatures: tuple[float, ...] = (0.1, 0.3, 1.0)
  shown: tuple[str, ...] = ("chelsea", "china")


CONFIGS = {"vision": Config()}


@functools.cache
def _pictures(split: str, counts: tuple[int, ...], size: int | None) -> dict[str, np.ndarray]:
  """Returns natural and procedural pictures; if a size is given, their central squares."""
  found = sample_pictures.natural(split)
  if size:
    found = {name: sample_pictures.centered(picture, size) for name, picture in found.items()}
  which = SPLITS.index(split)
  drawn = {
    f"procedural {i}": sample_pictures.procedural(1000 * which + i, size or 256)
    for i in range(counts[which])
  }
  return found | drawn


def _loss(params, batch, network):
  low, high = batch
  return sr.loss(network.apply(params, low), high)


def _draw(config: Config, scale: int) -> Callable[[np.random.Generator], Any]:
  """Returns a function that draws a batch of patches, before and after enlargement."""
  pictures = list(_pictures("train", config.num_procedural, None).values())
  side = scale * config.patch

  def patch(rng):
    picture = pictures[rng.integers(len(pictures))]
    row, column = (rng.integers(length - side + 1) for length in picture.shape)
    part = np.rot90(picture[row : row + side, column : column + side], rng.integers(4))
    return part[:, ::-1] if rng.random() < 0.5 else part

  def draw(rng):
    high = np.stack([patch(rng) for _ in range(config.batch_size)])
    return np.asarray(_reduced(high, scale)), high

  return draw


@functools.partial(jax.jit, static_argnums=1)
def _reduced(high_BxHxW, scale):
  return sr.resize(high_BxHxW, 1 / scale)


def _metrics(found: np.ndarray, wanted: np.ndarray, scale: int) -> list[list[float]]:
  """Returns PSNR in dB and SSIM of each image `[B, H, W]`, without a border of `scale` pixels."""
  values = []
  for image, reference in zip(np.clip(found, 0, 1), wanted):
    pair = [np.float64(a[scale:-scale, scale:-scale]) for a in (reference, image)]
    psnr = skimage.metrics.peak_signal_noise_ratio(*pair, data_range=1)
    ssim: Any = skimage.metrics.structural_similarity(
      *pair, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    values.append([round(float(psnr), 5), round(float(ssim), 6)])
  return values


@dataclasses.dataclass(frozen=True)
class Trained:
  """A trained network on the pictures of a split.

  Attributes:
    network, params: the network.
    low, high: `[B, H, W]` pictures before enlargement, and as they should be.
    ids: `[B]` addresses of `low`.
  """

  network: sr.SuperResolution
  params: Any
  low: np.ndarray
  high: np.ndarray
  ids: np.ndarray

  @classmethod
  def on(cls, split: str, config: Config, network: sr.SuperResolution, params: Any) -> "Trained":
    high = np.stack(list(_pictures(split, config.num_procedural, config.size).values()))
    low = np.asarray(_reduced(high, network.scale))
    return cls(network, params, low, high, routed_network.image_ids(low))

  def _in_batches(self, function: Callable[[np.ndarray, np.ndarray], Any]) -> np.ndarray:
    """Returns the images of `function(low, ids)`, of batches of one shape in all splits."""
    parts = range(0, len(self.low), BATCH)
    found = [function(self.low[i : i + BATCH], self.ids[i : i + BATCH]) for i in parts]
    return np.concatenate([np.asarray(images) for images in found])

  def roster(self, n: int, tau: float, seed: int) -> np.ndarray:
    """Returns the mean images of a roster."""
    network = self.network
    settings: dict[str, Any] = dict(
      seed=seed, gate_weights=network.gate_weights, aggregation=MEAN_VALUE
    )
    roster = Roster.create(network.routing, n, tau, **settings)
    predict = functools.partial(routed_network.predict, members_at_once=4)
    return self._in_batches(lambda low, ids: predict(network, self.params, low, roster, ids))

  def systems(self, config: Config, tau: float | None, seed: int) -> dict[str, Callable[[], Any]]:
    """Returns functions that return the images of each system; without τ, those without noise."""
    network = self.network
    of = functools.partial(routed_network.outputs_of, network, self.params)
    found: dict[str, Callable[[], Any]] = {CLEAN: lambda: self._in_batches(lambda low, _: of(low))}
    if tau is not None:
      mean = MeanRoute(jnp.float32(tau), network.routing, network.gate_weights)
      found[MEAN_GATE] = lambda: self._in_batches(lambda low, _: of(low, mean))
      for n in config.members:
        found[f"roster, n = {n}"] = lambda n=n: self.roster(n, tau, seed)
    for count in config.transforms:
      ensemble = lambda low, _, count=count: sr.self_ensemble(of, low, count)
      found[f"self-ensemble, {count}"] = lambda e=ensemble: self._in_batches(e)
    return found

  def metrics(self, images: Any) -> list[list[float]]:
    return _metrics(np.asarray(images), self.high, self.network.scale)


def _train(run: FigureRun, network: sr.SuperResolution, seed: int) -> Any:
  config: Config = run.config
  schedule = network_training.Schedule(
    config.num_steps, config.batch_size, config.learning_rate, seed=seed
  )
  folder = run.folder / "networks" / f"x{network.scale}_{network.selector}_{seed}"
  return network_training.trained(folder, network, _loss, _draw(config, network.scale), schedule)


def _measure(run: FigureRun, keep: Measurements, network: sr.SuperResolution) -> dict[str, Any]:
  """Returns "tau", "passes" {system: cost} and "values" {system: [seeds][images][metrics]}."""
  config: Config = run.config
  name = f"x{network.scale}, {network.selector}"
  seeds, params = run.seeds, {}

  def on(split, seed):
    if seed not in params:
      params[seed] = _train(run, network, seed)
    return Trained.on(split, config, network, params[seed])

  def psnr(tau, seed):
    trained = on("validation", seed)
    images = trained.roster(config.members[0], tau, seed)
    return float(np.mean(np.array(trained.metrics(images))[:, 0]))

  tau, of_tau = None, {}
  for seed in seeds:  # before any choice, so that a killed run has trained in the same order
    keep.get(f"{name}, trained with seed {seed}", lambda seed=seed: bool(on("test", seed)))
  if network.selector != sr.NONE:
    of_tau = {
      t: keep.get(f"{name}, τ = {t:g}", lambda t=t: [psnr(t, seed) for seed in seeds])
      for t in config.temperatures
    }
    tau = max(of_tau, key=lambda t: np.mean(of_tau[t]))
  values: dict[str, list] = {}
  for seed in seeds:

    def measured(seed=seed):
      trained = on("test", seed)
      return {s: trained.metrics(f()) for s, f in trained.systems(config, tau, seed).items()}

    for system, found in keep.get(f"{name}, test, seed {seed}", measured).items():
      values.setdefault(system, []).append(found)

  def passes():
    trained = on("test", seeds[0])
    one_batch = dataclasses.replace(trained, low=trained.low[:BATCH])
    return timing.ratios(one_batch.systems(config, tau, seeds[0]), CLEAN)

  return {
    "tau": tau,
    "validation": {f"{t:g}": float(np.mean(v)) for t, v in of_tau.items()},
    "passes": keep.get(f"{name}, passes", passes),
    "values": values,
    "crops": keep.get(
      f"{name}, crops", lambda: _crops(on("test", seeds[0]), config, tau, seeds[0])
    ),
  }


def _crops(trained: Trained, config: Config, tau: float | None, seed: int) -> dict[str, Any]:
  """Returns the central quarters of the shown pictures by system, as bytes in base 64."""
  systems = trained.systems(config, tau, seed)
  wanted = [CLEAN, f"roster, n = {config.members[0]}", f"self-ensemble, {config.transforms[-1]}"]
  return {s: _encoded(np.asarray(systems[s]()), config) for s in wanted if s in systems}


def _encoded(images, config):
  names = list(_pictures("test", config.num_procedural, config.size))
  half = config.size // 2
  return {
    name: base64.b64encode(
      np.uint8(
        np.rint(255 * sample_pictures.centered(images[names.index(name)], half).clip(0, 1))
      ).tobytes()
    ).decode()
    for name in config.shown
  }


def measure(run: FigureRun) -> list[dict[str, Any]]:
  config, keep, found = run.config, run.measurements(), []
  pictures = _pictures("test", config.num_procedural, config.size)
  is_natural = np.array([not name.startswith("procedural") for name in pictures])
  for scale in config.scales:
    high = np.stack(list(pictures.values()))
    enlarged = np.asarray(sr.resize(_reduced(high, scale), scale))
    measured = {
      selector: _measure(run, keep, sr.SuperResolution(scale, selector))
      for selector in config.selectors
    }
    bicubic = np.array(_metrics(enlarged, high, scale))
    found += _records(scale, measured, bicubic, is_natural)
    crops = {"original": _encoded(high, config), BICUBIC: _encoded(enlarged, config)}
    for selector, m in measured.items():
      crops |= {f"{selector}, {system}": of for system, of in m["crops"].items()}
    side = config.size // 2
    found.append({"part": "crops", "scale": scale, "side": side, "crops": crops})
  differences = [f"{metric}_difference" for metric in METRICS]
  for name in differences:
    of = [r.get(name) for r in found]
    found = [r | {name: d} if d else r for r, d in zip(found, paired_statistics.corrected(of))]
  return found


def _records(scale, measured, bicubic, is_natural):
  """Returns a record per selector and system, compared with the network that it is made of."""
  values = {
    (selector, system): np.moveaxis(np.array(v), 0, 1)  # [images, seeds, metrics]
    for selector, m in measured.items()
    for system, v in m["values"].items()
  }
  plain = next(iter(measured))

  def record(selector, system, of, reference, to, **also):
    found = {"part": "quality", "scale": scale, "selector": selector, "system": system, "to": to}
    for index, metric in enumerate(METRICS):
      ours = paired_statistics.over_seeds(of[..., index])
      found[metric] = paired_statistics.mean(ours)
      if reference is not None:
        pair = ours, paired_statistics.over_seeds(reference[..., index])
        found[f"{metric}_difference"] = paired_statistics.paired_mean(*pair)
        natural = (values[is_natural] for values in pair)
        found[f"{metric}_natural"] = paired_statistics.paired_mean(*natural)
    return found | {"images": len(of), "natural": int(is_natural.sum())} | also

  found = [record("", BICUBIC, bicubic, values[plain, CLEAN], f"{plain}, {CLEAN}")]
  for (selector, system), of in values.items():
    reference, to = (values[selector, CLEAN], CLEAN) if system != CLEAN else (None, "")
    if system == CLEAN and selector != plain:
      reference, to = values[plain, CLEAN], f"{plain}, {CLEAN}"
    m = measured[selector]
    also = dict(tau=m["tau"], passes=m["passes"][system], validation=m["validation"])
    found.append(record(selector, system, of, reference, to, **also))
  return found


def _part(records, part):
  return [r for r in records if r["part"] == part]


def table(records: list[dict[str, Any]]) -> str:
  columns = {
    "scale": lambda r: f"x{r['scale']}",
    "selector": "selector",
    "system": lambda r: (
      r["system"] + (f", τ = {r['tau']:g}" if r.get("tau") and "roster" in r["system"] else "")
    ),
    "passes": lambda r: f"{r['passes']:.1f}" if "passes" in r else "",
    "PSNR (dB)": lambda r: compared.cell(r["psnr"], 2),
    "difference (dB)": lambda r: compared.cell(r.get("psnr_difference"), 3, True),
    "natural pictures only (dB)": lambda r: compared.cell(r.get("psnr_natural"), 3, True),
    "SSIM": lambda r: compared.cell(r["ssim"], 4),
    "difference in SSIM": lambda r: compared.cell(r.get("ssim_difference"), 4, True),
    "difference from": "to",
  }
  shown = _part(records, "quality")
  first = shown[0]
  return (
    f"{report_page.table_of(shown, columns)}\n\nOn luminance, {first['images']} test pictures "
    f"({first['natural']} of them natural), means over trainings. Brackets: 95 % bootstrap "
    "intervals over pictures, differences paired by picture; *: significant after Holm's "
    "correction over the table. Passes: measured time relative to one pass of the network."
  )


def findings(records: list[dict[str, Any]]) -> str:
  sentences = []
  for scale in compared.unique(_part(records, "quality"), "scale"):
    of = {(r["selector"], r["system"]): r for r in _part(records, "quality") if r["scale"] == scale}
    for (selector, system), r in of.items():
      if not system.startswith("roster"):
        continue
      gain = r["psnr_difference"]
      rivals = {
        s: of[sel, s]
        for sel, s in of
        if sel == selector and s.startswith("self-ensemble") and of[sel, s]["passes"] >= 1
      }
      rival = min(rivals, key=lambda s: abs(np.log(rivals[s]["passes"] / r["passes"])))
      other, mean = rivals[rival], of[selector, MEAN_GATE]
      sentences.append(
        f"x{scale}, {selector} selector, {system}: {_signed(gain)} in {r['passes']:.1f} passes; "
        f"its mean gate {_signed(mean['psnr_difference'])} in {mean['passes']:.1f}, {rival} "
        f"transforms {_signed(other['psnr_difference'])} in {other['passes']:.1f}."
      )
  return " ".join(sentences)


def _signed(difference):
  verdict = "" if difference.is_significant else ", not significant"
  return f"{report_page.difference(difference, 3, ' dB')}{verdict}"


def draw(records: list[dict[str, Any]]):
  """Draws gains in PSNR against cost, and crops next to each other."""
  quality, crops = _part(records, "quality"), _part(records, "crops")
  columns = [name for name in crops[0]["crops"] if not name.endswith("self-ensemble, 8")]
  pictures = list(crops[0]["crops"][columns[0]])
  rows = [(c, picture) for c in crops for picture in pictures]
  figure = drawing.plt.figure(figsize=(13, 4.2 + 1.5 * len(rows)), layout="constrained")
  ratios = [4.0, 1.55 * len(rows)]
  above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=ratios)[:, 0]
  scales = compared.unique(quality, "scale")
  for axis, scale in zip(np.atleast_1d(above.subplots(1, len(scales))), scales):
    axis.spines[["top", "right"]].set_visible(False)
    drawing.zero(axis)
    for index, selector in enumerate(s for s in compared.unique(quality, "selector") if s):
      some = [r for r in quality if (r["scale"], r["selector"]) == (scale, selector)]
      some = [r for r in some if r["system"] != CLEAN]
      for kind, style in (("roster", 0), ("self-ensemble", 1), (MEAN_GATE, 2)):
        points = [r for r in some if r["system"].startswith(kind)]
        if points:
          drawing.errorbars(
            axis,
            [r["passes"] * (1 + 0.03 * index) for r in points],
            [r["psnr_difference"] for r in points],
            label=f"{kind}, {selector}",
            **drawing.style(index) | {"color": drawing.SHADES[style], "markersize": 5},
          )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(drawing.short)
    axis.set_xlabel("cost in passes of the network, log scale")
    axis.set_ylabel("gain in PSNR (dB)")
    axis.set_title(f"x{scale}", fontsize=9)
  axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
  grid = below.subplots(len(rows), len(columns), squeeze=False)
  for line, (of, picture) in zip(grid, rows):
    for axis, column in zip(line, columns):
      pixels = np.frombuffer(base64.b64decode(of["crops"][column][picture]), np.uint8)
      axis.imshow(pixels.reshape(of["side"], -1), cmap="gray", vmin=0, vmax=255)
      axis.set_xticks([])
      axis.set_yticks([])
    line[0].set_ylabel(f"x{of['scale']}, {picture}", fontsize=8)
  for axis, column in zip(grid[0], columns):
    axis.set_title(column.replace(", ", "\n", 1), fontsize=8)
  return figure
