"""The table and the picture."""

from collections.abc import Sequence
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tabulate

from experiments.benchmarks import timing
from experiments.benchmarks.sweep_results import Folder

TITLES = {
  "decode": "Decode step against n (to base: to the smallest n)",
  "context": "Decode step against context length (to base: to the shortest)",
  "batch": "Decode step against the number of texts (to base: to the smallest batch)",
  "cache": "Decode step by cache (to base: to Clean Cache)",
  "late": "Noise in the second half of the layers only (to base: to late tiling)",
  "scoring": "Scoring a text (to base: to the plain model)",
  "transformers": "Decode step beside transformers (to base: to roe_jax at the same n)",
}
_COLUMNS = (
  ("", "variant", "{}"),
  ("n", "num_members", "{}"),
  ("τ", "temperature", "{:g}"),
  ("context", "context", "{}"),
  ("texts", "batch_size", "{}"),
  ("ms", "seconds", None),
  ("to base", "to_baseline", "{:.2f}"),
  ("experts\nhit", "unique_experts", "{:.1f}"),
  ("floor,\nms", "floor_seconds", None),
  ("to\nfloor", "to_floor", "{:.2f}"),
  ("tokens\nper s", "tokens_per_second", "{:.0f}"),
  ("temporaries,\nMiB", "temp_bytes", None),
  ("rounds", "rounds", "{}"),
)


def _cell(record, name, form):
  if name not in record:
    return ""
  if form:
    return form.format(record[name])
  if name == "temp_bytes":
    return f"{record[name] / 2**20:.1f}"
  if name == "floor_seconds":
    return _milliseconds(record[name])
  return (
    f"{_milliseconds(record['seconds'])} [{_milliseconds(record['seconds_low'])}, "
    f"{_milliseconds(record['seconds_high'])}]"
  )


def _milliseconds(seconds):
  return f"{1e3 * seconds:.{2 if seconds < 0.01 else 1 if seconds < 1 else 0}f}"


def table(folder: Folder, order: Sequence[str]) -> str:
  """The tables of all finished sweeps."""
  parts = []
  for sweep in order:
    records = folder.of(sweep)
    if not records:
      continue
    columns = [c for c in _COLUMNS if any(c[1] in r for r in records)]
    rows = [[_cell(r, name, form) for _, name, form in columns] for r in records]
    parts.append(
      f"{TITLES[sweep]}; memory read at "
      f"{np.median([r['bandwidth'] for r in records]) / 1e9:.1f} GB/s\n"
      + tabulate.tabulate(
        rows,
        headers=[c[0] for c in columns],
        disable_numparse=True,
        colalign=["left"] + ["right"] * (len(columns) - 1),
      )
    )
    parts += _remarks(sweep, records)
  return "\n\n".join(parts) + "\n"


def _remarks(sweep, records):
  """Sentences under a table."""
  if sweep == "cache":
    by_name = {r["variant"]: r for r in records}
    none = by_name["none"]
    return [
      f"Without a cache a token at context {none['context']} takes "
      f"{none['to_baseline']:.0f} times as long as with Clean Cache "
      f"(n = {none['num_members']}); with a clean history computed once for all members, "
      f"{by_name['none, clean history']['to_baseline']:.1f} times."
    ]
  if sweep == "transformers":
    chosen = {}
    for r in records:
      if "experts" in r:
        what = ", ".join(str(r[k]) for k in ("experts", "cache", "run") if k in r)
        chosen.setdefault(r["variant"], []).append(f"({what}) at n = {r['num_members']}")
    differences = [r["difference"] for r in records if "difference" in r]
    return [
      "Fastest in a trial. "
      + "; ".join(f"{name}: {', '.join(what)}" for name, what in chosen.items())
      + ".",
      f"Largest difference of log-probabilities to roe_jax at n = 1: {max(differences):.1e}.",
    ]
  return []


def summary(folder: Folder) -> str:
  """Peak memory so far, as far as it is known."""
  last = folder.records[-1]
  parts = [f"{last['peak_process_bytes'] / 2**30:.2f} GiB of the process"]
  if "peak_device_bytes" in last:
    parts.append(f"{last['peak_device_bytes'] / 2**30:.2f} GiB on the device")
  return "Peak memory: " + ", ".join(parts) + "."


def draw(folder: Folder, title: str, path: pathlib.Path) -> None:
  """Cost against n, beside how many experts the members choose together."""
  records = folder.of("decode")
  if not records:
    return
  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
  styles = [dict(color="0.55", marker="s", linestyle="--"), dict(color="black", marker="o")]
  temperatures = sorted({r["temperature"] for r in records})
  for tau, style in zip(temperatures, styles):
    of_tau = [r for r in records if r["temperature"] == tau]
    n = [r["num_members"] for r in of_tau]
    label = f"roe_jax, τ = {tau:g}"
    left.plot(n, [r["to_baseline"] for r in of_tau], label=label, **style)
    right.plot(n, [r["unique_experts"] for r in of_tau], label=label, **style)
  of_tau = [r for r in records if r["temperature"] == temperatures[-1]]
  left.plot(
    [r["num_members"] for r in of_tau],
    [r["floor_seconds"] / of_tau[0]["seconds"] for r in of_tau],
    color="black",
    linewidth=0.8,
    linestyle=":",
    label=f"floor: memory read once, τ = {temperatures[-1]:g}",
  )
  _draw_rivals(left, folder.of("transformers"))
  every = sorted({r["num_members"] for r in records})
  for axis in (left, right):
    axis.set_xscale("log", base=2)
    axis.set_xticks(every, [str(n) for n in every])
    axis.minorticks_off()
    axis.set_xlabel("roster members n")
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
  left.set_ylabel(f"time of a decode step (n = {every[0]} of roe_jax is 1)")
  right.set_ylabel("different experts chosen in a layer")
  figure.legend(
    *left.get_legend_handles_labels(),
    loc="outside lower center",
    ncols=3,
    frameon=False,
    fontsize=9,
  )
  figure.suptitle(title, fontsize=9)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def _draw_rivals(axis, records):
  """The rosters in transformers, relative to roe_jax's smallest n beside them."""
  if not records:
    return
  base = np.array(records[0]["seconds_by_round"], float)
  styles = {
    "transformers": dict(color="0.35", marker="x", linestyle="-.", linewidth=1),
    "transformers, hand-tuned": dict(color="0.35", marker="+", linestyle="-", linewidth=1),
  }
  for name, style in styles.items():
    of_name = [r for r in records if r["variant"] == name]
    axis.plot(
      [r["num_members"] for r in of_name],
      [timing.median_ratio(np.array(r["seconds_by_round"], float), base) for r in of_name],
      label=f"{name}, τ = {records[0]['temperature']:g}",
      **style,
    )
