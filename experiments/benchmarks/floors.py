"""Rates of a device and the floors that follow from them; times of calls chained in a program."""

from collections.abc import Callable
import dataclasses
import subprocess
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import machine

TARGET_SECONDS = 0.02  # of a chained call


@dataclasses.dataclass(frozen=True)
class Rates:
  """Measured rates of a device.

  Attributes:
    bandwidth: bytes per second.
    flops: FLOPs per second of matmuls.
  """

  bandwidth: float
  flops: float

  def floor(self, num_bytes: float, flops: float) -> float:
    """Returns the least seconds for work that reads these bytes and does these FLOPs."""
    return max(num_bytes / self.bandwidth, flops / self.flops)

  def compare(self, seconds: float, num_bytes: float, flops: float) -> dict[str, float]:
    """Returns a record of a time and its floor."""
    floor = self.floor(num_bytes, flops)
    return {"ms": 1e3 * seconds, "floor_ms": 1e3 * floor, "to_floor": seconds / floor}


def median_seconds(call: Callable[[], Any], rounds: int = 5, budget: float = 0.5) -> float:
  """Returns the median seconds of a compiled call, of at least two and at most `rounds`."""
  times: list[float] = []
  while len(times) < 2 or (len(times) < rounds and sum(times) < budget):
    begin = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - begin)
  return float(np.median(times))


def steps_for(floor: float) -> int:
  """Returns how many chained steps make dispatch negligible, if a step takes `floor` seconds.

  It is static: with a known trip count XLA's GPU loops do not ask the host before each step.
  """
  return int(np.clip(np.ceil(TARGET_SECONDS / floor), 4, 512))


def _rate(step, array, work, x=None):
  """Work per second of chained steps `(x, array) -> x`; x is the array by default."""
  steps = 8
  call = jax.jit(lambda x, array: jax.lax.fori_loop(0, steps, lambda i, x: step(x, array), x))
  x = array if x is None else x
  jax.block_until_ready(call(x, array))
  return steps * work / median_seconds(lambda: call(x, array))


def measure(toy: bool) -> dict[str, Any]:
  """Returns the device, its driver and software, and its measured rates.

  The bandwidth is the larger one of copying an array and of reading it; the rate of matmuls the
  larger one of bfloat16 and float32 (on CPUs without bfloat16 units, the latter).
  """
  size = 2**20 if toy else min(2**28, machine.free_bytes() // 32)
  width = 256 if toy else 8192
  array = jnp.ones(size, jnp.float32)
  copy = _rate(lambda x, _: x + 1, array, 2 * array.nbytes)
  # Not linear in the last sum, so that the compiler can neither hoist nor factor it.
  read = _rate(lambda s, a: jnp.maximum(a, s).sum() * 1e-9, array, array.nbytes, jnp.float32(0))
  rates = {}
  for dtype in ("bfloat16", "float32"):
    w = jax.random.normal(jax.random.key(0), (width, width), dtype) * width**-0.5
    rates[dtype] = _rate(
      lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype),
      w,
      2 * width**3,
    )
  device = jax.devices()[0]
  return {
    **machine.describe(machine.pin(None)),
    "driver": driver(),
    "device_bytes": (device.memory_stats() or {}).get("bytes_limit"),
    "copy_bandwidth": copy,
    "read_bandwidth": read,
    "bandwidth": max(copy, read),
    **{f"{dtype}_matmul_flops": rate for dtype, rate in rates.items()},
    "flops": max(rates.values()),
  }


def driver() -> str | None:
  """Returns NVIDIA's driver and power limit from nvidia-smi, if there is one."""
  query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
  try:
    return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip() or None
  except (OSError, subprocess.TimeoutExpired):
    return None
