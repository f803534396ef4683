"""Measures a method on a batch of examples: answers with their costs, and likelihoods."""

from collections.abc import Sequence
import dataclasses
import functools
import time
from typing import Any

import numpy as np

from experiments.analysis import output_temperatures as output_temperatures_lib
from experiments.cli import app
from experiments.cli.extras import scipy
from experiments.evaluation.methods import Method
from experiments.evaluation.prompts import PromptBuilder
from experiments.tasks import Example, Task
from roe_jax import batching, costs, decode, diagnostics, prefill, scoring, sharding
from roe_jax.numerics import naming_sequences
from roe_jax.params import Params

# Distance between the noise ids of an example's samples.
SAMPLE_STRIDE = 2**20


@dataclasses.dataclass(frozen=True)
class Batch:
  """A batch of examples of one task.

  Attributes:
    task: the task.
    examples: examples, all of one kind.
    ids: noise id of each example, below `SAMPLE_STRIDE`.
  """

  task: Task
  examples: list[Example]
  ids: list[int]


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """Likelihood of a reference at G output temperatures.

  Attributes:
    nll: `[G]` negative log-likelihood, summed over tokens, in nats.
    tokens: number of tokens.
    confidences: `[G, X]` probability of the most probable token at each of X positions, or
      (X = 1) of the most probable choice.
    correct: `[X]` whether that token or choice is right.
  """

  nll: np.ndarray
  tokens: int
  confidences: np.ndarray
  correct: np.ndarray

  def record(self, fitted: bool) -> dict[str, Any]:
    """Returns metrics and confidences at the first output temperature and, if fitted, the next."""
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
  """A method's answers to a batch.

  Attributes:
    outputs: output for each example, for `Task.score_all`.
    details: further entries for each example's record.
    cost: costs, as a line of `costs.jsonl`.
    sequences, starts, ids: decoded sequences, to count experts; empty for choices.
    likelihoods: likelihood of each example, where the answers are choices.
  """

  outputs: list[Any]
  details: list[dict[str, Any]]
  cost: dict[str, Any]
  sequences: list[list[int]] = dataclasses.field(default_factory=list)
  starts: list[int] = dataclasses.field(default_factory=list)
  ids: list[int] = dataclasses.field(default_factory=list)
  likelihoods: list[Likelihood] = dataclasses.field(default_factory=list)


