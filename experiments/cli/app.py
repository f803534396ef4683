"""Start-up, error handling and the flags that all programs share."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import math
import os
import pathlib
import sys
import threading
import time
from typing import Any

from absl import app, flags, logging
import jax
from jax.sharding import AbstractMesh
from tqdm import tqdm

import checkpoints_convert
from checkpoints_convert import command_line, outputs
from experiments.cli import distributed, extras, text_files
from experiments.cli import dry_run as dry_run_lib
from experiments.cli.distributed import (
  broadcast,
  check_same,
  from_first_process,
  in_all_processes,
  is_first_process,
)
from experiments.cli.distributed import progress as progress
from experiments.evaluation.requests import Continuation, Request, RequestBuilder
from roe_jax import (
  assets,
  costs,
  makers,
  merging,
  model_formats,
  perturbations,
  presets,
  routing,
  sharding,
  temperature_profiles,
  typed,
)
from roe_jax.aggregation import AGGREGATIONS, MAKERS
from roe_jax.cache_modes import CACHES
from roe_jax.checkpoint_folder import resolved
from roe_jax.config import ModelConfig
from roe_jax.experts import STRATEGIES
from roe_jax.model_formats import EMBEDDED
from roe_jax.params import Params
from roe_jax.roster import MEMORY_BUDGET, Roster
from roe_jax.temperature_profiles import Profile
from roe_jax.text.chat import Chat
from roe_jax.text.tokenizer import Tokenizer

PRESET = "preset:"


def run(
  main: Callable[[Sequence[str]], None],
  not_distributed: str | None = None,
  needs: tuple[str, ...] = (),
  output: str = outputs.FOLDER,
) -> None:
  """Runs a program; invalid input prints a one-line error and exits with code 1.

  Args:
    main: the program's main function.
    not_distributed: why the program refuses --distributed; None if it supports it.
    needs: packages of optional extras that it uses.
    output: what its --output is, see `outputs.held`.
  """

  def guarded(argv):
    if len(argv) > 1:
      raise app.UsageError(f"unexpected argument {argv[1]!r}: pass settings as --name=value")
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # Orbax logs every step at INFO
    os.environ["MPLBACKEND"] = "Agg"  # figures are only saved
    use_compilation_cache()
    programs = CompiledPrograms(notice=True)
    try:
      for argument in sys.argv:
        text_files.check_text(argument, "the command line")
      extras.check(needs)
      distributed.start(not_distributed)
      with (
        distributed.ending_together(),
        device_memory_named(),
        distributed.only_first_prints(),
        contextlib.ExitStack() as stack,
      ):
        in_all_processes(distributed.check_flags)
        hold = outputs.held(getattr(flags.FLAGS, "output", None), output)
        in_all_processes(lambda: is_first_process() and stack.enter_context(hold))
        main(argv)
        print(f"[{programs}]", file=sys.stderr)
    except ModuleNotFoundError as error:
      package = (error.name or "").split(".")[0]
      if package not in extras.PACKAGES:
        raise
      sys.exit(f"error: this program needs {error.name}: {extras.install(package)}")

  command_line.run(guarded)


@contextlib.contextmanager
def device_memory_named() -> Iterator[None]:
  """Raises MemoryError, with advice, where a device has too little memory."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise MemoryError(
      f"{str(error).splitlines()[0]}: use a smaller --batch_size, --num_members or "
      "--memory_budget_mb, or more devices with --mesh; --dry_run estimates the memory of "
      "generate, score and evaluate"
    ) from error


