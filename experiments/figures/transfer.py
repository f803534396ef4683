"""Transfer: τ tuned for one task, used on another.

    python -m experiments.reproduce --figure=transfer --model=olmoe --data_dir=data \\
        --allow_code_execution

Each task's temperature profile (from the searches of fig7, fig8 and fig9) and one uniform τ on
test examples of every task, as differences from the baseline, paired by example. And the
question itself: is a task's own profile better than the mean of the others', on each task and
over the examples of all?
"""

import dataclasses

import numpy as np

from experiments.analysis import drawing, paired_statistics, report_page
from experiments.analysis.run_results import FITTED_NLL, TOKENS, Result, quality_metric
from experiments.evaluation.methods import Baseline, RosterOf, Spec, read
from experiments.figures import compared, figure_models, searches
from experiments.figures.figure_run import Command, FigureRun

TITLE = "Transfer of τ between tasks"
BACKGROUND = (
  "Its reviewers asked how temperatures transfer between tasks; the paper tunes each task's own."
)
BASELINE, UNIFORM, ALL = "baseline", "one τ for all", "all tasks"


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    num_examples: of each task's test split.
    num_seeds: noise seeds.
  """

  num_examples: int = 100
  num_seeds: int = 1


CONFIGS = figure_models.configs(Config(), embedded=Config(num_examples=60))


def _methods(run) -> dict[Spec, str]:
  """Returns {method: the task that τ was tuned for, or what else it is}."""
  profiles = {RosterOf(profile=str(run.profile(task))): task for task in run.model.tasks}
  return {Baseline(): BASELINE, **profiles, RosterOf(t=run.model.tau): UNIFORM}


def commands(run: FigureRun) -> list[Command]:
  flags = dict(num_examples=run.config.num_examples, num_seeds=run.config.num_seeds)
  comparison = run.compare("transfer", list(run.model.tasks), list(_methods(run)), **flags)
  return [*searches.commands(run), comparison]


def measure(run: FigureRun) -> list[dict]:
  results, sources = run.compared("transfer"), _methods(run)
  found = compared.records([results[method] for method in sources], results[Baseline()])
  found = [r | {"tuned_for": sources[read(r["method"])]} for r in found]
  found.sort(key=lambda r: run.model.tasks.index(r["task"]))
  rosters = {s: results[m] for m, s in sources.items() if s not in (BASELINE, UNIFORM)}
  return found + own_and_others(rosters)


def own_and_others(rosters: dict[str, Result]) -> list[dict]:
  """Compares each task's own temperature profile with the mean of the others', by example.

  Args:
    rosters: {task tuned for: its run on all of these tasks}.

  Returns:
    A record per task, and one for the examples of all of them, with "own": True, "task",
    "quality_difference" (points) and "fitted_difference" (percent of the perplexity at fitted
    output temperatures), with Holm's correction over all records; none for a single task.
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
      difference = None
      if arrays:
        test = paired_statistics.paired_test(*arrays[:2])
        difference = paired_statistics.tested(compare(*arrays), test)
      record[f"{name}_difference"] = difference
    found.append(record)
  return compared.corrected(found)


def _pairs(rosters, task):
  """Returns {measure: `[X]` of the own profile, of the others' mean, and of tokens}."""
  own = rosters[task]
  everyone = [own, *(r for source, r in rosters.items() if source != task)]
  found = {}
  metric = quality_metric(everyone, task)
  for name, keys in (("quality", [metric]), ("fitted", [FITTED_NLL, TOKENS])):
    if examples := own.examples(task, *keys):
      ours, *theirs = (
        paired_statistics.over_seeds(r.values(task, keys[0], examples)) for r in everyone
      )
      tokens = [paired_statistics.over_seeds(own.values(task, key, examples)) for key in keys[1:]]
      found[name] = [ours, np.mean(theirs, axis=0), *tokens]
  return found


def _grid(records):
  rosters = [r for r in records if "tuned_for" in r]
  of = {(r["tuned_for"], r["task"]): r for r in rosters}
  return of, compared.unique(rosters, "task")


