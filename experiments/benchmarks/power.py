"""Power of the GPUs, read from NVIDIA's management library (NVML)."""

import threading
import time
from typing import Any

PERIOD = 0.02  # seconds between two readings


def load_nvml() -> Any | None:
  """Returns NVML, or None without the package nvidia-ml-py, a driver or a GPU."""
  try:
    import pynvml  # pyright: ignore[reportMissingImports]  # may not be installed

    pynvml.nvmlInit()
    return pynvml if pynvml.nvmlDeviceGetCount() else None
  except Exception:  # a missing package, library or driver, or no permission
    return None


class Meter:
  """A context manager that samples the power of all GPUs.

  Attributes:
    watts: mean total power; None without a reading.
    readings: number of readings.
  """

  def __init__(self, nvml: Any):
    self._nvml = nvml
    self._handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    self._stop, self._sum = threading.Event(), 0.0
    self.readings = 0

  @property
  def watts(self) -> float | None:
    return self._sum / self.readings if self.readings else None

  def __enter__(self) -> "Meter":
    self._stop.clear()
    self._thread = threading.Thread(target=self._read, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *exception) -> None:
    self._stop.set()
    self._thread.join()

  def _read(self):
    while not self._stop.is_set():
      self._sum += (
        sum(self._nvml.nvmlDeviceGetPowerUsage(h) for h in self._handles) / 1e3  # mW
      )  # from mW
      self.readings += 1
      self._stop.wait(PERIOD)


def mean_watts(nvml: Any | None, call, seconds: float = 2.0) -> float | None:
  """Returns the mean power in watts while a call is repeated; None without NVML.

  Args:
    nvml: from `load_nvml`.
    call: makes the call once and waits for the result.
    seconds: minimum duration.
  """
  if nvml is None:
    return None
  with Meter(nvml) as meter:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
      call()
  return meter.watts
