"""Figure 5a: size of the baseline model that matches the roster, against n.

    python -m experiments.reproduce --figure=fig5a --model=olmoe --data_dir=data

For each n, τ is tuned on validation perplexity of the model's text (WikiText-103; the embedded
models' own problems). Test perplexity is converted to the size of a baseline model by the law
of `scaling_law`: with α = 0.076, as in the paper, and with an α fitted to three models of one
recipe and three widths that ship with the package (`embedded:wordmath_d32`, `_d64`,
`_control`), with its interval over examples. Three points cannot show that it is a power law,
and either law is about models trained alike, so an equivalent size says no more than the
perplexity it is made of. The effect of one output temperature on the baseline is shown in the
same unit.
"""

import dataclasses

import numpy as np

from experiments.analysis import drawing, paired_statistics, report_page
from experiments.analysis.paired_statistics import Estimate
from experiments.figures import compared, figure_models, likelihoods, scaling_law
from experiments.figures.figure_run import Command, FigureRun
from roe_jax import temperature_profiles
from roe_jax.roster import Roster

TITLE = "Equivalent model size against n"
BACKGROUND = (
  "The paper reports a gain in perplexity that grows with n with diminishing returns; by the "
  "scaling law with exponent 0.076, n = 32 makes OLMoE-1B-7B equivalent to a model of 10.5 B."
)
FAMILY = ("embedded:wordmath_d32", "embedded:wordmath_d64", "embedded:wordmath_control")
FAMILY_TASK = "wordmath"
BASELINE, FITTED = "baseline", "baseline, fitted T"


@dataclasses.dataclass(frozen=True)
class Config:
  """The measurement.

  Attributes:
    members: n.
    num_trials, num_search_examples: of the search for each n; None: those of the tuning config.
    num_examples: of the test split, for the family's models, too.
    num_seeds: noise seeds.
  """

  members: tuple[int, ...] = (2, 4, 8, 16, 32)
  num_trials: int | None = None
  num_search_examples: int | None = None
  num_examples: int = 300
  num_seeds: int = 2


CONFIGS = figure_models.configs(
  Config(), embedded=Config(num_trials=14, num_search_examples=30, num_examples=160, num_seeds=1)
)


def commands(run: FigureRun) -> list[Command]:
  """Returns a search for each n."""
  flags = dict(
    objective="perplexity",
    config=run.model.tuning.format(category="math"),
    num_trials=run.config.num_trials,
    num_examples=run.config.num_search_examples,
    num_confirm=run.config.num_search_examples,
    num_seeds=1,
  )
  return [
    run.tune(run.model.text, search_name(n), num_members=n, **flags) for n in run.config.members
  ]


def search_name(n: int) -> str:
  """Returns the name of the search for n."""
  return f"text-n{n}"


def measure(run: FigureRun) -> list[dict]:
  config, keep, model = run.config, run.measurements(), run.model
  scorer = likelihoods.ReferenceScorer(run, model.checkpoint, None, config.num_examples, "test")
  tokens = scorer.report_on.tokens.astype(float)
  seeds = range(run.seed, run.seed + config.num_seeds)
  baseline = keep.get(BASELINE, scorer.baseline)
  found = {1: baseline}
  for n in config.members:
    tau = temperature_profiles.read(run.profile(search_name(n))).temperatures
    roster = lambda seed: Roster.create(scorer.config, n, tau, seed=seed, cache=model.cache)
    found[n] = keep.get(f"n = {n}", lambda: scorer.measure(roster, seeds))
  size = scaling_law.num_parameters(scorer.config)
  family = _family(run, keep)
  records = [family]
  first = np.asarray(baseline["nll"], float).mean(axis=1)
  for n, m in found.items():
    label = BASELINE if n == 1 else f"n = {n}"
    for name, suffix in (("nll", ""), ("fitted_nll", ", fitted T")):
      nll = np.asarray(m[name], float).mean(axis=1)
      records.append(
        {
          "label": label + suffix,
          "n": n,
          "is_fitted": name == "fitted_nll",
          "perplexity": paired_statistics.perplexity(nll, tokens),
          "size": size,
          "by_kaplan": _equivalent(first, nll, tokens, size, scaling_law.KAPLAN),
          "by_family": _equivalent(first, nll, tokens, size, family["exponent"].value),
        }
      )
  return records


def _equivalent(baseline, nll, tokens, size, exponent):
  """Returns the equivalent size with its interval over examples, for a known exponent."""

  def statistic(ours, theirs, count, axis=-1):
    losses = (paired_statistics.ratio(nll, count, axis) for nll in (theirs, ours))
    return scaling_law.equivalent(size, *losses, exponent=exponent)

  return Estimate(*paired_statistics.bootstrap([nll, baseline, tokens], statistic))


