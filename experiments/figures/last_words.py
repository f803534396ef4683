"""What a roster is worth on LAMBADA: accuracy, perplexity, and its members' disagreement.

    python -m experiments.reproduce --figure=last_words --model=smollm2 --data_dir=data

The model reads passages up to their last word. Greedy accuracy does not depend on an output
temperature; perplexities are also given at the output temperature that is fitted on development
passages, for each n. τ is the one of `temperatures` with the lowest perplexity of n = `compared`
members on development passages; then test passages are read once.

All rosters of a model attend to one Clean Cache, and the members of a smaller roster are the first
ones of a larger one, so that one pass serves all n. The ceiling of the gain in perplexity is fitted
as in `ceiling`.

The members' disagreement is the mutual information between member and token, in nats: the entropy
of the mean distribution minus the mean entropy of the members. It is a score for "the baseline's
most probable token is wrong", at the first token of the last word, and for text of another kind
(words of `other`), against the entropy of the baseline at its fitted output temperature. The area
under the ROC curve says how well a score ranks. No output temperature of the baseline can compute
it.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import tasks
from experiments.analysis import (
  drawing,
  output_temperatures,
  paired_statistics,
  ranking,
  report_page,
)
from experiments.analysis.output_temperatures import GRID
from experiments.cli import app
from experiments.evaluation.requests import Continuation, RequestBuilder
from experiments.figures import ceiling, compared, figure_models, likelihoods, passages
from experiments.figures.figure_run import FigureRun, Measurements
from roe_jax import diagnostics, routing
from roe_jax.roster import Roster

TITLE = "Last words: accuracy, perplexity, and disagreement of members"
BACKGROUND = (
  "Does a roster change which token is the most probable one, which no output temperature can, and "
  "does the disagreement of its members tell something that a calibrated baseline does not?"
)


@dataclasses.dataclass(frozen=True)
class Config:
  """The measurement.

  Attributes:
    task: passages to read, each with the words that are scored.
    other: task with text of another kind.
    members: n, ascending from 1.
    compared: n of all comparisons but that of n.
    temperatures: candidates for τ of all layers.
    num_validation: development passages.
    num_examples, num_other: passages of the test sets.
    num_seeds: noise seeds of the roster of `compared` members; all else has the first one.
  """

  task: str = "text/lambada"
  other: str = "text/wikitext2"
  members: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
  compared: int = 8
  temperatures: tuple[float, ...] = (0.1, 0.3, 1.0)
  num_validation: int = 120
  num_examples: int = 1000
  num_other: int = 200
  num_seeds: int = 3


CONFIGS = {name: Config() for name in figure_models.MODELS if name != "embedded"}
WRONG, OTHER = "most probable token is wrong", "text of another kind"
DISAGREEMENT = "disagreement of members"
BASELINE_ENTROPY = "entropy of the baseline at fitted T"
# Scores of uncertainty about the next token, of what `Reader.read` returns at T = 1 and fitted T.
SCORES: dict[str, Callable[[dict[str, Any]], float]] = {
  DISAGREEMENT: lambda r: r["entropy"][-1][0] - r["of_members"][-1],
  "entropy of the roster": lambda r: r["entropy"][-1][0],
  BASELINE_ENTROPY: lambda r: r["entropy"][0][1],
  "entropy of the baseline at T = 1": lambda r: r["entropy"][0][0],
}
OTHER_CONTEXT = 300  # characters before a scored word of another text


@functools.partial(jax.jit, static_argnames="sizes")
def _summarize(logits_RxBxTxV, targets_BxT, sizes, temperatures_NxG):
  """Returns, per roster of the first n members, what `Reader.read` keeps of each position."""
  log_probs = jax.nn.log_softmax(logits_RxBxTxV)
  probs = jnp.exp(log_probs)
  of_members = -(probs * log_probs).sum(axis=-1)
  found = []
  for n, temperatures_G in zip(sizes, temperatures_NxG):
    mean = jnp.log(jnp.maximum(probs[:n].mean(axis=0), jnp.finfo(jnp.float32).tiny))

    def at(temperature, mean=mean):
      scaled = jax.nn.log_softmax(mean / temperature)
      nll = -jnp.take_along_axis(scaled, targets_BxT[..., None], axis=-1)[..., 0]
      return nll, -(jnp.exp(scaled) * scaled).sum(axis=-1)

    nll, entropy = jax.lax.map(at, temperatures_G)
    greedy = jnp.argmax(mean, axis=-1) == targets_BxT
    found.append((nll, entropy, greedy, of_members[:n].mean(axis=0)))
  return found


@dataclasses.dataclass(frozen=True)
class Job:
  """A roster of n members; rosters of the first `sizes` members are summarized.

  Attributes:
    name: its name.
    roster: with as many members as the last of `sizes`.
    sizes: of the rosters.
    output_temperatures: `[N, G]`.
  """

  name: str
  roster: Roster
  sizes: tuple[int, ...]
  output_temperatures: np.ndarray


class Reader:
  """A model that reads passages with rosters."""

  def __init__(self, run: FigureRun, checkpoint: str, keep: Measurements):
    self.params, self.config, tokenizer = app.open_model(checkpoint, None, run.model.mesh)
    self.builder = RequestBuilder(self.config, tokenizer)
    self._run, self._checkpoint, self._keep = run, checkpoint, keep

  def requests(self, task: str, split: str, count: int) -> list[Continuation]:
    """Returns the requests to score the references of a task."""
    return passages.requests(self.builder, task, split, self._run.data_dir, count)

  def words_of(self, task: str, count: int) -> list[Continuation]:
    """Returns the requests to score one word of each window of another text."""
    found = []
    for e in tasks.get(task).examples("test", self._run.data_dir, None):
      words = (e.reference or "").split(" ")
      length = np.cumsum([len(w) + 1 for w in words])
      last = int(np.searchsorted(length, OTHER_CONTEXT))
      word = next((i for i in range(last, len(words)) if words[i][:1].isalpha()), None)
      if word:
        context = " ".join(words[:word])
        found.append(self.builder.continuation(context, " " + words[word]))
    return found[:count]

  def read(
    self, name: str, k: int | None, requests: Sequence[Continuation], jobs: Sequence[Job]
  ) -> dict[str, list[dict[str, Any]]]:
    """Reads passages with `k` experts per token; None: the model's number.

    Returns:
      For each job, for each request: "nll" `[N][G]`, nats of its tokens; "right" `[N]`, whether all
      are the most probable ones; and, of its first token, "first" `[N]`, whether it is the most
      probable one, "entropy" `[N][G]` of the roster and "of_members" `[N]`, their mean entropy.
    """
    config = self.config if k is None else routing.with_experts(self.config, k)
    found, size = {job.name: [{}] * len(requests) for job in jobs}, self._run.model.batch_size
    for number, batch in enumerate(passages.batches(requests, size, passages.num_positions)):
      some = [requests[i] for i in batch]
      positions = passages.num_positions(some[0])
      kept = self._keep.get(
        f"{self._checkpoint}, {name}, batch {number}",
        lambda some=some, positions=positions: self._read(config, some, positions, jobs),
      )
      for job, values in kept.items():
        for i, value in zip(batch, values):
          found[job][i] = value
    return found

  def _read(self, config, requests, positions, jobs):
    size = self._run.model.batch_size
    padded = [*requests, *[requests[-1]] * (size - len(requests))]  # one shape
    targets = np.array([[0] * (positions - len(r.tokens)) + list(r.tokens) for r in padded])
    all_logits = diagnostics.last_member_logits(
      self.params,
      config,
      [r.sequence[:-1] for r in padded],
      [job.roster for job in jobs],
      request_ids=[r.request_id for r in padded],
      num_positions=positions,
    )
    found = {}
    for job, logits in zip(jobs, all_logits):
      temperatures = jnp.asarray(job.output_temperatures, jnp.float32)
      summary = jax.device_get(_summarize(logits, targets, job.sizes, temperatures))
      found[job.name] = [_of_request(summary, b, len(r.tokens)) for b, r in enumerate(requests)]
    return found


def _of_request(summary, b, count):
  own = slice(-count, None)
  return {
    "nll": [nll[:, b, own].sum(axis=-1).round(6).tolist() for nll, *_ in summary],
    "right": [bool(greedy[b, own].all()) for *_, greedy, _ in summary],
    "first": [bool(greedy[b, -count]) for *_, greedy, _ in summary],
    "entropy": [entropy[:, b, -count].round(6).tolist() for _, entropy, *_ in summary],
    "of_members": [round(float(h[b, -count]), 6) for *_, h in summary],
  }


def measure(run: FigureRun) -> list[dict[str, Any]]:
  config, found = run.config, []
  # A run of more passages reads what one of fewer has measured.
  counts = dataclasses.replace(config, num_examples=0, num_other=0, num_seeds=0)
  keep = dataclasses.replace(run, config=counts).measurements()
  sizes, at = config.members, config.members.index(config.compared)
  for checkpoint in run.model.checkpoints:
    reader = Reader(run, checkpoint, keep)

    def job(tau, temperatures, reader=reader):
      roster = Roster.create(reader.config, sizes[-1], tau, seed=run.seed)
      return Job(f"τ = {tau:g}", roster, sizes, temperatures)

    development = reader.requests(config.task, "validation", config.num_validation)
    grid = np.tile(GRID, (len(sizes), 1))
    jobs = [job(tau, grid) for tau in config.temperatures]
    chosen_on = reader.read("development", None, development, jobs)
    nll = {
      tau: np.array([r["nll"] for r in chosen_on[j.name]])
      for tau, j in zip(config.temperatures, jobs)
    }
    one = len(GRID) // 2  # T = 1
    tau = min(config.temperatures, key=lambda t: nll[t][:, at, one].sum())
    fitted = [output_temperatures.fit(nll[tau][:, i]) for i in range(len(sizes))]
    best = job(tau, np.array([[1.0, t] for t in fitted]))
    parts = {
      "test": reader.requests(config.task, "test", config.num_examples),
      "other": reader.words_of(config.other, config.num_other),
    }
    read = {name: reader.read(name, None, some, [best])[best.name] for name, some in parts.items()}
    others = [
      Job(
        f"seed {seed}",
        Roster.create(reader.config, config.compared, tau, seed=seed),
        (config.compared,),
        best.output_temperatures[at : at + 1],
      )
      for seed in run.seeds[1:]
    ]
    seeds = f"test, seeds {run.seeds[1:]}"
    again = reader.read(seeds, None, parts["test"], others) if others else {}
    of_seeds = {run.seed: [_of_size(r, at) for r in read["test"]]}
    of_seeds |= dict(zip(run.seeds[1:], again.values()))
    found += _records(checkpoint, config, nll, tau, fitted, read)
    found += _seed_records(checkpoint, config, fitted[at], of_seeds, read["test"])
  return found


def _of_size(request, i):
  """Returns what was read of a request with the i-th roster alone."""
  return {name: values[i : i + 1] for name, values in request.items()}


def _seed_records(checkpoint, config, fitted, of_seeds, test):
  """Returns the records of each noise seed and of all, against the baseline of `test`."""
  model, words = checkpoint.rpartition(":")[2], np.ones(len(test))

  def values(some, name, i=0):
    return np.array([r[name][0][i] if name == "nll" else r[name][0] for r in some])

  def record(seeds):
    def stacked(name, i=0, own=True):
      return np.stack([values(of_seeds[s] if own else test, name, i) for s in seeds], axis=1)

    roster, baseline = (
      {"temperature": fitted, "nll": stacked("nll", 0, own), "fitted_nll": stacked("nll", 1, own)}
      for own in (True, False)
    )
    right = stacked("right"), stacked("right", own=False)
    label = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
    also = {"part": "seed", "model": model, "n": config.compared}
    return likelihoods.record(roster, baseline, words, label, config.task, **also) | {
      "quality": paired_statistics.accuracy(right[0]),
      "quality_difference": paired_statistics.paired_accuracy(*right),
    }

  seeds = list(of_seeds)
  return [record(some) for some in ([[s] for s in seeds] + [seeds] * (len(seeds) > 1))]


def _records(checkpoint, config, nll, tau, fitted, read):
  """Returns the records of τ, of n, and of disagreement, each with Holm's correction over all."""
  model, test, other = checkpoint.rpartition(":")[2], read["test"], read["other"]
  at, one = config.members.index(config.compared), len(GRID) // 2  # T = 1
  found: list[dict[str, Any]] = [
    {
      "part": "tau",
      "model": model,
      "tau": t,
      "nll": float(values[:, at, one].mean()),
      "passages": len(values),
      "chosen": t == tau,
    }
    for t, values in nll.items()
  ]
  values = {name: np.array([r[name] for r in test]) for name in ("nll", "right")}
  words = np.ones(len(test))
  measured = [
    {
      "temperature": fitted[i],
      "nll": values["nll"][:, i, :1].tolist(),
      "fitted_nll": values["nll"][:, i, 1:].tolist(),
    }
    for i in range(len(config.members))
  ]
  of_n = []
  for i, n in enumerate(config.members):
    label = "baseline" if n == 1 else f"roster, n = {n}"
    also = dict(part="n", model=model, n=n, tau=tau, quality_difference=None)
    record = likelihoods.record(measured[i], measured[0], words, label, config.task, **also)
    right, baseline = values["right"][:, i], values["right"][:, 0]
    record["quality"] = paired_statistics.accuracy(right)
    if i:
      difference = paired_statistics.paired_accuracy(right, baseline)
      p = paired_statistics.paired_test(right, baseline).p
      record["quality_difference"] = dataclasses.replace(difference, p=p)
    of_n.append(record)
  sizes, fits = np.array(config.members, float), []
  if len(sizes) > 3:  # three rosters: fewer fit any curve
    for kind in ceiling.KINDS:
      nll_NxX = np.array([m[kind] for m in measured]).mean(axis=-1)
      fitted_ceiling = ceiling.fit_ceiling(sizes, nll_NxX, words)
      fits.append({"part": "ceiling", "model": model, "fit": kind, **fitted_ceiling})
  wrong = [not r["first"][0] for r in test]
  scored = [(WRONG, test, wrong), (OTHER, test + other, [False] * len(test) + [True] * len(other))]
  of_scores = []
  for event, some, happens in scored:
    scores = {name: [score(r) for r in some] for name, score in SCORES.items()}
    of_scores += [
      {
        "part": "score",
        "model": model,
        "event": event,
        "score": name,
        "examples": len(happens),
        "events": sum(happens),
        "area": ranking.roc_area(values, happens),
        "area_difference": None
        if name == BASELINE_ENTROPY
        else ranking.paired_roc_area(values, scores[BASELINE_ENTROPY], happens),
      }
      for name, values in scores.items()
    ]
  differences = paired_statistics.corrected([r["area_difference"] for r in of_scores])
  of_scores = [r | {"area_difference": d} for r, d in zip(of_scores, differences)]
  return found + compared.corrected(of_n) + fits + of_scores


