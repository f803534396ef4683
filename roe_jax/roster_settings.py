"""Reads the settings of a roster."""

from collections.abc import Callable, Mapping, Sequence
import importlib
import operator
import os
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

from roe_jax import makers
from roe_jax.adaptive import Stop, Unsure


def is_traced(value: Any) -> bool:
  return isinstance(value, Tracer)


def is_integer(value: Any) -> bool:
  """Whether a value is an integer, or an array of one, but not a bool."""
  try:
    operator.index(value)
  except TypeError:
    return False
  return not isinstance(value, (bool, np.bool_))


def as_temperatures(temperatures: Any, layers: int) -> np.ndarray:
  """Returns temperatures as float32, one per layer."""
  if isinstance(temperatures, (str, os.PathLike, Mapping)):
    raise ValueError(
      f"temperatures must be numbers, got {temperatures!r}: use "
      "Roster.from_profile(path, config) for a temperature profile"
    )
  try:
    values = np.asarray(0.0 if temperatures is None else temperatures, np.float32)
  except (TypeError, ValueError):
    raise ValueError(
      f"temperatures must be one number or a list with one per layer, got {temperatures!r}"
    ) from None
  if values.ndim == 0:
    values = np.full(layers, values)
  if values.shape != (layers,):
    raise ValueError(
      f"temperatures must be one number or a list of {layers} (one per layer of the "
      f"model), got shape {list(values.shape)}"
    )
  return values


def as_router_bias(bias: Any, layers: int) -> jax.Array | None:
  """Returns a router bias as float32."""
  if bias is None:
    return None
  try:
    values = np.asarray(bias, np.float32)
  except (TypeError, ValueError):
    values = np.zeros(())
  if values.ndim != 2 or len(values) != layers or not np.all(values < np.inf):
    raise ValueError(
      f"router_bias must be numbers [{layers}, E], one per layer and expert, finite or -inf"
    )
  return jnp.asarray(values)


def as_experts_by_layer(counts: Any, layers: int, members: int | None = None) -> jax.Array | None:
  """Returns how many experts members use, int32 `[M, L]`; M = 1 if all use as many."""
  if counts is None or is_traced(counts):
    return counts
  try:
    by_member = np.iterable(counts) and any(map(np.iterable, counts))
    rows = counts if by_member else [counts]
    table = [np.broadcast_to(np.asarray(row), (layers,)) for row in rows]
    values = np.stack(table)
  except (TypeError, ValueError):
    values = np.zeros(())
  if values.ndim != 2 or values.dtype.kind not in "iu" or (values < 1).any():
    raise ValueError(
      f"experts_by_layer must be a positive integer, a list of {layers} (one per layer of the "
      f"model), or such values in a list for each member, got {counts!r}"
    )
  if (values == values[0]).all():
    values = values[:1]
  if members is not None and len(values) not in (1, members):
    raise ValueError(
      f"experts_by_layer has values for {len(values)} members and the roster has {members} "
      "(with a clean one that is not averaged)"
    )
  return jnp.asarray(values, jnp.int32)


class Weights(NamedTuple):
  """Which weights members compute with.

  Attributes:
    bits: how many bits of experts in a nested format; None: all.
    task: index of a task of merged fine-tunes; None: the model's own weights.
  """

  bits: int | None = None
  task: int | None = None


def as_member_weights(name: str, given: Any, least: int, num_noisy: int) -> tuple[int, ...] | None:
  """Returns one number, of all noisy members, or one for each; None if there is none.

  Args:
    name: "member_bits" or "member_tasks".
    given: a number, a list, or a text such as "3-2-2".
    least: the smallest number.
    num_noisy: number of noisy members.

  Raises:
    ValueError: it is neither.
  """
  if given is None:
    return None
  values = given if isinstance(given, Sequence) else (given,)
  if isinstance(given, str):
    values = [int(b) if b.isdecimal() else -1 for b in given.split("-")]
  if not all(is_integer(b) and b >= least for b in values) or len(values) not in (1, num_noisy):
    raise ValueError(
      f"{name} must be an integer of at least {least}, or one for each of the "
      f"{num_noisy} noisy members such as 3-2-2, got {given!r}"
    )
  return tuple(map(int, values))


def differing_layers(temperatures: np.ndarray, counts: Any, weights: bool = False) -> np.ndarray:
  """Returns the layers where members differ: by noise, experts `[M, L]`, or weights (in all)."""
  differ = (temperatures != 0) | weights
  if counts is not None:
    rows = np.ones_like(counts) if is_traced(counts) else np.asarray(counts)
    differ |= (rows != rows[:1]).any(axis=0) | (is_traced(counts) and len(rows) > 1)
  return np.flatnonzero(differ)


def as_adaptive(unsure: Any, member_stop: Any) -> tuple[Unsure | None, Stop | None]:
  """Returns where and until when members run; None if everywhere, and if all do.

  Raises:
    ValueError: a setting is neither of its type nor a text or number that describes it.
  """
  if isinstance(unsure, str):
    unsure = Unsure.create(unsure)
  elif not (unsure is None or isinstance(unsure, Unsure)):
    raise ValueError(f'unsure must be a text such as "margin<0.5", got {unsure!r}')
  if not (member_stop is None or isinstance(member_stop, Stop)):
    member_stop = Stop.create(member_stop)
  return None if unsure is not None and unsure.is_everywhere else unsure, member_stop


def check_unset(cache: str, **settings: Any) -> None:
  """Raises a ValueError if one of these settings is given with such a cache."""
  for name in (name for name, value in settings.items() if value):
    raise ValueError(
      f"{name} needs a cache that all members share and that the clean member can fill ahead "
      f"(cache='clean'), which {cache!r} is not"
    )


def resolve(
  kind: str,
  value: Any,
  table: Mapping[str, Any],
  fits: Callable[[Any], bool],
  known_makers: Mapping[str, Callable] = {},
) -> tuple[str, Any]:
  """Returns the name of a noise, aggregation or cache, and the object.

  Args:
    kind: "noise", "aggregation" or "cache", for errors.
    value: a name in `table`, "module:attribute", the object, or its name and the object; or, with
      parameters, as `makers.read` reads it.
    table: the known ones.
    fits: whether an object is one.
    known_makers: functions that make one with parameters.

  Raises:
    ValueError: there is none.
  """
  if isinstance(value, tuple):
    return value
  name = value
  if not isinstance(value, str):
    source = getattr(value, "add", value)  # an aggregation goes by the name of its function
    module, own = (getattr(source, f"__{a}__", None) for a in ("module", "qualname"))
    own = f"{module or '__main__'}:{own or type(source).__name__}"
    name = next((known for known, found in table.items() if found is value), None)
    name = name or makers.written(value) or own
  elif value in table:
    value = table[value]
  elif (made := makers.read(value, known_makers)) is not None:
    name, value = makers.written(made) or value, made
  elif ":" in value:
    module, _, attribute = value.partition(":")
    try:
      value = operator.attrgetter(attribute)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
      raise ValueError(
        f"cannot import {kind} {name!r}, which must be module:attribute: {error} (the current "
        "folder is searched under python -m, others through PYTHONPATH)"
      ) from error
  if isinstance(value, str) or not fits(value):
    raise ValueError(
      f"unknown {kind} {value!r}; choose one of {', '.join(table)}, or give module:attribute"
    )
  return name, value
