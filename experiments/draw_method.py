"""Draws what a Roster of Experts does with one token.

  python -m experiments.draw_method --output=docs/roe.png
"""

import pathlib

from absl import flags
import matplotlib
matplotlib.use("Agg")
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
import matplotlib.pyplot as plt
import numpy as np

from experiments import app

FLAGS = flags.FLAGS
SHADE = "0.25"
MEMBERS = (("member 0, clean", (1, 4)), ("member 1", (1, 6)), ("member 2", (3, 4)),
           ("member n - 1", (4, 6)))
NUM_EXPERTS = 8
WORDS = ("17", "34", "43", "51")


def define_flags() -> None:
  flags.DEFINE_string("output", "docs/roe.png", "The picture.")


def distributions() -> np.ndarray:
  """`[members, words]`: invented, as is the choice of experts; the average is computed."""
  logits = np.array([[1.2, 1.5, 0.2, 0.0], [0.6, 2.0, 0.5, 0.1], [0.9, 1.9, 0.1, 0.7],
                     [1.6, 1.4, 0.0, 0.3]])
  p = np.exp(logits)
  return p / p.sum(axis=1, keepdims=True)


def box(axis, x, y, width, height, text, **style):
  axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08",
                                **{"facecolor": "white", "edgecolor": SHADE, "linewidth": 1} | style))
  axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(axis, start, end, **style):
  axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, shrinkA=0,
                                 shrinkB=0, **{"color": SHADE, "linewidth": 1} | style))


def bars(axis, x, y, values, emphasised=False):
  """A distribution as bars, its largest one dark."""
  for i, value in enumerate(values):
    largest = i == int(np.argmax(values))
    axis.add_patch(plt.Rectangle((x + 0.24 * i, y), 0.18, 0.9 * value, linewidth=0.6,
                                 edgecolor=SHADE, facecolor="0.15" if largest else "0.8"))
    if emphasised:
      axis.text(x + 0.24 * i + 0.09, y - 0.14, WORDS[i], ha="center", va="center", fontsize=7)


def draw() -> plt.Figure:
  """One token on the left, n members in rows, their distributions and the average on the right."""
  figure, axis = plt.subplots(figsize=(9.6, 4.3), layout="constrained", facecolor="white")
  axis.set_xlim(0, 12)
  axis.set_ylim(-0.25, 5.3)
  axis.axis("off")
  p = distributions()
  rows = (4.15, 3.15, 2.15, 0.85)
  box(axis, 0.05, 2.35, 1.15, 0.62, "one token")
  # The cache, which member 0 writes and all read.
  box(axis, 1.85, 0.75, 1.25, 4.05, "", facecolor="0.93")
  axis.text(2.475, 2.78, "keys and\nvalues of the\npast, written\nby member 0\n\n(Clean Cache)", ha="center",
            va="center", fontsize=8)
  axis.text(5.25, 5.1, "routers with noise: the k largest of R + τ·G", ha="center", fontsize=9)
  axis.text(8.35, 5.1, "n distributions", ha="center", fontsize=9)
  for (name, chosen), y, values in zip(MEMBERS, rows, p):
    arrow(axis, (1.2, 2.66), (1.85, y + 0.22), connectionstyle="arc3,rad=0")
    arrow(axis, (3.1, y + 0.22), (3.55, y + 0.22))
    axis.text(3.6, y + 0.56, name + (": τ = 0" if y == rows[0] else ": its own noise G"), fontsize=8,
              va="bottom")
    for e in range(NUM_EXPERTS):
      axis.add_patch(plt.Rectangle((3.6 + 0.42 * e, y), 0.34, 0.44, linewidth=0.8, edgecolor=SHADE,
                                   facecolor="0.25" if e in chosen else "white"))
    arrow(axis, (3.6 + 0.42 * NUM_EXPERTS + 0.05, y + 0.22), (7.8, y + 0.22))
    bars(axis, 7.9, y - 0.02, values)
    arrow(axis, (8.95, y + 0.22), (10.0, 2.75), connectionstyle="arc3,rad=0")
  axis.text(4.3, 1.88, "⋮", fontsize=14, ha="center", va="center")
  axis.text(8.35, 1.88, "⋮", fontsize=14, ha="center", va="center")
  axis.add_patch(FancyBboxPatch((10.05, 2.0), 1.85, 1.5, boxstyle="round,pad=0,rounding_size=0.08",
                                facecolor="white", edgecolor=SHADE, linewidth=1))
  bars(axis, 10.5, 2.32, p.mean(axis=0), emphasised=True)
  axis.text(10.97, 3.22, "their mean", ha="center", va="center", fontsize=9)
  axis.text(10.97, 1.74, "the next token", ha="center", va="center", fontsize=9)
  axis.text(5.25, 0.42, "experts of every layer; dark: chosen", ha="center", fontsize=8)
  axis.text(6.0, -0.08, "All members are one batch. There is no training.", ha="center", fontsize=9)
  return figure


def main(argv) -> None:
  del argv
  path = pathlib.Path(FLAGS.output)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure = draw()
  figure.savefig(path, dpi=120)
  plt.close(figure)
  print(f"Saved {path}.")


if __name__ == "__main__":
  define_flags()
  app.run(main, not_distributed="it draws a picture")
