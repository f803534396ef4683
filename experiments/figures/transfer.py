"""Transfer: τ tuned for one task, used on another.

    python -m experiments.reproduce --figure=transfer --model=olmoe --data_dir=data --allow_code_execution

Each task's profile (from the searches of `fig7`, `fig8` and `fig9`) on test examples of
every task, and one uniform τ; differences to the plain model, paired by example. And the
question itself: is a task's own profile better than the others' on average? Its reviewers
asked for this.

    model      checkpoint (see models.py)              hardware               time beside the searches
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       45 minutes
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    100 minutes
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     50 minutes
    embedded   ships with the package                  one CPU core           4 minutes

Times of the first three are estimated with roe_jax.costs (H100), not measured.
"""

import dataclasses

import numpy as np

from experiments import drawing, statistics
from experiments.figures import compared, searches
from experiments.figures.work import Command, Work
from experiments.reporting import page
from experiments.reporting.results import FITTED_NLL, TOKENS, quality_metric

TITLE = "Transfer of τ between tasks"
SAW = ("Its reviewers asked how temperatures transfer between tasks; the paper tunes each "
       "task's own.")
UNIFORM = "one τ for all"


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
    "embedded": Config(examples=60)}


def _methods(work):
  """{what τ was tuned for: the method}."""
  return {task: f"roster:profile={work.profile(task)}" for task in work.model.tasks} | {
      UNIFORM: f"roster:t={work.model.temperature:g}"}


def commands(work: Work) -> list[Command]:
  return searches.commands(work, work.model.tasks) + [work.compare(
      "transfer", list(work.model.tasks), ["plain", *_methods(work).values()],
      limit=work.config.examples, num_seeds=work.config.seeds)]


def measure(work: Work) -> list[dict]:
  results = work.compared("transfer")
  tuned_for = {method: source for source, method in _methods(work).items()}
  found = [r | {"tuned_for": tuned_for[r["method"]]}
           for r in compared.records(list(results.values()), results["plain"])
           if r["method"] != "plain"]
  for task in work.model.tasks:
    rosters = {s: results[m] for s, m in _methods(work).items() if s != UNIFORM}
    others = [r for s, r in rosters.items() if s != task]
    if others:
      found.append({"own": True, "task": task, **_own(rosters[task], others, task)})
  return found


def _own(own, others, task):
  """The own profile against the mean of the others', by example."""
  metric = quality_metric([own, *others], task)
  found = {}
  for name, keys in (("quality", [metric]), ("fitted", [FITTED_NLL, TOKENS])):
    examples = own.examples(task, *keys)
    if not examples:
      continue
    ours, *theirs = (statistics.over_seeds(r.values(task, keys[0], examples))
                     for r in (own, *others))
    theirs = np.mean(theirs, axis=0)
    found[name] = compared.estimate(
        statistics.paired_accuracy(ours, theirs) if name == "quality" else
        statistics.paired_perplexity(ours, theirs, own.values(task, TOKENS, examples).reshape(
            len(examples), -1)[:, 0]))
  return found


def _grid(records):
  rosters = [r for r in records if "tuned_for" in r]
  return {(r["tuned_for"], r["task"]): r for r in rosters}, list(
      dict.fromkeys(r["tuned_for"] for r in rosters)), list(dict.fromkeys(r["task"] for r in rosters))


def table(records: list[dict]) -> str:
  of, sources, _ = _grid(records)
  tasks = [s for s in sources if s != UNIFORM]
  parts = []
  for title, measure_, places in (("Right, difference to plain, points", "quality_difference", 1),
                                  ("Perplexity, difference to plain, both at fitted T, %",
                                   "fitted_difference", 2)):
    rows = [[s, *(("**{}**" if s == t else "{}").format(
        compared.cell(of[s, t][measure_], places, True)) for t in tasks)] for s in sources]
    parts.append(f"{title}; rows: tuned for, columns: used on.\n\n"
                 + page.table(["", *tasks], rows))
  own = [r for r in records if r.get("own")]
  if own:
    parts.append("A task's own profile against the mean of the others'.\n\n" + page.table(
        ["task", "right, points", "perplexity at fitted T, %"],
        [[r["task"], compared.cell(r.get("quality"), 1, True), compared.cell(r.get("fitted"), 2, True)]
         for r in own]))
  return "\n\n".join([*parts, compared.NOTE])


def findings(records: list[dict]) -> str:
  own = [r for r in records if r.get("own")]
  better = [r["task"] for r in own if (
      (q := compared.read(r.get("quality"))) and q.low > 0) or (
      (f := compared.read(r.get("fitted"))) and f.high < 0)]
  worse = [r["task"] for r in own if (
      (q := compared.read(r.get("quality"))) and q.high < 0) or (
      (f := compared.read(r.get("fitted"))) and f.low > 0)]
  rosters = [r | {"label": f"τ of {r['tuned_for']}"} for r in records if "tuned_for" in r]
  return (f"By intervals that are not corrected for their number, a task's own profile is better than "
          f"those of other tasks, in results or perplexity, on {len(better)} of {len(own)} tasks"
          + (f" ({', '.join(better)})" if better else "")
          + f", and worse on {len(worse)}" + (f" ({', '.join(worse)})" if worse else "") + ". "
          + compared.clear(rosters, "quality_difference", "task results", " points"))


def draw(records: list[dict]):
  of, sources, _ = _grid(records)
  tasks = [s for s in sources if s != UNIFORM]
  panels = [("quality_difference", "right, difference to plain (points)", 1),
            ("fitted_difference", "perplexity at fitted T,\ndifference to plain (%)", 2)]
  size = 1.6 + 0.62 * len(tasks)
  figure, axes = drawing.axes(2, width=size + 0.9, height=size * 0.9)
  for (measure_, title, places), axis in zip(panels, axes[0]):
    grid = np.array([[of[s, t][measure_]["value"] if of[s, t][measure_] else np.nan
                      for t in tasks] for s in sources])
    top = max(np.nanmax(np.abs(grid)), 1e-9)
    image = axis.imshow(grid, cmap="Greys", vmin=-top, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
      if np.isfinite(value):
        d = of[sources[row], tasks[column]][measure_]
        alone = compared.read(d).is_clear
        axis.text(column, row, f"{value:+.{places}f}" + ("*" if alone else ""), ha="center",
                  va="center", fontsize=7, color="white" if value > 0.3 * top else "black",
                  fontweight="bold" if sources[row] == tasks[column] else "normal")
    axis.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right", fontsize=7)
    axis.set_yticks(range(len(sources)), sources, fontsize=7)
    axis.set_xlabel("used on")
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, label=title, pad=0.02)
  axes[0, 0].set_ylabel("tuned for")
  figure.suptitle("bold: a task's own τ; *: the interval of this cell alone leaves out zero",
                  fontsize=8)
  return figure
