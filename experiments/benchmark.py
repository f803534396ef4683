"""Measures what a roster costs.

  python -m experiments.benchmark --preset=laptop
  python -m experiments.benchmark --preset=laptop --num_cores=1 --output=benchmark_one_core
  python -m experiments.benchmark --preset=vocabulary --sweeps=aggregation,samplers
  python -m experiments.benchmark --preset=olmoe-1b-7b     (GPU or TPU, 16 GB)
  python -m experiments.benchmark --preset=mixtral-8x7b    (96 GB)
  python -m experiments.benchmark --checkpoint=MODEL.gguf --sweeps=llama_cpp

Times decode steps and scoring of models, with random weights unless --checkpoint names one, against
n, τ, context length, batch size, cache, aggregation, sampling, kernels, drafted tokens and unsure
positions. The cases of a sweep take turns in each round, along with measurements of memory
bandwidth and of the rate of matmuls. The floor of a step is the time to read once what it needs
(its unique active experts, attention, the output head, and the keys and values it attends to), or
that of its FLOPs if it is longer. Where torch and transformers are installed, the same model and
roster run in transformers too, and where llama-cpp-python is, the same model without a roster in
llama.cpp.

Writes table.txt (also printed), results.jsonl (one line per case) and cost.png to --output.
Rerun with the same flags, it keeps finished sweeps.
"""

import importlib
import importlib.util
import os
import pathlib
import time
from typing import Any

from absl import flags
import jax
from tqdm import tqdm

from experiments.benchmarks import bench as bench_lib
from experiments.benchmarks import machine, random_models, sweep_results, sweeps, tables
from experiments.benchmarks.sweeps import Sizes
from experiments.cli import app, overrides
from roe_jax import model_formats, native
from roe_jax import params as params_lib
from roe_jax.config import DTYPES, ModelConfig
from roe_jax.quantization import FORMATS, PROJECTION_FORMATS
from roe_jax.routers import ROUTERS

FLAGS = flags.FLAGS
# The packages that they need. `experiments.benchmarks.NAME_cases` has their cases.
COMPETITORS = {"transformers": ("torch", "transformers"), "llama_cpp": ("gguf", "llama_cpp")}
SWEEPS = (*sweeps.SWEEPS, *COMPETITORS)


def define_flags() -> None:
  flags.DEFINE_enum("preset", "laptop", list(random_models.PRESETS), "Shape of the model.")
  flags.DEFINE_string(
    "checkpoint",
    None,
    "A model to measure instead of a preset, as --checkpoint of the other programs.",
  )
  flags.DEFINE_enum(
    "dtype", None, DTYPES, "Dtype of weights and activations; the model's by default."
  )
  flags.DEFINE_string(
    "expert_format",
    None,
    f"Storage format of the expert weights: none, {', '.join(FORMATS)}, or nested:BASE-BITS; the "
    "model's by default.",
  )
  flags.DEFINE_enum(
    "projection_format",
    None,
    ["none", *PROJECTION_FORMATS],
    "Storage format of attention's projections, shared experts and the output head; the model's by "
    "default.",
  )
  flags.DEFINE_list("sweeps", list(SWEEPS), "Sweeps to run.")
  flags.DEFINE_list(
    "num_members", ["1", "2", "4", "8", "16", "32", "64"], "Roster sizes n of the decode sweep."
  )
  flags.DEFINE_float("tau", 0.5, "Router temperature τ of the noisy rosters.")
  flags.DEFINE_integer("context", 128, "Positions before a step, except in the next three flags.")
  flags.DEFINE_list("contexts", ["128", "512", "2048"], "Context lengths of the context sweep.")
  flags.DEFINE_integer("cache_context", 512, "Positions before a step in the cache sweep.")
  flags.DEFINE_integer("score_tokens", 512, "Length of the scored sequence in tokens.")
  flags.DEFINE_list("batch_sizes", ["1", "4", "16"], "Batch sizes of the batch sweep.")
  flags.DEFINE_integer("rounds", 7, "Times that each case is timed.")
  flags.DEFINE_integer("num_cores", None, "CPU cores to use; all by default.")
  flags.DEFINE_enum(
    "transformers",
    "auto",
    ["auto", "no"],
    "Whether to compare with transformers: if it is installed (auto), or never (no).",
  )
  flags.DEFINE_integer("seed", 0, "Seed for weights, tokens, noise and the order of cases.")
  flags.DEFINE_string("output", "benchmark", "Folder for the results.")


