"""JSON lines: input requests, and result files that an interrupted run resumes."""

from collections.abc import Iterable, Sequence
import contextlib
import json
import os
import pathlib
import sys
from typing import Any

from checkpoints_convert import interrupts, outputs
from experiments.cli import app, text_files
from experiments.records import store
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
    # Without a path: what is written to a stream cannot be read again.
    is_file = path is not None and not outputs.is_stream(pathlib.Path(path))
    self._store = store.Store(
      pathlib.Path(path) if path and is_file else None,
      lambda record: record["index"],
      settings,
      kinds={"index": int, store.SETTINGS: dict},
      check=lambda lines: self._check(lines, settings),
      refusal="has results of other requests or settings",
    )
    self._stream = None if is_file else _opened(path)
    self._num_printed = 0
    self._at_exit = contextlib.ExitStack()
    if self._store.records:
      print(f"[{path} has {len(self._store.records)} of {len(requests)} results]", file=sys.stderr)

  @property
  def missing(self) -> list[int]:
    """Indices of the requests without a result."""
    return [i for i in range(len(self._requests)) if i not in self._store.records]

  def _head(self, index):
    request = self._requests[index]
    return {"index": index} | {k: request[k] for k in self._KEYS if k in request}

  def _check(self, lines, settings):
    if len({line["index"] for line in lines}) < len(lines):
      raise ValueError("a request has several results")
    for line in lines:
      index = line["index"]
      if not 0 <= index < len(self._requests) or self._head(index) != {
        k: line[k] for k in ("index", *self._KEYS) if k in line
      }:
        raise ValueError(f"request {index} is another one")
      if line[store.SETTINGS] != json.loads(text_files.to_json(settings)):
        raise ValueError(f"the settings of request {index} differ")

  def write(self, index: int, record: dict[str, Any]) -> None:
    """Writes the result of request `index`, after those that must precede it."""
    self._store.add([self._head(index) | record])
    while self._stream and self._num_printed in self._store.records:
      self._print(self._num_printed)
      self._num_printed += 1

  def _print(self, index):
    print(text_files.to_json(self._store.records[index]), file=self._stream, flush=True)

  def _print_waiting(self):
    """Prints what was computed before an interruption."""
    for index in sorted(i for i in self._store.records if i >= self._num_printed):
      self._print(index)
    self._num_printed = len(self._requests)

  def __enter__(self) -> "Results":
    if self._stream:
      self._at_exit.enter_context(interrupts.at_exit(self._print_waiting))
    return self

  def __exit__(self, *exception) -> None:
    self._at_exit.close()
    if self._stream:
      self._print_waiting()
      if self._stream is not sys.stdout:
        self._stream.close()
    elif not self.missing and list(self._store.records) != sorted(self._store.records):
      self._store.replace(record for _, record in sorted(self._store.records.items()))


def _opened(path):
  if path is None:
    return sys.stdout
  return open(path if app.is_first_process() else os.devnull, "a", encoding="utf-8")
