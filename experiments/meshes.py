"""Checks that a roster's results agree on all meshes, and times a decode step on each.

  python -m experiments.meshes
  python -m experiments.meshes --dtype=bfloat16 --mesh=data:1 --mesh=expert:8 --batch_sizes=40,8,1

Solves word problems greedily with the embedded models, with the same seed, on meshes of forced
host devices, and compares tokens and log-probabilities with those of the first mesh. In float32, a
completion may part from the first mesh's only at a tie: the first mesh then scores both tokens,
whose log-probabilities must agree to 1e-5; later tokens are not compared. Log-probabilities may
differ by more than 1e-5 only after a tie between two experts of a router, which is measured. In
bfloat16, differences are only counted. All devices share the same cores, so step times measure
work and overhead, and do not decrease with the number of devices.

Takes about three minutes on two cores. Writes results.json and table.md to --output.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
import dataclasses
import os
import pathlib
import sys
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.benchmarks import timing
from experiments.cli import app, text_files
from experiments.tasks import wordmath
from roe_jax import batching, decode, diagnostics, prefill, scoring
from roe_jax import params as params_lib
from roe_jax.completion import Completion
from roe_jax.config import ModelConfig
from roe_jax.costs import hlo
from roe_jax.params import Params
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler
from roe_jax.text import tokenizer as tokenizer_lib

FLAGS = flags.FLAGS
MESHES = ("data:1", "data:2", "data:4,expert:2", "expert:8", "data:2,expert:2,tensor:2")
# Log-probabilities (in nats) that differ by less are equal, and their tokens tied.
TOLERANCE = 1e-5
# Router logits that differ by less are tied: rounding differs between meshes by this much
# (measured: 9.5e-7).
ROUTING_TOLERANCE = 1e-6
# Decode steps per timed call.
STEPS = 8


def define_flags() -> None:
  flags.DEFINE_list(
    "checkpoints",
    ["embedded:wordmath_control", "embedded:wordmath_overtrained"],
    "Models that solve word problems.",
  )
  flags.DEFINE_multi_string(
    "mesh",
    list(MESHES),
    'Mesh such as "data:2,expert:4"; may be repeated. The first is the reference.',
  )
  flags.DEFINE_integer(
    "host_devices", 8, "Number of devices that the CPU is split into; 0 uses the real devices."
  )
  flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")
  flags.DEFINE_integer("num_examples", 200, "Number of test problems.")
  flags.DEFINE_list(
    "batch_sizes",
    [],
    "Batch sizes, each measured on each mesh; the first is the reference. Default: all problems as "
    "one batch.",
  )
  flags.DEFINE_integer("max_new_tokens", 64, "Maximum number of tokens per problem.")
  flags.DEFINE_integer("num_members", 4, "Roster size n.")
  flags.DEFINE_float("tau", 0.3, "Router temperature τ of all layers.")
  flags.DEFINE_integer("seed", 0, "Seed for routing noise.")
  flags.DEFINE_float(
    "temperature", 0.0, "Sampling temperature of the next tokens; 0 takes the most probable one."
  )
  flags.DEFINE_integer(
    "draft_tokens", 0, "Each mesh solves the problems also with so many drafted tokens; 0: without."
  )
  flags.DEFINE_integer(
    "rounds", 9, "Timing rounds, in which the meshes take turns; 0 skips timing."
  )
  flags.DEFINE_string("output", "results/meshes", "Folder of the results.")


@dataclasses.dataclass(frozen=True)
class Tie:
  """A token at which two meshes differ.

  Attributes:
    text: index of the problem.
    place: index of the token in its completion.
    tokens: the tokens of the first mesh and of the other.
    gap: difference of their log-probabilities on the first mesh, in nats.
  """

  text: int
  place: int
  tokens: tuple[int, int]
  gap: float


@dataclasses.dataclass(frozen=True)
class Outlier:
  """A completion with a log-probability that differs by more than the tolerance.

  Attributes:
    text: index of the problem.
    place: index of the first such token in its completion.
    difference: largest difference in the completion.
    margin: smallest router logit margin between a selected and an unselected expert up to that
      token; see `diagnostics.routing_margins`. None in bfloat16, where it explains nothing.
  """

  text: int
  place: int
  difference: float
  margin: float | None


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A comparison of completions on a mesh with those on the first.

  Attributes:
    num_tokens: number of compared tokens.
    num_identical: number of completions with equal tokens.
    difference: largest difference of log-probabilities, up to where completions part.
    parted: where completions part.
    outliers: completions whose log-probabilities differ.
  """

  num_tokens: int
  num_identical: int
  difference: float
  parted: tuple[Tie, ...]
  outliers: tuple[Outlier, ...]

  @property
  def is_same(self) -> bool:
    """Whether tokens differ only at ties, and log-probabilities only after ties of experts."""
    return all(abs(t.gap) <= TOLERANCE for t in self.parted) and all(
      o.margin is not None and o.margin <= ROUTING_TOLERANCE for o in self.outliers
    )