def _numbers(name: str) -> tuple[int, ...]:
  """Returns the integers of a list flag in ascending order."""
  values = sorted(set(overrides.items(name, int)))
  if not values or values[0] < 1:
    raise ValueError(
      f"--{name} must be a list of integers of at least 1, got {','.join(getattr(FLAGS, name))!r}"
    )
  return tuple(values)


def sizes_from_flags(config: ModelConfig) -> Sizes:
  """Returns the sizes of all sweeps.

  Raises:
    ValueError: if one is out of range.
  """
  sizes = Sizes(
    _numbers("num_members"),
    FLAGS.context,
    _numbers("contexts"),
    _numbers("batch_sizes"),
    FLAGS.cache_context,
    FLAGS.score_tokens,
  )
  if min(FLAGS.context, FLAGS.cache_context) < 1 or FLAGS.score_tokens < 2:
    raise ValueError("--context and --cache_context must be at least 1, --score_tokens at least 2")
  longest = max(
    sizes.context + 1, sizes.contexts[-1] + 1, sizes.cache_context + 1, sizes.score_tokens
  )
  if longest > config.context_length:
    raise ValueError(
      f"the flags need sequences of {longest} tokens, but the context length of {_name()} is "
      f"{config.context_length}: give a smaller --context, --contexts, --cache_context or "
      "--score_tokens"
    )
  if FLAGS.rounds < 1:
    raise ValueError(f"--rounds must be at least 1, got {FLAGS.rounds}")
  if not 0 < FLAGS.tau < float("inf"):
    raise ValueError(f"--tau must be positive, got {FLAGS.tau}")
  if not 0 <= FLAGS.seed < 2**32:
    raise ValueError(f"--seed must lie in [0, 2**32), got {FLAGS.seed}")
  return sizes


def _name() -> str:
  """Returns the name of the model."""
  return pathlib.Path(FLAGS.checkpoint).name if FLAGS.checkpoint else FLAGS.preset


def config_from_flags() -> ModelConfig:
  """Returns the model's config with the dtype and expert format of the flags."""
  if FLAGS.checkpoint:
    config = model_formats.load_config(FLAGS.checkpoint)
  else:
    config = random_models.PRESETS[FLAGS.preset]
  if FLAGS.dtype:
    config = config.replace(dtype=FLAGS.dtype)
  formats = {name: FLAGS[name].value for name in ("expert_format", "projection_format")}
  given = {name: None if value == "none" else value for name, value in formats.items() if value}
  return config.replace(**given)


def chosen_sweeps(config: ModelConfig) -> list[str]:
  """Returns the requested sweeps that can run, and prints why others cannot."""
  unknown = [name for name in FLAGS.sweeps if name not in SWEEPS]
  if unknown or not FLAGS.sweeps:
    raise ValueError(
      f"--sweeps: unknown {', '.join(unknown) or 'nothing'}; choose from {', '.join(SWEEPS)}"
    )
  chosen = [name for name in SWEEPS if name in FLAGS.sweeps]
  if ROUTERS[config.router].axes is None and (
    set(chosen) - {"decode", "llama_cpp"} or FLAGS.num_members != ["1"]
  ):
    raise ValueError(
      f"{_name()} is dense and runs without a roster only: give "
      "--sweeps=decode,llama_cpp --num_members=1"
    )
  if "kernels" in chosen and not native.is_available():
    print("Not compared with native kernels: there are none here.")
    chosen.remove("kernels")
  if FLAGS.transformers == "no":
    chosen = [name for name in chosen if name != "transformers"]
  for name in COMPETITORS.keys() & set(chosen):
    missing = [p for p in COMPETITORS[name] if importlib.util.find_spec(p) is None]
    if missing:
      print(f"Not compared with {name}: {' and '.join(missing)} not installed.")
      chosen.remove(name)
  return chosen


def _competitor(name: str) -> Any:
  """Returns the module with the cases of a competitor, whose packages are installed."""
  return importlib.import_module(f"experiments.benchmarks.{name}_cases")


