"""Times generation with drafted tokens and adaptive rosters against the baseline and a full roster.

  python -m experiments.roster_speed
  python -m experiments.roster_speed --checkpoint=embedded:wordmath_overtrained --num_members=8

Solves word problems greedily in several ways that take turns, and counts what each changes: tokens
are compared with the full roster's up to the first that differs. Scoring of the full roster's
answers is timed for each threshold of --unsure, since its cost should follow the unsure positions;
of their last token alone, as of multiple choice, also with 16 positions computed for it, and for
all rosters with a Clean Cache of each or of all.

Writes results.json and table.md to --output.
"""

from collections.abc import Callable, Sequence
import dataclasses
import pathlib
import sys
from typing import Any

from absl import flags
import numpy as np
from tqdm import tqdm

from experiments import meshes
from experiments.benchmarks import timing
from experiments.cli import app, overrides, text_files
from roe_jax import decode, scoring
from roe_jax.completion import Completion, Generation
from roe_jax.roster import Roster

FLAGS = flags.FLAGS
SETTINGS = (
  "checkpoint dtype num_examples batch_size max_new_tokens num_members tau seed draft_tokens "
  "unsure member_stop rounds"
).split()


def define_flags() -> None:
  flags.DEFINE_string("checkpoint", "embedded:wordmath_control", "Model that solves word problems.")
  flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")
  for name, default, text in (
    ("num_examples", 64, "Number of test problems."),
    ("batch_size", 1, "Problems solved together."),
    ("max_new_tokens", 64, "Maximum number of tokens per problem."),
    ("num_members", 32, "Roster size n."),
    ("rounds", 5, "Timing rounds, in which all ways take turns."),
  ):
    flags.DEFINE_integer(name, default, text, lower_bound=1)
  flags.DEFINE_float("tau", 0.5, "Router temperature τ of all layers.", lower_bound=0.0)
  flags.DEFINE_integer("seed", 0, "Seed for routing noise.")
  flags.DEFINE_list("draft_tokens", ["4", "8", "16"], "Maximum numbers of drafted tokens.")
  flags.DEFINE_list(
    "unsure",
    ["margin<0.5", "margin<0.9", "margin<0.99"],
    "Where members run, see --unsure of "
    "experiments.generate; also together with --member_stop and the first of --draft_tokens.",
  )
  flags.DEFINE_list("member_stop", ["exact", "0.01"], "When no more members run.")
  flags.DEFINE_string("output", "results/roster_speed", "Folder of the results.")


@dataclasses.dataclass(frozen=True)
class Result:
  """What one way costs and changes.

  Attributes:
    seconds_per_token: quartiles.
    of_baseline: median ratio of the seconds to the baseline's.
    of_roster: median ratio of the seconds to the full roster's.
    passes_per_token: tokens x members computed for a token, after the prompt.
    kept: share of the drafted tokens that were kept; None without drafts.
    changed: tokens that differ from the full roster's.
    compared: tokens compared with these.
    unsure: share of the tokens for which more members than the clean one ran.
  """

  seconds_per_token: tuple[float, float, float]
  of_baseline: float
  of_roster: float
  passes_per_token: float
  kept: float | None
  changed: int
  compared: int
  unsure: float


def ways(
  roster: Roster, drafts: Sequence[int], unsure: Sequence[str], stops: Sequence[str]
) -> dict[str, Roster]:
  """Returns the rosters to time, by name."""
  found = {"baseline": roster.history(), "roster": roster}
  found |= {f"drafts of {j}": roster.replace(draft_tokens=j) for j in drafts}
  found |= {f"stop {s}": roster.replace(member_stop=s) for s in stops}
  for where in unsure:
    found[where] = roster.replace(unsure=where)
    for more in [{"member_stop": s} for s in stops[:1]] + [{"draft_tokens": j} for j in drafts[:1]]:
      name = ", ".join(f"{key.partition('_')[2]} {value}" for key, value in more.items())
      found[f"{where}, {name}"] = roster.replace(unsure=where, **more)
  return found


def changed_tokens(expected: Sequence[Completion], found: Sequence[Completion]) -> tuple[int, int]:
  """Returns how many completions part from the expected ones, and how many tokens are compared."""
  changed = compared = 0
  for one, other in zip(expected, found, strict=True):
    pairs = list(zip(one.tokens, other.tokens))
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    changed += place is not None
    compared += len(pairs) if place is None else place + 1
  return changed, compared


