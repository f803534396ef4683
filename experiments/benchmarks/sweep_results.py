"""Measured cases as records, and the folder that stores them."""

from collections.abc import Callable, Mapping, Sequence
import datetime
import json
import pathlib
from typing import Any

import numpy as np

from experiments.benchmarks import machine, timing
from experiments.benchmarks.sweeps import Case
from experiments.cli import text_files
from experiments.records import store

KEY = ("variant", "num_members", "temperature", "context", "batch_size")


def measure(
  cases: Sequence[Case],
  rounds: int,
  references: Mapping[str, tuple[Callable[[], None], float]],
  seed: int = 0,
  on_turn: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:
  """Times the cases of a sweep in turns and returns one record per case.

  Args:
    cases: the cases.
    rounds: number of rounds; slow cases skip some.
    references: for "bandwidth" a call that reads memory, and how many bytes; for "matmul_rate" one
      that multiplies matrices, and its FLOPs. The floor of a case is the larger of the times that
      its bytes and its FLOPs take at these rates in the same round.
    seed: seed for the order of turns.
    on_turn: see `timing.take_turns`.
  """
  calls = {name: timing.repeated(call) for name, (call, _) in references.items()}
  for case in cases:
    calls |= {str(id(call)): call.run for call, _ in case.parts}
  times = timing.take_turns(calls, rounds, seed, on_turn)
  rates = {name: amount / times[name] for name, (_, amount) in references.items()}
  seconds = {
    case.key: sum(weight * times[str(id(call))] for call, weight in case.parts) for case in cases
  }
  return [_record(case, seconds, rates) for case in cases]


def num_calls(cases: Sequence[Case]) -> int:
  """Returns the number of calls that take turns, those of bandwidth and matmuls included."""
  return 2 + len({id(call) for case in cases for call, _ in case.parts})


def _record(case, seconds, rates):
  own = seconds[case.key]
  low, median, high = timing.quartiles(own)
  record = (
    dict(zip(KEY, case.key))
    | case.options
    | {
      "rounds": int(np.sum(np.isfinite(own))),
      "seconds": median,
      "seconds_low": low,
      "seconds_high": high,
      "seconds_by_round": _plain(own),
      **{name: timing.quartiles(rate)[1] for name, rate in rates.items()},
      **{f"{name}_by_round": _plain(rate) for name, rate in rates.items()},
    }
  )
  if case.baseline is not None:
    record["baseline"] = dict(zip(KEY, case.baseline))
    record["to_baseline"] = timing.median_ratio(own, seconds[case.baseline])
  if case.unique_experts is not None:
    record["unique_experts"] = case.unique_experts
  if case.floor_bytes is not None:
    floor = np.maximum(
      case.floor_bytes / rates["bandwidth"], case.floor_flops / rates["matmul_rate"]
    )
    record |= {"floor_bytes": case.floor_bytes, "floor_flops": case.floor_flops}
    record["floor_seconds"] = timing.quartiles(floor)[1]
    record["to_floor"] = timing.median_ratio(own, floor)
  if case.tokens is not None:
    record["tokens_per_second"] = case.tokens / median
  return record | case.memory | machine.peaks()


def _plain(values):
  return [None if np.isnan(v) else float(v) for v in values]


class Folder:
  """Finished sweeps in `results.jsonl`, one line per case.

  The file is rewritten atomically after each sweep.
  """

  def __init__(self, path: pathlib.Path, settings: dict[str, Any]):
    """Reads the finished sweeps.

    Args:
      path: the folder.
      settings: flags and machine, stored in every line.

    Raises:
      ValueError: the folder holds results with other settings.
    """
    self._settings = json.loads(text_files.to_json(settings))
    kinds = {"sweep": str, "settings": dict}
    path = path / "results.jsonl"
    refusal = "does not have results of this run"
    self._store = store.Store(path, None, settings, kinds=kinds, check=self._check, refusal=refusal)

  def _check(self, lines):
    for other in (line["settings"] for line in lines):
      for name in {**other, **self._settings}:
        if other.get(name) != self._settings.get(name):
          raise ValueError(
            f"it holds results with {name} = {other.get(name)!r}, not {self._settings.get(name)!r}"
          )

  @property
  def records(self) -> list[dict[str, Any]]:
    """Records of all finished sweeps, in the order they ran."""
    return list(self._store.records.values())

  def has(self, sweep: str) -> bool:
    """Whether the sweep is finished."""
    return bool(self.of(sweep))

  def add(self, sweep: str, records: Sequence[dict[str, Any]]) -> None:
    """Adds the records of a finished sweep."""
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    also = {"date": date, "settings": self._settings}
    self._store.replace([*self.records, *({"sweep": sweep} | r | also for r in records)])

  def of(self, sweep: str) -> list[dict[str, Any]]:
    """Returns the records of one sweep."""
    return [record for record in self.records if record["sweep"] == sweep]
