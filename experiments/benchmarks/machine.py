"""The machine that a benchmark runs on: cores, memory, bandwidth."""

from collections.abc import Callable
import os
import pathlib
import platform
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import native

BANDWIDTH_BYTES = 2**30
ROW = 2**12  # elements
MATMUL_WIDTH = (1024, 8192)  # on a CPU, and on an accelerator


def pin(num_cores: int | None) -> int:
  """Pins this process to the first of the cores it may use, and returns their number.

  Call it before the JAX backend and other threads start, which count the cores they may use.

  Args:
    num_cores: number of cores; None leaves the process on all of them.

  Raises:
    ValueError: there are fewer cores, or the platform cannot pin processes.
  """
  if not hasattr(os, "sched_setaffinity"):
    if num_cores is not None:
      raise ValueError(
        f"--num_cores: {platform.system()} cannot pin processes to cores: leave the flag out"
      )
    return os.cpu_count() or 1
  allowed = sorted(os.sched_getaffinity(0))
  if num_cores is None:
    return len(allowed)
  if not 1 <= num_cores <= len(allowed):
    raise ValueError(
      f"--num_cores must lie in [1, {len(allowed)}], the cores this process may use, "
      f"got {num_cores}"
    )
  os.sched_setaffinity(0, allowed[:num_cores])
  return num_cores


def describe(num_cores: int) -> dict[str, Any]:
  """Returns the description of the machine that results record."""
  device = jax.devices()[0]
  return {
    "cpu": _cpu_model(),
    "cores": num_cores,
    "platform": device.platform,
    "device": device.device_kind,
    "python": platform.python_version(),
    "jax": jax.__version__,
  }


def _cpu_model():
  """Returns the processor's name with its family and model numbers."""
  path = pathlib.Path("/proc/cpuinfo")
  if not path.exists():
    return platform.processor() or platform.machine()
  fields = {}
  for line in path.read_text("utf-8").splitlines():
    name, _, value = line.partition(":")
    fields.setdefault(name.strip(), value.strip())
  if "model name" not in fields:
    return platform.machine()
  return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def free_bytes() -> int:
  """Returns the free memory of the default device in bytes."""
  stats = jax.devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"] - stats["bytes_in_use"]
  path = pathlib.Path("/proc/meminfo")
  if path.exists():
    for line in path.read_text("utf-8").splitlines():
      if line.startswith("MemAvailable:"):
        return int(line.split()[1]) * 1024
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peaks() -> dict[str, int]:
  """Returns the peak memory of this process and, if reported, of the device, in bytes."""
  unit = 1 if sys.platform == "darwin" else 1024
  found = {"peak_process_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
  stats = jax.devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    found["peak_device_bytes"] = stats["peak_bytes_in_use"]
  return found


def bandwidth_call() -> tuple[Callable[[], None], int]:
  """Returns a call that reads an array once, and the array's size in bytes.

  The array is 1 GiB of float32, or a quarter of the free memory if that is less. It is summed to
  one number, which read fastest of what XLA was tried with (one stream of memory per core); or
  multiplied with one token by the native kernel, which reads several, where that is faster.
  """
  size = max(1, min(BANDWIDTH_BYTES, free_bytes() // 4) // 4)
  rows = max(1, size // ROW)
  array = jax.jit(lambda: jnp.ones((1, rows, size // rows), jnp.float32))()
  token = jnp.ones((1, array.shape[2]), jnp.float32)
  reads = [lambda token, array: jnp.sum(array)]
  if native.is_available() and array.shape[2] % native.MULTIPLE == 0:
    reads.append(lambda token, array: native.project("float32", token, array, None, 0))
  return _fastest([_call(read, token, array) for read in reads]), array.nbytes


def matmul_call() -> tuple[Callable[[], None], float]:
  """Returns a call of a matmul, in bfloat16 or float32 as is faster here, and its FLOPs."""
  width = MATMUL_WIDTH[jax.default_backend() != "cpu"]
  matrices = [jnp.full((width, width), 1 / width, dtype) for dtype in ("bfloat16", "float32")]
  return _fastest([_call(jnp.dot, m, m) for m in matrices]), 2.0 * width**3


def _call(function, *args):
  """Returns a call of a compiled function."""
  compiled = jax.jit(function).lower(*args).compile()
  return lambda: jax.block_until_ready(compiled(*args))


def _fastest(calls):
  """Returns the fastest of some calls, by one after a first one."""
  seconds = []
  for call in calls:
    call()
    begin = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - begin)
  return calls[int(np.argmin(seconds))]
