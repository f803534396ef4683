"""Loads a model in a process of its own and prints what that took, as JSON.

    python tests/loading_process.py --path=MODEL --warm_up=OTHER --mesh=data:1,expert:8,tensor:1

Of a roe_jax checkpoint or of a Hugging Face folder; with --process=I,N,PORT as the
I-th of N processes, each with its share of eight devices. Bytes held, read, and by
which the process grew at its peak and in the end; and a checksum of what it holds.
"""

import argparse
import json
import os
import pathlib
import re
import time
import zlib

parser = argparse.ArgumentParser()
parser.add_argument("--path", required=True)
parser.add_argument("--warm_up", required=True)
parser.add_argument("--mesh")
parser.add_argument("--process", default="0,1,0")
ARGUMENTS = parser.parse_args()
INDEX, COUNT, PORT = map(int, ARGUMENTS.process.split(","))
os.environ |= {
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // COUNT}",
}

import jax
import numpy as np

if COUNT > 1:
  jax.distributed.initialize(f"127.0.0.1:{PORT}", COUNT, INDEX)

import checkpoints_convert
from roe_jax import checkpoint, sharding


def memory(name):
  """Bytes of a line of /proc/self/status."""
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(re.search(rf"{name}:\s+(\d+)", status)[1])


def bytes_read():
  return int(re.search(r"rchar: (\d+)", pathlib.Path("/proc/self/io").read_text())[1])


def load(path):
  from_hub = checkpoints_convert.is_hugging_face(path)
  find_config, load = (
    (checkpoints_convert.load_config, checkpoints_convert.load)
    if from_hub
    else (checkpoint.load_config, checkpoint.load)
  )
  shardings = None
  if ARGUMENTS.mesh:
    config = find_config(path)
    sizes = {axis: int(n) for axis, n in (part.split(":") for part in ARGUMENTS.mesh.split(","))}
    shardings = sharding.parameter_shardings(sharding.make_mesh(config, **sizes), config)
  return jax.block_until_ready(load(path, shardings=shardings)[0])


load(ARGUMENTS.warm_up)  # what is imported and compiled once is not part of the figures
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before, read, begin = memory("VmRSS"), bytes_read(), time.perf_counter()
params = load(ARGUMENTS.path)
figures = {
  "bytes_held": sum(
    shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards
  ),
  "bytes_read": bytes_read() - read,
  "peak": memory("VmHWM") - before,
  "after": memory("VmRSS") - before,
  "seconds": time.perf_counter() - begin,
}
checksum = 0
for x in jax.tree.leaves(params):
  for shard in sorted(x.addressable_shards, key=lambda s: s.device.id):
    checksum = zlib.crc32(np.asarray(shard.data).tobytes(), checksum)
print(json.dumps(figures | {"checksum": checksum}))
