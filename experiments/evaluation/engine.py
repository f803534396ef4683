"""Answers requests to one model with one roster, in batches of few shapes, each request once."""

from collections.abc import Callable, Container, Iterable, Sequence
import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np

from experiments.cli.extras import scipy
from experiments.evaluation.requests import Continuation, Prompt, Request
from experiments.records.cost import Cost
from experiments.tasks.base import Example
from roe_jax import batching, costs, decode, diagnostics, prefill, scoring, sharding
from roe_jax.completion import Completion
from roe_jax.config import ModelConfig
from roe_jax.numerics import naming_sequences
from roe_jax.params import Params
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler
from roe_jax.text import answer as answer_lib
from roe_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """The answer to a `Continuation`, at G output temperatures.

  Attributes:
    token_log_probs: `[X, G]` float64, of each token.
    confidences: `[G, X]` float64, probability of the most probable token at each position, or
      (`[G, 1]`) of the most probable choice.
    correct: `[X]` or `[1]` bool, whether that token is the continuation's, or that choice is right.
    cost: its cost.
  """

  token_log_probs: np.ndarray
  confidences: np.ndarray
  correct: np.ndarray
  cost: Cost = dataclasses.field(default_factory=Cost)

  @property
  def tokens(self) -> int:
    """Number of tokens."""
    return len(self.token_log_probs)

  @property
  def log_probs(self) -> np.ndarray:
    """`[G]` log-likelihood, in nats."""
    return self.token_log_probs.sum(axis=0)

  @property
  def nll(self) -> np.ndarray:
    """`[G]` negative log-likelihood, in nats."""
    return -self.log_probs

  @property
  def is_greedy(self) -> bool:
    """Whether each token is the most probable one."""
    return bool(self.correct.all())

  def to_json(self) -> dict[str, Any]:
    """Returns what is saved of an answer at one output temperature."""
    return {
      "log_prob": float(self.log_probs[0]),
      "is_greedy": self.is_greedy,
      "tokens": self.tokens,
      "cost": self.cost.to_json(),
    }


@dataclasses.dataclass(frozen=True)
class Generated:
  """The answer to a `Prompt`.

  Attributes:
    text: for a chat, the answer without reasoning, "" if generation ended before it.
    completion: all that was generated.
    cost: its cost.
  """

  text: str
  completion: Completion
  cost: Cost

  def to_json(self) -> dict[str, Any]:
    """Returns what is saved of an answer."""
    c = self.completion
    return {
      "text": self.text,
      "finish_reason": c.finish_reason,
      "log_prob": float(np.sum(c.log_probs, dtype=np.float64)),
      "generated": c.tokens,
      "tokens": len(c.tokens),
      "cost": self.cost.to_json(),
    }


Answer = Likelihood | Generated


def of_choices(example: Example, choices: Sequence[Likelihood]) -> Likelihood:
  """Returns the likelihood of the right choice, with the probability of the most probable one."""
  log_probs = np.array([c.log_probs for c in choices])  # [K, G]
  p = np.exp(scipy.special.log_softmax(log_probs, axis=0))
  best, right = int(log_probs[:, 0].argmax()), choices[example.target]
  return Likelihood(right.token_log_probs, p[best][:, None], np.array([best == example.target]))


class Stopwatch:
  """Measures wall time without JAX's tracing and compilation."""

  def __init__(self):
    self._spans: list[tuple[float, float]] = []  # disjoint (begin, end) of compilation
    jax.monitoring.register_event_duration_secs_listener(self._on_duration)
    self._last = time.perf_counter()

  def _on_duration(self, event, duration_secs, **kwargs):
    if not event.startswith("/jax/core/compile/"):
      return
    end = time.perf_counter()
    # Events nested in this one were reported before it.
    while self._spans and self._spans[-1][0] >= end - duration_secs:
      self._spans.pop()
    self._spans.append((end - duration_secs, end))

  def lap(self) -> float:
    """Returns the seconds since the last call."""
    now = time.perf_counter()
    seconds = now - self._last - sum(end - begin for begin, end in self._spans)
    self._spans.clear()
    self._last = now
    return max(0.0, seconds)


# One for the process, since JAX keeps its listeners forever.
_stopwatch = functools.cache(Stopwatch)


