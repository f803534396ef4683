"""Models over a mesh of devices: one description of the mesh, one table of what lies where.

A mesh has three axes. Along `data` different texts (or members of their
rosters) are run; along `expert` each device holds some experts of every layer;
along `tensor` it holds some attention heads and a part of every expert's inner
width. `RULES` says for every logical axis of an array (`params.logical_axes`,
and those of caches and hidden states) along which mesh axes it is split.

What runs on a mesh is known by its parameters alone: `shard_params` them, or load them
with `parameter_shardings`. Their mesh is a part of their type, so a program
finds it in what it is given (`mesh_of`), and one that is compiled for a mesh
never runs for another. Blocks, embedding and unembedding then run in a
`shard_map`, where each device sees its own parts as if they were the model:
nothing is left for the compiler to gather.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from roe_jax import collectives
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.params import Params

DATA, EXPERT, TENSOR = AXES = ("data", "expert", "tensor")

_WHOLE = ((),)
_ROWS = ((DATA, EXPERT), (DATA,), (EXPERT,), ())
# For each logical axis the mesh axes that split it: the first alternative whose
# size divides it and whose mesh axes no earlier rule took. `()` is whole on every
# device; an axis without that alternative must be divisible.
RULES: dict[str, tuple[tuple[str, ...], ...]] = {
  "experts": ((EXPERT,),),
  "expert_mlp": ((TENSOR,),),
  "expert_mlp_groups": ((TENSOR,),),
  "shared_mlp": ((TENSOR,),),
  "heads": ((TENSOR,),),
  "kv_heads": ((TENSOR,),),
  # Vocabularies come in all sizes.
  "vocab": ((EXPERT, TENSOR), (TENSOR,), (EXPERT,), ()),
  # A batch that is too small for the mesh leaves it to the roster's members.
  "batch": _ROWS,
  "members": _ROWS,
  # Where `vocab` needs the axis `expert`.
  "batch_of_vocab": ((DATA,), ()),
  "members_of_vocab": ((DATA,), ()),
  **dict.fromkeys(
    (
      "layers",
      "embed",
      "embed_packed",
      "embed_groups",
      "head_dim",
      "gate_up",
      "shared_gate",
      "routed_experts",
      "positions",
      "choices",
      "slots",
      "one_head",
    ),
    _WHOLE,
  ),
}
_PRIORITY = {name: i for i, name in enumerate(RULES)}


def spec(mesh: Mesh | AbstractMesh, axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
  """Which mesh axes split an array with these logical axes.

  Raises:
    ValueError: a logical axis has no rule, a size is not divisible, or two
      axes are split along the same mesh axis.
  """
  unknown = [name for name in axes if name not in RULES]
  if unknown:
    raise ValueError(
      f"the axis {unknown[0]!r} of an array with the axes {list(axes)} has no rule: "
      "say in sharding.RULES how it is split, or that it is whole on every device"
    )
  taken, chosen = {}, [()] * len(axes)
  for i in sorted(range(len(axes)), key=lambda i: _PRIORITY[axes[i]]):
    chosen[i] = _alternative(mesh, axes[i], shape[i], taken)
    taken |= dict.fromkeys(chosen[i], axes[i])
  # Axes of size one split nothing.
  split = (tuple(a for a in names if mesh.shape[a] > 1) for names in chosen)
  return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in split))


def axes_of(spec: PartitionSpec | Sequence[Any], *positions: int) -> tuple[str, ...]:
  """The mesh axes that a `PartitionSpec` names, at these positions or at all."""
  names = [spec[p] for p in positions] if positions else spec
  return tuple(a for n in names if n is not None for a in ((n,) if isinstance(n, str) else n))


def _alternative(mesh, name, size, taken):
  for names in RULES[name]:
    if size % math.prod(mesh.shape[a] for a in names) == 0 and not any(a in taken for a in names):
      return names
  (axis,) = RULES[name][0]
  if axis in taken:
    raise ValueError(
      f"the axes {taken[axis]!r} and {name!r} of one array would both be split "
      f"along the mesh axis {axis!r}: an array can be split once along each"
    )
  raise ValueError(
    f"the axis {name!r} has size {size}, which the mesh axis {axis} of size {mesh.shape[axis]} "
    f"does not divide; {_sizes_that_fit(axis, size)}"
  )


def _sizes_that_fit(axis, size):
  sizes = [str(s) for s in range(1, size + 1) if size % s == 0]
  return f"{axis} may be {', '.join(sizes)}"


def largest(config: ModelConfig, axis: str) -> int:
  """The largest size of a mesh axis for a model; its divisors fit, too. Not for `data`."""
  return math.gcd(
    *(
      size
      for leaf in jax.tree.leaves(params_lib.describe(config))
      for name, size in zip(leaf.axes, leaf.shape)
      if RULES[name] == ((axis,),)
    )
  )


def make_mesh(
  config: ModelConfig,
  *,
  data: int | None = None,
  expert: int | None = None,
  tensor: int | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh for a model.

  If any size is given, those that are not are 1, and the first devices are
  used. If none is, all devices are, and `choose_sizes` says how, with the
  memory of the devices where they tell it (GPUs and TPUs do).

  Raises:
    ValueError: there are too few devices, or a size does not fit the model.
  """
  devices = jax.devices() if devices is None else list(devices)
  own = next(d for d in devices if d.process_index == jax.process_index())  # others do not tell
  memory = (own.memory_stats() or {}).get("bytes_limit")
  sizes = _sizes(config, len(devices), (data, expert, tensor), memory)
  return jax.make_mesh(
    sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[: math.prod(sizes)]
  )


