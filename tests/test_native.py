"""The kernels in C++: shapes against float64, how they are built, and what serves without them."""

import concurrent.futures
import os
import pathlib

from absl import logging
import expert_loop
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roe_jax import experts as experts_lib
from roe_jax import native, numerics, quantization
from roe_jax.experts import native_kernel
from roe_jax.native import native_build
from roe_jax.quantization import dequantize_on_host

L, E, A = 2, 6, 3


@pytest.fixture
def kernels():
  if not native.is_available():
    pytest.skip("no C++ compiler")


# Vectors of every width, with rows that no block divides; one, few and many tokens, and more
# tokens and columns than a tile has.
SIZES = [(4, 1), (36, 7), (64, 67), (288, 130), (1120, 35)]
OF_BLOCKS = [(32, 32), (288, 64), (1120, 96)]


@pytest.mark.parametrize(
  "kind, width, rows",
  [(k, *size) for k in ("float32", "bfloat16", "int8") for size in SIZES]
  + [("int4", *size) for size in SIZES if size[0] % 8 == 0]
  + [("mxfp4", *size) for size in OF_BLOCKS],
)
def test_products_are_those_of_float64(kernels, kind, width, rows):
  random = np.random.RandomState(0)
  values = random.standard_normal((L, rows, width)).astype(np.float32)

  def stored(axis):
    if kind in native.UNQUANTIZED:
      array = jnp.asarray(values, kind)
      like = jnp.zeros(0, numerics.storage_dtype(kind))
      return numerics.to_storage_dtype(array, like), None, np.asarray(array, np.float64)
    matrix = quantization.quantize(values, kind, axis)
    exact = quantization.dequantize_on_host(matrix).astype(np.float64)
    return jnp.asarray(matrix.codes), jnp.asarray(matrix.scales), exact

  there, back = stored(-1), stored(-2)
  for n in (1, 2, 3, 4, 5, 6, 13, 50):
    x, h = (jnp.float32(random.standard_normal((n, size))) for size in (width, rows))
    for layer in range(L):
      for found, left, right in (
        (native.project(kind, x, *there[:2], layer), x, there[2][layer].T),
        (native.project_back(kind, h, *back[:2], layer), h, back[2][layer]),
      ):
        error = np.abs(np.asarray(found) - left @ right)
        assert np.all(error <= 1e-6 * (np.abs(left) @ np.abs(right)))


@pytest.mark.parametrize("format", [None, "int8", "int4", "mxfp4"])
@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_experts_of_wide_rows_agree_with_a_loop(kernels, format, n):
  """As in all strategies' tests, in which rows have 16 and 64 elements."""
  width, hidden, activation = 320, 96, expert_loop.CLAMPED
  if format:
    params, exact = expert_loop.quantized_weights(format, (E,), hidden, width, activation)
  else:
    params = exact = expert_loop.weights((E,), hidden, width, activation)
  x, indices, gates = expert_loop.rows(n, E, A, width)
  found = native_kernel.compute(E, activation, params, 0, x, indices, gates)
  expert_loop.assert_agrees(found, activation, exact, x, indices, gates)


# Vectors of every width; groups longer and shorter than a part of a row, and odd numbers of them;
# rows that no block and no index divides.
@pytest.mark.parametrize(
  "format, width, hidden",
  [("nested:2-4", 96, 7), ("nested:1-4", 768, 130), ("nested:3-4", 1280, 66)],
)
def test_experts_read_the_first_planes(kernels, format, width, hidden):
  activation = expert_loop.CLAMPED
  params = expert_loop.weights((E,), hidden, width, activation)
  quantized = {
    name: jax.tree.map(
      jnp.asarray, quantization.quantize(np.asarray(getattr(params, name)), format, axis)
    )
    for name, axis in quantization.CONTRACTED.items()
  }
  params = params.replace(**quantized)
  for bits in range(int(format[7]), 5):
    read = quantization.at_bits(params, bits)
    own = {name: getattr(read, name) for name in quantization.CONTRACTED}
    exact = params.replace(
      **{name: dequantize_on_host(jax.tree.map(np.asarray, m)) for name, m in own.items()}
    )
    for n in (1, 3, 40):
      x, indices, gates = expert_loop.rows(n, E, A, width)
      found = native_kernel.compute(E, activation, read, 0, x, indices, gates)
      expected = expert_loop.by_loop(activation, exact, x, indices, gates)[0]
      # Sums of offsets and of what bits add round more than sums of weights.
      error = np.abs(np.asarray(found, np.float64) - expected)
      assert error.max() <= 1e-5 * np.abs(expected).max()


def test_pairs_with_gate_zero_are_not_read(kernels):
  params = expert_loop.weights((E,), 8, 16)
  params = params.replace(down=params.down.at[0].set(np.nan))
  x, indices, gates = expert_loop.rows(3, E, A, 16)
  gates = jnp.where(indices == 0, 0, gates)
  run = lambda indices: native_kernel.compute(
    E, experts_lib.Activation(), params, 0, x, indices, gates
  )
  found = run(jnp.where(indices == 0, 10**6, indices))
  assert np.all(np.isfinite(found)) and np.array_equal(found, run(indices))


