"""Handwritten digits of scikit-learn on a larger canvas, also shifted and with noise."""

import dataclasses

import numpy as np

from experiments.cli.extras import sklearn

CANVAS, LARGEST = 12, 16.0  # side of an image, and the largest value of scikit-learn's
SIZES = {"train": 600, "validation": 150}  # the other 1,047 are test items


@dataclasses.dataclass(frozen=True)
class Digits:
  """Digits `[X, 8, 8]` from 0 to 1 and labels `[X]` int32 of one split."""

  images: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)


def load(split: str) -> Digits:
  """Returns a split, "train", "validation" or "test", of a fixed permutation of the digits."""
  found = sklearn.datasets.load_digits()
  order = np.random.default_rng(0).permutation(len(found.target))
  ends = np.cumsum(list(SIZES.values()))
  chosen = dict(zip((*SIZES, "test"), np.split(order, ends)))[split]
  images, labels = found.images[chosen] / LARGEST, found.target[chosen]
  return Digits(np.asarray(images, np.float32), np.asarray(labels, np.int32))


def on_canvas(
  images_Bx8x8: np.ndarray, rng: np.random.Generator, shift: int = 0, noise: float = 0.0
) -> np.ndarray:
  """Puts digits on a canvas.

  Args:
    images_Bx8x8: the digits.
    rng: draws shifts and noise.
    shift: most pixels that a digit is shifted along each axis, from the center, at most 2.
    noise: standard deviation of Gaussian noise added to the canvas.

  Returns:
    `[B, 12, 12]` float32.
  """
  count, side, _ = images_Bx8x8.shape
  canvas, center = np.zeros((count, CANVAS, CANVAS), np.float32), (CANVAS - side) // 2
  shifts = center + rng.integers(-shift, shift + 1, (count, 2))
  for image, digit, (row, column) in zip(canvas, images_Bx8x8, shifts):
    image[row : row + side, column : column + side] = digit
  return np.asarray(canvas + noise * rng.normal(size=canvas.shape), np.float32)
