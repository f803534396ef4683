"""Text and JSON files: UTF-8 whatever the locale, and valid JSON whatever the values."""

import json
import math
from typing import Any

from roe_jax.text import utf8

read, decode = utf8.read, utf8.decode_text


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
