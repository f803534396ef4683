"""Measures what quantized experts do to a model, its router and its roster.

  python -m experiments.quantization_study

Stores the experts of two small embedded models in bfloat16, int8, int4 and mxfp4. For each
format: its size; the perplexity of held-out word problems with and without a roster, and its
difference from bfloat16 on the same problems; the share of experts that the baseline still
chooses, next to the share that noisy members have in common with the clean one; and a sweep over
the router temperature τ on validation problems, which shows whether τ must be tuned again.
Prints tables and writes all values to --output. Rerun with the same flags, it resumes.
"""

from collections.abc import Callable
import functools
import pathlib
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from experiments import tasks
from experiments.analysis import paired_statistics
from experiments.cli import app, overrides, text_files
from experiments.cli.extras import tabulate
from experiments.evaluation.engine import Engine
from experiments.evaluation.requests import Continuation, RequestBuilder, TaskRequests
from experiments.records import store
from roe_jax import batching, diagnostics, quantization, transformer
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster
from roe_jax.text.tokenizer import Tokenizer

FLAGS = flags.FLAGS
UNQUANTIZED = "bfloat16"
FORMATS = (UNQUANTIZED, *quantization.FORMATS)


def define_flags() -> None:
  flags.DEFINE_list(
    "checkpoints",
    [app.EMBEDDED + "wordmath_overtrained", app.EMBEDDED + "wordmath_control"],
    "Models with unquantized experts: embedded ones or folders.",
  )
  flags.DEFINE_list(
    "formats",
    list(FORMATS),
    f"Formats of the experts, also nested:BASE-BITS; {UNQUANTIZED} comes first.",
  )
  flags.DEFINE_integer("num_members", 8, "Roster size n.")
  flags.DEFINE_float("tau", 0.3, "Router temperature τ when formats are compared.")
  flags.DEFINE_list("sweep", ["0.1", "0.2", "0.3", "0.4", "0.5", "0.6"], "Values of τ to sweep.")
  flags.DEFINE_integer("num_examples", 160, "Number of test problems.")
  flags.DEFINE_integer("num_validation", 120, "Number of validation problems, for the sweep.")
  flags.DEFINE_integer("batch_size", 40, "Problems scored together.")
  flags.DEFINE_integer("seed", 0, "Seed for routing noise.")
  flags.DEFINE_string("output", "results/quantization", "Folder for the results.")


def read(builder: RequestBuilder, split: str, count: int) -> list[Continuation]:
  """Returns the requests that score the solutions of word problems."""
  task = tasks.get("wordmath")
  examples = task.examples(split, limit=count)
  return TaskRequests.of(builder, task, examples, num_samples=0).all_references


def num_tokens(problems: list[Continuation]) -> np.ndarray:
  """Returns `[X]` tokens of each solution."""
  return np.array([len(p.tokens) for p in problems])


def routing(
  params: Params, config: ModelConfig, problems: list[Continuation]
) -> tuple[np.ndarray, np.ndarray]:
  """Runs the router without noise at the positions that predict the solutions' tokens.

  Returns:
    `[L, P, A]` chosen experts, and `[L, P]` gaps between the A-th and the next router logit.
  """
  sequences = [p.sequence for p in problems]
  tokens = batching.pad(sequences, len(sequences), batching.bucket(max(map(len, sequences))))
  wanted = np.zeros(tokens.shape, bool)
  for mask, p in zip(wanted, problems):
    mask[len(p.context) - 1 : p.max_length - 1] = True
  experts, logits = _route(params_lib.in_storage_dtype(params), config, jnp.asarray(tokens))
  ordered = np.sort(np.asarray(logits)[:, wanted], axis=-1)
  a = config.experts_per_token
  return np.asarray(experts)[:, wanted], ordered[..., -a] - ordered[..., -a - 1]


@functools.partial(jax.jit, static_argnames="config")
def _route(params, config, tokens):
  _, outputs = transformer.forward(params, config, tokens, keep=("experts", "router_logits"))
  return outputs.experts, outputs.router_logits


def shared_experts(chosen: np.ndarray, baseline: np.ndarray) -> np.ndarray:
  """Returns `[L]`, the mean share of chosen experts that the baseline chose too."""
  return (chosen[..., :, None] == baseline[..., None, :]).any(-1).mean(axis=(1, 2))


