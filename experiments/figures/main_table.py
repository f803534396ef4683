"""What a roster is worth on LAMBADA against other uses of computation, and which part of it.

    python -m experiments.reproduce --figure=main_table --model=smollm2 --data_dir=data

Methods are written as in `experiments.compare`. The model reads passages up to their last word;
greedy accuracy does not depend on an output temperature, and perplexities are also given at the one
that is fitted on development passages. A roster without t has the τ of `temperatures` with the
lowest perplexity on development passages. A roster with another noise family and without t has the
strength at which its noisy members keep as many of the clean member's experts as with that τ; they
are counted on development passages. The best β of SCMoE is the one with the most right answers
there.

Computation is that of a decoding step at position `context`, in FLOPs of matrix products; an
adaptive roster's follows from the number of members that ran. Unique experts are those that a layer
reads for a token, over all members; they are counted at all positions of two development passages.

Rosters with the same Clean Cache read each batch together. Other numbers of experts, caches and
checkpoints are read on `num_few` passages, too few for claims about accuracy.
"""

from collections.abc import Sequence
import dataclasses
import itertools
from typing import Any

import numpy as np

from experiments.analysis import drawing, output_temperatures, paired_statistics, report_page
from experiments.analysis.output_temperatures import GRID
from experiments.cli import app
from experiments.cli.extras import scipy
from experiments.evaluation import methods as methods_lib
from experiments.evaluation.method import Method
from experiments.evaluation.method_specs import BETAS, BestScmoe
from experiments.evaluation.requests import RequestBuilder
from experiments.figures import compared, likelihoods, passages
from experiments.figures.figure_run import FigureRun, Measurements
from roe_jax import costs, diagnostics, perturbations, scoring
from roe_jax.roster import Roster

TITLE = "What a roster is worth against other uses of computation, and which part of it"
BACKGROUND = (
  "The paper compares rosters with the baseline. Its reviewers asked for comparisons at equal "
  "compute, for controls of the noise, and which component gives the gain."
)
ONE = len(GRID) // 2  # T = 1
CAPACITY = 256  # positions of the caches: one shape for nearly all passages
ENOUGH = 1000  # examples for claims about accuracy


@dataclasses.dataclass(frozen=True)
class Config:
  """The measurement.

  Attributes:
    task: passages to read, each with the words that are scored.
    num_members: of rosters without n.
    temperatures: candidates for τ of all layers.
    compute: methods of different computation.
    strength, noise, layers, histories: methods, each a table.
    experts: numbers of experts per token, with and without a roster.
    others: other checkpoints, with and without a roster.
    num_validation: development passages.
    num_examples, num_few: test passages.
    num_counted: development passages on which kept experts are counted.
    context: position of the token whose computation is given.
  """

  task: str = "text/lambada"
  num_members: int = 8
  temperatures: tuple[float, ...] = (0.1, 0.3, 1.0)
  compute: tuple[str, ...] = (
    "experts:k=10",
    "experts:k=12",
    "roster:n=2",
    "roster",
    "roster:unsure=margin<0.5",
    "best_scmoe",
  )
  strength: tuple[str, ...] = ("roster:t=0.03", "roster:t=0.1", "roster:t=1", "roster:t=3")
  noise: tuple[str, ...] = (
    "roster:gate_weights=noisy",
    "roster:include_clean=false",
    "roster:aggregation=mean_logit",
    "roster:noise=gaussian",
    "roster:noise=swap",
    "roster:noise=uniform_choice",
  )
  layers: tuple[str, ...] = ("roster:layers=0-9", "roster:layers=10-19", "roster:layers=20-29")
  histories: tuple[str, ...] = ("roster:cache=standard",)
  experts: tuple[int, ...] = (4, 6, 10, 12)
  others: tuple[str, ...] = ("smollm2_neurons", "smollm2_tuned")
  num_validation: int = 100
  num_examples: int = 1000
  num_few: int = passages.PART  # whose batches are also those of more passages
  num_counted: int = 8
  context: int = 100