class CompiledPrograms:
  """Counts the programs that JAX compiles or loads from its cache from now on.

  With `notice`, it prints one line once compilation has taken more than `PATIENCE` seconds.
  """

  PATIENCE = 4.0

  def __init__(self, notice: bool = False):
    self.count, self.seconds, self.cached = 0, 0.0, 0
    self._notice, self._timer = notice, None
    jax.monitoring.register_event_duration_secs_listener(self._on_duration)
    jax.monitoring.register_event_listener(self._on_event)

  def _on_duration(self, event, duration_secs, **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":  # also fires for cached programs
      self.count += 1
      self.seconds += duration_secs
      if self._timer:
        self._timer.cancel()

  def _on_event(self, event, **kwargs):
    self.cached += event == "/jax/compilation_cache/cache_hits"
    if self._notice and event == "/jax/compilation_cache/compile_requests_use_cache":
      self._timer = threading.Timer(max(0.0, self.PATIENCE - self.seconds), self._say)
      self._timer.daemon = True
      self._timer.start()

  def _say(self):
    if self._notice:
      self._notice = False
      message = "[JAX is compiling; the next run reads from its cache what took long]"
      tqdm.write(message, file=sys.stderr)

  def __str__(self):
    return (
      f"JAX compiled {self.count - self.cached} functions"
      f"{f', and read {self.cached} from its cache' if self.cached else ''} ({self.seconds:.1f} s)"
    )


def use_compilation_cache() -> None:
  """Caches compiled programs on disk, in $ROE_JAX_CACHE or ~/.cache/roe_jax."""
  folder = os.environ.get("ROE_JAX_CACHE") or pathlib.Path.home() / ".cache" / "roe_jax"
  jax.config.update("jax_compilation_cache_dir", str(folder))
  seconds = os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", 0.5)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", float(seconds))


def define_model_flags(default: str | None = None) -> None:
  flags.DEFINE_string(
    "checkpoint",
    default,
    "Model to load: the folder of a roe_jax checkpoint, a Hugging Face folder, a .gguf file, "
    "hf:org/name[@revision] on the Hugging Face hub, or an embedded model: "
    + ", ".join(EMBEDDED + name for name in assets.NAMES)
    + ".",
    required=default is None,
  )
  flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Compute dtype. Default: the checkpoint's."
  )
  define_mesh_flag()


def define_mesh_flag() -> None:
  flags.DEFINE_string(
    "mesh",
    None,
    "Device mesh, as sizes of its axes: data (sequences), expert, tensor (heads and widths); "
    'for example "expert:4,tensor:2", or "auto" to use all devices. Default: one device, or '
    "auto with --distributed. Results agree across meshes up to rounding.",
  )


def define_dry_run_flags() -> None:
  """Defines the flags that `print_dry_run` reads."""
  flags.DEFINE_bool(
    "dry_run",
    False,
    "Only print the memory and time that the run would need on each device. "
    '--checkpoint may also be "preset:" and one of: ' + ", ".join(presets.PRESETS) + ".",
  )
  define_planned_flags()
  flags.DEFINE_float(
    "overlap",
    None,
    "Fraction of a noisy member's experts that the clean member also selects, for --dry_run. "
    "Default: all members select experts uniformly.",
  )
  flags.DEFINE_float(
    "acceptance",
    None,
    "Probability that the roster chooses a drafted token, for --dry_run with --draft_tokens. "
    "Default: 1, the most that drafts can save.",
  )
  flags.DEFINE_float(
    "unsure_share",
    None,
    "Share of the positions where members run, for --dry_run with --unsure. Default: 1.",
  )


def define_planned_flags() -> None:
  """Defines the flags of the machine and the sequences that a dry run plans for."""
  flags.DEFINE_enum(
    "accelerator",
    None,
    list(costs.ACCELERATORS),
    "Device type for --dry_run. Default: this machine's, if it is in the list.",
  )
  flags.DEFINE_integer(
    "num_devices",
    None,
    "Number of devices for --dry_run. Default: the size of --mesh, or this machine's devices "
    "with --mesh=auto.",
  )
  flags.DEFINE_integer(
    "length",
    None,
    "Tokens per sequence for --dry_run, including the prompt. Default: 2048, or the model's "
    "context if that is shorter.",
  )


PLANNED_FLAGS = ("accelerator", "num_devices", "length")
DRY_RUN_FLAGS = (*PLANNED_FLAGS, "overlap", "acceptance", "unsure_share")
CHAT_FLAGS = ("system", "reasoning_effort", "thinking", "chat_date")


def define_chat_flags() -> None:
  flags.DEFINE_bool(
    "chat", False, "Render prompts as messages with the checkpoint's chat template."
  )
  flags.DEFINE_string("system", None, "System message at the start of each chat. Default: none.")
  flags.DEFINE_enum(
    "reasoning_effort",
    None,
    ["low", "medium", "high"],
    "Reasoning effort passed to the chat template. Default: the template's.",
  )
  flags.DEFINE_bool(
    "thinking", None, "Enable or disable thinking in the chat template. Default: the template's."
  )
  flags.DEFINE_string(
    "chat_date",
    None,
    "Date (YYYY-MM-DD) for chat templates that state one. Default: today, so that results "
    "depend on the day.",
  )


