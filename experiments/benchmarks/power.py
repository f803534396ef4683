"""Electric power of the GPUs, as NVIDIA's management library tells it."""

import threading
import time
from typing import Any

PERIOD = 0.02  # seconds between two readings


def load_nvml() -> Any | None:
  """NVML with its GPUs, or None where there is none: no package nvidia-ml-py, no driver."""
  try:
    import pynvml

    pynvml.nvmlInit()
    return pynvml if pynvml.nvmlDeviceGetCount() else None
  except Exception:  # of many kinds: no package, no library, no driver, no permission
    return None


class Meter:
  """Reads the power of all GPUs while it is entered.

  Attributes:
    watts: their mean sum, None without a reading.
    readings: how many there were.
  """

  def __init__(self, nvml: Any):
    """Takes what `load_nvml` returned."""
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
      # In milliwatts.
      self._sum += sum(self._nvml.nvmlDeviceGetPowerUsage(h) for h in self._handles) / 1e3
      self.readings += 1
      self._stop.wait(PERIOD)


def mean_watts(nvml: Any | None, call, seconds: float = 2.0) -> float | None:
  """Mean power while a call is made again and again; None without NVML.

  Args:
    nvml: of `load_nvml`.
    call: does its work once and waits for it.
    seconds: how long, at least.
  """
  if nvml is None:
    return None
  with Meter(nvml) as meter:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
      call()
  return meter.watts
