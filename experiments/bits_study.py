"""Measures nested bits: fewer bits, plans of bits by rule, and members at fewer bits.

  python -m experiments.bits_study

On word problems of an embedded model: the bytes of the experts' matrices that are read; the KL
divergence from the unquantized model to the quantized one at the tokens of the solutions, of the
baseline and of a roster with the same noise (nats per token); perplexity; and the share of problems
whose solution greedy decoding reproduces to the last token. Plans have equal bytes; rules that look
at text see validation problems. Prints tables and writes all values to --output. Rerun with the
same flags, it resumes.
"""

from collections.abc import Callable
import functools
import pathlib
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from experiments import quantization_study
from experiments.cli import app, text_files
from experiments.cli.extras import tabulate
from experiments.evaluation.requests import RequestBuilder
from experiments.records import store
from roe_jax import bit_plans, compensation, diagnostics, quantization
from roe_jax import params as params_lib
from roe_jax.costs import calls, flops
from roe_jax.nested import Nested
from roe_jax.params import Params
from roe_jax.quantization import CONTRACTED
from roe_jax.roster import Roster

FLAGS = flags.FLAGS
FORMAT = Nested(2, 4)
_SETTINGS = (
  "checkpoint num_members tau mean random_plans num_examples num_roster_examples num_validation "
  "batch_size"
).split()


def define_flags() -> None:
  flags.DEFINE_string("checkpoint", app.EMBEDDED + "wordmath_overtrained", "The model.")
  flags.DEFINE_integer("num_members", 4, "Roster size n.")
  flags.DEFINE_float("tau", 0.3, "Router temperature τ.")
  flags.DEFINE_float("mean", 3, "Mean bits of the plans.")
  flags.DEFINE_integer("random_plans", 5, "Number of random plans.")
  flags.DEFINE_integer("num_examples", 1000, "Number of test problems of the baseline.")
  flags.DEFINE_integer("num_roster_examples", 200, "The first of them, for rosters.")
  flags.DEFINE_integer("num_validation", 60, "Number of validation problems for rules.")
  flags.DEFINE_integer("batch_size", 50, "Problems scored together.")
  flags.DEFINE_string("output", "results/bits", "Folder for the results.")


@functools.partial(jax.jit, static_argnames="config")
def _log_probs(params, config, roster, cache, tokens, request_ids):
  run = diagnostics.run_of(params, config, roster, tokens, request_ids)
  return roster.cache_mode.score(run, cache)[0].log_probs