def _part(records, part):
  return [r for r in records if r["part"] == part]


def table(records: list[dict[str, Any]]) -> str:
  of_tau = {
    "model": "model",
    "τ": lambda r: f"{r['tau']:g}" + " (chosen)" * r["chosen"],
    "development passages": "passages",
    "nats per word, T = 1": lambda r: f"{r['nll']:.4f}",
  }
  of_score = {
    "model": "model",
    "event": "event",
    "score": "score",
    "examples": lambda r: f"{r['examples']} ({r['events']} with the event)",
    "area under ROC curve (%)": lambda r: compared.cell(r["area"], 1),
    "difference from the baseline's entropy (points)": lambda r: compared.cell(
      r["area_difference"], 1, True
    ),
  }
  shown, fits = ("quality", "quality_difference", *compared.LIKELIHOOD), _part(records, "ceiling")
  return (
    compared.table(_part(records, "n"), ("model", "label", "examples", "tau"), shown)
    + (ceiling.table_of_fits(fits) if fits else "")
    + (f"\n\nNoise seeds:\n\n{_seed_table(seeds)}" if (seeds := _part(records, "seed")) else "")
    + "\n\nPerplexities are per word. Choice of τ:\n\n"
    + report_page.table_of(_part(records, "tau"), of_tau)
    + "\n\nScores of uncertainty:\n\n"
    + report_page.table_of(_part(records, "score"), of_score)
  )


