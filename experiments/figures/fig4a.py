"""Figure 4a: memory and power against n.

    python -m experiments.reproduce --figure=fig4a,fig4b --model=olmoe --data_dir=data

Tokens written behind the first 100 GSM8K problems with and without a cache, at τ = 0 as the
paper did, and at τ > 0, where members read different experts; one text at a time, and
several. Memory is what the compiled program needs (arguments and temporaries, as XLA
tells), and beside it the peak of the device so far where it tells one. Power is NVML's,
over all GPUs (package nvidia-ml-py); without it, it is not available. The paper saw +12 %
memory and +20 % power at n = 64, on one A100 with τ = 0.

    model      checkpoint (see models.py)              hardware               time, with fig4b
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       15 minutes
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    25 minutes
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     20 minutes
    embedded   ships with the package                  two CPU cores          2 minutes

Times of the first three are estimated with roe_jax.costs (H100), not measured.
"""

from experiments.analysis import drawing, report_page
from experiments.figures import overhead
from experiments.figures.work import Command, Work

TITLE = "Memory and power against n"
SAW = (
  "The paper saw +12 % peak memory and +20 % power per token at n = 64 (OLMoE, one A100, "
  "τ = 0, where all members read the same experts)."
)
CONFIGS = overhead.CONFIGS


def commands(work: Work) -> list[Command]:
  return []


def measure(work: Work) -> list[dict]:
  return overhead.measure(work, work.config)


def _mebibytes(value):
  return "not available" if value is None else f"{value / 2**20:.1f}"


def table(records: list[dict]) -> str:
  rows = [
    [
      label,
      r["n"],
      _mebibytes(r["bytes"]),
      f"{r['bytes'] / lines[0]['bytes']:.2f}" if r["bytes"] else "",
      _mebibytes(r["peak_device_bytes"]),
      *("not available" if r[k] is None else f"{r[k]:.3g}" for k in ("watts", "joules_per_token")),
    ]
    for label, lines in overhead.series(records).items()
    for r in lines
  ]
  return report_page.table(
    [
      "",
      "n",
      "program, MiB",
      "to the smallest n",
      "device's peak so far, MiB",
      "power, W",
      "J per token",
    ],
    rows,
  )


def findings(records: list[dict]) -> str:
  told = []
  for label, lines in overhead.series(records).items():
    if lines[0]["bytes"] and len(lines) > 1:
      told.append(
        f"{label}: n = {lines[-1]['n']} needs "
        f"{100 * (lines[-1]['bytes'] / lines[0]['bytes'] - 1):+.1f} % of memory against n = "
        f"{lines[0]['n']}"
      )
  text = "; ".join(told) + "." if told else "Memory is not available here."
  if all(r["watts"] is None for r in records):
    text += " Power is not available here: there is no GPU that NVML knows."
  return text


def draw(records: list[dict]):
  panels = [
    ("bytes", 2**20, "memory of the program (MiB)"),
    ("joules_per_token", 1, "energy (J per token)"),
  ]
  there = [p for p in panels if any(r[p[0]] is not None for r in records)]
  if not there:
    return None
  figure, axes = drawing.axes(len(there), width=5.2, height=3.2)
  for (key, unit, title), axis in zip(there, axes[0]):
    for index, (label, lines) in enumerate(overhead.series(records).items()):
      shown = [r for r in lines if r[key] is not None]
      axis.errorbar(
        [r["n"] for r in shown], [r[key] / unit for r in shown], label=label, **drawing.line(index)
      )
    axis.set_ylabel(title)
    axis.set_ylim(0, 1.08 * max(r[key] / unit for r in records if r[key] is not None))
    drawing.members_axis(axis, sorted({r["n"] for r in records}))
  if len(there) < len(panels):
    missing = next(
      title for key, _, title in panels if (key, title) not in {(k, t) for k, _, t in there}
    )
    figure.suptitle(f"{missing}: not available here", fontsize=9)
  drawing.legend(figure, axes[0, 0], 2)
  return figure
