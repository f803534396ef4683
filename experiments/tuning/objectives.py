"""What tuning optimizes: a number for each example of a task, under any roster.

* `Perplexity`: the summed negative log-probability (nats) of the example's
  reference text and of the end of text behind it (which a text only to be read
  has not), in one teacher-forced pass; over many examples, the perplexity.
* `Accuracy`: the task's main metric, of the most probable choice or of a text
  generated greedily; over many examples, its mean.

An example's randomness is addressed by its place in the validation split, so
that every roster meets the same noise on it (common random numbers); the choices
of a question share theirs.
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
class Cost:
  """What measuring took.

  Attributes:
    tokens: scored or generated.
    forward_passes: positions that passed through the network, once for each
      member there.
  """

  tokens: int = 0
  forward_passes: int = 0

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(self.tokens + other.tokens, self.forward_passes + other.forward_passes)


@dataclasses.dataclass(frozen=True)
class _Texts:
  """Texts to score: token ids, first scored token, and address of the noise."""

  tokens: list[list[int]]
  starts: list[int]
  ids: list[int]

  @classmethod
  def of(cls, pairs: Iterable[tuple[list[int], int]], ids: Sequence[int]) -> "_Texts":
    """From pairs of tokens and start, as `PromptBuilder` gives them."""
    tokens, starts = zip(*pairs)
    return cls(list(tokens), list(starts), list(ids))

  def __getitem__(self, part: slice) -> "_Texts":
    return _Texts(self.tokens[part], self.starts[part], self.ids[part])

  @property
  def counts(self) -> np.ndarray:
    """`[X]` scored tokens."""
    return np.array([len(t) for t in self.tokens]) - np.array(self.starts)

  def cost(self, roster: Roster) -> Cost:
    """Of scoring them."""
    prefilled = sum(map(len, self.tokens)) - len(self.tokens)
    scored, members = int(self.counts.sum()), len(roster.members)
    if roster.is_baseline or roster.cache == "standard":
      return Cost(scored, prefilled * members)
    return Cost(scored, prefilled + scored * members)


class Perplexity:
  """Of the references of a task's examples.

  Attributes:
    tokens: `[X]` scored tokens of each example.
    texts, starts: token ids of each, and the index of the first one scored.
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
      prompt_builder: how it is asked.
      task: the task.
      examples: of it.
      ids: address of each example's noise.
      batch_size: texts scored together.
      allow_code_execution: not needed here.

    Raises:
      ValueError: an example has no reference, or does not fit the model.
    """
    del allow_code_execution
    lacking = [e.id for e in examples if e.reference is None]
    if lacking:
      raise ValueError(
        f"task {task.name} has no reference text for {lacking[0]}, whose perplexity "
        "would be the objective: give --objective=accuracy"
      )
    self.examples = examples
    self._texts = _Texts.of(map(prompt_builder.with_reference, examples), ids)
    batching.check_tokens(config, self._texts.tokens, what="text of example")
    self.texts, self.starts = self._texts.tokens, self._texts.starts
    self.tokens = self._texts.counts
    self._config, self._batch_size = config, batch_size

  def measure(self, params: Params, roster: Roster, part: slice) -> tuple[np.ndarray, Cost]:
    """`[X]` negative log-probabilities of a stretch of the examples, and what it took."""
    return self.nll(params, roster, part)[:, 0], self.cost(roster, part)

  def cost(self, roster: Roster, part: slice) -> Cost:
    """What `measure` takes."""
    return self._texts[part].cost(roster)

  def nll(
    self, params: Params, roster: Roster, part: slice, output_temperatures: Sequence[float] = (1.0,)
  ) -> np.ndarray:
    """`[X, G]` negative log-probabilities at each output temperature."""
    texts = self._texts[part]
    scores = scoring.score(
      params,
      self._config,
      texts.tokens,
      texts.starts,
      roster=roster,
      request_ids=texts.ids,
      output_temperatures=output_temperatures,
      batch_size=self._batch_size,
    )
    return np.stack([-t.log_probs.sum(axis=0, dtype=np.float64) for t in scores.sequences])

  def value(self, values: np.ndarray) -> float:
    """The perplexity of all examples, from the value of each."""
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
      ValueError: an example does not fit the model, or the task runs code and
        this is not allowed.
    """
    task.check_allowed(allow_code_execution)
    self.examples = examples
    self.metric = task.metric
    self._task, self._allowed, self._prompt_builder = task, allow_code_execution, prompt_builder
    self._config, self._batch_size = config, batch_size
    if any(e.kind != examples[0].kind for e in examples):
      raise ValueError(f"task {task.name} mixes questions with and without choices")
    if examples[0].kind == "choose":
      self._texts = [
        _Texts.of([prompt_builder.with_text(e, c) for c in e.choices], [i] * len(e.choices))
        for e, i in zip(examples, ids)
      ]
      for e, texts in zip(examples, self._texts):
        batching.check_tokens(config, texts.tokens, what=f"{e.id}: choice")
    else:
      self._prompts, self._ids = [prompt_builder.prompt(e) for e in examples], list(ids)
      batching.check_tokens(config, self._prompts, room=1, what="prompt of example")
      if len({(e.stop, e.max_new_tokens) for e in examples}) > 1:
        raise ValueError(f"the examples of task {task.name} differ in their stop strings or limits")

  def measure(self, params: Params, roster: Roster, part: slice) -> tuple[np.ndarray, Cost]:
    """`[X]` the metric of a stretch of the examples, and what it took."""
    examples = self.examples[part]
    chooses = examples[0].kind == "choose"
    outputs, cost = (self._choose if chooses else self._generate)(params, roster, part)
    metrics = self._task.score_all(examples, outputs, self._allowed, workers=os.cpu_count())
    return np.array([m[self.metric] for m in metrics], float), cost

  def _choose(self, params, roster, part):
    by_example = self._texts[part]
    texts = _Texts(
      *(
        list(itertools.chain.from_iterable(getattr(t, name) for t in by_example))
        for name in ("tokens", "starts", "ids")
      )
    )
    scores = scoring.score(
      params,
      self._config,
      texts.tokens,
      texts.starts,
      roster=roster,
      request_ids=texts.ids,
      batch_size=self._batch_size,
    )
    sums = iter([float(t.log_probs.sum(dtype=np.float64)) for t in scores.sequences])
    return [[next(sums) for _ in t.tokens] for t in by_example], texts.cost(roster)

  def _generate(self, params, roster, part):
    first, prompts = self.examples[0], self._prompts[part]
    found = decode.generate(
      params,
      self._config,
      prompts,
      max_new_tokens=first.max_new_tokens,
      roster=roster,
      stop_tokens=self._prompt_builder.stop_tokens,
      stop_strings=first.stop,
      decode=self._prompt_builder.tokenizer.decode,
      request_ids=self._ids[part],
      batch_size=self._batch_size,
    )
    tokens, members = found.throughput.tokens, len(roster.members)
    prefilled = sum(map(len, prompts)) - len(prompts)
    prefilled *= members if roster.cache == "standard" else 1
    answers = [
      self._prompt_builder.answer(e, c) for e, c in zip(self.examples[part], found.completions)
    ]
    return answers, Cost(tokens, prefilled + tokens * members)

  def value(self, values: np.ndarray) -> float:
    """The mean over all examples."""
    return float(values.mean())


Objective = Perplexity | Accuracy
OBJECTIVES: dict[str, type[Objective]] = {o.name: o for o in (Perplexity, Accuracy)}
