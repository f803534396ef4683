"""Confirmation of a tuned temperature profile on fresh examples with fresh noise.

To rule out selection luck, the best trial, the best τ of the sweep and the baseline are
re-evaluated on validation examples that no trial saw and with noise seeds that no trial used,
as runs (see `runs`) paired by example.

A roster lowers perplexity in part because it flattens distributions, as one output temperature
does. Perplexities are therefore also compared at fitted output temperatures, each fitted on
the search examples.
"""

from collections.abc import Callable, Sequence
import dataclasses
import pathlib
from typing import Any

import numpy as np

from experiments.analysis import output_temperatures, paired_statistics
from experiments.analysis.paired_statistics import Contrast
from experiments.cli import app
from experiments.cli.extras import tabulate
from experiments.records import runs
from experiments.tuning.objectives import Objective, Perplexity
from roe_jax.params import Params
from roe_jax.roster import Roster

BASELINE, TUNED, UNIFORM = "baseline", "tuned", "uniform"


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A roster to evaluate.

  Attributes:
    name: `BASELINE`, `TUNED` or `UNIFORM`.
    roster: makes the roster of a noise seed.
    seeds: noise seeds; one for the baseline, which has no noise.
  """

  name: str
  roster: Callable[[int], Roster]
  seeds: Sequence[int]


def measure(
  params: Params,
  candidate: Candidate,
  searched: Objective,
  fresh: Objective,
  batches: Sequence[slice],
  task: str,
  folder: pathlib.Path,
  settings: dict[str, Any],
  on_batch: Callable[[], object] = lambda: None,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
  """Evaluates a candidate on the fresh examples, as the run `folder`/name.

  Args:
    params: the model's parameters.
    candidate: the roster.
    searched: the objective on the search examples.
    fresh: the objective on the fresh examples.
    batches: slices of the fresh examples.
    task: its name.
    folder: of the runs.
    settings: further settings of the run.
    on_batch: called after each batch of each seed.

  Returns:
    `[X]` means over seeds of each metric, and the run's total costs; both empty in all
    processes but the first.
  """
  rosters = {seed: candidate.roster(seed) for seed in candidate.seeds}
  settings |= {
    "method": "baseline" if candidate.name == BASELINE else "roster",
    "roster": rosters[candidate.seeds[0]].settings(),
    "seeds": list(candidate.seeds),
  }
  fits = isinstance(fresh, Perplexity)
  if fits:
    assert isinstance(searched, Perplexity)  # both have the same objective
    roster = rosters[candidate.seeds[0]]
    nll, _ = searched.nll(params, roster, slice(None), output_temperatures.GRID)
    settings["output_temperature"] = output_temperatures.fit(nll)
    both = output_temperatures.padded([1.0, settings["output_temperature"]])
  run = runs.Run(folder / candidate.name, candidate.name, settings)
  for seed, roster in rosters.items():
    for batch in batches:
      ids = [e.id for e in fresh.examples[batch]]
      if not all((task, i, seed) in run.done for i in ids):
        if fits:
          nll, cost = fresh.nll(params, roster, batch, both)
          metrics = [
            {"nll": float(n[0]), "fitted_nll": float(n[1]), "tokens": int(tokens)}
            for n, tokens in zip(nll, fresh.tokens[batch])
          ]
        else:
          values, cost = fresh.measure(params, roster, batch)
          metrics = [{fresh.metric: float(v)} for v in values]
        run.write(
          [{"task": task, "example": i, "seed": seed, "metrics": m} for i, m in zip(ids, metrics)],
          {"task": task, "seed": seed, **cost.line()},
        )
      on_batch()
  costs = run.finish()["costs"]
  if not app.is_first_process():
    return {}, {}
  return by_example(folder / candidate.name, [e.id for e in fresh.examples]), costs


def by_example(path: pathlib.Path, examples: Sequence[str]) -> dict[str, np.ndarray]:
  """Returns `[X]` means over seeds of each metric of a run, in the order of the examples."""
  found: dict[str, dict[str, list[float]]] = {}
  for record in runs.load(path)[1]:
    for name, value in record["metrics"].items():
      found.setdefault(name, {}).setdefault(record["example"], []).append(value)
  return {name: np.array([np.mean(values[e]) for e in examples]) for name, values in found.items()}


def compare(measured: dict[str, dict[str, np.ndarray]], fresh: Objective) -> list[Contrast]:
  """Returns differences between the candidates, with Holm's correction over all of them."""
  found = []
  for of, to in ((TUNED, BASELINE), (UNIFORM, BASELINE), (TUNED, UNIFORM)):
    if of not in measured or to not in measured:
      continue
    for metric in ("nll", "fitted_nll") if isinstance(fresh, Perplexity) else (fresh.metric,):
      a, b = measured[of][metric], measured[to][metric]
      difference = (
        paired_statistics.paired_perplexity(a, b, fresh.tokens)
        if isinstance(fresh, Perplexity)
        else paired_statistics.paired_accuracy(a, b)
      )
      difference = paired_statistics.tested(difference, paired_statistics.paired_test(a, b))
      found.append(Contrast(of, to, metric == "fitted_nll", difference))
  return corrected(found)


