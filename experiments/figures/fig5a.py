"""Figure 5a: the size of a plain model that equals the roster, against n.

    python -m experiments.reproduce --figure=fig5a --model=olmoe --data_dir=data

For each n τ is tuned on validation perplexity of the model's text (WikiText-103; the
embedded models' own problems), and test perplexity is turned into the size of a plain model
by the law of `scaling_law`: with α = 0.076, as in the paper, and with an α fitted to three
models of one recipe and three widths that ship with the package (`embedded:wordmath_d32`,
`_d64`, `_control`), with its interval over texts. Three points cannot tell whether it is a
power law; and either law is of the size of models trained alike, so that the equivalent
size says no more than the perplexity that it is made of. What one output temperature does
to the plain model stands beside it, in the same unit.

The paper saw n = 32 make OLMoE of 7 B equal to 10.5 B, growing with n with diminishing
returns.

    model      checkpoint (see models.py)              hardware               time
    olmoe      allenai/OLMoE-1B-7B-0924-Instruct       one GPU of 80 GB       100 minutes
    mixtral    mistralai/Mixtral-8x7B-Instruct-v0.1    eight GPUs of 80 GB    80 minutes
    gpt_oss    openai/gpt-oss-20b                      four GPUs of 80 GB     40 minutes
    embedded   ships with the package                  one CPU core           6 minutes

Times of the first three are estimated with roe_jax.costs (H100), not measured.
"""

import dataclasses

import numpy as np

from experiments.analysis import drawing, paired_statistics, report_page
from experiments.cli import temperature_profiles
from experiments.figures import compared, likelihoods, scaling_law
from experiments.figures.work import Command, Work
from roe_jax.roster import Roster

TITLE = "Equivalent model size against n"
SAW = (
  "The paper saw the gain in perplexity grow with n with diminishing returns; by the "
  "scaling law with exponent 0.076, n = 32 makes OLMoE-1B-7B equal to a model of 10.5 B."
)
FAMILY = ("embedded:wordmath_d32", "embedded:wordmath_d64", "embedded:wordmath_control")
FAMILY_TASK = "wordmath"
PLAIN, FITTED = "plain", "plain, fitted T"


@dataclasses.dataclass(frozen=True)
class Config:
  """The measurement.

  Attributes:
    members: n.
    trials, samples: of the search for each n; None: those of the tuning config.
    examples: of the test split, of the family's texts, too.
    seeds: noise seeds.
  """

  members: tuple[int, ...] = (2, 4, 8, 16, 32)
  trials: int | None = None
  samples: int | None = None
  examples: int = 300
  seeds: int = 2


CONFIGS = {name: Config() for name in ("olmoe", "mixtral", "gpt_oss")} | {
  "embedded": Config(members=(2, 4, 8, 16, 32), trials=14, samples=30, examples=160, seeds=1)
}


def run_searches(work: Work) -> list[Command]:
  """A search for each n."""
  config, model = work.config, work.model
  return [
    work.tune(
      model.text,
      f"text-n{n}",
      num_members=n,
      objective="perplexity",
      config=model.tuning.format(category="math"),
      num_trials=config.trials,
      num_samples=config.samples,
      num_confirm=config.samples,
      num_seeds=1,
    )
    for n in config.members
  ]


commands = run_searches


def measure(work: Work) -> list[dict]:
  config, keep, model = work.config, work.kept(), work.model
  texts = likelihoods.Texts(work, model.checkpoint, None, config.examples, "test")
  tokens = texts.reported_on.tokens.astype(float)
  seeds = range(work.seed, work.seed + config.seeds)
  plain = keep.get(PLAIN, texts.plain)
  found = {PLAIN: plain}
  for n in config.members:
    profile = temperature_profiles.read(model_profile(work, n))
    found[f"n = {n}"] = keep.get(
      f"n = {n}",
      lambda: texts.measure(
        lambda seed: Roster.create(
          texts.config, n, profile.temperatures, seed=seed, cache=model.cache
        ),
        seeds,
      ),
    )
  size = scaling_law.num_parameters(texts.config)
  family = _family(work, keep)
  records = [
    {
      "family": [
        {"model": name.rpartition(":")[2], **member}
        for name, member in zip(FAMILY, family["models"])
      ],
      "exponent": family["exponent"],
    }
  ]
  first = np.asarray(plain["nll"], float).mean(axis=1)
  for label, m in found.items():
    for name, what in (("nll", label), ("fitted_nll", f"{label}, fitted T")):
      nll = np.asarray(m[name], float).mean(axis=1)
      records.append(
        {
          "label": what,
          "n": 1 if label == PLAIN else int(label.removeprefix("n = ")),
          "is_fitted": name == "fitted_nll",
          "perplexity": compared.estimate(paired_statistics.perplexity(nll, tokens)),
          "size": size,
          "by_kaplan": _equivalent(first, nll, tokens, size, scaling_law.KAPLAN),
          "by_family": _equivalent(first, nll, tokens, size, family["exponent"]["value"]),
        }
      )
  return records


