"""Quantizes the experts and projections of a roe_jax checkpoint."""

import hashlib
import json
import pathlib

import numpy as np

from checkpoints_convert import carve_checkpoint, hub
from checkpoints_convert.common import ConversionError, write_pieces
from checkpoints_convert.expert_formats import recode
from roe_jax import bit_plans, checkpoint, compensation, quantization
from roe_jax.checkpoint_folder import resolved
from roe_jax.config import ModelConfig
from roe_jax.text.tokenizer import Tokenizer


def is_checkpoint(source: str) -> bool:
  """Whether the source is a roe_jax checkpoint, as opposed to a Hugging Face model."""
  return (pathlib.Path(source).expanduser() / checkpoint.CONFIG_FILE).is_file()


def check_format(quantize_experts: str) -> None:
  """Raises a ValueError if this is no format to quantize experts to."""
  if quantize_experts == "mxfp4":
    raise ConversionError(
      "--quantize_experts writes int8, int4 or nested:BASE-BITS; MXFP4 is kept with --keep_mxfp4"
    )
  quantization.find(quantize_experts)


def target_config(
  source: str,
  dtype: str,
  quantize_experts: str | None,
  keep_mxfp4: bool = False,
  quantize_projections: str | None = None,
) -> ModelConfig:
  """Returns the config of what `convert` writes.

  Raises:
    ConversionError, ValueError: the matrices cannot be stored in the requested formats.
  """
  stored = checkpoint.load_config(source)
  if stored.expert_format not in (None, "mxfp4") or stored.projection_format:
    raise ConversionError(
      f"{source} is quantized already ({stored.formats}): quantize the checkpoint or the Hugging "
      "Face model that it was made from"
    )
  if dtype != "source":
    stored = stored.replace(dtype=dtype)
  return hub.target_config(source, stored, quantize_experts, keep_mxfp4, quantize_projections)


def convert(
  source: str,
  target: str,
  *,
  dtype: str = "source",
  quantize_experts: str | None = None,
  keep_mxfp4: bool = False,
  quantize_projections: str | None = None,
  bits_plan: str | None = None,
  compensate: bool = False,
  calibration: str | None = None,
  calibration_tokens: int = carve_checkpoint.TOKENS,
  overwrite: bool = False,
) -> ModelConfig:
  """Quantizes the matrices piece by piece and returns the config of what was written.

  An interrupted conversion resumes after the last finished piece when it is called again. The
  source is a checkpoint; for the other arguments see `convert_from_hugging_face`.

  Args:
    bits_plan: a rule or a JSON file, for a nested format; see `make_plan`.
    compensate: whether to round to a nested format with `compensation`, on the calibration text;
      needs memory for the whole model.
    calibration: the text file that rules and compensation look at.
    calibration_tokens: how many of its tokens.

  Raises:
    ConversionError, ValueError: the matrices cannot be stored in the requested formats.
    FileNotFoundError: the source is not a complete checkpoint.
    FileExistsError: the target exists.
  """
  checkpoint.check_target(target, overwrite, checkpoint.MANIFEST_FILE, source)
  config = target_config(source, dtype, quantize_experts, keep_mxfp4, quantize_projections)
  stored, plan = checkpoint.load_config(source), None
  if bits_plan is not None:
    config, plan = make_plan(source, config, bits_plan, calibration, calibration_tokens)
  moments = None
  if compensate:
    quantization.nested_format(config.expert_format)
    sequences = _sequences(source, config, "--compensate", calibration, calibration_tokens)
    params, own_config = checkpoint.load(source)
    moments = compensation.second_moments(params, own_config, sequences)
    del params
  provenance = checkpoint.load_provenance(source) | {
    "quantized_from": source,
    "dtype": config.dtype,
    "expert_format": config.expert_format,
    "projection_format": config.projection_format,
    **({"compensated": True} if compensate else {}),
  }
  if plan is not None:
    provenance |= {"bits_plan": bits_plan, "mean_bits": float(plan.mean()), "bits": plan.tolist()}
  writer = checkpoint.Writer(
    target,
    config,
    files=source,
    provenance=provenance,
    fingerprint=fingerprint(source)
    + ("" if plan is None else hashlib.sha256(plan.tobytes()).hexdigest())
    + ("" if moments is None else hashlib.sha256(moments["gate_up"].tobytes()).hexdigest()),
    pieces=checkpoint.load_pieces(source),
    overwrite=overwrite,
  )

  def read(names):
    for piece, arrays in checkpoint.iterate_pieces(source, names):
      shapes = checkpoint.piece_shapes(config, piece)
      rows = slice(piece.start, piece.stop)
      of_piece = moments and {name: values[rows] for name, values in moments.items()}
      arrays = recode(arrays, stored, config, None if plan is None else plan[rows], of_piece)
      yield piece, {n: a.astype(shapes[n].dtype, copy=False) for n, a in arrays.items()}
      del arrays  # or they would stay in memory while the next piece is read

  write_pieces(writer, read, "quantizing")
  return config