CONFIGS = {"smollm2": Config()}
_CARVE = (
  "python -m checkpoints_convert --source=SmolLM2-135M-Instruct.Q4_1.gguf --carve=S4A8E16 "
  "--calibration=calibration.txt --target="
)
OTHERS = {
  "smollm2_neurons": f"{_CARVE}smollm2_neurons --carve_router=neurons",
  "smollm2_tuned": "python -m experiments.fine_tune --checkpoint=smollm2_carved "
  "--text=calibration.txt --output=smollm2_tuning --steps=96 --batch_size=2 "
  "--held_out_tokens=1024; mv smollm2_tuning/model smollm2_tuned",
}
TABLES = {
  "compute": "Uses of computation",
  "strength": "Strength of the noise",
  "noise": "Parts of a roster, and other noise that changes as many experts",
  "layers": "Layers with noise",
  "histories": "Histories",
  "experts": "Active experts: rosters against the same number of experts without",
  "checkpoints": "Checkpoints: rosters against the same checkpoint without",
}
FEW = ("histories", "experts", "checkpoints")
FULL = tuple(name for name in TABLES if name not in FEW)


class Reader:
  """A model that reads passages with methods.

  Attributes:
    config: of the model.
    base: roster with what methods do not set.
  """

  def __init__(self, run: FigureRun, checkpoint: str, keep: Measurements):
    self.params, self.config, tokenizer = app.open_model(checkpoint, None, run.model.mesh)
    self._run, self._checkpoint, self._keep = run, checkpoint, keep
    builder = RequestBuilder(self.config, tokenizer)
    of = run.config
    sizes = {"validation": of.num_validation, "test": max(of.num_examples, of.num_few)}
    self.requests = {
      split: passages.requests(builder, of.task, split, run.data_dir, size)
      for split, size in sizes.items()
    }
    self.base = self._roster(of.temperatures[0])

  def _roster(self, tau):
    return Roster.create(self.config, self._run.config.num_members, tau, seed=self._run.seed)

  def parse(self, text: str) -> Method:
    """Returns a method."""
    return methods_lib.parse(text, self.config, self.base)

  def chosen(self, text: str) -> Method:
    """Returns a method with the strength of its noise, or β, set."""
    spec = methods_lib.read(text)
    noise = getattr(spec, "noise", None)
    if noise is not None and "t" not in spec.given:
      return self.parse(f"{text},t={self._strength(noise):.4g}")
    if isinstance(spec, BestScmoe):
      tried = [self.parse(f"scmoe:beta={beta}") for beta in BETAS]
      right = [found["right"].sum() for found in self.read("validation", tried)]
      return tried[int(np.argmax(right))]
    return self.parse(text)

  def choose(self) -> float:
    """Sets τ to the best one on development passages, and returns it."""
    tried = [self.parse(f"roster:t={t:g}") for t in self._run.config.temperatures]
    nll = [m["nll"][:, ONE].sum() for m in self.read("validation", tried)]
    best = self._run.config.temperatures[int(np.argmin(nll))]
    self.base = self._roster(best)
    return best

  def _strength(self, noise):
    """Returns the strength at which members keep as many experts as with τ; by bisection."""
    wanted = self._kept(perturbations.GUMBEL, float(self.base.temperatures[-1]))
    low, high = (0.0, 1.0) if noise in perturbations.PROBABILITIES else (0.0, 8.0)
    for _ in range(10):  # fewer experts are kept with stronger noise
      middle = (low + high) / 2
      low, high = (middle, high) if self._kept(noise, middle) > wanted else (low, middle)
    return low or high

  def unique_experts(self, method: Method) -> float | None:
    """Returns how many experts of a layer a token needs; None if it depends on the position."""
    if method.roster.is_adaptive:
      return None
    some = [r.sequence for r in self.requests["validation"][:2]]
    return self._keep.get(
      f"{self._checkpoint}, {method.text}, unique experts",
      lambda: float(
        diagnostics.unique_experts(
          self.params, method.config, method.roster, some
        ).by_position.mean()
      ),
    )

  def _kept(self, noise, strength):
    """Returns the share of the clean member's experts that a noisy member keeps."""
    roster = Roster.create(self.config, 2, strength, noise=noise, seed=self._run.seed)
    some = [r.sequence for r in self.requests["validation"][: self._run.config.num_counted]]
    return self._keep.get(
      f"{self._checkpoint}, {noise}, {strength:g}, kept experts",
      lambda: float(diagnostics.routing_agreement(self.params, self.config, roster, some).mean()),
    )

  def read(self, split: str, methods: Sequence[Method], count: int | None = None) -> list[dict]:
    """Reads the first passages of a split; methods of one Clean Cache read them together.

    Returns:
      For each method "nll" `[X, G]`, nats of each passage's words on `GRID` (NaN: no likelihood is
      defined), "right" `[X]`, whether all are the most probable ones, and "members" `[X]`, the
      number that ran per word.
    """
    some = self.requests[split][:count]
    found: list[list[Any]] = [[None] * len(some) for _ in methods]
    groups: dict[Any, list[int]] = {}
    for i, method in enumerate(methods):
      shared = method.roster.cache_mode.is_shared
      groups.setdefault((method.config, None if shared else i), []).append(i)
    for group in groups.values():
      for batch in passages.batches(some, self._run.model.batch_size, _positions):
        names = [f"{self._checkpoint}, {methods[i].text}, {split} {batch}" for i in group]
        missing = [i for i, name in zip(group, names) if name not in self._keep]
        read = iter(self._read([some[x] for x in batch], [methods[i] for i in missing]))
        for i, name in zip(group, names):
          for x, value in zip(batch, self._keep.get(name, lambda read=read: next(read))):
            found[i][x] = value
    return [
      {
        name: np.array([value[name] for value in of_method], kind)
        for name, kind in {"nll": float, "right": bool, "members": float}.items()
      }
      for of_method in found
    ]

  def _read(self, requests, methods):
    """Yields, per method, JSON of each request."""
    if not methods:
      return
    size = self._run.model.batch_size
    padded = [*requests, *[requests[-1]] * (size - len(requests))]  # one shape
    scored = scoring.score_rosters(
      self.params,
      methods[0].config,
      [r.sequence for r in padded],
      [m.roster for m in methods],
      [len(r.context) for r in padded],
      request_ids=[r.request_id for r in padded],
      output_temperatures=GRID.tolist(),
      batch_size=size,
      min_shape=(size, CAPACITY),
    )
    for method, scores in zip(methods, scored):
      yield [
        {
          "nll": [None if method.no_likelihood else round(float(v), 6) for v in nll],
          "right": bool((one.greedy_tokens == np.array(request.tokens)).all()),
          "members": float(one.members.mean()),
        }
        for request, one in zip(requests, scores.sequences)
        for nll in [-one.log_probs.sum(axis=0)]
      ]


