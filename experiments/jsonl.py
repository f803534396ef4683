"""JSON lines in, JSON lines out, going on where an earlier run stopped."""

from collections.abc import Sequence
import json
import pathlib
import sys
from typing import Any

from experiments import app


def read(path: str | None) -> list[dict[str, Any]]:
  """The JSON objects of a file, or of standard input for None or "-".

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line is not a JSON object, or there is none.
  """
  if path in (None, "-"):
    lines = sys.stdin.read().splitlines()
  elif pathlib.Path(path).is_file():
    lines = pathlib.Path(path).read_text().splitlines()
  else:
    raise FileNotFoundError(f"input file {path} does not exist")
  return parse(lines)


def parse(lines: Sequence[str]) -> list[dict[str, Any]]:
  """As `read`, from lines; blank ones are skipped."""
  requests = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      request = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(f"input line {number} is not valid JSON: {error}") from error
    if not isinstance(request, dict):
      raise ValueError(f"input line {number} must be a JSON object, got {line.strip()[:60]}")
    requests.append(request)
  if not requests:
    raise ValueError("the input holds no line")
  return requests


def tokens_of(request: dict[str, Any], name: str, encode, what: str) -> list[int]:
  """Token ids of a request: of its text `name`, or its ids `name + "_tokens"`.

  Raises:
    ValueError: neither is there.
  """
  ids = request.get(f"{name}_tokens")
  if isinstance(ids, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in ids):
    return ids
  if isinstance(request.get(name), str):
    return encode(request[name])
  raise ValueError(
      f"{what} must have \"{name}\" (text) or \"{name}_tokens\" (a list of integer ids)")


class Results:
  """Results in the order of their requests, one line each.

  Requests whose results the file already holds need not be computed again. A
  line that an interrupted run left torn is cut off.

  Attributes:
    finished: how many results were there at the start.
  """

  _KEYS = ("id", "prompt", "continuation", "prompt_tokens", "continuation_tokens")

  def __init__(self, path: str | None, requests: Sequence[dict[str, Any]],
               settings: dict[str, Any]):
    """Opens `path`, or standard output for None.

    Raises:
      ValueError: the file holds results of other requests or settings.
    """
    self._requests = requests
    self._settings = json.loads(json.dumps(settings))
    self.finished = self._finished(pathlib.Path(path)) if path else 0
    if path:
      pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    self._file = open(path, "a") if path else sys.stdout
    self._next = self.finished
    if self.finished:
      print(f"[{path} already holds {self.finished} of {len(requests)} results]",
            file=sys.stderr)

  def _head(self, request):
    return {k: request[k] for k in self._KEYS if k in request}

  def _finished(self, path):
    if not path.exists():
      return 0
    whole, _, torn = path.read_text().rpartition("\n")
    refusal = (f"{path} holds results of other requests or settings: name another file, or "
               "remove it")
    try:
      results = [json.loads(line) for line in whole.splitlines()]
      same = len(results) <= len(self._requests) and all(
          result["settings"] == self._settings and self._head(result) == self._head(request)
          for result, request in zip(results, self._requests))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
      raise ValueError(refusal) from error
    if not same:
      raise ValueError(refusal)
    if torn:
      app.write_atomically(path, whole + "\n" if whole else "")
    return len(results)

  def write(self, records: Sequence[dict[str, Any]]) -> None:
    """Appends the next results and makes them visible to readers."""
    for record in records:
      head = self._head(self._requests[self._next])
      self._file.write(json.dumps(head | record | {"settings": self._settings}) + "\n")
      self._next += 1
    self._file.flush()

  def __enter__(self) -> "Results":
    return self

  def __exit__(self, *exception) -> None:
    if self._file is not sys.stdout:
      self._file.close()
