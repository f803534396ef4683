"""Answers requests to one model with one roster, in batches of few shapes, each request once.

A request scores a continuation or completes a prompt. Its noise is addressed by the text of
its context (`request_id`), independent of task, index, batch and number of examples. So all
choices of a question, and the reference of a problem, see the same roster as a generation.

`Answers` saves each answer and its cost in a file at once. A killed program resumes, and ends
with the same answers and costs, up to rounding and seconds. Only process 0 writes the file.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import hashlib
import pathlib
import time
from typing import Any

import jax
import numpy as np

from experiments import tasks
from experiments.cli import app, text_files
from experiments.records import jsonl
from roe_jax import batching, costs, decode, diagnostics, prefill, scoring
from roe_jax.config import ModelConfig
from roe_jax.numerics import naming_sequences
from roe_jax.params import Params
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler
from roe_jax.text import answer as answer_lib
from roe_jax.text.tokenizer import Tokenizer

Answer = dict[str, Any]


def request_id(context: str, sample: int = 0) -> int:
  """Returns the noise address of a context: 32 bits of a hash of its text.

  Among ten thousand contexts, two share an address with a probability of 1 %; they then share
  noise at equal positions, without further effect.

  Args:
    context: the text before what the model predicts.
    sample: index that distinguishes samples of one context, or windows of one text.
  """
  digest = hashlib.blake2b(f"{sample}\n{context}".encode(), digest_size=4).digest()
  return int.from_bytes(digest, "little")


@dataclasses.dataclass(frozen=True)
class Continuation:
  """A request to score tokens after a context.

  Its answer has "log_prob" (summed, in nats), "is_greedy" (whether each token is the most
  probable one), "tokens" (their number) and "cost".

  Attributes:
    context: token ids, at least one.
    tokens: token ids, at least one.
    request_id: its noise address.
  """

  context: tuple[int, ...]
  tokens: tuple[int, ...]
  request_id: int

  @property
  def max_length(self) -> int:
    """Tokens of the sequence."""
    return len(self.context) + len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A request to complete a prompt.

  Its answer has "text" (for a chat, the answer without reasoning, "" if generation ended before
  it), "finish_reason", "log_prob" (summed, in nats), "generated" (token ids), "tokens" (their
  number) and "cost".

  Attributes:
    tokens: token ids, at least one.
    request_id: its noise address.
    max_new_tokens: maximum number of generated tokens.
    stop: strings that end generation.
    sampler: temperature, top_k and top_p; see `Sampler.create`.
    stop_tokens: tokens that end generation.
    opening: for a chat, the prompt's tokens that start the answer (see `chat.Prompt`); None
      if all generated text is the answer.
  """

  tokens: tuple[int, ...]
  request_id: int
  max_new_tokens: int
  stop: tuple[str, ...] = ()
  sampler: tuple[float, int, float] = (0.0, 0, 1.0)
  stop_tokens: tuple[int, ...] = ()
  opening: tuple[int, ...] | None = None

  @property
  def max_length(self) -> int:
    """Most tokens that the sequence can have."""
    return len(self.tokens) + self.max_new_tokens


Request = Continuation | Prompt


def key(request: Request) -> str:
  """Returns the key of a request's answer."""
  fields = [type(request).__name__, *dataclasses.astuple(request)]
  return hashlib.sha256(text_files.to_json(fields).encode()).hexdigest()[:32]


class Answers:
  """Answers by request key, in a JSON lines file whose first line has the settings."""

  def __init__(self, path: pathlib.Path | None = None, settings: dict[str, Any] | None = None):
    """Opens or creates the file; without a path, answers stay in memory."""
    self._path = path

    def read():
      lines = jsonl.read_lines(path, repair=True)
      if not lines:
        app.write_atomically(path, text_files.to_json({"settings": settings}) + "\n")
      return lines[1:]

    lines = app.from_first_process(read) if path else []
    self._answers = {line["key"]: line["answer"] for line in lines}

  @classmethod
  def of(cls, folder: pathlib.Path, settings: dict[str, Any]) -> "Answers":
    """Opens the answers for `settings` in a folder that several settings share."""
    digest = hashlib.sha256(text_files.to_json(settings, sort_keys=True).encode()).hexdigest()
    return cls(folder / f"{digest[:16]}.jsonl", settings)

  def __contains__(self, key: str) -> bool:
    return key in self._answers

  def __getitem__(self, key: str) -> Answer:
    return self._answers[key]

  def write(self, answers: dict[str, Answer]) -> None:
    self._answers |= answers
    if self._path:
      jsonl.append(self._path, ({"key": k, "answer": answer} for k, answer in answers.items()))