class Measurer:
  """Measures methods on one model."""

  def __init__(self, params: Params, prompt_builder: PromptBuilder, batch_size: int):
    self._params, self._prompt_builder, self._batch_size = params, prompt_builder, batch_size
    self._programs = app.CompiledPrograms()

  def answer(
    self, method: Method, seed: int, batch: Batch, output_temperatures: Sequence[float]
  ) -> Answers:
    """Returns the method's answers; their time excludes compilation."""
    if batch.examples[0].kind == "choose":
      return self._choose(method, seed, batch, output_temperatures)
    return self._generate(method, seed, batch)

  def _timed(self, call):
    """Returns result and seconds; repeats a call that compiled a program."""
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
    run = functools.partial(
      decode.generate,
      self._params,
      config,
      prompts,
      max_new_tokens=limit,
      roster=roster,
      sampler=method.sampler,
      stop_tokens=self._prompt_builder.stop_tokens,
      stop_strings=batch.examples[0].stop,
      decode=self._prompt_builder.tokenizer.decode,
      stop_reader=self._prompt_builder.stop_reader(list(batch.examples) * n),
      request_ids=ids,
      batch_size=slots,
    )
    with naming_sequences([f"example {i}" for i in batch.ids] * n):
      found, seconds = self._timed(run)
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
      # Tokens of the answers; those of samples that were not picked do not count.
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
    sequences = [p + c.tokens for p, c in zip(prompts, found.completions)]
    return Answers(outputs, details, cost, sequences, [len(p) for p in prompts], ids)

  def _choose(self, method, seed, batch, output_temperatures):
    roster = method.with_seed(seed)
    sequences, starts = zip(
      *(self._prompt_builder.with_text(e, choice) for e in batch.examples for choice in e.choices)
    )
    ids = [i for e, i in zip(batch.examples, batch.ids) for _ in e.choices]
    args = method, roster, sequences, starts, ids, output_temperatures
    scores, seconds = self._timed(functools.partial(self._scores, *args))
    sums = np.array([s.log_probs.sum(axis=0, dtype=np.float64) for s in scores])
    counts = np.array([len(t) - s for t, s in zip(sequences, starts)])
    ends = np.cumsum([len(e.choices) for e in batch.examples])[:-1]
    by_example = np.split(sums, ends)
    likelihoods = []
    for e, log_probs, tokens in zip(batch.examples, by_example, np.split(counts, ends)):
      p = np.exp(scipy.special.log_softmax(log_probs, axis=0))
      best = log_probs[:, 0].argmax()
      correct = np.array([bool(best == e.target)])
      likelihoods.append(
        Likelihood(-log_probs[e.target], int(tokens[e.target]), p[best][:, None], correct)
      )
    memory = costs.memory(
      method.config,
      roster,
      self._mesh(method.config),
      batching.bucket(min(self._batch_size, len(sequences))),
      batching.bucket(max(map(len, sequences)), prefill.MIN_CAPACITY),
      prefill.PREFILL_CHUNK,
      kind="score",
    )
    cost = {
      "tokens": int(counts.sum()),
      "forward_passes": int(counts.sum()) * len(roster.members),
      "flops": sum(
        costs.scoring_flops(method.config, roster, len(t), s) for t, s in zip(sequences, starts)
      ),
      "seconds": seconds,
      "peak_bytes": memory.total,
    }
    outputs = [log_probs[:, 0].tolist() for log_probs in by_example]
    return Answers(outputs, [{} for _ in batch.examples], cost, likelihoods=likelihoods)

  def likelihoods(
    self, method: Method, seed: int, batch: Batch, output_temperatures: Sequence[float]
  ) -> list[Likelihood | None]:
    """Returns the likelihood of each example's reference and end of text; None without one."""
    has = [i for i, e in enumerate(batch.examples) if e.reference is not None]
    found: list[Likelihood | None] = [None] * len(batch.examples)
    if batch.examples[0].kind == "choose":
      return self.answer(method, seed, batch, output_temperatures).likelihoods
    if has:
      sequences, starts = zip(
        *(self._prompt_builder.with_reference(batch.examples[i]) for i in has)
      )
      ids, roster = [batch.ids[i] for i in has], method.with_seed(seed)
      scores = self._scores(method, roster, sequences, starts, ids, output_temperatures)
      for i, one, sequence, start in zip(has, scores, sequences, starts):
        found[i] = Likelihood(
          -one.log_probs.sum(axis=0, dtype=np.float64),
          len(sequence) - start,
          np.exp(one.greedy_log_probs.T.astype(np.float64)),
          one.greedy_tokens == np.array(sequence[start:]),
        )
    return found

  def experts_read(self, method: Method, seed: int, answers: Answers) -> dict[str, float]:
    """Returns the unique active experts in decoding the answers together, as costs."""
    if not answers.sequences:
      return {}
    unique = diagnostics.unique_experts(
      self._params,
      method.config,
      method.with_seed(seed),
      answers.sequences,
      answers.starts,
      answers.ids,
      batch_size=self._batch_size,
    )
    return {
      "unique_experts_read": float(unique.by_step.mean() * unique.num_steps),
      "steps": unique.num_steps,
      "experts_of_position": float(unique.by_position.mean()),
    }

  def _scores(self, method, roster, sequences, starts, ids, output_temperatures):
    with naming_sequences([f"example {i}" for i in ids]):
      return scoring.score(
        self._params,
        method.config,
        sequences,
        starts,
        roster=roster,
        request_ids=ids,
        output_temperatures=output_temperatures_lib.padded(output_temperatures),
        batch_size=self._batch_size,
      ).sequences

  def _mesh(self, config):
    return sharding.mesh_of(self._params.embedding) or sharding.abstract_mesh(config, 1)
