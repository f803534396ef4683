"""Device time by `jax.named_scope`, from a profiler trace."""

from collections import defaultdict
from collections.abc import Callable, Iterable
import pathlib
import re
import tempfile
from typing import Any, NamedTuple

import jax

SCOPES = ("embed", "attention", "router", "experts", "unembed")
OTHER = "other"
_INSTRUCTION = re.compile(r'%?([\w.-]+) = .*op_name="([^"]*)"')


class Event(NamedTuple):
  """An HLO instruction that ran: its name, the line (stream or thread), and nanoseconds."""

  name: str
  line: str
  start: float
  end: float


def scopes_of(hlo: str) -> dict[str, str]:
  """Returns the innermost scope of `SCOPES` of each instruction in a program's HLO text."""
  found = {}
  for line in hlo.splitlines():
    if match := _INSTRUCTION.search(line):
      found[match[1]] = _scope(match[2], {})
  return found


def _scope(name, scopes):
  """The scope of an instruction, or of an `op_name`."""
  found = next((part for part in reversed(re.findall(r"\w+", name)) if part in SCOPES), OTHER)
  return scopes.get(name, found)


def by_scope(events: Iterable[Event], scopes: dict[str, str], steps: int) -> dict[str, Any]:
  """Returns milliseconds per step in each scope, busy and idle.

  Instructions that contain others, such as loops, count only the time of their own. The device is
  idle where no instruction runs: between kernels and, if the host is late, between steps.
  """
  own: dict[str, float] = defaultdict(float)
  busy: list[list[float]] = []
  stacks: dict[str, list[Event]] = {}
  for event in sorted(events, key=lambda e: (e.start, -e.end)):
    stack = stacks.setdefault(event.line, [])
    while stack and stack[-1].end <= event.start:
      stack.pop()
    if stack:
      own[_scope(stack[-1].name, scopes)] -= min(event.end, stack[-1].end) - event.start
    own[_scope(event.name, scopes)] += event.end - event.start
    stack.append(event)
    if busy and event.start <= busy[-1][1]:
      busy[-1][1] = max(busy[-1][1], event.end)
    else:
      busy.append([event.start, event.end])
  if not busy:
    return {"scopes_ms": {}, "busy_ms": 0.0, "idle_ms": 0.0, "gaps_us": []}
  total = sum(end - start for start, end in busy)
  gaps = sorted((b[0] - a[1] for a, b in zip(busy, busy[1:])), reverse=True)
  unit = 1e6 * steps
  return {
    "scopes_ms": {scope: own[scope] / unit for scope in (*SCOPES, OTHER) if own[scope] > 0},
    "busy_ms": total / unit,
    "idle_ms": sum(gaps) / unit,
    # One gap lies between two steps; the others are within.
    "gaps_us": [round(gap / 1e3, 2) for gap in gaps[: steps - 1]],
  }


def read(data: Any) -> list[Event]:
  """Returns the instructions in a `jax.profiler.ProfileData`: a device's, else the host's.

  GPUs have a line per stream; TPUs one of instructions, which name the events, among others.
  """
  planes = list(data.planes)
  devices = [p for p in planes if p.name.startswith("/device:")]
  events = []
  for plane in devices or planes:
    for line in plane.lines:
      if devices and not line.name.startswith(("Stream", "XLA Ops")):
        continue
      for event in line.events:
        stats = dict(event.stats)
        name = stats.get("hlo_op") or stats.get("tf_op")
        if name is None and devices:
          name = event.name.split(" = ")[0].lstrip("%")
        if name is not None:
          start = event.start_ns
          events.append(Event(str(name), line.name, start, start + event.duration_ns))
  return events


def profile(call: Callable[[int], None], hlo: str, steps: int) -> dict[str, Any]:
  """Traces `call(steps)` and returns its `by_scope`."""
  call(steps)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      call(steps)
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    events = read(jax.profiler.ProfileData.from_file(str(path)))
  return by_scope(events, scopes_of(hlo), steps) | {"events": len(events)}