def corrected(found: Sequence[Contrast]) -> list[Contrast]:
  """Returns contrasts with Holm's correction over all of them."""
  differences = paired_statistics.corrected([c.difference for c in found])
  return [dataclasses.replace(c, difference=d) for c, d in zip(found, differences)]


def values(measured: dict[str, dict[str, np.ndarray]], fresh: Objective) -> dict[str, Any]:
  """Returns the objective of each candidate, for perplexity also at its fitted temperature."""
  fits = isinstance(fresh, Perplexity)
  metric = "nll" if fits else fresh.metric
  return {
    name: {"value": fresh.value(m[metric])}
    | ({"fitted": fresh.value(m["fitted_nll"])} if fits else {})
    for name, m in measured.items()
  }


def format_confirmation(confirmed: dict[str, Any], objective: str) -> str:
  """Formats the confirmation as a table, with its result in sentences."""

  differences = {c.kind: c.difference for c in map(Contrast.from_json, confirmed["differences"])}

  def interval(of, to, fitted=False):
    d = differences.get((of, to, fitted))
    return d and f"{d.value:+.2f} [{d.low:+.2f}, {d.high:+.2f}]" + " *" * d.is_significant

  fits = objective == Perplexity.name
  unit = "%" if fits else "points"
  headers = [objective, f"from baseline ({unit})", f"from best of the sweep ({unit})"]
  if fits:
    headers += ["at fitted output T", "from baseline, both at fitted T (%)"]
  rows = []
  for name, value in confirmed["values"].items():
    row = [name, f"{value['value']:.4f}", interval(name, BASELINE), interval(name, UNIFORM)]
    if fits:
      row += [f"{value['fitted']:.4f}", interval(name, BASELINE, True)]
    rows.append(row)
  table = tabulate.tabulate(rows, headers=["", *headers], tablefmt="github", disable_numparse=True)
  sentences = [_sentence(differences, TUNED, BASELINE, objective)]
  if UNIFORM in confirmed["values"]:
    sentences.append(_sentence(differences, TUNED, UNIFORM, objective))
  if fits:
    sentences.append(_sentence(differences, TUNED, BASELINE, objective, fitted=True))
  return f"{table}\n\n" + " ".join(sentences)


def _sentence(differences, of, to, objective, fitted=False):
  difference = differences[of, to, fitted]
  names = {BASELINE: "the baseline", UNIFORM: "the best of the sweep", TUNED: "the tuned roster"}
  lower_is_better = objective == Perplexity.name
  where = " at fitted output temperatures" if fitted else ""
  if not difference.is_significant:  # older profiles have no test
    return f"No significant difference in {objective} between {names[of]} and {names[to]}{where}."
  better = (difference.value < 0) == lower_is_better
  return (
    f"{names[of].capitalize()} is significantly {'better' if better else 'worse'} than "
    f"{names[to]}{where}."
  )