@dataclasses.dataclass
class Model:
  """A model on one mesh, with the problems to solve."""

  params: Params
  config: ModelConfig
  roster: Roster
  prompts: list[list[int]]
  stop_tokens: tuple[int, ...]
  max_new_tokens: int
  batch_size: int
  sampler: Sampler

  def complete(self) -> list[Completion]:
    return decode.generate(
      self.params,
      self.config,
      self.prompts,
      max_new_tokens=self.max_new_tokens,
      roster=self.roster,
      sampler=self.sampler,
      stop_tokens=self.stop_tokens,
      batch_size=self.batch_size,
    ).completions

  def gap(self, text: int, before: Sequence[int], tokens: tuple[int, int]) -> float:
    """Returns the difference of two tokens' log-probabilities after the tokens of an answer."""
    prefix = [*self.prompts[text], *before]
    first, other = scoring.score(
      self.params,
      self.config,
      [[*prefix, t] for t in tokens],
      2 * [len(prefix)],
      roster=self.roster,
      request_ids=[text, text],
    ).sequences
    return float(first.log_probs[0, 0] - other.log_probs[0, 0])

  def margin(self, text: int, before: Sequence[int]) -> float:
    """Returns the smallest router margin in a problem and the tokens of an answer."""
    return float(
      diagnostics.routing_margins(
        self.params, self.config, self.roster, [[*self.prompts[text], *before]], [text]
      ).min()
    )


def open_model(
  checkpoint: str,
  mesh: str | None,
  num_examples: int,
  num_members: int,
  tau: float,
  seed: int,
  max_new_tokens: int,
  dtype: str = "float32",
  temperature: float = 0.0,
) -> Model:
  """Opens a model of word problems on a mesh, to solve them as one batch."""
  params, config, tokenizer = app.open_model(checkpoint, dtype, mesh)
  prompts = [tokenizer.encode(wordmath.prompt(p)) for p in wordmath.problems("test", num_examples)]
  roster = Roster.create(config, num_members, tau, seed=seed)
  stop_tokens = tokenizer_lib.stop_tokens(tokenizer, config)
  sampler = Sampler.create(temperature)
  return Model(params, config, roster, prompts, stop_tokens, max_new_tokens, len(prompts), sampler)


def compare_completions(
  first: Model, expected: Sequence[Completion], actual: Sequence[Completion]
) -> Comparison:
  """Compares completions on another mesh with those on the first."""
  num_tokens, difference, parted, outliers = 0, 0.0, [], []
  for text, (one, other) in enumerate(zip(expected, actual, strict=True)):
    pairs = list(zip(one.tokens, other.tokens))
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    # At a tie, each mesh took its best token, so the log-probabilities are equal there too.
    count = len(pairs) if place is None else place + 1
    num_tokens += count
    found = np.abs(np.subtract(one.log_probs[:count], other.log_probs[:count]))
    difference = max(difference, float(found.max()))
    if found.max() > TOLERANCE:
      wrong = int(np.argmax(found > TOLERANCE))
      is_exact = first.config.dtype == "float32"
      margin = first.margin(text, one.tokens[:wrong]) if is_exact else None
      outliers.append(Outlier(text, wrong, float(found.max()), margin))
    if place is not None:
      parted.append(
        Tie(text, place, pairs[place], first.gap(text, one.tokens[:place], pairs[place]))
      )
  return Comparison(
    num_tokens, len(expected) - len(parted), difference, tuple(parted), tuple(outliers)
  )


