"""Training of small networks, each in a folder from which it resumes and where it is kept."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from checkpoints_convert import outputs
from experiments.training import training_loop
from roe_jax.training import TrainState


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How a network is trained.

  Attributes:
    num_steps: number of steps.
    batch_size: images of a step.
    learning_rate: at the start; a cosine to zero follows a warm-up over a twentieth of the steps.
    weight_decay: of AdamW.
    seed: of the initial parameters and of the batches.
  """

  num_steps: int
  batch_size: int
  learning_rate: float
  weight_decay: float = 0.0
  seed: int = 0

  def optimizer(self) -> optax.GradientTransformation:
    """Returns AdamW with clipping by global norm."""
    warmup = max(1, self.num_steps // 20)
    rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, self.num_steps)
    return optax.chain(
      optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=self.weight_decay)
    )


@functools.partial(jax.jit, static_argnames=("network", "schedule"))
def _start(key, images, network, schedule):
  params = network.init(key, images)
  return TrainState(jnp.zeros((), jnp.int32), params, schedule.optimizer().init(params))


@functools.partial(
  jax.jit, static_argnames=("loss", "network", "schedule"), donate_argnames="state"
)
def _step(state, batch, loss, network, schedule):
  value, gradient = jax.value_and_grad(loss)(state.params, batch, network)
  updates, opt_state = schedule.optimizer().update(gradient, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  return TrainState(state.step + 1, params, opt_state), {"loss": value}


def trained(
  folder: pathlib.Path,
  network: Any,
  loss: Callable[[Any, Any, Any], jax.Array],
  draw: Callable[[np.random.Generator], Any],
  schedule: Schedule,
) -> Any:
  """Returns the parameters of a network, trained or read from a folder where it was.

  Args:
    folder: of the states and metrics; a killed run resumes from the last of four states.
    network: a hashable module whose `init` takes the first array of a batch.
    loss: `(params, batch, network) -> scalar`; a function of a module, since steps are compiled
      for it.
    draw: returns the batch of a step, of the generator of that step.
    schedule: the schedule.

  Raises:
    ValueError: the folder has another network, or the loss is not finite.
  """
  folder.mkdir(parents=True, exist_ok=True)
  settings = {"network": repr(network), "schedule": dataclasses.asdict(schedule)}
  of_step = lambda step: draw(np.random.default_rng((schedule.seed, step)))
  # The compiled start and step serve all seeds.
  common = dataclasses.replace(schedule, seed=0)
  images = jnp.asarray(jax.tree.leaves(of_step(0))[0])
  start = _start(jax.random.key(schedule.seed), images, network, common)

  def step(state, index):
    state, values = _step(state, of_step(index), loss, network, common)
    return state, values, schedule.batch_size

  with outputs.held(str(folder)):
    training_loop.check_output(folder, settings)
    state, _ = training_loop.run(
      folder,
      lambda: start,
      step,
      lambda state: {},
      num_steps=schedule.num_steps,
      log_every=max(1, schedule.num_steps // 8),
      save_every=max(1, schedule.num_steps // 4),
      evaluate_every=schedule.num_steps,
    )
  return state.params
