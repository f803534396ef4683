"""Figure 4b: latency per token against n.

    python -m experiments.reproduce --figure=fig4a,fig4b --model=olmoe --data_dir=data

The measurements of `fig4a`, as wall-clock milliseconds per token, with how many different
experts a step reads in a layer beside them: at τ = 0 that number does not grow with n,
which makes rosters look cheaper than they are. Medians and quartiles over rounds; ratios
are within rounds. The paper shows latency of 128 tokens at τ = 0.

    model      checkpoint (see models.py)              hardware               time, with fig4a
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       15 minutes
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    25 minutes
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     20 minutes
    embedded   ships with the package                  two CPU cores          2 minutes

Times of the first three are estimated with roe_jax.costs (H100), not measured.
"""

from experiments.analysis import drawing, report_page
from experiments.figures import compared, overhead
from experiments.figures.work import Command, Work

TITLE = "Latency per token against n"
SAW = (
  "The paper saw latency grow little with n with a cache, and much without (OLMoE, one "
  "A100, 128 tokens, τ = 0)."
)
CONFIGS = overhead.CONFIGS


def commands(work: Work) -> list[Command]:
  return []


def measure(work: Work) -> list[dict]:
  return overhead.measure(work, work.config)


def table(records: list[dict]) -> str:
  rows = [
    [
      label,
      r["n"],
      compared.cell(r["ms_per_token"], 2),
      f"{r['to_one']:.2f}",
      "" if r["experts"] is None else f"{r['experts']:.1f} of {r['num_experts']}",
      r["rounds"],
    ]
    for label, lines in overhead.series(records).items()
    for r in lines
  ]
  return report_page.table(
    ["", "n", "ms per token [quartiles]", "to n = 1", "experts read", "rounds"], rows
  )


def findings(records: list[dict]) -> str:
  told = []
  for label, lines in overhead.series(records).items():
    last = lines[-1]
    read = (
      ""
      if last["experts"] is None
      else (
        f", reading {last['experts']:.1f} experts of a layer in place of {lines[0]['experts']:.1f}"
      )
    )
    told.append(
      f"{label}: n = {last['n']} takes {last['to_one']:.2f} times as long as n = "
      f"{lines[0]['n']}{read}"
    )
  return "; ".join(told) + "."


def draw(records: list[dict]):
  figure, axes = drawing.axes(2, width=4.2, height=3.2)
  numbers = sorted({r["n"] for r in records})
  for index, (label, lines) in enumerate(overhead.series(records).items()):
    style = drawing.line(index)
    values, bars = drawing.bars([compared.read(r["ms_per_token"]) for r in lines])
    axes[0, 0].errorbar([r["n"] for r in lines], values, yerr=bars, label=label, **style)
    if lines[0]["experts"] is not None:
      axes[0, 1].errorbar(
        [r["n"] for r in lines], [r["experts"] for r in lines], label=label, **style
      )
  axes[0, 0].set_yscale("log")
  axes[0, 0].set_ylabel("ms per token\n(median, quartiles)")
  axes[0, 1].set_ylabel("experts read\n(of a layer, in a step)")
  axes[0, 1].set_ylim(0, records[0]["num_experts"] * 1.05)
  for axis in axes[0]:
    drawing.members_axis(axis, numbers)
  drawing.legend(figure, axes[0, 0], 2)
  return figure
