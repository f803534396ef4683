"""Figure 4b: latency per token against n.

    python -m experiments.reproduce --figure=fig4a,fig4b --model=olmoe --data_dir=data

The measurements of `fig4a` as wall-clock milliseconds per token, with the number of unique
active experts per layer and step: at τ = 0 it does not grow with n, which makes rosters look
cheaper than they are. Medians and quartiles over rounds; ratios are within rounds.
"""

from experiments.analysis import drawing, report_page
from experiments.figures import compared, overhead
from experiments.figures.figure_run import FigureRun

TITLE = "Latency per token against n"
BACKGROUND = (
  "The paper reports that latency grows little with n with a cache, and much without (OLMoE, "
  "one A100, 128 tokens, τ = 0)."
)
CONFIGS = overhead.CONFIGS


def measure(run: FigureRun) -> list[dict]:
  return overhead.measure(run, run.config)


def table(records: list[dict]) -> str:
  columns = {
    "": overhead.label,
    "n": "n",
    "ms per token [quartiles]": lambda r: compared.cell(r["ms_per_token"], 2),
    "ratio to n = 1": lambda r: f"{r['time_ratio']:.2f}",
    "unique active experts": lambda r: (
      "" if r["unique_experts"] is None else f"{r['unique_experts']:.1f} of {r['num_experts']}"
    ),
    "rounds": "rounds",
  }
  return report_page.table_of(records, columns)


def findings(records: list[dict]) -> str:
  sentences = []
  for label, rows in overhead.series(records).items():
    first, last = rows[0], rows[-1]
    sentences.append(
      f"{label}: n = {last['n']} takes {last['time_ratio']:.2f} times as long as n = {first['n']}"
    )
    if last["unique_experts"] is not None:
      sentences[-1] += (
        f", with {last['unique_experts']:.1f} unique active experts per layer instead of "
        f"{first['unique_experts']:.1f}"
      )
  return "; ".join(sentences) + "."


def draw(records: list[dict]):
  figure, ((left, right),) = drawing.axes(2, width=4.2, height=3.2)
  for index, (label, rows) in enumerate(overhead.series(records).items()):
    style, numbers = drawing.line(index), [r["n"] for r in rows]
    drawing.errorbars(left, numbers, [r["ms_per_token"] for r in rows], label=label, **style)
    if rows[0]["unique_experts"] is not None:
      right.errorbar(numbers, [r["unique_experts"] for r in rows], label=label, **style)
  medians = [r["ms_per_token"].value for r in records]
  drawing.value_axis(left, "y", "ms per token\n(median, quartiles)", medians)
  right.set_ylabel("unique active experts\n(per layer and step)")
  right.set_ylim(0, records[0]["num_experts"] * 1.05)
  for axis in (left, right):
    drawing.members_axis(axis, sorted({r["n"] for r in records}))
  drawing.legend(figure, left, 2)
  return figure
