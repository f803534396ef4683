"""Measures a method on examples: outputs with their cost, and likelihoods."""

from collections.abc import Sequence
import dataclasses
from typing import Any

from experiments.analysis import output_temperatures as output_temperatures_lib
from experiments.evaluation import engine as engine_lib
from experiments.evaluation.engine import Engine, Likelihood
from experiments.evaluation.methods import Method
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
    size = method.num_samples * self._batch_size
    roster = method.with_seed(seed)
    engine = Engine(self._params, method.config, self._builder.tokenizer, roster, size)
    sampler = method.sampling
    return engine, TaskRequests.of(self._builder, task, examples, method.num_samples, sampler)

  def answer(
    self,
    method: Method,
    seed: int,
    task: Task,
    examples: Sequence[Example],
    output_temperatures: Sequence[float] = (1.0,),
    count_experts: bool = False,
  ) -> Measured:
    """Returns the method's answers.

    Args:
      method: the method.
      seed: the noise seed.
      task: the task.
      examples: its examples, all of one kind.
      output_temperatures: `[G]`, of likelihoods.
      count_experts: whether the cost includes unique active experts.
    """
    engine, asked = self._ask(method, seed, task, examples)
    requests = asked.all_answering
    answers = engine.answer(requests, output_temperatures_lib.padded(output_temperatures))
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
      outputs, details, likelihoods, counted = [], [], [], 0
      for samples in by_example:
        texts = [s.text for s in samples]
        picked = 0
        if method.num_samples > 1:
          picked = method.pick(task, [s.completion for s in samples], texts)
        outputs.append(texts[picked])
        sampled = {"samples": texts, "picked": picked} if method.num_samples > 1 else {}
        details.append({"output": texts[picked], **sampled})
        counted += len(samples[picked].completion.tokens)
      cost = dataclasses.replace(cost, tokens=counted)
    if count_experts:
      cost += engine.experts_read(requests, written)
    return Measured(outputs, details, cost, likelihoods)

  def likelihoods(
    self,
    method: Method,
    seed: int,
    task: Task,
    examples: Sequence[Example],
    output_temperatures: Sequence[float],
  ) -> list[Likelihood | None]:
    """Returns the likelihood of each example's reference and end of text; None without one.

    The likelihood of an example with choices is that of the right one. See `answer`.
    """
    if examples[0].kind == "choose":
      return self.answer(method, seed, task, examples, output_temperatures).likelihoods
    engine, asked = self._ask(method, seed, task, examples)
    temperatures = output_temperatures_lib.padded(output_temperatures)
    found = iter(engine.answer(asked.all_references, temperatures))
    return [None if r is None else next(found) for r in asked.references]
