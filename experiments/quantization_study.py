"""What rounding the experts to 8 or 4 bits does to a model, to its router and to its roster.

  python -m experiments.quantization_study

Holds the experts of two small models that ship with the package in bfloat16,
int8, int4 and mxfp4. For each format: its bytes; the perplexity of held-out
word problems without and with a roster, and its difference to 16 bits on the
same problems; how far the plain model still chooses the experts that it chooses
at 16 bits, beside how far noisy members choose those of the clean one; and a
sweep over the router temperature τ on validation problems, which shows whether
it has to be tuned again. Prints tables and saves all figures under --output;
started again with the same flags, it goes on with what is missing.
"""

from collections.abc import Callable
import dataclasses
import functools
import json
import pathlib
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import tabulate

from experiments.analysis import paired_statistics
from experiments.cli import app
from experiments.quickstart import Encoded, encode
from experiments.records import jsonl
from experiments.tasks import wordmath
from roe_jax import batching, diagnostics, quantization, scoring, transformer
from roe_jax import params as params_lib
from roe_jax.config import ModelConfig
from roe_jax.params import Params
from roe_jax.roster import Roster

FLAGS = flags.FLAGS
PLAIN = "bfloat16"
FORMATS = (PLAIN, *quantization.FORMATS)


def define_flags() -> None:
  flags.DEFINE_list(
    "checkpoints",
    [app.EMBEDDED + "wordmath_overtrained", app.EMBEDDED + "wordmath_control"],
    "Models whose experts are not quantized, embedded ones or folders.",
  )
  flags.DEFINE_list("formats", list(FORMATS), f"Of the experts; {PLAIN} comes first.")
  flags.DEFINE_integer("num_members", 8, "n of the roster.")
  flags.DEFINE_float("temperature", 0.3, "Router temperature τ of the comparison of formats.")
  flags.DEFINE_list("sweep", ["0.1", "0.2", "0.3", "0.4", "0.5", "0.6"], "τ of the sweep.")
  flags.DEFINE_integer("num_problems", 160, "Test problems.")
  flags.DEFINE_integer("num_validation", 120, "Validation problems, for the sweep.")
  flags.DEFINE_integer("batch_size", 40, "Problems scored together.")
  flags.DEFINE_integer("seed", 0, "Of the routing noise.")
  flags.DEFINE_string("output", "results/quantization", "Folder of the results.")


def in_format(params: Params, config: ModelConfig, format: str) -> tuple[Params, ModelConfig]:
  """The model with its experts in a format of `FORMATS`."""
  return (params, config) if format == PLAIN else params_lib.quantize(params, config, format)


def expert_bytes(params: Params) -> int:
  """Bytes of the experts of all layers."""
  return sum(x.nbytes for x in jax.tree.leaves(params.layers.experts))


def nll_of(
  params: Params, config: ModelConfig, roster: Roster, problems: Encoded, batch_size: int
) -> np.ndarray:
  """`[X]` summed over each solution's tokens, nats."""
  scores = scoring.score(
    params, config, problems.texts, problems.starts, roster=roster, batch_size=batch_size
  )
  return np.array([-t.log_probs.sum(dtype=np.float64) for t in scores.sequences])


def routing(
  params: Params, config: ModelConfig, problems: Encoded
) -> tuple[np.ndarray, np.ndarray]:
  """Clean routing at the positions that predict solutions' tokens.

  Returns:
    `[L, P, A]` chosen experts, and `[L, P]` distances between the A-th and the
    next router logit.
  """
  tokens = batching.pad(
    problems.texts, len(problems.texts), batching.bucket(max(map(len, problems.texts)))
  )
  wanted = np.zeros(tokens.shape, bool)
  for row, text, start in zip(wanted, problems.texts, problems.starts):
    row[start - 1 : len(text) - 1] = True
  experts, logits = _route(params_lib.in_storage_dtype(params), config, jnp.asarray(tokens))
  ordered = np.sort(np.asarray(logits)[:, wanted], axis=-1)
  a = config.experts_per_token
  return np.asarray(experts)[:, wanted], ordered[..., -a] - ordered[..., -a - 1]


@functools.partial(jax.jit, static_argnames="config")
def _route(params, config, tokens):
  _, outputs = transformer.forward(params, config, tokens, keep=("experts", "router_logits"))
  return outputs.experts, outputs.router_logits


def shared_experts(chosen: np.ndarray, baseline: np.ndarray) -> np.ndarray:
  """`[L]` mean share of the chosen experts that the baseline chose, too."""
  return (chosen[..., :, None] == baseline[..., None, :]).any(-1).mean(axis=(1, 2))


