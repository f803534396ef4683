"""Likelihoods of a task's reference texts under rosters, measured in this process.

Texts are validation examples, as not all tasks' test examples have references: output
temperatures, and whatever else is chosen, come from the first of them, and what is reported
from the others, or from test examples where it is asked for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments import tasks
from experiments.analysis import paired_statistics
from experiments.analysis.paired_statistics import Comparison
from experiments.cli import app
from experiments.evaluation.measurer import OUTPUT_TEMPERATURES
from experiments.evaluation.prompts import PromptBuilder
from experiments.figures import compared
from experiments.figures.work import Work
from experiments.tuning.objectives import Perplexity
from roe_jax.roster import Roster
from roe_jax.text.chat import Chat

SPLIT = "validation"


class Texts:
  """A model with texts of a task, on which to choose and on which to report.

  Attributes:
    params, config: of the model.
    chosen_on, reported_on: the texts as objectives, each with `tokens` `[X]`.
  """

  def __init__(
    self,
    work: Work,
    checkpoint: str,
    task: str | None = None,
    num_examples: int | None = None,
    reported: str = SPLIT,
  ):
    """Opens the model and reads the texts.

    Args:
      work: the figure.
      checkpoint: as --checkpoint names it.
      task: the model's text by default.
      num_examples: on which is reported; the model's by default.
      reported: their split.

    Raises:
      ValueError: there are too few examples, or they have no references.
    """
    count = num_examples or work.model.num_examples or 1000
    first = work.model.num_validation
    task = tasks.get(task or work.model.text)
    chats = work.chats(task.name)
    examples = task.examples(
      SPLIT, work.data_dir, first + (count if reported == SPLIT else 0), chats
    )
    rest = (
      examples[first:]
      if reported == SPLIT
      else task.examples(reported, work.data_dir, count, chats)
    )
    if len(examples) < first or not rest:
      raise ValueError(
        f"task {task.name} has {len(examples)} validation examples, too few for "
        f"{first} to fit output temperatures on and others to report on: "
        "--set=num_validation=... takes less"
      )
    self.params, self.config, tokenizer = app.open_model(checkpoint, None, work.model.mesh)
    chat = None
    if chats:
      chat = Chat.load(
        app.checkpoint_path(checkpoint),
        tokenizer,
        date=work.model.chat["chat_date"],
        reasoning_effort=work.model.chat["reasoning_effort"],
      )
    prompt_builder = PromptBuilder(self.config, tokenizer, chat)
    self.chosen_on, self.reported_on = (
      Perplexity(
        self.config,
        prompt_builder,
        task,
        some,
        range(start, start + len(some)),
        work.model.batch_size,
      )
      for some, start in ((examples[:first], 0), (rest, first))
    )

  def tokens(self, count: int) -> list[list[int]]:
    """The first texts to report on, prompts and references, as tokens."""
    return self.reported_on.texts[:count]

  def value(self, roster: Roster) -> float:
    """Mean negative log-probability of a token, nats, of the texts to choose on."""
    objective = self.chosen_on
    return float(
      objective.nll(self.params, roster, slice(None), np.ones(len(OUTPUT_TEMPERATURES)))[:, 0].sum()
      / objective.tokens.sum()
    )

  def measure(self, roster: Callable[[int], Roster], seeds: Sequence[int]) -> dict[str, Any]:
    """Likelihoods as they are, and at an output temperature fitted with the first seed.

    Args:
      roster: makes the roster of a noise seed.
      seeds: the noise seeds.

    Returns:
      JSON: "temperature", and "nll" and "fitted_nll" `[X][S]`, nats of each text.
    """
    on_grid = self.chosen_on.nll(self.params, roster(seeds[0]), slice(None), OUTPUT_TEMPERATURES)
    temperature = paired_statistics.fit_output_temperature(on_grid, OUTPUT_TEMPERATURES)
    # As many output temperatures as above, so that nothing is compiled again.
    both = np.full(len(OUTPUT_TEMPERATURES), temperature)
    both[0] = 1.0
    nll = np.stack(
      [self.reported_on.nll(self.params, roster(seed), slice(None), both)[:, :2] for seed in seeds],
      axis=1,
    )  # [X, S, 2]
    return {
      "temperature": temperature,
      "nll": nll[..., 0].tolist(),
      "fitted_nll": nll[..., 1].tolist(),
    }

  def plain(self) -> dict[str, Any]:
    """As `measure`, of the plain model."""
    return self.measure(lambda seed: Roster.create(self.config, seed=seed), [0])


def record(
  found: dict[str, Any], plain: dict[str, Any], tokens: Sequence[int], label: str, task: str, **also
) -> compared.Record:
  """What `Texts.measure` found as a record like those of `compared.records`.

  Args:
    found: of the roster, or of the plain model itself.
    plain: of the plain model.
    tokens: `[X]` of each text.
    label: what it is called.
    task: the task.
    also: what the record says besides.
  """
  tokens = np.asarray(tokens, float)
  ours, theirs = (
    {name: np.asarray(m[name], float) for name in ("nll", "fitted_nll")} for m in (found, plain)
  )
  is_baseline = found is plain
  comparison = (
    None
    if is_baseline
    else Comparison(
      label,
      "plain",
      task,
      "perplexity",
      " %",
      len(tokens),
      paired_statistics.paired_perplexity(ours["fitted_nll"], theirs["fitted_nll"], tokens),
      paired_statistics.paired_test(ours["fitted_nll"], theirs["fitted_nll"]),
      1.0,
    )
  )
  return {
    **also,
    "task": task,
    "label": label,
    "examples": len(tokens),
    "perplexity": compared.estimate(paired_statistics.perplexity(ours["nll"], tokens)),
    "perplexity_difference": None
    if is_baseline
    else compared.estimate(paired_statistics.paired_perplexity(ours["nll"], theirs["nll"], tokens)),
    "fitted": compared.estimate(paired_statistics.perplexity(ours["fitted_nll"], tokens)),
    "fitted_difference": compared.as_json(comparison),
    "output_temperature": found["temperature"],
  }