def abstract_mesh(
  config: ModelConfig,
  num_devices: int,
  *,
  data: int | None = None,
  expert: int | None = None,
  tensor: int | None = None,
  memory: float | None = None,
) -> AbstractMesh:
  """The mesh that `make_mesh` would make of devices that are not here.

  Args:
    config: the model's architecture.
    num_devices: how many there are.
    data, expert, tensor: see `make_mesh`.
    memory: bytes of each device, if they are known.

  Raises:
    ValueError: see `make_mesh`.
  """
  if num_devices < 1:
    raise ValueError(f"the number of devices must be at least 1, got {num_devices}")
  return _abstract(_sizes(config, num_devices, (data, expert, tensor), memory))


def choose_sizes(
  config: ModelConfig, num_devices: int, memory: float | None = None
) -> tuple[int, int, int]:
  """Sizes of `data`, `expert` and `tensor` for all devices.

  The first of `possible_sizes` with which the parameters leave a tenth of each
  device's memory free. If there is none, or the memory is not known, the first.
  """
  possible = possible_sizes(config, num_devices)
  if memory is not None:
    for sizes in possible:
      mesh = _abstract(sizes)
      held = bytes_on_device(mesh, params_lib.abstract(config), parameter_specs(mesh, config))
      if held <= 0.9 * memory:
        return sizes
  return possible[0]


