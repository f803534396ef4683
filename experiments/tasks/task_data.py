"""Where a task's rows come from: a local folder, or a data set by name."""

from collections.abc import Callable
import dataclasses
import gzip
import hashlib
import json
import pathlib
import re
from typing import Any

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Source:
  """One set of rows, in each of the forms in which it is public.

  Attributes:
    name: unique among the sets of a task, such as "gsm8k/test".
    files: names of files that hold all of it, the preferred first, each with as many
      folders as tell it from others: "AddSub/test.json". Lists in .json or lines in
      .jsonl, plain or with .gz, or text in .raw.
    hub: data sets that hold it one after the other, as arguments for
      `datasets.load_dataset`.
  """

  name: str
  files: tuple[str, ...]
  hub: tuple[dict[str, Any], ...]

  def rows(self, data_dir: pathlib.Path | None) -> list[Row]:
    """The rows, from the first file found in or below a folder, or from the hub.

    Raises:
      FileNotFoundError: there is no such folder, or none of the files in it.
      ValueError: the file is not of its format, or the hub does not give the data.
    """
    return self._from_hub() if data_dir is None else read(self.find(data_dir))

  def find(self, data_dir: pathlib.Path) -> pathlib.Path:
    """The file of that folder that `rows` reads; errors as there."""
    if not data_dir.is_dir():
      raise FileNotFoundError(f"there is no folder {data_dir} to read {self.name} from")
    for name in self.files:
      # The shallowest, so that it does not depend on the order of directories.
      found = sorted(data_dir.rglob(name), key=lambda p: (len(p.parts), p))
      if found:
        return found[0]
    raise FileNotFoundError(
      f"there is no data of {self.name} in {data_dir} or below: a file "
      f"{' or '.join(self.files)} is expected"
    )

  def _from_hub(self):
    try:
      import datasets
    except ImportError as error:
      raise ValueError(
        f"reading {self.name} from the hub needs the package datasets: install it, "
        "or give a folder with --data_dir"
      ) from error
    rows = []
    for arguments in self.hub:
      try:
        rows += datasets.load_dataset(**arguments)
      except Exception as error:  # of many kinds, for a missing network alone
        raise ValueError(
          f"{self.name} could not be read from {arguments['path']} of the hub "
          f"({type(error).__name__}: {error}): give a folder with its files with --data_dir"
        ) from error
    return [dict(row) for row in rows]


def read(path: pathlib.Path) -> list[Row]:
  """The rows of a .json or .jsonl file, or such a one with .gz; of .raw, {"text": line}.

  Raises:
    ValueError: it is not of its format.
  """
  try:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
      if ".raw" in path.suffixes:
        rows = [{"text": line} for line in file]
      elif ".jsonl" in path.suffixes:
        rows = [json.loads(line) for line in file if line.strip()]
      else:
        rows = json.load(file)
  except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise ValueError(f"{path} cannot be read: {error}") from error
  if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) for r in rows):
    raise ValueError(f"{path} must hold JSON objects, in a list (.json) or one a line (.jsonl)")
  return rows


def parse(rows: list[Row], reader: Callable[[Row], Any], name: str) -> list[Any]:
  """Reads each row.

  Raises:
    ValueError: a row is not as the reader expects.
  """
  parsed = []
  for i, row in enumerate(rows):
    try:
      parsed.append(reader(row))
    except (KeyError, IndexError, TypeError, ValueError) as error:
      raise ValueError(
        f"row {i} of {name} is in none of its public formats: "
        f"{type(error).__name__} {error} in {str(row)[:200]}"
      ) from error
  return parsed


def content(text: str) -> str:
  """What two copies of a question share: its words in small letters."""
  return " ".join(re.findall(r"\w+", text.lower()))


def in_slice(key: str, share: float) -> bool:
  """Whether a fixed pseudo-random choice of that share of all keys has this one.

  It depends on the key alone, so that copies of a question are on the same side.
  """
  digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little") < share * 2**64
