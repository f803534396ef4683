"""Chooses where the noisy members of a roster run, for a share of greedy tokens that may change.

  python -m experiments.adapt --checkpoint=olmoe --tau=results/tune/gsm8k/profile.json \\
      --task=paper/gsm8k --output=results/adapt/gsm8k
  python -m experiments.generate --checkpoint=olmoe --tau=results/adapt/gsm8k/profile.json \\
      --prompt=...

The roster answers --num_examples validation examples greedily. A token is lost at a threshold on
the clean member's top probability if that member is sure there but would have chosen another token.
The lowest threshold that loses at most --max_changed of the tokens is written to a temperature
profile, as `unsure`. On --num_confirm other examples and with other noise, the share of lost tokens
is reported with an exact binomial interval, which takes tokens as independent.

Writes profile.json, whose "objective" has what was found, to --output.
"""

from collections.abc import Sequence
import dataclasses
import math
import pathlib

from absl import flags
import numpy as np

from checkpoints_convert import outputs
from experiments import tasks
from experiments.cli import app
from experiments.cli.extras import scipy
from experiments.evaluation.engine import Engine, Generated
from experiments.evaluation.requests import Prompt, RequestBuilder, TaskRequests
from roe_jax import scoring, temperature_profiles
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster
from roe_jax.temperature_profiles import Profile

FLAGS = flags.FLAGS
SPLIT = "validation"
PROFILE = "profile.json"
# Thresholds are rounded up to so many digits, as settings are written.
_DIGITS = 6


def define_flags() -> None:
  app.define_model_flags()
  app.define_roster_flags(num_members=8)
  app.define_chat_flags()
  app.define_limit_flag()
  flags.DEFINE_string("task", "wordmath", "Task whose examples are answered.")
  flags.DEFINE_string("data_dir", "data", "Folder of the tasks' data.")
  for name, default, text in (
    ("num_examples", 200, "Examples that the threshold is chosen on."),
    ("num_confirm", 200, "Fresh examples for the confirmation."),
    ("batch_size", 16, "Requests per batch."),
  ):
    flags.DEFINE_integer(name, default, text, lower_bound=1)
  flags.DEFINE_float(
    "max_changed",
    0.001,
    "Share of the greedy tokens that may change.",
    lower_bound=0.0,
    upper_bound=1.0,
  )
  flags.DEFINE_string("output", "results/adapt", "Folder of the profile.")


@dataclasses.dataclass(frozen=True)
class Tokens:
  """Greedy tokens of a full roster.

  Attributes:
    top: `[X]`, the clean member's top probability at each.
    changed: `[X]` bool, whether that member would have chosen another token.
  """

  top: np.ndarray
  changed: np.ndarray

  def lost(self, threshold: float) -> int:
    """Returns how many tokens change if the clean member is sure from `threshold` on."""
    return int((self.changed & (self.top >= np.float32(threshold))).sum())

  def unsure(self, threshold: float) -> float:
    """Returns the share of tokens where members run."""
    return float((self.top < np.float32(threshold)).mean())


def threshold(found: Tokens, share: float) -> float:
  """Returns the lowest threshold at which at most this share of the tokens is lost."""
  allowed = math.floor(share * len(found.top))
  changed = np.sort(found.top[found.changed])[::-1]
  if len(changed) <= allowed:
    return 0.0
  # The first token too many must be unsure.
  return math.floor(float(changed[allowed]) * 10**_DIGITS + 1) / 10**_DIGITS


def measure(
  params: Params,
  config: ModelConfig,
  builder: RequestBuilder,
  roster: Roster,
  requests: Sequence[Prompt],
) -> Tokens:
  """Answers prompts greedily, and scores the answers with the clean member."""
  engine = Engine(params, config, builder.tokenizer, roster, FLAGS.batch_size)
  answers = [a for a in engine.answer(requests) if isinstance(a, Generated)]
  completions = [a.completion for a in answers]
  scores = scoring.score(
    params,
    config,
    [[*r.tokens, *c.tokens] for r, c in zip(requests, completions)],
    [len(r.tokens) for r in requests],
    roster=roster.history(),
    batch_size=FLAGS.batch_size,
  )
  pairs = [(t, clean) for c in completions for t, clean in zip(c.tokens, c.clean_tokens)]
  chosen, clean = np.array(pairs).T
  top = np.concatenate([np.exp(s.greedy_log_probs[:, 0]) for s in scores.sequences])
  return Tokens(top, chosen != clean)


