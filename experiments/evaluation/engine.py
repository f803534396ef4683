"""Requests to one model with one roster: in batches of few shapes, each answered once.

A request is a continuation to score or a prompt to continue. Its noise is addressed
by the text of its context (`request_id`): the same whatever its task, its place
there, the batch, or a limit on the examples; all choices of a question, and the
reference solution of a problem, see the roster that a generation would see.

Answers are kept in a file as they come (`Answers`), each with what it cost. A killed
program goes on from there, and ends with the same answers and costs, but for rounding
and seconds. Of several processes the first one has the file.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import hashlib
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np

from experiments import tasks
from experiments.cli import app
from experiments.records import runs
from roe_jax import batching, costs, decode, diagnostics, prefill
from roe_jax import scoring as score_lib
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler
from roe_jax.text import answer as answer_lib
from roe_jax.text.tokenizer import Tokenizer

Answer = dict[str, Any]


def request_id(context: str, sample: int = 0) -> int:
  """The noise address of a context: 32 bits of a hash of its text.

  Two of ten thousand contexts share an address with a probability of 1 %, and
  then the noise at equal positions; nothing else comes of it.

  Args:
    context: all that the model reads before what it predicts, as text.
    sample: tells several samples of one context apart, or windows of one text.
  """
  digest = hashlib.blake2b(f"{sample}\n{context}".encode(), digest_size=4).digest()
  return int.from_bytes(digest, "little")


@dataclasses.dataclass(frozen=True)
class Continuation:
  """A request to score tokens after a context.

  Its answer has "log_prob" (summed, nats), "is_greedy" (whether each token is the
  most probable one), "tokens" (their number) and "cost".

  Attributes:
    context: token ids, at least one.
    tokens: token ids, at least one.
    request_id: address of its noise.
  """

  context: tuple[int, ...]
  tokens: tuple[int, ...]
  request_id: int


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A request to continue a text.

  Its answer has "text" (of a chat the answer apart from its reasoning, "" if the model
  did not come to it), "finish_reason", "log_prob" (summed, nats), "generated" (token
  ids), "tokens" (their number) and "cost".

  Attributes:
    tokens: token ids, at least one.
    request_id: address of its noise.
    max_new_tokens: at most so many.
    stop: strings that end the text.
    sampler: temperature, top_k and top_p; see `Sampler.create`.
    stop_tokens: tokens that end the text.
    opening: of a chat, tokens of the prompt that begin the answer (see
      `chat.Prompt`); None: all that is generated is the answer.
  """

  tokens: tuple[int, ...]
  request_id: int
  max_new_tokens: int
  stop: tuple[str, ...] = ()
  sampler: tuple[float, int, float] = (0.0, 0, 1.0)
  stop_tokens: tuple[int, ...] = ()
  opening: tuple[int, ...] | None = None


Request = Continuation | Prompt


def key(request: Request) -> str:
  """What a request is known by among the answers."""
  fields = [type(request).__name__, *dataclasses.astuple(request)]
  return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:32]