def measure(
  model: meshes.Model, rosters: dict[str, Roster], rounds: int, on_turn: Callable[[], Any]
) -> tuple[dict[str, Result], dict[str, dict[str, Any]]]:
  """Returns the results of generation, and seconds and unsure shares of scoring, by name."""
  found: dict[str, Generation] = {}

  def generate(name):
    def run(count):
      for _ in range(count):
        found[name] = decode.generate(
          model.params,
          model.config,
          model.prompts,
          max_new_tokens=model.max_new_tokens,
          roster=rosters[name],
          stop_tokens=model.stop_tokens,
          batch_size=model.batch_size,
        )

    return run

  seconds = timing.take_turns({n: generate(n) for n in rosters}, rounds, on_turn=on_turn)
  expected = found["roster"].completions
  counts = {name: sum(len(c.tokens) for c in g.completions) for name, g in found.items()}
  rates = {name: s / counts[name] for name, s in seconds.items()}
  results = {}
  for name, generation in found.items():
    completions, drafted = generation.completions, generation.throughput.drafted
    members = np.concatenate([c.members for c in completions])
    results[name] = Result(
      timing.quartiles(rates[name]),
      timing.median_ratio(rates[name], rates["baseline"]),
      timing.median_ratio(rates[name], rates["roster"]),
      sum(c.forward_passes for c in completions) / counts[name],
      counts[name] / drafted if drafted else None,
      *changed_tokens(expected, completions),
      float((members > 1).mean()),
    )
  texts = [p + c.tokens for p, c in zip(model.prompts, expected)]
  starts, shares = [len(p) for p in model.prompts], {}

  own = [n for n, r in rosters.items() if not r.draft_tokens and r.member_stop is None]

  def score(names, starts, **options):
    def run(count):
      for _ in range(count):
        of_rosters = scoring.score_rosters(
          model.params, model.config, texts, [rosters[n] for n in names], starts, **options
        )
        for name, scores in zip(names, of_rosters):
          members = np.concatenate([s.members for s in scores.sequences])
          shares[name, len(members)] = float((members > 1).mean())

    return run

  last = [len(t) - 1 for t in texts]
  kinds = {n: ([n], starts, {}) for n in own}
  kinds |= {
    "roster, last token": (["roster"], last, {}),
    "roster, last token, 16 positions": (["roster"], last, {"chunk_size": 16}),
    "all of these, last token, together": (own, last, {}),
  }
  runs: dict[str, Callable[[int], object]] = {
    name: score(names, at, **options) for name, (names, at, options) in kinds.items()
  }
  alone = [score([n], last) for n in own]
  runs["all of these, last token, one by one"] = lambda count: [run(count) for run in alone]
  seconds = timing.take_turns(runs, rounds, on_turn=on_turn)
  total = sum(len(t) - at for t, at in zip(texts, starts))
  return results, {
    n: {"seconds": float(np.nanmedian(s)), "unsure": shares.get((n, total))}
    for n, s in seconds.items()
  }


def table(results: dict[str, Result], scores: dict[str, dict[str, Any]]) -> str:
  """Formats the results as Markdown tables."""
  lines = [
    "| | ms per token [quartiles] | of the baseline | of the roster | forward passes per token | "
    "drafted tokens kept | tokens with members | tokens changed |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for name, r in results.items():
    low, middle, high = (1e3 * s for s in r.seconds_per_token)
    cells = (
      name,
      f"{middle:.2f} [{low:.2f}, {high:.2f}]",
      f"{r.of_baseline:.2f}",
      f"{r.of_roster:.2f}",
      f"{r.passes_per_token:.1f}",
      "" if r.kept is None else f"{100 * r.kept:.0f} %",
      f"{100 * r.unsure:.1f} %",
      f"{r.changed} of {r.compared}",
    )
    lines.append(f"| {' | '.join(cells)} |")
  lines += ["", "| scoring | seconds | unsure tokens |", "|---|---|---|"]
  lines += [
    f"| {name} | {s['seconds']:.2f} | "
    + ("" if s["unsure"] is None else f"{100 * s['unsure']:.1f} %")
    + " |"
    for name, s in scores.items()
  ]
  return "\n".join(lines) + "\n"


def main(argv) -> None:
  del argv
  drafts = overrides.items("draft_tokens", int)
  config = app.load_config(FLAGS.checkpoint)
  roster = Roster.create(config, FLAGS.num_members, FLAGS.tau, seed=FLAGS.seed)
  if roster.is_baseline or not FLAGS.tau:
    raise ValueError("--num_members must be at least 2 and --tau positive: others are the baseline")
  rosters = ways(roster, drafts, FLAGS.unsure, FLAGS.member_stop)
  settings = (FLAGS.num_examples, FLAGS.num_members, FLAGS.tau, FLAGS.seed, FLAGS.max_new_tokens)
  model = meshes.open_model(FLAGS.checkpoint, None, *settings, dtype=FLAGS.dtype)
  model = dataclasses.replace(model, batch_size=FLAGS.batch_size)
  with tqdm(unit="turn", file=sys.stderr) as bar:
    results, scores = measure(model, rosters, FLAGS.rounds, bar.update)
  output = pathlib.Path(FLAGS.output)
  written = {n: dataclasses.asdict(r) for n, r in results.items()}
  given = {name: FLAGS[name].value for name in SETTINGS}
  record = {"settings": given, "generation": written, "scoring": scores}
  app.write_atomically(output / "results.json", text_files.to_json(record, indent=2) + "\n")
  app.write_atomically(output / "table.md", text := table(results, scores))
  print(text)
  print(f"Saved {output}/table.md and results.json.")


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main, not_distributed="it times one machine")


if __name__ == "__main__":
  program()
