"""JSON lines: input requests, and result files that an interrupted run resumes."""

from collections.abc import Callable, Iterable, Sequence
import contextlib
import json
import os
import pathlib
import sys
from typing import Any

from checkpoints_convert import interrupts, outputs
from experiments.cli import app, text_files
from roe_jax import typed


def read(path: str | None, keys: Iterable[str]) -> list[dict[str, Any]]:
  """Reads JSON objects from a file, or from standard input for None or "-", in process 0.

  Args:
    path: the file.
    keys: the keys that the objects may have.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: the input is not UTF-8 or empty, or a line is not a JSON object of these keys.
  """
  return app.from_first_process(lambda: parse(_text(path).split("\n"), keys))


def _text(path):
  if path not in (None, "-"):
    return text_files.read(path)
  if sys.stdin.isatty():
    print("[reading JSON lines from the terminal; end with Ctrl-D]", file=sys.stderr)
  return text_files.decode(sys.stdin.buffer.read(), "standard input")


def parse(lines: Sequence[str], keys: Iterable[str]) -> list[dict[str, Any]]:
  """Parses lines as `read` does; skips blank ones."""
  keys = sorted(keys)
  requests = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    request = typed.parse(line, f"input line {number}")
    if unknown := sorted(request.keys() - set(keys)):
      raise ValueError(
        f"input line {number} has the unknown key {unknown[0]!r}: use {', '.join(keys)}, and flags "
        "for settings"
      )
    text_files.check_text(json.dumps(request, ensure_ascii=False), f"input line {number}")
    requests.append(request)
  if not requests:
    raise ValueError("the input is empty")
  return requests