def model_profile(work: Work, n: int):
  """Where the search for n leaves its profile."""
  return work.root / "tune" / f"text-n{n}" / "profile.json"


def _equivalent(plain, nll, tokens, size, exponent):
  """The equivalent size, with its interval over texts; the exponent is taken as known."""

  def statistic(ours, theirs, count, axis=-1):
    return scaling_law.equivalent(
      size,
      paired_statistics.ratio(theirs, count, axis),
      paired_statistics.ratio(ours, count, axis),
      exponent,
    )

  return dict(
    zip(("value", "low", "high"), paired_statistics.bootstrap([nll, plain, tokens], statistic))
  )


def _family(work, keep):
  """The family's sizes and losses, and α with its interval over texts."""

  def losses():
    found = []
    for checkpoint in FAMILY:
      texts = likelihoods.Texts(
        dataclasses.replace(work, model=dataclasses.replace(work.model, mesh=None)),
        checkpoint,
        FAMILY_TASK,
        work.config.examples,
        "test",
      )
      found.append(
        {
          "size": scaling_law.num_parameters(texts.config),
          "nll": [row[0] for row in texts.plain()["nll"]],
          "tokens": texts.reported_on.tokens.tolist(),
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
    resampled.append(
      scaling_law.fit_exponent(sizes, nll[:, chosen].sum(axis=1) / tokens[chosen].sum())
    )
  low, high = np.quantile(resampled, [0.025, 0.975])
  means = nll.sum(axis=1) / tokens.sum()
  return {
    "models": [{"size": int(s), "nll_per_token": float(m)} for s, m in zip(sizes, means)],
    "exponent": {
      "value": scaling_law.fit_exponent(sizes, means),
      "low": float(low),
      "high": float(high),
    },
  }


def _size(value):
  def told(v):
    return f"{v / 1e9:.2f} B" if v >= 1e9 else f"{v / 1e6:.3g} M"

  return f"{told(value['value'])} [{told(value['low'])}, {told(value['high'])}]"


def table(records: list[dict]) -> str:
  law, rows = records[0], records[1:]
  family = report_page.table(
    ["model", "non-embedding parameters", "nats per token"],
    [[m["model"], f"{m['size']:,}", f"{m['nll_per_token']:.4f}"] for m in law["family"]],
  )
  main = report_page.table(
    ["", "test perplexity", "equivalent size, α = 0.076", "equivalent size, fitted α"],
    [
      [r["label"], compared.cell(r["perplexity"], 4), _size(r["by_kaplan"]), _size(r["by_family"])]
      for r in rows
    ],
  )
  e = law["exponent"]
  return (
    f"{main}\n\nSizes are non-embedding parameters; the model has {rows[0]['size']:,}. The fitted "
    f"α is {e['value']:.2f} [{e['low']:.2f}, {e['high']:.2f}], of three models:\n\n{family}"
  )


def findings(records: list[dict]) -> str:
  rows = records[1:]
  best = max((r for r in rows if r["n"] > 1 and not r["is_fitted"]), key=lambda r: r["n"])
  fitted = next(r for r in rows if r["label"] == FITTED)
  law = records[0]["exponent"]

  def times(record, key):
    return f"{record[key]['value'] / record['size']:.2f}"

  return (
    f"By α = 0.076 a roster of {best['n']} equals a plain model of "
    f"{_size(best['by_kaplan'])}, {times(best, 'by_kaplan')} times the size, and the plain model "
    f"with one fitted output temperature equals {times(fitted, 'by_kaplan')} times its own. By "
    f"the α of our own family, {law['value']:.2f} [{law['low']:.2f}, {law['high']:.2f}], the same "
    f"perplexities are worth {times(best, 'by_family')} and {times(fitted, 'by_family')} times "
    "the size."
  )


def draw(records: list[dict]):
  rows = records[1:]
  plain = rows[0]["size"]
  figure, axes = drawing.axes(2, width=4.0, height=3.2)
  for axis, key, title in (
    (axes[0, 0], "by_kaplan", "α = 0.076"),
    (
      axes[0, 1],
      "by_family",
      f"α = {records[0]['exponent']['value']:.2f}, of three embedded models",
    ),
  ):
    for index, (is_fitted, label) in enumerate(((False, "as it is"), (True, "at fitted T"))):
      shown = [r for r in rows if r["is_fitted"] == is_fitted]
      values, bars = drawing.bars([compared.read(r[key]) for r in shown])
      axis.errorbar(
        [r["n"] * 1.04 ** (2 * index - 1) for r in shown],
        values / plain,
        yerr=bars / plain,
        label=label,
        **drawing.line(index),
      )
    axis.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    drawing.members_axis(axis, sorted({r["n"] for r in rows}))
    axis.set_title(title, fontsize=9)
    axis.set_ylabel("equivalent size (plain model is 1)")
  drawing.legend(figure, axes[0, 0])
  return figure
