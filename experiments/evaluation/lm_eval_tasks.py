"""Tasks of lm-evaluation-harness: loading, running, and records of what came of them."""

from collections.abc import Iterator, Sequence
import contextlib
import difflib
import random
from typing import Any
from unittest import mock

import evaluate as hf_evaluate
from lm_eval import evaluator
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
import numpy as np
import scipy.special

from experiments import sandbox
from experiments.evaluation.lm_eval_model import RosterLM
from experiments.tasks.human_eval import pass_at_k

_FEWSHOT_SEED = 1234  # the harness's own default, of which examples are shown
_BOOTSTRAPS = 1000
_CODE_EVAL = "code_eval"


def load(
  names: Sequence[str],
  include_path: str | None = None,
  num_fewshot: int | None = None,
  allow_code_execution: bool = False,
  include_defaults: bool = True,
  others: Sequence[str] = (),
) -> dict[str, Any]:
  """Tasks and groups of the harness, with their data.

  Args:
    names: of tasks, groups or tags.
    include_path: a folder of further tasks.
    num_fewshot: examples shown; what each task says for None. Tasks that say 0
      keep it.
    allow_code_execution: must be True for tasks that run programs which the model
      wrote.
    include_defaults: whether the harness's own tasks are there.
    others: names to suggest for unknown ones besides the harness's.

  Returns:
    As `TaskManager.load`: "tasks" and "groups" by name.

  Raises:
    ValueError: a name is unknown, the data cannot be had, or a task runs code and
      that is not allowed, or is not done in a sandbox.
  """
  manager = TaskManager(include_path=include_path, include_defaults=include_defaults)
  for name in names:
    if name not in manager.all_tasks:
      near = difflib.get_close_matches(name, [*others, *manager.all_tasks], 3)
      raise ValueError(
        f"there is no task {name!r}"
        + (
          f"; did you mean {' or '.join(near)}?"
          if near
          else ": give names of the harness's tasks or groups, or of ours ("
          + ", ".join(others)
          + ")"
        )
      )
  parts = []
  with _confined(allow_code_execution):
    for name in names:
      try:
        parts.append(manager.load([name]))
      except _NotAllowed as error:
        raise ValueError(f"task {name} {error}") from error
      except Exception as error:  # of many kinds, for a missing network alone
        raise ValueError(
          f"task {name} cannot be loaded ({type(error).__name__}: "
          f"{' '.join(str(error).split())}): with no network its data must be in the cache of "
          "the package datasets, or the task in a folder given as --include_path with local "
          "data_files"
        ) from error
  loaded = {
    kind: {k: v for part in parts for k, v in part[kind].items()} for kind in ("tasks", "groups")
  }
  for name, task in loaded["tasks"].items():
    _check(name, task, allow_code_execution)
    if task.get_config("num_fewshot") is None or (
      num_fewshot is not None and task.get_config("num_fewshot") != 0
    ):
      task.set_config("num_fewshot", num_fewshot or 0)
  return loaded


def _check(name, task, allow_code_execution):
  if task.OUTPUT_TYPE not in (
    "loglikelihood",
    "multiple_choice",
    "loglikelihood_rolling",
    "generate_until",
  ) or getattr(task, "MULTIMODAL", False):
    raise ValueError(
      f"task {name} asks for more than text ({task.OUTPUT_TYPE}), which a language "
      "model does not give"
    )
  if not getattr(task, "UNSAFE_CODE", False):
    return
  if not allow_code_execution:
    raise ValueError(f"task {name} {_NotAllowed()}")
  # The harness holds metrics as the `__call__` of their functions.
  functions = [getattr(f, "__self__", f) for f in getattr(task, "_metric_fn_list", {}).values()]
  if not any(
    isinstance(value, CodeEval)
    for function in functions
    for value in getattr(function, "__globals__", {}).values()
  ):
    raise ValueError(
      f"task {name} runs programs that the model wrote in a way of its own, without "
      "a sandbox, and is not run here; paper/humaneval and paper/humaneval_plus are"
    )


class _NotAllowed(Exception):
  """Raised from within the import of a task's functions."""

  def __str__(self):
    return (
      "runs programs that the model wrote, each confined to a process without files and "
      "network: allow it with --allow_code_execution"
    )


class CodeEval:
  """The metric "code_eval" of the package evaluate, with programs run in our sandbox.

  It takes the place of the one that is downloaded, and runs programs in children of
  this process that can do all that it can.
  """

  def compute(
    self,
    references: Sequence[str],
    predictions: Sequence[Sequence[str]],
    k: Sequence[int] = (1, 10, 100),
    **unused,
  ) -> tuple[dict[str, float], None]:
    """pass@k of the programs written for each test, and None for the outcomes."""
    del unused
    programs = [
      f"{program}\n{test}" for test, written in zip(references, predictions) for program in written
    ]
    passed = iter([outcome.passed for outcome in sandbox.run_programs(programs)])
    counts = [(len(written), sum(next(passed) for _ in written)) for written in predictions]
    return {
      f"pass@{n}": float(np.mean([pass_at_k(*count, n) for count in counts]))
      for n in k
      if all(samples >= n for samples, _ in counts)
    }, None


