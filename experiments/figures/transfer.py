"""Transfer: τ tuned for one task, used on another.

    python -m experiments.reproduce --figure=transfer --model=olmoe --data_dir=data \\
        --allow_code_execution

Each task's profile (from the searches of `fig7`, `fig8` and `fig9`) on test examples of
every task, and one uniform τ; differences to the plain model, paired by example. And the
question itself: is a task's own profile better than the mean of the others', on each task
and over the examples of all? Its reviewers asked for this.

    model      checkpoint (see models.py)              hardware               beside searches
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       45 minutes
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    100 minutes
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     50 minutes
    embedded   ships with the package                  one CPU core           4 minutes

Times of the first three are estimated with roe_jax.costs (H100), not measured.
"""

import dataclasses

import numpy as np

from experiments.analysis import drawing, paired_statistics, report_page
from experiments.analysis.run_results import FITTED_NLL, TOKENS, Result, quality_metric
from experiments.figures import compared, searches
from experiments.figures.work import Command, Work

TITLE = "Transfer of τ between tasks"
SAW = (
  "Its reviewers asked how temperatures transfer between tasks; the paper tunes each task's own."
)
PLAIN, UNIFORM, ALL = "plain", "one τ for all", "all tasks"


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    examples: of each task's test split.
    seeds: noise seeds.
  """

  examples: int = 100
  seeds: int = 1


CONFIGS = {name: Config() for name in ("olmoe", "mixtral", "gpt_oss")} | {
  "embedded": Config(examples=60)
}


def _methods(work):
  """{what τ was tuned for: the method}."""
  return {task: f"roster:profile={work.profile(task)}" for task in work.model.tasks} | {
    UNIFORM: f"roster:t={work.model.temperature:g}"
  }


def commands(work: Work) -> list[Command]:
  return searches.commands(work, work.model.tasks) + [
    work.compare(
      "transfer",
      list(work.model.tasks),
      ["baseline", *_methods(work).values()],
      limit=work.config.examples,
      num_seeds=work.config.seeds,
    )
  ]


def measure(work: Work) -> list[dict]:
  results, methods = work.compared("transfer"), _methods(work)
  sources = {method: source for source, method in methods.items()} | {"baseline": PLAIN}
  found = compared.records([results[method] for method in sources], results["baseline"])
  found = [r | {"tuned_for": sources[r["method"]]} for r in found]
  found.sort(key=lambda r: work.model.tasks.index(r["task"]))
  return found + own_and_others(
    {source: results[m] for source, m in methods.items() if source != UNIFORM}
  )


def own_and_others(rosters: dict[str, Result]) -> list[dict]:
  """The task's own profile against the mean of the others', by example.

  Args:
    rosters: {task tuned for: its run on all of these tasks}.

  Returns:
    A record for each task, and one for the examples of all of them, with "own": True,
    "task", "quality_difference" (points) and "fitted_difference" (percent of the perplexity
    at fitted output temperatures), Holm's correction over all records; none of one task.
  """
  if len(rosters) < 2:
    return []
  found = []
  for tasks in [*([task] for task in rosters), list(rosters)]:
    parts = [_pairs(rosters, task) for task in tasks]
    record = {"own": True, "task": tasks[0] if len(tasks) == 1 else ALL}
    for name, compare in (
      ("quality", paired_statistics.paired_accuracy),
      ("fitted", paired_statistics.paired_perplexity),
    ):
      arrays = [np.concatenate(a) for a in zip(*(p[name] for p in parts if name in p))]
      record[f"{name}_difference"] = (
        arrays
        and compared.estimate(compare(*arrays))
        | {"p": paired_statistics.paired_test(*arrays[:2]).p}
      ) or None
    found.append(record)
  return compared.corrected(found)


def _pairs(rosters, task):
  """{measure: `[X]` of the own profile, mean of the others' and, of likelihoods, tokens}."""
  own = rosters[task]
  everyone = [own, *(r for source, r in rosters.items() if source != task)]
  metric = quality_metric(everyone, task)
  found = {}
  for name, keys in (("quality", [metric]), ("fitted", [FITTED_NLL, TOKENS])):
    examples = own.examples(task, *keys)
    if examples:
      ours, *theirs = (
        paired_statistics.over_seeds(r.values(task, keys[0], examples)) for r in everyone
      )
      found[name] = [
        ours,
        np.mean(theirs, axis=0),
        *(paired_statistics.over_seeds(own.values(task, key, examples)) for key in keys[1:]),
      ]
  return found


def _grid(records):
  rosters = [r for r in records if "tuned_for" in r]
  return (
    {(r["tuned_for"], r["task"]): r for r in rosters},
    list(dict.fromkeys(r["task"] for r in rosters)),
  )


def table(records: list[dict]) -> str:
  of, tasks = _grid(records)
  parts = []
  for title, of_plain, places, digits in (
    ("Right, difference to plain, points", "quality", 1, 1),
    ("Perplexity, difference to plain, both at fitted T, %", "fitted", 2, 4),
  ):
    rows = [
      [
        s,
        *(
          ("**{}**" if s == t else "{}").format(
            compared.cell(of[s, t][f"{of_plain}_difference"], places, True)
          )
          for t in tasks
        ),
      ]
      for s in [*tasks, UNIFORM]
    ]
    rows.append(
      ["plain, its own value", *(compared.cell(of[PLAIN, t][of_plain], digits) for t in tasks)]
    )
    parts.append(
      f"{title}; rows: tuned for, columns: used on.\n\n" + report_page.table(["", *tasks], rows)
    )
  own = [r for r in records if r.get("own")]
  if own:
    parts.append(
      "A task's own profile against the mean of the others'.\n\n"
      + report_page.table(
        ["task", "right, points", "perplexity at fitted T, %"],
        [
          [
            r["task"],
            compared.cell(r["quality_difference"], 1, True),
            compared.cell(r["fitted_difference"], 2, True),
          ]
          for r in own
        ],
      )
    )
  return "\n\n".join([*parts, compared.NOTE])


def findings(records: list[dict]) -> str:
  told = [
    compared.clear(
      [
        r | {"label": f"τ of {r['tuned_for']}"}
        for r in records
        if r.get("tuned_for", PLAIN) != PLAIN
      ],
      "quality_difference",
      "task results",
      " points",
    )
  ]
  own = [r for r in records if r.get("own")]
  for name, what, unit, places, sign in (
    ("quality_difference", "results", " points", 1, 1),
    ("fitted_difference", "perplexity at fitted output temperatures", " %", 2, -1),
  ):
    had = [r for r in own if r[name]]
    if had:
      *single, pooled = [r[name] for r in had]
      clear = [sign * d["value"] > 0 for d in single if d["clear"]]
      verdict = (
        "no clear difference"
        if not pooled["clear"]
        else "clearly better"
        if sign * pooled["value"] > 0
        else "clearly worse"
      )
      told.append(
        f"A task's own profile against the mean of the others', in {what}: {verdict} over all "
        f"tasks ({report_page.difference(compared.read(pooled), places, unit)}); after Holm's "
        f"correction clearly better on {sum(clear)} of {report_page.count(len(single), 'task')}, worse "
        f"on {len(clear) - sum(clear)}."
      )
  return " ".join(told)


def draw(records: list[dict]):
  of, tasks = _grid(records)
  sources = [*tasks, UNIFORM]
  panels = [
    ("quality_difference", "right, difference to plain (points)", 1),
    ("fitted_difference", "perplexity at fitted T,\ndifference to plain (%)", 2),
  ]
  size = 1.6 + 0.62 * len(tasks)
  figure, axes = drawing.axes(2, width=size + 1.2, height=size * 0.9)
  for (name, title, places), axis in zip(panels, axes[0]):
    cells = [[compared.read(of[s, t][name]) for t in tasks] for s in sources]
    grid = np.array([[d.value if d else np.nan for d in row] for row in cells])
    top = max(np.nanmax(np.abs(grid), initial=0.0), 1e-9)
    image = axis.imshow(grid, cmap="Greys", vmin=-top, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
      if np.isfinite(value):
        clear = of[sources[row], tasks[column]][name]["clear"]
        axis.text(
          column,
          row,
          f"{value:+.{places}f}" + "*" * clear,
          ha="center",
          va="center",
          fontsize=7,
          color="white" if value > 0.3 * top else "black",
          fontweight="bold" if row == column else "normal",
        )
    axis.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right", fontsize=7)
    axis.set_yticks(range(len(sources)), sources, fontsize=7)
    axis.set_xlabel("used on")
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, label=title, pad=0.02)
  axes[0, 0].set_ylabel("tuned for")
  figure.suptitle("bold: a task's own τ; *: clear after Holm's correction", fontsize=8)
  return figure
