"""Fine-tunes a carved model, or another Mixture-of-Experts model, on a text.

    python -m experiments.fine_tune --checkpoint=carved --text=TEXT.txt --output=tuned

Trains low-rank adapters (LoRA) of the layers' matrices, the router, and scales of the gates of
carved experts: 1 + u p, where p is the router's softmax and u a learned number per expert, zero at
first (CMoE, arXiv 2502.04416). The adapters are merged at the end, so that the result is an
ordinary checkpoint. Prints the perplexity of the end of the text, which is not trained on, before
and after.

The output folder holds what `training_loop` says, and the checkpoint in `model/`. The same command
resumes an interrupted run.
"""

import dataclasses
import hashlib
import math
import pathlib
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from checkpoints_convert import carve_checkpoint, quantize_checkpoint
from experiments.cli import app, overrides, text_files
from experiments.training import low_rank, training_loop
from roe_jax import checkpoint, scoring, training
from roe_jax.checkpoint_folder import resolved
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.routers import NONE
from roe_jax.text.tokenizer import Tokenizer

FLAGS = flags.FLAGS
LOG_EVERY = 10


@dataclasses.dataclass(frozen=True)
class Settings:
  """The flags' values; see `define_flags`."""

  checkpoint: str
  text: str
  output: str
  steps: int = 100
  rank: int = 8
  learning_rate: float = 3e-3
  gate_learning_rate: float = 3e-2
  gate_scales: bool | None = None
  train_router: bool = True
  window: int = 256
  batch_size: int = 4
  held_out_tokens: int = 2048
  evaluate_every: int | None = None
  save_every: int = 25
  seed: int = 0

  def facts(self) -> dict[str, Any]:
    """Returns the values that the result depends on, except the model and the text."""
    others = ("checkpoint", "text", "output", "evaluate_every", "save_every")
    return {n: v for n, v in dataclasses.asdict(self).items() if n not in others}


def define_flags() -> None:
  required: dict[str, Any] = dict(default=None, required=True)
  flags.DEFINE_string("checkpoint", help="Model to fine-tune: a carved checkpoint.", **required)
  flags.DEFINE_string("text", help="Text file to train on; its end is held out.", **required)
  flags.DEFINE_string("output", help="Folder for the run.", **required)
  helps = {
    "steps": "Number of steps.",
    "rank": "Rank of the adapters; 0 for none.",
    "learning_rate": "Peak learning rate of the adapters and the router.",
    "gate_learning_rate": "Peak learning rate of the gates' scales.",
    "gate_scales": "Train scales of the gates. Default: if the gates are one.",
    "train_router": "Train the router.",
    "window": "Tokens per sequence.",
    "batch_size": "Sequences per step.",
    "held_out_tokens": "Tokens at the end of the text to hold out.",
    "evaluate_every": "Steps between evaluations. Default: at the end only.",
    "save_every": "Steps between saved states.",
    "seed": "Seed for the adapters and for the sequences of each step.",
  }
  overrides.define_flags(Settings, helps)


def check(settings: Settings, config: ModelConfig) -> None:
  """Checks the settings before any work.

  Raises:
    ValueError: one is out of range, or the model cannot be fine-tuned.
  """
  name = settings.checkpoint
  if config.router == NONE:
    raise ValueError(
      f"{name} is dense: carve experts out of it first, with checkpoints_convert --carve"
    )
  if config.formats:
    raise ValueError(
      f"{name} is quantized ({config.formats}) and cannot be trained: fine-tune the checkpoint "
      "that it was quantized from, then quantize the result"
    )
  if settings.gate_scales and not config.unit_gates:
    raise ValueError(
      f"--gate_scales is for gates of one, but those of {name} are its router's softmax: leave it "
      "out"
    )
  limits = {
    "steps": (1, math.inf),
    "rank": (0, config.d_model),
    "window": (2, min(config.context_length, config.sliding_window or config.context_length)),
    "batch_size": (1, math.inf),
    "held_out_tokens": (settings.window, math.inf),
    "evaluate_every": (1, math.inf),
    "save_every": (1, math.inf),
    "seed": (0, 2**32 - 1),
  }
  check_ranges(settings, limits)
  scales = settings.gate_scales is not False and config.unit_gates
  if not (settings.rank or settings.train_router or scales):
    raise ValueError("--rank=0 without the router and scales trains nothing: give a --rank")
  for field in ("learning_rate", "gate_learning_rate"):
    if not 0 < getattr(settings, field) < math.inf:
      raise ValueError(f"--{field} must be positive, got {getattr(settings, field)}")
  check_folders(name, settings.output)