def measure(
  params: Params,
  config: ModelConfig,
  tokenizer: Tokenizer,
  format: str,
  validation: list[Continuation],
  test: list[Continuation],
  keep: Callable[[str, Callable], Any],
  on_scored: Callable[[int], object],
) -> dict:
  """Measures one format, with the same noise as the others.

  Args:
    params: the unquantized parameters.
    config: their architecture.
    tokenizer: the model's tokenizer.
    format: `UNQUANTIZED`, or a name that `quantization.find` knows.
    validation: problems of the sweep.
    test: problems on which formats are compared.
    keep: `keep(name, compute)` returns the value saved under this name, or else `compute()`.
    on_scored: called with the number of problems just scored.

  Returns:
    JSON values by name.
  """

  @functools.cache
  def model():
    unchanged = format == UNQUANTIZED
    return (params, config) if unchanged else params_lib.quantize(params, config, format)

  def nll(name, n, temperature, problems):
    roster = Roster.create(config, n, temperature, seed=FLAGS.seed)
    engine = lambda: Engine(*model(), tokenizer, roster, FLAGS.batch_size)
    values = keep(name, lambda: [float(a.nll[0]) for a in engine().answer(problems)])
    on_scored(len(values))
    return values

  def sizes():
    experts = jax.tree.leaves(model()[0].layers.experts)
    return {
      "expert_bytes": sum(x.nbytes for x in experts),
      "model_bytes": params_lib.num_bytes(model()[1]),
    }

  def first_batch():
    batch = test[: FLAGS.batch_size]
    chosen, gaps = routing(*model(), batch)
    roster = Roster.create(config, n, FLAGS.tau, seed=FLAGS.seed)
    sequences, starts = [p.sequence for p in batch], [len(p.context) for p in batch]
    agreement = diagnostics.routing_agreement(*model(), roster, sequences, starts)
    return {
      "experts": chosen.tolist(),
      "router_gap": gaps.mean(axis=1).tolist(),
      "noisy_agreement": agreement.tolist(),
    }

  n = FLAGS.num_members
  return {
    **keep("sizes", sizes),
    **keep("routing", first_batch),
    "baseline": nll("baseline", 1, 0.0, test),
    "roster": nll("roster", n, FLAGS.tau, test),
    "sweep_baseline": nll("sweep, baseline", 1, 0.0, validation),
    "sweep": [nll(f"sweep, τ = {t}", n, float(t), validation) for t in FLAGS.sweep],
  }


def summarize(
  measured: dict[str, dict],
  test: list[Continuation],
  validation: list[Continuation],
  sweep: list[float],
) -> list[dict]:
  """Returns a row of values per format, with differences from bfloat16 or from the baseline."""
  reference = {k: np.array(v) for k, v in measured[UNQUANTIZED].items()}
  paired = functools.partial(paired_statistics.paired_perplexity, tokens=num_tokens(test))
  paired_validation = functools.partial(
    paired_statistics.paired_perplexity, tokens=num_tokens(validation)
  )
  best_unquantized = int(np.argmin(reference["sweep"].sum(axis=1)))
  rows = []
  for name, values in measured.items():
    m = {k: np.array(v) for k, v in values.items()}
    by_temperature = [paired_validation(nll, m["sweep_baseline"]) for nll in m["sweep"]]
    best = int(np.argmin([d.value for d in by_temperature]))
    rows.append(
      {
        "format": name,
        "expert_bytes": int(m["expert_bytes"]),
        "model_bytes": int(m["model_bytes"]),
        "perplexity": float(np.exp(m["baseline"].sum() / num_tokens(test).sum())),
        "to_unquantized": paired(m["baseline"], reference["baseline"]),
        "roster_perplexity": float(np.exp(m["roster"].sum() / num_tokens(test).sum())),
        "roster_to_unquantized": paired(m["roster"], reference["roster"]),
        "roster_to_baseline": paired(m["roster"], m["baseline"]),
        "router_agreement": shared_experts(m["experts"], reference["experts"]).tolist(),
        "noisy_agreement": m["noisy_agreement"].tolist(),
        "router_gap": m["router_gap"].tolist(),
        "sweep": [{"temperature": t, "to_baseline": d} for t, d in zip(sweep, by_temperature)],
        "best_temperature": sweep[best],
        # The gain from tuning again, over the τ that is best without quantization.
        "tuned_again": paired_validation(m["sweep"][best], m["sweep"][best_unquantized]),
      }
    )
  return rows


def _interval(difference: paired_statistics.Difference) -> str:
  return f"{difference.value:+.2f}% [{difference.low:+.2f}, {difference.high:+.2f}]" + (
    " *" if difference.excludes_zero else ""
  )