def _positions(request):
  """Returns how many positions are scored together, so that batches have little padding."""
  return next((size for size in (1, 4) if len(request.tokens) <= size), 16)


def _flops(method, members, context):
  """Returns FLOPs of a decoding step in which so many members run."""
  step = range(context, context + 1)
  flops = costs.forward_flops(method.config, method.roster, step)
  most = len(method.roster.members)
  one = costs.forward_flops(method.config, Roster.create(method.config), step)
  return flops if most == 1 else one + (flops - one) * (members - 1) / (most - 1)


def _compared(config, table, is_main):
  """Returns a checkpoint's methods in a table: lists, each compared with its first one."""
  if table == "checkpoints":
    return [["baseline", "roster"]]
  if table == "experts":
    pairs = [[f"experts:k={k}", f"roster:k={k}"] for k in config.experts]
    return [["baseline", "roster"], *pairs] if is_main else []
  methods = getattr(config, table)
  return [["baseline", *methods]] if is_main and methods else []


def measure(run: FigureRun) -> list[dict[str, Any]]:
  config, found = run.config, []
  check_others(config.others)
  # A run with more methods or passages reads what another one has measured.
  of_all = ("task", "num_members", "temperatures", "num_validation", "num_counted")
  others = [f.name for f in dataclasses.fields(config) if f.name not in of_all]
  kept = dataclasses.replace(config, **{name: type(getattr(config, name))() for name in others})
  keep = dataclasses.replace(run, config=kept).measurements()
  for checkpoint in (*run.model.checkpoints, *config.others):
    reader = Reader(run, checkpoint, keep)
    tau = reader.choose()
    is_main = checkpoint in run.model.checkpoints
    # All tables at once: rosters of all of them share a Clean Cache.
    for count, tables in ((config.num_examples, FULL), (config.num_few, FEW)):
      lists = [texts for name in tables for texts in _compared(config, name, is_main)]
      methods = [reader.chosen(text) for text in dict.fromkeys(itertools.chain(*lists))]
      reader.read("validation", methods)
      reader.read("test", methods, count)
    for table in TABLES:
      for texts in _compared(config, table, is_main):
        methods = [reader.chosen(text) for text in texts]
        for record in _records(reader, methods, table, config):
          model = checkpoint.rpartition(":")[2]
          found.append({"table": table, "model": model, "tau": tau} | record)
  by_table = ([r for r in found if r["table"] == table] for table in TABLES)
  return [r for of_table in by_table for r in compared.corrected(of_table)]


