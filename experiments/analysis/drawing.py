"""Plotting style: readable in gray, PNG for pages, PDF for print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import pathlib

import numpy as np

from experiments.analysis.paired_statistics import Estimate
from experiments.cli.extras import matplotlib, plt

# Series differ by marker first, then by shade.
MARKERS = "osD^vP*X<>ph"
SHADES = ("black", "0.45", "0.7")
SIZE = 3.4  # inches, of a panel


def save(
  figure: matplotlib.figure.Figure, path: pathlib.Path, kinds: Sequence[str] = ("png", "pdf")
) -> None:
  """Saves a figure as PATH.KIND without timestamps, and closes it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  for kind in kinds:
    metadata = {"CreationDate": None} if kind == "pdf" else None
    figure.savefig(path.with_name(f"{path.name}.{kind}"), dpi=150, metadata=metadata)
  plt.close(figure)


def axes(
  columns: int, rows: int = 1, width: float = SIZE, height: float = SIZE, **shared
) -> tuple[matplotlib.figure.Figure, np.ndarray]:
  """Makes a figure and its `[rows, columns]` axes, each of that size in inches.

  Args:
    columns, rows: number of axes.
    width, height: of each.
    **shared: `sharex` and `sharey`, as of `plt.subplots`.
  """
  size = (width * columns, height * rows)
  figure, grid = plt.subplots(
    rows, columns, figsize=size, layout="constrained", squeeze=False, **shared
  )
  for axis in grid.flat:
    axis.spines[["top", "right"]].set_visible(False)
  return figure, grid


def panels(
  titles: Sequence[str], columns: int, width: float, height: float
) -> tuple[matplotlib.figure.Figure, list[matplotlib.axes.Axes]]:
  """Makes a figure with a titled panel per title, in at most `columns` columns."""
  columns = min(columns, len(titles))
  figure, grid = axes(columns, -(-len(titles) // columns), width, height)
  for axis in grid.flat[len(titles) :]:
    axis.set_visible(False)
  for axis, title in zip(grid.flat, titles):
    axis.set_title(title, fontsize=9)
  return figure, list(grid.flat[: len(titles)])


def style(index: int) -> dict:
  """Returns arguments of `errorbar` for points of series `index`, without a line."""
  shade = SHADES[index // len(MARKERS) % len(SHADES)]
  return dict(
    marker=MARKERS[index % len(MARKERS)],
    color=shade,
    linestyle="none",
    capsize=3,
    markersize=7,
    elinewidth=1,
    markerfacecolor="white" if index % 2 else shade,
  )


def line(index: int) -> dict:
  """Returns arguments of `errorbar` for series `index`, points joined by a line."""
  return style(index) | {
    "linestyle": ("-", "--", ":", "-.")[index % 4],
    "linewidth": 1,
    "markersize": 5,
  }


def bars(estimates: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray]:
  """Returns values of estimates, and `[2, X]` lengths of their error bars below and above."""
  values, low, high = np.array([(e.value, e.low, e.high) for e in estimates]).reshape(-1, 3).T
  return values, np.maximum(0, [values - low, high - values])


def errorbars(
  axis: matplotlib.axes.Axes,
  x: Sequence[float] | np.ndarray,
  estimates: Sequence[Estimate],
  **settings,
):
  """Draws estimates with their intervals; `settings` as of `errorbar`."""
  values, lengths = bars(estimates)
  return axis.errorbar(x, values, yerr=lengths, **settings)


def short(value: float, _: float | None = None) -> str:
  """Formats a tick: 0.5, 20, 5000, 20k, 3M."""
  eng = matplotlib.ticker.EngFormatter(sep="")
  return eng(value) if abs(value) >= 1e4 else f"{value:g}"


def value_axis(axis: matplotlib.axes.Axes, which: str, name: str, values: Sequence[float]) -> None:
  """Names the "x" or "y" axis of positive values; makes it logarithmic if they span a factor of 3.

  Ticks are at 1, 2, 5, 10, ..., or closer together for values of one order of magnitude.
  """
  low, high = min(values), max(values)
  one = getattr(axis, f"{which}axis")
  if high > 3 * low:
    getattr(axis, f"set_{which}scale")("log")
    subs = (1, 2, 3, 5) if high < 10 * low else (1, 2, 5) if high < 1000 * low else (1,)
    one.set_major_locator(matplotlib.ticker.LogLocator(subs=subs, numticks=15))
    one.set_minor_locator(matplotlib.ticker.NullLocator())
    name += ", log scale"
  one.set_major_formatter(short)
  one.set_label_text(name)


def members_axis(axis: matplotlib.axes.Axes, numbers: Sequence[int]) -> None:
  """Makes the x axis one of roster sizes, in powers of two, each of `numbers` labeled."""
  axis.set_xscale("log", base=2)
  axis.set_xticks(numbers, [str(n) for n in numbers])
  axis.minorticks_off()
  axis.set_xlabel("roster members n, log scale")


def dots(
  axis: matplotlib.axes.Axes,
  groups: Sequence[str],
  series: Mapping[str, Sequence[Estimate | None]],
  first_style: int = 0,
) -> None:
  """Draws estimates with error bars, a column of the x axis per group, series next to each other.

  Args:
    axis: where.
    groups: names on the x axis.
    series: for each label an estimate, or None, of each group.
    first_style: index of the first series' style.
  """
  width = min(0.8, 0.22 * len(series))
  offsets = np.linspace(-width / 2, width / 2, len(series)) if len(series) > 1 else [0.0]
  for index, ((label, estimates), offset) in enumerate(zip(series.items(), offsets)):
    shown = [(x + offset, e) for x, e in enumerate(estimates) if e is not None]
    if shown:
      errorbars(axis, *zip(*shown), label=label, **style(first_style + index))
  axis.set_xticks(range(len(groups)), groups)
  axis.set_xlim(-0.6, len(groups) - 0.4)
  axis.tick_params(axis="x", labelsize=8)


def zero(axis: matplotlib.axes.Axes) -> None:
  """Draws a line at zero difference."""
  axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)


def legend(figure: matplotlib.figure.Figure, axis: matplotlib.axes.Axes, columns: int = 3) -> None:
  """Puts the legend of one of the axes below the whole figure."""
  handles, labels = axis.get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
  )
