"""Reads JSON files and checks values from outside against types."""

from collections.abc import Collection
import dataclasses
import functools
import json
import numbers
import pathlib
import sys
import types
import typing
from typing import Any

_WORDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}


def read(path: pathlib.Path, kind: Any = dict) -> Any:
  """Reads a JSON file; see `parse`."""
  try:
    text = path.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8 text: {error}") from error
  return parse(text, str(path), kind)


def parse(text: str, what: str, kind: Any = dict) -> Any:
  """Parses JSON.

  Args:
    text: the JSON.
    what: its name in messages.
    kind: its type, or for an object the types of the keys that it must have.

  Raises:
    ValueError: it is malformed, nested too deeply, or of another type.
  """
  try:
    value = json.loads(text)
  except RecursionError as error:
    raise ValueError(f"{what} is nested too deeply") from error
  except ValueError as error:
    raise ValueError(f"{what} is not valid JSON: {error}") from error
  check(what, value, dict if isinstance(kind, dict) else kind)
  if isinstance(kind, dict):
    check_keys(what, value, kind, others=True)
  return value


def check_fields(
  values: Any, positive: Collection[str] = (), not_negative: Collection[str] = ()
) -> None:
  """Checks that each field of a dataclass has a value of its type.

  A bool is no number, an integer is a float, and floats must be finite.

  Args:
    values: the dataclass instance.
    positive, not_negative: names of number fields whose values must be; None passes where the
      field's type allows it.

  Raises:
    ValueError: a value is not allowed; the message names its field.
  """
  for field in dataclasses.fields(values):
    name, value = field.name, getattr(values, field.name)
    hint = hints(type(values))[name]
    check(name, value, hint)
    if value is not None and name in positive and not value > 0:
      allowed = f"positive{' or null' if types.NoneType in kinds_of(hint) else ''}"
    elif value is not None and name in not_negative and not value >= 0:
      allowed = "at least 0"
    else:
      continue
    raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check(name: str, value: Any, hint: Any) -> None:
  """Checks a value against a type such as `int`, `float | None`, `list[int]` or `dict[str, int]`.

  Raises:
    ValueError: it is not; the message has the `name`.
  """
  kinds = [kind for kind in kinds_of(hint) if _is(value, kind)]
  if not kinds:
    allowed = " or ".join(describe(kind) for kind in kinds_of(hint))
    raise ValueError(f"{name} must be {allowed}, got {value!r}"[:300])
  if isinstance(value, dict) and typing.get_args(kinds[0]):
    for key, item in value.items():
      check(f"{key!r} of {name}", item, typing.get_args(kinds[0])[1])


def check_keys(
  what: str,
  values: dict[str, Any],
  kinds: dict[str, Any],
  required: bool = True,
  others: bool = False,
) -> None:
  """Checks a dictionary from a JSON file.

  Args:
    what: its name in messages.
    values: the dictionary.
    kinds: the type of each key.
    required: whether all keys must be there.
    others: whether other keys may be there.

  Raises:
    ValueError: a key is missing or unknown, or a value is not of its type.
  """
  missing, unknown = sorted(kinds.keys() - values.keys()), sorted(values.keys() - kinds.keys())
  if required and missing:
    raise ValueError(f"{what} has no {', '.join(missing)}")
  if unknown and not others:
    raise ValueError(f"{what} has unknown keys: {', '.join(unknown)}"[:300])
  for name, kind in kinds.items():
    if name in values:
      check(f"{name} of {what}", values[name], kind)


@functools.cache
def hints(kind: type) -> dict[str, Any]:
  """Returns the types of a dataclass's fields."""
  return typing.get_type_hints(kind)


def kinds_of(hint: Any) -> tuple[Any, ...]:
  """Returns the types of a union, or the type itself."""
  is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
  return typing.get_args(hint) if is_union else (hint,)


def describe(kind: Any) -> str:
  """Returns a type's name in messages."""
  if kind is types.NoneType:
    return "null"
  if kind is dict or typing.get_origin(kind) is dict:
    return "a JSON object"
  if typing.get_origin(kind) in (list, tuple):
    items = (describe(item) for item in kinds_of(typing.get_args(kind)[0]))
    return f"a list whose items are {' or '.join(w.partition(' ')[2] or w for w in items)}s"
  return _WORDS.get(kind, f"a {kind.__name__}")


def _is(value, kind):
  if kind is Any:
    return True
  if typing.get_origin(kind) is dict:
    return isinstance(value, dict)
  if (container := typing.get_origin(kind)) in (list, tuple):
    items = kinds_of(typing.get_args(kind)[0])
    return isinstance(value, container) and all(any(_is(v, i) for i in items) for v in value)
  if kind is int:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if kind is float:
    # A comparison, because math.isfinite fails on integers that no float is.
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and abs(typing.cast(float, value)) <= sys.float_info.max
  return isinstance(value, kind)