class Stopwatch:
  """Measures wall time without JAX's tracing and compilation."""

  def __init__(self):
    self._spans: list[tuple[float, float]] = []  # disjoint (begin, end) of compilation
    jax.monitoring.register_event_duration_secs_listener(self._on_duration)
    self._last = time.perf_counter()

  def _on_duration(self, event, seconds, **kwargs):
    if not event.startswith("/jax/core/compile/"):
      return
    end = time.perf_counter()
    # Events nested in this one were reported before it.
    while self._spans and self._spans[-1][0] >= end - seconds:
      self._spans.pop()
    self._spans.append((end - seconds, end))

  def lap(self) -> float:
    """Returns the seconds since the last call."""
    now = time.perf_counter()
    seconds = now - self._last - sum(end - begin for begin, end in self._spans)
    self._spans.clear()
    self._last = now
    return max(0.0, seconds)


class Engine:
  """Answers requests that have no answer yet.

  Attributes:
    batch_size: number of requests per batch.
  """

  def __init__(
    self,
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    roster: Roster,
    answers: Answers,
    *,
    batch_size: int = 16,
    stopwatch: Stopwatch | None = None,
  ):
    """Creates an engine.

    Args:
      params: the model's parameters.
      config: its config.
      tokenizer: its tokenizer.
      roster: the roster that also made `answers`.
      answers: the answers so far, to which new ones are added.
      batch_size: number of requests per batch.
      stopwatch: a stopwatch, which engines can share.
    """
    self.batch_size = batch_size
    self._model = params, config
    self._tokenizer, self._roster, self._answers = tokenizer, roster, answers
    self._stopwatch = stopwatch or Stopwatch()

  def answer(
    self, requests: Sequence[Request], on_answered: Callable[[int], None] = lambda count: None
  ) -> list[Answer]:
    """Returns the answers in the order of the requests.

    Args:
      requests: the requests; equal ones are computed once.
      on_answered: called with the number of unique requests that already have an answer, and
        then whenever more are answered.

    Raises:
      ValueError: the requests differ between processes.
    """
    keys = [key(r) for r in requests]
    app.check_same(keys, tasks.OTHER_DATA)
    unique = dict(zip(keys, requests))
    on_answered(sum(k in self._answers for k in unique))
    self._stopwatch.lap()
    self._score({k: r for k, r in unique.items() if isinstance(r, Continuation)}, on_answered)
    self._generate({k: r for k, r in unique.items() if isinstance(r, Prompt)}, on_answered)
    return [self._answers[k] for k in keys]

  def cost(self, requests: Iterable[Request]) -> dict[str, float]:
    """Returns the summed cost of unique requests.

    "tokens" generated or scored, "forward_passes" (tokens x members), "flops", and "seconds"
    without compilation.
    """
    total: dict[str, float] = {}
    for k in dict.fromkeys(map(key, requests)):
      for name, value in self._answers[k]["cost"].items():
        total[name] = total.get(name, 0) + value
    return total

  def experts_read(self, requests: Sequence[Request]) -> dict[str, float]:
    """Returns the unique active experts of all members per token, as costs.

    "unique_experts_read" is a mean over layers, summed over tokens ("steps"). Returns {} for a
    roster without a KV cache.
    """
    sequences, starts, ids = [], [], []
    for request in requests:
      if isinstance(request, Continuation):
        before, tokens = request.context, request.tokens
      else:
        before, tokens = request.tokens, tuple(self._answers[key(request)]["generated"])
      if len(before) + len(tokens) <= self._model[1].context_length:
        sequences.append(before + tokens)
        starts.append(len(before))
        ids.append(request.request_id)
    if not (self._roster.cache_mode.keeps_history and sequences):
      return {}
    unique = diagnostics.unique_experts(*self._model, self._roster, sequences, starts, ids)
    steps = sum(map(len, sequences)) - sum(starts)
    return {"unique_experts_read": float(unique.by_position.mean()) * steps, "steps": steps}

  def _score(self, requests, on_answered):
    # Continuations that differ in their last token are one sequence with several candidates.
    groups: dict[Any, dict[int, str]] = {}
    for k, r in requests.items():
      groups.setdefault((r.context, r.tokens[:-1], r.request_id), {})[r.tokens[-1]] = k
    sequences = [
      (context + tokens + (next(iter(last)),), len(context), i, last)
      for (context, tokens, i), last in groups.items()
    ]
    slots = min(self.batch_size, batching.bucket(len(sequences)))
    # Batches are made from all sequences, so that a resumed run has the same ones.
    for batch, positions in batching.by_length(
      [len(sequence) - 1 for sequence, *_ in sequences], self.batch_size, prefill.MIN_CAPACITY
    ):
      missing = [
        sequences[i] for i in batch if any(k not in self._answers for k in sequences[i][3].values())
      ]
      if not missing:
        continue
      tokens, starts, ids, lasts = zip(*missing)
      with naming_sequences([self._name(sequence) for sequence in tokens]):
        found = scoring.score(
          *self._model,
          tokens,
          starts,
          roster=self._roster,
          request_ids=ids,
          candidates=[list(last) for last in lasts],
          batch_size=self.batch_size,
          min_shape=(slots, positions),
        ).sequences
      seconds = self._stopwatch.lap() / len(missing)
      answers = {}
      for sequence, start, last, scores in zip(tokens, starts, lasts, found):
        cost = self._scoring_cost(len(sequence), start) | {"seconds": seconds}
        answers |= self._scored(sequence[start:-1], last, scores, cost)
      answers = {k: answer for k, answer in answers.items() if k not in self._answers}
      self._answers.write(answers)
      on_answered(len(answers))

  def _scored(self, tokens, last, scores, cost):
    before = float(scores.log_probs[:-1, 0].sum(dtype=np.float64))
    greedy = scores.greedy_tokens.tolist()
    answers = {}
    for (token, k), log_prob in zip(last.items(), scores.candidate_log_probs[:, 0]):
      answers[k] = {
        "log_prob": before + float(log_prob),
        "is_greedy": greedy == [*tokens, token],
        "tokens": len(tokens) + 1,
        "cost": cost,
      }
      cost = {"tokens": 1}  # further candidates are free
    return answers

  def _generate(self, requests, on_answered):
    kinds: dict[Any, dict[str, Prompt]] = {}
    for k, r in requests.items():
      kind = r.max_new_tokens, r.stop, r.sampler, r.stop_tokens, r.opening is None
      kinds.setdefault(kind, {})[k] = r
    for (max_new_tokens, stop, sampler, stop_tokens, raw), prompts in kinds.items():
      lengths = [len(r.tokens) + max_new_tokens for r in prompts.values()]
      for batch, _ in batching.by_length(lengths, len(lengths), prefill.MIN_CAPACITY):
        items = list(prompts.items())
        missing = [items[i] for i in batch if items[i][0] not in self._answers]
        if not missing:
          continue

        def write(index, completion, missing=missing):
          k, request = missing[index]
          self._answers.write({k: self._generated(request, completion)})
          on_answered(1)

        def stop_reader(index, missing=missing):
          opening = missing[index][1].opening
          return answer_lib.reader(self._tokenizer, opening, skip_special_tokens=False)

        with naming_sequences([self._name(r.tokens) for _, r in missing]):
          decode.generate(
            *self._model,
            [r.tokens for _, r in missing],
            max_new_tokens=max_new_tokens,
            roster=self._roster,
            sampler=Sampler.create(*sampler),
            stop_tokens=stop_tokens,
            stop_strings=stop,
            decode=self._tokenizer.decode,
            stop_reader=None if raw else stop_reader,
            batch_size=self.batch_size,
            request_ids=[r.request_id for _, r in missing],
            on_finished=write,
          )

  def _name(self, tokens):
    """Returns what errors call a request: the end of its text."""
    return f"the request that ends with {self._tokenizer.decode(list(tokens))[-60:]!r}"

  def _generated(self, request, completion):
    text = completion.text
    if request.opening is not None:
      settings = dict(opening=request.opening, stop_strings=request.stop)
      text = answer_lib.read(self._tokenizer, completion, **settings).final or ""
    return {
      "text": text,
      "finish_reason": completion.finish_reason,
      "log_prob": float(np.sum(completion.log_probs, dtype=np.float64)),
      "generated": completion.tokens,
      "tokens": len(completion.tokens),
      "cost": self._generation_cost(len(request.tokens), len(completion.tokens))
      | {"seconds": self._stopwatch.lap()},
    }

  def _scoring_cost(self, length, start):
    passes = self._roster.cache_mode.scoring(self._roster, length, start)
    return self._cost(length - start, passes)

  def _generation_cost(self, prompt_length, num_tokens):
    passes = self._roster.cache_mode.generation(self._roster, prompt_length, num_tokens)
    return self._cost(num_tokens, passes)

  def _cost(self, num_tokens, passes):
    return {
      "tokens": num_tokens,
      "forward_passes": sum(p.tokens for p in passes),
      "flops": sum(costs.forward_flops(self._model[1], *p) for p in passes),
    }
