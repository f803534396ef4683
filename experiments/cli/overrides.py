"""Settings in dataclasses that flags and other texts override, each by the type of its field."""

from collections.abc import Collection, Mapping
import contextlib
import dataclasses
import types
import typing
from typing import Any, TypeVar

from absl import flags

from roe_jax import typed

Config = TypeVar("Config", bound=Any)
_WORDS = {"true": True, "false": False}
_NULL = "null"  # None, which is a name of other things


def parse(name: str, text: str, hint: Any) -> Any:
  """Parses a value: a number, text, true or false, null, or a tuple.

  Items of a tuple have ";" between them; "" is the empty one.

  Args:
    name: its name in messages.
    text: the value.
    hint: its type.

  Raises:
    ValueError: it is of another type.
  """
  for kind in typed.kinds_of(hint):
    with contextlib.suppress(KeyError, ValueError):
      if text == _NULL and kind is types.NoneType:
        return None
      if text == _NULL or kind is types.NoneType:
        continue
      if typing.get_origin(kind) is tuple:
        parts = text.split(";") if text else ()
        return tuple(parse(name, part, typing.get_args(kind)[0]) for part in parts)
      value = _WORDS[text.lower()] if kind is bool else kind(text)
      typed.check(name, value, kind)
      return value
  allowed = " or ".join(map(typed.describe, typed.kinds_of(hint)))
  raise ValueError(f"{name} must be {allowed}, got {text!r}")


def items(flag: str, kind: type) -> tuple[Any, ...]:
  """Returns the values of a list flag; raises as `parse`."""
  return tuple(parse(f"--{flag}", text, kind) for text in getattr(flags.FLAGS, flag))


def changed(config: Config, values: Mapping[str, Any], positive: Collection[str] = ()) -> Config:
  """Returns a dataclass with other values of some fields.

  Args:
    config: the dataclass.
    values: the values by field, as text or of the field's type.
    positive: names of fields whose numbers must be.

  Raises:
    ValueError: there is no such field, or a value is of another type or out of range.
  """
  known = [f.name for f in dataclasses.fields(config)]
  found = {}
  for name, value in values.items():
    if name not in known:
      raise ValueError(f"unknown setting {name!r}: choose from {', '.join(known) or 'none'}")
    hint = typed.hints(type(config))[name]
    found[name] = parse(name, value, hint) if isinstance(value, str) else value
    typed.check(name, found[name], hint)
    if name in positive and found[name] is not None and not found[name] > 0:
      raise ValueError(f"{name} must be positive, got {found[name]!r}")
  return dataclasses.replace(config, **found)


def from_flags(config: Config, **flag_of: str) -> Config:
  """Returns a dataclass with the values of the flags that are given.

  Args:
    config: the dataclass.
    **flag_of: the flag of a field; by default the one of its name, if there is one.

  Raises:
    ValueError: a value is out of range.
  """
  names = {f.name: flag_of.get(f.name, f.name) for f in dataclasses.fields(config)}
  given = {n: flags.FLAGS[flag] for n, flag in names.items() if flag in flags.FLAGS}
  return changed(config, {n: flag.value for n, flag in given.items() if flag.present})


def define_flags(config: Any, helps: Mapping[str, str], defaults: bool = True, **flag_of: str):
  """Defines flags of a dataclass's fields.

  Args:
    config: the dataclass, or an instance of it.
    helps: the help of each flag, by field.
    defaults: whether the flags' defaults are those of the fields, instead of None.
    **flag_of: see `from_flags`.
  """
  hints = typed.hints(config if isinstance(config, type) else type(config))
  define = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
  }
  for name, text in helps.items():
    kind = next(k for k in typed.kinds_of(hints[name]) if k in define)
    define[kind](flag_of.get(name, name), getattr(config, name) if defaults else None, text)
