"""Batches sequences of different lengths into arrays of few shapes."""

from collections.abc import Callable, Sequence
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import sharding
from roe_jax.config import ModelConfig
from roe_jax.params import Params


def bucket(size: int, minimum: int = 1) -> int:
  """Rounds `size` up to one of four sizes per octave: few shapes, at most 20 % padding."""
  size = max(size, minimum)
  unit = max(1, 1 << max(0, (size - 1).bit_length() - 3))
  return -(-size // unit) * unit


def power_of_two(size: int, minimum: int = 1) -> int:
  """Rounds `size` up to a power of two: fewer shapes than `bucket`, more padding."""
  return 1 << (max(size, minimum) - 1).bit_length()


def by_length(lengths: Sequence[int], size: int, minimum: int) -> list[tuple[list[int], int]]:
  """Groups sequences by length, longest first, so that memory runs out at once or never.

  Args:
    lengths: of the sequences.
    size: maximum batch size.
    minimum: minimum padded length.

  Returns:
    For each batch, the indices of its sequences and the length to pad them to: a power
    of two.
  """
  order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
  batches = []
  for positions, same in itertools.groupby(order, lambda i: power_of_two(lengths[i], minimum)):
    same = list(same)
    batches += [(same[i : i + size], positions) for i in range(0, len(same), size)]
  return batches


def check_tokens(
  config: ModelConfig,
  sequences: Sequence[Sequence[int]],
  *,
  room: int = 0,
  what: str = "prompt",
  first: int = 0,
) -> None:
  """Validates sequences before expensive work.

  Args:
    config: the model's architecture.
    sequences: token ids.
    room: positions that the context must have left after each sequence; -1 if the last
      token needs none.
    what: what to call a sequence in errors.
    first: number of the first sequence in errors.

  Raises:
    ValueError: a sequence is text or no sequence, empty, too long, or has a token id outside
      the vocabulary.
  """
  for i, sequence in enumerate([sequences] if isinstance(sequences, str) else sequences, first):
    if isinstance(sequence, str):
      raise ValueError(
        f"{what} {i} is text, {sequence[:40]!r}; token ids are expected: pass "
        "tokenizer.encode(text)"
      )
    if np.ndim(sequence) == 0:
      raise ValueError(
        f"a list of {what}s is expected, each a list of token ids, but its item {i} is "
        f"{sequence!r}: pass [tokens] for one {what}"
      )
    if len(sequence) == 0:
      raise ValueError(f"{what} {i} is empty: add at least one token, such as BOS")
    if len(sequence) + room > config.context_length:
      more = f" with {room} more to generate" if room > 0 else ""
      raise ValueError(
        f"{what} {i} has {len(sequence)} tokens, which does not fit the model's context of "
        f"{config.context_length}{more}: shorten it"
      )
    ids = np.asarray(sequence)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
      raise ValueError(
        f"{what} {i} must be a list of integer token ids, got {ids.dtype} {list(ids.shape)}"
      )
    if ids.min() < 0 or ids.max() >= config.vocab_size:
      wrong = ids[(ids < 0) | (ids >= config.vocab_size)][0]
      raise ValueError(
        f"{what} {i} has token id {wrong}, outside the model's vocabulary of "
        f"{config.vocab_size}: was it encoded with another model's tokenizer?"
      )


def pad(sequences: Sequence[Sequence[int]], batch_size: int, length: int) -> jax.Array:
  """Returns sequences as int32 `[batch_size, length]`, padded with zeros."""
  array = np.zeros((batch_size, length), np.int32)
  for row, sequence in zip(array, sequences):
    row[: len(sequence)] = sequence
  return jnp.asarray(array)


def device_put_like(params: Params, tree: Any) -> Any:
  """Commits arrays to the device or mesh of the parameters.

  The outputs of a step are committed there if the parameters are (those of a checkpoint
  are). The inputs of the first step must be too, or it is compiled twice. On a mesh,
  `sharding.state_specs` gives the layout.
  """
  where = params.final_norm.sharding
  if sharding.mesh_of(params) is not None:
    where = sharding.state_shardings(where.mesh, tree)
  return jax.device_put(tree, where)


def init_sharded(
  params: Params, make: Callable[..., Any], config: ModelConfig, *settings: Any, **sizes: Any
) -> Any:
  """Runs `device_put_like` on `make(config, *settings, **sizes)`; no device holds it whole.

  Args:
    params: the model's parameters.
    make: a module-level function that makes arrays; its program is cached.
    config: the model's architecture.
    *settings: pytrees.
    **sizes: static arguments that set the shapes.
  """
  if sharding.mesh_of(params) is None:
    return device_put_like(params, make(config, *settings, **sizes))
  return _init_on_mesh(params, settings, make, config, tuple(sizes.items()))


# The parameters only determine the sharding.
@functools.partial(jax.jit, static_argnames=("make", "config", "sizes"), keep_unused=True)
def _init_on_mesh(params, settings, make, config, sizes):
  return sharding.with_sharding_constraint(params, make(config, *settings, **dict(sizes)))


def request_ids(given: Sequence[int] | None, count: int) -> list[int]:
  """Returns the given request ids, or 0, 1, ...

  Raises:
    ValueError: wrong number of ids, or one outside [0, 2**32).
  """
  if given is None:
    return list(range(count))
  if len(given) != count:
    raise ValueError(f"got {len(given)} request ids for {count} sequences")
  for i in given:
    if not 0 <= i < 2**32:
      raise ValueError(f"request ids must lie in [0, 2**32), got {i}")
  return list(given)
