"""What a method makes of a batch of examples: answers with their costs, and likelihoods."""

from collections.abc import Sequence
import dataclasses
import functools
import time
from typing import Any

import numpy as np
from scipy.special import log_softmax

from experiments.cli import app
from experiments.evaluation.methods import Method
from experiments.evaluation.prompts import PromptBuilder
from experiments.tasks import Example, Task
from roe_jax import batching, costs, decode, diagnostics, prefill, scoring, sharding
from roe_jax.params import Params

# Output temperatures among which the best is looked for.
OUTPUT_TEMPERATURES = np.geomspace(0.25, 4.0, 13)
# The ids of the noise of an example's samples lie so far apart.
SAMPLE_STRIDE = 2**20


@dataclasses.dataclass(frozen=True)
class Batch:
  """Examples of one task that are done together.

  Attributes:
    task: the task.
    examples: all of one kind.
    ids: of each example's noise, below `SAMPLE_STRIDE`.
  """

  task: Task
  examples: list[Example]
  ids: list[int]


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """How probable texts are, at G output temperatures.

  Attributes:
    nll: `[G]` summed over the text's tokens, nats.
    tokens: how many those are.
    confidences: `[G, X]` probabilities of what is most probable: of each token of
      the text, or (X = 1) of the choices.
    correct: `[X]` whether that is right.
  """

  nll: np.ndarray
  tokens: int
  confidences: np.ndarray
  correct: np.ndarray

  def record(self, fitted: bool) -> dict[str, Any]:
    """Metrics and calibration at the first output temperature, and at the second."""
    record = {
      "metrics": {"nll": float(self.nll[0]), "tokens": self.tokens},
      "confidences": self.confidences[0].round(6).tolist(),
      "correct": self.correct.tolist(),
    }
    if fitted:
      record["metrics"]["fitted_nll"] = float(self.nll[1])
      record["fitted_confidences"] = self.confidences[1].round(6).tolist()
    return record


@dataclasses.dataclass(frozen=True)
class Answers:
  """What a method answered.

  Attributes:
    outputs: of each example, for `Task.score_all`.
    details: of each example, what else is kept with it.
    cost: what it took, as a line of `costs.jsonl`.
    texts, starts, ids: what was decoded, for counting experts; empty for choices.
    likelihoods: of each example, where the answers are made of them.
  """

  outputs: list[Any]
  details: list[dict[str, Any]]
  cost: dict[str, Any]
  texts: list[list[int]] = dataclasses.field(default_factory=list)
  starts: list[int] = dataclasses.field(default_factory=list)
  ids: list[int] = dataclasses.field(default_factory=list)
  likelihoods: list[Likelihood] = dataclasses.field(default_factory=list)