def measure(
  params: Params,
  config: ModelConfig,
  format: str,
  validation: Encoded,
  test: Encoded,
  num_members: int,
  temperature: float,
  sweep: list[float],
  seed: int,
  batch_size: int,
  keep: Callable[[str, Callable], Any],
  on_texts: Callable[[int], None],
) -> dict:
  """All figures of one format, as JSON values; what is random is paired between formats.

  Args:
    params: the parameters in 16 bits.
    config: their architecture.
    format: of `FORMATS`.
    validation: problems of the sweep.
    test: those of the comparison.
    num_members: n of the roster.
    temperature: its τ.
    sweep: the τ of the sweep.
    seed: of the noise.
    batch_size: problems scored together.
    keep: `keep(name, compute)` is what an earlier run kept under this name, or `compute()`.
    on_texts: called with numbers of texts that are done.
  """
  model = functools.cache(lambda: in_format(params, config, format))

  def roster(n, temperature):
    return Roster.create(config, n, temperature, seed=seed)

  def nll(name, roster, problems):
    values = keep(name, lambda: nll_of(*model(), roster, problems, batch_size).tolist())
    on_texts(len(values))
    return values

  few = Encoded(*(part[:batch_size] for part in (test.problems, test.prompts, test.texts)))

  def routing_of_few():
    chosen, gaps = routing(*model(), few)
    agreement = diagnostics.routing_agreement(
      *model(), roster(num_members, temperature), few.texts, few.starts
    )
    return {
      "experts": chosen.tolist(),
      "router_gap": gaps.mean(axis=1).tolist(),
      "noisy_agreement": agreement.tolist(),
    }

  return (
    keep(
      "sizes",
      lambda: {
        "expert_bytes": expert_bytes(model()[0]),
        "model_bytes": params_lib.num_bytes(model()[1]),
      },
    )
    | keep("routing", routing_of_few)
    | {
      "plain": nll("plain", roster(1, 0.0), test),
      "roster": nll("roster", roster(num_members, temperature), test),
      "sweep_plain": nll("sweep, plain", roster(1, 0.0), validation),
      "sweep": [nll(f"sweep, τ = {t}", roster(num_members, t), validation) for t in sweep],
    }
  )


def summarize(
  measured: dict[str, dict], test: Encoded, validation: Encoded, sweep: list[float]
) -> list[dict]:
  """One row of figures for each format; differences are to 16 bits or to the plain model."""
  base = {k: np.array(v) for k, v in measured[PLAIN].items()}
  rows = []
  for name, values in measured.items():
    m = {k: np.array(v) for k, v in values.items()}
    agreement = shared_experts(m["experts"], base["experts"])
    paired = functools.partial(paired_statistics.paired_perplexity, tokens=test.tokens)
    by_temperature = [
      paired_statistics.paired_perplexity(nll, m["sweep_plain"], validation.tokens)
      for nll in m["sweep"]
    ]
    best = int(np.argmin([d.value for d in by_temperature]))
    at_16_bits = int(np.argmin(base["sweep"].sum(axis=1)))
    rows.append(
      {
        "format": name,
        "expert_bytes": int(m["expert_bytes"]),
        "model_bytes": int(m["model_bytes"]),
        "perplexity": float(np.exp(m["plain"].sum() / test.tokens.sum())),
        "to_16_bits": paired(m["plain"], base["plain"]),
        "roster_perplexity": float(np.exp(m["roster"].sum() / test.tokens.sum())),
        "roster_to_16_bits": paired(m["roster"], base["roster"]),
        "roster_to_plain": paired(m["roster"], m["plain"]),
        "router_agreement": agreement.tolist(),
        "noisy_agreement": m["noisy_agreement"].tolist(),
        "router_gap": m["router_gap"].tolist(),
        "sweep": [{"temperature": t, "to_plain": d} for t, d in zip(sweep, by_temperature)],
        "best_temperature": sweep[best],
        # What tuning again would gain over the temperature that is best at 16 bits.
        "tuned_again": paired_statistics.paired_perplexity(
          m["sweep"][best], m["sweep"][at_16_bits], validation.tokens
        ),
      }
    )
  return rows


def _interval(difference: paired_statistics.Difference) -> str:
  return f"{difference.value:+.2f}% [{difference.low:+.2f}, {difference.high:+.2f}]" + (
    " *" if difference.excludes_zero else ""
  )


