"""Sharding: a mesh of devices, and one table that says how arrays are split over it.

A mesh has three axes. `data` splits sequences (or members of their rosters); `expert`
splits the experts of every layer; `tensor` splits attention heads and the hidden width of
every expert. `RULES` maps every logical axis of an array (`params.logical_axes`, and those
of caches and hidden states) to the mesh axes that split it.

Only the parameters say that a model runs on a mesh: `shard_params` them, or load them with
`parameter_shardings`. The mesh is part of their type, so a program finds it in its
arguments (`mesh_of`), and a program compiled for one mesh never runs on another. Blocks,
embedding and unembedding run in a `shard_map`, where each device treats its shards as the
model: the compiler never has to gather anything.
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

AnyMesh = Mesh | AbstractMesh

DATA, EXPERT, TENSOR = AXES = ("data", "expert", "tensor")

_BATCH = ((DATA, EXPERT), (DATA,), (EXPERT,), ())
# The mesh axes that split each logical axis: the first alternative whose size divides it
# and whose mesh axes no earlier rule took. `()` is replicated; an axis without that
# alternative must be divisible.
RULES: dict[str, tuple[tuple[str, ...], ...]] = {
  "experts": ((EXPERT,),),
  "expert_mlp": ((TENSOR,),),
  "expert_mlp_groups": ((TENSOR,),),
  "shared_mlp": ((TENSOR,),),
  "shared_mlp_groups": ((TENSOR,),),
  "heads": ((TENSOR,),),
  "kv_heads": ((TENSOR,),),
  # Vocabularies come in all sizes.
  "vocab": ((EXPERT, TENSOR), (TENSOR,), (EXPERT,), ()),
  # If a batch is too small for the mesh, the roster's members are split instead.
  "batch": _BATCH,
  "members": _BATCH,
  # Leave the axis `expert` to `vocab`.
  "batch_of_vocab": ((DATA,), ()),
  "members_of_vocab": ((DATA,), ()),
  **dict.fromkeys(
    (
      "layers embed embed_packed embed_groups embed_scales head_dim gate_up shared_gate "
      "plain_head_dim value_head_dim cached_head_dim latent query_latent "
      "head_dim_groups value_head_dim_groups query_latent_packed query_latent_groups "
      "routed_experts bit_widths router_state router_gates positions choices cache_positions "
      "one_head"
    ).split(),
    ((),),
  ),
}
_PRIORITY = {name: i for i, name in enumerate(RULES)}


def spec(mesh: AnyMesh, axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
  """Returns how an array with these logical axes is split.

  Raises:
    ValueError: a logical axis has no rule, a size is not divisible, or two axes would be
      split along the same mesh axis.
  """
  unknown = [name for name in axes if name not in RULES]
  if unknown:
    raise ValueError(
      f"the axis {unknown[0]!r} of an array with the axes {list(axes)} has no rule: "
      "add one to sharding.RULES"
    )
  taken: dict[str, str] = {}
  chosen: list[tuple[str, ...]] = [()] * len(axes)
  for i in sorted(range(len(axes)), key=lambda i: _PRIORITY[axes[i]]):
    chosen[i] = _alternative(mesh, axes[i], shape[i], taken)
    taken |= dict.fromkeys(chosen[i], axes[i])
  # Axes of size one split nothing.
  split = (tuple(a for a in names if mesh.shape[a] > 1) for names in chosen)
  return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in split))


def axes_of(spec: PartitionSpec | Sequence[Any], *positions: int) -> tuple[str, ...]:
  """Returns the mesh axes in a `PartitionSpec`, at these positions or at all."""
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
  """Returns the largest size of a mesh axis except `data`; its divisors also fit."""
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
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """Makes a mesh for a model.

  If any size is given, the others default to 1, and the first devices are used. Otherwise
  all devices are used, with `choose_sizes`, given the devices' memory if they report it
  (GPUs and TPUs do).

  Raises:
    ValueError: too few devices, or a size does not fit the model.
  """
  devices = jax.devices() if devices is None else list(devices)
  own = next(
    d for d in devices if d.process_index == jax.process_index()
  )  # others do not report memory
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
  """Returns the mesh that `make_mesh` would make on other devices.

  Args:
    config: the model's architecture.
    num_devices: number of devices.
    data, expert, tensor: see `make_mesh`.
    memory: bytes per device, if known.

  Raises:
    ValueError: see `make_mesh`.
  """
  if num_devices < 1:
    raise ValueError(f"the number of devices must be at least 1, got {num_devices}")
  return _abstract(_sizes(config, num_devices, (data, expert, tensor), memory))


def choose_sizes(
  config: ModelConfig, num_devices: int, memory: float | None = None
) -> tuple[int, int, int]:
  """Chooses the sizes of `data`, `expert` and `tensor` for all devices.

  The first of `possible_sizes` whose parameters leave 10 % of each device's memory free;
  the first of all if none does, or if the memory is unknown.
  """
  possible = possible_sizes(config, num_devices)
  if memory is not None:
    for sizes in possible:
      mesh = _abstract(sizes)
      specs = parameter_specs(mesh, config)
      if bytes_on_device(mesh, params_lib.abstract(config), specs) <= 0.9 * memory:
        return sizes
  return possible[0]


def possible_sizes(config: ModelConfig, num_devices: int) -> list[tuple[int, int, int]]:
  """Returns all sizes of `data`, `expert` and `tensor` that use all devices.

  In order of preference: the largest `expert`, then the largest `tensor`; `data` is the
  rest.
  """

  def divisors(number):
    return [d for d in range(number, 0, -1) if number % d == 0]

  return [
    (num_devices // (expert * tensor), expert, tensor)
    for expert in divisors(math.gcd(num_devices, largest(config, EXPERT)))
    for tensor in divisors(math.gcd(num_devices // expert, largest(config, TENSOR)))
  ]


def _sizes(config, num_devices, given, memory):
  """Validates the given sizes; without any, chooses them."""
  if given == (None,) * 3:
    return choose_sizes(config, num_devices, memory)
  sizes = tuple(1 if size is None else size for size in given)
  if min(sizes) < 1 or math.prod(sizes) > num_devices:
    raise ValueError(
      f"the sizes of the mesh data:{sizes[0]},expert:{sizes[1]},tensor:{sizes[2]} must be at least "
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


def bytes_on_device(mesh: AnyMesh, tree: Any, specs: Any) -> int:
  """Returns the bytes of one device's shards of arrays (or `ShapeDtypeStruct`s)."""

  def of(array, spec):
    shards = math.prod(mesh.shape[a] for a in axes_of(spec))
    return math.prod(array.shape) * array.dtype.itemsize // shards

  return sum(jax.tree.leaves(jax.tree.map(of, tree, specs)))


