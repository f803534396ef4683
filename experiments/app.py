"""What all programs here share: start-up, errors, model and roster flags."""

from collections.abc import Callable, Sequence
import os
import pathlib
import sys

from absl import app, flags, logging
import jax

from experiments import profiles
from experiments.profiles import Profile
from roe_jax import assets, checkpoint, routing, sharding, tokenizer as tokenizer_lib
from roe_jax.aggregation import AGGREGATIONS
from roe_jax.config import ModelConfig
from roe_jax.experts import STRATEGIES
from roe_jax.params import Params
from roe_jax.roster import CACHES, MEMORY_BUDGET, Roster
from roe_jax.tokenizer import Tokenizer

EMBEDDED = "embedded:"


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs a program; an error in its input becomes one sentence and exit code 1."""
  def guarded(argv):
    if len(argv) > 1:
      raise app.UsageError(f"unexpected argument {argv[1]!r}: settings are given as --name=value")
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # Orbax tells every step at INFO
    use_compilation_cache()
    programs = CompiledPrograms()
    try:
      main(argv)
      print(f"[{programs}]", file=sys.stderr)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
      sys.exit(f"error: {error}")
    except KeyboardInterrupt:
      sys.exit(130)
  app.run(guarded)


class CompiledPrograms:
  """Counts the programs that JAX compiles from now on, or takes from its cache."""

  def __init__(self):
    self.count, self.seconds, self.cached = 0, 0.0, 0
    jax.monitoring.register_event_duration_secs_listener(self._on_duration)
    jax.monitoring.register_event_listener(self._on_event)

  def _on_duration(self, event, seconds, **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":  # of cached ones too
      self.count += 1
      self.seconds += seconds

  def _on_event(self, event, **kwargs):
    self.cached += event == "/jax/compilation_cache/cache_hits"

  def __str__(self):
    return (f"{self.count} programs in {self.seconds:.1f} s: {self.count - self.cached} compiled, "
            f"{self.cached} from the compilation cache")


def use_compilation_cache() -> None:
  """Keeps compiled programs between runs, in ROE_JAX_CACHE or ~/.cache/roe_jax."""
  folder = os.environ.get("ROE_JAX_CACHE") or pathlib.Path.home() / ".cache" / "roe_jax"
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def define_model_flags(default: str | None = None) -> None:
  flags.DEFINE_string(
      "checkpoint", default, "Folder of a roe_jax checkpoint, or an embedded model: "
      + ", ".join(EMBEDDED + name for name in assets.NAMES) + ".", required=default is None)
  flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"],
                    "Dtype to compute in; the checkpoint's own by default.")
  flags.DEFINE_string(
      "mesh", None, "Devices to run on, as sizes of mesh axes such as \"expert:4,tensor:2\" or "
      "\"data:2,expert:4\" (texts, experts, heads and widths), or \"auto\" for all devices; one "
      "device by default. Results depend on it by rounding only.")


def define_roster_flags(num_members: int = 1) -> None:
  flags.DEFINE_integer("num_members", num_members, "n, how many distributions are averaged.")
  flags.DEFINE_string(
      "temperature_profile", "0",
      "Router temperature τ: one number for all layers, a comma-separated list with one for "
      "each layer, or a JSON file with the list under \"temperatures\", such as "
      "experiments.tune writes, whose roster settings hold for flags not given.")
  flags.DEFINE_integer("seed", 0, "Of the routing noise and of sampling.")
  flags.DEFINE_enum("cache", "clean", CACHES, "Whose history the members see.")
  flags.DEFINE_bool("recompute", False, "Do without a cache: slow, for comparison.")
  flags.DEFINE_enum("aggregation", "mean_probability", list(AGGREGATIONS),
                    "How the members' distributions become one.")
  flags.DEFINE_enum("gate_weights", routing.CLEAN, routing.GATE_WEIGHTS,
                    "What the chosen experts are weighted with.")
  flags.DEFINE_bool("include_clean", True, "Whether the noise-free member is averaged.")
  flags.DEFINE_enum("expert_strategy", None, STRATEGIES,
                    "How experts are computed; by platform and sizes by default.")
  flags.DEFINE_integer("memory_budget_mb", MEMORY_BUDGET >> 20, "What the activations of the "
                       "members computed together may take, roughly, in MiB.")


def parse_temperatures(text: str) -> float | list[float]:
  """The value of --temperature_profile.

  Raises:
    ValueError: neither numbers nor a JSON file with "temperatures".
  """
  found = _numbers_or_profile(text)
  return list(found.temperatures) if isinstance(found, Profile) else found


def _numbers_or_profile(text: str) -> float | list[float] | Profile:
  try:
    values = [float(part) for part in text.split(",")]
    return values[0] if len(values) == 1 else values
  except ValueError:
    pass
  path = pathlib.Path(text)
  if not path.is_file():
    raise ValueError(
        f"--temperature_profile={text!r} is neither a number, a comma-separated list of "
        "numbers, nor an existing JSON file")
  return profiles.read(path)


def roster_from_flags(config: ModelConfig) -> Roster:
  """The roster that the flags of `define_roster_flags` ask for.

  Settings that come with a temperature profile hold where no flag is given.

  Raises:
    ValueError: a setting is out of its range, or the profile is for a model of
      other sizes.
  """
  f = flags.FLAGS
  temperatures = _numbers_or_profile(f.temperature_profile)
  settings = {name: f[name].value for name in profiles.ROSTER_SETTINGS}
  if isinstance(temperatures, Profile):
    temperatures.check_sizes(config)
    settings |= {k: v for k, v in temperatures.roster.items() if not f[k].present}
    temperatures = temperatures.temperatures
  return Roster.create(
      config, temperatures=temperatures, seed=f.seed, expert_strategy=f.expert_strategy,
      memory_budget=f.memory_budget_mb << 20, **settings)


def check_profile(params: Params) -> None:
  """Checks the profile that --temperature_profile names, if any, against parameters.

  `load_params` does so for those it loads.

  Raises:
    ValueError: the profile is another model's.
  """
  if "temperature_profile" in flags.FLAGS:
    found = _numbers_or_profile(flags.FLAGS["temperature_profile"].value)
    if isinstance(found, Profile):
      found.check_routers(params)


def checkpoint_path(name: str) -> pathlib.Path:
  """The folder that --checkpoint names.

  Raises:
    ValueError: an unknown embedded model.
  """
  if name.startswith(EMBEDDED):
    return assets.path(name.removeprefix(EMBEDDED))
  return pathlib.Path(name).expanduser()


def load_config(name: str) -> ModelConfig:
  """The config of the checkpoint that --checkpoint names."""
  return checkpoint.load_config(checkpoint_path(name))


def load_tokenizer(name: str, config: ModelConfig) -> Tokenizer:
  """The tokenizer of a checkpoint.

  Raises:
    ValueError: it does not fit the config.
  """
  tokenizer = Tokenizer.load(checkpoint_path(name))
  tokenizer_lib.check_vocabulary(tokenizer, config)
  return tokenizer


def parse_mesh(text: str) -> dict[str, int]:
  """The value of --mesh as sizes by axis; none for "auto".

  Raises:
    ValueError: it names no sizes of axes.
  """
  sizes = {}
  for part in text.split(",") if text != "auto" else ():
    axis, _, size = part.strip().partition(":")
    if axis not in sharding.AXES or axis in sizes or not size.isdecimal():
      raise ValueError(
          f"--mesh={text!r} is neither \"auto\" nor a size for some of the axes "
          f"{', '.join(sharding.AXES)}, such as \"expert:4,tensor:2\"")
    sizes[axis] = int(size)
  return sizes


def load_params(name: str, dtype: str | None = None,
                mesh: str | None = None) -> tuple[Params, ModelConfig]:
  """Parameters and config of a checkpoint, each device's part straight to it.

  Args:
    name: the value of --checkpoint.
    dtype: the value of --dtype.
    mesh: the value of --mesh.

  Raises:
    ValueError: it is not a complete checkpoint, the mesh does not fit the
      model or the devices, or the temperature profile is another model's.
  """
  shardings = None
  if mesh is not None:
    config = load_config(name)
    devices = sharding.make_mesh(config, **parse_mesh(mesh))
    sizes = ",".join(f"{axis}:{size}" for axis, size in devices.shape.items())
    print(f"[mesh {sizes}]", file=sys.stderr)
    shardings = sharding.parameter_shardings(devices, config)
  params, config = checkpoint.load(checkpoint_path(name), dtype, shardings)
  check_profile(params)
  return params, config


def open_model(name: str, dtype: str | None = None,
               mesh: str | None = None) -> tuple[Params, ModelConfig, Tokenizer]:
  """Parameters, config and tokenizer of a checkpoint; see `load_params`.

  Raises:
    ValueError: it is not a complete checkpoint with a tokenizer that fits.
  """
  tokenizer = load_tokenizer(name, load_config(name))
  return *load_params(name, dtype, mesh), tokenizer


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Replaces a file as a whole, so that no reader ever sees half of it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".partial")
  temporary.write_text(text)
  temporary.replace(path)
