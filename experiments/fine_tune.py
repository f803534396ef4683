"""Fine-tunes a carved model, or another Mixture-of-Experts model, on a text.

    python -m experiments.fine_tune --checkpoint=carved --text=TEXT.txt --output=tuned

Trains low-rank adapters (LoRA) of all matrices of the layers, and the gates of carved experts:
1 + u p, where p is the router's softmax and u a learned scale of each expert, zero at first
(CMoE, arXiv 2502.04416). The adapters are merged at the end, so that the result is an ordinary
checkpoint. Prints the perplexity of the end of the text, which is not trained on, before and after.

The output folder holds what `training_loop` says, and the checkpoint in `model/`. The same command
resumes an interrupted run.
"""

import hashlib
import math
import pathlib
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert import carve_checkpoint, quantize_checkpoint
from experiments.cli import app, text_files
from experiments.training import low_rank, training_loop
from roe_jax import checkpoint, scoring, training
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.routers import NONE
from roe_jax.text.tokenizer import Tokenizer

FLAGS = flags.FLAGS
# What a run depends on, in addition to the model and the text.
SETTINGS = (
  "steps",
  "rank",
  "learning_rate",
  "gate_learning_rate",
  low_rank.GATE_SCALES,
  "train_router",
  "window",
  "batch_size",
  "held_out_tokens",
  "seed",
)


def define_flags() -> None:
  flags.DEFINE_string(
    "checkpoint", None, "Model to fine-tune, such as a carved checkpoint.", required=True
  )
  flags.DEFINE_string("text", None, "Text file to train on; its end is held out.", required=True)
  flags.DEFINE_string("output", None, "Folder for the run.", required=True)
  flags.DEFINE_integer("steps", 100, "Number of steps.")
  flags.DEFINE_integer("rank", 8, "Rank of the adapters.")
  flags.DEFINE_float("learning_rate", 1e-3, "Peak learning rate of the adapters.")
  flags.DEFINE_float("gate_learning_rate", 1e-2, "Peak learning rate of the gates' scales.")
  flags.DEFINE_bool(low_rank.GATE_SCALES, True, "Learn scales of the gates; of carved models only.")
  flags.DEFINE_bool("train_router", True, "Train the router too.")
  flags.DEFINE_integer("window", 256, "Tokens per sequence.")
  flags.DEFINE_integer("batch_size", 4, "Sequences per step.")
  flags.DEFINE_integer("held_out_tokens", 2048, "Tokens at the end of the text to hold out.")
  flags.DEFINE_integer("save_every", 25, "Steps between saved states.")
  flags.DEFINE_integer("seed", 0, "Seed for the adapters and for the order of the text.")


def check_flags(config: ModelConfig) -> None:
  """Checks the flags before any work.

  Raises:
    ValueError: one is out of range, or the model cannot be fine-tuned.
  """
  if config.router == NONE:
    raise ValueError(
      f"{FLAGS.checkpoint} is dense: carve experts out of it first (checkpoints_convert --carve)"
    )
  if config.expert_format is not None:
    raise ValueError(
      f"the experts of {FLAGS.checkpoint} are in {config.expert_format}, which cannot be trained: "
      "fine-tune the checkpoint that they were quantized from, then quantize the result"
    )
  if FLAGS[low_rank.GATE_SCALES].present and FLAGS.gate_scales and not config.unit_gates:
    raise ValueError(
      f"--gate_scales is for gates of one, but those of {FLAGS.checkpoint} come from its router: "
      "leave it out"
    )
  longest = min(config.context_length, config.sliding_window or config.context_length)
  limits = {
    "steps": (1, None),
    "rank": (1, config.d_model),
    "window": (2, longest),
    "batch_size": (1, None),
    "held_out_tokens": (FLAGS.window, None),
    "save_every": (1, None),
    "seed": (0, 2**32 - 1),
  }
  for name, (least, most) in limits.items():
    if not least <= FLAGS[name].value <= (most or math.inf):
      allowed = f"at least {least}" if most is None else f"between {least} and {most}"
      raise ValueError(f"--{name} must be {allowed}, got {FLAGS[name].value}")
  for name in ("learning_rate", "gate_learning_rate"):
    if not 0 < FLAGS[name].value < math.inf:
      raise ValueError(f"--{name} must be positive and finite, got {FLAGS[name].value}")
  source = app.checkpoint_path(FLAGS.checkpoint).resolve()
  output = pathlib.Path(FLAGS.output).resolve()
  if source == output or output in source.parents or source in output.parents:
    raise ValueError(
      f"--output={FLAGS.output} and --checkpoint={FLAGS.checkpoint} contain each other: give "
      "another --output"
    )