def parameter_specs(mesh: AnyMesh, config: ModelConfig) -> Params:
  """Returns a `Params` tree of `PartitionSpec`s."""
  return jax.tree.map(lambda leaf: spec(mesh, leaf.axes, leaf.shape), params_lib.describe(config))


def parameter_shardings(mesh: Mesh, config: ModelConfig) -> Params:
  """Returns a `Params` tree of shardings, to load a checkpoint with."""
  return _shardings(mesh, parameter_specs(mesh, config))


def shard_params(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
  """Puts the parameters on a mesh."""
  return jax.device_put(params, parameter_shardings(mesh, config))


def state_specs(mesh: AnyMesh, state: Any) -> Any:
  """Returns the `PartitionSpec`s of caches, or of a decode state.

  Caches are arrays `[..., B, K, S, C]`. Everything else is small and replicated.
  """

  def of(array):
    if array.ndim < 5:
      return PartitionSpec()
    heads = cached_heads(array.shape[-3])
    lead = ("layers",) * (array.ndim - 4)
    return spec(mesh, (*lead, "batch", heads, "cache_positions", "head_dim"), array.shape)

  return jax.tree.map(of, state)


def cached_heads(count: int) -> str:
  """Returns the logical axis of the heads of keys and values; a single head is not split."""
  return "one_head" if count == 1 else "kv_heads"


def state_shardings(mesh: AnyMesh, state: Any) -> Any:
  """Returns the shardings of `state_specs`."""
  return _shardings(mesh, state_specs(mesh, state))


def _shardings(mesh, specs):
  """Returns shardings without trailing None, as programs return them.

  So a program that is given its own output is not compiled again.
  """

  def trimmed(spec):
    names = list(spec)
    while names and names[-1] is None:
      names.pop()
    return NamedSharding(mesh, PartitionSpec(*names))

  return jax.tree.map(trimmed, specs)


def mesh_of(tree: Any) -> AbstractMesh | None:
  """Returns the mesh of arrays, also during tracing; None on one device or in a `shard_map`.

  Raises:
    ValueError: the mesh is not one of `make_mesh`.
  """
  mesh = jax.typeof(jax.tree.leaves(tree)[0]).sharding.mesh
  if mesh.empty or mesh.manual_axes:
    return None
  if mesh.axis_names != AXES or set(mesh.axis_types) != {AxisType.Auto}:
    raise ValueError(
      f"the parameters are on a mesh with the axes {list(mesh.axis_names)}, of types "
      f"{[t.name for t in mesh.axis_types]}; place them with sharding.shard_params on a mesh of "
      "sharding.make_mesh"
    )
  return mesh


def with_sharding_constraint(params: Params, state: Any) -> Any:
  """Constrains a state inside a program to `state_shardings`."""
  mesh = mesh_of(params)
  if mesh is None:
    return state
  return jax.lax.with_sharding_constraint(state, state_shardings(mesh, state))


def map_shards(function: Callable, mesh: AbstractMesh, in_specs: Any, out_specs: Any) -> Callable:
  """Wraps `function` in a `shard_map`.

  `check_vma` is off because `function` is written for whole arrays, without marking
  values that differ between devices.
  """
  return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def write(
  function: Callable, cache: Any, keys: jax.Array, values: jax.Array | None, positions_B: jax.Array
) -> Any:
  """Runs `function(cache, keys, values, positions_B)`, which writes all layers of a cache.

  Args:
    function: treats each sequence and each head independently.
    cache: `[L, B, K, S, C]`.
    keys, values: `[L, B, T, K, C]`; values may be None.
    positions_B: int32.
  """
  mesh = mesh_of(cache)
  if mesh is None:
    return function(cache, keys, values, positions_B)
  heads = cached_heads(keys.shape[-2])
  new = spec(mesh, ("layers", "batch", "positions", heads, "head_dim"), keys.shape)
  of_cache = state_specs(mesh, cache)
  return map_shards(function, mesh, (of_cache, new, new, PartitionSpec(new[1])), of_cache)(
    cache, keys, values, positions_B
  )


def copy_slot(
  into: jax.Array, source: jax.Array, axis: int, slot: jax.Array, source_slot: jax.Array
) -> jax.Array:
  """Copies one slot of an array to a slot of another, which it returns.

  Args:
    into, source: of equal shapes except for the number of slots.
    axis: the axis of the slots.
    slot: index in `into`; may be traced.
    source_slot: index in `source`; may be traced.
  """

  def copied(axes, source_axes, into, source):
    new = collectives.take_slice(source, source_slot, axis, source_axes)
    own = slot - collectives.axis_index(*axes) * into.shape[axis]
    put = jax.lax.dynamic_update_slice_in_dim(into, new, own, axis)
    return jnp.where((own >= 0) & (own < into.shape[axis]), put, into) if axes else put

  mesh = mesh_of(into)
  if mesh is None:
    return copied((), (), into, source)
  specs = [state_specs(mesh, a) for a in (into, source)]
  axes = [axes_of(s, axis) if len(s) else () for s in specs]
  return map_shards(functools.partial(copied, *axes), mesh, tuple(specs), specs[0])(into, source)
