"""What a task is: examples, what a model is asked, and how its output is scored."""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
import pathlib
from typing import Any

from experiments import sandbox

CATEGORIES = ("math", "commonsense", "code", "language")
SPLITS = ("validation", "test", "all")

Output = str | Sequence[float]


@dataclasses.dataclass(frozen=True)
class Example:
  """A question to a model, to continue a prompt or to choose a continuation; or a text to read.

  Attributes:
    id: unique in its task and split, such as "gsm8k/test/17".
    prompt: the text that the model continues, white space and all.
    choices: continuations of which the most probable is the model's answer;
      None: the model writes a text.
    target: what is right: a number, the index of a choice, or None where
      `data` holds a program's tests.
    stop: strings at which a written text ends.
    max_new_tokens: its limit; 0: there is nothing to write, only a reference.
    reference: a continuation whose perplexity says how well the model does, the
      objective of tuning; None where there is none that can be trusted.
    messages: the same question to a chat model, in place of `prompt`; the last
      message may be the beginning of the assistant's answer. Empty for plain
      prompts.
    data: what else scoring needs.
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
    name: as flags name it.
    category: one of `CATEGORIES`.
    metric: the one that is reported first, a key of what `score` returns.
    read: `read(split, data_dir, chat)` yields the examples of a split in a fixed
      order; it raises the errors of `examples`.
    judge: `judge(examples, outputs, workers, on_done)` gives the metrics of each
      example; it calls `on_done()` after each.
    validation: a sentence saying what the validation split is.
    runs_code: whether scoring runs programs that the model wrote.
    higher_is_better: of the metric.
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
    """The first `limit` examples of a split; all for None.

    Args:
      split: "validation", "test", or "all": the whole public test set, which for some
        tasks has the validation split in it. Nothing tuned may be reported on "all".
      data_dir: a folder with the task's files in their public formats; None: the
        task's data set of the hub.
      limit: at least 1.
      chat: whether the examples are `messages` to a chat model.

    Raises:
      ValueError: the split or the limit is wrong, or the data are not as expected.
      FileNotFoundError: the folder has no file of this task.
    """
    if split not in SPLITS:
      raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
      raise ValueError(f"a limit of examples must be at least 1, got {limit}")
    folder = None if data_dir is None else pathlib.Path(data_dir).expanduser()
    return list(itertools.islice(self.read(split, folder, chat), limit))

  def score(
    self, example: Example, output: Output, allow_code_execution: bool = False
  ) -> dict[str, float]:
    """The metrics of one output; see `score_all`."""
    return self.score_all([example], [output], allow_code_execution)[0]

  def score_all(
    self,
    examples: Sequence[Example],
    outputs: Sequence[Output],
    allow_code_execution: bool = False,
    workers: int = 1,
    on_done: Callable[[], None] = lambda: None,
  ) -> list[dict[str, float]]:
    """The metrics of each output.

    Args:
      examples: what was asked.
      outputs: for each, the text that the model wrote (without its prompt and the
        stop string), or the summed log-probabilities of the choices in nats; a text
        where there are choices names one.
      allow_code_execution: must be True for tasks that run programs which the
        model wrote.
      workers: how many programs may run at the same time.
      on_done: called whenever another output is scored.

    Raises:
      ValueError: an output is not of its example's kind, or the task runs code
        and this is not allowed, or not possible here.
    """
    self.check_allowed(allow_code_execution)
    for example, output in zip(examples, outputs, strict=True):
      _check_output(example, output)
    return self.judge(examples, outputs, workers, on_done)

  def check_allowed(self, allow_code_execution: bool) -> None:
    """Refuses to run programs without leave; for a check before long work.

    Raises:
      ValueError: the task runs code, and this is not allowed, or not possible here.
    """
    if not self.runs_code:
      return
    if not allow_code_execution:
      raise ValueError(
        f"task {self.name} runs programs that the model wrote, each confined to a "
        "process without files and network: allow it with --allow_code_execution"
      )
    sandbox.check_support()


def _check_output(example, output):
  if isinstance(output, str):
    return
  if example.choices is None:
    raise ValueError(f"{example.id}: the output must be a text, got {type(output).__name__}")
  if len(output) != len(example.choices):
    raise ValueError(
      f"{example.id}: the output must be {len(example.choices)} log-probabilities, "
      f"one of each choice, got {len(output)}"
    )


def each(score: Callable[[Example, Any], dict[str, float]]) -> Callable[..., list]:
  """A `judge` that scores outputs one after the other."""

  def judge(examples, outputs, workers, on_done):
    del workers
    results = []
    for example, output in zip(examples, outputs):
      results.append(score(example, output))
      on_done()
    return results

  return judge


def chosen(example: Example, log_probs: Sequence[float]) -> dict[str, float]:
  """Accuracies of the most probable choice; ties go to the first.

  "acc" takes the sums of log-probabilities, "acc_norm" divides each by the
  length of its choice in UTF-8 bytes.
  """
  lengths = [len(choice.encode()) for choice in example.choices]
  best = max(range(len(lengths)), key=lambda i: log_probs[i])
  best_norm = max(range(len(lengths)), key=lambda i: log_probs[i] / lengths[i])
  return {"acc": float(best == example.target), "acc_norm": float(best_norm == example.target)}