class Answers:
  """Answers by the keys of their requests, in a file of JSON lines that grows.

  The first line tells what made them.
  """

  def __init__(self, path: pathlib.Path | None = None, settings: dict[str, Any] | None = None):
    """Reads the file, or begins it; without a path answers are only held."""
    self._path = path

    def read():
      lines = runs.read_lines(path, mend=True)
      if not lines:
        app.write_atomically(path, json.dumps({"settings": settings}) + "\n")
      return lines[1:]

    lines = app.from_first_process(read) if path else []
    self._answers = {line["key"]: line["answer"] for line in lines}

  @classmethod
  def of(cls, folder: pathlib.Path, settings: dict[str, Any]) -> "Answers":
    """Those made with the same settings; several settings share a folder."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return cls(folder / f"{digest[:16]}.jsonl", settings)

  def __contains__(self, key: str) -> bool:
    return key in self._answers

  def __getitem__(self, key: str) -> Answer:
    return self._answers[key]

  def write(self, answers: dict[str, Answer]) -> None:
    self._answers |= answers
    if self._path and app.is_first_process():
      with open(self._path, "a") as file:
        file.write(
          "".join(
            json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in answers.items()
          )
        )


class Stopwatch:
  """Wall time, without what JAX spends on tracing and compiling."""

  def __init__(self):
    self._spans: list[tuple[float, float]] = []  # beginnings and ends, disjoint
    jax.monitoring.register_event_duration_secs_listener(self._on_duration)
    self._last = time.perf_counter()

  def _on_duration(self, event, seconds, **kwargs):
    if not event.startswith("/jax/core/compile/"):
      return
    end = time.perf_counter()
    # What is done within a span is told of before the span is.
    while self._spans and self._spans[-1][0] >= end - seconds:
      self._spans.pop()
    self._spans.append((end - seconds, end))

  def lap(self) -> float:
    """Seconds since the last call."""
    now = time.perf_counter()
    seconds = now - self._last - sum(end - begin for begin, end in self._spans)
    self._spans.clear()
    self._last = now
    return max(0.0, seconds)


class Engine:
  """Answers requests, those that are not answered yet.

  Attributes:
    batch_size: requests computed together.
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
    """An engine.

    Args:
      params: the model's parameters.
      config: its architecture.
      tokenizer: its tokenizer.
      roster: the settings; the answers must have been made with them.
      answers: where answers are kept.
      batch_size: see the class.
      stopwatch: may be shared by several engines.
    """
    self.batch_size = batch_size
    self._model = params, config
    self._tokenizer, self._roster, self._answers = tokenizer, roster, answers
    self._stopwatch = stopwatch or Stopwatch()

  def answer(
    self, requests: Sequence[Request], on_answered: Callable[[int], None] = lambda count: None
  ) -> list[Answer]:
    """The answers in the order of the requests.

    Args:
      requests: what is wanted; equal ones are computed once.
      on_answered: called with the number of different requests whenever some are
        answered; at first of those that already were.

    Raises:
      ValueError: another process has other requests.
    """
    keys = [key(r) for r in requests]
    app.check_same(keys, tasks.OTHER_DATA)
    different = dict(zip(keys, requests))
    on_answered(sum(k in self._answers for k in different))
    self._stopwatch.lap()
    self._score({k: r for k, r in different.items() if isinstance(r, Continuation)}, on_answered)
    self._generate({k: r for k, r in different.items() if isinstance(r, Prompt)}, on_answered)
    return [self._answers[k] for k in keys]

  def cost(self, requests: Iterable[Request]) -> dict[str, float]:
    """What the answers to requests cost, summed; each counts once.

    "tokens" generated or scored, "forward_passes" (positions times members), "flops" and
    "seconds" without compilation.
    """
    total: dict[str, float] = {}
    for k in dict.fromkeys(map(key, requests)):
      for name, value in self._answers[k]["cost"].items():
        total[name] = total.get(name, 0) + value
    return total

  def experts_read(self, requests: Sequence[Request]) -> dict[str, float]:
    """Different experts of a layer that the members choose for one token of an answer.

    "unique_experts_read" is summed over tokens ("steps"), and the mean over layers; none for a
    roster without a cache.
    """
    texts, starts, ids = [], [], []
    for request in requests:
      if isinstance(request, Continuation):
        before, tokens = request.context, request.tokens
      else:
        before, tokens = request.tokens, tuple(self._answers[key(request)]["generated"])
      if len(before) + len(tokens) <= self._model[1].context_length:
        texts.append(before + tokens)
        starts.append(len(before))
        ids.append(request.request_id)
    if self._roster.recompute or not texts:
      return {}
    unique = diagnostics.unique_experts(*self._model, self._roster, texts, starts, ids)
    steps = sum(map(len, texts)) - sum(starts)
    return {"unique_experts_read": float(unique.by_position.mean()) * steps, "steps": steps}

  def _score(self, requests, on_answered):
    # Continuations that differ in their last token are one text with candidates for it.
    groups: dict[Any, dict[int, str]] = {}
    for k, r in requests.items():
      groups.setdefault((r.context, r.tokens[:-1], r.request_id), {})[r.tokens[-1]] = k
    texts = [
      (context + tokens + (next(iter(last)),), len(context), i, last)
      for (context, tokens, i), last in groups.items()
    ]
    rows = min(self.batch_size, batching.bucket(len(texts)))
    # Batches are made of all texts, so that a run that goes on has those of the first.
    for batch, positions in batching.by_length(
      [len(text) - 1 for text, *_ in texts], self.batch_size, prefill.MIN_CAPACITY
    ):
      missing = [
        texts[i] for i in batch if any(k not in self._answers for k in texts[i][3].values())
      ]
      if not missing:
        continue
      tokens, starts, ids, lasts = zip(*missing)
      found = score_lib.score(
        *self._model,
        tokens,
        starts,
        roster=self._roster,
        request_ids=ids,
        candidates=[list(last) for last in lasts],
        batch_size=self.batch_size,
        min_shape=(rows, positions),
      ).sequences
      seconds = self._stopwatch.lap() / len(missing)
      answers = {}
      for text, start, last, scores in zip(tokens, starts, lasts, found):
        cost = self._scoring_cost(len(text), start) | {"seconds": seconds}
        answers |= self._scored(text[start:-1], last, scores, cost)
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
      cost = {"tokens": 1}  # the others come with the first
    return answers

  def _generate(self, requests, on_answered):
    kinds: dict[Any, dict[str, Prompt]] = {}
    for k, r in requests.items():
      kinds.setdefault((r.max_new_tokens, r.stop, r.sampler, r.stop_tokens), {})[k] = r
    for (max_new_tokens, stop, sampler, stop_tokens), prompts in kinds.items():
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

        decode.generate(
          *self._model,
          [r.tokens for _, r in missing],
          max_new_tokens=max_new_tokens,
          roster=self._roster,
          sampler=Sampler.create(*sampler),
          stop_tokens=stop_tokens,
          stop_strings=stop,
          decode=self._tokenizer.decode,
          batch_size=self.batch_size,
          request_ids=[r.request_id for _, r in missing],
          on_finished=write,
        )

  def _generated(self, request, completion):
    text = completion.text
    if request.opening is not None:
      text = (
        answer_lib.read(
          self._tokenizer, completion, opening=request.opening, stop_strings=request.stop
        ).final
        or ""
      )
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
    roster, config = self._roster, self._model[1]
    filled_first = roster.cache == "clean" and not roster.is_baseline
    before = length - 1 if filled_first else start - 1
    return {
      "tokens": length - start,
      "forward_passes": self._rows(before, length - start),
      "flops": costs.scoring_flops(config, roster, length, start),
    }

  def _generation_cost(self, prompt_length, num_tokens):
    return {
      "tokens": num_tokens,
      "forward_passes": self._rows(prompt_length - 1, num_tokens),
      "flops": costs.generation_flops(self._model[1], self._roster, prompt_length, num_tokens),
    }

  def _rows(self, before, predicting):
    """Positions times members, of the history and of what is predicted."""
    members = len(self._roster.members)
    return before * len(self._roster.history().members) + predicting * members
