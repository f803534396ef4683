"""Figures of accelerators, for estimates of time and memory (see `calls`).

Memory, its bandwidth and the peak of bfloat16 matmuls without sparsity are those
of the vendors' data sheets:

* TPUs: Google Cloud's pages "TPU v5e", "TPU v5p" and "TPU v6e". These give the
  links of a chip together, in both directions: 400, 1200 and 800 GB/s on tori of
  2, 3 and 2 dimensions. A collective along one mesh axis is taken to use one
  dimension, so that a device sends a half of a dimension's share: 100, 200, 200.
* GPUs: NVIDIA's data sheets of the SXM modules. NVLink is given there in both
  directions, 600 GB/s (A100) and 900 (H100, H200); a device sends half of it, to
  the eight of its node. Beyond them one 400 Gb/s port for each GPU is assumed, as
  in DGX H100 (200 Gb/s in DGX A100).
* T4: the same of its PCIe card, one direction of 16 lanes of PCIe 3.0, and 25 Gb/s
  beyond. It has no bfloat16 units, and XLA computes in float32 there: its peak is meant.

The latencies are assumptions: the order of magnitude of one message, by which a
small collective over g devices takes log2(g) times as long.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """One device, and how it is joined to others.

  Attributes:
    memory: bytes.
    bandwidth: of the memory, bytes per second.
    flops: peak of bfloat16 matmuls, per second.
    link: bytes per second that a device sends to others of its node in a
      collective.
    node: devices joined by links; 0 is all.
    network: bytes per second that it sends beyond its node.
    latency: seconds of one message.
    platform: JAX's name for it.
    kinds: beginnings of JAX's `device_kind`.
  """

  memory: float
  bandwidth: float
  flops: float
  link: float
  node: int
  network: float
  latency: float
  platform: str
  kinds: tuple[str, ...]


def _tpu(memory, bandwidth, flops, link, *kinds):
  return Accelerator(memory, bandwidth, flops, link, 0, link, 1e-6, "tpu", kinds)


def _gpu(memory, bandwidth, flops, link, network, *kinds):
  return Accelerator(memory, bandwidth, flops, link, 8, network, 3e-6, "gpu", kinds)


ACCELERATORS = {
  "v5e": _tpu(16e9, 0.819e12, 197e12, 100e9, "TPU v5 lite", "TPU v5e"),
  "v5p": _tpu(95e9, 2.765e12, 459e12, 200e9, "TPU v5p", "TPU v5"),
  "v6e": _tpu(32e9, 1.638e12, 918e12, 200e9, "TPU v6 lite", "TPU v6e"),
  "t4": _gpu(16e9, 0.32e12, 8.1e12, 16e9, 3.1e9, "Tesla T4"),
  "a100-40": _gpu(40e9, 1.555e12, 312e12, 300e9, 25e9, "NVIDIA A100-SXM4-40GB"),
  "a100-80": _gpu(80e9, 2.039e12, 312e12, 300e9, 25e9, "NVIDIA A100-SXM4-80GB"),
  "h100": _gpu(80e9, 3.35e12, 989e12, 450e9, 50e9, "NVIDIA H100"),
  "h200": _gpu(141e9, 4.8e12, 989e12, 450e9, 50e9, "NVIDIA H200"),
}


def of_kind(device_kind: str) -> str | None:
  """The name of an accelerator by JAX's `device_kind`; None for others, such as CPUs."""
  return next(
    (
      name
      for name, accelerator in ACCELERATORS.items()
      if device_kind.startswith(accelerator.kinds)
    ),
    None,
  )
