"""Text and JSON files: UTF-8 whatever the locale, and valid JSON whatever the values."""

import json
import math
import pathlib
from typing import Any


def read(path: str | pathlib.Path) -> str:
  """Reads a text file.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: it is not UTF-8.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist")
  return decode(path.read_bytes(), str(path))


def decode(data: bytes, name: str) -> str:
  """Decodes UTF-8, with or without a byte order mark; `name` is the source in the error.

  Raises:
    ValueError: the bytes are not UTF-8.
  """
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    found = "it is UTF-16" if utf16 else f"byte {data[error.start]:#04x} at offset {error.start}"
    raise ValueError(
      f"{name} is not UTF-8 text ({found}): convert it, for example with iconv -f "
      f"{'UTF-16' if utf16 else 'LATIN1'} -t UTF-8"
    ) from error


def check_text(text: str, what: str) -> None:
  """Checks that a string is text; `what` names it in the error.

  Raises:
    ValueError: it has an unpaired surrogate, which no encoding has.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f"{what} is not valid text: it has the unpaired surrogate "
      f"\\u{ord(text[error.start]):04x} at character {error.start}"
    ) from error


def to_json(value: Any, **settings: Any) -> str:
  """Formats as `json.dumps` with the same arguments, but NaN and infinities become null."""
  try:
    return json.dumps(value, allow_nan=False, **settings)
  except ValueError:
    plain = json.loads(json.dumps(value, **settings))
    return json.dumps(_finite_or_none(plain), allow_nan=False, **settings)


def _finite_or_none(value):
  if isinstance(value, dict):
    return {k: _finite_or_none(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_finite_or_none(v) for v in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
