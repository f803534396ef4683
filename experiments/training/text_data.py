"""Training on natural text: windows of `python_corpus`, with a tokenizer of its own."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import math
import pathlib
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from experiments.cli import app
from experiments.tasks.wordmath_tokenizer import END_OF_TEXT, PADDING
from experiments.training import python_corpus, training_batches
from roe_jax.config import ModelConfig
from roe_jax.training import Batch

# Merges are learned from every third training document, which takes seconds.
TOKENIZER_STRIDE = 3


@dataclasses.dataclass(frozen=True)
class Text:
  """Windows of natural text.

  Attributes:
    length: T, tokens per window.
    evaluation_windows: validation windows, and training windows, per evaluation.
  """

  length: int = 128
  evaluation_windows: int = 500

  def __post_init__(self):
    for name, least in (("length", 2), ("evaluation_windows", 1)):
      if getattr(self, name) < least:
        raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

  def load(self, model: ModelConfig, folder: pathlib.Path) -> "TextData":
    """Reads the corpus; `folder` has the tokenizer, or gets it at the first use."""
    return TextData(self, model, folder, python_corpus.collect())


def build_tokenizer(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
  """Trains a byte-level BPE; ids: 0 end of text, 1 padding, then the bytes, then merges."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END_OF_TEXT, PADDING],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer


@dataclasses.dataclass(frozen=True)
class Windows:
  """Windows of documents that do not overlap; the last of a document is padded.

  Attributes:
    tokens: `[N, T]` int32, without windows that have one token only.
    weights: `[N, T]` float32, 1 except on padding.
    documents: `[N]`, the index of each window's document.
  """

  tokens: np.ndarray
  weights: np.ndarray
  documents: np.ndarray

  @classmethod
  def cut(cls, sequences: Sequence[Sequence[int]], length: int, pad_id: int) -> "Windows":
    """Cuts sequences of token ids into windows of `length`."""
    numbers = [math.ceil((len(ids) - 1) / length) for ids in sequences]
    tokens = np.full((sum(numbers), length), pad_id, np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    first = 0
    for ids, number in zip(sequences, numbers):
      some = np.asarray(ids[: number * length], np.int32)
      tokens[first : first + number].reshape(-1)[: len(some)] = some
      weights[first : first + number].reshape(-1)[: len(some)] = 1
      first += number
    return cls(tokens, weights, np.repeat(np.arange(len(sequences)), numbers))

  def spread(self, count: int) -> "Windows":
    """Returns `count` random windows: one of each document before a second one of any."""
    order = np.random.default_rng(0).permutation(len(self.documents))
    ranks, seen = [], dict.fromkeys(self.documents, 0)
    for document in self.documents[order]:
      ranks.append(seen[document])
      seen[document] += 1
    return self.take(order[np.argsort(ranks, kind="stable")][:count])

  def take(self, indices: Any) -> "Windows":
    return Windows(self.tokens[indices], self.weights[indices], self.documents[indices])

  def batch(self, ids: Sequence[int] | np.ndarray) -> Batch:
    """Returns all windows as a batch whose noise is addressed by `ids` `[N]`."""
    return Batch(self.tokens, self.weights, np.asarray(ids, np.uint32))


class TextData:
  """The corpus in tokens.

  Attributes:
    origin: the digest of the corpus and its packages' versions, on which a run depends.
  """

  def __init__(
    self, settings: Text, model: ModelConfig, folder: pathlib.Path, corpus: python_corpus.Corpus
  ):
    self._settings, self._model, self._folder, self._corpus = settings, model, folder, corpus
    self.origin = {"corpus": {"digest": corpus.digest, "versions": dict(corpus.versions)}}
    self.windows = functools.lru_cache(self._windows)

  @functools.cached_property
  def tokenizer(self) -> tokenizers.Tokenizer:
    path = self._folder / "tokenizer.json"
    if not path.exists():
      texts = (d.text for d in self._corpus.documents["train"][::TOKENIZER_STRIDE])
      trained = build_tokenizer(texts, self._model.vocab_size)
      app.write_atomically(path, trained.to_str(pretty=True))
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True  # their names are ordinary text
    return tokenizer

  def _windows(self, split: str) -> Windows:
    """Returns the windows of a split."""
    documents, sequences = self._corpus.documents[split], []
    end = self.tokenizer.token_to_id(END_OF_TEXT)
    for i in range(0, len(documents), 64):  # encodings of all take gigabytes
      some = self.tokenizer.encode_batch_fast([d.text for d in documents[i : i + 64]])
      sequences += [np.array([*one.ids, end], np.int32) for one in some]
    return Windows.cut(sequences, self._settings.length, self._model.pad_token_id or 0)

  def batches(self, batch_size: int, seed: int) -> Callable[[int], Batch]:
    """Returns the batch of each step; each epoch has all training windows in an order of its own.

    Ids are the windows' positions in the stream, which address their noise.
    """
    windows = self.windows("train")
    order = training_batches.Epochs(len(windows.tokens), seed)

    def batch(step):
      positions = range(step * batch_size, (step + 1) * batch_size)
      return windows.take([order.index(p) for p in positions]).batch(positions)

    return batch

  def evaluate(self, params, config: ModelConfig, seed: int) -> dict[str, float]:
    """Returns scores on validation windows, and the perplexity of training windows."""
    del seed  # all runs have the same windows
    scores = {}
    for split in ("validation", "train"):
      windows = self.windows(split).spread(self._settings.evaluation_windows)
      batches = (
        windows.take(slice(i, i + 50)).batch(range(len(windows.tokens[i : i + 50])))
        for i in range(0, len(windows.tokens), 50)
      )
      perplexity, accuracy = training_batches.scores(params, config, batches)
      scores |= {f"{split}_perplexity": perplexity, f"{split}_accuracy": accuracy}
    return scores
