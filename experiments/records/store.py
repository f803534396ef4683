"""Records that a killed program resumes from: JSON lines, found by key.

What the records depend on is the line `{"settings": ...}` at the start of the file, or in
"settings" of each line, or in another file of the folder.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
import contextlib
import json
import os
import pathlib
import sys
from typing import IO, Any

from checkpoints_convert import outputs
from experiments.cli import app, text_files
from roe_jax import typed

SETTINGS = "settings"
Record = dict[str, Any]


def read_lines(
  path: pathlib.Path, kinds: dict[str, Any] | None = None, heads: int = 0
) -> list[Record]:
  """Reads the complete lines of a file as JSON objects; none if the file does not exist.

  Args:
    path: the file.
    kinds: types of the keys that each line must have.
    heads: number of lines at the start that need not have them.

  Raises:
    ValueError: a line is not such an object.
  """
  if not path.is_file():
    return []
  whole = text_files.read(path).rpartition("\n")[0]
  return [
    typed.parse(line, f"line {number} of {path}", kinds if kinds and number > heads else {})
    for number, line in enumerate(whole.split("\n"), 1)
    if line
  ]


def write_lines(path: pathlib.Path, records: Iterable[Record]) -> None:
  """Writes JSON lines atomically, in process 0 only."""
  app.write_atomically(path, "".join(map(_line, records)))


def _line(record):
  return text_files.to_json(record) + "\n"


class Store:
  """Records by key, in a file that each is appended to at once.

  A later record replaces an earlier one of its key. An incomplete last line, which a killed run
  leaves, is removed. Reading and appending hold a lock on the file, because several programs may
  share it. Only process 0 does either; all processes have the records.

  Attributes:
    path: the file; None keeps records in memory only.
    records: the records by key, as JSON values.
  """

  def __init__(
    self,
    path: pathlib.Path | None,
    key: Callable[[Record], Hashable] | None,
    settings: Any = None,
    *,
    kinds: dict[str, Any] | None = None,
    header: bool = False,
    check: Callable[[Sequence[Record]], None] = lambda lines: None,
    refusal: str = "was not written by this program",
  ):
    """Opens a file; the first record creates it, or the header.

    Args:
      path: the file, or None.
      key: returns the key of a record; None keys each line on its own.
      settings: what the records depend on; records with other "settings" stay in the file, and are
        ignored. None if the settings are elsewhere.
      kinds: types of the keys that each line must have.
      header: whether the settings are the first line instead of in each line.
      check: raises ValueError for lines of something else.
      refusal: says that the file has something else, after its name.

    Raises:
      ValueError: the file has something else.
    """
    self.path, self._key, self._header = path, key, header
    self._settings = json.loads(text_files.to_json(settings))
    self.records: dict[Any, Record] = {}

    def opened() -> list[Record]:
      if path is None or not (header or path.is_file()):
        return []
      try:
        with _locked(path) as file:
          lines = read_lines(path, kinds, heads=int(header))
          self._check_header(lines)
          check(lines)
          _repair(file)
          if header and not lines:
            file.write(_line({SETTINGS: self._settings}).encode())
      except ValueError as error:
        raise ValueError(
          f"{path} {refusal}: choose another output or delete it ({error})"
        ) from error
      return [line for line in lines[header:] if header or self._is_ours(line)]

    for record in app.from_first_process(opened):
      self._remember(record)

  def _check_header(self, lines):
    if self._header and lines and self._settings not in (None, lines[0].get(SETTINGS)):
      raise ValueError("its records depend on other settings")

  def _is_ours(self, line):
    return self._settings is None or line.get(SETTINGS) == self._settings

  def _remember(self, record):
    self.records[self._key(record) if self._key else len(self.records)] = record

  def add(self, records: Iterable[Record]) -> None:
    """Adds records; a file has all of them, or the first of them if the program is killed."""
    if self._settings is not None and not self._header:
      records = [record | {SETTINGS: self._settings} for record in records]
    lines = [_line(record) for record in records]
    for line in lines:
      self._remember(json.loads(line))
    if self.path and lines and app.is_first_process():
      with _locked(self.path) as file:
        _repair(file)
        data = memoryview("".join(lines).encode())
        while data:
          data = data[file.write(data) :]

  def replace(self, records: Iterable[Record]) -> None:
    """Replaces all records of the file at once, including those of other settings."""
    records = list(records)
    self.records.clear()
    for record in records:
      self._remember(record)
    if self.path:
      write_lines(self.path, records)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[IO[bytes]]:
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a+b", buffering=0) as file:
    outputs.lock_file(file.fileno())
    yield file


def _repair(file):
  """Removes an incomplete last line."""
  size = file.seek(0, os.SEEK_END)
  if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
    file.truncate(os.pread(file.fileno(), size, 0).rfind(b"\n") + 1)


class SavedValues(Store):
  """Named values that are computed once."""

  def __init__(self, path: pathlib.Path | None, settings: dict[str, Any]):
    """Opens the file, or keeps values in memory for None; see `Store`."""
    kinds = {"name": str, "value": object, SETTINGS: dict}
    refusal = "does not have values of earlier runs"
    super().__init__(path, lambda r: r["name"], settings, kinds=kinds, refusal=refusal)
    if self.records:
      print(f"[{path} has {len(self.records)} values of this run]", file=sys.stderr)

  def __contains__(self, name: str) -> bool:
    return name in self.records

  def get(self, name: str, compute: Callable[[], Any]) -> Any:
    """Returns the JSON value `name`; if missing, all processes compute it and keep process 0's."""
    if name not in self:
      self.put(name, app.broadcast(compute()))
    return self.records[name]["value"]

  def put(self, name: str, value: Any) -> None:
    """Saves the JSON value `name`; a later value replaces it."""
    self.add([{"name": name, "value": value}])

  def forget(self, name: str) -> None:
    """Forgets a value, so that it is computed again; a later `put` replaces its line."""
    self.records.pop(name, None)

  def items(self) -> Iterable[tuple[str, Any]]:
    return ((name, record["value"]) for name, record in self.records.items())
