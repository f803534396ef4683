"""The command line: flags, and errors as one sentence."""

import re
import sys

from absl import flags
import jax

from checkpoints_convert import quantize_checkpoint, summary
from checkpoints_convert.common import ConversionError
from checkpoints_convert.from_hugging_face import convert_from_hugging_face
from checkpoints_convert.to_hugging_face import convert_to_hugging_face
from roe_jax import checkpoint

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags of the program in `values`."""
  flags.DEFINE_string(
    "source",
    None,
    "What to convert: a Hugging Face folder or a hub name (org/model); "
    "with --to_hugging_face a roe_jax checkpoint, with --quantize_experts any of these.",
    required=True,
    flag_values=values,
  )
  flags.DEFINE_string("target", None, "The folder to write.", flag_values=values)
  flags.DEFINE_enum(
    "dtype",
    "source",
    ["source", "float32", "bfloat16"],
    "Of the parameters that are written; source keeps them as they are.",
    flag_values=values,
  )
  flags.DEFINE_enum(
    "quantize_experts",
    None,
    ["int8", "int4"],
    "Round the experts' matrices to this many bits; all else stays in --dtype.",
    flag_values=values,
  )
  flags.DEFINE_bool(
    "keep_mxfp4",
    False,
    "Keep experts that come in MXFP4 (GPT-OSS) as they are; they are decoded to --dtype otherwise.",
    flag_values=values,
  )
  flags.DEFINE_bool(
    "dry_run",
    False,
    "Check the source, print what would be written, and write nothing.",
    flag_values=values,
  )
  flags.DEFINE_bool(
    "to_hugging_face",
    False,
    "Convert a checkpoint back to a Hugging Face folder.",
    flag_values=values,
  )
  flags.DEFINE_string("revision", None, "Branch, tag or commit of a hub name.", flag_values=values)
  flags.DEFINE_bool("overwrite", False, "Replace the target if it exists.", flag_values=values)
  flags.DEFINE_string(
    "max_shard_size",
    "5GB",
    "How large a safetensors file may become, with --to_hugging_face.",
    flag_values=values,
  )


def run(values: flags.FlagValues) -> int:
  """Does what the flags say; returns the exit code."""
  try:
    _convert(values)
  except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("interrupted; the same command goes on after the last finished piece", file=sys.stderr)
    return 130
  return 0


def _convert(values: flags.FlagValues) -> None:
  if not values.target and not values.dry_run:
    raise ConversionError("--target is missing: the folder to write (or give --dry_run)")
  max_shard_bytes = parse_size(values.max_shard_size)
  formats = dict(quantize_experts=values.quantize_experts, keep_mxfp4=values.keep_mxfp4)
  if values.to_hugging_face and any(formats.values()):
    raise ConversionError(
      "--quantize_experts and --keep_mxfp4 are about the checkpoint that is written, and "
      "--to_hugging_face writes none: leave them out"
    )
  from_checkpoint = values.quantize_experts and quantize_checkpoint.is_checkpoint(values.source)
  if values.dry_run and values.to_hugging_face:
    config = checkpoint.load_config(values.source)
    if values.dtype != "source":
      config = config.replace(dtype=values.dtype)
    print(f"source: {values.source} (a roe_jax checkpoint)\n{summary.describe(config)}")
    return
  if values.dry_run and from_checkpoint:
    config = quantize_checkpoint.target_config(values.source, values.dtype, **formats)
    print(f"source: {values.source} (a roe_jax checkpoint)\n{summary.describe(config)}")
    return
  if values.dry_run:
    print(summary.describe_source(values.source, values.dtype, values.revision, **formats))
    return
  # Nothing here computes: without this, JAX would take an accelerator's memory.
  jax.config.update("jax_platforms", "cpu")
  if values.to_hugging_face:
    config = convert_to_hugging_face(
      values.source,
      values.target,
      dtype=values.dtype,
      overwrite=values.overwrite,
      max_shard_bytes=max_shard_bytes,
    )
  elif from_checkpoint:
    config = quantize_checkpoint.convert(
      values.source, values.target, dtype=values.dtype, overwrite=values.overwrite, **formats
    )
  else:
    config = convert_from_hugging_face(
      values.source,
      values.target,
      dtype=values.dtype,
      revision=values.revision,
      overwrite=values.overwrite,
      **formats,
    )
  experts = f", experts in {config.expert_format}" if config.expert_format else ""
  print(
    f"wrote {values.target}: {config.family}, {config.num_layers} layers, {config.dtype}" + experts
  )


def parse_size(text: str) -> int:
  """Bytes of a size like 5GB, 500MB or 2GiB.

  Raises:
    ConversionError: it is not one.
  """
  match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
  size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
  if size < 1:
    raise ConversionError(f"--max_shard_size must be a size like 5GB, 500MB or 2GiB, got {text!r}")
  return size