def read_lines(
  path: pathlib.Path, repair: bool = False, kinds: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
  """Reads the complete lines of a file as JSON objects; none if the file does not exist.

  Args:
    path: the file.
    repair: whether to remove an incomplete last line, which a killed run leaves.
    kinds: types of the keys that each line must have.

  Raises:
    ValueError: a line is not such an object.
  """
  if not path.is_file():
    return []
  whole, _, torn = text_files.read(path).rpartition("\n")
  lines = [
    typed.parse(line, f"line {number} of {path}", kinds or {})
    for number, line in enumerate(whole.split("\n"), 1)
    if line
  ]
  if torn and repair:
    app.write_atomically(path, whole + "\n" if whole else "")
  return lines


def append(path: pathlib.Path, records: Iterable[dict[str, Any]]) -> None:
  """Appends records as JSON lines, in process 0 only."""
  if app.is_first_process():
    path.parent.mkdir(parents=True, exist_ok=True)
    # In one write, because several runs may append to the same file of answers.
    text = "".join(text_files.to_json(record) + "\n" for record in records)
    data = memoryview(text.encode())
    with path.open("ab", buffering=0) as file:
      while data:
        data = data[file.write(data) :]


def tokens_of(request: dict[str, Any], name: str, encode, what: str) -> list[int]:
  """Returns a request's token ids: of its text `name`, or its ids `name + "_tokens"`.

  Raises:
    ValueError: it has neither.
  """
  ids = request.get(f"{name}_tokens")
  if isinstance(ids, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in ids):
    return ids
  if isinstance(request.get(name), str):
    return encode(request[name])
  raise ValueError(f'{what} must have "{name}" (text) or "{name}_tokens" (a list of integer ids)')


class Results:
  """Writes results of requests, one JSON line each with the request's "index".

  Results may arrive in any order. A file gets each line at once, and is sorted by request
  when all are there, so the final file does not depend on interruptions. A rerun computes
  only the `missing` results. Standard output, or another stream, gets a line as soon as all lines
  before it are printed. Only process 0 writes; all processes know what is in the file.
  """

  _KEYS = ("id", "prompt", "messages", "continuation", "prompt_tokens", "continuation_tokens")

  def __init__(
    self, path: str | None, requests: Sequence[dict[str, Any]], settings: dict[str, Any]
  ):
    """Opens `path`, or standard output for None.

    Raises:
      ValueError: the file has results of other requests or settings.
    """
    self._requests = requests
    self._settings = json.loads(text_files.to_json(settings))
    # None: what is written cannot be read again.
    self._path = pathlib.Path(path) if path and not outputs.is_stream(pathlib.Path(path)) else None
    # Indices in the order of their lines.
    self._written = app.from_first_process(self._found) if self._path else []
    self._at_exit = contextlib.ExitStack()
    self._waiting: dict[int, str] = {}  # lines that earlier ones must precede
    self._file = self._open(pathlib.Path(path)) if path else sys.stdout
    if self._written:
      print(f"[{path} has {len(self._written)} of {len(requests)} results]", file=sys.stderr)

  def _open(self, path):
    if not app.is_first_process():
      return open(os.devnull, "a", encoding="utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a", encoding="utf-8")

  @property
  def missing(self) -> list[int]:
    """Indices of the requests without a result."""
    there = self._waiting.keys() | set(self._written)
    return [i for i in range(len(self._requests)) if i not in there]

  def _head(self, index):
    request = self._requests[index]
    return {"index": index} | {k: request[k] for k in self._KEYS if k in request}

  def _found(self):
    """Indices of the results in the file, in its order."""
    refusal = (
      f"{self._path} has results of other requests or settings: choose another file or delete it"
    )
    try:
      results = read_lines(self._path, kinds={"index": int, "settings": dict})
      indices = [result["index"] for result in results]
      same = len(set(indices)) == len(indices) and all(
        0 <= i < len(self._requests)
        and result["settings"] == self._settings
        and {k: result[k] for k in ("index", *self._KEYS) if k in result} == self._head(i)
        for i, result in zip(indices, results)
      )
    except ValueError as error:
      raise ValueError(f"{refusal} ({error})") from error
    if not same:
      raise ValueError(refusal)
    read_lines(self._path, repair=True)
    return indices

  def write(self, index: int, record: dict[str, Any]) -> None:
    """Writes the result of request `index`, after those that must precede it."""
    line = text_files.to_json(self._head(index) | record | {"settings": self._settings}) + "\n"
    if self._path:
      self._print(index, line)
    else:
      self._waiting[index] = line
      while len(self._written) in self._waiting:
        self._print(len(self._written), self._waiting.pop(len(self._written)))
    self._file.flush()

  def _print(self, index, line):
    self._file.write(line)
    self._written.append(index)

  def _print_waiting(self):
    """Prints what was computed before an interruption."""
    for index in sorted(self._waiting):
      self._print(index, self._waiting[index])
    self._file.flush()

  def __enter__(self) -> "Results":
    if self._path is None:
      self._at_exit.enter_context(interrupts.at_exit(self._print_waiting))
    return self

  def __exit__(self, *exception) -> None:
    self._at_exit.close()
    if self._path is None:
      self._print_waiting()
    if self._file is not sys.stdout:
      self._file.close()
    if (
      self._path
      and app.is_first_process()
      and not self.missing
      and self._written != sorted(self._written)
    ):
      lines = dict(zip(self._written, text_files.read(self._path).split("\n")))
      app.write_atomically(self._path, "".join(lines[i] + "\n" for i in sorted(lines)))


class SavedValues:
  """Named values that are saved in a file as they are computed, so that a rerun reuses them.

  Each line has the settings that its value depends on; lines with other settings are ignored.
  """

  def __init__(self, path: pathlib.Path | None, settings: dict[str, Any]):
    """Opens `path`; None keeps values in memory only.

    Raises:
      ValueError: the file was not written by this class.
    """
    self._path = path
    self._settings = json.loads(text_files.to_json(settings))
    self._values = app.from_first_process(self._found) if path else {}
    if self._values:
      print(f"[{path} has {len(self._values)} values of this run]", file=sys.stderr)

  def _found(self):
    try:
      lines = read_lines(self._path, kinds={"name": str, "value": object, "settings": dict})
    except ValueError as error:
      raise ValueError(
        f"{self._path} does not have values of earlier runs: choose another output or delete it "
        f"({error})"
      ) from error
    values = {line["name"]: line["value"] for line in lines if line["settings"] == self._settings}
    read_lines(self._path, repair=True)
    return values

  def __contains__(self, name: str) -> bool:
    return name in self._values

  def get(self, name: str, compute: Callable[[], Any]) -> Any:
    """Returns the JSON value `name`; if missing, all processes compute it and keep process 0's."""
    if name not in self._values:
      self.put(name, app.broadcast(compute()))
    return self._values[name]

  def put(self, name: str, value: Any) -> None:
    """Saves the JSON value `name`; a later value replaces it."""
    value = json.loads(text_files.to_json(value))
    if self._path:
      append(self._path, [{"name": name, "value": value, "settings": self._settings}])
    self._values[name] = value

  def forget(self, name: str) -> None:
    """Forgets a value, so that it is computed again; a later `put` replaces its line."""
    self._values.pop(name, None)

  def items(self) -> Iterable[tuple[str, Any]]:
    return self._values.items()