def objective(found: Tokens, fresh: Tokens, at: float) -> dict:
  """Returns a profile's "objective" entry."""
  lost, count = fresh.lost(at), len(fresh.top)
  low, high = scipy.stats.binomtest(lost, count).proportion_ci(method="exact")
  return {
    "name": "changed tokens",
    "max_changed": FLAGS.max_changed,
    "threshold": at,
    "chosen_on": {"tokens": len(found.top), "lost": found.lost(at), "unsure": found.unsure(at)},
    "confirmed": {
      "tokens": count,
      "changed_by_roster": int(fresh.changed.sum()),
      "lost": lost,
      "interval": [float(low), float(high)],
      "unsure": fresh.unsure(at),
    },
  }


def main(argv) -> None:
  del argv
  app.refuse_idle(True, ("unsure",), "is what this program chooses: leave it out")
  config = app.load_config(FLAGS.checkpoint)
  roster = app.roster_from_flags(config)
  if roster.is_baseline:
    raise ValueError("the baseline has no noisy members: give --num_members and --tau")
  roster.replace(unsure="top_probability<0.5")  # refused where members cannot be left out
  builder = app.request_builder(config, app.load_tokenizer(FLAGS.checkpoint))
  task, count = tasks.get(FLAGS.task), FLAGS.num_examples + FLAGS.num_confirm
  examples = app.in_all_processes(lambda: task.examples(SPLIT, FLAGS.data_dir, count, FLAGS.chat))
  requests = list(dict.fromkeys(TaskRequests.of(builder, task, examples).all_answering))
  prompts = [r for r in requests if isinstance(r, Prompt)]
  if len(prompts) < len(requests):
    raise ValueError(f"task {FLAGS.task} has choices and no generated answers: give another --task")
  if len(prompts) < count:
    raise ValueError(
      f"the validation split of {FLAGS.task} has {len(prompts)} different questions: too few for "
      f"--num_examples={FLAGS.num_examples} and --num_confirm={FLAGS.num_confirm}"
    )
  params, config = app.load_params(FLAGS.checkpoint, FLAGS.dtype, FLAGS.mesh)
  seeds = FLAGS.seed, FLAGS.seed + 1
  parts = prompts[: FLAGS.num_examples], prompts[FLAGS.num_examples :]
  found, fresh = (
    measure(params, config, builder, roster.replace(seed=seed), part)
    for seed, part in zip(seeds, parts)
  )
  at = threshold(found, FLAGS.max_changed)
  entry = objective(found, fresh, at)
  settings = roster.replace(unsure=f"top_probability<{at}").settings()
  profile = Profile(
    tuple(settings["temperatures"]),
    temperature_profiles.model_of(FLAGS.checkpoint, config, params),
    temperature_profiles.roster_of(settings),
    entry,
    {"task": FLAGS.task, "split": SPLIT, "data_dir": FLAGS.data_dir},
    FLAGS.seed,
  )
  path = pathlib.Path(FLAGS.output) / PROFILE
  app.write_atomically(path, profile.to_json())
  print_result(entry, roster, path)


def print_result(entry: dict, roster: Roster, path: pathlib.Path) -> None:
  """Prints the result."""
  chosen, confirmed, at = entry["chosen_on"], entry["confirmed"], entry["threshold"]
  low, high = (100 * bound for bound in confirmed["interval"])
  passes = 1 + confirmed["unsure"] * (len(roster.members) - 1)
  print(
    f"unsure: top_probability<{at:g}, which loses {chosen['lost']} of {chosen['tokens']} tokens.\n"
    f"On fresh examples with other noise it loses {confirmed['lost']} of {confirmed['tokens']} "
    f"({100 * confirmed['lost'] / confirmed['tokens']:.3f} % [{low:.3f}, {high:.3f}]); the full "
    f"roster changes {confirmed['changed_by_roster']} of the clean member's. Members run for "
    f"{100 * confirmed['unsure']:.1f} % of the tokens: {passes:.1f} forward passes per token in "
    f"place of {len(roster.members)}.\nSaved {path}: give --tau={path} to other programs."
  )


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main, needs=("scipy",), output=outputs.SHARED)


if __name__ == "__main__":
  program()
