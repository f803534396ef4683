"""Small models trained with routing that varies, and what a roster of each gains.

    python -m experiments.reproduce --figure=trained_routing --model=embedded

The models are the configs of `wordmath_routing`, each trained from several seeds on the same number
of new problems. Completions of test problems are scored with teacher forcing. A token is right if
it is the most probable one, and a problem is solved if all are, that is, if greedy decoding writes
its completion: no output temperature changes either. Perplexities are at an output temperature
fitted on validation problems for each model and system.

`--set=questions=noise_text` asks the same of the models of `text_routing`, on windows of packages
that none was trained on. Windows of one file depend on each other, so files are resampled.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from itertools import chain
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.analysis import (
  calibration_error,
  comparisons,
  drawing,
  output_temperatures,
  paired_statistics,
  report_page,
)
from experiments.cli import app
from experiments.figures import compared
from experiments.figures.figure_run import Command, FigureRun
from experiments.figures.judged_sequences import TEXT, WORDMATH, Corpus
from roe_jax import assets, training, transformer
from roe_jax.roster import Roster

TITLE = "Models trained with routing that varies"
BACKGROUND = (
  "The paper suggests training that is aware of the noise. Matryoshka MoE (arXiv 2509.26520), XMoE "
  "(arXiv 2403.18926), E3 (arXiv 2110.03360) and RMoE (arXiv 2408.06793) train routers that vary "
  "in other ways."
)
BASELINE, SEPARATE = "baseline", "two models"
OWN = "two members, half of the experts each"
# Which baseline a system is compared with: of the plain model, and of its own.
TO = ("plain", "own")


class Question(NamedTuple):
  """What is asked: the table's heading, the trained models, and what they are judged on."""

  title: str
  trained: tuple[str, ...]
  corpus: Corpus = WORDMATH


