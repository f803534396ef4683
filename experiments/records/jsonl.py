"""JSON lines in, JSON lines out, going on where an earlier run stopped."""

from collections.abc import Callable, Sequence
import json
import os
import pathlib
import sys
from typing import Any

from experiments.cli import app


def read(path: str | None) -> list[dict[str, Any]]:
  """The JSON objects of a file, or of standard input for None or "-", as process 0 sees them.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line is not a JSON object, or there is none.
  """
  return app.from_first_process(lambda: parse(_lines(path)))


def _lines(path):
  if path in (None, "-"):
    return sys.stdin.read().splitlines()
  if pathlib.Path(path).is_file():
    return pathlib.Path(path).read_text().splitlines()
  raise FileNotFoundError(f"input file {path} does not exist")


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
  raise ValueError(f'{what} must have "{name}" (text) or "{name}_tokens" (a list of integer ids)')


class Results:
  """Results of requests, one line each with the request's "index".

  Results may come in any order. A file gets each line as it comes, and when all
  are there is put in the order of the requests: in the end it is the same file,
  whatever order they came in and however often the work was interrupted.
  Requests whose results the file already holds need not be computed again; a
  line that an interrupted run left torn is cut off. To standard output a line
  is printed as soon as all before it are. Of several processes the first one
  alone touches the file; all know what is in it.
  """

  _KEYS = ("id", "prompt", "messages", "continuation", "prompt_tokens", "continuation_tokens")

  def __init__(
    self, path: str | None, requests: Sequence[dict[str, Any]], settings: dict[str, Any]
  ):
    """Opens `path`, or standard output for None.

    Raises:
      ValueError: the file holds results of other requests or settings.
    """
    self._requests = requests
    self._settings = json.loads(json.dumps(settings))
    self._path = pathlib.Path(path) if path else None
    # In the order of their lines.
    self._written = app.from_first_process(self._found) if path else []
    self._held: dict[int, str] = {}  # lines for which standard output is not ready
    self._file = self._open() if path else sys.stdout
    if self._written:
      print(
        f"[{path} already holds {len(self._written)} of {len(requests)} results]", file=sys.stderr
      )

  def _open(self):
    if not app.is_first_process():
      return open(os.devnull, "a")
    self._path.parent.mkdir(parents=True, exist_ok=True)
    return self._path.open("a")

  @property
  def missing(self) -> list[int]:
    """Indices of the requests whose results are not there yet."""
    there = self._held.keys() | set(self._written)
    return [i for i in range(len(self._requests)) if i not in there]

  def _head(self, index):
    request = self._requests[index]
    return {"index": index} | {k: request[k] for k in self._KEYS if k in request}

  def _found(self):
    """Indices of the results in the file, in its order."""
    if not self._path.exists():
      return []
    whole, _, torn = self._path.read_text().rpartition("\n")
    refusal = (
      f"{self._path} holds results of other requests or settings: name another file, or remove it"
    )
    try:
      results = [json.loads(line) for line in whole.splitlines()]
      indices = [result["index"] for result in results]
      same = len(set(indices)) == len(indices) and all(
        type(i) is int
        and 0 <= i < len(self._requests)
        and result["settings"] == self._settings
        and {k: result[k] for k in ("index", *self._KEYS) if k in result} == self._head(i)
        for i, result in zip(indices, results)
      )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
      raise ValueError(refusal) from error
    if not same:
      raise ValueError(refusal)
    if torn:
      app.write_atomically(self._path, whole + "\n" if whole else "")
    return indices

  def write(self, index: int, record: dict[str, Any]) -> None:
    """Takes the result of request `index`, and makes visible to readers what can be."""
    line = json.dumps(self._head(index) | record | {"settings": self._settings}) + "\n"
    if self._path:
      self._print(index, line)
    else:
      self._held[index] = line
      while len(self._written) in self._held:
        self._print(len(self._written), self._held.pop(len(self._written)))
    self._file.flush()

  def _print(self, index, line):
    self._file.write(line)
    self._written.append(index)

  def __enter__(self) -> "Results":
    return self

  def __exit__(self, *exception) -> None:
    if self._path is None:
      # After an interruption: what was computed is not lost.
      for index in sorted(self._held):
        self._print(index, self._held[index])
      self._file.flush()
      return
    self._file.close()
    if app.is_first_process() and not self.missing and self._written != sorted(self._written):
      lines = dict(zip(self._written, self._path.read_text().splitlines(keepends=True)))
      app.write_atomically(self._path, "".join(lines[i] for i in sorted(lines)))


class Kept:
  """Values by name, kept in a file as they are computed.

  An interrupted run, started again, computes those that are missing. A line
  holds the settings that its value depends on; those of other settings stay as
  they are and count for nothing.
  """

  def __init__(self, path: pathlib.Path | None, settings: dict[str, Any]):
    """Opens `path`; None keeps values for this run only.

    Raises:
      ValueError: the file was not written by this class.
    """
    self._path = path
    self._settings = json.loads(json.dumps(settings))
    self._values = app.from_first_process(self._found) if path else {}
    if self._values:
      print(f"[{path} already holds {len(self._values)} values of this work]", file=sys.stderr)

  def _found(self):
    if not self._path.exists():
      return {}
    whole, _, torn = self._path.read_text().rpartition("\n")
    try:
      lines = [json.loads(line) for line in whole.splitlines()]
      values = {line["name"]: line["value"] for line in lines if line["settings"] == self._settings}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
      raise ValueError(
        f"{self._path} holds something else than values of earlier runs: name "
        "another output, or remove it"
      ) from error
    if torn:
      app.write_atomically(self._path, whole + "\n" if whole else "")
    return values

  def __contains__(self, name: str) -> bool:
    return name in self._values

  def get(self, name: str, compute: Callable[[], Any]) -> Any:
    """The JSON value of a name, that of process 0; computed by all if it is missing."""
    if name not in self._values:
      value = json.loads(json.dumps(app.broadcast(compute())))
      if self._path and app.is_first_process():
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
          file.write(json.dumps({"name": name, "value": value, "settings": self._settings}) + "\n")
      self._values[name] = value
    return self._values[name]