def _family(run, keep):
  """Returns the family's sizes and losses, and α with its interval over examples."""

  def losses():
    found = []
    on_one_device = dataclasses.replace(run, model=dataclasses.replace(run.model, mesh=None))
    for checkpoint in FAMILY:
      scorer = likelihoods.ReferenceScorer(
        on_one_device, checkpoint, FAMILY_TASK, run.config.num_examples, "test"
      )
      found.append(
        {
          "size": scaling_law.num_parameters(scorer.config),
          "nll": [seeds[0] for seeds in scorer.baseline()["nll"]],
          "tokens": scorer.report_on.tokens.tolist(),
        }
      )
    return found

  models = keep.get("family", losses)
  sizes = np.array([m["size"] for m in models], float)
  nll, tokens = np.array([m["nll"] for m in models]), np.array(models[0]["tokens"], float)
  rng = np.random.default_rng(0)
  resampled = []
  for _ in range(1000):
    chosen = rng.integers(len(tokens), size=len(tokens))
    means = nll[:, chosen].sum(axis=1) / tokens[chosen].sum()
    resampled.append(scaling_law.fit_exponent(sizes, means))
  low, high = map(float, np.quantile(resampled, [0.025, 0.975]))
  means = nll.sum(axis=1) / tokens.sum()
  return {
    "family": [
      {"model": name.rpartition(":")[2], "size": int(s), "nll_per_token": float(m)}
      for name, s, m in zip(FAMILY, sizes, means)
    ],
    "exponent": Estimate(scaling_law.fit_exponent(sizes, means), low, high),
  }


def _size(value):
  def short(v):
    return f"{v / 1e9:.2f} B" if v >= 1e9 else f"{v / 1e6:.3g} M"

  return f"{short(value.value)} [{short(value.low)}, {short(value.high)}]"


def table(records: list[dict]) -> str:
  law, rows = records[0], records[1:]
  family = {
    "model": "model",
    "non-embedding parameters": lambda m: f"{m['size']:,}",
    "nats per token": lambda m: f"{m['nll_per_token']:.4f}",
  }
  columns = {
    "": "label",
    "test perplexity": lambda r: compared.cell(r["perplexity"], 4),
    "equivalent size, α = 0.076": lambda r: _size(r["by_kaplan"]),
    "equivalent size, fitted α": lambda r: _size(r["by_family"]),
  }
  e = law["exponent"]
  return (
    f"{report_page.table_of(rows, columns)}\n\nSizes are non-embedding parameters; the model has "
    f"{rows[0]['size']:,}. The fitted α is {e.value:.2f} [{e.low:.2f}, {e.high:.2f}], of "
    f"three models:\n\n{report_page.table_of(law['family'], family)}"
  )


def findings(records: list[dict]) -> str:
  rows, law = records[1:], records[0]["exponent"]
  best = max((r for r in rows if r["n"] > 1 and not r["is_fitted"]), key=lambda r: r["n"])
  fitted = next(r for r in rows if r["label"] == FITTED)

  def times(record, key):
    return f"{record[key].value / record['size']:.2f}"

  return (
    f"By α = 0.076, a roster of {best['n']} is equivalent to a baseline model of "
    f"{_size(best['by_kaplan'])}, {times(best, 'by_kaplan')} times the size, and the baseline "
    f"with one fitted output temperature to {times(fitted, 'by_kaplan')} times its own size. By "
    f"the α of our own family, {law.value:.2f} [{law.low:.2f}, {law.high:.2f}], the same "
    f"perplexities are worth {times(best, 'by_family')} and {times(fitted, 'by_family')} times "
    "the size."
  )


def draw(records: list[dict]):
  rows = records[1:]
  figure, axes = drawing.axes(2, width=4.0, height=3.2)
  fitted = f"α = {records[0]['exponent'].value:.2f}, from three embedded models"
  for axis, key, title in zip(axes[0], ("by_kaplan", "by_family"), ("α = 0.076", fitted)):
    for index, (is_fitted, label) in enumerate(((False, "at T = 1"), (True, "at fitted T"))):
      shown = [r for r in rows if r["is_fitted"] == is_fitted]
      ratios = [r[key].scaled(1 / r["size"]) for r in shown]
      x = [r["n"] for r in shown]
      drawing.errorbars(axis, x, ratios, label=label, **drawing.line(index))
    axis.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    drawing.members_axis(axis, sorted({r["n"] for r in rows}))
    axis.set_title(title, fontsize=9)
    axis.set_ylabel("equivalent size (baseline = 1)")
  drawing.legend(figure, axes[0, 0])
  return figure