class Steps:
  """Runs decode steps of all problems on a mesh, always from the same state."""

  def __init__(self, model: Model):
    self._model = params_lib.in_storage_dtype(model.params), model.config, model.roster
    self._state = decode.start(
      *self._model,
      model.prompts[: model.batch_size],
      range(min(model.batch_size, len(model.prompts))),
      model.max_new_tokens,
      model.batch_size,
      prefill.capacity_for(model.config, model.prompts, model.max_new_tokens),
    )
    self._stop_tokens = jnp.full(8, -1)
    self._begin = jax.device_get((self._state.lengths, self._state.done))
    program = self._lower().compile()
    self.collectives = hlo.count_collectives(program.as_text() or "")
    self.memory = timing.memory(program)

  def _lower(self):
    return decode.decode_steps.lower(
      *self._model, Sampler.greedy(), self._state, self._stop_tokens, np.int32(STEPS)
    )

  def __call__(self, count: int) -> None:
    for _ in range(count):
      lengths, done = batching.device_put_like(self._model[0], self._begin)
      self._state, steps = decode.decode_steps(
        *self._model,
        Sampler.greedy(),
        self._state.replace(lengths=lengths, done=done),
        self._stop_tokens,
        np.int32(STEPS),
      )
    if int(steps) != STEPS:
      raise ValueError(f"--max_new_tokens must be at least {STEPS}, the number of timed steps")


def costs(steps: Steps) -> dict[str, Any]:
  """Returns the collectives of one step, and bytes on one device."""
  moved = defaultdict(lambda: {"count": 0, "bytes": 0})
  for collective, count in steps.collectives.items():
    moved[collective.kind]["count"] += count
    moved[collective.kind]["bytes"] += count * collective.num_bytes
  return {"collectives": moved, **steps.memory}


