"""Training batches of `wordmath` problems, and what batches of any text share."""

from collections.abc import Iterable, Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from experiments.tasks import wordmath
from roe_jax import training, transformer
from roe_jax.config import ModelConfig
from roe_jax.training import Batch

WINDOW = 16  # Batches per window, within which problems are sorted by length.
MULTIPLE = 16  # Batch lengths are multiples of this, so that few shapes are compiled.


def encode(
  tokenizer: tokenizers.Tokenizer, problem: wordmath.Problem
) -> tuple[list[int], list[int]]:
  """Returns the token ids of the prompt, and of the completion with the end-of-text token."""
  prompt, completion = tokenizer.encode_batch(
    [wordmath.prompt(problem), wordmath.completion(problem)]
  )
  end = tokenizer.token_to_id("<|endoftext|>")
  assert end is not None
  return prompt.ids, completion.ids + [end]


def pack(
  sequences: Sequence[tuple[list[int], list[int]]],
  ids: Sequence[int],
  question_weight: float,
  pad_id: int,
  multiple: int = MULTIPLE,
) -> Batch:
  """Returns a batch of numpy arrays, padded on the right to a multiple of some length."""
  longest = max(len(prompt) + len(completion) for prompt, completion in sequences)
  shape = (len(sequences), -(-longest // multiple) * multiple)
  tokens = np.full(shape, pad_id, np.int32)
  weights = np.zeros(shape, np.float32)
  for i, (prompt, completion) in enumerate(sequences):
    end = len(prompt) + len(completion)
    tokens[i, :end] = prompt + completion
    weights[i, : len(prompt)] = question_weight
    weights[i, len(prompt) : end] = 1.0
  return Batch(tokens, weights, np.asarray(ids, np.uint32))


@functools.partial(jax.jit, static_argnames="config")
def _score(params, config, batch):
  logits, _ = transformer.forward(params, config, batch.tokens, strategy="padded")
  weights, targets = batch.weights[:, 1:], batch.tokens[:, 1:]
  nll = jnp.sum(weights * training.cross_entropy(logits, batch.tokens))
  right = jnp.sum(weights * (jnp.argmax(logits[:, :-1], axis=-1) == targets))
  return nll, right, weights.sum()


def scores(params, config: ModelConfig, batches: Iterable[Batch]) -> tuple[float, float]:
  """Returns the perplexity, and the share of tokens that are the most probable ones."""
  nll, right, weight = np.sum([jax.device_get(_score(params, config, b)) for b in batches], axis=0)
  return float(np.exp(nll / weight)), float(right / weight)


class Epochs:
  """The order in which a fixed set is repeated: each epoch has one of its own."""

  def __init__(self, size: int, seed: int):
    order = lambda epoch: np.random.default_rng((seed, 0, epoch)).permutation(size)
    self._size, self._order = size, functools.lru_cache(maxsize=2)(order)

  def index(self, position: int) -> int:
    """Returns the index in the set of what is at a position of the stream."""
    epoch, offset = divmod(position, self._size)
    return int(self._order(epoch)[offset])


class TrainingBatches:
  """The batches of a run; each is a pure function of the settings and the step.

  The stream of problems is cut into windows of `WINDOW` batches. Problems are sorted by length
  within a window to reduce padding, and its batches are shuffled.

  Attributes:
    num_problems: size of the fixed set of problems, shuffled in each epoch; None for a stream of
      new problems.
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
    # WINDOW consecutive steps use a window.
    self._window = functools.lru_cache(maxsize=2)(self._make_window)
    self._epochs = Epochs(num_problems, seed) if num_problems else None

  def __call__(self, step: int) -> Batch:
    """Returns the batch of a step; its ids are the problems' positions in the stream."""
    window, index = divmod(step, WINDOW)
    return self._window(window)[index]

  def problem_index(self, position: int) -> int:
    """Returns the index in the train split of the problem at a position of the stream."""
    return self._epochs.index(position) if self._epochs else position

  def _make_window(self, window):
    size = WINDOW * self._batch_size
    positions = range(window * size, (window + 1) * size)
    sequences = {
      p: encode(self._tokenizer, wordmath.problem("train", self.problem_index(p), self._seed))
      for p in positions
    }
    by_length = sorted(positions, key=lambda p: sum(map(len, sequences[p])))
    order = np.random.default_rng((self._seed, 1, window)).permutation(WINDOW)
    batches = []
    for i in order:
      chosen = by_length[i * self._batch_size : (i + 1) * self._batch_size]
      batches.append(
        pack([sequences[p] for p in chosen], chosen, self._question_weight, self._pad_id)
      )
    return batches
