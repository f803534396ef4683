"""Times generation with drafted tokens and adaptive rosters against the baseline and a full roster.

  python -m experiments.roster_speed
  python -m experiments.roster_speed --checkpoint=embedded:wordmath_overtrained --num_members=8

Solves word problems greedily in several ways that take turns, and counts what each changes: tokens
are compared with the full roster's up to the first that differs. Scoring of the full roster's
answers is timed for each threshold of --unsure, since its cost should follow the unsure positions;
of their last token alone, as of multiple choice, also with 16 positions computed for it, and for
all rosters with a Clean Cache of each or of all.

  python -m experiments.roster_speed --checkpoint=smollm2_carved --text=wiki.txt \\
      --unsure="top_probability<0.2,top_probability<0.5,top_probability<0.8"

With --text, any model scores --num_examples windows of a text file instead, and each time is
compared with the straight line, over the share of unsure positions, from nowhere to everywhere.

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
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster

FLAGS = flags.FLAGS
SETTINGS = (
  "checkpoint dtype num_examples batch_size max_new_tokens num_members tau seed draft_tokens "
  "unsure member_stop rounds text window"
).split()

# Thresholds below and above the top probabilities that occur.
NEVER, ALWAYS = "top_probability<0", "top_probability<1"


def define_flags() -> None:
  flags.DEFINE_string("checkpoint", "embedded:wordmath_control", "Model that solves word problems.")
  flags.DEFINE_string("text", None, "Text file to score instead of solving problems.")
  flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")
  for name, default, text in (
    ("num_examples", 64, "Number of test problems, or of the first windows of --text."),
    ("batch_size", 1, "Problems solved, or windows scored, together."),
    ("window", 256, "Tokens per window of --text, of which the second half is scored."),
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
  starts = [len(p) for p in model.prompts]
  own = {n: r for n, r in rosters.items() if not r.draft_tokens and r.member_stop is None}
  scored = model.params, model.config, texts, starts, own
  return results, scoring_times(*scored, rounds, on_turn, last_tokens=True)


def scoring_times(
  params: Params,
  config: ModelConfig,
  texts: Sequence[Sequence[int]],
  starts: Sequence[int],
  rosters: dict[str, Roster],
  rounds: int,
  on_turn: Callable[[], Any] = lambda: None,
  last_tokens: bool = False,
  **settings: Any,
) -> dict[str, dict[str, Any]]:
  """Returns median seconds of scoring texts from `starts` on, and unsure shares, by roster.

  With `last_tokens`, also of each text's last token alone, with "roster" and with all rosters.
  Settings are those of `scoring.score_rosters`.
  """
  shares = {}

  def score(names, starts, **options):
    def run(count):
      for _ in range(count):
        of_rosters = scoring.score_rosters(
          params, config, texts, [rosters[n] for n in names], starts, **settings, **options
        )
        for name, scores in zip(names, of_rosters):
          members = np.concatenate([s.members for s in scores.sequences])
          shares[name, len(members)] = float((members > 1).mean())

    return run

  runs: dict[str, Callable[[int], object]] = {n: score([n], starts) for n in rosters}
  if last_tokens:
    last = [len(t) - 1 for t in texts]
    alone = [score([n], last) for n in rosters]
    runs |= {
      "roster, last token": score(["roster"], last),
      "roster, last token, 16 positions": score(["roster"], last, chunk_size=16),
      "all of these, last token, together": score(list(rosters), last),
      "all of these, last token, one by one": lambda count: [run(count) for run in alone],
    }
  seconds = timing.take_turns(runs, rounds, on_turn=on_turn)
  total = sum(len(t) - at for t, at in zip(texts, starts))
  return {
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
  return "\n".join(lines) + "\n\n" + scoring_table(scores)


def scoring_table(scores: dict[str, dict[str, Any]]) -> str:
  """Formats times of scoring as a Markdown table; `add_proportional` adds the last column."""
  lines = ["| scoring | seconds | unsure tokens | of proportional |", "|---|---|---|---|"]
  for name, s in scores.items():
    share = "" if s["unsure"] is None else f"{100 * s['unsure']:.1f} %"
    ratio = f"{s['of_proportional']:.2f}" if "of_proportional" in s else ""
    lines.append(f"| {name} | {s['seconds']:.2f} | {share} | {ratio} |")
  return "\n".join(lines) + "\n"


def add_proportional(scores: dict[str, dict[str, Any]], thresholds: Sequence[str]) -> None:
  """Adds the ratio of each time to one that grows in proportion to the unsure share.

  Args:
    scores: `scoring_times`, changed in place.
    thresholds: names of adaptive rosters; the first and the last one define what is proportional.
  """
  low, high = scores[thresholds[0]], scores[thresholds[-1]]
  slope = (high["seconds"] - low["seconds"]) / (high["unsure"] - low["unsure"])
  for s in map(scores.__getitem__, thresholds):
    s["of_proportional"] = s["seconds"] / (low["seconds"] + slope * (s["unsure"] - low["unsure"]))


def time_text(roster: Roster) -> tuple[dict[str, dict[str, Any]], str]:
  """Times the scoring of --text; returns the times, and their table."""
  text = text_files.read(FLAGS.text)
  params, config, tokenizer = app.open_model(FLAGS.checkpoint, FLAGS.dtype)
  cut = scoring.windows(config, tokenizer.encode(text), FLAGS.window)
  chosen = slice(1, FLAGS.num_examples + 1)  # of the first one, other tokens are scored
  texts, starts = cut.sequences[chosen], cut.starts[chosen]
  if len(texts) < FLAGS.num_examples:
    raise ValueError(
      f"--text has {len(texts)} windows of {FLAGS.window} tokens after its first one, fewer than "
      f"--num_examples={FLAGS.num_examples}"
    )
  thresholds = [NEVER, *FLAGS.unsure, ALWAYS]
  rosters = {"baseline": roster.history(), "roster": roster}
  rosters |= {name: roster.replace(unsure=name) for name in thresholds}
  with tqdm(unit="turn", file=sys.stderr) as bar:
    scores = scoring_times(
      params, config, texts, starts, rosters, FLAGS.rounds, bar.update, batch_size=FLAGS.batch_size
    )
  add_proportional(scores, thresholds)
  return scores, scoring_table(scores)


def main(argv) -> None:
  del argv
  drafts = overrides.items("draft_tokens", int)
  config = app.load_config(FLAGS.checkpoint)
  roster = Roster.create(config, FLAGS.num_members, FLAGS.tau, seed=FLAGS.seed)
  if roster.is_baseline or not FLAGS.tau:
    raise ValueError("--num_members must be at least 2 and --tau positive: others are the baseline")
  if FLAGS.text is not None:
    scores, text = time_text(roster)
    return save({"scoring": scores}, text)
  rosters = ways(roster, drafts, FLAGS.unsure, FLAGS.member_stop)
  settings = (FLAGS.num_examples, FLAGS.num_members, FLAGS.tau, FLAGS.seed, FLAGS.max_new_tokens)
  model = meshes.open_model(FLAGS.checkpoint, None, *settings, dtype=FLAGS.dtype)
  model = dataclasses.replace(model, batch_size=FLAGS.batch_size)
  with tqdm(unit="turn", file=sys.stderr) as bar:
    results, scores = measure(model, rosters, FLAGS.rounds, bar.update)
  written = {n: dataclasses.asdict(r) for n, r in results.items()}
  save({"generation": written, "scoring": scores}, table(results, scores))


def save(results: dict[str, Any], table: str) -> None:
  """Writes the results and their table to --output, and prints the table."""
  output = pathlib.Path(FLAGS.output)
  record = {"settings": {name: FLAGS[name].value for name in SETTINGS}} | results
  app.write_atomically(output / "results.json", text_files.to_json(record, indent=2) + "\n")
  app.write_atomically(output / "table.md", table)
  print(table)
  print(f"Saved {output}/table.md and results.json.")


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main, not_distributed="it times one machine")


if __name__ == "__main__":
  program()