def define_limit_flag() -> None:
  flags.DEFINE_integer(
    "max_new_tokens",
    None,
    "Maximum tokens per answer, including reasoning. Default: set by each task.",
    lower_bound=1,
  )


def load_chat(tokenizer: Tokenizer, use_chat: bool | None = None) -> Chat | None:
  """Loads the chat format of --checkpoint, as the flags of `define_chat_flags` set it.

  Args:
    tokenizer: the checkpoint's tokenizer.
    use_chat: whether to; --chat by default.

  Returns:
    The format, with the same date in all processes; None without --chat.

  Raises:
    ValueError: a chat flag is given without --chat, or the checkpoint has no chat template.
  """
  f = flags.FLAGS
  if not (f.chat if use_chat is None else use_chat):
    for name in CHAT_FLAGS:
      if f[name].value is not None:
        raise ValueError(f"--{name} applies to chats only: add --chat")
    return None

  def load(date):
    return Chat.load(
      checkpoint_path(f.checkpoint),
      tokenizer,
      date=date,
      reasoning_effort=f.reasoning_effort,
      enable_thinking=f.thinking,
    )

  return load(broadcast(load(f.chat_date).settings.get("date")))


def request_builder(config: ModelConfig, tokenizer: Tokenizer) -> RequestBuilder:
  """Returns the request builder that the chat flags and --max_new_tokens ask for.

  Raises as `load_chat`.
  """
  f = flags.FLAGS
  return RequestBuilder(config, tokenizer, load_chat(tokenizer), f.system, f.max_new_tokens)


def define_roster_flags(num_members: int = 1) -> None:
  flags.DEFINE_integer(
    "num_members", num_members, "Roster size n: number of members whose predictions are combined."
  )
  flags.DEFINE_string(
    "tau",
    "0",
    "Router temperature τ: one number for all layers, a comma-separated list with one per layer, "
    "or a JSON file from experiments.tune, whose roster settings become the defaults of the "
    "other roster flags.",
  )
  flags.DEFINE_integer("seed", 0, "Seed for routing noise and sampling.")
  flags.DEFINE_string(
    "cache",
    "clean",
    f"KV cache the members attend to: {', '.join(CACHES)}, or module:attribute. The clean member's "
    "(clean), each member's own (standard), or none: every step computes the whole sequence.",
  )
  flags.DEFINE_string(
    "aggregation",
    "mean_probability",
    f"How members' predictions are combined: {', '.join(AGGREGATIONS)}, or module:attribute; with "
    f"parameters: {makers.usages(MAKERS)}.",
  )
  flags.DEFINE_enum(
    "gate_weights",
    routing.CLEAN,
    routing.GATE_WEIGHTS,
    "Gate weights of the selected experts: computed from clean or noisy router logits.",
  )
  flags.DEFINE_string(
    "noise",
    perturbations.GUMBEL,
    f"Noise that selects the noisy members' experts: {', '.join(perturbations.FAMILIES)}, or "
    f"module:function; with parameters: {makers.usages(perturbations.MAKERS)}.",
  )
  flags.DEFINE_string(
    "router_bias",
    None,
    "JSON file with lists of numbers, one list per layer and one number per expert, that are added "
    'to the router logits of all members, also of the clean one; "-inf" bans an expert.',
  )
  flags.DEFINE_bool("include_clean", True, "Include the clean (noise-free) member in the roster.")
  flags.DEFINE_string(
    "unsure",
    None,
    "Where the noisy members run: only where the clean member is unsure, such as margin<0.5, "
    "top_probability<0.9 or entropy>1 (nats). Default: everywhere.",
  )
  flags.DEFINE_string(
    "member_stop",
    None,
    "When no more members run for a token: when it is settled (exact), or is with this error rate. "
    "Default: all members run.",
  )
  flags.DEFINE_string(
    "member_bits",
    None,
    "How many bits of experts in a nested format the noisy members read, such as 2, or 3-2-2 for "
    "each of three; the clean member reads all. Default: all members do.",
  )
  flags.DEFINE_string(
    "member_tasks",
    None,
    "Index of the task whose weights the noisy members compute with, such as 1, or 0-1-2 for each "
    "of three, of a checkpoint of merged fine-tunes that is opened as FOLDER#all; the clean member "
    "computes with the base's. Default: all members do.",
  )
  flags.DEFINE_integer(
    "draft_tokens",
    0,
    "Maximum number of tokens that the clean member drafts before all members run at their "
    "positions together; 0 drafts none. Generates the same tokens.",
  )
  flags.DEFINE_enum(
    "expert_strategy",
    None,
    STRATEGIES,
    "Algorithm for the expert layers. Default: chosen by platform and sizes.",
  )
  flags.DEFINE_integer(
    "memory_budget_mb",
    MEMORY_BUDGET >> 20,
    "Approximate memory for the activations of members that are computed together, in MiB.",
  )