class Measurer:
  """A model with the way it is asked, and methods to be measured on it."""

  def __init__(self, params: Params, prompt_builder: PromptBuilder, batch_size: int):
    self._params, self._prompt_builder, self._batch_size = params, prompt_builder, batch_size
    self._programs = app.CompiledPrograms()

  def answer(
    self, method: Method, seed: int, batch: Batch, output_temperatures: Sequence[float]
  ) -> Answers:
    """The method's answers, timed without what had to be compiled."""
    if batch.examples[0].kind == "choose":
      return self._choose(method, seed, batch, output_temperatures)
    return self._generate(method, seed, batch)

  def _timed(self, call):
    """Result and seconds; a call in which a program was compiled is made again."""
    for _ in range(2):
      compiled, begin = self._programs.count, time.perf_counter()
      result = call()
      seconds = time.perf_counter() - begin
      if not app.broadcast(self._programs.count > compiled):
        break
    return result, seconds

  def _generate(self, method, seed, batch):
    config, roster, n = method.config, method.with_seed(seed), method.num_samples
    prompts = [self._prompt_builder.prompt(e) for e in batch.examples] * n
    ids = [i + SAMPLE_STRIDE * sample for sample in range(n) for i in batch.ids]
    limit = max(e.max_new_tokens for e in batch.examples)
    slots = n * self._batch_size
    found, seconds = self._timed(
      lambda: decode.generate(
        self._params,
        config,
        prompts,
        max_new_tokens=limit,
        roster=roster,
        sampler=method.sampler,
        stop_tokens=self._prompt_builder.stop_tokens,
        stop_strings=batch.examples[0].stop,
        decode=self._prompt_builder.tokenizer.decode,
        request_ids=ids,
        batch_size=slots,
      )
    )
    outputs, details = [], []
    for i, example in enumerate(batch.examples):
      samples = found.completions[i :: len(batch.examples)]
      texts = [self._prompt_builder.answer(example, sample) for sample in samples]
      picked = method.pick(batch.task, samples, texts) if n > 1 else 0
      outputs.append(texts[picked])
      details.append(
        {"output": outputs[-1]} | ({"samples": texts, "picked": picked} if n > 1 else {})
      )
    written = [len(c.tokens) for c in found.completions]
    memory = costs.memory(
      config,
      roster,
      self._mesh(config),
      min(slots, batching.bucket(len(prompts))),
      prefill.capacity_for(config, prompts, limit),
    )
    cost = {
      # Of the answers: what is written for a sample that is not picked is no use.
      "tokens": sum(
        len(found.completions[i + len(batch.examples) * d.get("picked", 0)].tokens)
        for i, d in enumerate(details)
      ),
      "tokens_written": sum(written),
      "forward_passes": sum(written) * len(roster.members),
      "flops": sum(
        costs.generation_flops(config, roster, len(p), count) for p, count in zip(prompts, written)
      ),
      "seconds": seconds,
      "peak_bytes": memory.total,
    }
    return Answers(
      outputs,
      details,
      cost,
      [p + c.tokens for p, c in zip(prompts, found.completions)],
      [len(p) for p in prompts],
      ids,
    )

  def _choose(self, method, seed, batch, output_temperatures):
    roster = method.with_seed(seed)
    texts, starts = zip(
      *(self._prompt_builder.with_text(e, choice) for e in batch.examples for choice in e.choices)
    )
    ids = [i for e, i in zip(batch.examples, batch.ids) for _ in e.choices]
    run = functools.partial(self._scores, method, roster, texts, starts, ids, output_temperatures)
    scores, seconds = self._timed(run)
    sums = np.array([s.log_probs.sum(axis=0, dtype=np.float64) for s in scores])
    lengths = [len(e.choices) for e in batch.examples]
    by_example = np.split(sums, np.cumsum(lengths)[:-1])
    tokens = np.split(
      np.array([len(t) - s for t, s in zip(texts, starts)]), np.cumsum(lengths)[:-1]
    )
    likelihoods = []
    for e, log_probs, counts in zip(batch.examples, by_example, tokens):
      p = np.exp(log_softmax(log_probs, axis=0))
      best = log_probs[:, 0].argmax()
      likelihoods.append(
        Likelihood(
          -log_probs[e.target],
          int(counts[e.target]),
          p[best][:, None],
          np.array([bool(best == e.target)]),
        )
      )
    largest = max(len(t) for t in texts)
    rows = min(self._batch_size, len(texts))
    cost = {
      "tokens": int(sum(map(sum, tokens))),
      "forward_passes": int(sum(map(sum, tokens))) * len(roster.members),
      "flops": sum(
        costs.scoring_flops(method.config, roster, len(t), s) for t, s in zip(texts, starts)
      ),
      "seconds": seconds,
      "peak_bytes": costs.memory(
        method.config,
        roster,
        self._mesh(method.config),
        batching.bucket(rows),
        batching.bucket(largest, prefill.MIN_CAPACITY),
        prefill.PREFILL_CHUNK,
        kind="score",
      ).total,
    }
    return Answers(
      [log_probs[:, 0].tolist() for log_probs in by_example],
      [{} for _ in batch.examples],
      cost,
      likelihoods=likelihoods,
    )

  def likelihoods(
    self, method: Method, seed: int, batch: Batch, output_temperatures: Sequence[float]
  ) -> list[Likelihood | None]:
    """Of the examples' reference texts and the end of text behind them; None without one."""
    has = [i for i, e in enumerate(batch.examples) if e.reference is not None]
    found: list[Likelihood | None] = [None] * len(batch.examples)
    if batch.examples[0].kind == "choose":
      return self.answer(method, seed, batch, output_temperatures).likelihoods
    if has:
      texts, starts = zip(*(self._prompt_builder.with_reference(batch.examples[i]) for i in has))
      scores = self._scores(
        method,
        method.with_seed(seed),
        texts,
        starts,
        [batch.ids[i] for i in has],
        output_temperatures,
      )
      for i, one, text, start in zip(has, scores, texts, starts):
        found[i] = Likelihood(
          -one.log_probs.sum(axis=0, dtype=np.float64),
          len(text) - start,
          np.exp(one.greedy_log_probs.T.astype(np.float64)),
          one.greedy_tokens == np.array(text[start:]),
        )
    return found

  def experts_read(self, method: Method, seed: int, answers: Answers) -> dict[str, float]:
    """Different experts that decoding the answers side by side reads, as costs."""
    if not answers.texts:
      return {}
    unique = diagnostics.unique_experts(
      self._params,
      method.config,
      method.with_seed(seed),
      answers.texts,
      answers.starts,
      answers.ids,
      batch_size=self._batch_size,
    )
    return {
      "unique_experts_read": float(unique.by_step.mean() * unique.num_steps),
      "steps": unique.num_steps,
      "experts_of_position": float(unique.by_position.mean()),
    }

  def _scores(self, method, roster, texts, starts, ids, output_temperatures):
    # As many output temperatures in every call, so that nothing is compiled again.
    padded = np.full(len(OUTPUT_TEMPERATURES), output_temperatures[-1])
    padded[: len(output_temperatures)] = output_temperatures
    found = scoring.score(
      self._params,
      method.config,
      texts,
      starts,
      roster=roster,
      request_ids=ids,
      output_temperatures=padded,
      batch_size=self._batch_size,
    )
    return found.sequences

  def _mesh(self, config):
    return sharding.mesh_of(self._params.embedding) or sharding.abstract_mesh(config, 1)