def table(results: dict[str, dict[str, Any]]) -> str:
  """Formats the results of one model's meshes as a Markdown table."""
  lines = [
    "| mesh | devices | equal completions | parted at ties | largest difference (nats) | "
    f"completions above {TOLERANCE} | step (ms) [quartiles] | collectives per step | "
    "MB in collectives | MB per device |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for mesh, found in results.items():
    same = found.get("comparison")
    against = (
      ("",) * 4
      if same is None
      else (
        f"{same['num_identical']}",
        f"{len(same['parted'])}",
        f"{same['difference']:.2e}",
        f"{len(same['outliers'])}",
      )
    )
    moved, cost = found.get("collectives", {}).values(), ("",) * 3
    time = (
      "{1:.1f} [{0:.1f}, {2:.1f}]".format(*(1e3 * q for q in found["seconds"]))
      if "seconds" in found
      else ""
    )
    if "temp_bytes" in found:
      cost = (
        str(sum(m["count"] for m in moved)),
        f"{sum(m['bytes'] for m in moved) / 1e6:.2f}",
        f"{(found['argument_bytes'] + found['temp_bytes']) / 1e6:.1f}",
      )
    lines.append("| " + " | ".join((mesh, str(found["devices"]), *against, time, *cost)) + " |")
  return "\n".join(lines)


def differences(results: dict[str, dict[str, dict[str, Any]]]) -> Iterator[str]:
  """Yields how much the results of each case differ from those of the first."""
  for name, cases in results.items():
    for case, found in cases.items():
      if same := found.get("comparison"):
        yield (
          f"{name}, {case}: {len(same['parted'])} of {same['num_identical'] + len(same['parted'])} "
          "completions have other tokens; log-probabilities differ by up to "
          f"{same['difference']:.2g}"
        )


def verdict(results: dict[str, dict[str, dict[str, Any]]], first: str) -> Iterator[str]:
  """Yields a sentence for every exception, and a verdict."""
  different = []
  for name, meshes in results.items():
    for mesh, found in meshes.items():
      where = f"{name} on {mesh}"
      if not found.get("same", True):
        different.append(where)
      comparison = found.get("comparison", {"parted": (), "outliers": ()})
      for tie in comparison["parted"]:
        yield (
          f"{where}: problem {tie['text']} parts at token {tie['place']}, where the two tokens "
          f"differ by {tie['gap']:.1e} nats"
        )
      for outlier in comparison["outliers"]:
        yield (
          f"{where}: problem {outlier['text']} differs by {outlier['difference']:.2e} from token "
          f"{outlier['place']} on; two experts before it differ by {outlier['margin']:.1e} in "
          "router logits"
        )
  yield (
    f"NOT EQUAL to {first}: {'; '.join(different)}"
    if different
    else f"Equal to {first} on all meshes, except at ties of tokens or experts: tokens, and "
    f"log-probabilities to {TOLERANCE}"
  )


def measure(
  checkpoint: str,
  meshes: Sequence[str],
  rounds: int,
  on_turn=lambda: None,
  batch_sizes: Sequence[int] = (),
  draft_tokens: int = 0,
  **settings: Any,
) -> dict[str, dict[str, Any]]:
  """Measures a model on each mesh; returns {mesh: results}, or {"mesh, batch of B": results}.

  With drafts there are also results of "..., drafts", without costs and times.

  Args:
    checkpoint: the model, as in --checkpoints.
    meshes: the meshes, as in --mesh.
    rounds: number of timing rounds.
    on_turn: called after the completions of each case, and after each turn of timing.
    batch_sizes: batch sizes on each mesh; by default all problems are one batch.
    draft_tokens: as in --draft_tokens.
    **settings: further arguments of `open_model`.
  """
  results, steps = {}, {}
  for mesh in meshes:
    opened = open_model(checkpoint, mesh, **settings)
    for size in batch_sizes or [opened.batch_size]:
      model = dataclasses.replace(opened, batch_size=size)
      completions, case = model.complete(), f"{mesh}, batch of {size}" if batch_sizes else mesh
      if not results:
        first, expected = model, completions
      steps[case] = Steps(model)
      devices = model.params.final_norm.sharding.num_devices
      results[case] = {"devices": devices, **costs(steps[case])}
      if model is not first:
        results[case] |= _compared(first, expected, completions)
      on_turn()
      if draft_tokens:
        drafting = dataclasses.replace(
          model, roster=model.roster.replace(draft_tokens=draft_tokens)
        )
        drafted = _compared(first, expected, drafting.complete())
        results[f"{case}, drafts"] = {"devices": devices, **drafted}
  if rounds:
    for case, seconds in timing.take_turns(steps, rounds, on_turn=on_turn).items():
      results[case]["seconds"] = timing.quartiles(seconds / STEPS)
  return results


def _compared(first, expected, completions):
  comparison = compare_completions(first, expected, completions)
  return {"comparison": dataclasses.asdict(comparison), "same": comparison.is_same}


def main(argv) -> None:
  del argv
  if FLAGS.host_devices:
    jax.config.update("jax_platforms", "cpu")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
      jax.config.update("jax_num_cpu_devices", FLAGS.host_devices)
  if FLAGS.num_examples < 1 or FLAGS.max_new_tokens < STEPS or FLAGS.rounds < 0:
    raise ValueError(
      f"--num_examples must be at least 1, --max_new_tokens at least {STEPS}, and "
      "--rounds not negative"
    )
  for mesh in FLAGS.mesh:
    app.parse_mesh(mesh)
  for name in FLAGS.checkpoints:  # check all before any work
    config, drafts = app.load_config(name), FLAGS.draft_tokens
    Roster.create(config, FLAGS.num_members, FLAGS.tau, seed=FLAGS.seed, draft_tokens=drafts)
  Sampler.create(FLAGS.temperature)
  settings = {
    name: getattr(FLAGS, name)
    for name in (
      "num_examples",
      "num_members",
      "tau",
      "seed",
      "max_new_tokens",
      "dtype",
      "temperature",
      "draft_tokens",
    )
  }
  try:
    batch_sizes = [int(size) for size in FLAGS.batch_sizes]
    assert all(0 < size <= FLAGS.num_examples for size in batch_sizes)
  except (ValueError, AssertionError):
    raise ValueError(
      f"--batch_sizes must be integers from 1 to --num_examples={FLAGS.num_examples}, got "
      f"{','.join(FLAGS.batch_sizes)!r}"
    ) from None
  results = {}
  with tqdm(
    total=len(FLAGS.checkpoints) * len(FLAGS.mesh) * max(1, len(batch_sizes)) * (1 + FLAGS.rounds),
    unit="turn",
    file=sys.stderr,
  ) as bar:
    for checkpoint in FLAGS.checkpoints:
      bar.set_description(pathlib.Path(checkpoint.removeprefix(app.EMBEDDED)).name)
      results[checkpoint] = measure(
        checkpoint, FLAGS.mesh, FLAGS.rounds, bar.update, batch_sizes, **settings
      )
  output = pathlib.Path(FLAGS.output)
  app.write_atomically(
    output / "results.json",
    text_files.to_json({"settings": settings, "tolerance": TOLERANCE, "models": results}, indent=2)
    + "\n",
  )
  text = "\n\n".join(f"## {name}\n\n{table(found)}" for name, found in results.items()) + "\n"
  app.write_atomically(output / "table.md", text)
  print(text)
  is_exact = FLAGS.dtype == "float32"
  print("\n".join(verdict(results, FLAGS.mesh[0]) if is_exact else differences(results)))
  print(f"Saved {output}/table.md and results.json.")


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main, not_distributed="it compares meshes of one process")


if __name__ == "__main__":
  program()
