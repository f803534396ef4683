"""Likelihoods of a task's reference texts under rosters, measured in this process.

The references are validation examples, since not all tasks' test examples have references: output
temperatures and other choices are made on the first of them, and results are reported on the
others, or on test examples if asked for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments import tasks
from experiments.analysis import comparisons, output_temperatures, paired_statistics
from experiments.cli import app
from experiments.evaluation.requests import RequestBuilder
from experiments.figures import compared
from experiments.figures.figure_run import FigureRun
from experiments.tuning.objectives import Perplexity
from roe_jax.roster import Roster
from roe_jax.text.chat import Chat

SPLIT = "validation"
BUDGETS = ("num_validation", "batch_size")  # settings of the model that `ReferenceScorer` uses


class ReferenceScorer:
  """A model with a task's references, some to choose on and some to report on.

  Attributes:
    params, config: of the model.
    choose_on, report_on: the references as objectives, each with `tokens` `[X]`.
  """

  def __init__(
    self,
    run: FigureRun,
    checkpoint: str,
    task: str | None = None,
    num_examples: int | None = None,
    split: str = SPLIT,
  ):
    """Opens the model and reads the references.

    Args:
      run: the figure.
      checkpoint: as in --checkpoint.
      task: the model's text by default.
      num_examples: to report on; the model's by default.
      split: of the examples to report on.

    Raises:
      ValueError: too few examples, or they have no references.
    """
    count = num_examples or run.model.num_examples or 1000
    first = run.model.num_validation
    scored = tasks.get(task or run.model.text)
    chats = run.uses_chat(scored.name)
    same = split == SPLIT
    examples = scored.examples(SPLIT, run.data_dir, first + count * same, chats)
    rest = examples[first:] if same else scored.examples(split, run.data_dir, count, chats)
    if len(examples) < first or not rest:
      raise ValueError(
        f"task {scored.name} has {len(examples)} validation examples, too few for "
        f"{first} to fit output temperatures on and others to report on: "
        "use fewer with --set=num_validation=..."
      )
    output_temperatures.warn(scored.name, first)
    self.params, self.config, tokenizer = app.open_model(checkpoint, None, run.model.mesh)
    chat = None
    if chats and run.model.chat:
      chat = Chat.load(
        app.checkpoint_path(checkpoint),
        tokenizer,
        date=run.model.chat["chat_date"],
        reasoning_effort=run.model.chat["reasoning_effort"],
      )
    builder = RequestBuilder(self.config, tokenizer, chat)
    self.choose_on, self.report_on = (
      Perplexity(self.config, builder, scored, some, run.model.batch_size)
      for some in (examples[:first], rest)
    )

  def value(self, roster: Roster) -> float:
    """Returns the mean nats per token on those to choose on."""
    objective = self.choose_on
    nll, _ = objective.nll(self.params, roster, slice(None), output_temperatures.padded([1.0]))
    return float(nll[:, 0].sum() / objective.tokens.sum())

  def measure(self, roster: Callable[[int], Roster], seeds: Sequence[int]) -> dict[str, Any]:
    """Measures likelihoods at T = 1 and at an output temperature fitted with the first seed.

    Args:
      roster: makes the roster of a noise seed.
      seeds: the noise seeds.

    Returns:
      JSON: "temperature", and "nll" and "fitted_nll" `[X][S]`, nats of each sequence.
    """
    on_grid, _ = self.choose_on.nll(
      self.params, roster(seeds[0]), slice(None), output_temperatures.GRID
    )
    temperature = output_temperatures.fit(on_grid)
    both = output_temperatures.padded([1.0, temperature])
    of_seed = lambda seed: self.report_on.nll(self.params, roster(seed), slice(None), both)[0]
    nll = np.stack([of_seed(seed)[:, :2] for seed in seeds], axis=1)  # [X, S, 2]
    return {
      "temperature": temperature,
      "nll": nll[..., 0].tolist(),
      "fitted_nll": nll[..., 1].tolist(),
    }

  def baseline(self) -> dict[str, Any]:
    """Same as `measure`, for the baseline."""
    return self.measure(lambda seed: Roster.create(self.config, seed=seed), [0])


def record(
  found: dict[str, Any], baseline: dict[str, Any], tokens: np.ndarray, label: str, task: str, **also
) -> compared.Record:
  """Returns a record like those of `compared.records`, of what a `ReferenceScorer` measured.

  Args:
    found: of the roster, or the baseline itself.
    baseline: of the baseline.
    tokens: `[X]` of each sequence.
    label: its name in tables.
    task: the task.
    **also: further fields.
  """
  tokens = np.asarray(tokens, float)
  ours, theirs = (
    {name: np.asarray(m[name], float) for name in ("nll", "fitted_nll")} for m in (found, baseline)
  )
  difference = comparison = None
  if found is not baseline:
    difference = paired_statistics.paired_perplexity(ours["nll"], theirs["nll"], tokens)
    comparison = comparisons.compare_perplexities(
      label, "baseline", task, ours["fitted_nll"], theirs["fitted_nll"], tokens
    )
  return {
    **also,
    "task": task,
    "label": label,
    "examples": len(tokens),
    "perplexity": paired_statistics.perplexity(ours["nll"], tokens),
    "perplexity_difference": difference,
    "fitted": paired_statistics.perplexity(ours["fitted_nll"], tokens),
    "fitted_difference": comparison and comparison.difference,
    "output_temperature": found["temperature"],
  }
