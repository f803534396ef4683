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

BANDWIDTH_BYTES = 2**30
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

  The array is 1 GiB of float32, or a quarter of the free memory if that is less. Summing it to
  one number read fastest of what was tried, on one core and on several (sums along an axis use
  one core).
  """
  size = max(1, min(BANDWIDTH_BYTES, free_bytes() // 4) // 4)
  array = jax.jit(lambda: jnp.ones(size, jnp.float32))()
  read = jax.jit(jnp.sum).lower(array).compile()

  def call():
    jax.block_until_ready(read(array))

  return call, array.nbytes


def matmul_call() -> tuple[Callable[[], None], float]:
  """Returns a call of a matmul, in bfloat16 or float32 as is faster here, and its FLOPs."""
  width = MATMUL_WIDTH[jax.default_backend() != "cpu"]
  calls = []
  for dtype in ("bfloat16", "float32"):
    matrix = jnp.full((width, width), 1 / width, dtype)
    product = jax.jit(jnp.dot).lower(matrix, matrix).compile()

    def call(product=product, matrix=matrix):
      jax.block_until_ready(product(matrix, matrix))

    call()
    begin = time.perf_counter()
    call()
    calls.append((time.perf_counter() - begin, call))
  return min(calls, key=lambda c: c[0])[1], 2.0 * width**3
