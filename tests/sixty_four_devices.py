"""Compiles programs of published sizes for 64 devices, without any array; see `test_costs`.

Run as a program of its own, as a process has its devices for good. Prints a JSON
object for each program: bytes on one device, and its collectives.
"""

import dataclasses
import json
import os
import re
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
# Those of the tests, which make compiling quick, with other devices.
os.environ["XLA_FLAGS"] = " ".join(
  [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
  + ["--xla_force_host_platform_device_count=64"]
)

import jax
import jax.numpy as jnp
import numpy as np

from roe_jax import decode, members, numerics, presets, scoring, sharding
from roe_jax import params as params_lib
from roe_jax.costs import hlo
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler

CAPACITY = 1024


def abstract(tree, shardings):
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, numerics.storage_dtype(str(a.dtype)), sharding=s),
    tree,
    shardings,
  )


def lowered(config, roster, kind, texts, positions):
  """The program of a decode step, or of a chunk of scoring."""
  mesh = sharding.make_mesh(config)
  params = abstract(params_lib.abstract(config), sharding.parameter_shardings(mesh, config))

  def state():
    integers = jnp.zeros(texts, jnp.int32)
    tokens = jnp.zeros((texts, CAPACITY), jnp.int32)
    return decode.DecodeState(
      tokens,
      tokens.astype(jnp.float32),
      tokens,
      integers,
      integers,
      integers == 0,
      integers.astype(jnp.uint32),
      members.empty_cache(config, roster, texts, CAPACITY, whole=kind == "score"),
    )

  shapes = jax.eval_shape(state)
  shapes = abstract(shapes, sharding.state_shardings(mesh, shapes))
  if kind == "step":
    return decode.decode_steps.lower(
      params, config, roster, Sampler.greedy(), shapes, jnp.full(8, -1), np.int32(1)
    )
  tokens = jax.ShapeDtypeStruct((texts, positions), jnp.int32)
  return scoring.score_chunk.lower(
    params,
    config,
    roster,
    shapes.cache,
    tokens,
    tokens,
    shapes.lengths,
    shapes.request_ids,
    jnp.ones(1),
  )


def narrow_results(text):
  """Shapes of what collectives move in 8 or 16 bits, as weights are held."""
  return [
    dims
    for line in text.splitlines()
    if (match := hlo.RESULT.search(line))
    for dims in re.findall(r"\b(?:u8|s8|u16|bf16)\[([\d,]*)\]", match[1])
  ]


def main(cases):
  for name, kind, texts, members_, positions in cases:
    config = presets.PRESETS[name]
    program = lowered(
      config, Roster.create(config, members_, 0.3), kind, texts, positions
    ).compile()
    text, found = program.as_text(), program.memory_analysis()
    print(
      json.dumps(
        {
          "arguments": found.argument_size_in_bytes,
          "temporaries": found.temp_size_in_bytes,
          "narrow": narrow_results(text),
          "collectives": [
            dataclasses.asdict(c) | {"count": count}
            for c, count in hlo.count_collectives(text).items()
          ],
        }
      )
    )


if __name__ == "__main__":
  main(json.loads(sys.argv[1]))
