"""Damages files in one place, at random but repeatably, and watches how they are read."""

import contextlib
import json
import math
import os
import resource
import signal
import struct

NESTED = "a list nested 100,000 deep"
# What stands in place of a JSON value.
VALUES = (
  *(None, True, False, 0, 1, -1, 2.5, 1e-30, 1e30, 10**9, 2**63, 10**400, math.nan, math.inf),
  *("", "x", "1", "\x1b]0;x\a", "a" * 5000, "\ud800", "../../x", [], [[]], {}, {"a": 1}, NESTED),
)
# What stands in place of the bytes of a binary number.
NUMBERS = (0, 1, 2, 255, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


def damage(random, path):
  """Changes one thing in a file and returns what, in words.

  Args:
    random: a `random.Random`.
    path: the file.
  """
  if random.random() < 0.12:
    return _whole_file(random, path)
  data = path.read_bytes()
  if path.suffix == ".jsonl":
    lines = data.splitlines(keepends=True)
    number = random.randrange(len(lines))
    how, lines[number] = _json_or_bytes(random, lines[number].rstrip(b"\n"))
    path.write_bytes(b"\n".join(line.rstrip(b"\n") for line in lines) + b"\n")
    return f"line {number}: {how}"
  if path.suffix == ".json":
    how, data = _json_or_bytes(random, data)
  elif path.suffix == ".safetensors" and random.random() < 0.7:
    how, data = _safetensors(random, data)
  elif path.suffix == ".gguf" and random.random() < 0.6:
    place = random.randrange(min(len(data), 20000) - 8)
    size, number = random.choice(["<I", "<Q"]), random.choice(NUMBERS)
    how = f"{number} as {size} at byte {place}"
    data = _put(data, place, struct.pack(size, number % 2 ** (8 * struct.calcsize(size))))
  else:
    how, data = _bytes(random, data)
  path.write_bytes(data)
  return how


def _whole_file(random, path):
  kinds = ["missing", "empty", "a folder", "a link to itself"]
  if path.suffix != ".jsonl":  # pipes are among what results may be written to
    kinds.append("a pipe")
  kind = random.choice(kinds)
  path.unlink()
  if kind == "empty":
    path.touch()
  elif kind == "a folder":
    path.mkdir()
  elif kind == "a link to itself":
    path.symlink_to(path.name)
  elif kind == "a pipe":
    os.mkfifo(path)
  return kind


def _put(data, place, new):
  return data[:place] + new + data[place + len(new) :]


def _bytes(random, data):
  place = random.randrange(max(1, len(data)))
  length = random.choice([1, 8, 100])
  kind = random.choice(["a flipped bit", "zeros", "cut off", "cut out", "twice", "more"])
  if kind == "a flipped bit" and data:
    new = _put(data, place, bytes([data[place] ^ 1 << random.randrange(8)]))
  elif kind == "zeros":
    new = _put(data, place, bytes(len(data[place : place + length])))
  elif kind == "cut off":
    new = data[:place]
  elif kind == "cut out":
    new = data[:place] + data[place + length :]
  elif kind == "twice":
    new = data[:place] + data[place : place + length] + data[place:]
  else:
    kind, new = "more", data + random.randbytes(length)
  return f"{kind} at byte {place}", new


def _json_or_bytes(random, data):
  if random.random() < 0.3:
    return _bytes(random, data)
  how, value = _json(random, json.loads(data))
  return how, _dump(value)


def _dump(value):
  text = json.dumps(value).replace(json.dumps(NESTED), "[" * 100000 + "]" * 100000)
  return text.encode()


def _json(random, document):
  """Changes a value somewhere in a document, in place where it has one."""
  places = []

  def walk(value, path):
    places.append(path)
    if isinstance(value, dict | list):
      items = value.items() if isinstance(value, dict) else enumerate(value)
      for key, inner in list(items)[:50]:
        walk(inner, (*path, key))

  walk(document, ())
  # As often near the top as deep within: a vocabulary would take all.
  depth = random.choice(sorted({len(path) for path in places}))
  path = random.choice([path for path in places if len(path) == depth])
  name = "/".join(map(str, path))
  new = random.choice(VALUES)
  if not path:
    return f"{str(new)[:40]!r} for all", new
  holder = document
  for key in path[:-1]:
    holder = holder[key]
  key, kind = path[-1], random.choice(["other", "other", "other", "without", "also"])
  if kind == "without":
    del holder[key]
    return f"without {name}", document
  if kind == "also":
    other = random.choice([inner for inner in places if len(inner) == depth])
    if isinstance(holder, dict):
      holder[str(new)[:40]] = other[-1]
    else:
      holder.append(holder[key])
    return f"one more next to {name}", document
  holder[key] = new
  return f"{str(new)[:40]!r} for {name}", document


def _safetensors(random, data):
  length = int.from_bytes(data[:8], "little")
  header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
  if random.random() < 0.2:
    number = random.choice(NUMBERS)
    return f"{number} as the header's length", struct.pack("<Q", number) + data[8:]
  how, header = _json(random, header)
  text = _dump(header)
  text += b" " * (-len(text) % 8)
  return f"header: {how}", struct.pack("<Q", len(text)) + text + rest


class Hang(BaseException):
  """Reading took too long."""


@contextlib.contextmanager
def bounds(seconds, num_bytes):
  """Raises `Hang` after `seconds`, and MemoryError for more than `num_bytes` in addition."""

  def stop(number, frame):
    raise Hang

  status = dict(
    line.split(":", 1) for line in open("/proc/self/status", encoding="utf-8") if ":" in line
  )
  used = int(status["VmData"].split()[0]) << 10
  limits = resource.getrlimit(resource.RLIMIT_DATA)
  before = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  resource.setrlimit(resource.RLIMIT_DATA, (used + num_bytes, limits[1]))
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_DATA, limits)