def check_ranges(settings: Any, limits: dict[str, tuple[float, float]]) -> None:
  """Raises a ValueError if a flag's value is outside its range; None always fits."""
  for field, (least, most) in limits.items():
    value = getattr(settings, field)
    if value is not None and not least <= value <= most:
      allowed = f"at least {least}" if most == math.inf else f"between {least} and {most}"
      raise ValueError(f"--{field} must be {allowed}, got {value}")


def check_folders(name: str, output: str) -> None:
  """Raises a ValueError if the output and the checkpoint's folder are within each other."""
  source, target = resolved(app.checkpoint_path(name)), resolved(output)
  if source == target or target in source.parents or source in target.parents:
    raise ValueError(
      f"--output={output} and --checkpoint={name} are within each other: give another --output"
    )


def split_text(settings: Any, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
  """Returns the training tokens `[N]`, and the held-out windows `[B, T]` at the end of the text.

  The settings have `text`, `held_out_tokens`, `window` and `batch_size`.

  Raises:
    FileNotFoundError, ValueError: there is no such text, or it is too short.
  """
  text = text_files.read(settings.text)
  tokens = np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int32)
  held_out = settings.held_out_tokens // settings.window * settings.window
  least = held_out + settings.batch_size * settings.window
  if len(tokens) < least:
    raise ValueError(
      f"{settings.text} has {len(tokens)} tokens, but --held_out_tokens and one batch take "
      f"{least}: give a longer text"
    )
  return tokens[:-held_out], tokens[-held_out:].reshape(-1, settings.window)


def load(settings: Settings) -> tuple[Params, ModelConfig]:
  """Loads the model in float32, with scales of zero where gates of one are to be scaled."""
  params, config = app.load_params(settings.checkpoint, "float32")
  if settings.gate_scales is False or not config.unit_gates or config.gate_scales:
    return params, config
  config = config.replace(gate_scales=True)
  zeros = jnp.zeros((config.num_layers, config.num_experts))
  return params.replace(layers=params.layers.replace(gate_scales=zeros)), config


def perplexity(params: Params, config: ModelConfig, windows_BxT: np.ndarray) -> float:
  scores = scoring.score(params, config, windows_BxT.tolist(), batch_size=4)
  return float(np.exp(-np.mean([s.log_probs.mean(dtype=np.float64) for s in scores.sequences])))


