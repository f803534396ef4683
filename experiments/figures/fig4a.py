"""Figure 4a: memory and power against n.

    python -m experiments.reproduce --figure=fig4a,fig4b --model=olmoe --data_dir=data

Generation from the first 100 GSM8K prompts with and without a cache, at τ = 0 as in the
paper and at τ > 0, where members use different experts; one sequence at a time and several.
Memory is that of the compiled program (arguments and temporaries, as reported by XLA) and
the device's peak so far, if reported. Power is NVML's, over all GPUs (package nvidia-ml-py).
"""

from experiments.analysis import drawing, report_page
from experiments.figures import overhead
from experiments.figures.figure_run import FigureRun

TITLE = "Memory and power against n"
BACKGROUND = (
  "The paper reports +12 % peak memory and +20 % power per token at n = 64 (OLMoE, one A100, "
  "τ = 0, where all members use the same experts)."
)
CONFIGS = overhead.CONFIGS


def measure(run: FigureRun) -> list[dict]:
  return overhead.measure(run, run.config)


def table(records: list[dict]) -> str:
  smallest = {label: rows[0] for label, rows in overhead.series(records).items()}
  columns = {
    "": overhead.label,
    "n": "n",
    "program (MiB)": lambda r: report_page.mebibytes(r["bytes"], ".1f"),
    "ratio to smallest n": lambda r: (
      f"{r['bytes'] / smallest[overhead.label(r)]['bytes']:.2f}" if r["bytes"] else ""
    ),
    "device peak so far (MiB)": lambda r: report_page.mebibytes(r["peak_device_bytes"], ".1f"),
    "power (W)": lambda r: report_page.number(r["watts"]),
    "energy (J per token)": lambda r: report_page.number(r["joules_per_token"]),
  }
  return report_page.table_of(records, columns)


def findings(records: list[dict]) -> str:
  sentences = [
    f"{label}: n = {rows[-1]['n']} needs "
    f"{100 * (rows[-1]['bytes'] / rows[0]['bytes'] - 1):+.1f} % memory relative to n = "
    f"{rows[0]['n']}"
    for label, rows in overhead.series(records).items()
    if rows[0]["bytes"] and len(rows) > 1
  ]
  text = "; ".join(sentences) + "." if sentences else "Memory was not measured."
  if all(r["watts"] is None for r in records):
    text += " Power was not measured: NVML found no GPU."
  return text


def draw(records: list[dict]):
  panels = {
    "bytes": (2**20, "memory of the program (MiB)"),
    "joules_per_token": (1, "energy (J per token)"),
  }
  shown = {k: panel for k, panel in panels.items() if any(r[k] is not None for r in records)}
  if not shown:
    return None
  figure, axes = drawing.axes(len(shown), width=5.2, height=3.2)
  for (key, (unit, title)), axis in zip(shown.items(), axes[0]):
    for index, (label, rows) in enumerate(overhead.series(records).items()):
      points = [(r["n"], r[key] / unit) for r in rows if r[key] is not None]
      axis.errorbar(*zip(*points), label=label, **drawing.line(index))
    axis.set_ylabel(title)
    axis.set_ylim(0, 1.08 * max(r[key] / unit for r in records if r[key] is not None))
    drawing.members_axis(axis, sorted({r["n"] for r in records}))
  missing = [title for key, (_, title) in panels.items() if key not in shown]
  if missing:
    figure.suptitle(f"{missing[0]}: not measured", fontsize=9)
  drawing.legend(figure, axes[0, 0], 2)
  return figure