def make_plan(
  source: str, config: ModelConfig, name: str, calibration: str | None, num_tokens: int
) -> tuple[ModelConfig, np.ndarray | None]:
  """Makes the plan of bits of a checkpoint's experts.

  A plan with one number of bits is a format of so many bits. Rules that look at weights or text
  need memory for the whole model.

  Args:
    source: the checkpoint.
    config: that of the target, with a nested format.
    name: a JSON file, or a rule; see `bit_plans`.
    calibration: a text file, for rules that look at text.
    num_tokens: how many of its tokens.

  Returns:
    The config, whose format has the bits that the plan uses; and the plan `[L, E]`, or None.

  Raises:
    ConversionError, ValueError: the plan, the rule, or the text does not fit.
  """
  format = quantization.nested_format(config.expert_format)
  path = pathlib.Path(name).expanduser()
  if path.is_file():
    plan = bit_plans.read(path, config, format)
  else:
    rule = bit_plans.find(name)
    bit_plans.allocate(np.zeros((1, 1)), rule.mean, format)  # checks the mean
    sequences = []
    if rule.needs_text:
      sequences = _sequences(source, config, f"--bits_plan={name}", calibration, num_tokens)
    evidence = bit_plans.Evidence(*checkpoint.load(source), sequences)
    plan = bit_plans.allocate(rule.scores(evidence), rule.mean, format)
  config = config.replace(expert_format=format.first(int(plan.max())).name)
  if plan.min() == plan.max():
    return config, None
  return config.replace(expert_bits=tuple(map(tuple, plan.tolist()))), plan


def _sequences(source, config, what, calibration, num_tokens):
  """Returns the tokens of the calibration text as windows."""
  if not calibration:
    raise ConversionError(f"{what} looks at text: give --calibration=TEXT.txt")
  tokenizer = Tokenizer.load(source)
  return carve_checkpoint.calibration_tokens(
    tokenizer, str(calibration), num_tokens, config
  ).tolist()


def describe_plan(plan: np.ndarray, config: ModelConfig) -> str:
  """Returns the mean bits of a plan, and its bytes and those of all planes of the format."""
  format = quantization.nested_format(config.expert_format)
  own = bit_plans.num_bytes(plan, config, format)
  whole = bit_plans.num_bytes(np.full_like(plan, format.bits), config, format)
  return (
    f"bits of experts: {plan.min()} to {plan.max()}, mean {plan.mean():.4g}; {own:,} bytes of "
    f"planes and scales are stored, {whole:,} without the plan"
  )


def fingerprint(source: str) -> str:
  """Returns a hash of a checkpoint that changes with its manifest or the manifest's time."""
  manifest = pathlib.Path(source) / checkpoint.MANIFEST_FILE
  facts = [str(resolved(manifest)), manifest.stat().st_mtime_ns, manifest.read_text("utf-8")]
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