class Engine:
  """Answers requests to a model with a roster.

  Attributes:
    batch_size: number of requests per batch.
  """

  def __init__(
    self,
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    roster: Roster,
    batch_size: int = 16,
  ):
    self.batch_size = batch_size
    self._model, self._tokenizer, self._roster = (params, config), tokenizer, roster

  def answer(
    self,
    requests: Sequence[Request],
    output_temperatures: Sequence[float] | np.ndarray = (1.0,),
    known: Container[Request] = (),
    on_answers: Callable[[dict[Request, Answer]], None] = lambda answers: None,
  ) -> list[Any]:
    """Returns each request's answer: a `Likelihood` of a continuation, a `Generated` of a prompt.

    Args:
      requests: the requests; equal ones are answered once.
      output_temperatures: `[G]`, of likelihoods.
      known: requests that are not answered (None), but still determine the shapes of batches.
      on_answers: called with some answers as soon as they are there.
    """
    answers: dict[Request, Answer] = {}

    def keep(some):
      answers.update(some)
      on_answers(some)

    unique = dict.fromkeys(requests)
    _stopwatch().lap()
    self._score(
      [r for r in unique if isinstance(r, Continuation)], output_temperatures, known, keep
    )
    self._generate([r for r in unique if isinstance(r, Prompt)], known, keep)
    return [answers.get(r) for r in requests]

  def experts_read(self, requests: Sequence[Request], generated: Sequence[Sequence[int]]) -> Cost:
    """Counts unique active experts, as a cost of nothing else; see `Cost`.

    Args:
      requests: answered requests.
      generated: for each request, the tokens that it generated; ignored for continuations.

    Returns:
      The cost, of zeros for a roster without a KV cache.
    """
    sequences, starts, ids = [], [], []
    for request, written in zip(requests, generated, strict=True):
      if isinstance(request, Continuation):
        before, tokens = request.context, request.tokens
      else:
        before, tokens = request.tokens, tuple(written)
      if len(before) + len(tokens) <= self._model[1].context_length:
        sequences.append(before + tokens)
        starts.append(len(before))
        ids.append(request.request_id)
    if not (self._roster.cache_mode.keeps_history and sequences):
      return Cost()
    unique = diagnostics.unique_experts(*self._model, self._roster, sequences, starts, ids)
    steps = sum(map(len, sequences)) - sum(starts)
    return Cost(
      unique_experts_read=float(unique.by_position.mean()) * steps,
      experts_used=float(unique.per_member.mean()) * steps,
      steps=steps,
    )

  def last_gates(
    self, prompts: Sequence[Prompt], generated: Sequence[Sequence[int]]
  ) -> list[np.ndarray]:
    """Returns the last member's gates `[L, E]` where each prompt's last token is predicted.

    Args:
      prompts: answered prompts.
      generated: the tokens that each generated.
    """
    sequences = [(p.tokens + tuple(written))[:-1] for p, written in zip(prompts, generated)]
    found: list[np.ndarray] = [np.empty(0)] * len(prompts)
    lengths = list(map(len, sequences))
    for batch, _ in batching.by_length(lengths, self.batch_size, prefill.MIN_CAPACITY):
      some, ids = [sequences[i] for i in batch], [prompts[i].request_id for i in batch]
      gates = diagnostics.last_gates(*self._model, self._roster, some, ids)
      for i, own in zip(batch, gates):
        found[i] = own
    return found

  def _score(self, requests, output_temperatures, known, keep):
    # Continuations that differ in their last token are one sequence with several candidates.
    by_sequence: dict[Any, list[Continuation]] = {}
    for r in requests:
      by_sequence.setdefault((r.context, r.tokens[:-1], r.request_id), []).append(r)
    groups = list(by_sequence.values())
    slots = min(self.batch_size, batching.bucket(len(groups)))
    # Batches are made from all sequences, so that a resumed run has the same ones.
    for batch, positions in batching.by_length(
      [some[0].max_length - 1 for some in groups], self.batch_size, prefill.MIN_CAPACITY
    ):
      missing = [groups[i] for i in batch if any(r not in known for r in groups[i])]
      if not missing:
        continue
      first = [some[0] for some in missing]
      sequences = [r.sequence for r in first]
      with naming_sequences(list(map(self._name, sequences))):
        found = scoring.score(
          *self._model,
          sequences,
          [len(r.context) for r in first],
          roster=self._roster,
          request_ids=[r.request_id for r in first],
          output_temperatures=output_temperatures,
          candidates=[[r.tokens[-1] for r in some] for some in missing],
          batch_size=self.batch_size,
          min_shape=(slots, positions),
        ).sequences
      seconds = _stopwatch().lap() / len(missing)
      peak = self._peak(slots, positions, prefill.PREFILL_CHUNK, kind="score")
      answers = {}
      for some, scores in zip(missing, found):
        cost = dataclasses.replace(
          self._scoring_cost(some[0], scores.members), seconds=seconds, peak_bytes=peak
        )
        for r, last in zip(some, scores.candidate_log_probs.astype(np.float64)):
          answers[r] = Likelihood(
            np.concatenate([scores.log_probs[:-1].astype(np.float64), last[None]]),
            np.exp(scores.greedy_log_probs.T.astype(np.float64)),
            scores.greedy_tokens == np.array(r.tokens),
            cost,
          )
          cost = Cost(tokens=1)  # further candidates are free
      keep({r: answer for r, answer in answers.items() if r not in known})

  def _generate(self, requests, known, keep):
    kinds: dict[Any, list[Prompt]] = {}
    for r in requests:
      kind = r.max_new_tokens, r.stop, r.sampler, r.stop_tokens, r.opening is None
      kinds.setdefault(kind, []).append(r)
    for (max_new_tokens, stop, sampler, stop_tokens, raw), prompts in kinds.items():
      lengths = [min(r.max_length, self._model[1].context_length) for r in prompts]
      for batch, capacity in batching.by_length(lengths, len(lengths), prefill.MIN_CAPACITY):
        missing = [prompts[i] for i in batch if prompts[i] not in known]
        if not missing:
          continue
        peak = self._peak(min(self.batch_size, batching.bucket(len(batch))), capacity)

        def keep_one(index, completion, missing=missing, peak=peak):
          keep({missing[index]: self._generated(missing[index], completion, peak)})

        def stop_reader(index, missing=missing):
          opening = missing[index].opening
          return answer_lib.reader(self._tokenizer, opening, skip_special_tokens=False)

        with naming_sequences([self._name(r.tokens) for r in missing]):
          decode.generate(
            *self._model,
            [r.tokens for r in missing],
            max_new_tokens=max_new_tokens,
            roster=self._roster,
            sampler=Sampler.create(*sampler),
            stop_tokens=stop_tokens,
            stop_strings=stop,
            decode=self._tokenizer.decode,
            stop_reader=None if raw else stop_reader,
            batch_size=self.batch_size,
            request_ids=[r.request_id for r in missing],
            on_finished=keep_one,
          )

  def _name(self, tokens):
    """Returns what errors call a request: the end of its text."""
    return f"the request that ends with {self._tokenizer.decode(list(tokens))[-60:]!r}"

  def _generated(self, request, completion, peak):
    text = completion.text
    if request.opening is not None:
      settings = dict(opening=request.opening, stop_strings=request.stop)
      text = answer_lib.read(self._tokenizer, completion, **settings).final or ""
    before, count = len(request.tokens), len(completion.tokens)
    passes = self._roster.cache_mode.generation(self._roster, before, count)
    cost = self._cost(count, passes, completion.forward_passes)
    cost = dataclasses.replace(cost, seconds=_stopwatch().lap(), peak_bytes=peak)
    return Generated(text, completion, cost)

  def _scoring_cost(self, request, members):
    length, start = request.max_length, len(request.context)
    passes = self._roster.cache_mode.scoring(self._roster, length, start)
    return self._cost(length - start, passes, int(members.sum()))

  def _cost(self, num_tokens, passes, computed):
    """Returns the cost of an answer, for which so many tokens x members were computed."""
    flops = [costs.forward_flops(self._model[1], *p) for p in passes]
    tokens, nominal = sum(p.tokens for p in passes), num_tokens * len(self._roster.members)
    # More with drafts that were not kept, less with members that did not run.
    more = computed - nominal
    return Cost(num_tokens, tokens + more, sum(flops) + more * flops[-1] / passes[-1].tokens)

  def _peak(self, slots, positions, *chunk, **kind):
    params, config = self._model
    mesh = sharding.mesh_of(params.embedding) or sharding.abstract_mesh(config, 1)
    return costs.memory(config, self._roster, mesh, slots, positions, *chunk, **kind).total


def total(answers: Iterable[Answer]) -> Cost:
  """Returns the cost of all answers."""
  return sum((a.cost for a in answers), Cost())
