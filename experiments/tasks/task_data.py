"""Reads a task's rows from a local folder or from a data set on the hub."""

from collections.abc import Callable
import dataclasses
import gzip
import hashlib
import pathlib
import re
from typing import Any

from roe_jax import typed

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Source:
  """One set of rows in all its public forms.

  Attributes:
    name: unique within a task, such as "gsm8k/test".
    files: files with all rows, the preferred one first, with enough folders to identify them:
      "AddSub/test.json". A list in .json, lines in .jsonl (both optionally .gz), or lines of text
      in .raw and .txt. All files of one folder that match a pattern such as "blimp/*.jsonl" are
      one, in the order of their names.
    hub: arguments of `datasets.load_dataset` for the data sets whose concatenation it is.
  """

  name: str
  files: tuple[str, ...]
  hub: tuple[dict[str, Any], ...]

  def rows(self, data_dir: pathlib.Path | None) -> list[Row]:
    """Returns the rows of the first file found in or below a folder, or of the hub for None.

    Raises:
      FileNotFoundError: the folder or the files do not exist.
      ValueError: the file is malformed, or the hub cannot be read.
    """
    if data_dir is None:
      return self._from_hub()
    return [row for path in self.find(data_dir) for row in read(path)]

  def find(self, data_dir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files that `rows` reads, with the same errors."""
    if not data_dir.is_dir():
      raise FileNotFoundError(f"the folder {data_dir} for {self.name} does not exist")
    for name in self.files:
      # The shallowest match does not depend on the order of directories.
      found = sorted(data_dir.rglob(name), key=lambda p: (len(p.parts), p))
      if found:
        return [path for path in found if path.parent == found[0].parent]
    raise FileNotFoundError(
      f"no data of {self.name} in or below {data_dir}: expected a file {' or '.join(self.files)}"
    )

  def _from_hub(self):
    try:
      import datasets
    except ImportError as error:
      raise ValueError(
        f"reading {self.name} from the hub requires the package datasets: install it, or set "
        "--data_dir to a folder"
      ) from error
    rows = []
    for arguments in self.hub:
      try:
        rows += datasets.load_dataset(**arguments)
      except Exception as error:  # a missing network alone raises many kinds
        raise ValueError(
          f"{self.name} could not be read from {arguments['path']} on the hub "
          f"({type(error).__name__}: {error}): set --data_dir to a folder with its files"
        ) from error
    return [dict(row) for row in rows]


def read(path: pathlib.Path) -> list[Row]:
  """Reads the rows of a .json or .jsonl file (optionally .gz), or {"text": line} of text.

  Raises:
    ValueError: the file is malformed.
  """
  try:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
      if {".raw", ".txt"} & set(path.suffixes):
        rows = [{"text": line} for line in file]
      elif ".jsonl" in path.suffixes:
        lines = ((i, line) for i, line in enumerate(file, 1) if line.strip())
        rows = [typed.parse(line, f"line {i}") for i, line in lines]
      else:
        rows = typed.parse(file.read(), "it", list[dict])
  except (OSError, EOFError, ValueError) as error:
    raise ValueError(f"{path} cannot be read: {error}") from error
  if not rows:
    raise ValueError(
      f"{path} must contain JSON objects, in a list (.json) or one per line (.jsonl)"
    )
  return rows


def parse(rows: list[Row], reader: Callable[[Row], Any], name: str) -> list[Any]:
  """Applies `reader` to each row.

  Raises:
    ValueError: the reader rejects a row.
  """
  parsed = []
  for i, row in enumerate(rows):
    try:
      parsed.append(reader(row))
    except (KeyError, IndexError, TypeError, ValueError) as error:
      raise ValueError(
        f"row {i} of {name} has an unknown format: "
        f"{type(error).__name__} {error} in {str(row)[:200]}"
      ) from error
  return parsed


def content(text: str) -> str:
  """Returns the lower-case words of a question, which copies of it share."""
  return " ".join(re.findall(r"\w+", text.lower()))


def in_slice(key: str, share: float) -> bool:
  """Returns whether a key is in a fixed pseudo-random slice with this share of all keys.

  It depends on the key only, so copies of a question are on the same side.
  """
  digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little") < share * 2**64
