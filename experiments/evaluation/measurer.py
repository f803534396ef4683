"""Measures a method on examples: outputs with their cost, and likelihoods."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import numpy as np

from experiments.analysis import output_temperatures as output_temperatures_lib
from experiments.evaluation import engine as engine_lib
from experiments.evaluation.engine import Engine, Likelihood
from experiments.evaluation.method import Method
from experiments.evaluation.picking import SELECTIONS, Samples
from experiments.evaluation.requests import RequestBuilder, TaskRequests
from experiments.records.cost import Cost
from experiments.tasks import Example, Task
from roe_jax.params import Params


@dataclasses.dataclass(frozen=True)
class Measured:
  """A method's answers to X examples.

  Attributes:
    outputs: `[X]`, for `Task.score_all`.
    details: `[X]` further entries of each example's record.
    cost: the cost of all answers.
    likelihoods: `[X]` of each example's right choice or read text; empty for generated answers.
  """

  outputs: list[Any]
  details: list[dict[str, Any]]
  cost: Cost
  likelihoods: list[Likelihood] = dataclasses.field(default_factory=list)


class Measurer:
  """Measures methods on one model."""

  def __init__(self, params: Params, builder: RequestBuilder, batch_size: int):
    """Creates a measurer that answers `batch_size` examples at once."""
    self._params, self._builder, self._batch_size = params, builder, batch_size

  def _ask(self, method, seed, task, examples):
    """Returns the requests, and the engine of each of these samples of an example."""
    counts = method.sample_experts or [None]
    size = method.num_samples // len(counts) * self._batch_size
    roster, engines = method.with_seed(seed), []
    for count in counts:
      own = roster if count is None else roster.replace(experts_by_layer=count)
      engines.append(Engine(self._params, method.config, self._builder.tokenizer, own, size))
    sampler = method.sampling
    return engines, TaskRequests.of(self._builder, task, examples, method.num_samples, sampler)

  def answer(
    self,
    method: Method,
    seed: int,
    task: Task,
    examples: Sequence[Example],
    output_temperatures: Sequence[float] | np.ndarray = (1.0,),
    count_experts: bool = False,
    judge: Callable[[list[str]], Sequence[float]] | None = None,
  ) -> Measured:
    """Returns the method's answers.

    Args:
      method: the method.
      seed: the noise seed.
      task: the task.
      examples: its examples, all of one kind.
      output_temperatures: `[G]`, of likelihoods.
      count_experts: whether the cost includes unique active experts.
      judge: returns the metric of one answer to each example; for selections that need it.
    """
    engines, asked = self._ask(method, seed, task, examples)
    requests, every = asked.all_answering, len(engines)
    answers: list[Any] = [None] * len(requests)
    for i, engine in enumerate(engines):  # an example's samples follow each other
      temperatures = output_temperatures_lib.padded(output_temperatures)
      answers[i::every] = engine.answer(requests[i::every], temperatures)
    by_example = list(asked.by_example(answers))
    cost = engine_lib.total(dict(zip(requests, answers)).values())
    if examples[0].kind == "read":
      written = [()] * len(requests)
      outputs, details, likelihoods = (
        [a.is_greedy for a in answers],
        [{} for _ in examples],
        answers,
      )
    elif examples[0].kind == "choose":
      written = [()] * len(requests)
      outputs = [[float(c.log_probs[0]) for c in choices] for choices in by_example]
      details = [{} for _ in examples]
      likelihoods = [engine_lib.of_choices(*both) for both in zip(examples, by_example)]
    else:
      written = [a.completion.tokens for a in answers]
      picked = self._pick(method, task, by_example, engines, requests, written, judge)
      outputs = [samples[i].text for samples, i in zip(by_example, picked)]
      details, likelihoods = [{"output": output} for output in outputs], []
      if method.num_samples > 1:
        for detail, samples, i in zip(details, by_example, picked):
          detail |= {"samples": [s.text for s in samples], "picked": i}
      counted = sum(len(samples[i].completion.tokens) for samples, i in zip(by_example, picked))
      cost = dataclasses.replace(cost, tokens=counted)
    if count_experts:
      for i, engine in enumerate(engines):
        cost += engine.experts_read(requests[i::every], written[i::every])
    return Measured(outputs, details, cost, likelihoods)

  def _pick(self, method, task, by_example, engines, requests, written, judge):
    """Returns the index of the selected sample of each example."""
    n, selection = method.num_samples, SELECTIONS[method.select]
    if n == 1:
      return [0] * len(by_example)
    routing: Sequence[Any] = [[None] * n for _ in by_example]
    metrics: Sequence[Any] = routing
    if selection.needs_routing:
      states, every = [np.empty(0)] * len(requests), len(engines)
      for i, engine in enumerate(engines):
        states[i::every] = engine.last_gates(requests[i::every], written[i::every])
      routing = [np.stack(states[i : i + n]) for i in range(0, len(states), n)]
    if selection.needs_metrics:
      by_sample = [judge([samples[i].text for samples in by_example]) for i in range(n)]
      metrics = list(zip(*by_sample))
    return [
      selection.pick(Samples(task, [s.text for s in some], [s.completion for s in some], *more))
      for some, *more in zip(by_example, routing, metrics)
    ]

  def likelihoods(
    self,
    method: Method,
    seed: int,
    task: Task,
    examples: Sequence[Example],
    output_temperatures: Sequence[float] | np.ndarray,
  ) -> Sequence[Likelihood | None]:
    """Returns the likelihood of each example's reference and end of text; None without one.

    The likelihood of an example with choices is that of the right one. See `answer`.
    """
    if examples[0].kind == "choose":
      return self.answer(method, seed, task, examples, output_temperatures).likelihoods
    (engine,), asked = self._ask(method, seed, task, examples)
    temperatures = output_temperatures_lib.padded(output_temperatures)
    found = iter(engine.answer(asked.all_references, temperatures))
    return [None if r is None else next(found) for r in asked.references]
