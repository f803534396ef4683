"""Passages whose last words are read: requests, batches that more only add to, distributions."""

from collections.abc import Callable, Iterator, Sequence
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from experiments import tasks
from experiments.evaluation.requests import Continuation, RequestBuilder, TaskRequests
from roe_jax import diagnostics
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster

PART = 160  # requests that batches are made of


def requests(
  builder: RequestBuilder, task: str, split: str, data_dir: str | None, count: int
) -> list[Continuation]:
  """Returns the requests to score the references of a task."""
  examples = tasks.get(task).examples(split, data_dir, count)
  return TaskRequests.of(builder, tasks.get(task), examples).all_references


def num_positions(request: Continuation) -> int:
  """Returns a power of two of positions that has all tokens, if there are as many: few shapes."""
  return min(1 << (len(request.tokens) - 1).bit_length(), request.max_length - 1)


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


@jax.jit
def _mean_distribution(logits):
  """Returns log-probabilities `[B, T, V]` of the mean of the members' distributions."""
  return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - jnp.log(len(logits))


def each_distribution(
  params: Params,
  config: ModelConfig,
  rosters: list[Roster],
  texts: list[Continuation],
  batch_size: int,
) -> Iterator[tuple[int, list[np.ndarray]]]:
  """Yields each text's index, in the order of batches, and what `distributions` has of it."""
  for indices in batches(texts, batch_size, num_positions):
    some = [texts[i] for i in indices]
    padded = [*some, *[some[-1]] * (batch_size - len(some))]  # one shape
    logits = diagnostics.last_member_logits(
      params,
      config,
      [r.sequence[:-1] for r in padded],
      rosters,
      request_ids=[r.request_id for r in padded],
      num_positions=num_positions(some[0]),
    )
    found = [np.asarray(_mean_distribution(of_members)) for of_members in logits]
    for b, (i, r) in enumerate(zip(indices, some)):
      yield i, [log_probs[b, -len(r.tokens) :] for log_probs in found]


def distributions(
  params: Params,
  config: ModelConfig,
  rosters: list[Roster],
  texts: list[Continuation],
  batch_size: int,
) -> list[list[np.ndarray]]:
  """Returns for each roster the log-probabilities `[T, V]` at each text's tokens."""
  found = dict(each_distribution(params, config, rosters, texts, batch_size))
  return [[found[i][r] for i in range(len(texts))] for r in range(len(rosters))]
