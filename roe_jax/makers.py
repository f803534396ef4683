"""Objects that are made from parameters and written as NAME(PARAMETER=VALUE,...)."""

import ast
from collections.abc import Callable, Mapping
import functools
import inspect
import re
from typing import Any, TypeVar

Made = TypeVar("Made")

_WRITTEN: dict[Any, str] = {}
_WORDS = {"true": True, "false": False}


def parametric(make: Callable[..., Made]) -> Callable[..., Made]:
  """Returns a function that makes one object for equal arguments, as `written` knows it.

  Compiled functions are cached by these objects.
  """
  signature = inspect.signature(make)
  cached = functools.cache(make)

  @functools.wraps(make)
  def made(*args, **kwargs):
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    found = cached(*bound.args)
    _WRITTEN.setdefault(found, f"{make.__name__}({','.join(map(_text, bound.arguments.items()))})")
    return found

  return made


def _text(item):
  name, value = item
  if isinstance(value, tuple):
    value = "-".join(map(str, value))
  return f"{name}={str(value).lower() if isinstance(value, bool) else value}"


def written(made: Any) -> str | None:
  """Returns how an object that a `parametric` function made is written; None for others."""
  try:
    return _WRITTEN.get(made)
  except TypeError:  # not hashable
    return None


def usage(make: Callable) -> str:
  """Returns how an object is written, with its default parameters."""
  parameters = inspect.signature(make).parameters.values()
  return f"{make.__name__}({','.join(f'{p.name}={p.default}' for p in parameters)})"


def usages(makers: Mapping[str, Callable]) -> str:
  """Returns how objects of all makers are written."""
  return ", ".join(map(usage, makers.values()))


def read(text: str, makers: Mapping[str, Callable[..., Made]]) -> Made | None:
  """Makes the object that a text describes; None for one without parentheses.

  Args:
    text: such as "contrast(beta=0.3)"; several integers are joined by "-".
    makers: `parametric` functions by name.

  Raises:
    ValueError: there is no such maker or parameter, or a value is of another type.
  """
  match = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text, re.DOTALL)
  if not match:
    return None
  name, rest = match.groups()
  if name not in makers:
    raise ValueError(f"{name!r} has no parameters; what has: {usages(makers) or 'nothing'}")
  given = {}
  for part in rest.split(",") if rest.strip() else ():
    key, _, value = map(str.strip, part.partition("="))
    given[key] = value
  try:
    return makers[name](**{key: _value(value) for key, value in given.items()})
  except (SyntaxError, TypeError, ValueError) as error:
    raise ValueError(f"{text!r} does not fit {usage(makers[name])}: {error}") from error


def _value(text):
  if re.fullmatch(r"\d+(-\d+)+", text):
    return tuple(map(int, text.split("-")))
  return _WORDS[text.lower()] if text.lower() in _WORDS else ast.literal_eval(text)
