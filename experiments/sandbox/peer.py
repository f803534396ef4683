"""Calls from one sandboxed process to another, with the standard library only.

A judge calls a function that untrusted code defines in its own process. Arguments and answers
cross a pair of pipes as pickles. The judge reads an answer only if it consists of plain data:
no object in it has code of its own, so what compares equal to an expected value is equal.
"""

import builtins
import collections
import contextlib
import decimal
import fractions
import io
import os
import pickle
import struct

_LENGTH = struct.Struct("=Q")
_PLAIN = {
  (kind.__module__, kind.__qualname__): kind
  for kind in (
    bool,
    bytearray,
    bytes,
    complex,
    float,
    frozenset,
    int,
    list,
    range,
    set,
    str,
    collections.Counter,
    collections.OrderedDict,
    collections.defaultdict,
    collections.deque,
    decimal.Decimal,
    fractions.Fraction,
  )
}
_ANSWER, _ERROR = "answer", "error"


class _Pickler(pickle.Pickler):
  """Makes plain data of NumPy's scalars and of the views of dictionaries."""

  def reducer_override(self, obj):
    kind = type(obj)
    if kind.__module__ == "numpy" and getattr(obj, "shape", None) == () and hasattr(obj, "item"):
      item = obj.item()
      return type(item), (item,)
    if isinstance(obj, (type({}.keys()), type({}.items()))):
      return set, (list(obj),)
    return NotImplemented


class _Unpickler(pickle.Unpickler):
  def find_class(self, module, name):
    if (module, name) not in _PLAIN:
      raise TypeError(f"the answer is not plain data: it contains a {module}.{name}")
    return _PLAIN[module, name]


class Peer:
  """One end of the pipes."""

  def __init__(self, receiving: int, sending: int):
    self._receiving, self._sending = receiving, sending

  def call(self, *arguments):
    """Returns the other process's answer to a call.

    Raises:
      EOFError: the other process ended.
      TypeError: the answer is not plain data.
      Exception: the function raised an exception of this built-in type; RuntimeError for others.
    """
    with contextlib.suppress(BrokenPipeError):  # reading says that it ended
      self._send(pickle.dumps(arguments))
    try:
      kind, *answer = _Unpickler(io.BytesIO(self._receive())).load()
    except (pickle.UnpicklingError, ValueError, AttributeError, IndexError) as error:
      raise TypeError(f"the answer is not plain data: {error}") from error
    if kind == _ANSWER:
      return answer[0]
    name, text = answer
    error = getattr(builtins, str(name), None)
    if not (isinstance(error, type) and issubclass(error, Exception)):
      error = RuntimeError
    raise error(text)

  def serve(self, function) -> None:
    """Answers calls of a function until the other process ends."""
    while True:
      try:
        arguments = pickle.loads(self._receive())
      except EOFError:
        return
      try:
        file = io.BytesIO()
        _Pickler(file).dump((_ANSWER, function(*arguments)))
        answer = file.getvalue()
      except Exception as error:  # crosses to the caller
        answer = pickle.dumps((_ERROR, type(error).__name__, str(error)))
      self._send(answer)

  def _send(self, data):
    data = memoryview(_LENGTH.pack(len(data)) + data)
    while data:
      data = data[os.write(self._sending, data) :]

  def _receive(self):
    (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
    return self._read(length)

  def _read(self, length):
    data = bytearray()
    while len(data) < length:
      part = os.read(self._receiving, min(length - len(data), 1 << 20))
      if not part:
        raise EOFError("the process that defines the function has ended")
      data += part
    return bytes(data)