def tables(rows: list[dict], num_members: int, temperature: float) -> str:
  """Formats the rows as Markdown tables."""
  mean = lambda values, unit=100: f"{unit * np.mean(values):.1f}"
  by_layer = lambda values: " ".join(f"{100 * v:.1f}" for v in values)
  make = functools.partial(tabulate.tabulate, tablefmt="github", disable_numparse=True)
  formats = make(
    [
      [
        r["format"],
        f"{r['expert_bytes'] / 1e6:.2f}",
        f"{r['model_bytes'] / 1e6:.2f}",
        f"{r['perplexity']:.4f}",
        _interval(r["to_unquantized"]),
        f"{r['roster_perplexity']:.4f}",
        _interval(r["roster_to_unquantized"]),
        _interval(r["roster_to_baseline"]),
      ]
      for r in rows
    ],
    headers=[
      "experts",
      "experts (MB)",
      "model (MB)",
      "perplexity",
      "difference from bfloat16",
      f"perplexity of roster, n = {num_members}, τ = {temperature}",
      "its difference from bfloat16",
      "its difference from baseline",
    ],
  )
  router = make(
    [
      [
        r["format"],
        mean(r["router_agreement"]),
        by_layer(r["router_agreement"]),
        mean(r["noisy_agreement"]),
        f"{np.mean(r['router_gap']):.3f}",
      ]
      for r in rows
    ],
    headers=[
      "experts",
      "shared with bfloat16 (%)",
      "by layer",
      f"shared by noisy and clean members (%), τ = {temperature}",
      "mean gap of router logits",
    ],
  )
  sweep = make(
    [
      [
        r["format"],
        *(_interval(s["to_baseline"]) for s in r["sweep"]),
        r["best_temperature"],
        _interval(r["tuned_again"]),
      ]
      for r in rows
    ],
    headers=[
      "experts",
      *(f"τ = {s['temperature']}" for s in rows[0]["sweep"]),
      "best τ",
      "best τ against best of bfloat16",
    ],
  )
  title = "Roster, difference from baseline on validation problems:"
  return f"{formats}\n\n{router}\n\n{title}\n\n{sweep}\n"


def _settings() -> dict:
  names = ("num_members", "tau", "sweep", "num_examples", "num_validation", "batch_size", "seed")
  return {name: getattr(FLAGS, name) for name in names}


def main(argv) -> None:
  del argv
  sweep = list(overrides.items("sweep", float))
  if min(FLAGS.num_examples, FLAGS.num_validation, FLAGS.batch_size) < 1:
    raise ValueError("--num_examples, --num_validation and --batch_size must be at least 1")
  if FLAGS.num_members < 2 or not sweep:
    raise ValueError("--num_members must be at least 2, and --sweep must name a τ")
  if FLAGS.formats[:1] != [UNQUANTIZED]:
    raise ValueError(f"--formats must begin with {UNQUANTIZED}; got {','.join(FLAGS.formats)}")
  for name in FLAGS.checkpoints:  # check everything before any work
    config = app.load_config(name)
    if not config.eos_token_ids:
      raise ValueError(f"{name} has no end-of-text token, which solutions need: give another model")
    if config.formats:
      raise ValueError(
        f"{name} is already quantized ({config.formats}): give a model without quantized weights"
      )
    for format in FLAGS.formats[1:]:
      quantization.check_sizes(format, config.d_model, config.d_expert)
    for t in (FLAGS.tau, *sweep):
      Roster.create(config, FLAGS.num_members, t, seed=FLAGS.seed)
  output, settings = pathlib.Path(FLAGS.output), _settings()
  saved = store.SavedValues(output / "measured.jsonl", settings)
  texts, summary = [], {}
  total = 2 * FLAGS.num_examples + (1 + len(sweep)) * FLAGS.num_validation
  total *= len(FLAGS.checkpoints) * len(FLAGS.formats)
  with app.progress(total=total, unit="problem") as bar:
    for checkpoint in FLAGS.checkpoints:
      name = pathlib.Path(checkpoint.removeprefix(app.EMBEDDED)).name
      params, config, tokenizer = app.open_model(checkpoint, UNQUANTIZED)
      builder = RequestBuilder(config, tokenizer)
      validation, test = (
        read(builder, split, count)
        for split, count in (("validation", FLAGS.num_validation), ("test", FLAGS.num_examples))
      )
      by_format = {}
      for format in FLAGS.formats:
        bar.set_description(f"{name} {format}")
        keep = lambda part, compute: saved.get(f"{checkpoint}, {format}: {part}", compute)
        by_format[format] = measure(
          params, config, tokenizer, format, validation, test, keep, bar.update
        )
      rows = summarize(by_format, test, validation, sweep)
      texts.append(f"## {name}\n\n{tables(rows, FLAGS.num_members, FLAGS.tau)}")
      summary[name] = rows
  app.write_atomically(
    output / "results.json",
    text_files.to_json(
      {"settings": settings, "models": summary}, indent=2, default=lambda d: d.to_json()
    )
    + "\n",
  )
  text = (
    f"{FLAGS.num_examples} test and {FLAGS.num_validation} validation problems. In brackets: 95 % "
    "intervals of the difference on the same problems. *: the interval excludes zero.\n\n"
    + "\n".join(texts)
  )
  print("\n" + text)
  app.write_atomically(output / "table.md", text)
  print(f"Saved {output}/table.md and results.json.")


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(
    main,
    not_distributed="it quantizes experts on one device; convert a large model to each format with "
    "--quantize_experts, and run experiments.score on it",
    needs=("scipy", "tabulate"),
  )


if __name__ == "__main__":
  program()
