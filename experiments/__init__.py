"""Programs that evaluate, tune, compare and train models with `roe_jax`, and their support."""

from checkpoints_convert import interrupts  # first: see there
