"""The tasks that models are evaluated on, and tuned for, by name."""

from experiments.tasks.base import Example, Task
from experiments.tasks.wordmath_task import WORDMATH

TASKS: dict[str, Task] = {task.name: task for task in (WORDMATH,)}


def get(name: str) -> Task:
  """The task of that name.

  Raises:
    ValueError: there is none.
  """
  if name not in TASKS:
    raise ValueError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
  return TASKS[name]
