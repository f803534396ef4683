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
from experiments.analysis.paired_statistics import Contrast, Difference
from experiments.cli import text_files
from experiments.evaluation import methods as methods_lib
from experiments.evaluation.methods import Spec
from experiments.figures.figure_models import Model
from experiments.records import store

# In a figure's folder.
RECORDS, ABOUT, PICTURE = "records.jsonl", "about.json", "figure.png"


@dataclasses.dataclass(frozen=True)
class Command:
  """A program of `experiments` that fills a folder, and resumes when rerun.

  Attributes:
    program: its name.
    output: the folder.
    flags: (name, value) of its other flags; None values are left out, lists are joined
      with commas.
    done: pattern of files in the folder, `num_done` of which exist at the end.
    num_done: see `done`.
  """

  program: str
  output: pathlib.Path
  flags: tuple[tuple[str, Any], ...]
  done: str
  num_done: int = 1

  @property
  def name(self) -> str:
    """Its name among the commands of its model: "tune/gsm8k"."""
    return f"{self.output.parent.name}/{self.output.name}"

  @property
  def arguments(self) -> list[str]:
    flags = [_flag(name, value) for name, value in self.flags if value is not None]
    return ["-m", f"experiments.{self.program}", *flags, f"--output={self.output}"]

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
        f"{self} ended with exit code {code}: fix the error printed above and rerun this "
        "program, which resumes from there"
      )


def _flag(name, value):
  if isinstance(value, bool):
    return f"--{name}" if value else f"--no{name}"
  return f"--{name}=" + (
    ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
  )


class Measurements(store.SavedValues):
  """Saved measurements with a progress bar that names the current one."""

  def __init__(self, path: pathlib.Path, settings: dict[str, Any]):
    super().__init__(path, settings)
    self._bar = tqdm(desc=settings["figure"], unit="measurement", file=sys.stderr)

  def get(self, name: str, compute: Callable[[], Any]) -> Any:
    self._bar.set_postfix_str(name[:80])
    value = super().get(name, compute)
    self._bar.update()
    return value


@dataclasses.dataclass(frozen=True)
class FigureRun:
  """One figure of one model.

  Attributes:
    figure: its name.
    model: the model, with overrides of --set.
    config: the figure's own settings, with overrides of --set.
    root: folder of all figures of this model, and of the runs that they share.
    seed: the first noise seed.
    data_dir: folder with the tasks' files; None: the hub.
    allow_code_execution: whether programs written by the model may run.
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
    """Folder of the figure's own files."""
    return self.root / self.figure

  @property
  def seeds(self) -> list[int]:
    """The noise seeds, as many as the figure's config says, else the model's."""
    return [self.seed + i for i in range(getattr(self.config, "num_seeds", self.model.num_seeds))]

  @property
  def settings(self) -> dict[str, Any]:
    """Everything that the results depend on."""
    model = dataclasses.asdict(self.model)
    for name in ("title", "prepare", "hardware"):
      del model[name]
    settings = {
      "figure": self.figure,
      "model": model,
      "seed": self.seed,
      "data_dir": self.data_dir,
      "config": dataclasses.asdict(self.config),
    }
    return json.loads(text_files.to_json(settings))

  def measurements(self) -> Measurements:
    """Opens the figure's own measurements, by name; existing ones are not repeated."""
    return Measurements(self.folder / "measured.jsonl", self.settings)

  def tune(self, task: str, name: str | None = None, **flags) -> Command:
    """Returns a search of τ for a task, shared by all figures.

    Args:
      task: the task.
      name: of its folder in `root`/tune; the task's by default.
      **flags: override those of the model.
    """
    model = self.model
    settings = dict(
      checkpoint=model.checkpoint,
      mesh=model.mesh,
      task=task,
      config=model.tuning.format(category=model.category(task)),
      num_examples=model.num_search_examples,
      num_trials=model.num_trials,
      num_members=model.num_members,
      cache=model.cache,
      seed=self.seed,
      **self._task_flags(task),
    )
    return Command(
      "tune",
      self.tuning_folder(name or task),
      tuple((settings | flags).items()),
      "confirm/*/summary.json",
    )

  def profile(self, name: str) -> pathlib.Path:
    """Returns the temperature profile that the search of that name or task writes."""
    return self.tuning_folder(name) / "profile.json"

  def tuning_folder(self, name: str) -> pathlib.Path:
    """Returns the folder of the search of that name or task."""
    return self.root / "tune" / pathlib.PurePath(name).name

  def compare(self, name: str, task_names: list[str], methods: list[Spec], **flags) -> Command:
    """Returns a comparison in `root`/compare/`name`; `flags` override those of the model."""
    model = self.model
    settings = dict(
      checkpoint=model.checkpoint,
      mesh=model.mesh,
      tasks=task_names,
      methods="; ".join(map(str, methods)),
      num_members=model.num_members,
      cache=model.cache,
      tau=model.tau,
      num_seeds=model.num_seeds,
      num_examples=model.num_examples,
      num_validation=model.num_validation,
      batch_size=model.batch_size,
      seed=self.seed,
      **self._task_flags(*task_names),
    )
    output, given = self.root / "compare" / name, tuple((settings | flags).items())
    return Command("compare", output, given, "*/summary.json", len(methods))

  def uses_chat(self, *names: str) -> bool:
    """Whether tasks use the model's chat format, as all but language modeling do."""
    return self.model.chat is not None and all(tasks.get(n).category != "language" for n in names)

  def _task_flags(self, *names):
    settings = dict(data_dir=self.data_dir, allow_code_execution=self.allow_code_execution or None)
    return settings | ({"chat": True} | (self.model.chat or {}) if self.uses_chat(*names) else {})

  def compared(self, name: str) -> dict[Spec, results_lib.Result]:
    """Loads the runs of `compare(name, ...)`, by their method."""
    found = results_lib.load_runs([str(self.root / "compare" / name / "*")])
    return {methods_lib.read(result.settings["spelled"]): result for result in found}

  def tuned(self, task: str) -> results_lib.Tuning:
    """Loads the search of `tune(task)`."""
    return results_lib.load_tunings([str(self.tuning_folder(task))])[0]


def write_records(path: pathlib.Path, records: list[dict[str, Any]]) -> None:
  """Writes the records of a figure atomically; their values may be estimates or contrasts."""
  plain = (text_files.to_json(record, default=lambda e: e.to_json()) for record in records)
  store.write_lines(path, map(json.loads, plain))


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads what `write_records` wrote."""
  return [{k: _typed(v) for k, v in record.items()} for record in store.read_lines(path)]


def _typed(value, kind: type[Difference] | type[Contrast] = Difference):
  if isinstance(value, list):
    return [_typed(v, Contrast if isinstance(v, dict) and "of" in v else Difference) for v in value]
  if not isinstance(value, dict) or not {"value", "low", "high"} <= value.keys():
    return value
  return kind.from_json(value)  # earlier versions wrote contrasts also where one is meant
