"""The pictures of a report."""

from collections.abc import Sequence
import textwrap

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.transforms import offset_copy
import numpy as np

from experiments.analysis import calibration_error, comparisons, drawing
from experiments.analysis.paired_statistics import Difference
from experiments.analysis.run_results import Tuning

FLAT = 0.01  # percent or points: what is less is not made to look large


COSTS = (
  ("milliseconds per token", lambda c: c.tokens_per_second and 1e3 / c.tokens_per_second),
  ("forward FLOPs per example", lambda c: c.flops),
  ("experts read per layer and step", lambda c: c.experts),
  ("peak memory (MiB)", lambda c: c.peak_bytes and c.peak_bytes / 2**20),
  ("forward rows per example", lambda c: c.rows),
)


def quality_against_cost(
  quality: Sequence[comparisons.Quality],
  likelihoods: Sequence[comparisons.Likelihood],
  costs: Sequence[comparisons.Cost],
  baseline: str,
  task: str,
) -> plt.Figure | None:
  """Differences to the baseline against each cost that was measured; None without any.

  The upper row is the task's metric; the lower one perplexity, with output
  temperatures fitted on both sides.
  """
  by_label = {c.result.label: c for c in costs if c.task == task}
  panels = [(name, cost) for name, cost in COSTS if any(map(cost, by_label.values()))]
  rows = []
  compared = {
    q.result.label: q.comparison.difference if q.comparison else None
    for q in quality
    if q.task == task
  }
  if len(compared) > 1:
    measure = next(q.comparison.measure for q in quality if q.task == task and q.comparison)
    rows.append((f"{measure}: difference to\n{baseline} (points)", compared))
  fitted = {
    l.result.label: l.comparison.difference if l.comparison else None
    for l in likelihoods
    if l.task == task and l.fitted
  }
  if any(fitted.values()):
    rows.append((f"perplexity at fitted T: difference\nto {baseline} at fitted T (%)", fitted))
  return differences_against_costs(
    rows, [(name, {label: cost(c) for label, c in by_label.items()}) for name, cost in panels], task
  )


def differences_against_costs(
  rows: Sequence[tuple[str, dict[str, Difference | None]]],
  costs: Sequence[tuple[str, dict[str, float | None]]],
  task: str,
) -> plt.Figure | None:
  """A row of panels for each measure, one for each cost; None without any.

  Args:
    rows: (what is measured, {label: difference to the baseline; None for itself}).
    costs: (the cost, {label: it, or None}).
    task: for the title.
  """
  costs = [(name, of) for name, of in costs if any(of.values())]
  rows = [(title, differences) for title, differences in rows if any(differences.values())]
  if not costs or not rows:
    return None
  figure, axes = drawing.axes(len(costs), len(rows))
  labels = list(costs[0][1])
  handles = {}
  for (title, differences), line in zip(rows, axes):
    for (name, of), axis in zip(costs, line):
      drawing.zero(axis)
      shown = sorted((x, label) for label in differences if (x := of.get(label)))
      for (x, label), aside in zip(shown, _aside([x for x, _ in shown])):
        d = differences[label]
        y, bars = drawing.bars([d or Difference(0.0, 0.0, 0.0)])
        handles[label] = axis.errorbar(
          [x],
          y,
          yerr=bars,
          label=label,
          **drawing.style(labels.index(label)),
          transform=offset_copy(axis.transData, figure, x=aside, units="points"),
        )
        # What stands aside of its data is not looked at for the limits.
        axis.update_datalim([(x, y[0] - extent) for extent in (bars[0, 0], -bars[1, 0])])
      axis.autoscale_view()
      _log_scale(axis)
      if np.abs(axis.get_ylim()).max() < FLAT:
        axis.set_ylim(-FLAT, FLAT)
      axis.set_xlabel(name)
      axis.margins(x=0.15, y=0.1)
    line[0].set_ylabel(title)
  figure.suptitle(f"{task}: quality against cost, 95 % intervals", fontsize=10)
  named = [label for label in labels if label in handles]
  figure.legend(
    [handles[label] for label in named],
    named,
    loc="outside lower center",
    frameon=False,
    fontsize=8,
    ncols=min(4, len(named)),
  )
  return figure


