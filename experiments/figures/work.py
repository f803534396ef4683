"""What a figure is made with: its settings, its folder, and the programs that run first."""

from collections.abc import Callable
import dataclasses
import json
import pathlib
import shlex
import subprocess
import sys
from typing import Any

from tqdm import tqdm

from experiments import tasks
from experiments.analysis import run_results as results_lib
from experiments.cli import app
from experiments.figures.figure_models import Model
from experiments.records import jsonl, runs

# In a figure's folder.
RECORDS, ABOUT, PICTURE = "records.jsonl", "about.json", "figure.png"


@dataclasses.dataclass(frozen=True)
class Command:
  """A program of `experiments` that leaves a folder; it goes on where it stopped.

  Attributes:
    program: its name.
    output: the folder.
    flags: (name, value) of its other flags; those that are None are left out, lists are
      joined with commas.
    done: a file in the folder that is there when all is done, or a pattern of which
      `num_done` must be there.
    num_done: see `done`.
  """

  program: str
  output: pathlib.Path
  flags: tuple[tuple[str, Any], ...]
  done: str
  num_done: int = 1

  @property
  def name(self) -> str:
    """What it is called among those of its model: "tune/gsm8k"."""
    return f"{self.output.parent.name}/{self.output.name}"

  @property
  def arguments(self) -> list[str]:
    return [
      "-m",
      f"experiments.{self.program}",
      *(_flag(name, value) for name, value in self.flags if value is not None),
      f"--output={self.output}",
    ]

  def __str__(self) -> str:
    return shlex.join(["python", *self.arguments])

  @property
  def is_done(self) -> bool:
    return len(list(self.output.glob(self.done))) >= self.num_done

  def run(self) -> None:
    """Runs it to its end.

    Raises:
      ValueError: it fails.
    """
    code = subprocess.run([sys.executable, *self.arguments], check=False).returncode
    if code:
      raise ValueError(
        f"{self} ended with exit code {code}, see above; when that is mended, start "
        "this program again: it goes on from there"
      )


def _flag(name, value):
  if isinstance(value, bool):
    return f"--{name}" if value else f"--no{name}"
  return f"--{name}=" + (
    ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
  )


class Measured(jsonl.SavedValues):
  """Values that show, on a bar, which of them is being made."""

  def __init__(self, path: pathlib.Path, settings: dict[str, Any]):
    super().__init__(path, settings)
    self._bar = tqdm(desc=settings["figure"], unit="measurement", file=sys.stderr)

  def get(self, name: str, compute: Callable[[], Any]) -> Any:
    self._bar.set_postfix_str(name)
    value = super().get(name, compute)
    self._bar.update()
    return value


@dataclasses.dataclass(frozen=True)
class Work:
  """One figure of one model.

  Attributes:
    figure: its name.
    model: the model, with what --set overrides.
    config: the figure's own settings, likewise.
    root: folder of all figures of this model; what several of them need lies in it.
    seed: the first noise seed.
    data_dir: folder with the tasks' files; None: the hub.
    allow_code_execution: whether programs that the model wrote may run.
  """

  figure: str
  model: Model
  config: Any
  root: pathlib.Path
  seed: int = 0
  data_dir: str | None = None
  allow_code_execution: bool = False

  @property
  def folder(self) -> pathlib.Path:
    """Where the figure's own files go."""
    return self.root / self.figure

  @property
  def seeds(self) -> list[int]:
    """The noise seeds, as many as the figure's settings say, else the model's."""
    return [self.seed + i for i in range(getattr(self.config, "seeds", self.model.num_seeds))]

  @property
  def settings(self) -> dict[str, Any]:
    """All that its results depend on."""
    model = dataclasses.asdict(self.model)
    for name in ("title", "prepare", "hardware"):
      del model[name]
    return json.loads(
      json.dumps(
        {
          "figure": self.figure,
          "model": model,
          "seed": self.seed,
          "data_dir": self.data_dir,
          "config": dataclasses.asdict(self.config),
        }
      )
    )

  def kept(self) -> "Measured":
    """Values of the figure's own measurements, by name: those that are there are not made again."""
    return Measured(self.folder / "measured.jsonl", self.settings)

  def tune(self, task: str, name: str | None = None, **flags) -> Command:
    """A search of τ for a task, which all figures share; `flags` override those of the model.

    Args:
      task: the task.
      name: of its folder in `root`/tune; the task's by default.
    """
    model = self.model
    settings = (
      dict(
        checkpoint=model.checkpoint,
        mesh=model.mesh,
        task=task,
        config=model.tuning.format(category=model.category(task)),
        num_samples=model.num_samples,
        num_trials=model.num_trials,
        num_members=model.num_members,
        cache=model.cache,
        seed=self.seed,
        **self._of_tasks(task),
      )
      | flags
    )
    return Command(
      "tune",
      self.root / "tune" / (name or task),
      tuple(settings.items()),
      done="confirm/*/summary.json",
    )

  def profile(self, task: str) -> pathlib.Path:
    """The profile that `tune(task)` leaves."""
    return self.root / "tune" / task / "profile.json"

  def compare(self, name: str, task_names: list[str], methods: list[str], **flags) -> Command:
    """A comparison of methods, in `root`/compare/`name`; `flags` override those of the model."""
    model = self.model
    settings = (
      dict(
        checkpoint=model.checkpoint,
        mesh=model.mesh,
        tasks=task_names,
        methods="; ".join(methods),
        num_members=model.num_members,
        cache=model.cache,
        temperature_profile=model.temperature,
        num_seeds=model.num_seeds,
        limit=model.num_examples,
        num_validation=model.num_validation,
        batch_size=model.batch_size,
        seed=self.seed,
        **self._of_tasks(*task_names),
      )
      | flags
    )
    return Command(
      "compare",
      self.root / "compare" / name,
      tuple(settings.items()),
      done="*/summary.json",
      num_done=len(methods),
    )

  def chats(self, *names: str) -> bool:
    """Whether tasks are asked in the model's chat format, as all are but texts to read."""
    return self.model.chat is not None and all(tasks.get(n).category != "language" for n in names)

  def _of_tasks(self, *names):
    settings = dict(data_dir=self.data_dir, allow_code_execution=self.allow_code_execution or None)
    return settings | (dict(chat=True, **self.model.chat) if self.chats(*names) else {})

  def compared(self, name: str) -> dict[str, results_lib.Result]:
    """The runs that `compare(name, ...)` left, by the text of their method."""
    found = results_lib.load_runs([str(self.root / "compare" / name / "*")])
    return {result.settings["spelled"]: result for result in found}

  def tuned(self, task: str) -> results_lib.Tuning:
    """The search that `tune(task)` left."""
    return results_lib.load_tunings([str(self.root / "tune" / task)])[0]


def write_records(path: pathlib.Path, records: list[dict[str, Any]]) -> None:
  """Writes JSON lines at once."""
  app.write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
  """What `write_records` wrote."""
  return runs.read_lines(path)
