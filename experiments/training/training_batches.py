"""Batches of `wordmath` problems for training."""

import functools

import numpy as np
import tokenizers

from experiments.tasks import wordmath
from roe_jax.training import Batch

WINDOW = 16  # Batches whose problems are sorted by length together.
MULTIPLE = 16  # Batches are this long or a multiple: few shapes to compile for.


def encode(
  tokenizer: tokenizers.Tokenizer, problem: wordmath.Problem
) -> tuple[list[int], list[int]]:
  """Token ids of the prompt and of the completion, which ends the text."""
  prompt, completion = tokenizer.encode_batch(
    [wordmath.prompt(problem), wordmath.completion(problem)]
  )
  return prompt.ids, completion.ids + [tokenizer.token_to_id("<|endoftext|>")]


def pack(
  texts: list[tuple[list[int], list[int]]], ids: list[int], question_weight: float, pad_id: int
) -> Batch:
  """A batch of numpy arrays, padded on the right to a multiple of `MULTIPLE`."""
  longest = max(len(prompt) + len(completion) for prompt, completion in texts)
  shape = (len(texts), -(-longest // MULTIPLE) * MULTIPLE)
  tokens = np.full(shape, pad_id, np.int32)
  weights = np.zeros(shape, np.float32)
  for row, (prompt, completion) in enumerate(texts):
    end = len(prompt) + len(completion)
    tokens[row, :end] = prompt + completion
    weights[row, : len(prompt)] = question_weight
    weights[row, len(prompt) : end] = 1.0
  return Batch(tokens, weights, np.asarray(ids, np.uint32))


class TrainingBatches:
  """The batches of a run; each is a pure function of the settings and the step.

  The stream of problems is cut into windows of `WINDOW` batches. Those of one
  window are sorted by length, so that little is padding, and the batches made
  of them are put in random order.

  Attributes:
    num_problems: of the fixed set, of which every epoch is in a random order
      of its own, or None for a new problem at every place in the stream.
  """

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    batch_size: int,
    num_problems: int | None = None,
    question_weight: float = 0.25,
    seed: int = 0,
    pad_id: int = 0,
  ):
    self.num_problems = num_problems
    self._tokenizer = tokenizer
    self._batch_size = batch_size
    self._question_weight = question_weight
    self._seed = seed
    self._pad_id = pad_id
    # A window is asked for by WINDOW steps in a row.
    self._window = functools.lru_cache(maxsize=2)(self._make_window)
    self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

  def __call__(self, step: int) -> Batch:
    """The batch of `step`; its ids are the problems' places in the stream."""
    window, place = divmod(step, WINDOW)
    return self._window(window)[place]

  def problem_index(self, place: int) -> int:
    """Index, in the train split, of the problem at a place of the stream."""
    if self.num_problems is None:
      return place
    epoch, offset = divmod(place, self.num_problems)
    return int(self._epoch(epoch)[offset])

  def _make_epoch(self, epoch):
    return np.random.default_rng((self._seed, 0, epoch)).permutation(self.num_problems)

  def _make_window(self, window):
    size = WINDOW * self._batch_size
    places = range(window * size, (window + 1) * size)
    texts = {
      p: encode(self._tokenizer, wordmath.problem("train", self.problem_index(p), self._seed))
      for p in places
    }
    by_length = sorted(places, key=lambda p: sum(map(len, texts[p])))
    order = np.random.default_rng((self._seed, 1, window)).permutation(WINDOW)
    batches = []
    for i in order:
      chosen = by_length[i * self._batch_size : (i + 1) * self._batch_size]
      batches.append(pack([texts[p] for p in chosen], chosen, self._question_weight, self._pad_id))
    return batches
