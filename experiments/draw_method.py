"""Draws how a Roster of Experts processes one token.

  python -m experiments.draw_method --output=docs/roe.png

The router scores and the members' distributions are invented; choices and averages are computed
from them. For print, give an --output that ends in .pdf.
"""

from __future__ import annotations

import pathlib

from absl import flags
import numpy as np

from checkpoints_convert import outputs
from experiments.cli import app
from experiments.cli.extras import matplotlib, plt

FLAGS = flags.FLAGS
INK, DARK, LIGHT = "0.2", "0.3", "0.85"
MEMBERS = ("member 0", "member 1", "member 2", "member n-1")
HEIGHTS = (2.86, 2.14, 1.42, 0.42)  # of the members' rows; all lengths are in inches
NUM_CHOSEN = 2
SCORES = (0.30, 0.62, 0.22, 0.44, 0.56, 0.16, 0.48, 0.34)
# τ·G of each member. Gumbel noise is skewed: often a bit below its mean, sometimes far above.
NOISE = (
  (0, 0, 0, 0, 0, 0, 0, 0),
  (-0.06, 0.08, 0.10, -0.05, -0.12, 0.05, 0.16, -0.10),
  (-0.10, -0.16, 0.06, 0.22, 0.09, -0.04, -0.08, 0.12),
  (0.12, -0.10, -0.08, -0.02, 0.02, 0.26, 0.20, -0.14),
)
WORDS = ("17", "34", "43", "51")
PROBABILITIES = (
  (0.40, 0.42, 0.10, 0.08),
  (0.15, 0.68, 0.09, 0.08),
  (0.22, 0.52, 0.08, 0.18),
  (0.46, 0.34, 0.09, 0.11),
)


def define_flags() -> None:
  flags.DEFINE_string("output", "docs/roe.png", "File to write, .png or .pdf.")


def box(axis, x, y, width, height, **style):
  axis.add_patch(
    matplotlib.patches.FancyBboxPatch(
      (x, y),
      width,
      height,
      boxstyle="round,pad=0,rounding_size=0.06",
      **{"facecolor": "white", "edgecolor": INK, "linewidth": 1} | style,
    )
  )


def text(axis, x, y, words, size=9, **style):
  axis.text(
    x, y, words, fontsize=size, **{"ha": "center", "va": "center", "color": "black"} | style
  )


def arrow(axis, *points, **style):
  """Draws straight lines through points, with an arrowhead at the last."""
  for start, end in zip(points[:-2], points[1:-1]):
    axis.plot(*zip(start, end), **{"color": INK, "linewidth": 1, "solid_capstyle": "butt"} | style)
  axis.add_patch(
    matplotlib.patches.FancyArrowPatch(
      *points[-2:],
      arrowstyle="-|>",
      mutation_scale=9,
      shrinkA=0,
      shrinkB=0,
      **{"color": INK, "linewidth": 1} | style,
    )
  )


def bars(axis, x, y, values, chosen, width, scale):
  """Draws bars from a baseline, the chosen ones dark."""
  for i, value in enumerate(values):
    axis.add_patch(
      matplotlib.patches.Rectangle(
        (x + i * width, y),
        0.78 * width,
        scale * value,
        linewidth=0.7,
        edgecolor=INK,
        facecolor=DARK if i in chosen else LIGHT,
      )
    )


def largest(values, number):
  """Returns the indices of the largest values."""
  return set(np.argsort(-np.asarray(values))[:number].tolist())


def draw_cache(axis):
  """Draws the cache that all members read and member 0 writes."""
  x, y, side, past = 1.37, 3.74, 0.26, 6
  for i in range(past + 1):
    axis.add_patch(
      matplotlib.patches.Rectangle(
        (x + i * side, y),
        side,
        side,
        linewidth=0.8,
        edgecolor=INK,
        facecolor=LIGHT if i < past else "white",
        linestyle="-" if i < past else (0, (2, 1.5)),
      )
    )
  end = x + (past + 1) * side
  text(axis, end + 0.1, y + side / 2, "one cache: keys and values of past tokens", ha="left")
  for row in HEIGHTS:
    arrow(axis, (1.5, y), (1.5, row + 0.08), (1.9, row + 0.08), linestyle=(0, (3, 1.5)))
  text(axis, 1.56, y - 0.16, "all read", 8, ha="left")
  arrow(axis, (end - side / 2, HEIGHTS[0] + 0.3), (end - side / 2, y))
  text(axis, end - side / 2 - 0.06, y - 0.38, "member 0\nwrites", 8, ha="right")


def draw() -> matplotlib.figure.Figure:
  """Draws a token, n members in rows, their distributions, and the mean, from left to right."""
  figure = plt.figure(figsize=(8, 4.15), facecolor="white")
  axis = figure.add_axes((0, 0, 1, 1))
  axis.set_xlim(0, 8)
  axis.set_ylim(0, 4.15)
  axis.axis("off")
  middle = (HEIGHTS[0] + HEIGHTS[-1]) / 2
  box(axis, 0.1, middle - 0.24, 0.75, 0.48)
  text(axis, 0.475, middle, "one\ntoken")
  text(axis, 0.55, middle - 0.5, "n times,\nas one batch", 8)
  draw_cache(axis)
  mean = np.mean(PROBABILITIES, axis=0)
  for name, y, noise, p in zip(MEMBERS, HEIGHTS, NOISE, PROBABILITIES):
    arrow(axis, (0.85, middle), (1.15, middle), (1.15, y - 0.08), (1.9, y - 0.08))
    box(axis, 1.9, y - 0.3, 3.3, 0.6)
    text(
      axis, 2.0, y, f"{name}\n" + ("its own noise" if any(noise) else "clean: τ = 0"), 8, ha="left"
    )
    scores = np.add(SCORES, noise)
    chosen = largest(scores, NUM_CHOSEN)
    bars(axis, 3.15, y - 0.24, scores, chosen, 0.25, 0.62)
    arrow(axis, (5.2, y), (5.5, y))
    bars(axis, 5.6, y - 0.24, p, largest(p, 1), 0.2, 0.7)
    arrow(axis, (6.45, y), (6.7, y), (6.7, middle), (6.95, middle))
  dots = (HEIGHTS[2] + HEIGHTS[3]) / 2
  for x in (3.55, 6.0):
    text(axis, x, dots, "⋮", 14)
  text(axis, 4.15, 3.38, "router scores R + τ·G,\ndark: the k experts chosen")
  text(axis, 6.0, 3.3, "n distributions")
  box(axis, 6.95, middle - 0.62, 0.95, 1.24)
  text(axis, 7.425, middle + 0.43, "their mean")
  bars(axis, 7.03, middle - 0.34, mean, largest(mean, 1), 0.2, 1.0)
  for i, word in enumerate(WORDS):
    text(axis, 7.03 + 0.2 * i + 0.078, middle - 0.46, word, 8)
  return figure


def main(argv) -> None:
  del argv
  path = pathlib.Path(FLAGS.output)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure = draw()
  figure.savefig(path, dpi=200)
  plt.close(figure)
  print(f"Saved {path}.")


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main, not_distributed="it draws a picture", needs=("matplotlib",), output=outputs.FILE)


if __name__ == "__main__":
  program()
