"""Selections: which of several samples of an answer is used."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
import dataclasses

import numpy as np

from experiments.tasks import Task, llm_adapters, wordmath
from experiments.tasks.wordmath_task import WORDMATH
from roe_jax.completion import Completion

# {task: extracts the answer to vote on}
EXTRACT: dict[str, Callable[[str], Hashable | None]] = {
  **{task.name: wordmath.extract for task in WORDMATH if task.metric == "exact_match"},
  **{task.name: llm_adapters.extract_number for task in llm_adapters.MATH},
}


@dataclasses.dataclass(frozen=True)
class Samples:
  """n samples of the answer to one example.

  Attributes:
    task: the example's task.
    texts: `[n]`, the answers.
    completions: `[n]`, all that was generated.
    routing: `[n, L, E]` gates at each sample's last token; None unless the selection needs it.
    metrics: `[n]`, the task's metric of each; None unless the selection needs it.
  """

  task: Task
  texts: Sequence[str]
  completions: Sequence[Completion]
  routing: np.ndarray | None = None
  metrics: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True)
class Selection:
  """A rule to select one sample.

  Attributes:
    pick: returns the index of the selected sample.
    numbers: whether it compares answers, which only tasks in `EXTRACT` have.
    needs_routing, needs_metrics: whether it uses these fields of `Samples`.
  """

  pick: Callable[[Samples], int]
  numbers: bool = False
  needs_routing: bool = False
  needs_metrics: bool = False


def vote(answers: Sequence[Hashable | None]) -> int:
  """Returns the first index of the most frequent answer; ties go to the earliest.

  None (no answer extracted) wins only if all are None.
  """
  votes = Counter(a for a in answers if a is not None)
  return answers.index(votes.most_common(1)[0][0]) if votes else 0


def _by_vote(samples):
  return vote([EXTRACT[samples.task.name](text) for text in samples.texts])


def _by_likelihood(samples):
  return int(np.argmax([sum(c.log_probs) for c in samples.completions]))


def densest(routing: np.ndarray) -> int:
  """Returns the sample whose routing is most like that of its nearest neighbors.

  The similarity of two samples is the weighted Jaccard index of their gates, sum of the smaller
  ones over sum of the larger ones; the neighbors are half of the others. After RAD (arXiv
  2606.22798), at the last token of each sample.

  Args:
    routing: `[n, L, E]` gates.
  """
  flat = np.asarray(routing, np.float64).reshape(len(routing), -1)
  smaller, larger = (f(flat[:, None], flat[None]).sum(-1) for f in (np.minimum, np.maximum))
  similarity = smaller / larger
  np.fill_diagonal(similarity, -np.inf)
  neighbors = np.sort(similarity, axis=1)[:, ::-1][:, : max(1, (len(flat) - 1) // 2)]
  return int(neighbors.mean(axis=1).argmax())


SELECTIONS = {
  "vote": Selection(_by_vote, numbers=True),
  "likelihood": Selection(_by_likelihood),
  "routing": Selection(lambda samples: densest(np.asarray(samples.routing)), needs_routing=True),
  # pass@n: as if a judge knew the right answer; an upper bound, not a method to use.
  "any": Selection(lambda samples: int(np.asarray(samples.metrics).argmax()), needs_metrics=True),
}
