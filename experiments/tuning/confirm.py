"""What is left of a tuned profile on fresh problems and with fresh noise.

The best of many trials is the best on its examples with its noise: part of that
is luck. So the winner, the best τ of the sweep and the plain model are measured
again, on examples of the validation split that no trial saw and with noise seeds
that no trial used, as runs (see `runs`) that are paired by example.

A roster lowers perplexity in part because it makes distributions flatter, which
one output temperature does as well. So perplexities are compared at fitted output
temperatures, too, each fitted on the examples of the search.
"""

from collections.abc import Callable, Sequence
import dataclasses
import pathlib
import time
from typing import Any

import numpy as np
import tabulate

from experiments.analysis import paired_statistics
from experiments.cli import app
from experiments.records import runs
from experiments.tuning.objectives import Objective, Perplexity
from roe_jax.params import Params
from roe_jax.roster import Roster

OUTPUT_TEMPERATURES = np.geomspace(0.25, 4.0, 13)
PLAIN, TUNED, UNIFORM = "plain", "tuned", "uniform"


@dataclasses.dataclass(frozen=True)
class Candidate:
  """What is measured.

  Attributes:
    name: `PLAIN`, `TUNED` or `UNIFORM`.
    roster: made from a noise seed.
    seeds: noise seeds; one for the plain model, which has no noise.
  """

  name: str
  roster: Callable[[int], Roster]
  seeds: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Measured:
  """What a candidate came to; empty in all processes but the first.

  Attributes:
    metrics: `[X]` means over seeds of each metric.
    costs: of its run, summed.
  """

  metrics: dict[str, np.ndarray]
  costs: dict[str, float]


def measure(
  params: Params,
  candidate: Candidate,
  searched: Objective,
  fresh: Objective,
  batches: Sequence[slice],
  task: str,
  folder: pathlib.Path,
  settings: dict[str, Any],
  on_batch: Callable[[], None] = lambda: None,
) -> Measured:
  """Measures a candidate on the fresh examples, as the run `folder`/name.

  Args:
    params: the model's parameters.
    candidate: the roster.
    searched: the objective on the examples of the search.
    fresh: on the fresh ones.
    batches: the fresh examples in stretches.
    task: its name.
    folder: of the runs.
    settings: of the run, beside those of the candidate.
    on_batch: called after each batch of each seed.
  """
  rosters = {seed: candidate.roster(seed) for seed in candidate.seeds}
  settings |= {
    "method": "plain" if candidate.name == PLAIN else "roster",
    "roster": rosters[candidate.seeds[0]].settings(),
    "seeds": list(candidate.seeds),
  }
  fits = isinstance(fresh, Perplexity)
  if fits:
    nll = searched.nll(
      params, rosters[candidate.seeds[0]], slice(0, len(searched.examples)), OUTPUT_TEMPERATURES
    )
    settings["output_temperature"] = paired_statistics.fit_output_temperature(
      nll, OUTPUT_TEMPERATURES
    )
    # As many output temperatures as above, so that nothing is compiled again.
    both = np.full(len(OUTPUT_TEMPERATURES), settings["output_temperature"])
    both[0] = 1.0
  run = runs.Run(folder / candidate.name, candidate.name, settings)
  for seed, roster in rosters.items():
    for batch in batches:
      ids = [e.id for e in fresh.examples[batch]]
      if not all((task, i, seed) in run.done for i in ids):
        begin = time.perf_counter()
        if fits:
          nll, cost = fresh.nll(params, roster, batch, both), fresh.cost(roster, batch)
          metrics = [
            {"nll": float(n[0]), "fitted_nll": float(n[1]), "tokens": int(tokens)}
            for n, tokens in zip(nll, fresh.tokens[batch])
          ]
        else:
          values, cost = fresh.measure(params, roster, batch)
          metrics = [{fresh.metric: float(v)} for v in values]
        run.write(
          [{"task": task, "example": i, "seed": seed, "metrics": m} for i, m in zip(ids, metrics)],
          {
            "task": task,
            "seed": seed,
            **dataclasses.asdict(cost),
            "seconds": time.perf_counter() - begin,
          },
        )
      on_batch()
  costs = run.finish()["costs"]
  if not app.is_first_process():
    return Measured({}, {})
  return Measured(by_example(folder / candidate.name, [e.id for e in fresh.examples]), costs)