def table(records: list[dict]) -> str:
  of, tasks = _grid(records)
  parts = []
  for title, name, places, digits in (
    ("Task result, difference from baseline (points)", "quality", 1, 1),
    ("Perplexity, difference from baseline, both at fitted T (%)", "fitted", 2, 4),
  ):

    def cell(source, task, name=name, places=places, digits=digits):
      if source == BASELINE:
        return compared.cell(of[source, task][name], digits)
      text = compared.cell(of[source, task][f"{name}_difference"], places, True)
      return f"**{text}**" if source == task else text

    columns = {"": lambda s: "baseline, its own value" if s == BASELINE else s}
    columns |= {task: lambda s, task=task, cell=cell: cell(s, task) for task in tasks}
    rows = report_page.table_of([*tasks, UNIFORM, BASELINE], columns)
    parts.append(f"{title}; rows: tuned for, columns: used on.\n\n{rows}")
  if own := [r for r in records if r.get("own")]:
    columns = {
      "task": "task",
      "task result (points)": lambda r: compared.cell(r["quality_difference"], 1, True),
      "perplexity at fitted T (%)": lambda r: compared.cell(r["fitted_difference"], 2, True),
    }
    rows = report_page.table_of(own, columns)
    parts.append(f"A task's own temperature profile against the mean of the others'.\n\n{rows}")
  return "\n\n".join([*parts, compared.NOTE])


def findings(records: list[dict]) -> str:
  others = [r for r in records if r.get("tuned_for", BASELINE) != BASELINE]
  labeled = [r | {"label": f"τ of {r['tuned_for']}"} for r in others]
  sentences = [compared.findings(labeled, ("quality",))]
  own = [r for r in records if r.get("own")]
  for name, what, unit, places, sign in (
    ("quality_difference", "task results", " points", 1, 1),
    ("fitted_difference", "perplexity at fitted output temperatures", " %", 2, -1),
  ):
    tested = [r[name] for r in own if r[name]]
    if tested:
      *single, pooled = tested
      wins = [sign * d.value > 0 for d in single if d.is_significant]
      verdict = "no significant difference"
      if pooled.is_significant:
        verdict = f"significantly {'better' if sign * pooled.value > 0 else 'worse'}"
      sentences.append(
        f"A task's own temperature profile against the mean of the others', in {what}: {verdict} "
        f"over all tasks ({report_page.difference(pooled, places, unit)}); after Holm's correction "
        f"significantly better on {sum(wins)} of {report_page.count(len(single), 'task')}, worse "
        f"on {len(wins) - sum(wins)}."
      )
  return " ".join(sentences)


def draw(records: list[dict]):
  of, tasks = _grid(records)
  sources = [*tasks, UNIFORM]
  panels = [("quality_difference", 1), ("fitted_difference", 2)]
  size = 1.6 + 0.62 * len(tasks)
  figure, axes = drawing.axes(2, width=size + 1.2, height=size * 0.9)
  for (name, places), axis in zip(panels, axes[0]):
    cells = [[of[s, t][name] for t in tasks] for s in sources]
    gains = [[compared.gain(of[s, t], name) for t in tasks] for s in sources]
    grid = np.array([[d.value if d else np.nan for d in row] for row in gains])
    top = max(np.nanmax(np.abs(grid), initial=0.0), 1e-9)
    image = axis.imshow(grid, cmap="Greys", vmin=-top, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
      if np.isfinite(value):
        style = dict(ha="center", va="center", fontsize=7)
        style["color"] = "white" if value > 0.3 * top else "black"
        style["fontweight"] = "bold" if row == column else "normal"
        star = "*" * cells[row][column].is_significant
        axis.text(column, row, f"{value:+.{places}f}{star}", **style)
    axis.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right", fontsize=7)
    axis.set_yticks(range(len(sources)), sources, fontsize=7)
    axis.set_xlabel("used on")
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, label=compared.GAINS[name], pad=0.02)
  axes[0, 0].set_ylabel("tuned for")
  figure.suptitle("bold: a task's own τ; *: significant after Holm's correction", fontsize=8)
  return figure
