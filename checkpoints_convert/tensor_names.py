"""Maps hub tensors to parts of parameters, by the rules of their family (`tensor_rules`)."""

from collections.abc import Iterator
import dataclasses
import itertools
import math
import re
from typing import Any

import numpy as np

from checkpoints_convert import mxfp4
from checkpoints_convert.common import ConversionError, Spans
from checkpoints_convert.tensor_rules import FAMILIES, SEPARATE, Rule
from roe_jax.checkpoint import Piece, piece_shapes
from roe_jax.config import ModelConfig
from roe_jax.quantization import pack, unpack

_OF_ALL_LAYERS = ("attention", "moe_norm")  # parameters that dense layers have, too
_TILE = 256  # tile size of the first two axes when transposing


class Part:
  """A hub tensor and the part of a piece's parameter that it fills.

  Attributes:
    tensor: the full name in the hub file.
    shape: the shape in the hub file.
    split: the shape with merged axes split.
    size: the number of its elements that the parameter has.
    parameter: the parameter's name in the piece.
    is_bytes: whether the tensor is uint8, as opposed to floating-point.
  """

  def __init__(
    self, rule: Rule, sizes: dict[str, int], row: int | None, layer: int | None, expert: int | None
  ):
    source, target = rule.pattern.split(" -> ")
    groups = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w+", source)]
    axes = [axis for group in groups for axis in group]
    self.tensor = rule.tensor.format(layer=layer, expert=expert, shared=sizes["E"])
    self.parameter = rule.parameter
    self._sizes = tuple(sizes[a] for a in axes)
    self.size = math.prod(self._sizes)
    self._rows_of = rule.rows_of
    self._before, after = (sum(sizes[a] for a in letters) for letters in rule.rows)
    split = list(self._sizes)
    split[self._rows_of] += self._before + after
    self.split = tuple(split)
    self.shape = tuple(
      math.prod(split[start : start + len(group)])
      for start, group in zip(itertools.accumulate(map(len, groups), initial=0), groups)
    )
    self.is_bytes = rule.stored != "numbers"
    self._in_blocks = rule.stored == "blocks"
    if self._in_blocks:
      self.shape = (*self.shape[:-1], self.shape[-1] // 32, 16)
      self.split = (*self.split[:-1], *self.shape[-2:])
      self.size = math.prod(self.shape)
    order = [axes.index(token) for token in target.split() if token in axes]
    self._inverse = tuple(order.index(i) for i in range(len(axes)))
    self._index: tuple[Any, ...] = () if row is None else (row,)
    self._index += tuple(
      expert if token == "expert" else slice(None) if token in axes else int(token)
      for token in target.split()
    )

  def region(self, window: Spans) -> Spans | None:
    """Returns the part of the hub tensor, with axes `split`, that a part of the parameter holds.

    Args:
      window: the part of the parameter. Of 4-bit codes it must contain whole blocks and the
        whole last axis, because neighbors in the hub's blocks are far apart in it.

    Returns:
      The part of the hub tensor, or None if `window` holds nothing of it.
    """
    if any(
      not isinstance(i, slice) and not start <= i < stop
      for i, (start, stop) in zip(self._index, window)
    ):
      return None
    own: list[Any] = [span for i, span in zip(self._index, window) if isinstance(i, slice)]
    if self._in_blocks:
      own[-1] = tuple(2 * end for end in own[-1])
    spans = [own[i] for i in self._inverse]
    spans[self._rows_of] = tuple(end + self._before for end in spans[self._rows_of])
    if self._in_blocks:
      start, stop = spans[-1]
      spans[-1:] = [(start // 32, stop // 32), (0, 16)]
    return tuple(spans)

  def fill(self, parameter: np.ndarray, tensor: np.ndarray, window: Spans | None = None) -> None:
    """Writes the hub tensor into its part of the parameter, casting to the parameter's dtype.

    Args:
      parameter: the parameter, or its `window`.
      tensor: the hub tensor, or its `region` of the window.
      window: the part of the parameter that is given; all of it by default.
    """
    index, sizes = self._index, self._sizes
    if window is not None:
      index = tuple(
        i if isinstance(i, slice) else i - start for i, (start, _) in zip(index, window)
      )
      sizes = tensor.shape
      if self._in_blocks:
        sizes = (*sizes[:-2], 32 * sizes[-2])
    if not self._in_blocks:
      if tensor.shape == self.shape:
        tensor = tensor.reshape(self.split)[self._own_rows]
      self._copy(tensor.reshape(sizes), parameter[index].transpose(self._inverse))
      return
    # One expert at a time, because unpacked codes take twice the memory.
    for blocks, codes in zip(tensor, parameter[index]):
      loose = np.empty((*codes.shape[:-1], 2 * codes.shape[-1]), np.uint8)
      _copy_by_tiles(mxfp4.from_blocks(blocks).reshape(sizes[1:]), self._of_expert(loose))
      codes[...] = pack(loose)

  @property
  def _own_rows(self) -> tuple[slice, ...]:
    own = slice(self._before, self._before + self._sizes[self._rows_of])
    return (*self._rows_of * [slice(None)], own)

  def take(self, parameter: np.ndarray, tensor: np.ndarray | None = None) -> np.ndarray:
    """Extracts the hub tensor from the parameter; the inverse of `fill`.

    Args:
      parameter: the parameter.
      tensor: the hub tensor with the rows of other parameters; by default these are zeros.
    """
    part = parameter[self._index]
    if tensor is None:
      new = np.empty if self.size == math.prod(self.shape) or self._in_blocks else np.zeros
      tensor = new(self.shape, parameter.dtype)
    if not self._in_blocks:
      self._copy(part.transpose(self._inverse), tensor.reshape(self.split)[self._own_rows])
      return tensor
    for blocks, codes in zip(tensor, part):
      loose = np.empty(self._sizes[1:], np.uint8)
      _copy_by_tiles(self._of_expert(unpack(codes)), loose)
      blocks[...] = mxfp4.to_blocks(loose.reshape(len(blocks), -1))
    return tensor

  def _of_expert(self, loose: np.ndarray) -> np.ndarray:
    """Transposes one expert's codes to the hub tensor's order; experts lead in both orders."""
    return loose.transpose([i - 1 for i in self._inverse[1:]])

  def _copy(self, source: np.ndarray, target: np.ndarray) -> None:
    if self._inverse == tuple(range(len(self._inverse))):
      target[...] = source
    elif self._inverse[0] == 0:
      for one, other in zip(source, target):
        _copy_by_tiles(one, other)
    else:
      _copy_by_tiles(source, target)


def _copy_by_tiles(source: np.ndarray, target: np.ndarray) -> None:
  # Transposing a large matrix at once misses the cache at every element: ten times slower.
  for i in range(0, source.shape[0], _TILE):
    for j in range(0, source.shape[1], _TILE):
      target[i : i + _TILE, j : j + _TILE] = source[i : i + _TILE, j : j + _TILE]


def layouts(family: str) -> tuple[str, ...]:
  """Returns the layouts in which files of a family may have experts, first that of the hub."""
  return tuple(dict.fromkeys(rule.layout for rule in FAMILIES[family] if rule.layout)) or (
    SEPARATE,
  )


def parts(config: ModelConfig, piece: Piece, layout: str = SEPARATE) -> Iterator[Part]:
  """Yields all hub tensors of a piece, for files in the expert format of the config."""
  sizes = {
    "V": config.vocab_size,
    "D": config.d_model,
    "H": config.num_heads,
    "K": config.num_kv_heads,
    "C": config.head_dim,
    "E": config.num_experts,
    "F": config.d_expert,
    "G": config.d_shared_expert,
    "P": config.d_dense,
    "S": config.d_shared_expert // config.d_expert,
    "U": 2,
    "I": 1,
    "Z": config.kv_lora_rank,
    "Q": config.q_lora_rank,
    "W": config.cached_head_dim,
    "A": config.head_dim - (config.rotary_dim or 0),
    "X": config.v_head_dim,
    "M": config.d_model // 32,
    "N": config.d_expert // 32,
  }
  rules = [
    rule
    for rule in FAMILIES[config.family]
    if (not rule.when or getattr(config, rule.when))
    and (not rule.unless or not getattr(config, rule.unless))
    and rule.layout in (None, layout)
  ]
  first = config.first_dense_layers
  in_layers = [rule for rule in rules if "{layer}" in rule.tensor]
  if piece.num_layers:
    own = [rule for rule in in_layers if not rule.dense]
    layers = [(own, i, first + piece.start + i) for i in range(piece.num_layers)]
  else:
    own = [
      dataclasses.replace(rule, parameter=f"dense_layers.{rule.parameter}")
      for rule in in_layers
      if rule.dense or rule.parameter.startswith(_OF_ALL_LAYERS)
    ]
    outside = [rule for rule in rules if rule not in in_layers]
    layers = [(outside, None, None), *((own, i, i) for i in range(first))]
  for own, row, layer in layers:
    for rule in own:
      experts = range(config.num_experts) if "{expert}" in rule.tensor else (None,)
      for expert in experts:
        yield Part(rule, sizes, row, layer, expert)


def float32_tensors(config: ModelConfig) -> set[str]:
  """Returns the names of tensors whose parameters are float32, whatever the model's dtype."""
  rules = [r for r in FAMILIES[config.family] if r.parameter == "correction_bias"]
  return {r.tensor.format(layer=i) for r in rules for i in range(config.num_layers)}


def check_table(config: ModelConfig) -> None:
  """Checks that the family's table fills every parameter of the model exactly once.

  Raises:
    ConversionError: the table does not match the model's parameters.
  """
  if config.family not in FAMILIES:
    raise ConversionError(
      f"there is no table of tensor names for the family {config.family!r}; there are tables for "
      f"{', '.join(FAMILIES)}"
    )
  pieces = (Piece("top"), Piece("one layer", 0, 1))
  for piece, layout in itertools.product(pieces, layouts(config.family)):
    shapes = piece_shapes(config, piece)
    filled = dict.fromkeys(shapes, 0)
    for part in parts(config, piece, layout):
      if part.parameter not in filled:
        raise ConversionError(
          f"the table of {config.family} fills {part.parameter}, which a "
          f"{config.family} model does not have"
        )
      filled[part.parameter] += part.size
    wrong = [name for name, size in filled.items() if size != math.prod(shapes[name].shape)]
    if wrong:
      raise ConversionError(
        f"the table of {config.family} does not fill exactly: {', '.join(wrong)}"
      )