def check_others(checkpoints: Sequence[str]) -> None:
  """Checks that the other checkpoints exist, before any work.

  Raises:
    FileNotFoundError: one does not; the message has the command that makes it.
  """
  for name in checkpoints:
    try:
      app.load_config(name)
    except FileNotFoundError as error:
      remedy = f"make it with `{OTHERS[name]}`, or " if name in OTHERS else ""
      raise FileNotFoundError(f"{error}; {remedy}leave it out of --set=others=...") from error


def _records(reader, methods, table, config):
  """Returns the records of some methods, compared with the first one."""
  count = config.num_few if table in FEW else config.num_examples
  developed, tested = reader.read("validation", methods), reader.read("test", methods, count)
  words, first, found = np.ones(len(tested[0]["right"])), None, []
  for method, chosen_on, read in zip(methods, developed, tested):
    members, experts = float(read["members"].mean()), method.config.experts_per_token
    computation = _flops(method, members, config.context)
    computation /= _flops(reader.parse("baseline"), 1, config.context)
    also = dict(method=method.text, members=members, experts=experts, computation=computation)
    also["unique_experts"] = reader.unique_experts(method)
    label = method.label + " (all)" * (experts == method.config.num_experts)
    if method.no_likelihood:
      record = also | dict(label=label, task=config.task, examples=len(words))
      record |= dict.fromkeys(compared.LIKELIHOOD)
    else:
      temperature = output_temperatures.fit(chosen_on["nll"])
      measured = {"temperature": temperature, "nll": read["nll"][:, ONE, None]}
      curves = scipy.interpolate.CubicSpline(np.log(GRID), read["nll"], axis=1)
      measured["fitted_nll"] = curves(np.log(temperature))[:, None]
      first = first or measured
      record = likelihoods.record(measured, first, words, label, config.task, **also)
    record |= dict(quality=None, quality_difference=None)
    if count >= ENOUGH:
      record["quality"] = paired_statistics.accuracy(read["right"])
      if found:
        pair = read["right"], tested[0]["right"]
        p = paired_statistics.paired_test(*pair).p
        difference = dataclasses.replace(paired_statistics.paired_accuracy(*pair), p=p)
        record["quality_difference"] = difference
    found.append(record)
  return found


def _of(records, table):
  return [r for r in records if r["table"] == table]


def table(records: list[dict[str, Any]]) -> str:
  parts = []
  for name, title in TABLES.items():
    of_table = _of(records, name)
    first = {
      "method": lambda r: (
        f"{r['model']}: {r['label']}" if r["table"] == "checkpoints" else r["label"]
      ),
      "passages": "examples",
      "computation": lambda r: f"{r['computation']:.2f}",
      "members": lambda r: f"{r['members']:.3g}",
      "unique experts": lambda r: f"{r['unique_experts']:.1f}" if r.get("unique_experts") else "",
    }
    shown = ("quality", "quality_difference", *compared.LIKELIHOOD)
    if of_table:
      parts.append(f"{title}:\n\n" + compared.table(of_table, first, shown))
  tau = {r["model"]: r["tau"] for r in records}
  chosen = ", ".join(f"{model} {t:g}" for model, t in tau.items())
  return (
    "\n\n".join(parts)
    + "\n\nComputation: FLOPs of a decoding step, times the baseline's. Perplexities are per word. "
    f"τ chosen on development passages: {chosen}."
  )


