"""The pictures of a report."""

from __future__ import annotations

from collections.abc import Sequence
import textwrap
from typing import Any

import numpy as np

from experiments.analysis import calibration_error, comparisons, drawing
from experiments.analysis.paired_statistics import Difference
from experiments.analysis.run_results import Tuning
from experiments.cli.extras import matplotlib

FLAT = 0.01  # percent or points: smaller differences are not magnified
COSTS = {  # name: title and unit
  "ms_per_token": ("milliseconds per token", 1),
  "flops": ("forward FLOPs per example", 1),
  "unique_experts": ("unique active experts\nper layer and token", 1),
  "peak_bytes": ("peak memory (MiB)", 2**20),
  "forward_passes": ("forward passes per example", 1),
}


def quality_against_cost(
  quality: Sequence[comparisons.Quality],
  likelihoods: Sequence[comparisons.Likelihood],
  costs: Sequence[comparisons.RunCost],
  baseline: str,
  task: str,
) -> matplotlib.figure.Figure | None:
  """Draws differences from the baseline against each measured cost; None without any.

  The upper row is the task's metric, the lower one the reduction of perplexity with output
  temperatures fitted on both sides, so that better is higher in both.
  """
  by_label = {c.result.label: c for c in costs if c.task == task}
  rows = []
  compared = {
    q.result.label: q.comparison.difference if q.comparison else None
    for q in quality
    if q.task == task
  }
  if len(compared) > 1:
    measure = next(q.comparison.measure for q in quality if q.task == task and q.comparison)
    rows.append((f"{measure}: difference\nfrom {baseline} (points)", compared))
  fitted = {
    l.result.label: -l.comparison.difference if l.comparison else None
    for l in likelihoods
    if l.task == task and l.fitted
  }
  if any(fitted.values()):
    rows.append((f"perplexity reduction at fitted T\nfrom {baseline} at fitted T (%)", fitted))
  costs_by_label = {
    label: {name: getattr(c, name) for name in COSTS} for label, c in by_label.items()
  }
  return differences_against_costs(rows, costs_by_label, task)


def differences_against_costs(
  rows: Sequence[tuple[str, dict[str, Difference | None]]],
  costs: dict[str, dict[str, float | None]],
  task: str,
) -> matplotlib.figure.Figure | None:
  """Draws a row of panels per measure, one panel per cost; None without any.

  Args:
    rows: (measure, {label: gain over the baseline; None for the baseline}).
    costs: {label: {name in `COSTS`: value or None}}.
    task: for the title.
  """
  labels = list(costs)
  panels = [
    (title, {l: v and v / unit for l, v in ((k, c[name]) for k, c in costs.items())})
    for name, (title, unit) in COSTS.items()
    if any(cost[name] for cost in costs.values())
  ]
  rows = [(title, differences) for title, differences in rows if any(differences.values())]
  if not panels or not rows:
    return None
  figure, axes = drawing.axes(len(panels), len(rows), sharex="col", sharey="row")
  handles, side_by_side = {}, ""
  drawn = [label for label in labels if any(label in differences for _, differences in rows)]
  for (name, of), column in zip(panels, axes.T):
    costs_of = sorted((x, label) for label in drawn if (x := of.get(label)))
    values = [x for x, _ in costs_of]
    offsets = {label: offset for (_, label), offset in zip(costs_of, _offsets(values))}
    if any(offsets.values()):
      side_by_side = "; methods of nearly equal cost side by side, ticks inside mark their costs"
    for (_, differences), axis in zip(rows, column):
      drawing.zero(axis)
      for x, label in costs_of:
        if label not in differences:
          continue
        d = differences[label] or Difference(0.0, 0.0, 0.0)
        handles[label] = drawing.errorbars(
          axis,
          [x],
          [d],
          label=label,
          **drawing.style(labels.index(label)),
          transform=matplotlib.transforms.offset_copy(
            axis.transData, figure, x=offsets[label], units="points"
          ),
        )
        axis.update_datalim([(x, d.low), (x, d.high)])  # artists with an offset do not count
      of_costs = dict(marker=matplotlib.markers.TICKUP, color="0.4", linestyle="none")
      axis.plot(values, [0.0] * len(values), transform=axis.get_xaxis_transform(), **of_costs)
      drawing.value_axis(axis, "x", name, values)
      axis.tick_params(labelbottom=True)
      axis.margins(x=0.15, y=0.1)
  for (measure, _), line in zip(rows, axes):
    line[0].set_ylabel(measure)
    if np.abs(line[0].get_ylim()).max() < FLAT:
      line[0].set_ylim(-FLAT, FLAT)
  figure.suptitle(f"{task}: quality against cost, 95 % intervals{side_by_side}", fontsize=10)
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


def _offsets(costs):
  """Returns offsets in points for ascending costs, so that no interval hides another."""
  groups = []
  for i, x in enumerate(costs):
    if i and x < 1.02 * costs[i - 1]:
      groups[-1] += 1
    else:
      groups.append(1)
  return [min(8, 40 / n) * (i - (n - 1) / 2) for n in groups for i in range(n)]


