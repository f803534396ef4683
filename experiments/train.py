"""Trains a small MoE on `wordmath` or on natural text.

    python -m experiments.train --config=wordmath_control --output=DIR

Configs are the files of `experiments/training/configs`. The output folder holds what
`training_loop` says, and in `model/` the final model with bfloat16 weights, tokenizer, and
provenance with the scores of these weights: a Hugging Face folder where the architecture has that
form, else a roe_jax checkpoint. The same command resumes an interrupted run.

    python -m experiments.train --dry_run --config=preset:mixtral-8x7b --mesh=expert:8 \\
        --num_devices=64 --accelerator=h200 --rematerialize --strategy=dense

prints what a training step would take on each device of a mesh, without one.
"""

import dataclasses
import math
import pathlib

from absl import flags, logging
import jax
import jax.numpy as jnp

from checkpoints_convert import save_hugging_face
from experiments.cli import app, overrides
from experiments.tasks import wordmath_tokenizer
from experiments.training import configs, planned_step, training_loop
from experiments.training.text_data import TextData
from experiments.training.wordmath_data import WordmathData
from roe_jax import checkpoint, costs, families, presets, training
from roe_jax.config import ModelConfig

FLAGS = flags.FLAGS
_FLAGS = {"num_steps": "steps", "noise_temperature": "tau"}

TOKENIZER = "tokenizer"  # Folder of the output that has it.

# Settings of the model that have a flag.
_OF_MODEL = {
  "expert_mass": "Router probability that a token's experts have together, at most the model's "
  "number of experts (XMoE); ",
  "sandwich_norm": "Whether what each block adds is normalized too (depth-scaled sandwich norm); ",
  "tiny_init": "Whether the initial weights are those of TinyInit; ",
}


def define_flags() -> None:
  flags.DEFINE_string("config", None, "Name of a config in experiments/training/configs.")
  flags.DEFINE_string("output", None, "Folder for the run.")
  flags.DEFINE_bool(
    "dry_run",
    False,
    "Only print the memory that a training step would need on each device, and what devices would "
    'send. --config may also be "preset:" and one of: ' + ", ".join(presets.PRESETS) + ".",
  )
  flags.DEFINE_bool(
    "compile",
    False,
    "Compile the step of --dry_run for as many host devices, which takes minutes, and print what "
    "the compiler says next to the estimates.",
  )
  flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "Dtype of parameters, moments and gradients for --dry_run. Default: the model's.",
  )
  app.define_planned_flags()
  app.define_mesh_flag()
  default = "the config's by default."
  overrides.define_flags(
    configs.TrainingConfig,
    {"seed": f"Seed; {default}", "batch_size": f"Sequences per step; {default}"},
    defaults=False,
  )
  problems = f"Size of the training set of wordmath, 0 for a stream of new problems; {default}"
  flags.DEFINE_integer("problems", None, problems)
  settings = {
    "num_steps": f"Number of steps; {default}",
    "learning_rate": f"Peak learning rate; {default}",
    "noise_temperature": f"Router temperature τ in training; {default}",
    "min_experts": "If above 0, each step draws how many experts per token are used, from this "
    f"number to the model's; {default}",
    "experts_drawn_by": f"Whether each layer draws a number of its own, or one batch; {default}",
    "members": f"Members with their own part of the experts and their own loss (E3); {default}",
    "balance_groups": "Groups of sequences with a load-balancing loss of their own, up to one per "
    f"sequence; {default}",
    "rematerialize": f"Whether gradients recompute what is inside a layer; {default}",
    "strategy": f"How experts are computed: {' or '.join(training.STRATEGIES)}; {default}",
  }
  overrides.define_flags(training.TrainSettings, settings, defaults=False, **_FLAGS)
  overrides.define_flags(
    ModelConfig, {name: text + default for name, text in _OF_MODEL.items()}, defaults=False
  )
  flags.mark_flags_as_required(["config"])


def apply_flags(config: configs.TrainingConfig) -> configs.TrainingConfig:
  """Returns the config with the overrides of the flags.

  Raises:
    ValueError: a value is out of range.
  """
  config = overrides.from_flags(config)
  if FLAGS.problems is not None:
    size = {"num_problems": FLAGS.problems or None}
    config = config.replace(data=overrides.changed(config.data, size))
  model = config.model
  given = {name: FLAGS[name].value for name in _OF_MODEL}
  model = model.replace(**{name: v for name, v in given.items() if v is not None})
  settings = overrides.from_flags(config.settings, **_FLAGS)
  if config.batch_size % settings.balance_groups:
    raise ValueError(
      f"--balance_groups={settings.balance_groups} must divide the batch of {config.batch_size}"
    )
  training.experts_of_step(model, settings, 0)  # refuses a number that the model does not have
  return config.replace(model=model, settings=settings)


def command() -> str:
  """Returns the command of this run, with a placeholder for the output folder."""
  settings = ("config", "steps", "seed", "batch_size", "problems", "learning_rate", "tau")
  settings += ("min_experts", "experts_drawn_by", "members", "balance_groups", *_OF_MODEL)
  settings += ("rematerialize", "strategy")
  given = [f"--{name}={FLAGS[name].value}" for name in settings if FLAGS[name].present]
  return " ".join(["python -m experiments.train", *given, "--output=DIR"])


