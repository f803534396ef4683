"""What trained models are judged on: completions of test problems, or windows of unseen text."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cli import app
from experiments.tasks import wordmath, wordmath_tokenizer
from experiments.training import configs, training_batches
from experiments.training.text_data import TextData
from roe_jax import scoring
from roe_jax.config import ModelConfig
from roe_jax.training import Batch

BATCH, LENGTH = 50, 128


@functools.partial(jax.jit, static_argnames="config")
def _judge(config, models, tokens, ids, temperatures):
  """Judges the mean distribution of several (parameters, roster).

  Returns:
    Of each next token its nats at each temperature `[G, B, T-1]`, whether it is the most probable
    one, and the probability of the most probable one at the last temperature, both `[B, T-1]`.
  """
  each = [scoring.log_probs(params, config, tokens, roster, ids) for params, roster in models]
  log_probs = (jax.nn.logsumexp(jnp.stack(each), axis=0) - math.log(len(each)))[:, :-1]

  def at(temperature):
    scaled = jax.nn.log_softmax(log_probs / temperature)
    nll = -jnp.take_along_axis(scaled, tokens[:, 1:, None], axis=-1)[..., 0]
    return nll, jnp.exp(scaled.max(-1))

  nll, confidence = jax.lax.map(at, temperatures)
  return nll, jnp.argmax(log_probs, axis=-1) == tokens[:, 1:], confidence[-1]


class Items:
  """Items of a split, the unit of all intervals: each has one sequence or several.

  Attributes:
    batches: the sequences in batches of one shape; tokens with weights are scored.
    tokens: `[X]` scored tokens of each item.
    facts: what results say of the items.
  """

  def __init__(
    self, batches: Sequence[Batch], items: np.ndarray, facts: Mapping[str, Any] | None = None
  ):
    """Groups the sequences; `items` is the number of each one's item, `[N]`."""
    self.batches, self._items, self.facts = batches, items, facts or {}
    scored = np.concatenate([(b.weights[:, 1:] > 0).sum(-1) for b in batches])
    self.tokens = np.bincount(items, scored).astype(int)

  def judge(
    self,
    config: ModelConfig,
    models: Sequence[tuple[Any, Any]],
    temperatures: Sequence[float] | np.ndarray,
  ) -> tuple[list[np.ndarray], ...]:
    """Returns `[G]` nats of each item, and of each of its tokens whether it is the most probable
    one and the probability of that at the last temperature."""
    found: list[list] = [[] for _ in self.tokens]
    items = iter(self._items)
    for batch in self.batches:
      nll, right, confidence = jax.device_get(
        _judge(config, models, batch.tokens, batch.ids, jnp.asarray(temperatures))
      )
      for i, own in enumerate(batch.weights[:, 1:] > 0):
        found[next(items)].append((nll[:, i, own].sum(-1), right[i, own], confidence[i, own]))
    joins = (functools.partial(np.sum, axis=0), np.concatenate, np.concatenate)
    return tuple([join([r[k] for r in rows]) for rows in found] for k, join in enumerate(joins))


def _problems(model, checkpoints, counts) -> list[Items]:
  del checkpoints  # all have the tokenizer of the task
  tokenizer, found = wordmath_tokenizer.build_tokenizer(), []
  for split, count in counts.items():
    encoded = [training_batches.encode(tokenizer, p) for p in wordmath.problems(split, count)]
    batches = [
      training_batches.pack(
        encoded[i : i + BATCH], range(i, min(i + BATCH, count)), 0.0, model.pad_token_id, LENGTH
      )
      for i in range(0, count, BATCH)
    ]
    found.append(Items(batches, np.arange(count)))
  return found


def _windows(model, checkpoints, counts) -> list[Items]:
  folders = [app.checkpoint_path(name) for name in checkpoints]
  if len({(folder / "tokenizer.json").read_bytes() for folder in folders}) > 1:
    raise ValueError(
      "the models have different tokenizers, so they were trained on different text: train them "
      "with the same versions of the installed packages"
    )
  data, found = configs.load("text_routing:plain").data.load(model, folders[0]), []
  assert isinstance(data, TextData)
  for split, count in counts.items():
    windows = data.windows(split).spread(count)
    ids = np.arange(len(windows.tokens))
    batches = [windows.take(ids[i : i + BATCH]).batch(ids[i : i + BATCH]) for i in ids[::BATCH]]
    facts = {"windows": len(ids), "digest": data.origin["corpus"]["digest"]}
    found.append(Items(batches, np.unique(windows.documents, return_inverse=True)[1], facts))
  return found


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
  """What models are trained and judged on.

  Attributes:
    configs: the file of training configs.
    prefix: of the trainings' folders.
    unit: what an item is.
    described: the items in a note, a format of the facts.
    scores: maps whether each token of an item is right to its scores.
    items: `items(model, checkpoints, counts)` returns `Items` of each split in `counts`, for all
      models in `checkpoints`.
  """

  configs: str
  prefix: str
  unit: str
  described: str
  scores: Mapping[str, Callable[[np.ndarray], float]]
  items: Callable[[ModelConfig, Sequence[str], Mapping[str, int]], list[Items]]


WORDMATH = Corpus(
  "wordmath_routing", "", "problem", "problems", {"quality": all, "right": np.mean}, _problems
)
TEXT = Corpus(
  "text_routing",
  "text-",
  "file",
  "files of packages that no training has seen ({windows} windows; corpus {digest:.12})",
  {"right": np.mean},
  _windows,
)
