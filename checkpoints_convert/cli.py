"""The converter's flags, and what they do."""

import functools
import re
import sys
from typing import Any

from absl import flags, logging
import jax
import numpy as np

from checkpoints_convert import (
  carve_checkpoint,
  carving,
  command_line,
  hub,
  merge_checkpoints,
  outputs,
  quantize_checkpoint,
  summary,
  verification,
)
from checkpoints_convert.common import ConversionError
from checkpoints_convert.from_hugging_face import convert_from_hugging_face
from checkpoints_convert.to_hugging_face import convert_to_hugging_face
from roe_jax import bit_plans, checkpoint, makers, merging, quantization

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags of the program in `values`."""
  string = functools.partial(flags.DEFINE_string, flag_values=values)
  enum = functools.partial(flags.DEFINE_enum, flag_values=values)
  boolean = functools.partial(flags.DEFINE_bool, flag_values=values)
  string(
    "source",
    None,
    "What to convert: a Hugging Face folder, a .gguf file or a hub name, org/name[@revision]; with "
    "--to_hugging_face a roe_jax checkpoint, with --quantize_* any of these.",
  )
  string("target", None, "Folder to write.")
  enum(
    "dtype",
    "source",
    ["source", "float32", "bfloat16"],
    "Dtype of the written parameters; source keeps the dtype of the source.",
  )
  string(
    "quantize_experts",
    None,
    "Format to quantize the experts' matrices to: int8, int4, or nested:BASE-BITS such as "
    "nested:2-4, whose first bits are weights of fewer; other parameters stay in --dtype.",
  )
  enum(
    "quantize_projections",
    None,
    list(quantization.PROJECTION_FORMATS),
    "Format to quantize the matrices to that every token is multiplied with: attention's "
    "projections, shared experts, the MLPs of first dense layers, and the output head.",
  )
  string(
    "bits_plan",
    None,
    "How many bits each expert of a checkpoint keeps, with --quantize_experts=nested:BASE-BITS: a "
    f"JSON file, or one of the rules {makers.usages(bit_plans.RULES)}.",
  )
  boolean(
    "compensate",
    False,
    "Let weights make up for the rounding of others on the text of --calibration (GPTQ), with "
    "--quantize_experts=nested:BASE-BITS.",
  )
  flags.DEFINE_list(
    "merge",
    [],
    "roe_jax checkpoints of fine-tunes of --base, to be merged in place of --source: one base and "
    "one vector, and one bit per weight and fine-tune (EMR-Merging).",
    flag_values=values,
  )
  string("base", None, "The checkpoint that the fine-tunes of --merge started from.")
  boolean("merge_routers", False, "Merge routers, too; by default each fine-tune keeps its own.")
  boolean(
    "keep_mxfp4",
    False,
    "Keep experts that are stored in MXFP4 (GPT-OSS); otherwise they are decoded to --dtype.",
  )
  string(
    "carve",
    None,
    "Carve experts out of a dense model: S4A8E16 divides each layer into 16 equal experts, of "
    "which 4 process every token and 8 of the other 12 are active.",
  )
  string(
    "calibration",
    None,
    "Text file whose tokens show which neurons are active together, with --carve, which experts "
    "are used, with --bits_plan, or what the inputs of experts are, with --compensate.",
  )
  flags.DEFINE_integer(
    "calibration_tokens",
    carve_checkpoint.TOKENS,
    "Number of tokens of --calibration to use.",
    flag_values=values,
  )
  enum(
    "carve_router",
    carve_checkpoint.ROUTERS[0],
    list(carve_checkpoint.ROUTERS),
    "Router of carved experts: linear is fitted to the experts' activations by least squares; "
    "neurons is one representative neuron per expert (CMoE).",
  )
  flags.DEFINE_integer(
    "verify",
    None,
    "Compare the logits of the written checkpoint (with all experts active, if they were carved) "
    "with those of transformers on this many tokens, in float32, and fail if they differ.",
    flag_values=values,
  )
  string("verify_text", None, "Text file for --verify. Default: random tokens.")
  boolean("dry_run", False, "Check the source and print what would be written, without writing.")
  boolean("to_hugging_face", False, "Convert a roe_jax checkpoint to a Hugging Face folder.")
  string("revision", None, "Branch, tag or commit on the hub.")
  boolean("overwrite", False, "Replace the target if it exists.")
  string(
    "max_shard_size",
    "5GB",
    "Maximum size of a safetensors file, such as 500MB or 2GiB, with --to_hugging_face.",
  )


def run(values: flags.FlagValues) -> int:
  """Runs the converter as the flags say and returns the exit code."""
  if "verbosity" not in values or not values["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # Orbax logs every step at INFO
  try:
    with outputs.held(None if values.dry_run else values.target, outputs.WHOLE_FOLDER):
      _convert(values)
  except BrokenPipeError:
    raise
  except (ValueError, OSError) as error:
    print(f"error: {command_line.describe(error)}", file=sys.stderr)
    return 1
  return 0


def _convert(values: flags.FlagValues) -> None:
  if not values.target and not values.dry_run:
    raise ConversionError("--target is missing: give the folder to write, or --dry_run")
  if _check_merge(values):
    _merge(values)
    return
  max_shard_bytes = parse_size(values.max_shard_size)
  formats: dict[str, Any] = {
    name: values[name].value for name in ("quantize_experts", "quantize_projections", "keep_mxfp4")
  }
  if values.quantize_experts is not None:
    quantize_checkpoint.check_format(values.quantize_experts)
  if values.to_hugging_face and any(formats.values()):
    raise ConversionError(
      "--quantize_experts, --quantize_projections and --keep_mxfp4 apply to checkpoints, but "
      "--to_hugging_face writes a Hugging Face folder: leave them out"
    )
  _check_carving(values)
  is_quantized = bool(values.quantize_experts or values.quantize_projections)
  from_checkpoint = is_quantized and quantize_checkpoint.is_checkpoint(values.source)
  _check_verification(values, from_checkpoint)
  for name in ("bits_plan", "compensate"):
    if values[name].value and not (values.quantize_experts and from_checkpoint):
      raise ConversionError(
        f"--{name} needs --quantize_experts=nested:BASE-BITS and a roe_jax checkpoint as source: "
        "convert to a checkpoint first"
      )
  if values.compensate:
    quantization.nested_format(values.quantize_experts)
    if not values.calibration:
      raise ConversionError("--compensate looks at text: give --calibration=TEXT.txt")
  if values.dry_run and not (values.to_hugging_face or from_checkpoint):
    carved = lambda config: config
    if values.carve:
      plan = carving.Plan.parse(values.carve)
      carved = lambda config: carve_checkpoint.carved_config(config, plan, values.carve_router)
    print(
      summary.describe_source(values.source, values.revision, carved, dtype=values.dtype, **formats)
    )
    return
  if values.dry_run:
    if from_checkpoint:
      config = quantize_checkpoint.target_config(values.source, values.dtype, **formats)
      if values.bits_plan:
        of_text = values.calibration, values.calibration_tokens
        found = quantize_checkpoint.make_plan(values.source, config, values.bits_plan, *of_text)
        config = found[0]
        if found[1] is not None:
          print(quantize_checkpoint.describe_plan(found[1], config))
    else:
      config = checkpoint.load_config(values.source)
      config = config if values.dtype == "source" else config.replace(dtype=values.dtype)
    print(f"source: {values.source} (a roe_jax checkpoint)\n{summary.describe(config)}")
    return
  # Conversion needs no accelerator; without this, JAX would allocate its memory.
  jax.config.update("jax_platforms", "cpu")
  arguments = dict(dtype=values.dtype, overwrite=values.overwrite)
  if values.to_hugging_face:
    arguments |= dict(max_shard_bytes=max_shard_bytes)
    config = convert_to_hugging_face(values.source, values.target, **arguments)
  elif values.carve:
    config = carve_checkpoint.convert(
      values.source,
      values.target,
      plan=carving.Plan.parse(values.carve),
      calibration=values.calibration,
      router=values.carve_router,
      num_tokens=values.calibration_tokens,
      revision=values.revision,
      **arguments,
    )
  elif from_checkpoint:
    config = quantize_checkpoint.convert(
      values.source,
      values.target,
      bits_plan=values.bits_plan,
      compensate=values.compensate,
      calibration=values.calibration,
      calibration_tokens=values.calibration_tokens,
      **arguments,
      **formats,
    )
  else:
    arguments |= dict(revision=values.revision, **formats)
    config = convert_from_hugging_face(values.source, values.target, **arguments)
  if values.bits_plan and (plan := checkpoint.load_provenance(values.target).get("bits")):
    print(quantize_checkpoint.describe_plan(np.array(plan), config))
  what = [config.family, f"{config.num_layers} layers", config.dtype, config.formats]
  print(f"wrote {values.target}: {', '.join(filter(None, what))}")

  if values.verify is not None:
    folder = hub.find(values.source, values.revision)
    comparison = verification.verify(folder, values.target, values.verify, values.verify_text)
    print(comparison)
    if not comparison.passes:
      raise ConversionError(
        f"{values.target} is complete, but its logits are not those of transformers: see above"
      )


def _check_merge(values: flags.FlagValues) -> bool:
  """Checks the flags of merging; returns whether fine-tunes are merged."""
  if not values.merge:
    idle = [name for name in ("base", "merge_routers") if values[name].present]
    if idle:
      raise ConversionError(f"--{idle[0]} applies to --merge only: add --merge=A,B")
    if not values.source:
      raise ConversionError("--source is missing: give what to convert, or --merge and --base")
    return False
  own = {"merge", "base", "merge_routers", "target", "overwrite", "dry_run"}
  others = [name for name in values if values[name].present and name not in own]
  converters = flags.FlagValues()
  define_flags(converters)
  if given := [name for name in others if name in converters]:
    raise ConversionError(f"--merge and --{given[0]} exclude each other: leave one out")
  if not values.base:
    raise ConversionError(
      "--merge needs --base: give the checkpoint that the fine-tunes started from"
    )
  return True


def _merge(values: flags.FlagValues) -> None:
  tasks = list(values.merge)
  config = merge_checkpoints.target_config(tasks, values.base)
  if values.dry_run:
    print(f"base: {values.base}, with {len(tasks)} tasks\n{summary.describe(config)}")
    return
  jax.config.update("jax_platforms", "cpu")
  merge_checkpoints.convert(
    tasks,
    values.base,
    values.target,
    merge_routers=values.merge_routers,
    overwrite=values.overwrite,
  )
  merged, separate = merge_checkpoints.num_bytes(values.target)
  print(f"wrote {values.target}: {len(tasks)} tasks in {merged:,} bytes; separately {separate:,}")
  found = merging.Tasks(values.target)
  for i, name in enumerate(found.names):
    scales = ", ".join(f"{kind} {of[i]:.4f}" for kind, of in found.scales.items())
    print(f"  task {i}: {name}; scales: {scales}")


def _check_verification(values: flags.FlagValues, from_checkpoint: bool) -> None:
  """Checks what --verify needs before anything is converted."""
  if values.verify is None:
    if values.verify_text is not None:
      raise ConversionError("--verify_text applies to --verify only: add --verify=NUM_TOKENS")
    return
  if values.to_hugging_face or values.dry_run or from_checkpoint:
    raise ConversionError(
      "--verify applies to converting a Hugging Face model or a GGUF file to a checkpoint only: "
      "leave it out"
    )
  verification.check(values.verify, values.verify_text)
  folder = hub.find(values.source, values.revision, weights=False)
  verification.check_source(folder, values.verify, values.verify_text)


def _check_carving(values: flags.FlagValues) -> None:
  """Checks the flags of carving, as far as that needs no source."""
  if not values.carve:
    looks = values.bits_plan or values.compensate
    names = ("carve_router", *(() if looks else ("calibration", "calibration_tokens")))
    idle = [n for n in names if values[n].present]
    if idle:
      raise ConversionError(f"--{idle[0]} applies to --carve only: add --carve, or leave it out")
    return
  carving.Plan.parse(values.carve)
  others = (
    "to_hugging_face",
    "quantize_experts",
    "quantize_projections",
    "keep_mxfp4",
    "bits_plan",
    "compensate",
  )
  given = [name for name in others if getattr(values, name)]
  if given:
    raise ConversionError(
      f"--carve and --{given[0]} exclude each other: carve first, then convert the result"
    )
  if not (values.calibration or values.dry_run):
    raise ConversionError("--carve needs --calibration: give a text file, such as TEXT.txt")


def parse_size(text: str) -> int:
  """Parses a size like 5GB, 500MB or 2GiB into bytes.

  Raises:
    ConversionError: `text` is not a size.
  """
  match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
  size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
  if size < 1:
    raise ConversionError(f"--max_shard_size must be a size like 5GB, 500MB or 2GiB, got {text!r}")
  return size
