"""Pictures to train and test super-resolution on: those that packages ship, and procedural ones.

Luminance `[H, W]` from 0 to 1. Train, validation and test pictures are different pictures; the two
views of a stereo pair are both training pictures. Only pictures inside the installed packages are
used, none that scikit-image downloads; SciPy downloads all of its own.
"""

from collections.abc import Callable

import numpy as np

from experiments.cli.extras import skimage, sklearn

_LONGEST = 512  # of the shorter side, beyond which a picture is reduced


def _from_skimage(name, part: int | None = None):
  def load():
    found = getattr(skimage.data, name)()
    return found if part is None else found[part]

  return load


def _from_sklearn(name):
  return lambda: sklearn.datasets.load_sample_image(name)


PICTURES: dict[str, dict[str, Callable[[], np.ndarray]]] = {
  "train": {
    **{
      name: _from_skimage(name)
      for name in (
        "astronaut",
        "brick",
        "coffee",
        "immunohistochemistry",
        "text",
        "coins",
        "page",
        "grass",
      )
    },
    "motorcycle_left": _from_skimage("stereo_motorcycle", 0),
    "motorcycle_right": _from_skimage("stereo_motorcycle", 1),
  },
  "validation": {name: _from_skimage(name) for name in ("rocket", "moon", "colorwheel")},
  "test": {
    **{
      name: _from_skimage(name)
      for name in ("camera", "chelsea", "hubble_deep_field", "retina", "gravel", "cell", "clock")
    },
    "china": _from_sklearn("china.jpg"),
    "flower": _from_sklearn("flower.jpg"),
  },
}


def natural(split: str) -> dict[str, np.ndarray]:
  """Returns the luminance of a split's pictures by name, large ones reduced by averaging."""
  found = {}
  for name, load in PICTURES[split].items():
    picture = np.asarray(load())
    values = skimage.color.rgb2gray(picture) if picture.ndim == 3 else picture / 255
    factor = max(1, 2 * min(values.shape) // _LONGEST)
    found[name] = np.float32(skimage.transform.downscale_local_mean(values, (factor, factor)))
  return found


def procedural(seed: int, size: int) -> np.ndarray:
  """Draws a picture `[size, size]`: gratings, disks and half-planes on 1/f noise.

  It is drawn at twice the size and averaged, so that edges are smooth.
  """
  rng, n = np.random.default_rng(seed), 2 * size
  frequency = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n))
  spectrum = rng.normal(size=(2, n, n // 2 + 1)) / np.maximum(frequency, 1 / n) ** 1.6
  picture = np.fft.irfft2(spectrum[0] + 1j * spectrum[1], (n, n))
  picture = 0.5 + 0.15 * picture / picture.std()
  y, x = np.mgrid[:n, :n] / n
  for _ in range(rng.integers(4, 9)):
    cy, cx, angle = rng.uniform(0, 1, 2).tolist() + [rng.uniform(0, 2 * np.pi)]
    along = np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy)
    disk = np.hypot(x - cx, y - cy) < rng.uniform(0.05, 0.3)
    inside = disk if rng.random() < 0.6 else disk & (along > 0)
    if rng.random() < 0.5:
      cycles = size * rng.uniform(0.03, 0.22)
      paint = rng.uniform(0.3, 0.7) + 0.3 * np.sign(np.sin(2 * np.pi * cycles * along))
    else:
      paint = rng.uniform(0, 1)
    picture = np.where(inside, paint, picture)
  reduced = picture.reshape(size, 2, size, 2).mean((1, 3))
  return reduced.clip(0, 1).astype(np.float32)


def centered(picture: np.ndarray, size: int) -> np.ndarray:
  """Returns the central `[size, size]` of a picture.

  Raises:
    ValueError: it is smaller.
  """
  if min(picture.shape) < size:
    raise ValueError(f"a picture of {list(picture.shape)} has no central square of side {size}")
  row, column = ((side - size) // 2 for side in picture.shape)
  return picture[row : row + size, column : column + size]
