"""What a call of the model costs: arithmetic, memory, reading and communication.

A small analytical model of the programs here on a mesh of N devices, for
planning runs on machines that are not at hand, and for the FLOPs that an
evaluation reports. Nothing is allocated or compiled. Bytes of arrays and how
they lie follow from the descriptions that the programs themselves go by
(`params.describe`, `members.empty_cache`, `sharding.spec`) and are exact; what
else is assumed is said where it is.

`forward_flops`, `generation_flops` and `scoring_flops` count for one text.
`memory` and `call` are for one device of a mesh, and `seconds` makes a time of
a call.
"""

from roe_jax.costs.accelerators import ACCELERATORS, Accelerator, of_kind
from roe_jax.costs.calls import DeviceCost, MeshCollective, Seconds, call, seconds
from roe_jax.costs.flops import (
  expected_unique_experts,
  forward_flops,
  generation_flops,
  scoring_flops,
)
from roe_jax.costs.footprint import Memory, memory