def parse_temperatures(text: str) -> float | list[float]:
  """Parses the value of --tau; process 0 reads the file.

  Raises:
    ValueError: it is neither numbers nor a JSON file with "temperatures".
  """
  found = _numbers_or_profile(text)
  return list(found.temperatures) if isinstance(found, Profile) else found


def _numbers_or_profile(text: str) -> float | list[float] | Profile:
  try:
    values = [float(part) for part in text.split(",")]
    return values[0] if len(values) == 1 else values
  except ValueError:
    return from_first_process(lambda: _read_temperatures(text))


def _router_bias():
  """Returns the numbers of --router_bias, or None; process 0 reads the file."""
  if flags.FLAGS.router_bias is None:
    return None
  path = pathlib.Path(flags.FLAGS.router_bias)
  if not path.is_file():
    raise ValueError(f"--router_bias={path} must be an existing JSON file")
  return typed.read(path, list)


def _read_temperatures(text):
  path = pathlib.Path(text)
  if not path.is_file():
    raise ValueError(
      f"--tau={text!r} must be a number, a comma-separated list of numbers or an existing JSON file"
    )
  return temperature_profiles.read(path)


def roster_from_flags(config: ModelConfig, check_idle: bool = True) -> Roster:
  """Creates the roster that the flags of `define_roster_flags` describe.

  The roster settings of a temperature profile apply unless a flag overrides them.

  Args:
    config: the model's architecture.
    check_idle: whether to refuse flags that would do nothing to the baseline.

  Raises:
    ValueError: a setting is out of range or would do nothing, or the profile is for a model
      of different sizes.
  """
  f = flags.FLAGS
  if "dry_run" in f:
    refuse_idle(not f.dry_run, DRY_RUN_FLAGS, "applies to --dry_run only: add it")
  temperatures = _numbers_or_profile(f.tau)
  settings = {name: getattr(f, name) for name in temperature_profiles.ROSTER_SETTINGS}
  if isinstance(temperatures, Profile):
    temperatures.check_sizes(config)
    settings |= {k: v for k, v in temperatures.roster.items() if not f[k].present}
    temperatures = temperatures.temperatures
  roster = Roster.create(
    config,
    temperatures=temperatures,
    seed=f.seed,
    expert_strategy=f.expert_strategy,
    memory_budget=f.memory_budget_mb << 20,
    router_bias=from_first_process(_router_bias),
    draft_tokens=f.draft_tokens,
    **settings,
  )
  if roster.member_tasks is not None and not f.checkpoint.endswith(f"#{merging.ALL}"):
    raise ValueError(
      f"--member_tasks needs a checkpoint of merged fine-tunes: --checkpoint=FOLDER#{merging.ALL}"
    )
  if not check_idle:
    return roster
  needs = (
    "does nothing to the baseline, a single member without noise: give --num_members and --tau"
  )
  differ = f["tau"].present or any(roster.temperatures) or roster.has_own_weights
  refuse_idle(not differ, ("num_members",), needs)
  # An explicit --num_members=1 is the start of a sweep.
  if roster.is_baseline and not f["num_members"].present:
    refuse_idle(any(roster.temperatures), ("tau",), needs)
    idle = "noise gate_weights cache aggregation unsure member_stop draft_tokens "
    idle += "member_bits member_tasks"
    refuse_idle(True, idle.split(), needs)
  return roster


def refuse_idle(idle: bool, names: Sequence[str], why: str) -> None:
  """Refuses flags that would do nothing.

  Raises:
    ValueError: `idle`, and a flag among `names` is given; the message goes on with `why`.
  """
  for name in names:
    if idle and flags.FLAGS[name].present:
      raise ValueError(f"--{name} {why}")


def check_profile(params: Params) -> None:
  """Checks the routers of `params` against the file in --tau, if any.

  `load_params` calls this.

  Raises:
    ValueError: the temperature profile is for a different model.
  """
  if "tau" in flags.FLAGS:
    found = _numbers_or_profile(str(flags.FLAGS["tau"].value))
    if isinstance(found, Profile):
      found.check_routers(params)


