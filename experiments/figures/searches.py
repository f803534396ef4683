"""Records of figures that are made of searches of τ."""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
from typing import Any, ClassVar

from experiments.analysis import drawing, paired_statistics, pictures, report_page
from experiments.analysis.run_results import Tuning
from experiments.figures import compared
from experiments.figures.work import Command, Work
from experiments.tuning import confirm

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
  """Nothing of its own: tasks and budgets are the model's."""

  seeds: ClassVar[int] = 4  # of the trials, and three of the confirmation


CONFIGS = {name: Config() for name in ("olmoe", "mixtral", "gpt_oss", "embedded")}


def commands(work: Work, tasks: Sequence[str]) -> list[Command]:
  return [work.tune(task) for task in tasks]


def records(work: Work, tasks: Sequence[str]) -> list[Record]:
  """A record for each task.

  Each has "task" and "category"; "settings", "profile" and "trials" as tune wrote them; and
  "differences", those of the confirmation (see `confirm.compare`) with a paired test's "p",
  "adjusted" by Holm's correction, and "clear" by both.
  """
  found = []
  for task in tasks:
    search, folder = work.tuned(task), work.root / "tune" / task
    found.append(
      {
        "task": task,
        "category": work.model.category(task),
        "settings": json.loads((folder / "settings.json").read_text()),
        "profile": search.profile,
        "differences": _tested(folder / "confirm", search.profile),
        "trials": search.trials,
      }
    )
  return corrected(found)


def _tested(folder: pathlib.Path, profile):
  """The differences of a confirmation with p-values, from its runs."""
  confirmed = profile["objective"]["confirmed"]
  metrics = {
    name: confirm.by_example(folder / name, profile["data"]["confirmed"])
    for name in confirmed["values"]
  }
  found = []
  for d in confirmed["differences"]:
    name = next(
      m
      for m in ("fitted_nll" if d["fitted"] else "nll", *metrics[d["of"]])
      if m in metrics[d["of"]]
    )
    test = paired_statistics.paired_test(metrics[d["of"]][name], metrics[d["to"]][name])
    found.append(d | {"p": test.p})
  return found


def corrected(found: Sequence[Record]) -> list[Record]:
  """Records with Holm's correction over tasks, for each kind of difference."""
  kind = lambda d: (d["of"], d["to"], d["fitted"])
  tests = {}
  for r in found:
    for d in r["differences"]:
      tests.setdefault(kind(d), []).append(d["p"])
  adjusted = {k: iter(paired_statistics.holm(p)) for k, p in tests.items()}

  def told(d):
    p = next(adjusted[kind(d)])
    clear = p < paired_statistics.SIGNIFICANCE and compared.read(d).is_significant
    return d | {"adjusted": p, "clear": clear}

  return [r | {"differences": [told(d) for d in r["differences"]]} for r in found]


def tuning(record: Record) -> Tuning:
  """The search of a record."""
  return Tuning(record["task"], record["profile"], record["trials"])


def fresh(
  record: Record, of: str = confirm.TUNED, to: str = confirm.PLAIN, fitted: bool = False
) -> dict[str, Any] | None:
  """A difference of the confirmation on fresh examples; None: not there."""
  return next(
    (d for d in record["differences"] if (d["of"], d["to"], d["fitted"]) == (of, to, fitted)), None
  )


def searched_gain(record: Record) -> float:
  """The best trial against plain on the examples of the search: percent, or points."""
  objective = record["profile"]["objective"]
  if objective["name"] == "perplexity":
    return 100 * (objective["value"] / objective["plain"] - 1)
  return 100 * (objective["value"] - objective["plain"])


def table(found: Sequence[Record]) -> str:
  """Plain, the best trial, and what of it was found on fresh examples."""
  rows = []
  for r in found:
    objective, cost = r["profile"]["objective"], r["profile"]["cost"]
    rows.append(
      [
        r["task"],
        objective["name"],
        f"{objective['plain']:.4f}",
        f"{objective['value']:.4f}",
        f"{searched_gain(r):+.2f}",
        compared.cell(fresh(r), 2, True),
        compared.cell(fresh(r, fitted=True), 2, True),
        cost["trials"],
        cost["pruned"],
        " ".join(f"{t:.2f}" for t in r["profile"]["temperatures"]),
      ]
    )
  return (
    report_page.table(
      [
        "task",
        "objective",
        "plain",
        "best trial",
        "to plain, searched",
        "to plain, fresh",
        "there at fitted T",
        "trials",
        "pruned",
        "τ by layer",
      ],
      rows,
    )
    + "\n\n"
    + NOTE
  )


NOTE = (
  "Differences in % of the perplexity or points of accuracy; fresh: on examples that no "
  "trial saw, with noise seeds that none used, 95 % intervals; * is clear after Holm's "
  "correction over the column."
)


def gained(record: Record) -> bool:
  """Whether the best trial is better than the plain model on the examples of the search."""
  gain = searched_gain(record)
  return gain < 0 if record["profile"]["objective"]["name"] == "perplexity" else gain > 0


def findings(found: Sequence[Record]) -> str:
  """How many gains of a search are there on fresh examples."""
  gains = [r for r in found if gained(r)]
  kept = [
    r for r in gains if (d := fresh(r))["clear"] and (d["value"] < 0) == (searched_gain(r) < 0)
  ]
  return (
    f"On the examples of the search the best trial is better than the plain model on "
    f"{len(gains)} of {report_page.count(len(found), 'task')}; on fresh ones this is clear on "
    f"{len(kept)}" + (f" ({', '.join(r['task'] for r in kept)})." if kept else ".")
  )


def draw(found: Sequence[Record]):
  """Trials in their order, a panel for each task."""
  columns = min(3, len(found))
  figure, axes = drawing.axes(columns, -(-len(found) // columns), width=3.6, height=3.0)
  for r, axis in zip(found, axes.flat):
    pictures.trials(axis, tuning(r))
    axis.set_title(r["task"], fontsize=9)
  for axis in axes.flat[len(found) :]:
    axis.set_visible(False)
  named = max(axes.flat[: len(found)], key=lambda a: len(a.get_legend_handles_labels()[1]))
  drawing.legend(figure, named)
  return figure
