"""An analytical model of what one call of the model costs on a mesh of devices.

Use it to plan runs on machines you do not have, and to report the FLOPs of an
evaluation. Nothing is allocated or compiled. Array sizes and layouts come from the
same descriptions that the programs use (`params.describe`, `members.empty_cache`,
`sharding.spec`) and are exact; other assumptions are stated where they are made.

`forward_flops`, `generation_flops` and `scoring_flops` count one sequence. `memory`
and `call` describe one device of a mesh; `seconds` bounds the time of a call. `rounds` has
what drafted tokens and members that run only where they are needed cost on average.
`train_steps` describes a training step; it is imported apart, since it needs the optimizer.
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