def needed_bytes(config: ModelConfig, sizes: Sizes, chosen: list[str]) -> int:
  """Estimates the memory of the run: weights, the largest sweep's caches, activations."""
  positions = {
    "decode": sizes.context,
    "context": sum(sizes.contexts),
    "batch": sum(sizes.batch_sizes) * sizes.context,
    "cache": 12 * sizes.cache_context,
    "late": sizes.context,
    "scoring": sizes.score_tokens,
    "aggregation": sizes.score_tokens,
    "samplers": sizes.context,
    "kernels": sizes.context,
    "drafts": sizes.context,
    "adaptive": sizes.score_tokens,
    **dict.fromkeys(COMPETITORS, sizes.context),
  }
  # Capacities are rounded up. Caches are donated, so there is one of each.
  caches = random_models.cache_bytes(config, int(1.25 * max(positions[s] for s in chosen)) + 256)
  needed = params_lib.num_bytes(config) + caches + 2 * 2**28
  return needed + sum(
    _competitor(s).needed_bytes(config, sizes) for s in COMPETITORS if s in chosen
  )


def run(
  config: ModelConfig,
  sizes: Sizes,
  chosen: list[str],
  folder: sweep_results.Folder,
  num_cores: int,
  bar: tqdm,
) -> None:
  """Runs the chosen sweeps and adds their results to the folder."""
  bar.set_description("weights")
  bench = bench_lib.Bench(config, FLAGS.tau, FLAGS.seed, FLAGS.checkpoint)
  references = {"bandwidth": machine.bandwidth_call(), "matmul_rate": machine.matmul_call()}

  def measure(sweep):
    bar.set_description(f"{sweep}: compiling")
    if sweep in COMPETITORS:
      todo = _competitor(sweep).cases(bench, sizes, num_cores)
    else:
      todo = sweeps.SWEEPS[sweep](bench, sizes)
    bar.set_description(sweep)
    bar.reset(FLAGS.rounds * sweep_results.num_calls(todo))
    return sweep_results.measure(todo, FLAGS.rounds, references, FLAGS.seed, bar.update)

  for sweep in chosen:
    folder.add(sweep, measure(sweep))
    bench.forget()


def main(argv) -> None:
  del argv
  begin = time.perf_counter()
  config = config_from_flags()
  sizes, chosen = sizes_from_flags(config), chosen_sweeps(config)
  num_cores = machine.pin(FLAGS.num_cores)
  if "transformers" in chosen:
    # JAX must leave memory of the device to torch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  output = pathlib.Path(FLAGS.output)
  described = machine.describe(num_cores)
  for name in COMPETITORS.keys() & set(chosen):
    if obstacle := _competitor(name).obstacle(config, FLAGS.checkpoint, described["platform"]):
      print(f"Not compared with {name}: {obstacle}.")
      chosen.remove(name)
  if not chosen:
    raise ValueError("no sweep is left to run: give other --sweeps")
  folder = sweep_results.Folder(
    output,
    {
      name: FLAGS[name].value
      for name in (
        "preset",
        "checkpoint",
        "tau",
        "rounds",
        "seed",
        "num_members",
        "context",
        "contexts",
        "batch_sizes",
        "cache_context",
        "score_tokens",
      )
    }
    | {name: getattr(config, name) for name in ("dtype", "expert_format", "projection_format")}
    | described,
  )
  todo = [sweep for sweep in chosen if not folder.has(sweep)]
  if todo:
    needed, free = needed_bytes(config, sizes, todo), machine.free_bytes()
    if needed > free:
      raise ValueError(
        f"{_name()} needs about {needed / 2**30:.1f} GiB with these flags and "
        f"{free / 2**30:.1f} GiB are free: give a smaller --preset, fewer --sweeps or "
        "--transformers=no"
      )
    with tqdm(unit="turn") as bar:
      run(config, sizes, todo, folder, num_cores, bar)
  formats = f", {config.formats}" if config.formats else ""
  title = (
    f"{_name()}{'' if FLAGS.checkpoint else ' with random weights'}, {config.dtype}{formats}; "
    f"{described['cpu']}, "
    f"{num_cores} core{'s' if num_cores > 1 else ''}"
    + (f"; {described['device']}" if described["platform"] != "cpu" else "")
    + f"; jax {jax.__version__}"
  )
  text = (
    f"{title}\nMedians of {FLAGS.rounds} rounds with quartiles in brackets. A ratio is the median "
    f"of the ratios within rounds.\n\n{tables.table(folder, SWEEPS)}\n{tables.summary(folder)}\n"
  )
  print("\n" + text)
  app.write_atomically(output / "table.txt", text)
  tables.draw(folder, title, output / "cost.png")
  print(
    f"Saved {output}/table.txt, results.jsonl and cost.png; {time.perf_counter() - begin:.0f} s."
  )


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main, not_distributed="it times one machine", needs=("matplotlib", "tabulate"))


if __name__ == "__main__":
  program()
