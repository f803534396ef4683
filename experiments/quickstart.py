"""The whole method on two small models that ship with the package.

  python -m experiments.quickstart

Scores and solves held-out arithmetic word problems with the plain model (as it
is, and with its output temperature fitted on validation problems) and with
rosters of several sizes; prints a table for each model, one problem solved token
by token, and saves a picture and all figures under --output. Started again with
the same flags, it goes on with what is missing in --output.
"""

from collections.abc import Callable
import dataclasses
import itertools
import json
import pathlib
import time
from typing import Any

from absl import flags
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tabulate
from tqdm import tqdm

from experiments.analysis import paired_statistics
from experiments.cli import app
from experiments.records import jsonl
from experiments.tasks import wordmath
from roe_jax import batching, decode, diagnostics, prefill, scoring
from roe_jax.completion import Completion
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster
from roe_jax.sampling import Sampler
from roe_jax.text.tokenizer import Tokenizer, stop_tokens

FLAGS = flags.FLAGS
OUTPUT_TEMPERATURES = np.geomspace(0.25, 4.0, 13)
MAX_NEW_TOKENS = 64


def define_flags() -> None:
  flags.DEFINE_list(
    "checkpoints",
    [app.EMBEDDED + "wordmath_overtrained", app.EMBEDDED + "wordmath_control"],
    "Models to compare on, embedded ones or folders.",
  )
  app.define_mesh_flag()
  flags.DEFINE_multi_integer("num_members", [1, 2, 4, 8, 16], "Roster sizes; may be repeated.")
  flags.DEFINE_string("temperature_profile", "0.3", "Router temperature τ, as in generate.")
  flags.DEFINE_integer("num_problems", 160, "Test problems.")
  flags.DEFINE_integer("num_validation", 80, "Validation problems, to fit output temperatures.")
  flags.DEFINE_integer("batch_size", 40, "Problems decoded together.")
  flags.DEFINE_integer("seed", 0, "Of the routing noise.")
  flags.DEFINE_string("output", "results/quickstart", "Folder of the results.")


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Problems as tokens: prompts, whole texts with solution, and its length."""

  problems: list[wordmath.Problem]
  prompts: list[list[int]]
  texts: list[list[int]]

  @property
  def starts(self) -> list[int]:
    return [len(p) for p in self.prompts]

  @property
  def tokens(self) -> np.ndarray:
    return np.array([len(t) - len(p) for t, p in zip(self.texts, self.prompts)])


def encode(tokenizer: Tokenizer, problems: list[wordmath.Problem], eos: int) -> Encoded:
  prompts = [tokenizer.encode(wordmath.prompt(p)) for p in problems]
  texts = [
    prompt + tokenizer.encode(wordmath.completion(p), add_special_tokens=False) + [eos]
    for prompt, p in zip(prompts, problems)
  ]
  return Encoded(problems, prompts, texts)


@dataclasses.dataclass
class Measured:
  """What one setting made of the test problems.

  Attributes:
    roster: its settings.
    output_temperature: fitted on validation problems.
    nll: `[X]` summed over each solution's tokens, nats.
    fitted_nll: `[X]` likewise, at the output temperature.
    correct: `[X]` bool.
    rates: tokens per second, of each batch.
    completions: what was generated.
  """

  roster: Roster
  output_temperature: float
  nll: np.ndarray
  fitted_nll: np.ndarray
  correct: np.ndarray = None
  rates: list[float] = dataclasses.field(default_factory=list)
  completions: list[Completion] = dataclasses.field(default_factory=list)


def score_problems(
  params: Params, config: ModelConfig, roster: Roster, validation: Encoded, test: Encoded
) -> dict:
  """Fits the output temperature on validation problems and scores test problems.

  Returns:
    The values of `Measured` that it fills, as JSON.
  """
  scores = scoring.score(
    params,
    config,
    validation.texts,
    validation.starts,
    roster=roster,
    output_temperatures=OUTPUT_TEMPERATURES,
    batch_size=FLAGS.batch_size,
  )
  nll = -np.concatenate([t.log_probs for t in scores.sequences])
  temperature = paired_statistics.fit_output_temperature(nll, OUTPUT_TEMPERATURES)
  # As many output temperatures as above, so that nothing is compiled again.
  both = np.full(len(OUTPUT_TEMPERATURES), temperature)
  both[0] = 1.0
  scores = scoring.score(
    params,
    config,
    test.texts,
    test.starts,
    roster=roster,
    output_temperatures=both,
    batch_size=FLAGS.batch_size,
  )
  sums = np.array([-t.log_probs[:, :2].sum(axis=0, dtype=np.float64) for t in scores.sequences])
  return {
    "output_temperature": float(temperature),
    "nll": sums[:, 0].tolist(),
    "fitted_nll": sums[:, 1].tolist(),
  }


def solve_problems(
  params: Params,
  config: ModelConfig,
  tokenizer: Tokenizer,
  measured: list[Measured],
  test: Encoded,
  keep: Callable[[str, Callable], Any],
  bar: tqdm,
) -> None:
  """Solves test problems greedily with every setting in turn, batch by batch.

  Settings take turns on each batch, in an order that changes: whatever else the
  machine does, and what the call before left behind, falls on all of them alike.
  """
  size, compiled = FLAGS.batch_size, set()

  def compile_for(prompts):
    """Compiles outside of what is timed, for every shape that comes."""
    shape = (
      min(size, batching.bucket(len(prompts))),
      prefill.capacity_for(config, prompts, MAX_NEW_TOKENS),
    )
    if shape in compiled:
      return
    compiled.add(shape)
    for m in measured:
      state = decode.start(
        params, config, m.roster, prompts, range(len(prompts)), MAX_NEW_TOKENS, *shape
      )
      decode.decode_steps(
        params, config, m.roster, Sampler.greedy(), state, jnp.full(4, -1, jnp.int32), jnp.int32(1)
      )

  def solve(first):
    prompts = test.prompts[first : first + size]
    compile_for(prompts)
    found = {}
    for i in np.random.default_rng(first).permutation(len(measured)):
      generation = decode.generate(
        params,
        config,
        prompts,
        max_new_tokens=MAX_NEW_TOKENS,
        roster=measured[i].roster,
        stop_tokens=stop_tokens(tokenizer, config),
        decode=tokenizer.decode,
        batch_size=size,
        request_ids=range(first, first + len(prompts)),
      )
      found[i] = {
        "rate": generation.throughput.tokens_per_second,
        "completions": [dataclasses.asdict(c) for c in generation.completions],
      }
    return [found[i] for i in range(len(measured))]

  for first in range(0, len(test.prompts), size):
    for m, found in zip(measured, keep(f"solutions from {first} on", lambda: solve(first))):
      m.rates.append(found["rate"])
      m.completions += [Completion(**c) for c in found["completions"]]
      bar.update(len(found["completions"]))
  for m in measured:
    m.correct = np.array(
      [wordmath.is_correct(c.text, p) for c, p in zip(m.completions, test.problems)]
    )


def _interval(difference: paired_statistics.Difference, unit: str) -> str:
  return f"{difference.value:+.2f}{unit} [{difference.low:+.2f}, {difference.high:+.2f}]" + (
    " *" if difference.excludes_zero else ""
  )


def summarize(measured: list[Measured], test: Encoded) -> list[dict]:
  """One row of figures for the plain model, itself fitted, and each roster.

  Differences are to the plain model on the same problems; those of fitted
  perplexities are to the fitted plain model.
  """
  plain = measured[0]
  total = test.tokens.sum()
  rows = []
  for m in measured:
    rows.append(
      {
        "num_members": m.roster.num_members,
        "perplexity": float(np.exp(m.nll.sum() / total)),
        "perplexity_difference": paired_statistics.paired_perplexity(m.nll, plain.nll, test.tokens),
        "output_temperature": m.output_temperature,
        "fitted_perplexity": float(np.exp(m.fitted_nll.sum() / total)),
        "fitted_to_plain": paired_statistics.paired_perplexity(
          m.fitted_nll, plain.nll, test.tokens
        ),
        "fitted_to_fitted": paired_statistics.paired_perplexity(
          m.fitted_nll, plain.fitted_nll, test.tokens
        ),
        "accuracy": 100.0 * float(m.correct.mean()),
        "accuracy_difference": paired_statistics.paired_accuracy(m.correct, plain.correct),
        "tokens_per_second": float(np.median(m.rates)),
        "cost": float(np.median(np.array(plain.rates) / np.array(m.rates))),
      }
    )
  return rows


def table(rows: list[dict]) -> str:
  """The rows as text; * marks differences whose interval leaves out zero."""
  lines = []
  for i, r in enumerate(rows):
    name = f"roster, n = {r['num_members']}" if i else "plain model"
    lines.append(
      [
        name,
        r["perplexity"],
        _interval(r["perplexity_difference"], "%") if i else "",
        r["output_temperature"],
        r["fitted_perplexity"],
        _interval(r["fitted_to_fitted" if i else "fitted_to_plain"], "%")
        + ("" if i else " (to T = 1)"),
        r["accuracy"],
        _interval(r["accuracy_difference"], "") if i else "",
        r["tokens_per_second"],
        r["cost"],
      ]
    )
  return tabulate.tabulate(
    lines,
    floatfmt=("", ".4f", "", ".2f", ".4f", "", ".1f", "", ".0f", ".2f"),
    headers=[
      "",
      "perplexity",
      "difference\nto plain",
      "fitted\nT",
      "perplexity\nat fitted T",
      "difference to\nplain at fitted T",
      "accuracy\n%",
      "difference,\npoints",
      "tokens\nper s",
      "cost,\nn = 1 is 1",
    ],
  )


def verdict(rows: list[dict]) -> str:
  """What the intervals of the largest roster say, in sentences."""
  plain, largest = rows[0], rows[-1]
  n = largest["num_members"]

  def clear(difference, unit):
    if not difference.excludes_zero:
      return f"makes no clear difference to the {unit}"
    return f"{'lowers' if difference.value < 0 else 'raises'} the {unit} clearly"

  return "\n".join(
    [
      f"A roster of {n} {clear(largest['perplexity_difference'], 'perplexity')}; fitting one "
      f"output temperature ({plain['output_temperature']:.2f}) to the plain model "
      f"{clear(plain['fitted_to_plain'], 'perplexity')}.",
      f"With output temperatures fitted on both sides the roster "
      f"{clear(largest['fitted_to_fitted'], 'perplexity')}.",
      f"It {clear(largest['accuracy_difference'], 'accuracy')}.",
    ]
  )


def show_solution(measured: list[Measured], test: Encoded, tokenizer: Tokenizer) -> str:
  """One problem solved token by token by the roster that changes most choices."""
  candidates = [m for m in measured if m.roster.num_members > 1]
  if not candidates:
    return ""

  def changes(completion):
    return sum(a != b for a, b in zip(completion.tokens, completion.clean_tokens))

  m = max(candidates, key=lambda m: m.roster.num_members)
  # A correct solution with a changed choice, if there is one.
  index = max(
    range(len(m.completions)), key=lambda i: (min(changes(m.completions[i]), 1), m.correct[i])
  )
  completion, problem = m.completions[index], test.problems[index]
  lines = [
    f"Test problem {index}, solved with n = {m.roster.num_members}:",
    problem.question,
    f"Solution: {problem.answer}",
    f"Roster:  {completion.text} ({'correct' if m.correct[index] else 'wrong'})",
    f"Plain:   {measured[0].completions[index].text} "
    f"({'correct' if measured[0].correct[index] else 'wrong'})",
    "",
  ]
  for token, clean, log_prob in zip(
    completion.tokens, completion.clean_tokens, completion.log_probs
  ):
    line = f"  {_visible(tokenizer, token):>14}  p = {np.exp(log_prob):.3f}"
    if token != clean:
      line += f"   <- the clean member alone would choose {_visible(tokenizer, clean)}"
    lines.append(line)
  count = sum(map(changes, m.completions))
  total = sum(len(c.tokens) for c in m.completions)
  lines.append(
    f"Over all {len(m.completions)} problems the roster changed {count} of {total} choices."
  )
  return "\n".join(lines)


def _visible(tokenizer, token):
  return repr(tokenizer.decode([token], skip_special_tokens=False))


def draw(results: dict[str, tuple[list[dict], np.ndarray]], path: pathlib.Path) -> None:
  """Quality against n, and the agreement of members' experts by layer."""
  figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
  aside = itertools.cycle((-1, 0, -1, 1, 2, 1))
  styles = [dict(color="black", marker="o"), dict(color="0.55", marker="s", linestyle="--")]
  for (name, (rows, agreement)), style in zip(results.items(), styles * len(results)):
    rosters = rows[1:]
    n = np.array([r["num_members"] for r in rosters])
    for axis, key, fill in (
      (axes[0], "perplexity_difference", "full"),
      (axes[0], "fitted_to_fitted", "none"),
      (axes[1], "accuracy_difference", "full"),
    ):
      values = np.array([r[key].value for r in rosters])
      low = values - [r[key].low for r in rosters]
      high = [r[key].high for r in rosters] - values
      label = name + (", both at fitted output temperature" if fill == "none" else "")
      # A step aside, so that no interval hides another.
      axis.errorbar(
        n * 1.05 ** next(aside),
        values,
        yerr=np.maximum(0, [low, high]),
        capsize=3,
        fillstyle=fill,
        label=label,
        **style,
      )
    axes[2].plot(np.arange(len(agreement)), 100 * agreement, label=name, **style)
  for axis, what in (
    (axes[0], "perplexity, difference to plain (%)"),
    (axes[1], "accuracy, difference to plain (points)"),
  ):
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xscale("log", base=2)
    ticks = FLAGS.num_members
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.set_xlabel("roster members n")
    axis.set_ylabel(what)
  axes[2].set_ylim(0, 100)
  axes[2].xaxis.get_major_locator().set_params(integer=True)
  axes[2].set_xlabel("layer")
  axes[2].set_ylabel("experts shared with the clean member (%)")
  for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
  figure.legend(
    *axes[0].get_legend_handles_labels(),
    loc="outside lower center",
    ncols=2,
    frameon=False,
    fontsize=9,
  )
  axes[1].set_title(
    f"router temperature {FLAGS.temperature_profile}, {FLAGS.num_problems} test "
    "problems, 95 % intervals",
    fontsize=9,
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def run_model(
  name: str, keep: Callable[[str, Callable], Any], bar: tqdm
) -> tuple[list[dict], np.ndarray, str, dict]:
  """All measurements on one model; `keep` is that of `jsonl.SavedValues`."""
  params, config, tokenizer = app.open_model(name, "float32", FLAGS.mesh)
  temperatures = app.parse_temperatures(FLAGS.temperature_profile)
  eos = config.eos_token_ids[0]
  validation, test = (
    encode(tokenizer, wordmath.problems(split, count), eos)
    for split, count in (("validation", FLAGS.num_validation), ("test", FLAGS.num_problems))
  )
  rosters = {"plain": Roster.create(config)} | {
    f"n = {n}": Roster.create(config, n, temperatures, seed=FLAGS.seed) for n in FLAGS.num_members
  }
  measured = []
  for setting, roster in rosters.items():
    found = keep(
      f"scores, {setting}", lambda: score_problems(params, config, roster, validation, test)
    )
    measured.append(
      Measured(
        roster, found["output_temperature"], np.array(found["nll"]), np.array(found["fitted_nll"])
      )
    )
    bar.update(len(test.texts))
  solve_problems(params, config, tokenizer, measured, test, keep, bar)
  count = min(FLAGS.batch_size, FLAGS.num_problems)
  largest = max(rosters.values(), key=lambda r: r.num_members)
  agreement = np.array(
    keep(
      "routing agreement",
      lambda: diagnostics.routing_agreement(
        params, config, largest, test.texts[:count], test.starts[:count]
      ).tolist(),
    )
  )
  return (
    summarize(measured, test),
    agreement,
    show_solution(measured, test, tokenizer),
    largest.settings(),
  )


def main(argv) -> None:
  del argv
  if min(FLAGS.num_problems, FLAGS.num_validation, FLAGS.batch_size) < 1:
    raise ValueError("--num_problems, --num_validation and --batch_size must be at least 1")
  if max(FLAGS.num_members) < 2:
    raise ValueError("--num_members needs a roster of at least 2 to compare with the plain model")
  for name in FLAGS.checkpoints:  # refuse bad settings before any work
    config = app.load_config(name)
    if not config.eos_token_ids:
      raise ValueError(f"{name} has no end-of-text token, which ends a solution")
    for n in FLAGS.num_members:
      Roster.create(config, n, app.parse_temperatures(FLAGS.temperature_profile), seed=FLAGS.seed)
  output = pathlib.Path(FLAGS.output)
  begin = time.perf_counter()
  kept = jsonl.SavedValues(
    output / "measured.jsonl",
    {"temperatures": app.parse_temperatures(FLAGS.temperature_profile)}
    | {
      name: FLAGS[name].value
      for name in ("num_members", "num_problems", "num_validation", "batch_size", "seed")
    },
  )
  results, texts, records = {}, [], {}
  total = len(FLAGS.checkpoints) * (1 + len(FLAGS.num_members)) * 2 * FLAGS.num_problems
  with app.progress(total=total, unit="problem") as bar:
    for checkpoint in FLAGS.checkpoints:
      name = pathlib.Path(checkpoint.removeprefix(app.EMBEDDED)).name
      bar.set_description(name)
      rows, agreement, solution, settings = run_model(
        checkpoint, lambda part, compute: kept.get(f"{checkpoint}: {part}", compute), bar
      )
      results[name] = rows, agreement
      texts.append(f"## {name}\n\n{table(rows)}\n\n{verdict(rows)}\n\n{solution}\n")
      records[name] = {
        "rows": [
          {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in row.items()}
          for row in rows
        ],
        "routing_agreement": agreement.tolist(),
        "roster": settings,
      }
      app.write_atomically(output / "results.json", json.dumps(records, indent=2) + "\n")
  text = (
    f"{FLAGS.num_problems} test problems, greedy decoding, Clean Cache, router temperature "
    f"{FLAGS.temperature_profile}.\nIn brackets: 95 % intervals of the difference on the same "
    "problems; * where it leaves out zero.\nFitted T: output temperature fitted on "
    f"{FLAGS.num_validation} validation problems.\n\n" + "\n".join(texts)
  )
  print("\n" + text)
  app.write_atomically(output / "table.txt", text)
  if app.is_first_process():
    draw(results, output / "quickstart.png")
  print(
    f"Saved {output}/quickstart.png, table.txt and results.json; "
    f"{time.perf_counter() - begin:.0f} s."
  )


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main)


if __name__ == "__main__":
  program()