@contextlib.contextmanager
def _confined(allowed):
  """Where tasks ask the package evaluate for "code_eval", they get `CodeEval`."""
  usual = hf_evaluate.load

  def load(path, *args, **kwargs):
    if path != _CODE_EVAL:
      return usual(path, *args, **kwargs)
    if not allowed:
      raise _NotAllowed
    return CodeEval()

  with mock.patch.object(hf_evaluate, "load", load):
    yield


def check(
  lm: RosterLM, loaded: dict[str, Any], chat: bool = False, system: str | None = None
) -> None:
  """Makes the first requests of each task, before parameters are read.

  Raises:
    ValueError: they are more than the model can do, or the chat template refuses them.
  """
  for name, task in loaded["tasks"].items():
    _seed(task)
    task.build_all_requests(
      limit=1,
      rank=0,
      world_size=1,
      system_instruction=system,
      apply_chat_template=chat,
      fewshot_as_multiturn=chat,
      chat_template=lm.apply_chat_template if chat else None,
      tokenizer_name=lm.tokenizer_name,
    )
    for request in task.instances:
      if request.request_type == "generate_until":
        try:
          lm.prompt(*request.args)
        except ValueError as error:
          raise ValueError(f"task {name}: {error}") from error


def _seed(task):
  """Which few-shot examples are shown depends on nothing but the task."""
  random.seed(_FEWSHOT_SEED)
  np.random.seed(_FEWSHOT_SEED)  # noqa: NPY002 - the harness draws from it
  task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def run(
  lm: RosterLM,
  loaded: dict[str, Any],
  limit: int | None = None,
  chat: bool = False,
  system: str | None = None,
) -> dict[str, Any]:
  """Runs loaded tasks; what `lm_eval.evaluator.evaluate` returns."""
  for task in loaded["tasks"].values():
    _seed(task)
  return evaluator.evaluate(
    lm,
    loaded,
    limit=limit,
    bootstrap_iters=_BOOTSTRAPS,
    system_instruction=system,
    apply_chat_template=chat,
    fewshot_as_multiturn=chat,
    confirm_run_unsafe_code=True,
  )


def records(
  lm: RosterLM, name: str, task: Task, samples: Sequence[dict[str, Any]], seed: int
) -> Iterator[dict[str, Any]]:
  """Lines for a run (see `runs`), one for each document of a task.

  Metrics are the harness's, each under its name, with the filter behind a comma if
  there is one; those that are no number of a document are left out. Choices and rolling
  texts have "nll" and "tokens" besides, and choices the probability of the chosen one
  among them under "confidences".
  """
  documents: dict[int, list[dict[str, Any]]] = {}
  for sample in samples:
    documents.setdefault(sample["doc_id"], []).append(sample)
  for doc_id, filtered in sorted(documents.items()):
    metrics = {}
    for sample in filtered:
      behind = "" if sample["filter"] == "none" else f",{sample['filter']}"
      metrics |= {m + behind: float(sample[m]) for m in sample["metrics"] if _is_number(sample[m])}
    record = {"task": name, "example": f"{name}/{doc_id}", "seed": seed, "metrics": metrics}
    first = filtered[0]
    outputs = [responses[0] for responses in first["resps"]]
    if task.OUTPUT_TYPE == "multiple_choice":
      record |= _chosen(lm, task, first, outputs, metrics)
    elif task.OUTPUT_TYPE == "loglikelihood":
      metrics |= {"nll": -outputs[0][0], "tokens": lm.lengths[first["arguments"][0]]}
    elif task.OUTPUT_TYPE == "loglikelihood_rolling":
      metrics |= {
        "nll": -outputs[0],
        "tokens": sum(len(w.tokens) for w in lm.windows(*first["arguments"][0])),
      }
    elif task.OUTPUT_TYPE == "generate_until":
      record["outputs"] = [list(responses) for responses in first["resps"]]
    yield record


def _chosen(lm, task, sample, outputs, metrics):
  """Adds what the likelihoods of choices say, where one of them is right."""
  choices, target = task.doc_to_choice(sample["doc"]), sample["target"]
  if isinstance(target, str):
    target = choices.index(target) if target in choices else None
  if not isinstance(target, int) or not 0 <= target < len(choices):
    return {}
  log_probs = np.array([log_prob for log_prob, _ in outputs[: len(choices)]])
  best = int(np.argmax(log_probs))
  metrics |= {
    "nll": float(-log_probs[target]),
    "tokens": lm.lengths[tuple(sample["arguments"][target])],
  }
  return {
    "log_probs": log_probs.tolist(),
    "correct": [best == target],
    "confidences": [float(scipy.special.softmax(log_probs)[best])],
  }


def _is_number(value):
  return isinstance(value, (bool, int, float, np.number)) and np.isfinite(value)