def run(
  config: configs.TrainingConfig, output: pathlib.Path, data: TextData | WordmathData
) -> tuple[training.TrainState, dict]:
  """Trains from the last saved state in `output`, or from scratch.

  Returns:
    The final state and the last record of training metrics.
  """

  def init():
    return training.init_state(config.model, config.settings, jax.random.key(config.seed))

  make_batch = data.batches(config.batch_size, config.seed)

  def step_fn(state, index):
    batch = make_batch(index)
    state, values = training.train_step(state, batch, config=config.model, settings=config.settings)
    return state, values, int((batch.weights > 0).sum())

  state, metrics = training_loop.run(
    output,
    init,
    step_fn,
    lambda state: data.evaluate(state.params, config.model, config.seed),
    num_steps=config.settings.num_steps,
    log_every=config.log_every,
    save_every=config.save_every,
    evaluate_every=config.evaluate_every,
  )
  return state, metrics.last("training") or {}


def finish(
  config: configs.TrainingConfig,
  output: pathlib.Path,
  data: TextData | WordmathData,
  state: training.TrainState,
  last: dict,
  command: str,
) -> None:
  """Writes `output/model` with bfloat16 weights and their scores."""
  stored = jax.tree.map(lambda w: w.astype(jnp.bfloat16), state.params)
  rounded = jax.tree.map(lambda w: w.astype(config.model.dtype), stored)
  scores = data.evaluate(rounded, config.model, config.seed)
  files = output / TOKENIZER
  wordmath_tokenizer.save_tokenizer(data.tokenizer, str(files), config.model.context_length)
  try:
    families.to_hugging_face(config.model)
    save = save_hugging_face
  except ValueError:  # it has no such form
    save = checkpoint.save
  save(
    output / "model",
    stored,
    config.model.replace(dtype="bfloat16"),
    files=files,
    provenance={
      "command": command,
      "config": dataclasses.asdict(config),
      **data.origin,
      "steps": int(state.step),
      "tokens": last["tokens"],
      "seconds": last["seconds"],
      "machine": training_loop.describe_machine(),
      "jax": jax.__version__,
      "scores": {"of": f"the stored weights run in {config.model.dtype}", **scores},
    },
  )
  print(f"{output / 'model'}: " + ", ".join(f"{k} {v:.4g}" for k, v in scores.items()))


def plan_step() -> None:
  """Prints what --dry_run asks for.

  Raises:
    ValueError: a flag is out of range, or the mesh does not fit the model.
  """
  if FLAGS.compile:
    jax.config.update("jax_platforms", "cpu")
    sizes = app.parse_mesh(FLAGS.mesh or "data:1")
    devices = FLAGS.num_devices or math.prod(sizes.values())
    jax.config.update("jax_num_cpu_devices", max(1, devices))
  name = FLAGS.config
  accelerator = app.planned_accelerator()
  memory = costs.ACCELERATORS[accelerator].memory if accelerator else None
  if name.startswith(app.PRESET):
    config = configs.TrainingConfig(app.load_config(name), training.TrainSettings(num_steps=1000))
  else:
    config = configs.load(name)
  if FLAGS.dtype is not None:
    config = config.replace(model=config.model.replace(dtype=FLAGS.dtype))
  mesh = app.planned_mesh(config.model, memory)
  if name.startswith(app.PRESET):
    config = config.replace(batch_size=mesh.size)
  config = apply_flags(config)
  length = FLAGS.length or min(2048, config.model.context_length)
  plan = planned_step.Plan(config.model, config.settings, config.batch_size, length, accelerator)
  compiled = planned_step.compile_step(plan, mesh) if FLAGS.compile else None
  print(planned_step.report(plan, mesh, compiled))


def main(argv) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  only = ("compile", "dtype", "mesh", *app.PLANNED_FLAGS)
  app.refuse_idle(not FLAGS.dry_run, only, "applies to --dry_run only: add it")
  if FLAGS.dry_run:
    plan_step()
    return
  if FLAGS.output is None:
    raise ValueError("--output is missing: give the folder of the run, or --dry_run")
  output = pathlib.Path(FLAGS.output)
  config = apply_flags(configs.load(FLAGS.config))
  data = config.data.load(config.model, output / TOKENIZER)
  training_loop.check_output(output, dataclasses.asdict(config) | data.origin)
  if (output / "model").exists():
    print(f"{output / 'model'} is already complete")
    return
  if (size := data.tokenizer.get_vocab_size()) != config.model.vocab_size:
    raise ValueError(
      f"the tokenizer has {size} tokens, but the model of {FLAGS.config} has "
      f"{config.model.vocab_size}: set vocab_size in the config"
    )
  state, last = run(config, output, data)
  finish(config, output, data, state, last, command())


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main, not_distributed="it trains small models on one device")


if __name__ == "__main__":
  program()
