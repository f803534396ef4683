"""Checks the values of a dataclass against the types of its fields."""

from collections.abc import Collection
import dataclasses
import functools
import math
import numbers
import types
import typing
from typing import Any

_WORDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}


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
      allowed = f"positive{' or null' if types.NoneType in _members(hint) else ''}"
    elif value is not None and name in not_negative and not value >= 0:
      allowed = "at least 0"
    else:
      continue
    raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check(name: str, value: Any, hint: Any) -> None:
  """Checks that a value is of a type, such as `int`, `float | None` or `tuple[int, ...]`.

  Raises:
    ValueError: it is not; the message has the `name`.
  """
  kinds = _members(hint)
  if not any(_is(value, kind) for kind in kinds):
    allowed = " or ".join(_word(kind) for kind in kinds)
    raise ValueError(f"{name} must be {allowed}, got {value!r}"[:300])


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


def _members(hint):
  is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
  return typing.get_args(hint) if is_union else (hint,)


def _word(kind):
  if kind is types.NoneType:
    return "null"
  if kind is dict or typing.get_origin(kind) is dict:
    return "an object"
  if typing.get_origin(kind) is tuple:
    return "a list whose items are " + _word(typing.get_args(kind)[0]).removeprefix("an ") + "s"
  return _WORDS.get(kind, f"a {kind.__name__}")


def _is(value, kind):
  if typing.get_origin(kind) is dict:
    return isinstance(value, dict)
  if typing.get_origin(kind) is tuple:
    return isinstance(value, tuple) and all(_is(v, typing.get_args(kind)[0]) for v in value)
  if kind is int:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if kind is float:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
  return isinstance(value, kind)