def _seed_table(records):
  shown = ("quality", "quality_difference", *compared.LIKELIHOOD)
  note = compared.table(records, ("model", "n", "label", "examples"), shown)
  return note.removesuffix(compared.NOTE) + "Brackets as above; not tested again."


def findings(records: list[dict[str, Any]]) -> str:
  sentences = [compared.findings(_part(records, "n"))]
  if fits := _part(records, "ceiling"):
    sentences.append(ceiling.findings(fits))
  for r in _part(records, "score"):
    if r["score"] == DISAGREEMENT:
      d = r["area_difference"]
      sentences.append(
        f'{r["model"]}: as a score for "{r["event"]}", disagreement has an area under the ROC '
        f"curve of {report_page.estimate(r['area'], 1, ' %')}, "
        f"{report_page.difference(d, 1, ' points')} from that of the baseline's entropy at its "
        f"fitted output temperature ({'' if d.is_significant else 'not '}significant)."
      )
  return " ".join(sentences)


def draw(records: list[dict[str, Any]]):
  """Draws gains against n, and areas under ROC curves."""
  models = compared.unique(records, "model")
  figure, axes = drawing.axes(4, len(models), width=3.2, height=3.0)
  for model, row in zip(models, axes):
    points = [r for r in _part(records, "n") if r["model"] == model and r["n"] > 1]
    numbers = [r["n"] for r in points]
    for index, (name, axis) in enumerate(zip(compared.GAINS, row)):
      compared.draw_gains(axis, name, numbers, points, **drawing.line(index))
      drawing.members_axis(axis, numbers)
      axis.set_ylabel(compared.GAINS[name])
    scores = [r for r in _part(records, "score") if r["model"] == model]
    events = compared.unique(scores, "event")
    series = {
      score: [
        next(r["area"] for r in scores if (r["score"], r["event"]) == (score, event))
        for event in events
      ]
      for score in SCORES
    }
    drawing.dots(
      row[3], [e.replace(" token", "\ntoken").replace(" of ", "\nof ") for e in events], series
    )
    row[3].tick_params(axis="x", labelsize=7)
    row[3].set_ylabel("area under ROC curve (%)")
    row[3].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
  return figure
