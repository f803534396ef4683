"""Counts the collectives of a compiled program from its HLO text."""

from collections import Counter
from collections.abc import Iterator
import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation, as seen by one device.

  Attributes:
    kind: one of `KINDS`.
    num_bytes: size of the whole array that is gathered, reduced, scattered,
      exchanged or permuted.
    devices: group size.
  """

  kind: str
  num_bytes: int
  devices: int

  @property
  def bytes_sent(self) -> float:
    """Bytes that a device sends in a ring; an all-reduce is a reduce-scatter and all-gather."""
    if self.kind == "collective-permute":
      return self.num_bytes
    rounds = 2 if self.kind == "all-reduce" else 1
    return rounds * self.num_bytes * (self.devices - 1) / self.devices


# Result type and kind of a collective instruction.
RESULT = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) .*\{$")
_CALLED = re.compile(
  r"\b(?:body|condition|to_apply|calls|branch_computations|called_computations|"
  r"true_computation|false_computation)=(?:%([\w.-]+)|\{([^}]*)\})"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def count_collectives(text: str) -> Counter[Collective]:
  """Counts how often each collective runs in a compiled program.

  Loop bodies count once per known trip, and once where the compiler does not know the
  trip count: `decode.decode_steps` counts as one step, and an all-to-all exchange of
  tokens as one round. All branches of a conditional are counted.

  Args:
    text: the HLO text from `jax.stages.Compiled.as_text`.

  Raises:
    ValueError: the text has no entry computation.
  """
  found: dict[str, Counter] = {}
  called: dict[str, list[tuple[str, int]]] = {}
  entry = name = None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      name = match[1]
      found[name], called[name] = Counter(), []
      entry = name if line.startswith("ENTRY") else entry
    elif name is not None:
      if match := RESULT.search(line):
        found[name][_collective(line, *match.groups())] += 1
      called[name] += _calls(line)
  totals: dict[str, Counter] = {}

  def total(name):
    if name not in totals:
      totals[name] = Counter(found[name])
      for other, times in called[name]:
        for collective, count in total(other).items():
          totals[name][collective] += times * count
    return totals[name]

  if entry is None:
    raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
  return total(entry)


def _calls(line) -> Iterator[tuple[str, int]]:
  """Yields the computations that an instruction calls, and how often."""
  trips = _TRIPS.search(line)
  times = int(trips[1]) if trips else 1
  for one, several in _CALLED.findall(line):
    for name in [one] if one else re.findall(r"%([\w.-]+)", several):
      yield name, times


def _collective(line, result, kind):
  devices = _group_size(line)
  size = sum(
    math.prod(int(d) for d in dims.split(",") if d) * (int(bits) // 8 if bits else 1)
    for _, bits, dims in _ARRAY.findall(result)
  )
  return Collective(kind, size * devices if kind == "reduce-scatter" else size, devices)


def _group_size(line):
  """Returns the group size from any of the forms in which XLA prints groups."""
  if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
    return match[1].count(",") + 1
  if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
    return int(match[1])
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{((?:'[^']*'(?:, ?)?)+)\}", line):
    sizes = dict(re.findall(r"'([^']*)'=(\d+)", match[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']*)'", match[2]))
  return 2  # a permutation has pairs instead of groups
