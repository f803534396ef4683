"""Reads pieces of a model from a Hugging Face folder: whole, or only what devices hold of them.

A *window* is a box in a parameter of a piece, with a span (start, stop) for each axis. All reads
are of windows; `tensor_names` says which parts of which hub tensors they are.
"""

from collections.abc import Mapping, Sequence
import math

import jax
import numpy as np

from checkpoints_convert import hub, tensor_names
from checkpoints_convert.common import Spans
from checkpoints_convert.expert_formats import recode, stored_format
from roe_jax.checkpoint import Piece, piece_shapes
from roe_jax.quantization import EXPERT_MATRICES, group_size

_WIDTH = 2  # the axis of F in the experts' matrices [L, E, F, ...], their codes and scales


def read(source: hub.Source, piece: Piece) -> dict[str, np.ndarray]:
  """Reads a piece's arrays to the host, in the order of the files."""
  windows = {name: [_whole(s.shape)] for name, s in piece_shapes(source.stored, piece).items()}
  arrays = {name: parts[0] for name, parts in _fill(source, piece, windows).items()}
  return recode(arrays, source.stored, source.config)


def read_sharded(
  source: hub.Source, piece: Piece, placed: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
  """Reads a piece's arrays onto devices; each process reads only what its devices hold.

  At any time, the host holds this process's part of one parameter (before and after decoding or
  quantizing) and what is read of one hub tensor. Of a projection that is quantized it holds all.

  Args:
    source: the source to read.
    piece: the piece to read.
    placed: the arrays, named as in `piece_shapes`, with their shardings.
  """
  together: dict[str, list[str]] = {}  # codes and scales come from the same weights
  for name in placed:
    together.setdefault(_stem(name), []).append(name)
  arrays = {}
  for stem, names in together.items():
    arrays |= _read_parameter_sharded(source, piece, stem, {name: placed[name] for name in names})
  return arrays


def _stem(name):
  """Returns the name of a matrix without the suffix of its codes or scales."""
  return name.removesuffix(".codes").removesuffix(".scales")


def _whole(shape):
  return tuple((0, size) for size in shape)


def _read_parameter_sharded(source, piece, stem, placed):
  """Reads one parameter as `read_sharded`."""
  stored = {n: s for n, s in piece_shapes(source.stored, piece).items() if _stem(n) == stem}
  shapes = {n: s.shape for n, s in placed.items()}
  spans = {
    name: {
      device: tuple(s.indices(size)[:2] for s, size in zip(index, x.shape))
      for device, index in x.sharding.addressable_devices_indices_map(x.shape).items()
    }
    for name, x in placed.items()
  }
  if stem in EXPERT_MATRICES:
    sizes = (piece.num_layers, source.config.num_experts, source.config.d_expert)
    factors = {
      sizes[_WIDTH] // shape[_WIDTH]
      for shape in (*shapes.values(), *(s.shape for s in stored.values()))
    }
    box_of = lambda device: _box(
      source, stem, sizes, {n: (shapes[n], spans[n][device]) for n in placed}, factors
    )
  else:
    sizes = stored[stem].shape
    box_of = spans[stem].get if stem in spans else lambda device: _whole(sizes)
  boxes = {device: box_of(device) for device in next(iter(spans.values()))}
  distinct = list(dict.fromkeys(boxes.values()))
  filled = _fill(
    source,
    piece,
    {name: [_scaled(box, sizes, s.shape) for box in distinct] for name, s in stored.items()},
  )
  recoded = {
    box: recode({name: parts[i] for name, parts in filled.items()}, source.stored, source.config)
    for i, box in enumerate(distinct)
  }
  del filled
  result = {}
  for name, want in placed.items():
    parts = []
    for device, box in boxes.items():
      origin = _scaled(box, sizes, want.shape)
      own = tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(spans[name][device], origin))
      parts.append(jax.device_put(recoded[box][name][own], device))
    result[name] = jax.make_array_from_single_device_arrays(want.shape, want.sharding, parts)
  # Waiting keeps the next parameter from being read while this one is on the host.
  return jax.block_until_ready(result)


def _box(source, stem, sizes, parts, factors):
  """Returns the spans of layers, experts and F that contain a device's parts of a matrix.

  Args:
    source: the source to read.
    stem: the name of the matrix.
    sizes: the sizes of these axes.
    parts: {name: (shape, the device's spans)} of the matrix, or of its codes and scales.
    factors: how many rows of F a row of each form of the matrix represents.
  """
  box = []
  for axis, size in enumerate(sizes):
    starts, stops = zip(
      *(
        (span[axis][0] * size // shape[axis], span[axis][1] * size // shape[axis])
        for shape, span in parts.values()
      )
    )
    box.append((min(starts), max(stops)))
  start, stop = box[_WIDTH]
  step, size = math.lcm(*factors), sizes[_WIDTH]
  start, stop = start // step * step, min(size, -(-stop // step) * step)
  format = source.config.expert_format
  if (
    format
    and EXPERT_MATRICES[stem] == -2
    and (group_size(format, stop - start) != group_size(format, size))
  ):
    start, stop = 0, size  # otherwise this part would be quantized in different groups
  box[_WIDTH] = start, stop
  return tuple(box)


def _scaled(box, sizes, shape):
  """Scales the box to an array whose first axes may be shorter, and adds its other axes whole."""
  scaled = [(a * n // size, b * n // size) for (a, b), size, n in zip(box, sizes, shape)]
  return (*scaled, *_whole(shape[len(box) :]))


def _fill(
  source: hub.Source, piece: Piece, windows: Mapping[str, Sequence[Spans]]
) -> dict[str, list[np.ndarray]]:
  """Reads windows of parameters in the form of the files; shared parts are read once."""
  shapes = piece_shapes(source.stored, piece)
  arrays = {}
  for name, of_name in windows.items():
    dtype = shapes[name].dtype
    if stored_format(source.config, name):
      dtype = hub.own_dtype(source.stored_dtypes)  # quantized from the values in the files
    arrays[name] = [np.empty([b - a for a, b in spans], dtype) for spans in of_name]
  parts = [
    (source.tensors[part.tensor], part)
    for part in tensor_names.parts(source.stored, piece, source.layout)
    if part.parameter in windows
  ]
  for info, part in sorted(parts, key=lambda p: (p[0].file, p[0].offset)):
    regions = [part.region(spans) for spans in windows[part.parameter]]
    reads: dict[Spans, list[tuple[int, Spans]]] = {}
    for i, region in enumerate(regions):
      if region is not None:
        spans = info.widened(part.split, region)
        reads.setdefault(spans, []).append((i, region))
    for spans, users in reads.items():
      tensor = info.read(part.split, spans)
      for i, region in users:
        own = tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(region, spans))
        part.fill(arrays[part.parameter][i], tensor[own], windows[part.parameter][i])
      del tensor
  return arrays
