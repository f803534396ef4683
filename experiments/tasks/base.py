"""The interface of a task: its examples and how outputs are scored."""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
import pathlib
from typing import Any

from experiments import sandbox

CATEGORIES = ("math", "commonsense", "code", "language")
SPLITS = ("validation", "test", "all")
# Prefix of the RoE paper's tasks: lm-evaluation-harness has tasks of the same names with other
# prompts.
PAPER = "paper/"
# Prefix of tasks on plain text, without a question; the harness has some of the same names.
TEXT = "text/"
PERPLEXITY = "perplexity"  # Metric of tasks that have no right answers.

Output = bool | str | Sequence[float]


@dataclasses.dataclass(frozen=True)
class Example:
  """A question to generate or choose an answer to, or a text to compute the likelihood of.

  Attributes:
    id: unique in its task and split, such as "gsm8k/test/17".
    prompt: the prompt, with exact whitespace.
    choices: continuations, the most probable of which is the model's answer; None to generate.
    target: the right answer: a number, the index of a choice, or None where `data` has tests.
    stop: strings that end generation.
    max_new_tokens: maximum number of generated tokens; 0 if there is only a reference.
    reference: a continuation whose perplexity measures quality (the objective of tuning); None
      if there is no trusted one. An example of kind "read" has no other answer.
    messages: the same question as a chat, instead of `prompt`; a final assistant message is the
      start of the answer. Empty for raw prompts.
    data: further inputs of scoring.
  """

  id: str
  prompt: str
  choices: tuple[str, ...] | None = None
  target: Any = None
  stop: tuple[str, ...] = ()
  max_new_tokens: int = 256
  reference: str | None = None
  messages: tuple[dict[str, str], ...] = ()
  data: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def kind(self) -> str:
    """ "generate", "choose" or "read"."""
    if self.choices is not None:
      return "choose"
    return "generate" if self.max_new_tokens else "read"


@dataclasses.dataclass(frozen=True)
class Task:
  """A benchmark.

  Attributes:
    name: its name in flags.
    category: one of `CATEGORIES`.
    metric: the main metric, a key of what `score` returns.
    read: `read(split, data_dir, chat)` yields the examples of a split in a fixed order, with the
      errors of `examples`.
    judge: `judge(examples, outputs, workers, on_done)` returns the metrics of each example and
      calls `on_done()` after each.
    validation: description of the validation split.
    runs_code: whether scoring runs model-written programs.
    higher_is_better: whether a higher metric is better.
  """

  name: str
  category: str
  metric: str
  read: Callable[..., Any]
  judge: Callable[..., list[dict[str, float]]]
  validation: str
  runs_code: bool = False
  higher_is_better: bool = True

  def examples(
    self,
    split: str,
    data_dir: pathlib.Path | str | None = None,
    limit: int | None = None,
    chat: bool = False,
  ) -> list[Example]:
    """Returns the first `limit` examples of a split; all for None.

    Args:
      split: "validation", "test" or "all" (the whole public test set, which for some tasks
        includes the validation split, so never report tuned results on "all").
      data_dir: folder with the task's files in their public formats; None to use the hub.
      limit: at least 1.
      chat: whether examples get `messages`.

    Raises:
      ValueError: the split or the limit is invalid, or the data are malformed.
      FileNotFoundError: the folder has no file of this task.
    """
    if split not in SPLITS:
      raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if limit is not None and limit < 1:
      raise ValueError(f"limit must be at least 1, got {limit}")
    folder = None if data_dir is None else pathlib.Path(data_dir).expanduser()
    return list(itertools.islice(self.read(split, folder, chat), limit))

  def score(
    self, example: Example, output: Output, allow_code_execution: bool = False
  ) -> dict[str, float]:
    """Returns the metrics of one output; see `score_all`."""
    return self.score_all([example], [output], allow_code_execution)[0]

  def score_all(
    self,
    examples: Sequence[Example],
    outputs: Sequence[Output],
    allow_code_execution: bool = False,
    workers: int = 1,
    on_done: Callable[[], object] = lambda: None,
  ) -> list[dict[str, float]]:
    """Returns the metrics of each output.

    Args:
      examples: the examples.
      outputs: for each example, the generated text (without prompt and stop string), the summed
        log-probabilities of the choices in nats, or, for kind "read", whether each token of the
        reference is the most probable one. A text for an example with choices names one.
      allow_code_execution: must be True for tasks that run model-written programs.
      workers: number of programs that run in parallel.
      on_done: called after each scored output.

    Raises:
      ValueError: an output does not fit its example, or the task runs code and that is not
        allowed or not supported on this machine.
    """
    self.check_allowed(allow_code_execution)
    for example, output in zip(examples, outputs, strict=True):
      _check_output(example, output)
    return self.judge(examples, outputs, workers, on_done)

  def check_allowed(self, allow_code_execution: bool) -> None:
    """Checks that the task's code may run, before expensive work.

    Raises:
      ValueError: the task runs code and that is not allowed or not supported on this machine.
    """
    if not self.runs_code:
      return
    if not allow_code_execution:
      raise ValueError(
        f"task {self.name} runs model-written programs, each in a sandbox without files and "
        "network: allow it with --allow_code_execution"
      )
    sandbox.check_support()


def _check_output(example, output):
  if example.kind == "read":
    if not isinstance(output, bool):
      raise ValueError(f"{example.id}: output must be a bool, got {type(output).__name__}")
    return
  if isinstance(output, str):
    return
  if example.choices is None:
    raise ValueError(f"{example.id}: output must be a string, got {type(output).__name__}")
  if len(output) != len(example.choices):
    raise ValueError(
      f"{example.id}: output must be {len(example.choices)} log-probabilities, one per choice, "
      f"got {len(output)}"
    )


def each(score: Callable[[Example, Any], dict[str, float]]) -> Callable[..., list]:
  """Makes a `judge` that scores outputs one by one."""

  def judge(examples, outputs, workers, on_done):
    del workers
    results = []
    for example, output in zip(examples, outputs):
      results.append(score(example, output))
      on_done()
    return results

  return judge


def chosen(example: Example, log_probs: Sequence[float]) -> dict[str, float]:
  """Returns accuracies of the most probable choice; ties go to the first.

  "acc" uses summed log-probabilities; "acc_norm" divides them by the choice's UTF-8 length.
  """
  lengths = [len(choice.encode()) for choice in example.choices or ()]
  best = max(range(len(lengths)), key=lambda i: log_probs[i])
  best_norm = max(range(len(lengths)), key=lambda i: log_probs[i] / lengths[i])
  return {"acc": float(best == example.target), "acc_norm": float(best_norm == example.target)}