def run_training(
  settings: Settings,
  params: Params,
  config: ModelConfig,
  tokens_N: np.ndarray,
  held_out_BxT: np.ndarray,
) -> tuple[Params, training_loop.Metrics]:
  """Trains and returns the float32 parameters, with merged adapters, and the metrics."""
  whole = {low_rank.GATE_SCALES: config.gate_scales and settings.gate_scales is not False}
  whole |= {"router": settings.train_router}
  whole |= {"router_bias": settings.train_router and config.router_bias}
  optimization = training.TrainSettings(
    settings.steps,
    settings.learning_rate,
    warmup_steps=max(1, settings.steps // 20),
    weight_decay=0.0,
    strategy="dense",
  )
  options: dict[str, Any] = dict(
    settings=optimization, gate_learning_rate=settings.gate_learning_rate
  )

  def init():
    key = jax.random.key(settings.seed)
    names = [name for name, trained in whole.items() if trained]
    tuned: Any = low_rank.init(params, config, settings.rank, names, key)
    opt_state = low_rank.optimizer(**options).init(tuned)
    return training.TrainState(jnp.zeros((), jnp.int32), tuned, opt_state)

  def step_fn(state, step):
    starts = np.random.default_rng((settings.seed, step)).integers(
      len(tokens_N) - settings.window + 1, size=settings.batch_size
    )
    batch = np.stack([tokens_N[start : start + settings.window] for start in starts])
    state, values = low_rank.train_step(state, params, jnp.asarray(batch), config=config, **options)
    return state, values, batch.size

  def merged(state):
    return params.replace(layers=jax.jit(low_rank.merge)(params.layers, state.params))

  state, metrics = training_loop.run(
    pathlib.Path(settings.output),
    init,
    step_fn,
    lambda state: {"perplexity": perplexity(merged(state), config, held_out_BxT)},
    num_steps=settings.steps,
    log_every=LOG_EVERY,
    save_every=settings.save_every,
    evaluate_every=settings.evaluate_every or settings.steps,
    evaluate_first=True,
  )
  return merged(state), metrics


def save(
  settings: Settings, params: Params, config: ModelConfig, metrics: training_loop.Metrics
) -> None:
  """Writes the checkpoint in the dtype of the source, and prints what was gained."""
  source = app.checkpoint_path(settings.checkpoint)
  target = pathlib.Path(settings.output) / "model"
  config = config.replace(dtype=app.load_config(settings.checkpoint).dtype)
  own: dict[str, Any] = {"source": settings.checkpoint}
  if quantize_checkpoint.is_checkpoint(str(source)):
    own = checkpoint.load_provenance(source)
  scores = [r["perplexity"] for r in metrics.records.values() if r["kind"] == "evaluation"]
  seconds = (metrics.last("training") or {})["seconds"]
  facts = {
    **settings.facts(),
    "seconds": seconds,
    "machine": training_loop.describe_machine(),
    "held_out_perplexity": {"before": scores[0], "after": scores[-1]},
  }
  checkpoint.save(
    target,
    jax.tree.map(lambda w: w.astype(config.dtype), params),
    config,
    files=source,
    provenance=own | {carve_checkpoint.FINE_TUNING: facts},
  )
  print(
    f"{target}: held-out perplexity {scores[0]:.2f} before and {scores[-1]:.2f} after "
    f"{settings.steps} steps in {seconds / 60:.1f} minutes, "
    f"{(scores[0] - scores[-1]) / (seconds / 60):.2f} less per minute"
  )


def run(settings: Settings) -> None:
  """Fine-tunes and saves; see the module."""
  config = app.load_config(settings.checkpoint)
  check(settings, config)
  tokens, held_out = split_text(settings, app.load_tokenizer(settings.checkpoint))
  source, output = app.checkpoint_path(settings.checkpoint), pathlib.Path(settings.output)
  facts = {"checkpoint": str(resolved(source)), **settings.facts()}
  if quantize_checkpoint.is_checkpoint(str(source)):
    facts["checkpoint_sha256"] = quantize_checkpoint.fingerprint(str(source))
  facts["text_sha256"] = hashlib.sha256(tokens.tobytes() + held_out.tobytes()).hexdigest()
  training_loop.check_output(output, facts)
  if (output / "model").exists():
    print(f"{output / 'model'} is already complete")
    return
  params, config = load(settings)
  params, metrics = run_training(settings, params, config, tokens, held_out)
  save(settings, params, config, metrics)


def main(argv) -> None:
  del argv
  run(overrides.from_flags(Settings(FLAGS.checkpoint, FLAGS.text, FLAGS.output)))


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main, not_distributed="it trains on one device")


if __name__ == "__main__":
  program()
