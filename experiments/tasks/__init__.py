"""The tasks that models are evaluated on and tuned for, by name."""

from experiments.tasks.base import PAPER, Example, Task
from experiments.tasks.human_eval import HUMAN_EVAL, HUMAN_EVAL_PLUS
from experiments.tasks.llm_adapters import COMMONSENSE, MATH
from experiments.tasks.wikitext import WIKITEXT103
from experiments.tasks.wordmath_task import WORDMATH

TASKS: dict[str, Task] = {
  task.name: task
  for task in (*WORDMATH, *MATH, *COMMONSENSE, HUMAN_EVAL, HUMAN_EVAL_PLUS, WIKITEXT103)
}
# Error where processes read different examples.
OTHER_DATA = "examples differ from those of process 0: give every host the same task data"


def get(name: str) -> Task:
  """Returns a task by name.

  Raises:
    ValueError: there is no such task.
  """
  if PAPER + name in TASKS:
    raise ValueError(
      f"task {name!r} is that of lm-evaluation-harness, which only experiments.evaluate runs: "
      f"give {PAPER}{name} for the RoE paper's"
    )
  if name not in TASKS:
    raise ValueError(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
  return TASKS[name]