def checkpoint_path(name: str, weights: bool = False) -> pathlib.Path:
  """Returns the folder that --checkpoint names; see `model_formats.find_folder`.

  Raises:
    FileNotFoundError, ValueError: there is no such model; or it is a preset.
  """
  if name.startswith(PRESET):
    raise ValueError(f"--checkpoint={name} has sizes but no parameters: give --dry_run with it")
  return model_formats.find_folder(name, weights)


def load_config(name: str) -> ModelConfig:
  """Loads the config of the model, or the preset, that --checkpoint names.

  Raises:
    FileNotFoundError: there is no complete model of that name.
    ValueError: the preset is unknown, the config malformed, or not the same in all processes.
  """
  if name.startswith(PRESET):
    name = name.removeprefix(PRESET)
    if name not in presets.PRESETS:
      raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(presets.PRESETS)}")
    return presets.PRESETS[name]
  config = in_all_processes(lambda: model_formats.load_config(name))
  check_same(
    config.to_json(),
    f"the checkpoint {name} is another model than in process 0: every "
    "host must see the same checkpoint under the same path",
  )
  return config


def load_tokenizer(name: str) -> Tokenizer:
  """Loads the tokenizer of the model that --checkpoint names; see `model_formats`.

  Raises:
    FileNotFoundError, ValueError: there is none, or it does not fit the config.
  """
  checkpoint_path(name)  # rejects presets
  return in_all_processes(lambda: model_formats.load_tokenizer(name))


def parse_mesh(text: str) -> dict[str, Any]:
  """Parses --mesh into sizes by axis; empty for "auto".

  Raises:
    ValueError: it is neither "auto" nor a list of axis sizes.
  """
  sizes = {}
  for part in text.split(",") if text != "auto" else ():
    axis, _, size = part.strip().partition(":")
    if axis not in sharding.AXES or axis in sizes or not size.isdecimal():
      raise ValueError(
        f'--mesh={text!r} must be "auto" or sizes of the axes {", ".join(sharding.AXES)}, '
        'such as "expert:4,tensor:2"'
      )
    sizes[axis] = int(size)
  return sizes


def print_dry_run(
  config: ModelConfig,
  roster: Roster,
  *,
  batch_size: int,
  length: int | None = None,
  scoring: bool = False,
) -> None:
  """Prints the memory and time that a run would need, for the flags of `define_dry_run_flags`.

  Args:
    config: the model's config, from `load_config`.
    roster: the roster.
    batch_size: sequences per batch.
    length: tokens per sequence, including the prompt, unless --length is given.
    scoring: whether sequences are scored instead of generated.

  Raises:
    ValueError: a flag is out of range, or the mesh does not fit the model.
  """
  plan, mesh = _plan(config, roster, batch_size, length, scoring)
  print(dry_run_lib.report(plan, mesh))


def check_memory(
  config: ModelConfig, roster: Roster, *, batch_size: int, length: int, scoring: bool = False
) -> None:
  """Checks before parameters are read that a run fits the memory, by the estimate of --dry_run.

  The arguments are those of `print_dry_run`.

  Raises:
    ValueError: the devices have less memory than a run needs.
  """
  if not roster.cache_mode.keeps_history or length < 2:
    return
  plan, mesh = _plan(config, roster, batch_size, min(length, config.context_length), scoring)
  need, device = dry_run_lib.total_bytes(plan, mesh), jax.local_devices()[0]
  memory = (device.memory_stats() or {}).get("bytes_limit")
  if memory is None and device.platform == "cpu":
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    need *= min(mesh.size, jax.local_device_count())  # they share the memory of the host
  if memory is not None and need > memory:
    raise ValueError(
      f"n = {roster.num_members} and --batch_size={batch_size} need about {need / 2**30:.1f} GiB "
      f"for sequences of {length} tokens, and this device has {memory / 2**30:.1f}: use smaller "
      "ones, --cache=clean or more devices, and see --dry_run"
    )


def check_memory_of(
  config: ModelConfig, roster: Roster, requests: Sequence[Request], batch_size: int
) -> None:
  """Checks that the answers to requests fit the memory; raises as `check_memory`."""
  for scoring in (False, True):
    lengths = [r.max_length for r in requests if isinstance(r, Continuation) == scoring]
    if lengths:
      size = min(batch_size, len(lengths))
      check_memory(config, roster, batch_size=size, length=max(lengths), scoring=scoring)