def temperatures(
  tunings: Sequence[Tuning], fixed: Sequence[int] | None = None
) -> matplotlib.figure.Figure | None:
  """Draws each temperature profile as a row of a heat map; None without a profile.

  Args:
    tunings: the searches.
    fixed: number of layers at either end that each search kept at 0, which are hatched;
      None: unknown.
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
        matplotlib.patches.Rectangle(
          (layer - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", edgecolor="0.75", linewidth=0
        )
      )
  if any(fixed or ()):
    axis.set_xlabel("layer (hatched: kept at 0)")
  figure.colorbar(image, ax=axis, label="router temperature τ", pad=0.02)
  return figure


def trials(axis: matplotlib.axes.Axes, tuning: Tuning) -> None:
  """Draws a search's trials in order: the sweep, those of TPE, and pruned ones."""
  complete = tuning.complete()
  series = [
    (f"trial ({kind.replace('tpe', 'TPE')})", marker, shade, of_kind)
    for kind, marker, shade in (("sweep", "s", "0.45"), ("tpe", "o", "black"))
    if (of_kind := [t for t in complete if t.get("kind", "tpe") == kind])
  ]
  if pruned := [t for t in tuning.trials if t["state"] == "pruned" and t["value"] is not None]:
    series.append(("pruned (estimate)", "x", "0.6", pruned))
  for label, marker, shade, found in series:
    points = zip(*((t["number"], t["value"]) for t in found))
    axis.plot(*points, marker, color=shade, markersize=4, fillstyle="none", label=label)
  best = (np.maximum if tuning.maximizes else np.minimum).accumulate([t["value"] for t in complete])
  numbers = [t["number"] for t in complete]
  axis.step(numbers, best, where="post", color="black", linewidth=1.2, label="best so far")
  _draw_baseline(axis, tuning)
  axis.set_xlabel("trial")
  axis.set_ylabel(_objective(tuning))


def _objective(tuning):
  return f"{tuning.measure} ({'higher' if tuning.maximizes else 'lower'} is better)"


def _draw_baseline(axis, tuning):
  if (baseline := tuning.baseline()) is not None:
    axis.axhline(baseline, color="0.4", linestyle=":", linewidth=1.2, label="baseline")


def history(tuning: Tuning) -> matplotlib.figure.Figure | None:
  """Draws a search's trials, and its sweep of one τ; None without a trial."""
  complete = tuning.complete()
  if not complete:
    return None
  sweep = sorted((max(t["temperatures"]), t["value"]) for t in complete if t.get("kind") == "sweep")
  figure, axes = drawing.axes(2 if len(sweep) > 2 else 1, width=4.6)
  trials(axes[0, 0], tuning)
  if len(sweep) > 2:
    axes[0, 1].plot(*zip(*sweep), "s-", color="0.3", markersize=4, fillstyle="none", linewidth=1)
    _draw_baseline(axes[0, 1], tuning)
    axes[0, 1].set_xlabel("router temperature τ of all layers")
    axes[0, 1].set_ylabel(_objective(tuning))
  figure.suptitle(f"{tuning.name}: on the search examples", fontsize=10)
  drawing.legend(figure, axes[0, 0])
  return figure


def reliability(
  lines: Sequence[comparisons.Calibration], task: str
) -> matplotlib.figure.Figure | None:
  """Draws reliability diagrams, a panel per run; None without any."""
  lines = [line for line in lines if line.task == task]
  labels = list(dict.fromkeys(line.result.label for line in lines))
  if not labels:
    return None
  figure, axes = drawing.panels([textwrap.fill(label, 30) for label in labels], 4, 2.8, 2.8)
  low = np.floor(10 * min(line.events.confidences.min() for line in lines)) / 10
  handles = {}
  for label, axis in zip(labels, axes):
    ideal: dict[str, Any] = dict(
      color="0.6", linewidth=0.8, linestyle=":", label="perfect calibration"
    )
    axis.plot([low, 1], [low, 1], **ideal)
    for line in (l for l in lines if l.result.label == label):
      points = calibration_error.reliability(line.events)
      drawing.errorbars(
        axis,
        points.confidence,
        points.correct,
        capsize=2,
        elinewidth=0.8,
        markersize=4,
        linewidth=0.8,
        marker="s" if line.fitted else "o",
        color="0.5" if line.fitted else "black",
        markerfacecolor="white" if line.fitted else "black",
        linestyle="--" if line.fitted else "-",
        label="at fitted output temperature" if line.fitted else "at T = 1",
      )
    axis.set_xlabel("confidence")
    axis.set_ylabel("accuracy")
    handles |= dict(zip(*reversed(axis.get_legend_handles_labels())))
  bottom = min(axis.get_ylim()[0] for axis in axes)
  for axis in axes:
    axis.set_ylim(bottom, 1.03)
  figure.legend(
    handles.values(), handles, loc="outside lower center", frameon=False, fontsize=8, ncols=3
  )
  figure.suptitle(
    f"{task}: reliability, {calibration_error.BINS} {calibration_error.MASS} bins, 95 % intervals",
    fontsize=10,
  )
  return figure
