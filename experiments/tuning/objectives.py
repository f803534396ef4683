"""Tuning objectives: a number per example of a task, under any roster.

* `Perplexity`: the summed negative log-probability (nats) of the example's reference and its
  end-of-text token (if it has one), in one teacher-forced pass; over examples, the perplexity.
* `Accuracy`: the task's main metric, of the most probable choice or of greedy generation;
  over examples, its mean.

An example's noise is addressed by its index in the validation split, so every roster meets the
same noise on it (common random numbers); the choices of a question share theirs.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import itertools
import os
from typing import ClassVar

import numpy as np

from experiments.evaluation.prompts import PromptBuilder
from experiments.tasks import Example, Task
from roe_jax import batching, decode, scoring
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster


@dataclasses.dataclass(frozen=True)
class Usage:
  """Compute used by a measurement.

  Attributes:
    tokens: scored or generated.
    forward_passes: tokens x members.
  """

  tokens: int = 0
  forward_passes: int = 0

  def __add__(self, other: "Usage") -> "Usage":
    return Usage(self.tokens + other.tokens, self.forward_passes + other.forward_passes)


@dataclasses.dataclass(frozen=True)
class _Sequences:
  """Sequences to score: token ids, first scored token, and address of the noise."""

  tokens: list[list[int]]
  starts: list[int]
  ids: list[int]

  @classmethod
  def of(cls, pairs: Iterable[tuple[list[int], int]], ids: Sequence[int]) -> "_Sequences":
    """Makes sequences from pairs of tokens and start, as `PromptBuilder` returns them."""
    tokens, starts = zip(*pairs)
    return cls(list(tokens), list(starts), list(ids))

  def __getitem__(self, part: slice) -> "_Sequences":
    return _Sequences(self.tokens[part], self.starts[part], self.ids[part])

  @property
  def counts(self) -> np.ndarray:
    """`[X]` scored tokens."""
    return np.array([len(t) for t in self.tokens]) - np.array(self.starts)

  def usage(self, roster: Roster) -> Usage:
    """Returns the compute for scoring them."""
    prefilled = sum(map(len, self.tokens)) - len(self.tokens)
    scored, members = int(self.counts.sum()), len(roster.members)
    if roster.is_baseline or roster.cache == "standard":
      return Usage(scored, prefilled * members)
    return Usage(scored, prefilled + scored * members)


class Perplexity:
  """Perplexity of the references of a task's examples.

  Attributes:
    tokens: `[X]` scored tokens of each example.
    texts, starts: token ids of each example, and the index of the first scored one.
    examples: the examples.
  """

  name: ClassVar[str] = "perplexity"
  maximize: ClassVar[bool] = False

  def __init__(
    self,
    config: ModelConfig,
    prompt_builder: PromptBuilder,
    task: Task,
    examples: Sequence[Example],
    ids: Sequence[int],
    batch_size: int,
    allow_code_execution: bool = False,
  ):
    """Encodes the examples.

    Args:
      config: the model's architecture.
      prompt_builder: for the task's prompts.
      task: the task.
      examples: of the task.
      ids: address of each example's noise.
      batch_size: sequences per batch.
      allow_code_execution: unused.

    Raises:
      ValueError: an example has no reference, or exceeds the context length.
    """
    del allow_code_execution
    lacking = [e.id for e in examples if e.reference is None]
    if lacking:
      raise ValueError(
        f"task {task.name} has no reference text for {lacking[0]}, which --objective=perplexity "
        "needs: give --objective=accuracy"
      )
    self.examples = examples
    self._sequences = _Sequences.of(map(prompt_builder.with_reference, examples), ids)
    batching.check_tokens(config, self._sequences.tokens, what="text of example")
    self.texts, self.starts = self._sequences.tokens, self._sequences.starts
    self.tokens = self._sequences.counts
    self._config, self._batch_size = config, batch_size

  def measure(self, params: Params, roster: Roster, part: slice) -> tuple[np.ndarray, Usage]:
    """Returns `[X]` negative log-probabilities of a slice of the examples, and the compute."""
    return self.nll(params, roster, part)[:, 0], self.usage(roster, part)

  def usage(self, roster: Roster, part: slice) -> Usage:
    """Returns the compute of `measure`."""
    return self._sequences[part].usage(roster)

  def nll(
    self, params: Params, roster: Roster, part: slice, output_temperatures: Sequence[float] = (1.0,)
  ) -> np.ndarray:
    """Returns `[X, G]` negative log-probabilities at each output temperature."""
    sequences = self._sequences[part]
    scores = scoring.score(
      params,
      self._config,
      sequences.tokens,
      sequences.starts,
      roster=roster,
      request_ids=sequences.ids,
      output_temperatures=output_temperatures,
      batch_size=self._batch_size,
    )
    return np.stack([-t.log_probs.sum(axis=0, dtype=np.float64) for t in scores.sequences])

  def value(self, values: np.ndarray) -> float:
    """Returns the perplexity of all examples, from the value of each."""
    return float(np.exp(values.sum() / self.tokens.sum()))


class Accuracy:
  """A task's main metric.

  Attributes:
    metric: its name.
    examples: the examples.
  """

  name: ClassVar[str] = "accuracy"
  maximize: ClassVar[bool] = True

  def __init__(
    self,
    config: ModelConfig,
    prompt_builder: PromptBuilder,
    task: Task,
    examples: Sequence[Example],
    ids: Sequence[int],
    batch_size: int,
    allow_code_execution: bool = False,
  ):
    """Encodes the examples; see `Perplexity`.

    Raises:
      ValueError: an example exceeds the context length, or the task runs code and this is
        not allowed.
    """
    task.check_allowed(allow_code_execution)
    self.examples = examples
    self.metric = task.metric
    self._task, self._allowed, self._builder = task, allow_code_execution, prompt_builder
    self._config, self._batch_size = config, batch_size
    if any(e.kind != examples[0].kind for e in examples):
      raise ValueError(f"task {task.name} mixes questions with and without choices")
    if examples[0].kind == "choose":
      self._choices = [
        _Sequences.of([prompt_builder.with_text(e, c) for c in e.choices], [i] * len(e.choices))
        for e, i in zip(examples, ids)
      ]
      for e, choices in zip(examples, self._choices):
        batching.check_tokens(config, choices.tokens, what=f"{e.id}: choice")
    else:
      self._prompts, self._ids = [prompt_builder.prompt(e) for e in examples], list(ids)
      batching.check_tokens(config, self._prompts, room=1, what="prompt of example")
      if len({(e.stop, e.max_new_tokens) for e in examples}) > 1:
        raise ValueError(f"the examples of task {task.name} differ in their stop strings or limits")

  def measure(self, params: Params, roster: Roster, part: slice) -> tuple[np.ndarray, Usage]:
    """Returns `[X]` the metric of a slice of the examples, and the compute."""
    examples = self.examples[part]
    chooses = examples[0].kind == "choose"
    outputs, usage = (self._choose if chooses else self._generate)(params, roster, part)
    metrics = self._task.score_all(examples, outputs, self._allowed, workers=os.cpu_count())
    return np.array([m[self.metric] for m in metrics], float), usage

  def _choose(self, params, roster, part):
    by_example = self._choices[part]
    sequences = _Sequences(
      *(
        list(itertools.chain.from_iterable(getattr(t, name) for t in by_example))
        for name in ("tokens", "starts", "ids")
      )
    )
    scores = scoring.score(
      params,
      self._config,
      sequences.tokens,
      sequences.starts,
      roster=roster,
      request_ids=sequences.ids,
      batch_size=self._batch_size,
    )
    sums = iter([float(t.log_probs.sum(dtype=np.float64)) for t in scores.sequences])
    return [[next(sums) for _ in t.tokens] for t in by_example], sequences.usage(roster)

  def _generate(self, params, roster, part):
    first, prompts = self.examples[0], self._prompts[part]
    found = decode.generate(
      params,
      self._config,
      prompts,
      max_new_tokens=first.max_new_tokens,
      roster=roster,
      stop_tokens=self._builder.stop_tokens,
      stop_strings=first.stop,
      decode=self._builder.tokenizer.decode,
      request_ids=self._ids[part],
      batch_size=self._batch_size,
    )
    tokens, members = found.throughput.tokens, len(roster.members)
    prefilled = sum(map(len, prompts)) - len(prompts)
    prefilled *= members if roster.cache == "standard" else 1
    answers = [self._builder.answer(e, c) for e, c in zip(self.examples[part], found.completions)]
    return answers, Usage(tokens, prefilled + tokens * members)

  def value(self, values: np.ndarray) -> float:
    """Returns the mean over all examples."""
    return float(values.mean())


Objective = Perplexity | Accuracy
OBJECTIVES: dict[str, type[Objective]] = {o.name: o for o in (Perplexity, Accuracy)}