_NOISE = ("plain", "noise_0.3", "noise_1")
QUESTIONS = {
  "noise": Question("Router noise in training", _NOISE),
  "counts": Question("Fewer experts per token", ("plain", "two_experts", "matryoshka", "mass_0.4")),
  "members": Question("Members with experts of their own, at two passes", ("plain", "members")),
  "recurrent": Question("Recurrent routers", ("plain", "recurrent", "detached")),
  "noise_text": Question("Router noise in training, on natural text", _NOISE, TEXT),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """The trainings and the systems.

  Attributes:
    questions: names in `QUESTIONS`.
    training_seeds: seeds of initial weights and training problems; each trains all models.
    steps: of each training.
    num_members: n.
    temperatures: τ of the rosters.
    num_examples, num_validation: test problems or windows, and those to fit output temperatures.
    num_seeds: noise seeds of the rosters.
  """

  questions: tuple[str, ...] = tuple(QUESTIONS)
  training_seeds: tuple[int, ...] = (1, 2, 3)
  steps: int = 3000
  num_members: int = 8
  temperatures: tuple[float, ...] = (0.1, 0.3, 1.0)
  num_examples: int = 1000
  num_validation: int = 200
  num_seeds: ClassVar[int] = 1


CONFIGS = {"embedded": Config()}


def _trained(config: Config) -> list[tuple[Corpus, str]]:
  """Returns the models that the questions need."""
  asked = (QUESTIONS[q] for q in config.questions)
  return list(dict.fromkeys((q.corpus, name) for q in asked for name in q.trained))


def _training(run: FigureRun, name: str, seed: int, corpus: Corpus = WORDMATH) -> Command:
  return Command(
    "train",
    run.root / "train" / f"{corpus.prefix}{name}-{seed}",
    (("config", f"{corpus.configs}:{name}"), ("seed", seed), ("steps", run.config.steps)),
    "model/manifest.json",
  )


def _checkpoint(run: FigureRun, name: str, seed: int, corpus: Corpus) -> str:
  """Returns the embedded model of these settings, or the folder that its training writes."""
  embedded = f"{corpus.configs}_{name}_{seed}"
  if embedded in assets.NAMES and run.config.steps == Config.steps:
    return app.EMBEDDED + embedded
  return str(_training(run, name, seed, corpus).output / "model")


def commands(run: FigureRun) -> list[Command]:
  """Returns the trainings of models that are not embedded."""
  own = run.config
  return [
    _training(run, name, seed, corpus)
    for seed in own.training_seeds
    for corpus, name in _trained(own)
    if not _checkpoint(run, name, seed, corpus).startswith(app.EMBEDDED)
  ]


class _Models:
  """The models trained on a corpus, and what is measured of them."""

  def __init__(self, run: FigureRun, corpus: Corpus = WORDMATH):
    # Measurements are by model and seed, so that more of them can be added.
    common = dataclasses.replace(run.config, questions=(), training_seeds=())
    self.run, self._keep = run, dataclasses.replace(run, config=common).measurements()
    self.corpus, self.load = corpus, functools.lru_cache(maxsize=4)(self._load)
    names = [name for of, name in _trained(run.config) if of is corpus]
    each = [_checkpoint(run, name, s, corpus) for name in names for s in run.config.training_seeds]
    self.validation, self.test = corpus.items(
      self.load(names[0], run.config.training_seeds[0])[1],
      each,
      {"validation": run.config.num_validation, "test": run.config.num_examples},
    )

  def _load(self, name, seed):
    return app.load_params(_checkpoint(self.run, name, seed, self.corpus), "float32")

  def kept(self, name: str, compute: Callable[[], Any]) -> Any:
    """Returns a measurement, by its name and that of the text."""
    digest = self.test.facts.get("digest")
    return self._keep.get(f"{digest}, {name}" if digest else name, compute)

  def next_seed(self, seed: int) -> int:
    """Returns the seed of the model that joins this one in a pair."""
    seeds = self.run.config.training_seeds
    return seeds[(seeds.index(seed) + 1) % len(seeds)]

  def routing(self, name: str, seed: int) -> dict[str, float]:
    """Returns means over tokens of validation completions and over layers: experts per token, and
    the entropies of a token's router and of the experts' loads, both 1 where all are equal."""
    params, config = self.load(name, seed)
    outputs, weights = [], np.concatenate([b.weights > 0 for b in self.validation.batches])
    for batch in self.validation.batches:
      outputs.append(
        transformer.forward(params, config, batch.tokens, keep=("experts", "router_logits"))[1]
      )
    chosen = jnp.concatenate([o.experts for o in outputs], axis=1)
    p = jax.nn.softmax(jnp.concatenate([o.router_logits for o in outputs], axis=1))
    loads = training.expert_loads(chosen, jnp.asarray(weights), config.num_experts)
    entropy = lambda p: float(jax.scipy.special.entr(p).sum(-1).mean() / math.log(p.shape[-1]))
    return {
      "experts": float((chosen < config.num_experts)[:, weights].sum(-1).mean()),
      "token_entropy": entropy(p[:, weights]),
      "load_entropy": entropy(loads),
    }

  def measure(self, name: str, seed: int, make: Callable[[Any], Roster | None]) -> dict[str, Any]:
    """Measures a system on the test problems, at an output temperature fitted on validation."""
    params, config = self.load(name, seed)
    roster = make(config)
    if roster is None:  # two models
      other, _ = self.load(name, self.next_seed(seed))
      models = tuple((p, Roster.create(config)) for p in (params, other))
    else:
      models = ((params, roster),)
    on_grid = np.stack(self.validation.judge(config, models, output_temperatures.GRID)[0])
    fitted = output_temperatures.fit(on_grid)
    both = output_temperatures.padded([1.0, fitted])
    nll, right, confidence = self.test.judge(config, models, both)
    return {
      "temperature": fitted,
      "nll": [float(f"{n[0]:.7g}") for n in nll],
      "fitted_nll": [float(f"{n[1]:.7g}") for n in nll],
      "right": [r.astype(int).tolist() for r in right],
      "confidence": [[round(float(c), 5) for c in of] for of in confidence],
    }


def _systems(
  question: str, name: str, config: Config, experts: int, seed: int = 0
) -> Mapping[str, tuple[float, Callable[[Any], Roster | None]]]:
  """Returns the systems of a model: forward passes per token, and what makes the roster."""

  def roster(n, tau):
    # Other noise than that of training, whose seed is 0.
    return n, lambda c: Roster.create(c, n, tau, seed=7 + seed)

  def with_experts(k):
    return 1, lambda c: Roster.create(c, experts_by_layer=k)

  found = {BASELINE: (1, Roster.create)}
  if question == "counts":
    if name != "mass_0.4":
      found |= {f"{k} of {experts} experts": with_experts(k) for k in range(1, experts)}
    tau = config.temperatures[len(config.temperatures) // 2]
    return found | {f"roster of {config.num_members}, τ = {tau:g}": roster(config.num_members, tau)}
  if name == "members":
    create = functools.partial(
      Roster.create,
      num_members=2,
      temperatures=1.0,
      noise="partition(subsets=2)",
      gate_weights="noisy",
      include_clean=False,
      cache="standard",
    )
    return found | {OWN: (2, create)}
  n = 2 if question == "members" else config.num_members
  found |= {f"roster of {n}, τ = {tau:g}": roster(n, tau) for tau in config.temperatures}
  return found | ({SEPARATE: (2, lambda c: None)} if question == "members" else {})


def _compared(found, reference, tokens):
  """Returns differences of solved problems, of right tokens and of perplexities at fitted T, and
  those by seed."""
  nll = found["fitted_nll"], reference["fitted_nll"]
  comparison = comparisons.compare_perplexities("ours", "reference", "text", *nll, tokens)
  differences: dict[str, Any] = {
    "fitted": comparison and comparison.difference,
    "fitted_by_seed": (100 * np.expm1((nll[0] - nll[1]).sum(0) / tokens.sum())).tolist(),
  }
  for name in [name for name in ("quality", "right") if name in found]:
    a, b = found[name], reference[name]
    differences[name] = paired_statistics.tested(
      paired_statistics.paired_accuracy(a, b), paired_statistics.paired_test(a, b)
    )
    differences[f"{name}_by_seed"] = (100 * (a.mean(0) - b.mean(0))).tolist()
  return differences


def measure(run: FigureRun) -> list[compared.Record]:
  own, records = run.config, []
  models_of = functools.cache(functools.partial(_Models, run))

  def measured(models, name, label, make) -> dict[str, Any]:
    each = [
      models.kept(
        f"{name}, {label}, {s}" + f" and {models.next_seed(s)}" * (label == SEPARATE),
        functools.partial(models.measure, name, s, make),
      )
      for s in own.training_seeds
    ]
    joined = {key: np.stack([m[key] for m in each], axis=1) for key in ("nll", "fitted_nll")}
    of_items = lambda score: np.stack([[score(r) for r in m["right"]] for m in each], axis=1)
    by_item = lambda key: [list(chain(*of)) for of in zip(*(m[key] for m in each))]
    events = calibration_error.Events.of(
      by_item("confidence"), by_item("right"), num_seeds=len(each)
    )
    return joined | {
      **{key: of_items(score) for key, score in models.corpus.scores.items()},
      "events": events,
      "temperatures": [m["temperature"] for m in each],
    }

  for question in own.questions:
    of_question, plain = [], None
    models = models_of(QUESTIONS[question].corpus)
    tokens = models.test.tokens
    for name in QUESTIONS[question].trained:
      experts = models.load(name, own.training_seeds[0])[1].experts_per_token
      routing = [
        models.kept(f"{name}, routing, {s}", functools.partial(models.routing, name, s))
        for s in own.training_seeds
      ]
      baseline = None
      systems = _systems(question, name, own, experts, run.seed)
      for label, (passes, make) in systems.items():
        found = measured(models, name, label, make)
        baseline, plain = baseline or found, plain or found
        record = {
          "question": question,
          "trained": name,
          "label": label,
          "examples": len(tokens),
          **models.test.facts,
          "passes": passes,
          **{key: float(np.mean([r[key] for r in routing])) for key in routing[0]},
          "temperatures": found["temperatures"],
          **{key: paired_statistics.accuracy(found[key]) for key in models.corpus.scores},
          "perplexity": paired_statistics.perplexity(found["nll"], tokens),
          "fitted": paired_statistics.perplexity(found["fitted_nll"], tokens),
          **{f"{key}_by_seed": (100 * found[key].mean(0)).tolist() for key in models.corpus.scores},
        }
        if question == "counts" and label.endswith("experts"):
          record["experts"] = float(label.split()[0])
        if question == "members":
          record["ece"] = calibration_error.expected_calibration_error(found["events"])
          if found is not plain:
            record["ece_difference"] = calibration_error.paired_calibration_error(
              found["events"], plain["events"]
            )
        for to, reference in zip(TO, (plain, baseline)):
          if found is not reference:
            differences = _compared(found, reference, tokens)
            record |= {f"{key}_from_{to}": value for key, value in differences.items()}
        of_question.append(record)
    for key in (f"{what}_from_{to}" for what in ("quality", "right", "fitted") for to in TO):
      corrected = paired_statistics.corrected([r.get(key) for r in of_question])
      of_question = [r | {key: d} if d else r for r, d in zip(of_question, corrected)]
    records += of_question
  return records


def _cell(name, places):
  def cell(record):
    by_seed = record.get(name.replace("_from_", "_by_seed_from_"))
    seeds = f" ({', '.join(f'{v:+.{places}f}' for v in by_seed)})" if by_seed else ""
    return compared.cell(record.get(name), places, True) + seeds

  return cell


def table(records: list[compared.Record]) -> str:
  columns: dict[str, Any] = {
    "trained as": "trained",
    "system": "label",
    "passes": lambda r: f"{r['passes']:g}",
    "experts per token": lambda r: f"{r['experts']:.2f}",
    "solved (%)": lambda r: compared.cell(r.get("quality"), 1),
    "right tokens (%)": lambda r: compared.cell(r["right"], 2),
    "right tokens from `plain` (points)": _cell("right_from_plain", 2),
    "right tokens from its own baseline (points)": _cell("right_from_own", 2),
    "perplexity at fitted T": lambda r: compared.cell(r["fitted"], 4),
    "perplexity from `plain` (%)": _cell("fitted_from_plain", 2),
    "perplexity from its own baseline (%)": _cell("fitted_from_own", 2),
  }
  special = {
    "members": {
      "calibration error (points)": lambda r: compared.cell(r["ece"], 2),
      "calibration error from `plain` (points)": lambda r: compared.cell(
        r.get("ece_difference"), 2, True
      ),
    },
    "recurrent": {
      "entropy of a token's router": lambda r: f"{r['token_entropy']:.3f}",
      "entropy of the loads": lambda r: f"{r['load_entropy']:.3f}",
    },
  }
  parts = []
  for question in compared.unique(records, "question"):
    some = [r for r in records if r["question"] == question]
    shown = columns | special.get(question, {})
    if "quality" not in some[0]:
      del shown["solved (%)"]
    parts += [f"**{QUESTIONS[question].title}**", report_page.table_of(some, shown)]
  # The same words for all questions on a corpus, whose items are the same.
  notes = {QUESTIONS[r["question"]].corpus.unit: _note(r) for r in reversed(records)}
  return "\n\n".join([*parts, *reversed(notes.values())])


def _note(record):
  corpus = QUESTIONS[record["question"]].corpus
  unit = corpus.unit
  return (
    f"{record['examples']} test {corpus.described.format_map(record)}, "
    f"{len(record['temperatures'])} trainings of each "
    f"model; right tokens are means over {unit}s. Brackets: 95 % bootstrap intervals over "
    f"{unit}s, differences paired by {unit}; *: significant after Holm's correction over the "
    "column of one table. Parentheses: the difference for each seed of training, which the "
    "intervals do not cover."
  )


def findings(records: list[compared.Record]) -> str:
  sentences = []
  for question in compared.unique(records, "question"):
    some = [r for r in records if r["question"] == question]
    for to, what in zip(TO, ("the plain model's baseline", "its own baseline")):
      key = f"right_from_{to}"
      significant = [
        f"{r['trained']}, {r['label']} {report_page.difference(r[key], 2)}"
        for r in some
        if key in r and r[key].is_significant
      ]
      sentences.append(
        f"{QUESTIONS[question].title}, points of right tokens against {what}: "
        + ("; ".join(significant) or "no significant difference")
        + "."
      )
  return " ".join(sentences)


def draw(records: list[compared.Record]):
  questions = compared.unique(records, "question")
  titles = [QUESTIONS[question].title for question in questions]
  figure, axes = drawing.panels(titles, columns=2, width=4.4, height=3.4)
  for axis, question in zip(axes, questions):
    some = [r for r in records if r["question"] == question]
    key = "right" if QUESTIONS[question].trained is _NOISE else "fitted"
    axis.set_ylabel("right tokens (%)" if key == "right" else "perplexity at fitted T")
    if question == "members":
      rows = np.arange(len(some))[::-1]
      values, errors = drawing.bars([r[key] for r in some])
      axis.errorbar(values, rows, xerr=errors, **drawing.style(0))
      axis.set_yticks(rows, [f"{r['trained']}: {r['label']}" for r in some], fontsize=6)
      axis.set_xlabel(axis.get_ylabel())
      axis.set_ylabel("")
      continue
    for i, name in enumerate(compared.unique(some, "trained")):
      of = [r for r in some if r["trained"] == name]
      if question == "counts":
        axis.set_xlabel("experts per token")
        of = sorted((r for r in of if r["passes"] == 1), key=lambda r: r["experts"])
        x = [r["experts"] for r in of]
      else:
        axis.set_xlabel("τ of the roster, 0: baseline")
        x = np.arange(len(of)) + 0.05 * i
        axis.set_xticks(
          range(len(of)), ["0" if r["label"] == BASELINE else r["label"].split()[-1] for r in of]
        )
      drawing.errorbars(axis, x, [r[key] for r in of], label=name, **drawing.line(i))
    axis.legend(fontsize=7, frameon=False)
  return figure