def summary(records: list[dict[str, Any]]) -> str:
  """Returns what a roster and its alternatives gain, in a sentence for each."""
  sentences = []
  for r in _of(records, "compute")[1:]:
    accuracy, perplexity = r["quality_difference"], r["fitted_difference"]
    gains = [
      f"{what} by {report_page.difference(d, 1, unit)}"
      + " (not significant)" * (not d.is_significant)
      for what, d, unit in (
        ("accuracy", accuracy, " points"),
        ("perplexity at fitted output temperatures", perplexity, " %"),
      )
      if d
    ]
    sentences.append(
      f"{r['label']}: changes {' and '.join(gains)}, for {r['computation']:.2f} times the "
      "baseline's computation"
    )
  return f"On {records[0]['task']} with {records[0]['model']}: " + "; ".join(sentences) + "."


def findings(records: list[dict[str, Any]]) -> str:
  sentences = [summary(records)]
  for name in ("noise", "layers", "histories", "experts", "checkpoints"):
    shown = [
      f"{r['model'] + ': ' if name == 'checkpoints' else ''}{r['label']} "
      + compared.cell(r["fitted_difference"], 1, True)
      for r in _of(records, name)
      if r["fitted_difference"]
    ]
    if shown:
      sentences.append(f"{TABLES[name]}, in percent of perplexity: {'; '.join(shown)}.")
  return " ".join(sentences)


def draw(records: list[dict[str, Any]]):
  """Draws perplexity against computation, and gains by τ, part, and number of active experts."""
  figure, axes = drawing.axes(2, 2, width=4.6, height=3.4)
  (compute, strength), (parts, experts) = axes
  points = [r for r in _of(records, "compute") if r["fitted"]]
  for i, r in enumerate(points):
    drawing.errorbars(
      compute, [r["computation"]], [r["fitted"]], label=r["label"], **drawing.style(i)
    )
  drawing.value_axis(
    compute, "x", "computation of a token, times the baseline's", [r["computation"] for r in points]
  )
  compute.set_ylabel("perplexity per word at fitted T")
  compute.legend(fontsize=7, frameon=False)

  of_tau = [r for r in (*_of(records, "strength"), *_of(records, "compute")) if _tau(r)]
  of_tau = sorted({_tau(r): r for r in of_tau}.items())
  compared.draw_gains(
    strength, "fitted_difference", [t for t, _ in of_tau], [r for _, r in of_tau], **drawing.line(0)
  )
  strength.set_xscale("log")
  strength.set_xticks([t for t, _ in of_tau], [f"{t:g}" for t, _ in of_tau])
  strength.minorticks_off()
  strength.set_xlabel("router temperature τ, log scale")
  strength.set_ylabel(compared.FITTED_AXIS)

  bars = [r for r in _of(records, "compute") if r["method"] == "roster"]
  bars += [r for name in ("noise", "layers") for r in _of(records, name)[1:]]
  names = [r["label"].partition(", ")[2].partition(", ")[2] or "as in the paper" for r in bars]
  gains = [compared.gain(r, "fitted_difference") for r in bars]
  values, lengths = drawing.bars(gains)
  style = drawing.style(0)
  parts.errorbar(values, range(len(bars)), xerr=lengths, **style)
  parts.set_yticks(range(len(bars)), names, fontsize=8)
  parts.invert_yaxis()
  parts.axvline(0, color="0.6", linewidth=0.8, zorder=0)
  parts.set_xlabel(compared.FITTED_AXIS)

  of_experts = _of(records, "experts")
  for i, (label, is_shown) in enumerate(
    {"baseline": lambda r: r["members"] == 1, "roster": lambda r: r["members"] > 1}.items()
  ):
    some = sorted((r for r in of_experts if is_shown(r)), key=lambda r: r["experts"])
    drawing.errorbars(
      experts,
      [r["experts"] for r in some],
      [r["fitted"] for r in some],
      label=label,
      **drawing.line(i),
    )
  drawing.value_axis(
    experts, "y", "perplexity per word at fitted T", [r["fitted"].value for r in of_experts]
  )
  experts.set_xlabel("active experts")
  experts.legend(fontsize=8, frameon=False)
  return figure


def _tau(r) -> Any:
  """Returns τ of a record with the paper's noise and all layers, else None."""
  if r["method"] == "roster":
    return r["tau"]
  return (
    float(r["method"].partition("t=")[2]) if r["table"] == "strength" and r["members"] > 1 else None
  )
