"""Answers that are saved at once, with their costs.

A killed program resumes, and ends with the same answers and costs, up to rounding and seconds.
Only process 0 writes the file.
"""

from collections.abc import Callable, Iterable, Sequence
import hashlib
import pathlib
from typing import Any

from experiments import tasks
from experiments.cli import app, text_files
from experiments.evaluation.engine import Engine
from experiments.evaluation.requests import Request, key
from experiments.records import store
from experiments.records.cost import Cost


class Answers:
  """Answers by request, in a JSON lines file whose first line has the settings.

  An answer is what `to_json` of `Likelihood` and `Generated` returns.
  """

  def __init__(self, path: pathlib.Path | None = None, settings: dict[str, Any] | None = None):
    """Opens the file; without a path, answers stay in memory."""
    kinds = {"key": str, "answer": dict}
    self._store = store.Store(path, lambda r: r["key"], settings, kinds=kinds, header=True)

  @classmethod
  def of(cls, folder: pathlib.Path, settings: dict[str, Any]) -> "Answers":
    """Opens the answers for `settings` in a folder that several settings share."""
    digest = hashlib.sha256(text_files.to_json(settings, sort_keys=True).encode()).hexdigest()
    return cls(folder / f"{digest[:16]}.jsonl", settings)

  def __contains__(self, request: Request) -> bool:
    return key(request) in self._store.records

  def __getitem__(self, request: Request) -> dict[str, Any]:
    return self._store.records[key(request)]["answer"]

  def complete(
    self,
    engine: Engine,
    requests: Sequence[Request],
    on_answered: Callable[[int], object] = lambda count: None,
  ) -> list[dict[str, Any]]:
    """Returns the answers in the order of the requests; `engine` gives those that are missing.

    Args:
      engine: an engine with the settings of this file.
      requests: the requests.
      on_answered: called with the number of unique requests that already have an answer, and
        then whenever more are answered.

    Raises:
      ValueError: the requests differ between processes.
    """
    app.check_same(list(map(key, requests)), tasks.OTHER_DATA)
    known = {r for r in set(requests) if r in self}
    on_answered(len(known))

    def keep(some):
      self._store.add({"key": key(r), "answer": answer.to_json()} for r, answer in some.items())
      on_answered(len(some))

    engine.answer(requests, known=known, on_answers=keep)
    return [self[r] for r in requests]

  def cost(self, requests: Iterable[Request]) -> Cost:
    """Returns the cost of unique requests."""
    return sum((Cost(**self[r]["cost"]) for r in dict.fromkeys(requests)), Cost())

  def experts_read(self, engine: Engine, requests: Sequence[Request]) -> Cost:
    """Returns `Engine.experts_read` of answered requests."""
    return engine.experts_read(requests, [self[r].get("generated", ()) for r in requests])
