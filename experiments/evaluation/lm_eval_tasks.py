"""Loads and runs tasks of lm-evaluation-harness, and makes records of the results."""

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

_FEWSHOT_SEED = 1234  # the harness's default
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
  """Loads harness tasks and groups with their data.

  Args:
    names: tasks, groups or tags.
    include_path: folder of additional tasks.
    num_fewshot: number of few-shot examples; None for each task's. Tasks that set 0 keep it.
    allow_code_execution: must be True for tasks that run model-written programs.
    include_defaults: whether to include the harness's own tasks.
    others: further names to suggest for unknown ones.

  Returns:
    "tasks" and "groups" by name, as `TaskManager.load` does.

  Raises:
    ValueError: a name is unknown, data cannot be loaded, or a task runs code without permission
      or outside a sandbox.
  """
  manager = TaskManager(include_path=include_path, include_defaults=include_defaults)
  for name in names:
    if name not in manager.all_tasks:
      near = difflib.get_close_matches(name, [*others, *manager.all_tasks], 3)
      known = f"tasks or groups of lm-evaluation-harness, or {', '.join(others)}"
      hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {known}"
      raise ValueError(f"unknown task {name!r}: {hint}")
  parts = []
  with _confined(allow_code_execution):
    for name in names:
      try:
        parts.append(manager.load([name]))
      except _NotAllowed as error:
        raise ValueError(f"task {name} {error}") from error
      except Exception as error:  # a missing network alone raises many kinds
        raise ValueError(
          f"task {name} cannot be loaded ({type(error).__name__}: "
          f"{' '.join(str(error).split())}): without network, its data must be in the cache of "
          "the package datasets, or the task in --include_path with local data_files"
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
    raise ValueError(f"task {name} needs more than a text model ({task.OUTPUT_TYPE}): remove it")
  if not getattr(task, "UNSAFE_CODE", False):
    return
  if not allow_code_execution:
    raise ValueError(f"task {name} {_NotAllowed()}")
  # The harness stores metrics as the `__call__` of their functions.
  functions = [getattr(f, "__self__", f) for f in getattr(task, "_metric_fn_list", {}).values()]
  if not any(
    isinstance(value, CodeEval)
    for function in functions
    for value in getattr(function, "__globals__", {}).values()
  ):
    raise ValueError(
      f"task {name} runs model-written programs without a sandbox: use paper/humaneval or "
      "paper/humaneval_plus instead"
    )


class _NotAllowed(Exception):
  """Raised within the import of a task's functions."""

  def __str__(self):
    return (
      "runs model-written programs, each in a sandbox without files and network: allow it with "
      "--allow_code_execution"
    )


class CodeEval:
  """The metric "code_eval" of the package evaluate, in our sandbox.

  It replaces the downloaded metric, which runs programs in child processes without confinement.
  """

  def compute(
    self,
    references: Sequence[str],
    predictions: Sequence[Sequence[str]],
    k: Sequence[int] = (1, 10, 100),
    **unused,
  ) -> tuple[dict[str, float], None]:
    """Returns pass@k of the programs for each test, and None in place of the outcomes."""
    del unused
    programs = [f"{p}\n{test}" for test, samples in zip(references, predictions) for p in samples]
    passed = iter([outcome.passed for outcome in sandbox.run_programs(programs)])
    counts = [(len(samples), sum(next(passed) for _ in samples)) for samples in predictions]
    return {
      f"pass@{n}": float(np.mean([pass_at_k(*count, n) for count in counts]))
      for n in k
      if all(samples >= n for samples, _ in counts)
    }, None


@contextlib.contextmanager
def _confined(allowed):
  """Replaces the metric "code_eval" that tasks load by `CodeEval`."""
  original = hf_evaluate.load

  def load(path, *args, **kwargs):
    if path != _CODE_EVAL:
      return original(path, *args, **kwargs)
    if not allowed:
      raise _NotAllowed
    return CodeEval()

  with mock.patch.object(hf_evaluate, "load", load):
    yield


def check(
  lm: RosterLM, loaded: dict[str, Any], chat: bool = False, system: str | None = None
) -> None:
  """Makes the first requests of each task, to validate them before parameters are loaded.

  Raises:
    ValueError: they do not fit the model, or the chat template rejects them.
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
  """Makes a task's few-shot examples depend on the task only."""
  random.seed(_FEWSHOT_SEED)
  np.random.seed(_FEWSHOT_SEED)  # noqa: NPY002 - the harness draws from it
  task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def run(
  lm: RosterLM,
  loaded: dict[str, Any],
  limit: int | None = None,
  chat: bool = False,
  system: str | None = None,
) -> Any:
  """Runs loaded tasks; returns what `lm_eval.evaluator.evaluate` does."""
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
  """Yields a run's records (see `runs`), one per document of a task.

  Metrics are the harness's numeric ones, named METRIC or METRIC,FILTER. Choices and rolling
  likelihoods add "nll" and "tokens"; choices add the probability of the selected one as
  "confidences".
  """
  documents: dict[int, list[dict[str, Any]]] = {}
  for sample in samples:
    documents.setdefault(sample["doc_id"], []).append(sample)
  for doc_id, filtered in sorted(documents.items()):
    metrics = {}
    for sample in filtered:
      suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
      metrics |= {m + suffix: float(sample[m]) for m in sample["metrics"] if _is_number(sample[m])}
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
        "tokens": sum(len(w.tokens) for w in lm.builder.windows(*first["arguments"][0])),
      }
    elif task.OUTPUT_TYPE == "generate_until":
      record["outputs"] = [list(responses) for responses in first["resps"]]
    yield record


def _chosen(lm, task, sample, outputs, metrics):
  """Returns the entries for choices; {} if no choice is marked right."""
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