def _aside(costs):
  """Points by which each of ascending costs steps aside, so that no interval hides another."""
  groups = []
  for i, x in enumerate(costs):
    if i and x < 1.02 * costs[i - 1]:
      groups[-1] += 1
    else:
      groups.append(1)
  return [min(8, 40 / n) * (i - (n - 1) / 2) for n in groups for i in range(n)]


def _log_scale(axis):
  """A logarithmic x axis, with labels that do not run into each other."""
  low, high = axis.dataLim.intervalx
  if high > 1.5 * low:
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    if high < 30 * low:  # no more than one power of ten would be named
      axis.xaxis.set_major_locator(matplotlib.ticker.FixedLocator(np.geomspace(low, high, 4)))
      axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
      axis.xaxis.set_major_formatter(
        matplotlib.ticker.FuncFormatter(
          lambda x, _: f"{x:.1e}".replace("e+0", "e") if x >= 1e4 else f"{x:.3g}"
        )
      )


def temperatures(
  tunings: Sequence[Tuning], fixed: Sequence[int] | None = None
) -> plt.Figure | None:
  """τ of each layer of each profile, as a map; None without a profile.

  Args:
    tunings: that left the profiles.
    fixed: how many layers at either end each of them kept at 0, which are marked; None: it
      is not known.
  """
  profiles = [(t.name, t.profile["temperatures"]) for t in tunings if t.profile.get("temperatures")]
  if not profiles:
    return None
  layers = max(len(values) for _, values in profiles)
  grid = np.full((len(profiles), layers), np.nan)
  for row, (_, values) in zip(grid, profiles):
    row[: len(values)] = values
  figure, ((axis,),) = drawing.axes(
    1, width=max(4.5, 2 + 0.4 * layers), height=1.6 + 0.45 * len(profiles)
  )
  axis.spines[:].set_visible(False)
  top = max(np.nanmax(grid), 1e-9)
  image = axis.imshow(grid, cmap="Greys", vmin=0, vmax=top, aspect="auto")
  for (row, layer), value in np.ndenumerate(grid):
    if np.isfinite(value):
      axis.text(
        layer,
        row,
        f"{value:.2f}".removeprefix("0") if value else "0",
        ha="center",
        va="center",
        fontsize=7,
        color="white" if value > 0.6 * top else "black",
      )
  axis.set_xticks(range(layers))
  axis.set_yticks(range(len(profiles)), [name for name, _ in profiles])
  axis.set_xticks(np.arange(layers - 1) + 0.5, minor=True)
  axis.set_yticks(np.arange(len(profiles) - 1) + 0.5, minor=True)
  axis.grid(which="minor", color="white", linewidth=1.5)
  axis.tick_params(which="minor", length=0)
  axis.set_xlabel("layer")
  for row, kept in enumerate(fixed or ()):
    for layer in (*range(kept), *range(layers - kept, layers)):
      axis.add_patch(
        plt.Rectangle(
          (layer - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", edgecolor="0.75", linewidth=0
        )
      )
  if any(fixed or ()):
    axis.set_xlabel("layer (hatched: kept at 0)")
  figure.colorbar(image, ax=axis, label="router temperature τ", pad=0.02)
  return figure


def trials(axis: plt.Axes, tuning: Tuning) -> None:
  """Trials of a tuning in their order: the sweep, what TPE proposed, what was pruned."""
  complete = tuning.complete()
  kinds = (("sweep", "s", "0.45"), ("tpe", "o", "black"))
  for kind, marker, shade in kinds:
    found = [t for t in complete if t.get("kind", "tpe") == kind]
    if found:
      axis.plot(
        [t["number"] for t in found],
        [t["value"] for t in found],
        marker,
        color=shade,
        markersize=4,
        fillstyle="none",
        label=f"trial ({kind.replace('tpe', 'TPE')})",
      )
  pruned = [t for t in tuning.trials if t["state"] == "pruned" and t["value"] is not None]
  if pruned:
    axis.plot(
      [t["number"] for t in pruned],
      [t["value"] for t in pruned],
      "x",
      color="0.6",
      markersize=4,
      label="pruned (estimate)",
    )
  best = (np.maximum if tuning.maximizes else np.minimum).accumulate([t["value"] for t in complete])
  axis.step(
    [t["number"] for t in complete],
    best,
    where="post",
    color="black",
    linewidth=1.2,
    label="best so far",
  )
  _without_noise(axis, tuning)
  axis.set_xlabel("trial")
  axis.set_ylabel(tuning.measure)


def _without_noise(axis, tuning):
  if (plain := tuning.plain()) is not None:
    axis.axhline(plain, color="0.4", linestyle=":", linewidth=1.2, label="without noise")


def history(tuning: Tuning) -> plt.Figure | None:
  """Trials of a tuning in their order, and the sweep of one τ; None without a trial."""
  complete = tuning.complete()
  if not complete:
    return None
  sweep = sorted((max(t["temperatures"]), t["value"]) for t in complete if t.get("kind") == "sweep")
  figure, axes = drawing.axes(2 if len(sweep) > 2 else 1, width=4.6)
  trials(axes[0, 0], tuning)
  if len(sweep) > 2:
    axes[0, 1].plot(*zip(*sweep), "s-", color="0.3", markersize=4, fillstyle="none", linewidth=1)
    _without_noise(axes[0, 1], tuning)
    axes[0, 1].set_xlabel("router temperature τ, one for all layers")
    axes[0, 1].set_ylabel(tuning.measure)
  figure.suptitle(f"{tuning.name}: on the examples of the search", fontsize=10)
  drawing.legend(figure, axes[0, 0])
  return figure


def reliability(lines: Sequence[comparisons.Calibration], task: str) -> plt.Figure | None:
  """Share of right events against confidence, a panel for each run; None without any."""
  lines = [line for line in lines if line.task == task]
  labels = list(dict.fromkeys(line.result.label for line in lines))
  if not labels:
    return None
  columns = min(4, len(labels))
  figure, axes = drawing.axes(columns, -(-len(labels) // columns), width=2.8, height=2.8)
  for axis in axes.flat[len(labels) :]:
    axis.set_visible(False)
  low = np.floor(10 * min(line.events.confidences.min() for line in lines)) / 10
  for label, axis in zip(labels, axes.flat):
    axis.plot([low, 1], [low, 1], color="0.6", linewidth=0.8, linestyle=":")
    for line in (l for l in lines if l.result.label == label):
      points = calibration_error.reliability(line.events)
      y, bars = drawing.bars(points.correct)
      axis.errorbar(
        points.confidence,
        y,
        yerr=bars,
        capsize=2,
        elinewidth=0.8,
        markersize=4,
        linewidth=0.8,
        marker="s" if line.fitted else "o",
        color="0.5" if line.fitted else "black",
        markerfacecolor="white" if line.fitted else "black",
        linestyle="--" if line.fitted else "-",
        label="at fitted output temperature" if line.fitted else "as it is",
      )
    axis.set_title(textwrap.fill(label, 30), fontsize=9)
    axis.set_xlabel("confidence")
    axis.set_ylabel("share right")
  bottom = min(axis.get_ylim()[0] for axis in axes.flat[: len(labels)])
  handles = {}
  for axis in axes.flat[: len(labels)]:
    axis.set_ylim(bottom, 1.03)
    handles |= dict(zip(*reversed(axis.get_legend_handles_labels())))
  figure.legend(
    handles.values(), handles, loc="outside lower center", frameon=False, fontsize=8, ncols=2
  )
  figure.suptitle(f"{task}: reliability, ten bins of equal mass, 95 % intervals", fontsize=10)
  return figure