def planned_mesh(config: ModelConfig, memory: float | None = None) -> AbstractMesh:
  """Returns the mesh that --mesh and --num_devices describe, of devices with this memory.

  Raises:
    ValueError: a flag is malformed, or the mesh does not fit the model.
  """
  f = flags.FLAGS
  sizes = {"data": 1} if f.mesh is None else parse_mesh(f.mesh)
  num_devices = f["num_devices"].value if "num_devices" in f else None  # without --dry_run
  if num_devices is None:
    num_devices = math.prod(sizes.values()) if sizes else len(jax.devices())
  return sharding.abstract_mesh(config, num_devices, **sizes, memory=memory)


def planned_accelerator() -> str | None:
  """Returns the value of --accelerator, or the name of this machine's device if it is known."""
  f = flags.FLAGS
  given = f["accelerator"].value if "accelerator" in f else None
  return given or costs.of_kind(jax.devices()[0].device_kind)


def _plan(config, roster, batch_size, length, scoring) -> tuple[dry_run_lib.Plan, AbstractMesh]:
  """Returns the run that the flags describe, and its mesh."""
  f = flags.FLAGS
  if f.dtype is not None:
    config = config.replace(dtype=f.dtype)
  optional = lambda name: f[name].value if name in f else None  # without --dry_run
  plan = dry_run_lib.Plan(
    config,
    roster,
    batch_size,
    optional("length") or length or min(2048, config.context_length),
    scoring,
    planned_accelerator(),
    optional("overlap"),
    optional("acceptance"),
    optional("unsure_share"),
  )
  return plan, planned_mesh(config, plan.device and plan.device.memory)


def load_params(
  name: str, dtype: str | None = None, mesh: str | None = None
) -> tuple[Params, ModelConfig]:
  """Loads parameters and config, and each device reads only its part.

  Args:
    name: the value of --checkpoint.
    dtype: the value of --dtype.
    mesh: the value of --mesh; all devices by default with --distributed.

  Raises:
    FileNotFoundError, ValueError: there is no complete model, the mesh does not fit the
      model or the devices, or the temperature profile is another model's.
  """
  shardings = None
  folder = str(in_all_processes(lambda: checkpoint_path(name, weights=True)))
  if (task := model_formats.split_task(name)[1]) is not None:
    folder = f"{folder}#{task}"
  if distributed.num_processes() > 1:
    mesh = mesh or "auto"
  if mesh is not None:
    config = load_config(folder)
    devices = sharding.make_mesh(config, **parse_mesh(mesh))
    if distributed.num_processes() > 1 and devices.size < jax.device_count():
      raise ValueError(
        f"--mesh={mesh} has {devices.size} devices and the processes have "
        f"{jax.device_count()}: with --distributed it must have all of them"
      )
    sizes = ",".join(f"{axis}:{size}" for axis, size in devices.shape.items())
    print(f"[mesh {sizes}]", file=sys.stderr)
    shardings = sharding.parameter_shardings(devices, config)
  begin = time.perf_counter()
  params, config = jax.block_until_ready(model_formats.load_params(folder, dtype, shardings))
  if checkpoints_convert.is_hugging_face(folder) and not name.startswith(EMBEDDED):
    print(
      f"[read {name} in {time.perf_counter() - begin:.1f} s; to convert it, also to "
      f"int8 or int4: python -m checkpoints_convert --source={name} --target=NEW_FOLDER]",
      file=sys.stderr,
    )
  check_profile(params)
  return params, config


def open_model(
  name: str, dtype: str | None = None, mesh: str | None = None
) -> tuple[Params, ModelConfig, Tokenizer]:
  """Loads parameters, config and tokenizer; see `load_params` and `load_tokenizer`."""
  tokenizer = load_tokenizer(name)
  return *load_params(name, dtype, mesh), tokenizer


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes a file by renaming, so that no reader sees a partial one; in process 0 only."""
  if not is_first_process():
    return
  if outputs.is_stream(path):
    path.write_text(text, encoding="utf-8")
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  path = resolved(path)  # a symbolic link stays one
  temporary = path.with_name(path.name + ".partial")
  temporary.write_text(text, encoding="utf-8")
  temporary.replace(path)
