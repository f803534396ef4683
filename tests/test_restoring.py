"""Checkpoints and Hugging Face folders onto devices: any topology, memory, bytes read."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest

from checkpoints_convert import convert_to_hugging_face
from roe_jax import checkpoint, sharding
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.quantization import FORMATS

pytestmark = pytest.mark.slow

CONFIG = ModelConfig(
  family="olmoe",
  vocab_size=64,
  num_layers=2,
  d_model=64,
  num_heads=4,
  num_kv_heads=4,
  head_dim=8,
  num_experts=8,
  experts_per_token=3,
  d_expert=256,
  context_length=64,
  normalize_gates=False,
  gates_in_model_dtype=True,
  qk_norm=True,
  dtype="bfloat16",
)
TOPOLOGIES = [(1, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)]


def random_params(config):
  """Random bits, without one that numbers which are not finite have."""
  random = np.random.default_rng(0)

  def value(shape):
    bits = np.frombuffer(random.bytes(shape.size * shape.dtype.itemsize), np.uint8) & 0xBF
    return bits.view(shape.dtype).reshape(shape.shape)

  return jax.tree.map(value, params_lib.abstract(config))


def shardings_on(sizes, config):
  mesh = sharding.make_mesh(config, **dict(zip(sharding.AXES, sizes)))
  return sharding.parameter_shardings(mesh, config)


@pytest.mark.parametrize(
  "format, written_on", [*zip(FORMATS, TOPOLOGIES[1:]), (None, (2, 2, 2))], ids=str
)
def test_what_was_written_on_any_topology_opens_on_any_other(tmp_path, format, written_on):
  config = CONFIG.replace(expert_format=format)
  params = random_params(config)
  checkpoint.save(
    tmp_path / "c", jax.device_put(params, shardings_on(written_on, config)), config, piece_bytes=1
  )
  for sizes in TOPOLOGIES:
    shardings = shardings_on(sizes, config)
    restored, found = checkpoint.load(tmp_path / "c", shardings=shardings)
    assert found == config
    for got, want, placed in zip(*map(jax.tree.leaves, (restored, params, shardings))):
      assert got.sharding == placed and got.dtype == want.dtype
      assert np.asarray(got).tobytes() == want.tobytes()


# In processes of their own.

# 16 layers of 26 MB.
LARGE = CONFIG.replace(
  num_layers=16,
  vocab_size=1024,
  d_model=256,
  num_heads=8,
  num_kv_heads=8,
  head_dim=32,
  num_experts=16,
  d_expert=1024,
)
PIECE = 26e6


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """A folder with a large and a small model, each as a checkpoint and for the hub; the
  parameters of the large one."""
  folder = tmp_path_factory.mktemp("models")
  for name, config in (("small", LARGE.replace(d_expert=16)), ("large", LARGE)):
    params = random_params(config)
    checkpoint.save(folder / name / "checkpoint", params, config, piece_bytes=int(PIECE))
    convert_to_hugging_face(str(folder / name / "checkpoint"), str(folder / name / "hub"))
  return folder, params


def checksum(params, devices):
  """What `loading_process` prints if it holds what some of eight devices should."""
  result = 0
  for x, placed in zip(*map(jax.tree.leaves, (params, shardings_on((1, 8, 1), LARGE)))):
    indices = placed.devices_indices_map(x.shape)
    for device in jax.devices()[devices]:
      result = zlib.crc32(x[indices[device]].tobytes(), result)
  return result


def load(folder, kind, num_processes=1):
  """What loading onto expert:8 takes, for each process."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  environment["PYTHONPATH"] = str(pathlib.Path(__file__).parents[1])
  processes = [
    subprocess.Popen(
      [
        sys.executable,
        str(pathlib.Path(__file__).with_name("loading_process.py")),
        f"--path={folder / 'large' / kind}",
        f"--warm_up={folder / 'small' / kind}",
        "--mesh=data:1,expert:8,tensor:1",
        f"--process={i},{num_processes},{port}",
      ],
      stdout=subprocess.PIPE,
      text=True,
      env=environment,
    )
    for i in range(num_processes)
  ]
  outputs = [p.communicate(timeout=300)[0] for p in processes]
  assert [p.returncode for p in processes] == [0] * num_processes
  return [json.loads(output) for output in outputs]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_host_holds_little_beside_the_parameters(models):
  """Devices that are the host's own hold their parts of a piece there, too."""
  folder, params = models
  (found,) = load(folder, "checkpoint")
  assert found["checksum"] == checksum(params, slice(8))
  size = params_lib.num_bytes(LARGE)
  assert found["bytes_held"] > size
  caches = 200e6
  assert found["peak"] - found["bytes_held"] < caches + 3 * PIECE
  # An array that all devices hold is read again by those that ask for it at once: usually by
  # one to three of the eight, on a busy machine by all.
  assert found["bytes_read"] < 1.01 * found["bytes_held"] < 1.2 * size


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["checkpoint", "hub"])
def test_a_process_reads_and_holds_what_its_devices_need(models, kind):
  whole = params_lib.num_bytes(LARGE)
  experts = sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(params_lib.abstract(LARGE).layers.experts)
  )
  folder, params = models
  for i, found in enumerate(load(folder, kind, num_processes=2)):
    assert found["checksum"] == checksum(params, slice(4 * i, 4 * i + 4))
    assert found["bytes_read"] < 1.01 * found["bytes_held"] < 1.2 * (whole - experts / 2)
    assert found["bytes_held"] < found["peak"] < 0.9 * whole
    if kind == "hub":  # its pieces have 64 MiB: two layers
      assert found["peak"] - found["bytes_held"] < 5 * PIECE
