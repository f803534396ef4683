"""The tasks that models are evaluated on, and tuned for, by name."""

from experiments.tasks.base import Example, Task
from experiments.tasks.human_eval import HUMAN_EVAL, HUMAN_EVAL_PLUS
from experiments.tasks.llm_adapters import COMMONSENSE, MATH
from experiments.tasks.wikitext import WIKITEXT103
from experiments.tasks.wordmath_task import WORDMATH

TASKS: dict[str, Task] = {
  task.name: task
  for task in (*WORDMATH, *MATH, *COMMONSENSE, HUMAN_EVAL, HUMAN_EVAL_PLUS, WIKITEXT103)
}
# Why processes that read other examples than the first one do not go on.
OTHER_DATA = "other examples than in process 0: every host must have the same data of a task"


def get(name: str) -> Task:
  """The task of that name.

  Raises:
    ValueError: there is none.
  """
  if name not in TASKS:
    raise ValueError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
  return TASKS[name]