def by_example(path: pathlib.Path, examples: Sequence[str]) -> dict[str, np.ndarray]:
  """`[X]` means over seeds of each metric of a run, in the order of the examples."""
  found: dict[str, dict[str, list[float]]] = {}
  for record in runs.load(path)[1]:
    for name, value in record["metrics"].items():
      found.setdefault(name, {}).setdefault(record["example"], []).append(value)
  return {name: np.array([np.mean(values[e]) for e in examples]) for name, values in found.items()}


def compare(measured: dict[str, dict[str, np.ndarray]], fresh: Objective) -> list[dict[str, Any]]:
  """Differences between the candidates, paired by example, as JSON values.

  Each has "of", "to", "fitted" (whether at fitted output temperatures), "value",
  "low" and "high" (percent of the perplexity, or percentage points) and "clear".
  """
  results = []
  for of, to in ((TUNED, PLAIN), (UNIFORM, PLAIN), (TUNED, UNIFORM)):
    if of not in measured or to not in measured:
      continue
    for metric in ("nll", "fitted_nll") if isinstance(fresh, Perplexity) else (fresh.metric,):
      a, b = measured[of][metric], measured[to][metric]
      difference = (
        paired_statistics.paired_perplexity(a, b, fresh.tokens)
        if isinstance(fresh, Perplexity)
        else paired_statistics.paired_accuracy(a, b)
      )
      results.append(
        {
          "of": of,
          "to": to,
          "fitted": metric == "fitted_nll",
          **dataclasses.asdict(difference),
          "clear": difference.is_significant,
        }
      )
  return results


def values(measured: dict[str, dict[str, np.ndarray]], fresh: Objective) -> dict[str, Any]:
  """The objective of each candidate, and for perplexities that at a fitted output temperature."""
  fits = isinstance(fresh, Perplexity)
  return {
    name: {"value": fresh.value(m["nll" if fits else fresh.metric])}
    | ({"fitted": fresh.value(m["fitted_nll"])} if fits else {})
    for name, m in measured.items()
  }


def told(confirmed: dict[str, Any], objective: str) -> str:
  """The confirmation as a table, and what follows from it in a sentence or two."""

  def interval(of, to, fitted=False):
    for d in confirmed["differences"]:
      if (d["of"], d["to"], d["fitted"]) == (of, to, fitted):
        return f"{d['value']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]" + " *" * d["clear"]
    return ""

  fits = objective == Perplexity.name
  unit = "%" if fits else "points"
  headers = [objective, f"to plain, {unit}", f"to best uniform τ, {unit}"]
  if fits:
    headers += ["at fitted output T", "to plain there, %"]
  rows = []
  for name, value in confirmed["values"].items():
    row = [name, f"{value['value']:.4f}", interval(name, PLAIN), interval(name, UNIFORM)]
    if fits:
      row += [f"{value['fitted']:.4f}", interval(name, PLAIN, True)]
    rows.append(row)
  table = tabulate.tabulate(rows, headers=["", *headers], tablefmt="github", disable_numparse=True)
  sentences = [_sentence(confirmed, TUNED, PLAIN, objective)]
  if UNIFORM in confirmed["values"]:
    sentences.append(_sentence(confirmed, TUNED, UNIFORM, objective))
  if fits:
    sentences.append(_sentence(confirmed, TUNED, PLAIN, objective, fitted=True))
  return f"{table}\n\n" + " ".join(sentences)


def _sentence(confirmed, of, to, objective, fitted=False):
  difference = next(
    d for d in confirmed["differences"] if (d["of"], d["to"], d["fitted"]) == (of, to, fitted)
  )
  names = {PLAIN: "the plain model", UNIFORM: "the best uniform τ", TUNED: "the tuned profile"}
  lower_is_better = objective == Perplexity.name
  where = " with output temperatures fitted to both" if fitted else ""
  if not difference["clear"]:
    return f"No clear difference in {objective} between {names[of]} and {names[to]}{where}."
  better = (difference["value"] < 0) == lower_is_better
  return (
    f"{names[of].capitalize()} is clearly {'better' if better else 'worse'} than {names[to]}"
    f"{where}."
  )
