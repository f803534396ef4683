"""The tables and the figure of the benchmark."""

from collections.abc import Sequence
import pathlib

import numpy as np

from experiments.benchmarks import timing
from experiments.benchmarks.sweep_results import Folder
from experiments.cli.extras import plt, tabulate

TITLES = {
  "decode": "Decode step by roster size n (ratio: to the smallest n)",
  "context": "Decode step by context length (ratio: to the shortest)",
  "batch": "Decode step by batch size (ratio: to the smallest)",
  "cache": "Decode step by cache (ratio: to Clean Cache)",
  "late": "Noise in the second half of the layers only (ratio: to members sharing the first half)",
  "scoring": "Scoring a sequence (ratio: to the baseline)",
  "aggregation": "Scoring a chunk by aggregation (ratio: to the baseline)",
  "samplers": "Decode step by sampling settings (ratio: to greedy)",
  "kernels": "Decode step with the native kernels and without (ratio: to native at the same n)",
  "drafts": "A roster's token by steps and by rounds of drafts, all kept (ratio: to a step)",
  "adaptive": "Scoring a chunk and steps of adaptive rosters (ratio: to all members)",
  "transformers": "Decode step compared with transformers (ratio: to roe_jax at the same n)",
  "llama_cpp": "Decode step without a roster compared with llama.cpp (ratio: to roe_jax)",
}
_COLUMNS = (
  ("", "variant", "{}"),
  ("n", "num_members", "{}"),
  ("τ", "temperature", "{:g}"),
  ("context", "context", "{}"),
  ("batch\nsize", "batch_size", "{}"),
  ("ms", "seconds", None),
  ("ratio", "to_baseline", "{:.2f}"),
  ("unique active\nexperts", "unique_experts", "{:.1f}"),
  ("floor,\nms", "floor_seconds", None),
  ("ratio to\nfloor", "to_floor", "{:.2f}"),
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
  """Returns the tables of all finished sweeps."""
  parts = []
  for sweep in order:
    records = folder.of(sweep)
    if not records:
      continue
    columns = [c for c in _COLUMNS if any(c[1] in r for r in records)]
    rows = [[_cell(r, name, form) for _, name, form in columns] for r in records]
    parts.append(
      f"{TITLES[sweep]}; memory bandwidth "
      f"{np.median([r['bandwidth'] for r in records]) / 1e9:.1f} GB/s, matmuls "
      f"{np.median([r['matmul_rate'] for r in records]) / 1e9:.0f} GFLOP/s\n"
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
  """Sentences below a table."""
  if sweep == "cache":
    by_name = {r["variant"]: r for r in records}
    none = by_name["none"]
    return [
      f"Without a cache a token at context {none['context']} takes "
      f"{none['to_baseline']:.0f} times as long as with Clean Cache (n = {none['num_members']}), "
      "and with a clean history computed once for all members "
      f"{by_name['none, clean history']['to_baseline']:.1f} times."
    ]
  if sweep == "transformers":
    chosen = [
      f"{r['experts']} with a {r['cache']} cache at n = {r['num_members']}"
      for r in records
      if r["variant"] == "transformers"
    ]
    difference = next(r["difference"] for r in records if "difference" in r)
    return [
      f"Fastest in transformers: {', '.join(chosen)}. Largest difference of its "
      f"log-probabilities from those of roe_jax at n = 1: {difference:.1e}."
    ]
  if sweep == "llama_cpp":
    theirs = records[-1]
    return [
      f"llama.cpp reads matrices in {theirs['formats']}. Largest difference of its "
      f"log-probabilities from those of roe_jax: {theirs['difference']:.1e}; the most probable "
      f"token is the same after {theirs['same_tokens']} of {theirs['num_tokens']} tokens."
    ]
  return []


def summary(folder: Folder) -> str:
  """Returns a sentence on peak memory, as far as the platform reports it."""
  last = folder.records[-1]
  parts = [f"{last['peak_process_bytes'] / 2**30:.2f} GiB of the process"]
  if "peak_device_bytes" in last:
    parts.append(f"{last['peak_device_bytes'] / 2**30:.2f} GiB on the device")
  return "Peak memory: " + ", ".join(parts) + "."


def draw(folder: Folder, title: str, path: pathlib.Path) -> None:
  """Draws the cost of a decode step and the number of unique active experts against n."""
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
    label=f"floor: bytes or FLOPs, τ = {temperatures[-1]:g}",
  )
  if competing := [r for r in folder.of("transformers") if r["variant"] == "transformers"]:
    base = np.array(folder.of("transformers")[0]["seconds_by_round"], float)
    left.plot(
      [r["num_members"] for r in competing],
      [timing.median_ratio(np.array(r["seconds_by_round"], float), base) for r in competing],
      label=f"transformers, τ = {competing[0]['temperature']:g}",
      **dict(color="0.35", marker="x", linestyle="-.", linewidth=1),
    )
  every = sorted({r["num_members"] for r in records})
  for axis in (left, right):
    axis.set_xscale("log", base=2)
    axis.set_xticks(every, [str(n) for n in every])
    axis.minorticks_off()
    axis.set_xlabel("roster members n, log scale")
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
  left.set_ylabel(f"time of a decode step / that of roe_jax at n = {every[0]}")
  right.set_ylabel("unique active experts per layer")
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
