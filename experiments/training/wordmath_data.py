"""Training on `wordmath` problems."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
import sys

import numpy as np
import tokenizers

from experiments.tasks import wordmath, wordmath_tokenizer
from experiments.training import training_batches
from roe_jax import decode
from roe_jax.config import ModelConfig
from roe_jax.training import Batch

MAX_NEW_TOKENS = 64  # The longest completion has less than 60.


@dataclasses.dataclass(frozen=True)
class Wordmath:
  """Problems of `wordmath`.

  Attributes:
    num_problems: size of the fixed training set, repeated in epochs; None for a stream of new
      problems.
    question_weight: loss weight of question tokens; answer tokens have weight 1.
    evaluation_problems: validation problems per evaluation.
  """

  num_problems: int | None = None
  question_weight: float = 0.25
  evaluation_problems: int = 200

  def __post_init__(self):
    for name in ("num_problems", "evaluation_problems"):
      if (value := getattr(self, name)) is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")

  def load(self, model: ModelConfig, folder: pathlib.Path) -> "WordmathData":
    """Returns the problems for a model; they need no files."""
    del folder
    return WordmathData(self, model)


class WordmathData:
  """The problems in tokens.

  Attributes:
    origin: nothing, since a run depends on no data from elsewhere.
  """

  def __init__(self, settings: Wordmath, model: ModelConfig):
    self._settings, self._pad_id = settings, model.pad_token_id or 0
    self.origin = {}

  @functools.cached_property
  def tokenizer(self) -> tokenizers.Tokenizer:
    return wordmath_tokenizer.build_tokenizer()

  def batches(self, batch_size: int, seed: int) -> Callable[[int], Batch]:
    """Returns the batch of each step."""
    own = self._settings
    return training_batches.TrainingBatches(
      self.tokenizer, batch_size, own.num_problems, own.question_weight, seed, self._pad_id
    )

  def evaluate(self, params, config: ModelConfig, seed: int) -> dict[str, float]:
    """Returns scores on validation problems, and the perplexity of training problems."""
    own = self._settings
    validation = wordmath.problems("validation", own.evaluation_problems)
    number = min(own.evaluation_problems, own.num_problems or sys.maxsize)
    seen = wordmath.problems("train", number, seed)
    return {
      "validation_perplexity": self._answer_perplexity(params, config, validation),
      "train_perplexity": self._answer_perplexity(params, config, seen),
      "validation_exact_match": self._exact_match(params, config, validation),
    }

  def _answer_perplexity(self, params, config, problems):
    """Returns the perplexity of the completions, end-of-text tokens included."""
    sequences = sorted(
      (training_batches.encode(self.tokenizer, p) for p in problems), key=lambda s: sum(map(len, s))
    )
    chunks = (sequences[start : start + 40] for start in range(0, len(sequences), 40))
    batches = (training_batches.pack(c, range(len(c)), 0.0, config.pad_token_id) for c in chunks)
    return training_batches.scores(params, config, batches)[0]

  def _exact_match(self, params, config, problems):
    """Returns the share of problems solved by greedy decoding."""
    prompts = [training_batches.encode(self.tokenizer, p)[0] for p in problems]
    completions = decode.generate(
      params, config, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=100
    ).completions
    solved = [
      wordmath.is_correct(self.tokenizer.decode(list(c.tokens)), p)
      for c, p in zip(completions, problems)
    ]
    return float(np.mean(solved))
