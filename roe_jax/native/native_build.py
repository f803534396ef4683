"""Builds the native kernels with the system's C++ compiler and loads them.

A library is built once per version of the source, of jaxlib, of the compiler and kind of CPU, in
a folder of the user's cache. Other processes that need it meanwhile wait for it.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess

from absl import logging
import jax
import jaxlib.version

SOURCE = pathlib.Path(__file__).with_name("kernels.cc")
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT = 900  # seconds for a build, which a busy machine may need
FLAGS = (
  "-std=c++17",
  "-O2",
  "-fno-math-errno",
  "-ffp-contract=fast",
  "-fPIC",
  "-shared",
  "-DROE_JAX_FFI",
)
# Older Clang knows the second only, on ARM.
FOR_THIS_CPU = ("-march=native", "-mcpu=native")


class BuildError(RuntimeError):
  """The native kernels cannot be built or loaded here."""


def cache_folder() -> pathlib.Path:
  """Returns the folder that holds libraries, within $ROE_JAX_CACHE or ~/.cache/roe_jax."""
  folder = os.environ.get("ROE_JAX_CACHE") or pathlib.Path.home() / ".cache" / "roe_jax"
  return pathlib.Path(folder) / "native"


@functools.cache
def library_path() -> pathlib.Path:
  """Builds the library unless it has been built, and returns its path.

  Raises:
    BuildError: there is no compiler, it fails, or the cache folder is not writable.
  """
  names = (os.environ.get("CXX", ""), *COMPILERS)
  compiler = next((path for path in map(shutil.which, names) if path), None)
  if compiler is None:
    raise BuildError("no C++ compiler was found: install g++ or clang++")
  path = cache_folder() / f"{_key(compiler)}.so"
  if not path.exists():
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      with _locked(path.with_suffix(".lock")):
        if not path.exists():  # another process may have built it
          _build(compiler, path)
    except OSError as error:
      raise BuildError(f"{path.parent} cannot be used: {error.strerror or error}") from error
  return path


def load() -> ctypes.CDLL:
  """Returns the loaded library.

  Raises:
    BuildError: see `library_path`; or the library cannot be loaded.
  """
  try:
    return ctypes.CDLL(str(library_path()))
  except OSError as error:
    raise BuildError(str(error)) from error


def _build(compiler, path):
  logging.info("Building the native CPU kernels in %s; once, in a minute or two.", path.parent)
  partial = path.with_suffix(".partial")
  for for_this_cpu in (*FOR_THIS_CPU, None):
    command = [compiler, *FLAGS, *filter(None, [for_this_cpu])]
    command += [f"-I{jax.ffi.include_dir()}", "-o", str(partial), str(SOURCE)]
    try:
      done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", timeout=TIMEOUT
      )
    except subprocess.TimeoutExpired as error:
      raise BuildError(f"{compiler} took more than {TIMEOUT} s") from error
    if done.returncode == 0:
      os.replace(partial, path)
      return
    if for_this_cpu is None or for_this_cpu.split("=")[0] not in done.stderr:
      break
  lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr.strip()]
  raise BuildError(f"{compiler} fails: {lines[0][:200]}")


def _key(compiler):
  """Returns a name for the library that changes with all that it depends on."""
  binary = pathlib.Path(compiler).resolve()
  found = binary.stat()
  parts = (
    SOURCE.read_bytes(),
    jaxlib.version.__version__,
    *FLAGS,
    str(binary),
    found.st_size,
    found.st_mtime_ns,
    platform.machine(),
    _cpu(),
  )
  return hashlib.sha256("\0".join(map(repr, parts)).encode()).hexdigest()[:24]


def _cpu():
  """Returns a description of the CPU's instruction sets."""
  with contextlib.suppress(OSError):
    for line in pathlib.Path("/proc/cpuinfo").read_text("utf-8").splitlines():
      if line.startswith(("flags", "Features")):
        return " ".join(sorted(line.split(":", 1)[1].split()))
  return platform.processor()


@contextlib.contextmanager
def _locked(path):
  """Holds a lock on a file; it ends with the process. Nothing where there are no such locks."""
  try:
    import fcntl
  except ImportError:
    yield
    return
  with open(path, "wb") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