def test_products_under_scan_and_vmap_read_the_weights_once(kernels):
  random = np.random.RandomState(0)
  weights = jnp.asarray(random.standard_normal((L, 24, 16)), jnp.float32)
  x = jnp.asarray(random.standard_normal((5, 3, 16)), jnp.float32)

  def all_layers(x):
    step = lambda x, layer: (
      numerics.project_back(numerics.project(x, weights, layer), weights, layer),
      None,
    )
    return jax.lax.scan(step, x, jnp.arange(L))[0]

  mapped = jax.jit(jax.vmap(all_layers, in_axes=1, out_axes=1))
  exact = np.asarray(weights, np.float64)
  expected = np.asarray(x, np.float64)
  for layer in exact:
    expected = expected @ layer.T @ layer
  np.testing.assert_allclose(mapped(x), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
  program = mapped.lower(x).as_text()
  assert program.count("custom_call @roe_jax_project") == 2 and "tensor<15x16xf32>" in program
  # Weights that are mapped over, too.
  found = jax.vmap(lambda w: numerics.project(x, w[None], 0))(weights)
  np.testing.assert_allclose(found, np.einsum("btd,lrd->lbtr", x, weights), rtol=1e-4, atol=1e-4)


@pytest.fixture
def building(monkeypatch, tmp_path):
  """An empty cache, and a function that makes a compiler of a shell script's last lines."""
  monkeypatch.setenv("ROE_JAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.delenv("ROE_JAX_NATIVE", raising=False)
  monkeypatch.delenv("CXX", raising=False)
  caches = native._is_built, native_build.library_path
  for cached in caches:
    cached.cache_clear()

  def compiler(script):
    (tmp_path / "bin").mkdir()
    file = tmp_path / "bin" / "c++"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path

  yield compiler
  for cached in caches:
    cached.cache_clear()


def assert_xla_serves(monkeypatch, reason):
  said = []
  monkeypatch.setattr(logging, "warning", lambda message, *args: said.append(message % args))
  params, args = expert_loop.weights((1, E), 8, 16), expert_loop.rows(3, E, A, 16)
  for _ in range(2):
    assert not native.is_available()
    found = experts_lib.apply(params, 0, *args)
    np.testing.assert_array_equal(found, experts_lib.apply(params, 0, *args, "tiled_loop"))
    assert numerics._product(params.gate_up, numerics._project_tiled) is numerics._project_tiled
  with pytest.raises(ValueError, match="'native' is not available here"):
    experts_lib.apply(params, 0, *args, "native")
  assert len(said) == bool(reason) and all(reason in line for line in said)


def test_without_a_compiler_xla_serves_with_one_line(building, monkeypatch):
  monkeypatch.setenv("PATH", "")
  assert_xla_serves(monkeypatch, "no C++ compiler was found")


def test_a_compiler_that_fails_is_named_with_its_error(building, monkeypatch):
  building("echo 'kernels.cc:1: error: no such header' >&2; exit 1")
  assert_xla_serves(monkeypatch, "c++ fails: kernels.cc:1: error: no such header")


def test_a_cache_that_is_not_writable_is_named(building, monkeypatch, tmp_path):
  (tmp_path / "cache").write_text("a file")
  building("exit 0")
  assert_xla_serves(monkeypatch, str(tmp_path / "cache" / "native"))


def test_turned_off_nothing_is_said_or_built(building, monkeypatch, tmp_path):
  monkeypatch.setenv("ROE_JAX_NATIVE", "0")
  assert_xla_serves(monkeypatch, "")
  assert not (tmp_path / "cache").exists()


_WRITES_SLOWLY = """
echo run >> "$0.log"
while [ "$1" != -o ]; do shift; done
printf half > "$2"; sleep 0.2; printf whole > "$2"
"""


def test_many_builds_at_once_make_one_library(building):
  folder = building(_WRITES_SLOWLY)
  build = native_build.library_path.__wrapped__
  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    paths = {f.result() for f in [threads.submit(build) for _ in range(4)]}
  (path,) = paths
  assert path.read_text() == "whole"
  assert (folder / "bin" / "c++.log").read_text() == "run\n"
  assert sorted(p.suffix for p in path.parent.iterdir()) == [".lock", ".so"]


def test_a_changed_source_or_compiler_is_another_library(building, monkeypatch, tmp_path):
  folder = building(_WRITES_SLOWLY)
  build = native_build.library_path.__wrapped__
  first = build()
  source = tmp_path / "kernels.cc"
  source.write_bytes(native_build.SOURCE.read_bytes() + b"// changed")
  monkeypatch.setattr(native_build, "SOURCE", source)
  second = build()
  with open(folder / "bin" / "c++", "a") as script:
    script.write("# changed\n")
  assert len({first, second, build(), build()}) == 3


def test_an_option_that_a_compiler_does_not_know_is_left_out(building):
  building(f"case \"$*\" in *-march*) echo 'unknown -march' >&2; exit 1;; esac{_WRITES_SLOWLY}")
  assert native_build.library_path.__wrapped__().read_text() == "whole"


def test_a_check_is_made_once_per_library(building):
  building(_WRITES_SLOWLY)
  errors = iter([0.25])
  assert [native.remembered("it", lambda: next(errors)) for _ in range(2)] == [0.25, 0.25]


def test_the_source_is_shipped():
  setup = (pathlib.Path(native_build.__file__).parents[2] / "setup.cfg").read_text()
  assert "roe_jax.native =\n    *.cc" in setup and native_build.SOURCE.is_file()
