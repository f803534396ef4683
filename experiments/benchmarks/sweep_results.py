"""Measured cases as records, and the folder that stores them."""

from collections.abc import Callable, Sequence
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
  bandwidth: Callable[[int], None],
  bandwidth_bytes: int,
  seed: int = 0,
  on_turn: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:
  """Times the cases of a sweep in turns and returns one record per case.

  Args:
    cases: the cases.
    rounds: number of rounds; slow cases skip some.
    bandwidth: a call for `timing.Timed` that reads memory.
    bandwidth_bytes: bytes it reads each time.
    seed: seed for the order of turns.
    on_turn: see `timing.take_turns`.
  """
  calls = {"": bandwidth}
  for case in cases:
    calls |= {str(id(call)): call.run for call, _ in case.parts}
  times = timing.take_turns(calls, rounds, seed, on_turn)
  rate = bandwidth_bytes / times[""]
  seconds = {
    case.key: sum(weight * times[str(id(call))] for call, weight in case.parts) for case in cases
  }
  return [_record(case, seconds, rate) for case in cases]


def num_calls(cases: Sequence[Case]) -> int:
  """Returns the number of calls that take turns, the bandwidth measurement included."""
  return 1 + len({id(call) for case in cases for call, _ in case.parts})


def _record(case, seconds, rate):
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
      "bandwidth": timing.quartiles(rate)[1],
      "bandwidth_by_round": _plain(rate),
    }
  )
  if case.baseline is not None:
    record["baseline"] = dict(zip(KEY, case.baseline))
    record["to_baseline"] = timing.median_ratio(own, seconds[case.baseline])
  if case.unique_experts is not None:
    record["unique_experts"] = case.unique_experts
  if case.floor_bytes is not None:
    record["floor_bytes"] = case.floor_bytes
    record["floor_seconds"] = timing.quartiles(case.floor_bytes / rate)[1]
    record["to_floor"] = timing.median_ratio(own, case.floor_bytes / rate)
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
