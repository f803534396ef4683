"""Tuning objectives: a number per example of a task, under any roster.

* `Perplexity`: the summed negative log-probability (nats) of the example's reference and its
  end-of-text token (if it has one), in one teacher-forced pass; over examples, the perplexity.
* `Accuracy`: the task's main metric, of the most probable choice or of greedy generation;
  over examples, its mean.

An example's noise is addressed by its prompt, so every roster meets the same noise on it (common
random numbers).
"""

from collections.abc import Sequence
import dataclasses
import os
from typing import ClassVar

import numpy as np

from experiments.evaluation import engine as engine_lib
from experiments.evaluation.engine import Engine, Likelihood
from experiments.evaluation.requests import RequestBuilder, TaskRequests
from experiments.records.cost import Cost
from experiments.tasks import PERPLEXITY, Example, Task
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster


@dataclasses.dataclass(eq=False)
class _Objective:
  """Examples of a task with their requests.

  Attributes:
    config: the model's architecture.
    builder: makes the requests.
    task: the task.
    examples: of the task.
    batch_size: requests per batch.
    allow_code_execution: whether programs written by the model may run.
  """

  config: ModelConfig
  builder: RequestBuilder
  task: Task
  examples: Sequence[Example]
  batch_size: int
  allow_code_execution: bool = False

  def _answer(self, params, roster, requests, output_temperatures=(1.0,)):
    engine = Engine(params, self.config, self.builder.tokenizer, roster, self.batch_size)
    return engine.answer(requests, output_temperatures)


@dataclasses.dataclass(eq=False)
class Perplexity(_Objective):
  """Perplexity of the references of a task's examples.

  Attributes:
    requests: what is scored, for each example.
    tokens: `[X]` scored tokens of each example.

  Raises:
    ValueError: an example has no reference, or it does not fit the model.
  """

  name: ClassVar[str] = "perplexity"
  maximize: ClassVar[bool] = False

  def __post_init__(self):
    lacking = [e.id for e in self.examples if e.reference is None]
    if lacking:
      raise ValueError(
        f"task {self.task.name} has no reference text for {lacking[0]}, which "
        "--objective=perplexity needs: give --objective=accuracy"
      )
    asked = TaskRequests.of(self.builder, self.task, self.examples, num_samples=0)
    self.requests = asked.all_references
    self.tokens = np.array([len(r.tokens) for r in self.requests])

  def measure(self, params: Params, roster: Roster, part: slice) -> tuple[np.ndarray, Cost]:
    """Returns `[X]` negative log-probabilities of a slice of the examples, and the cost."""
    nll, cost = self.nll(params, roster, part)
    return nll[:, 0], cost

  def nll(
    self,
    params: Params,
    roster: Roster,
    part: slice,
    output_temperatures: Sequence[float] | np.ndarray = (1.0,),
  ) -> tuple[np.ndarray, Cost]:
    """Returns `[X, G]` negative log-probabilities at each output temperature, and the cost."""
    found = self.likelihoods(params, roster, part, output_temperatures)
    cost = engine_lib.total(dict(zip(self.requests[part], found)).values())
    return np.stack([likelihood.nll for likelihood in found]), cost

  def likelihoods(
    self,
    params: Params,
    roster: Roster,
    part: slice,
    output_temperatures: Sequence[float] | np.ndarray,
  ) -> list[Likelihood]:
    """Returns the likelihood of each reference of a slice of the examples."""
    return self._answer(params, roster, self.requests[part], output_temperatures)

  def value(self, values: np.ndarray) -> float:
    """Returns the perplexity of all examples, from the value of each."""
    return float(np.exp(values.sum() / self.tokens.sum()))


@dataclasses.dataclass(eq=False)
class Accuracy(_Objective):
  """A task's main metric.

  Attributes:
    metric: its name.
    requests: all that is asked.

  Raises:
    ValueError: examples differ in kind or do not fit the model, or the task runs code and this
      is not allowed.
  """

  name: ClassVar[str] = "accuracy"
  maximize: ClassVar[bool] = True

  def __post_init__(self):
    task, examples = self.task, self.examples
    task.check_allowed(self.allow_code_execution)
    if task.metric == PERPLEXITY:
      raise ValueError(
        f"task {task.name} has no right answers, which --objective=accuracy needs: give "
        "--objective=perplexity"
      )
    self.metric = task.metric
    if any(e.kind != examples[0].kind for e in examples):
      raise ValueError(f"task {task.name} mixes questions with and without choices")
    self._asked = TaskRequests.of(self.builder, task, examples)
    self.requests = self._asked.all_answering

  def measure(self, params: Params, roster: Roster, part: slice) -> tuple[np.ndarray, Cost]:
    """Returns `[X]` the metric of a slice of the examples, and the cost."""
    asked = self._asked[part]
    requests = asked.all_answering
    answers = self._answer(params, roster, requests)
    outputs = [
      [float(a.log_probs[0]) for a in some]
      if e.kind == "choose"
      else some[0].is_greedy
      if e.kind == "read"
      else some[0].text
      for e, some in zip(asked.examples, asked.by_example(answers))
    ]
    metrics = asked.task.score_all(
      asked.examples, outputs, self.allow_code_execution, workers=os.cpu_count() or 1
    )
    cost = engine_lib.total(dict(zip(requests, answers)).values())
    return np.array([m[self.metric] for m in metrics], float), cost

  def value(self, values: np.ndarray) -> float:
    """Returns the mean over all examples."""
    return float(values.mean())


Objective = Perplexity | Accuracy
OBJECTIVES: dict[str, type[Objective]] = {o.name: o for o in (Perplexity, Accuracy)}
