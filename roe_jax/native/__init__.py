"""Kernels in C++ for CPUs, called through `jax.ffi`: experts, and products with few tokens.

They read weights once, in their storage format, and accumulate in float32. They are built at
their first use (see `native_build`) and compared with the pure JAX code that serves without them.
`ROE_JAX_NATIVE=0` turns them off.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import kernel_check
from roe_jax.native import native_build

TARGETS = ("roe_jax_experts", "roe_jax_project", "roe_jax_project_back")
GAP = 16  # of the scratch for activations: kGap in kernels.cc
# Rows are read four elements at a time, or a multiple of that.
MULTIPLE = 4
# By dtype of unquantized weights, or quantized format; in the order of `Kind` in kernels.cc.
UNQUANTIZED = ("float32", "bfloat16")
KINDS = {name: i for i, name in enumerate((*UNQUANTIZED, "int8", "int4", "mxfp4", "nested"))}
MOST_BITS = 4  # of a nested format that are read: kMostBits in kernels.cc


def is_available() -> bool:
  """Returns whether the kernels can be used here; builds them. Warns once if that fails."""
  return jax.default_backend() == "cpu" and os.environ.get("ROE_JAX_NATIVE") != "0" and _is_built()


@contextlib.contextmanager
def turned_off() -> Iterator[None]:
  """Turns the kernels off in programs that are traced within."""
  before = os.environ.get("ROE_JAX_NATIVE")
  os.environ["ROE_JAX_NATIVE"] = "0"
  try:
    yield
  finally:
    del os.environ["ROE_JAX_NATIVE"]
    if before is not None:
      os.environ["ROE_JAX_NATIVE"] = before


@functools.cache
def _is_built():
  def error():
    library = native_build.load()
    for name in TARGETS:
      jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return 0.0

  return kernel_check.passes(error, 0.0, "the library of native CPU kernels", "XLA's code")


def remembered(name: str, error: Callable[[], float]) -> float:
  """Returns the error of a check of this library on this machine, computed once.

  Args:
    name: of the check.
    error: computes it.
  """
  file = native_build.library_path().with_suffix(f".{name}")
  try:
    return float(file.read_text("utf-8"))
  except (OSError, ValueError):
    found = error()
  partial = file.with_name(f"{file.name}.{os.getpid()}")
  try:
    partial.write_text(str(found), "utf-8")
    os.replace(partial, file)
  except OSError:  # a full or read-only disk
    pass
  return found


def apply_experts(
  kind: str,
  num_experts: int,
  limit: float | None,
  alpha: float,
  layer: jax.Array | int,
  x: jax.Array,
  indices: jax.Array,
  gates: jax.Array,
  gate_up: tuple[jax.Array, jax.Array | None],
  down: tuple[jax.Array, jax.Array | None],
  biases: tuple[jax.Array | None, jax.Array | None],
  planes: tuple[int, int, int] = (0, 0, 0),
  bits: jax.Array | None = None,
) -> jax.Array:
  """Returns the gate-weighted sum of the active experts' outputs, `[N, D]` float32.

  Args:
    kind: one of `KINDS`.
    num_experts: E.
    limit, alpha: see `experts.Activation`.
    layer: int32 scalar; may be traced.
    x: `[N, D]`; hidden values are rounded to its dtype.
    indices: `[N, A]` int32. Pairs with gate zero may have any.
    gates: `[N, A]` float32.
    gate_up, down: codes `[L·E, F, 2, D]` and `[L·E, F, D]`, fewer of few bits, and scales or
      None; see `quantization.Quantized`.
    biases: `[L·E, F, 2]` and `[L·E, D]`, or None.
    planes: of a nested format: those of the base, those that are read (at most `MOST_BITS`), and
      all.
    bits: int32 `[E]`, planes that each of the layer's experts has; None: all.
  """
  (n, d), f = x.shape, gate_up[0].shape[1]
  shapes = ((n, d), (indices.size, f), (n, d + GAP))
  results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  y, _, _ = jax.ffi.ffi_call("roe_jax_experts", results)(
    jnp.asarray(layer, jnp.int32),
    x.astype(jnp.float32),
    indices.astype(jnp.int32),
    gates.astype(jnp.float32),
    *map(_bits, (*gate_up, *down, *biases)),
    jnp.zeros(0, jnp.int32) if bits is None else bits,
    kind=KINDS[kind],
    base=planes[0],
    bits=planes[1],
    stored=planes[2],
    num_experts=num_experts,
    limit=np.float32(0 if limit is None else limit),
    alpha=np.float32(alpha),
    clamped=limit is not None,
    round=x.dtype == jnp.bfloat16,
  )
  return y


def project(
  kind: str, x: jax.Array, codes: jax.Array, scales: jax.Array | None, index: jax.Array | int
) -> jax.Array:
  """Computes `x @ weights[index].T`, `[N, R]` float32, for x `[N, D]`.

  Args:
    kind: one of `KINDS`, not nested.
    x: the tokens.
    codes: of weights `[L, R, D]`: these, or those of their quantized form.
    scales: None, or `[L, R, D/group]`; see `quantization.Quantized`.
    index: int32 scalar; may be traced.
  """
  (n, d), rows = x.shape, codes.shape[1]
  results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, rows), (n, d + GAP))]
  return _product("roe_jax_project", results, kind, x, codes, scales, index)[0]


def project_back(
  kind: str, x: jax.Array, codes: jax.Array, scales: jax.Array | None, index: jax.Array | int
) -> jax.Array:
  """Computes `x @ weights[index]`, `[N, D]` float32, for x `[N, R]`; see `project`.

  Scales are `[L, R/group, D]`, or None.
  """
  width = codes.shape[2] if scales is None else scales.shape[2]
  results = [jax.ShapeDtypeStruct((x.shape[0], width), jnp.float32)]
  return _product("roe_jax_project_back", results, kind, x, codes, scales, index)[0]


def _product(target, results, kind, x, codes, scales, index):
  arrays = (x.astype(jnp.float32), _bits(codes), _bits(scales))
  return jax.ffi.ffi_call(target, results)(jnp.asarray(index, jnp.int32), *arrays, kind=KINDS[kind])


def _bits(array: Any) -> jax.Array:
  """Returns bfloat16 as bits, and an empty array for None."""
  if array is None:
    return jnp.zeros(0)
  return jax.lax.bitcast_convert_type(array, jnp.uint16) if array.dtype == jnp.bfloat16 else array