def possible_sizes(config: ModelConfig, num_devices: int) -> list[tuple[int, int, int]]:
  """All sizes of `data`, `expert` and `tensor` with which a model takes all devices.

  In order of preference: `expert` is as large as can be, then `tensor`; `data`
  is the rest.
  """

  def divisors(number):
    return [d for d in range(number, 0, -1) if number % d == 0]

  return [
    (num_devices // (expert * tensor), expert, tensor)
    for expert in divisors(math.gcd(num_devices, largest(config, EXPERT)))
    for tensor in divisors(math.gcd(num_devices // expert, largest(config, TENSOR)))
  ]


def _sizes(config, num_devices, given, memory):
  """The sizes given, checked, or chosen ones."""
  if given == (None,) * 3:
    return choose_sizes(config, num_devices, memory)
  sizes = tuple(1 if size is None else size for size in given)
  if min(sizes) < 1 or math.prod(sizes) > num_devices:
    raise ValueError(
      f"a mesh of data:{sizes[0]},expert:{sizes[1]},tensor:{sizes[2]} needs sizes of at least "
      f"1 with a product of at most {num_devices}, the number of devices"
    )
  for axis, size in zip((EXPERT, TENSOR), sizes[1:]):
    most = largest(config, axis)
    if most % size:
      raise ValueError(
        f"the mesh axis {axis} of size {size} does not fit this {config.family} "
        f"model: {_sizes_that_fit(axis, most)}"
      )
  return sizes


def _abstract(sizes):
  return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


def bytes_on_device(mesh: Mesh | AbstractMesh, tree: Any, specs: Any) -> int:
  """Bytes of one device's parts of arrays (or their shapes and dtypes)."""

  def of(array, spec):
    parts = math.prod(mesh.shape[a] for a in axes_of(spec))
    return math.prod(array.shape) * array.dtype.itemsize // parts

  return sum(jax.tree.leaves(jax.tree.map(of, tree, specs)))


def parameter_specs(mesh: Mesh | AbstractMesh, config: ModelConfig) -> Params:
  """A `Params` tree of `PartitionSpec`s."""
  return jax.tree.map(lambda leaf: spec(mesh, leaf.axes, leaf.shape), params_lib.describe(config))


def parameter_shardings(mesh: Mesh, config: ModelConfig) -> Params:
  """A `Params` tree of shardings, for `checkpoint.load`."""
  return _shardings(mesh, parameter_specs(mesh, config))


def shard_params(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
  """The parameters on a mesh."""
  return jax.device_put(params, parameter_shardings(mesh, config))


def state_specs(mesh: Mesh | AbstractMesh, state: Any) -> Any:
  """`PartitionSpec`s of caches, and of a decode state with what stands beside its cache.

  Caches are arrays `[..., B, K, S, C]`. All else is small, and whole on every
  device.
  """

  def of(array):
    if array.ndim < 5:
      return PartitionSpec()
    heads = "one_head" if array.shape[-3] == 1 else "kv_heads"
    lead = ("layers",) * (array.ndim - 4)
    return spec(mesh, (*lead, "batch", heads, "slots", "head_dim"), array.shape)

  return jax.tree.map(of, state)


def state_shardings(mesh: Mesh, state: Any) -> Any:
  """The shardings of `state_specs`."""
  return _shardings(mesh, state_specs(mesh, state))


def _shardings(mesh, specs):
  """As programs return them, without axes that are whole at the end: one that is
  given what it returned is not compiled again."""

  def trimmed(spec):
    names = list(spec)
    while names and names[-1] is None:
      names.pop()
    return NamedSharding(mesh, PartitionSpec(*names))

  return jax.tree.map(trimmed, specs)


def mesh_of(tree: Any) -> AbstractMesh | None:
  """The mesh that arrays lie on, also while a program is traced.

  None for arrays on one device, and inside of a `shard_map`.

  Raises:
    ValueError: it is not a mesh of `make_mesh`.
  """
  mesh = jax.typeof(jax.tree.leaves(tree)[0]).sharding.mesh
  if mesh.empty or mesh.manual_axes:
    return None
  if mesh.axis_names != AXES or set(mesh.axis_types) != {AxisType.Auto}:
    raise ValueError(
      f"the parameters lie on a mesh with the axes {list(mesh.axis_names)}, of types "
      f"{[t.name for t in mesh.axis_types]}; place them with sharding.shard_params on one of "
      "sharding.make_mesh"
    )
  return mesh


def with_sharding_constraint(params: Params, state: Any) -> Any:
  """A state inside of a program, kept where `state_shardings` puts it."""
  mesh = mesh_of(params)
  return (
    state if mesh is None else jax.lax.with_sharding_constraint(state, state_shardings(mesh, state))
  )


def map_shards(function: Callable, mesh: AbstractMesh, in_specs: Any, out_specs: Any) -> Callable:
  """`function` run by each device on its parts.

  It is written for whole arrays, and does not say which of its values differ
  between devices: hence no check of that.
  """
  return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def write(
  function: Callable, cache: Any, keys: jax.Array, values: jax.Array, positions_B: jax.Array
) -> Any:
  """`function(cache, keys, values, positions_B)`, which writes to all layers of a cache.

  Args:
    function: works on each text and each head by itself.
    cache: `[L, B, K, S, C]`.
    keys, values: `[L, B, T, K, C]`.
    positions_B: int32.
  """
  mesh = mesh_of(cache)
  if mesh is None:
    return function(cache, keys, values, positions_B)
  new = spec(mesh, ("layers", "batch", "positions", "kv_heads", "head_dim"), keys.shape)
  of_cache = state_specs(mesh, cache)
  return map_shards(function, mesh, (of_cache, new, new, PartitionSpec(new[1])), of_cache)(
    cache, keys, values, positions_B
  )


def put_row(
  into: jax.Array, source: jax.Array, axis: int, slot: jax.Array, source_slot: jax.Array
) -> jax.Array:
  """A text's row of an array of a state, put into that array of another state.

  Args:
    into, source: of equal shapes, but for their texts.
    axis: that of the texts.
    slot: of the text in `into`; may be traced.
    source_slot: of the text in `source`; may be traced.
  """

  def copied(axes, source_axes, into, source):
    row = collectives.take_slice(source, source_slot, axis, source_axes)
    own = slot - collectives.axis_index(*axes) * into.shape[axis]
    put = jax.lax.dynamic_update_slice_in_dim(into, row, own, axis)
    return jnp.where((own >= 0) & (own < into.shape[axis]), put, into) if axes else put

  mesh = mesh_of(into)
  if mesh is None:
    return copied((), (), into, source)
  specs = [state_specs(mesh, a) for a in (into, source)]
  axes = [axes_of(s, axis) if len(s) else () for s in specs]
  return map_shards(functools.partial(copied, *axes), mesh, tuple(specs), specs[0])(into, source)
