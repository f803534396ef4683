"""How pictures are drawn here: readable in gray, PNG for pages, PDF for print."""

from collections.abc import Sequence
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.analysis.paired_statistics import Estimate

# Of series, in their order: told apart by shape first, then by shade.
MARKERS = "osD^vP*X<>ph"
SHADES = ("black", "0.45", "0.7")
SIZE = 3.4  # inches, of a panel


def save(figure: plt.Figure, path: pathlib.Path) -> None:
  """Writes a figure as PATH.png and PATH.pdf, without the time of its making."""
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path.with_name(path.name + ".png"), dpi=150)
  figure.savefig(path.with_name(path.name + ".pdf"), metadata={"CreationDate": None})
  plt.close(figure)


def axes(
  columns: int, rows: int = 1, width: float = SIZE, height: float = SIZE
) -> tuple[plt.Figure, np.ndarray]:
  """A figure and its `[rows, columns]` axes, each of that size in inches."""
  figure, grid = plt.subplots(
    rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False
  )
  for axis in grid.flat:
    axis.spines[["top", "right"]].set_visible(False)
  return figure, grid


def style(index: int) -> dict:
  """Arguments of `errorbar` for points of series `index`, without a line."""
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
  """Arguments of `errorbar` for series `index`, points joined by a line."""
  return style(index) | {
    "linestyle": ("-", "--", ":", "-.")[index % 4],
    "linewidth": 1,
    "markersize": 5,
  }


def bars(estimates: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray]:
  """Values of estimates, and `[2, X]` lengths of their error bars downwards and upwards."""
  values = np.array([e.value for e in estimates])
  low, high = np.array([e.low for e in estimates]), np.array([e.high for e in estimates])
  return values, np.maximum(0, [values - low, high - values])


def members_axis(axis: plt.Axes, numbers: Sequence[int]) -> None:
  """An x axis of roster sizes, in powers of two, each of `numbers` named."""
  axis.set_xscale("log", base=2)
  axis.set_xticks(numbers, [str(n) for n in numbers])
  axis.minorticks_off()
  axis.set_xlabel("roster members n")


def dots(
  axis: plt.Axes,
  groups: Sequence[str],
  series: dict[str, Sequence[Estimate | None]],
  first_style: int = 0,
) -> None:
  """Estimates with error bars, a column of the x axis for each group, series side by side.

  Args:
    axis: where.
    groups: names on the x axis.
    series: for each label an estimate, or None, of each group.
    first_style: number of the first series' style.
  """
  width = min(0.8, 0.22 * len(series))
  places = np.linspace(-width / 2, width / 2, len(series)) if len(series) > 1 else [0.0]
  for index, ((label, estimates), aside) in enumerate(zip(series.items(), places)):
    there = [(x + aside, e) for x, e in enumerate(estimates) if e is not None]
    if there:
      values, lengths = bars([e for _, e in there])
      axis.errorbar(
        [x for x, _ in there], values, yerr=lengths, label=label, **style(first_style + index)
      )
  axis.set_xticks(range(len(groups)), groups)
  axis.set_xlim(-0.6, len(groups) - 0.4)


def zero(axis: plt.Axes) -> None:
  """A line where there is no difference."""
  axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)


def legend(figure: plt.Figure, axis: plt.Axes, columns: int = 3) -> None:
  """The legend of one of the axes under the whole figure."""
  figure.legend(
    *axis.get_legend_handles_labels(),
    loc="outside lower center",
    ncols=columns,
    frameon=False,
    fontsize=8,
  )