def tables(rows: list[dict], num_members: int, temperature: float) -> str:
  """The rows as Markdown; * marks differences whose interval leaves out zero."""
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
        _interval(r["to_16_bits"]),
        f"{r['roster_perplexity']:.4f}",
        _interval(r["roster_to_16_bits"]),
        _interval(r["roster_to_plain"]),
      ]
      for r in rows
    ],
    headers=[
      "experts in",
      "experts, MB",
      "model, MB",
      "perplexity",
      "to 16 bits",
      f"roster n = {num_members}, τ = {temperature}",
      "to 16 bits",
      "to its plain model",
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
      "experts in",
      "shared with 16 bits, %",
      "by layer",
      f"noisy members with clean, %, τ = {temperature}",
      "mean gap of logits",
    ],
  )
  sweep = make(
    [
      [
        r["format"],
        *(_interval(s["to_plain"]) for s in r["sweep"]),
        r["best_temperature"],
        _interval(r["tuned_again"]),
      ]
      for r in rows
    ],
    headers=[
      "experts in",
      *(f"τ = {s['temperature']}" for s in rows[0]["sweep"]),
      "best τ",
      "best τ against that of 16 bits",
    ],
  )
  return f"{formats}\n\n{router}\n\nRoster against plain model, validation problems:\n\n{sweep}\n"


def _settings() -> dict:
  names = (
    "num_members",
    "temperature",
    "sweep",
    "num_problems",
    "num_validation",
    "batch_size",
    "seed",
  )
  return {name: getattr(FLAGS, name) for name in names}


def main(argv) -> None:
  del argv
  sweep = [float(t) for t in FLAGS.sweep]
  if min(FLAGS.num_problems, FLAGS.num_validation, FLAGS.batch_size) < 1:
    raise ValueError("--num_problems, --num_validation and --batch_size must be at least 1")
  if FLAGS.num_members < 2 or not sweep:
    raise ValueError("--num_members must be at least 2, and --sweep must name a τ")
  if FLAGS.formats[:1] != [PLAIN] or not set(FLAGS.formats) <= set(FORMATS):
    raise ValueError(
      f"--formats must begin with {PLAIN}, and then name some of "
      f"{', '.join(FORMATS[1:])}; got {','.join(FLAGS.formats)}"
    )
  for name in FLAGS.checkpoints:  # refuse what cannot be before any work
    config = app.load_config(name)
    if not config.eos_token_ids:
      raise ValueError(f"{name} has no end-of-text token, which ends a solution")
    if config.expert_format is not None:
      raise ValueError(f"the experts of {name} are in {config.expert_format} already")
    for format in FLAGS.formats[1:]:
      quantization.check_sizes(format, config.d_model, config.d_expert)
    for t in (FLAGS.temperature, *sweep):
      Roster.create(config, FLAGS.num_members, t, seed=FLAGS.seed)
  output, settings = pathlib.Path(FLAGS.output), _settings()
  kept = jsonl.SavedValues(output / "measured.jsonl", settings)
  texts, summary = [], {}
  texts_of_one = 2 * FLAGS.num_problems + (1 + len(sweep)) * FLAGS.num_validation
  with app.progress(
    total=len(FLAGS.checkpoints) * len(FLAGS.formats) * texts_of_one, unit="text"
  ) as bar:
    for checkpoint in FLAGS.checkpoints:
      name = pathlib.Path(checkpoint.removeprefix(app.EMBEDDED)).name
      params, config, tokenizer = app.open_model(checkpoint, PLAIN)
      validation, test = (
        encode(tokenizer, wordmath.problems(split, count), config.eos_token_ids[0])
        for split, count in (("validation", FLAGS.num_validation), ("test", FLAGS.num_problems))
      )
      of_model = {}
      for format in FLAGS.formats:
        bar.set_description(f"{name} {format}")
        of_model[format] = measure(
          params,
          config,
          format,
          validation,
          test,
          FLAGS.num_members,
          FLAGS.temperature,
          sweep,
          FLAGS.seed,
          FLAGS.batch_size,
          lambda part, compute: kept.get(f"{checkpoint}, {format}: {part}", compute),
          bar.update,
        )
      rows = summarize(of_model, test, validation, sweep)
      texts.append(f"## {name}\n\n{tables(rows, FLAGS.num_members, FLAGS.temperature)}")
      summary[name] = [{k: _plain(v) for k, v in row.items()} for row in rows]
  app.write_atomically(
    output / "results.json", json.dumps({"settings": settings, "models": summary}, indent=2) + "\n"
  )
  text = (
    f"{FLAGS.num_problems} test and {FLAGS.num_validation} validation problems. In "
    "brackets: 95 % intervals of the difference on the same problems; * where it leaves "
    "out zero.\n\n" + "\n".join(texts)
  )
  print("\n" + text)
  app.write_atomically(output / "table.md", text)
  print(f"Saved {output}/table.md and results.json.")


def _plain(value):
  """A figure as JSON."""
  if isinstance(value, paired_statistics.Difference):
    return dataclasses.asdict(value)
  if isinstance(value, list):
    return [{k: _plain(v) for k, v in x.items()} if isinstance(x, dict) else x for x in value]
  return value


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(
    main,
    not_distributed="it rounds experts on one device; of a large model convert each "
    "format with --quantize_experts, and run experiments.score on it",
  )


if __name__ == "__main__":
  program()