class Problems:
  """Problems, and the distributions at the tokens of their solutions."""

  def __init__(self, problems, batch_size):
    self._problems, self._batch_size = problems, batch_size
    self.of_problem = np.repeat(range(len(problems)), [len(p.tokens) for p in problems])
    self.targets = np.concatenate([p.tokens for p in problems])

  def distributions(self, params, config, roster) -> np.ndarray:
    """Returns log-probabilities `[P, V]` float32 at all tokens of the solutions."""
    found = []
    for first in range(0, len(self._problems), self._batch_size):
      batch = self._problems[first : first + self._batch_size]
      sequences = [p.sequence for p in batch]
      ids = [first + i for i in range(len(batch))]
      of_batch = diagnostics.at_all_positions(_log_probs, params, config, roster, sequences, ids)
      for row, p in zip(of_batch, batch):
        found.append(row[len(p.context) - 1 : len(p.sequence) - 1][: len(p.tokens)])
    return np.concatenate(found)

  def compare(self, log_probs: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Returns the KL divergence from a reference, perplexity and exact matches."""
    kl = (np.exp(reference) * (reference - log_probs)).sum(-1)
    by_problem = np.bincount(self.of_problem, kl) / np.bincount(self.of_problem)
    nll = -np.take_along_axis(log_probs, self.targets[:, None], axis=1)
    wrong = np.bincount(self.of_problem, log_probs.argmax(-1) != self.targets)
    return {
      "kl": float(kl.mean()),
      "kl_error": float(by_problem.std(ddof=1) / len(by_problem) ** 0.5),
      "perplexity": float(np.exp(nll.mean())),
      "exact": float((wrong == 0).mean()),
    }


def dequantized(
  params: Params,
  format: str,
  plan: np.ndarray | None = None,
  moments: dict[str, np.ndarray] | None = None,
  bits: int | None = None,
) -> Params:
  """Returns parameters with experts as a format holds them, so that all share one program.

  Args:
    params: the unquantized ones.
    format: the format.
    plan: bits of each expert of a nested format.
    moments: of the experts' inputs, for compensation.
    bits: how many bits of a nested format are read; None: all.
  """
  experts, changed = params.layers.experts, {}
  for name, axis in CONTRACTED.items():
    array = np.asarray(getattr(experts, name), np.float32)
    if moments is None:
      matrix = quantization.quantize(array, format, axis)
    else:
      matrix = compensation.quantize(array, format, axis, moments[name])
    if bits is not None:
      matrix = quantization.first_planes(matrix, bits)
    if plan is not None:
      matrix = bit_plans.apply(matrix, plan)
    changed[name] = jnp.asarray(quantization.dequantize_on_host(matrix))
  return params.replace(layers=params.layers.replace(experts=experts.replace(**changed)))


def bytes_per_step(config, roster: Roster) -> int:
  """Returns the expected bytes of experts that a decode step of one sequence reads."""

  def of(bits, members):
    unique = flops.expected_unique_experts(config, len(members), 1)
    return config.num_expert_layers * unique * calls.bytes_per_expert(config, bits)

  groups = roster.groups(roster.members)
  return int(sum(of(weights.bits, members) for weights, members in groups))


def tables(rows: list[dict[str, Any]], n: int, tau: float) -> str:
  """Formats the rows as a Markdown table."""

  def of(values):
    if values is None:
      return ["", "", ""]
    kl = f"{1000 * values['kl']:.2f} ± {1000 * values['kl_error']:.2f}"
    return [kl, f"{values['perplexity']:.4f}", f"{100 * values['exact']:.1f}"]

  names = ["KL (1000 nats)", "perplexity", "exact (%)"]
  headers = ["experts", "MB read", *(f"{name}, baseline" for name in names)]
  headers += [f"{name}, roster n = {n}, τ = {tau}" for name in names]
  body = [
    [r["name"], f"{r['bytes'] / 1e6:.3f}", *of(r.get("baseline")), *of(r.get("roster"))]
    for r in rows
  ]
  return tabulate.tabulate(body, headers, tablefmt="github", disable_numparse=True)


def main(argv) -> None:
  del argv
  if FLAGS.num_members < 2 or not 2 <= FLAGS.num_roster_examples <= FLAGS.num_examples:
    raise ValueError(
      "--num_members must be at least 2, and --num_roster_examples 2 to --num_examples"
    )
  bit_plans.allocate(np.zeros((1, 1)), FLAGS.mean, FORMAT)  # checks the mean
  config = app.load_config(FLAGS.checkpoint)
  Roster.create(config, FLAGS.num_members, FLAGS.tau)
  for format in (FORMAT.name, "int4"):
    quantization.check_sizes(format, config.d_model, config.d_expert)
  output, settings = pathlib.Path(FLAGS.output), {name: getattr(FLAGS, name) for name in _SETTINGS}
  saved = store.SavedValues(output / "measured.jsonl", settings)
  params, config, tokenizer = app.open_model(FLAGS.checkpoint, "float32")
  builder = RequestBuilder(config, tokenizer)
  read = functools.partial(quantization_study.read, builder)
  test = read("test", FLAGS.num_examples)
  validation = [p.sequence for p in read("validation", FLAGS.num_validation)]
  several = Problems(test, FLAGS.batch_size)
  few = Problems(test[: FLAGS.num_roster_examples], FLAGS.batch_size)
  baseline = Roster.create(config)
  roster = Roster.create(config, FLAGS.num_members, FLAGS.tau)
  unquantized = {
    "baseline": (
      several,
      baseline,
      functools.cache(lambda: several.distributions(params, config, baseline)),
    ),
    "roster": (few, roster, functools.cache(lambda: few.distributions(params, config, roster))),
  }
  rows = []

  def measure(name: str, size: int, make: Callable[[], Params]) -> None:
    made = functools.cache(make)

    def of(which):
      problems, with_roster, reference = unquantized[which]
      return problems.compare(problems.distributions(made(), config, with_roster), reference())

    found = {which: saved.get(f"{name}: {which}", lambda: of(which)) for which in unquantized}
    rows.append({"name": name, "bytes": size, **found})
    print(tables(rows[-1:], FLAGS.num_members, FLAGS.tau).splitlines()[-1], flush=True)

  e = config.num_expert_layers * config.num_experts
  measure("float32", int(e * calls.bytes_per_expert(config)), lambda: params)
  formats = [
    "int8",
    "int4",
    *(f"nested:{b}-{k}" for b, k in ((2, 2), (2, 3), (2, 4), (3, 3), (3, 4))),
  ]
  for format in formats:
    size = int(e * calls.bytes_per_expert(config.replace(expert_format=format)))
    measure(format, size, functools.partial(dequantized, params, format))
  evidence = bit_plans.Evidence(params, config, validation)
  moments = functools.cache(lambda: compensation.second_moments(params, config, validation))
  for base, bits in ((2, 2), (2, 3), (2, 4), (3, 3), (3, 4)):
    size = int(e * calls.bytes_per_expert(config.replace(expert_format=f"nested:{base}-{bits}")))
    whole_format = f"nested:{base}-4"

    def compensated(format=whole_format, bits=bits):
      return dequantized(params, format, moments=moments(), bits=bits)

    measure(f"{bits} bits of {whole_format}, compensated", size, compensated)
  rules = [f"random(mean={FLAGS.mean:g},seed={s})" for s in range(FLAGS.random_plans)]
  rules += [f"{r}(mean={FLAGS.mean:g})" for r in bit_plans.RULES if r not in ("random", "uniform")]
  for name in rules:
    rule = bit_plans.find(name)
    plan = saved.get(
      f"{name}: plan", lambda: bit_plans.allocate(rule.scores(evidence), rule.mean, FORMAT).tolist()
    )
    plan = np.array(plan)
    size = bit_plans.num_bytes(plan, config, FORMAT)
    measure(name, size, functools.partial(dequantized, params, FORMAT.name, plan))
  whole, few_bits = params_lib.quantize(params, config, FORMAT.name)
  n, tau = FLAGS.num_members, FLAGS.tau
  members = [(n, tau, None, "roster"), (n, tau, "3", "roster"), (n, tau, "2", "roster")]
  members += [(1, None, None, "baseline"), (2, None, "3", "baseline"), (2, None, "2", "baseline")]
  members += [(3, None, "3-2", "baseline")]
  of_members = []
  for count, own_tau, bits, which in members:
    own = Roster.create(few_bits, count, own_tau, member_bits=bits)
    name = f"n = {count}, τ = {own_tau or 0:g}, members at {bits or 4} bits"

    def of(own=own, which=which):
      reference = unquantized[which][2]()[: len(few.targets)]
      return few.compare(few.distributions(whole, few_bits, own), reference)

    found = saved.get(name, of)
    of_members.append({"name": name, "bytes": bytes_per_step(few_bits, own), "roster": found})
    print(tables(of_members[-1:], n, tau).splitlines()[-1], flush=True)
  app.write_atomically(
    output / "results.json",
    text_files.to_json({"rows": rows, "members": of_members}, indent=2) + "\n",
  )
  text = tables(rows, n, tau) + "\n\nMembers, MB of experts read per step of one sequence:\n\n"
  text += tables(of_members, n, tau)
  print("\n" + text)
  app.write_atomically(output / "table.md", text + "\n")
  print(f"Saved {output}/table.md and results.json.")


def program() -> None:
  """Runs this program with the command line's flags."""
  define_flags()
  app.run(main, not_distributed="it quantizes experts on one device", needs=("tabulate",))


if __name__ == "__main__":
  program()
