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
import os
from typing import ClassVar

import numpy as np

from experiments.evaluation.prompts import PromptBuilder
from experiments.tasks import Example, Task
from roe_jax import batching, decode, scoring
from roe_jax.config import ModelConfig
from roe_jax.numerics import naming_sequences
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
    passes = (
      p
      for tokens, start in zip(self.tokens, self.starts)
      for p in roster.cache_mode.scoring(roster, len(tokens), start)
    )
    return Usage(int(self.counts.sum()), sum(p.tokens for p in passes))


@dataclasses.dataclass(eq=False)
class _Objective:
  """Encoded examples of a task.

  Attributes:
    config: the model's architecture.
    prompt_builder: for the task's prompts.
    task: the task.
    examples: of the task.
    ids: address of each example's noise.
    batch_size: sequences per batch.
    allow_code_execution: whether programs written by the model may run.
  """

  config: ModelConfig
  prompt_builder: PromptBuilder
  task: Task
  examples: Sequence[Example]
  ids: Sequence[int]
  batch_size: int
  allow_code_execution: bool = False

  def longest(self) -> tuple[int, bool]:
    """Returns the most tokens that a sequence can have, and whether sequences are scored."""
    if isinstance(self, Perplexity):
      return max(map(len, self.sequences)), True
    if self.examples[0].kind == "choose":
      return max(len(t) for choices in self._choices for t in choices.tokens), True
    return max(map(len, self._prompts)) + self.examples[0].max_new_tokens, False

  def _score(self, params, roster, sequences, output_temperatures=(1.0,)):
    with naming_sequences([f"example {i}" for i in sequences.ids]):
      return scoring.score(
        params,
        self.config,
        sequences.tokens,
        sequences.starts,
        roster=roster,
        request_ids=sequences.ids,
        output_temperatures=output_temperatures,
        batch_size=self.batch_size,
      ).sequences


@dataclasses.dataclass(eq=False)
class Perplexity(_Objective):
  """Perplexity of the references of a task's examples.

  Attributes:
    tokens: `[X]` scored tokens of each example.
    sequences, starts: token ids of each example, and the index of the first scored one.

  Raises:
    ValueError: an example has no reference, or exceeds the context length.
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
    self._sequences = _Sequences.of(
      map(self.prompt_builder.with_reference, self.examples), self.ids
    )
    batching.check_tokens(self.config, self._sequences.tokens, what="text of example")
    self.sequences, self.starts = self._sequences.tokens, self._sequences.starts
    self.tokens = self._sequences.counts

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
    scores = self._score(params, roster, self._sequences[part], output_temperatures)
    return np.stack([-s.log_probs.sum(axis=0, dtype=np.float64) for s in scores])

  def value(self, values: np.ndarray) -> float:
    """Returns the perplexity of all examples, from the value of each."""
    return float(np.exp(values.sum() / self.tokens.sum()))


@dataclasses.dataclass(eq=False)
class Accuracy(_Objective):
  """A task's main metric.

  Attributes:
    metric: its name.

  Raises:
    ValueError: an example exceeds the context length, or the task runs code and this is not
      allowed.
  """

  name: ClassVar[str] = "accuracy"
  maximize: ClassVar[bool] = True

  def __post_init__(self):
    task, examples, builder = self.task, self.examples, self.prompt_builder
    task.check_allowed(self.allow_code_execution)
    self.metric = task.metric
    if any(e.kind != examples[0].kind for e in examples):
      raise ValueError(f"task {task.name} mixes questions with and without choices")
    if examples[0].kind == "choose":
      self._choices = [
        _Sequences.of([builder.with_text(e, c) for c in e.choices], [i] * len(e.choices))
        for e, i in zip(examples, self.ids)
      ]
      for e, choices in zip(examples, self._choices):
        batching.check_tokens(self.config, choices.tokens, what=f"{e.id}: choice")
    else:
      self._prompts = [builder.prompt(e) for e in examples]
      batching.check_tokens(self.config, self._prompts, room=1, what="prompt of example")
      if len({(e.stop, e.max_new_tokens) for e in examples}) > 1:
        raise ValueError(f"the examples of task {task.name} differ in their stop strings or limits")

  def measure(self, params: Params, roster: Roster, part: slice) -> tuple[np.ndarray, Usage]:
    """Returns `[X]` the metric of a slice of the examples, and the compute."""
    examples = self.examples[part]
    chooses = examples[0].kind == "choose"
    outputs, usage = (self._choose if chooses else self._generate)(params, roster, part)
    metrics = self.task.score_all(
      examples, outputs, self.allow_code_execution, workers=os.cpu_count()
    )
    return np.array([m[self.metric] for m in metrics], float), usage

  def _choose(self, params, roster, part):
    by_example = self._choices[part]
    fields = ("tokens", "starts", "ids")
    sequences = _Sequences(*([x for s in by_example for x in getattr(s, f)] for f in fields))
    scores = self._score(params, roster, sequences)
    sums = iter([float(s.log_probs.sum(dtype=np.float64)) for s in scores])
    return [[next(sums) for _ in s.tokens] for s in by_example], sequences.usage(roster)

  def _generate(self, params, roster, part):
    first, builder, prompts = self.examples[0], self.prompt_builder, self._prompts[part]
    with naming_sequences([f"example {i}" for i in self.ids[part]]):
      found = decode.generate(
        params,
        self.config,
        prompts,
        max_new_tokens=first.max_new_tokens,
        roster=roster,
        stop_tokens=builder.stop_tokens,
        stop_strings=first.stop,
        decode=builder.tokenizer.decode,
        stop_reader=builder.stop_reader(self.examples[part]),
        request_ids=list(self.ids[part]),
        batch_size=self.batch_size,
      )
    passes = (
      p
      for prompt, completion in zip(prompts, found.completions)
      for p in roster.cache_mode.generation(roster, len(prompt), len(completion.tokens))
    )
    answers = [builder.answer(e, c) for e, c in zip(self.examples[part], found.completions)]
    return answers, Usage(found.throughput.tokens, sum(p.tokens for p in passes))

  def value(self, values: np.ndarray) -> float:
    """Returns the mean over all examples."""
    return float(values.mean())


Objective = Perplexity | Accuracy
OBJECTIVES: dict[str, type[Objective]] = {o.name: o for o in (Perplexity, Accuracy)}
