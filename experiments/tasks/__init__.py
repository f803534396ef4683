"""The tasks that models are evaluated on and tuned for, by name."""

from experiments.tasks.base import PAPER, PERPLEXITY, TEXT, Example, Task
from experiments.tasks.blimp import BLIMP
from experiments.tasks.human_eval import HUMAN_EVAL, HUMAN_EVAL_PLUS
from experiments.tasks.lambada import LAMBADA
from experiments.tasks.llm_adapters import COMMONSENSE, MATH
from experiments.tasks.wikitext import WIKITEXT, WIKITEXT103
from experiments.tasks.wordmath_task import WORDMATH

TASKS: dict[str, Task] = {
  task.name: task
  for task in (
    *WORDMATH,
    *MATH,
    *COMMONSENSE,
    HUMAN_EVAL,
    HUMAN_EVAL_PLUS,
    WIKITEXT103,
    LAMBADA,
    BLIMP,
    *WIKITEXT,
  )
}
# Error where processes read different examples.
OTHER_DATA = "examples differ from those of process 0: give every host the same task data"


def get(name: str) -> Task:
  """Returns a task by name.

  Raises:
    ValueError: there is no such task.
  """
  for prefix, whose in {PAPER: "the RoE paper's", TEXT: "this project's"}.items():
    if prefix + name in TASKS:
      raise ValueError(
        f"task {name!r} is that of lm-evaluation-harness, which only experiments.evaluate runs: "
        f"give {prefix}{name} for {whose}"
      )
  if name not in TASKS:
    raise ValueError(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
  return TASKS[name]
