"""Passages whose last words are scored: requests, and batches that more passages only add to."""

from collections.abc import Callable, Iterator, Sequence
import itertools

from experiments import tasks
from experiments.evaluation.requests import Continuation, RequestBuilder, TaskRequests

PART = 160  # requests that batches are made of


def requests(
  builder: RequestBuilder, task: str, split: str, data_dir: str | None, count: int
) -> list[Continuation]:
  """Returns the requests to score the references of a task."""
  examples = tasks.get(task).examples(split, data_dir, count)
  return TaskRequests.of(builder, tasks.get(task), examples).all_references


def batches(
  some: Sequence[Continuation], size: int, kind: Callable[[Continuation], int]
) -> Iterator[list[int]]:
  """Yields the indices of each batch.

  Batches are of one kind and similar lengths, within parts of the requests in their order, so that
  more requests only add batches.
  """
  for first in range(0, len(some), PART):
    part = range(first, min(first + PART, len(some)))
    order = sorted(part, key=lambda i: (kind(some[i]), some[i].max_length))
    for _, group in itertools.groupby(order, lambda i: kind(some[i])):
      group = list(group)
      yield from (group[begin : begin + size] for begin in range(0, len(group), size))
