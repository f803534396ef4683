"""Data-sheet numbers of accelerators, for estimates of time and memory (see `calls`).

Memory, its bandwidth and peak dense bfloat16 FLOPs are from the vendors' data sheets:

* TPUs: Google Cloud's pages "TPU v5e", "TPU v5p" and "TPU v6e". They state all links of
  a chip in both directions: 400, 1200 and 800 GB/s on tori of 2, 3 and 2 dimensions. A
  collective along one mesh axis is assumed to use one dimension, so a device sends at
  half of a dimension's rate: 100, 200 and 200 GB/s.
* GPUs: NVIDIA's data sheets of the SXM modules. NVLink is stated in both directions,
  600 GB/s (A100) and 900 (H100, H200); a device sends at half of it within its node of
  eight. Between nodes, one 400 Gb/s port per GPU is assumed, as in DGX H100 (200 Gb/s
  in DGX A100).
* T4: the PCIe card, one direction of 16 lanes of PCIe 3.0, and 25 Gb/s between nodes. It
  has no bfloat16 units and XLA computes in float32 there, so its peak is the float32 one.

Latencies are assumptions: the order of magnitude of one message. A small collective over
g devices takes log2(g) times as long.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """One device and its interconnect.

  Attributes:
    memory: bytes.
    bandwidth: memory bandwidth, bytes per second.
    flops: peak FLOPs per second of bfloat16 matmuls.
    link: bytes per second that a device sends within its node in a collective.
    node: devices per node; 0 for unlimited.
    network: bytes per second that a device sends to other nodes.
    latency: seconds per message.
    platform: JAX's platform name.
    kinds: prefixes of JAX's `device_kind`.
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
  """Returns the accelerator's name for a JAX `device_kind`; None for others, such as CPUs."""
  return next((n for n, a in ACCELERATORS.items() if device_kind.startswith(a.kinds)), None)
