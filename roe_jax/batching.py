"""Texts of different lengths as arrays of few different shapes."""

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
  """`size` rounded up to one of four sizes per octave, so that few shapes are
  compiled and at most a fifth of an array is padding."""
  size = max(size, minimum)
  unit = max(1, 1 << max(0, (size - 1).bit_length() - 3))
  return -(-size // unit) * unit


def power_of_two(size: int, minimum: int = 1) -> int:
  """`size` rounded up to a power of two: fewer shapes than `bucket`, more padding."""
  return 1 << (max(size, minimum) - 1).bit_length()


def by_length(lengths: Sequence[int], size: int, minimum: int) -> list[tuple[list[int], int]]:
  """Batches of sequences of similar lengths, longest first, so that memory runs out at once or never.

  Args:
    lengths: of the sequences.
    size: of a batch, at most.
    minimum: positions of the smallest batches.

  Returns:
    Indices of each batch's sequences, and the positions that they are to be padded
    to: a power of two, the same for many batches.
  """
  order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
  batches = []
  for positions, same in itertools.groupby(order, lambda i: power_of_two(lengths[i], minimum)):
    same = list(same)
    batches += [(same[i : i + size], positions) for i in range(0, len(same), size)]
  return batches


def check_tokens(
  config: ModelConfig, sequences: Sequence[Sequence[int]], *, room: int = 0, what: str = "prompt"
) -> None:
  """Checks sequences before any work starts.

  Args:
    config: the model they are for.
    sequences: token ids.
    room: how many positions must be left in the context behind each; -1 where
      the last token needs none.
    what: what to call a text in errors.

  Raises:
    ValueError: a text is empty, too long, or holds a token id outside the
      vocabulary.
  """
  for i, text in enumerate(sequences):
    if len(text) == 0:
      raise ValueError(f"{what} {i} is empty: at least one token is needed (a BOS token will do)")
    if len(text) + room > config.context_length:
      raise ValueError(
        f"{what} {i} has {len(text)} tokens, which does not fit the model's context of "
        f"{config.context_length}" + (f" with {room} more to come" if room else "") + ": shorten it"
      )
    ids = np.asarray(text)
    if ids.min() < 0 or ids.max() >= config.vocab_size:
      wrong = ids[(ids < 0) | (ids >= config.vocab_size)][0]
      raise ValueError(
        f"{what} {i} holds token id {wrong}, outside the model's vocabulary of "
        f"{config.vocab_size}: was it encoded with another model's tokenizer?"
      )


def pad(sequences: Sequence[Sequence[int]], batch_size: int, length: int) -> jax.Array:
  """Texts as int32 `[batch_size, length]`, zeros to the right and below."""
  array = np.zeros((batch_size, length), np.int32)
  for row, text in zip(array, sequences):
    row[: len(text)] = text
  return jnp.asarray(array)


def device_put_like(params: Params, tree: Any) -> Any:
  """Commits arrays to the device or the mesh of the parameters.

  What a step returns is committed there if the parameters are (those of a
  checkpoint are); what goes into the first step must be so too, or that step
  is compiled once more. On a mesh they lie as `sharding.state_specs` says.
  """
  where = params.final_norm.sharding
  if sharding.mesh_of(params) is not None:
    where = sharding.state_shardings(where.mesh, tree)
  return jax.device_put(tree, where)


def init_sharded(
  params: Params, make: Callable[..., Any], config: ModelConfig, *settings: Any, **sizes: Any
) -> Any:
  """`device_put_like` of `make(config, *settings, **sizes)`; no device of a mesh ever holds it whole.

  Args:
    params: the model's parameters.
    make: makes arrays; a function of a module, as its program is kept.
    config: their architecture.
    *settings: pytrees.
    **sizes: what the arrays' shapes depend on.
  """
  if sharding.mesh_of(params) is None:
    return device_put_like(params, make(config, *settings, **sizes))
  return _init_on_mesh(params, settings, make, config, tuple(sizes.items()))


# The parameters' only use is to say where the arrays are wanted.
@functools.partial(jax.jit, static_argnames=("make", "config", "sizes"), keep_unused=True)
def _init_on_mesh(params, settings, make, config, sizes):
  return sharding.with_sharding_constraint(params, make(config, *settings, **dict(sizes)))


def request_ids(given: Sequence[int] | None, count: int) -> list[int]:
  """The given ids, or 0, 1, ...

  Raises:
    ValueError: the wrong number of ids, or one outside [0, 2**32).
  """
  if given is None:
    return list(range(count))
  if len(given) != count:
    raise ValueError(f"got {len(given)} request ids for {count} sequences")
  for i in given:
    if not 0 <= i < 2**32:
      raise ValueError(f"request ids must lie in [0, 2**32), got {i}")
  return list(given)