def split_text(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
  """Returns the training tokens `[N]`, and the held-out windows `[B, T]` at the end of the text.

  Raises:
    FileNotFoundError, ValueError: there is no such text, or it is too short.
  """
  tokens = np.int32(tokenizer.encode(text_files.read(FLAGS.text), add_special_tokens=False))
  held_out = FLAGS.held_out_tokens // FLAGS.window * FLAGS.window
  least = held_out + FLAGS.batch_size * FLAGS.window
  if len(tokens) < least:
    raise ValueError(
      f"{FLAGS.text} has {len(tokens)} tokens, but --held_out_tokens and one batch take {least}: "
      "give a longer text"
    )
  return tokens[:-held_out], tokens[-held_out:].reshape(-1, FLAGS.window)


def with_gate_scales(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
  """Returns a carved model with scales of zero, which change nothing; others as they are."""
  if not FLAGS.gate_scales or not config.unit_gates or config.gate_scales:
    return params, config
  config = config.replace(gate_scales=True)
  zeros = jnp.zeros((config.num_layers, config.num_experts))
  return params.replace(layers=params.layers.replace(gate_scales=zeros)), config


def perplexity(params: Params, config: ModelConfig, windows_BxT: np.ndarray) -> float:
  scores = scoring.score(params, config, windows_BxT.tolist(), batch_size=FLAGS.batch_size)
  return float(np.exp(-np.mean([s.log_probs.mean(dtype=np.float64) for s in scores.sequences])))


def fine_tune(
  params: Params, config: ModelConfig, tokens_N: np.ndarray, held_out_BxT: np.ndarray
) -> tuple[Params, training_loop.Metrics]:
  """Trains as the flags say and returns the float32 parameters with merged adapters."""
  settings = training.TrainSettings(
    FLAGS.steps,
    FLAGS.learning_rate,
    warmup_steps=max(1, FLAGS.steps // 20),
    weight_decay=0.0,
    strategy="dense",
  )
  whole = [low_rank.GATE_SCALES] if config.gate_scales and FLAGS.gate_scales else []
  if FLAGS.train_router:
    whole += ["router", "router_bias"] if config.router_bias else ["router"]
  gate_rate = FLAGS.gate_learning_rate

  def init():
    tuned = low_rank.init(params, config, FLAGS.rank, whole, jax.random.key(FLAGS.seed))
    opt_state = low_rank.optimizer(settings, gate_rate).init(tuned)
    return training.TrainState(jnp.zeros((), jnp.int32), tuned, opt_state)

  def step_fn(state, step):
    starts = np.random.default_rng((FLAGS.seed, step)).integers(
      0, len(tokens_N) - FLAGS.window + 1, FLAGS.batch_size
    )
    batch = np.stack([tokens_N[start : start + FLAGS.window] for start in starts])
    options = dict(config=config, settings=settings, gate_learning_rate=gate_rate)
    state, values = low_rank.train_step(state, params, jnp.asarray(batch), **options)
    return state, values, batch.size

  def merged(state):
    return params.replace(layers=jax.jit(low_rank.merge)(params.layers, state.params))

  state, metrics = training_loop.run(
    pathlib.Path(FLAGS.output),
    init,
    step_fn,
    lambda state: {"perplexity": perplexity(merged(state), config, held_out_BxT)},
    num_steps=FLAGS.steps,
    log_every=10,
    save_every=FLAGS.save_every,
    evaluate_every=FLAGS.steps,
    evaluate_first=True,
  )
  return merged(state), metrics


def save(
  params: Params, config: ModelConfig, metrics: training_loop.Metrics, held_out_BxT: np.ndarray
) -> None:
  """Writes the checkpoint with the dtype of the source, and prints what was gained."""
  source, target = app.checkpoint_path(FLAGS.checkpoint), pathlib.Path(FLAGS.output) / "model"
  stored = config.replace(dtype=app.load_config(FLAGS.checkpoint).dtype)
  rounded = jax.tree.map(lambda w, like: w.astype(like.dtype), params, params_lib.abstract(stored))
  before = metrics.records[0]["perplexity"]
  after = perplexity(jax.tree.map(lambda w: w.astype(jnp.float32), rounded), config, held_out_BxT)
  trained = metrics.last("training") or {}
  own: dict[str, Any] = {"source": FLAGS.checkpoint}
  if quantize_checkpoint.is_checkpoint(str(source)):
    own = checkpoint.load_provenance(source)
  facts = {
    **settings(),
    "seconds": trained["seconds"],
    "machine": training_loop.describe_machine(),
    "held_out_perplexity": {"before": before, "after": after},
  }
  checkpoint.save(
    target, rounded, stored, files=source, provenance=own | {carve_checkpoint.FINE_TUNING: facts}
  )
  minutes = trained["seconds"] / 60
  gain = (before - after) / minutes
  print(
    f"{target}: perplexity of {held_out_BxT.size} held-out tokens {before:.2f} before, {after:.2f} "
    f"after {FLAGS.steps} steps in {minutes:.1f} minutes: {gain:.2f} per minute"
  )


def settings() -> dict[str, Any]:
  """Returns the flags that the result depends on."""
  return {name: FLAGS[name].value for name in SETTINGS}


def main(argv) -> None:
  del argv
  config = app.load_config(FLAGS.checkpoint)
  check_flags(config)
  tokens, held_out = split_text(app.load_tokenizer(FLAGS.checkpoint))
  output = pathlib.Path(FLAGS.output)
  source = app.checkpoint_path(FLAGS.checkpoint)
  facts = {"checkpoint": str(source.resolve()), **settings()}
  facts["text_sha256"] = hashlib.sha256(np.concatenate([tokens, held_out.ravel()])).hexdigest()
  if quantize_checkpoint.is_checkpoint(str(source)):
    facts["fingerprint"] = quantize_checkpoint.fingerprint(str(source))
  training_loop.check_output(output, facts)
  if (output / "model").exists():
    print(f"{output / 'model'} is already complete")
    return
  params, config = with_gate_scales(*app.load_params(FLAGS.checkpoint, "float32"))
  params, metrics = fine_tune(params, config, tokens, held_out)
  save(params, config, metrics, held_out)


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main, not_distributed="it trains on one device")


if __name__ == "__main__":
  program()
