"""Trains bit routers on a text: how many bits of each expert a token reads.

    python -m experiments.train_bit_router --checkpoint=nested --text=TEXT.txt --output=routed

The checkpoint has experts in a nested format (`checkpoints_convert --quantize_experts=nested:2-4`).
Prints the KL divergence from the model at all bits on the end of the text, which is not trained on,
of the routers before and after, with their mean bits. The output folder holds what `training_loop`
says, and in `model/` the checkpoint with bit routers. The same command resumes an interrupted run.
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert import quantize_checkpoint
from experiments import fine_tune
from experiments.cli import app, overrides
from experiments.training import bit_router_training, training_loop
from roe_jax import bit_routing, checkpoint, quantization
from roe_jax.checkpoint_folder import resolved

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Settings:
  """The flags' values; see `define_flags`."""

  checkpoint: str
  text: str
  output: str
  mean: float = 3.0
  steps: int = 200
  learning_rate: float = 1e-2
  weight: float = 1.0
  window: int = 256
  batch_size: int = 4
  held_out_tokens: int = 2048
  save_every: int = 50
  seed: int = 0


def define_flags() -> None:
  required: dict[str, Any] = dict(default=None, required=True)
  flags.DEFINE_string("checkpoint", help="Checkpoint with experts in a nested format.", **required)
  flags.DEFINE_string("text", help="Text file to train on; its end is held out.", **required)
  flags.DEFINE_string("output", help="Folder for the run.", **required)
  helps = {
    "mean": "Bits that are wanted, on average over tokens and experts.",
    "steps": "Number of steps.",
    "learning_rate": "Peak learning rate.",
    "weight": "Weight of the squared distance of the mean bits from --mean, in nats.",
    "window": "Tokens per sequence.",
    "batch_size": "Sequences per step.",
    "held_out_tokens": "Tokens at the end of the text to hold out.",
    "save_every": "Steps between saved states.",
    "seed": "Seed for the first routers and for the sequences of each step.",
  }
  overrides.define_flags(Settings, helps)


def check(settings: Settings) -> None:
  """Raises a ValueError if the settings do not fit the checkpoint or each other."""
  if not quantize_checkpoint.is_checkpoint(settings.checkpoint):
    raise ValueError(f"--checkpoint={settings.checkpoint} must be the folder of a checkpoint")
  config = app.load_config(settings.checkpoint)
  format = quantization.nested_format(config.expert_format)
  if config.bit_router:
    raise ValueError(f"{settings.checkpoint} has bit routers already: give what it was made from")
  if not format.base < settings.mean < format.bits:
    raise ValueError(
      f"--mean={settings.mean:g} must lie between the {format.base} and {format.bits} bits of the "
      "experts"
    )
  longest = min(config.context_length, config.sliding_window or config.context_length)
  limits = {
    **dict.fromkeys(("steps", "batch_size", "save_every"), (1, math.inf)),
    "window": (2, longest),
    "held_out_tokens": (settings.window, math.inf),
    "seed": (0, 2**32 - 1),
  }
  fine_tune.check_ranges(settings, limits)
  if not (settings.learning_rate > 0 and settings.weight > 0):
    raise ValueError("--learning_rate and --weight must be positive")
  fine_tune.check_folders(settings.checkpoint, settings.output)


def run(settings: Settings) -> None:
  """Trains and saves; see the module."""
  check(settings)
  tokens, held_out = fine_tune.split_text(settings, app.load_tokenizer(settings.checkpoint))
  output = pathlib.Path(settings.output)
  facts = dataclasses.asdict(settings) | {
    "checkpoint": str(resolved(app.checkpoint_path(settings.checkpoint))),
    "checkpoint_sha256": quantize_checkpoint.fingerprint(settings.checkpoint),
  }
  training_loop.check_output(output, facts)
  if (output / "model").exists():
    print(f"{output / 'model'} is already complete")
    return
  stored = app.load_config(settings.checkpoint)
  params, config = app.load_params(settings.checkpoint, "float32")
  params, config = bit_routing.add(params, config, jax.random.key(settings.seed))
  own = bit_router_training.Settings(
    settings.mean, settings.steps, settings.learning_rate, settings.weight
  )
  every = jnp.ones((settings.batch_size, settings.window), bool)

  def step(state, index):
    starts = np.random.default_rng((settings.seed, index)).integers(
      len(tokens) - settings.window + 1, size=settings.batch_size
    )
    batch = jnp.asarray(np.stack([tokens[s : s + settings.window] for s in starts]))
    state, values = bit_router_training.train_step(
      state, params, batch, every, config=config, settings=own
    )
    return state, values, batch.size

  @functools.partial(jax.jit, static_argnums=1)
  def score(params, config, routers, batch):
    return bit_router_training.divergence(params, config, routers, batch, jnp.ones_like(batch) > 0)

  def evaluate(state):
    found = [score(params, config, state.params, jnp.asarray(row[None])) for row in held_out]
    kl, bits = np.mean(found, axis=0)
    return {"kl": float(kl), "bits": float(bits)}

  state, metrics = training_loop.run(
    output,
    lambda: bit_router_training.start(params, own),
    step,
    evaluate,
    num_steps=settings.steps,
    log_every=10,
    save_every=settings.save_every,
    evaluate_every=settings.steps,
    evaluate_first=True,
  )
  before, after = (
    {name: record[name] for name in ("kl", "bits")}
    for record in metrics.records.values()
    if record["kind"] == "evaluation"
  )
  original, _ = checkpoint.load(settings.checkpoint)
  checkpoint.save(
    output / "model",
    bit_router_training.with_routers(original, state.params),
    stored.replace(bit_router=True),
    files=app.checkpoint_path(settings.checkpoint),
    provenance=checkpoint.load_provenance(settings.checkpoint)
    | {"bit_router": {"before": before, "after": after}},
  )
  print(
    f"{output / 'model'}: held-out KL {before['kl']:.5f} nats at {before['bits']:.3f} bits before "
    f"training, {after['kl']:.5f} at {after['bits']:.3f} after"
  )


def main(argv) -> None:
  del argv
  run(overrides.from_flags(Settings(FLAGS.checkpoint, FLAGS.text, FLAGS.output)))


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main, not_distributed="it trains on one device")


if __name__ == "__main__":
  program()
