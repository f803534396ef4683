import dataclasses
import itertools
import json
import pathlib
import re
import types

from absl import flags
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tiny

from experiments import figures, reproduce, tasks
from experiments.evaluation import methods
from experiments.figures import figure_models, results_page
from experiments.figures.figure_run import Command, FigureRun, read_records
from roe_jax.roster import Roster


@dataclasses.dataclass(frozen=True)
class Config:
  sizes: tuple[int, ...] = (1, 2)
  step: float = 0.05


@pytest.fixture
def measured():
  return []


@pytest.fixture
def one_figure(monkeypatch, measured):
  """A figure without programs, called fig3."""

  def measure(run):
    measured.append(run.figure)
    return [
      {"n": size, "value": run.measurements().get(f"n = {size}", lambda: size * run.config.step)}
      for size in run.config.sizes
    ]

  def draw(records):
    figure, axis = plt.subplots()
    axis.plot([r["n"] for r in records], [r["value"] for r in records])
    return figure

  module = types.SimpleNamespace(
    TITLE="A title",
    BACKGROUND="What was seen.",
    CONFIGS={m: Config() for m in figure_models.MODELS},
    commands=lambda work: [],
    measure=measure,
    draw=draw,
    table=lambda records: (
      "| n | value |\n|---|---|\n" + "\n".join(f"| {r['n']} | {r['value']} |" for r in records)
    ),
    findings=lambda records: f"{len(records)} sizes.",
  )
  monkeypatch.setattr(figures, "get", lambda name: module)
  return module


@pytest.fixture
def run(monkeypatch):
  """The program with its flags."""

  def with_flags(*arguments):
    values = flags.FlagValues()
    reproduce.define_flags(values)
    values(["reproduce", *arguments])
    monkeypatch.setattr(reproduce, "FLAGS", values)
    reproduce.main([])

  return with_flags


def test_groups_of_figures_are_in_their_order_and_once():
  given = ["fig6", "table1", "fig3", "fig6"]
  assert reproduce.figure_names(given, "olmoe") == ["fig3", "fig6", "table1"]
  assert reproduce.figure_names(["all"], "olmoe") == figures.of_model(figures.NAMES, "olmoe")
  assert reproduce.figure_names(["all"], "vision") == list(figures.VISION)
  of_embedded = figures.PAPER + figures.REVIEWERS + figures.SYSTEMS + figures.TRAINING
  assert reproduce.figure_names(["all"], "embedded") == list(of_embedded)
  assert reproduce.figure_names(["reviewers"], "embedded") == list(figures.REVIEWERS)
  with pytest.raises(ValueError, match="unknown figure 'fig2': give one of fig3, fig4a"):
    reproduce.figure_names(["fig2"], "olmoe")
  with pytest.raises(ValueError, match="last_words is not made of embedded: choose a --model of"):
    reproduce.figure_names(["last_words"], "embedded")


@pytest.mark.parametrize("name", figures.NAMES)
def test_every_figure_has_what_a_figure_has(name):
  module = figures.get(name)
  of_models = set(figure_models.MODELS) - ({"embedded"} if name in figures.LANGUAGE else set())
  of_models = {"vision"} if name in figures.VISION else of_models
  of_models = {"smollm2"} if name in ("main_table", "minimal_pairs") else of_models
  of_models = {"embedded"} if name in figures.SYSTEMS + figures.TRAINING else of_models
  of_models = {"embedded", "smollm2"} if name == "bits" else of_models
  assert set(module.CONFIGS) == of_models
  for text in (module.__doc__, module.TITLE, module.BACKGROUND):
    assert text and len(text) > 10
  for model in map(figure_models.get, module.CONFIGS):
    work = FigureRun(name, model, module.CONFIGS[model.name], pathlib.Path("root"))
    assert json.dumps(work.settings)
    for command in figures.commands(work):
      assert command.output.is_relative_to("root") and str(command).startswith("python -m exper")


def test_figures_of_text_compare_methods_that_can_read_it():
  config = tiny.config("olmoe", num_experts=12, experts_per_token=8)
  base = Roster.create(config, 2, 0.5)
  read = 0
  for name in figures.of_model(figures.NAMES, "smollm2"):
    settings = figures.get(name).CONFIGS["smollm2"]
    work = FigureRun(name, figure_models.get("smollm2"), settings, pathlib.Path("root"))
    for command in figures.commands(work):
      of = dict(command.flags)
      texts = [t for t in of.get("tasks", ()) if t.startswith(tasks.TEXT)]
      for task, method in itertools.product(texts, of.get("methods", "").split(";")):
        methods.parse(method, config, base).check_task(tasks.get(task), "read")
        read += 1
  assert read > 5


def test_a_figure_of_one_model_needs_no_flag_of_the_model():
  assert reproduce.model_name(None, ["vision"]) == "vision"
  assert reproduce.model_name("olmoe", ["vision"]) == "olmoe"
  with pytest.raises(ValueError, match="give --model, one of embedded, gpt_oss"):
    reproduce.model_name(None, ["fig6", "vision_sr"])
  with pytest.raises(ValueError, match="give --model, one of olmoe"):
    reproduce.model_name(None, [])


def test_settings_are_overridden_wherever_they_are():
  model, config = reproduce.overridden(
    [figure_models.get("embedded"), Config()],
    ["sizes=4;8", "step=0.1", "num_examples=7", "math=gsm8k;svamp", "mesh=expert:2"],
  )
  assert model.mesh == "expert:2"
  assert reproduce.overridden([model], ["num_examples=null"])[0].num_examples is None
  assert config == Config((4, 8), 0.1)
  assert reproduce.overridden([config], ["sizes="])[0].sizes == ()
  assert model.num_examples == 7 and model.math == ("gsm8k", "svamp")


@pytest.mark.parametrize(
  "given,message",
  [
    ("n=3", "must be NAME=VALUE with one of .*step"),
    ("step", "must be NAME=VALUE"),
    ("step=many", "step must be a finite number, got 'many'"),
    ("step=nan", "step must be a finite number, got 'nan'"),
    ("sizes=a;b", "sizes must be a list whose items are integers, got 'a;b'"),
    ("num_examples=0", "num_examples must be positive, got 0"),
  ],
)
def test_wrong_settings_are_refused(given, message):
  with pytest.raises(ValueError, match=message):
    reproduce.overridden([Config(), figure_models.get("embedded")], [given])


def test_a_command_is_what_one_types(tmp_path):
  work = FigureRun("fig3", figure_models.get("olmoe"), Config(), tmp_path)
  command = work.tune("paper/gsm8k")
  assert str(command) == (
    "python -m experiments.tune --checkpoint=olmoe --task=paper/gsm8k --config=paper_math_olmoe "
    f"--num_members=32 --cache=clean --seed=0 --output={tmp_path}/tune/gsm8k"
  )
  assert command.name == "tune/gsm8k" and not command.is_done
  compared = str(
    work.compare("x", ["paper/gsm8k", "paper/svamp"], ["baseline", "roster:n=4"], chat=False)
  )
  assert (
    "--tasks=paper/gsm8k,paper/svamp '--methods=baseline; roster:n=4'" in compared
    and "--nochat" in compared
  )


def test_a_command_is_done_when_all_of_its_files_are_there(tmp_path):
  command = Command("compare", tmp_path, (), "*/summary.json", 2)
  for name in "ab":
    assert not command.is_done
    (tmp_path / name).mkdir()
    (tmp_path / name / "summary.json").write_text("{}")
  assert command.is_done


def test_a_command_that_fails_is_told(tmp_path):
  with pytest.raises(ValueError, match="ended with exit code 1.*resumes from there"):
    Command("tune", tmp_path, (("task", "gsm9k"), ("checkpoint", "nowhere")), "x").run()


def test_commands_of_several_figures_run_once_and_are_not_two_of_one_folder(one_figure, tmp_path):
  one_figure.commands = lambda work: [work.tune("wordmath")]
  works = [
    FigureRun(f, figure_models.get("embedded"), Config(), tmp_path) for f in ("fig3", "fig10")
  ]
  assert len(reproduce.all_commands(works)) == 1
  one_figure.commands = lambda work: [work.tune("wordmath", num_trials=len(work.figure))]
  with pytest.raises(ValueError, match="two figures need .*wordmath from different commands"):
    reproduce.all_commands(works)


def test_a_figure_leaves_records_a_table_a_picture_and_what_it_was_made_with(
  run, one_figure, measured, tmp_path, capsys
):
  given = ("--figure=fig3", "--model=embedded", f"--output={tmp_path}", "--set=step=0.5")
  run(*given, f"--page={tmp_path / 'RESULTS.md'}")
  folder = tmp_path / "embedded" / "fig3"
  lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
  assert lines == [{"n": 1, "value": 0.5}, {"n": 2, "value": 1.0}]
  assert (folder / "figure.png").stat().st_size > 3000 and (folder / "figure.pdf").exists()
  about = json.loads((folder / "about.json").read_text())
  assert about["findings"] == "2 sizes." and about["seeds"] == [0, 1]
  assert about["command"] == (
    "python -m experiments.reproduce --figure=fig3 --model=embedded "
    f"--set=step=0.5 --output={tmp_path}"
  )
  assert about["machine"]["cores"] >= 1
  text = (tmp_path / "RESULTS.md").read_text()
  for part in (
    "### fig3: A title",
    "What was seen.",
    "2 sizes.",
    "| 2 | 1.0 |",
    "docs/results/embedded/fig3/figure.png",
    about["date"],
    "seeds 0, 1",
  ):
    assert part in text, part
  kept = tmp_path / "docs/results/embedded"
  assert (kept / "fig3/figure.png").exists() and results_page.text(kept.parent) == text
  # Again: it is drawn, and nothing is measured.
  (folder / "figure.png").unlink()
  run(*given)
  assert (folder / "figure.png").exists() and measured == ["fig3"]
  assert json.loads((folder / "about.json").read_text()) == about
  assert "A title" in capsys.readouterr().out


def test_the_results_page_is_what_its_records_say():
  root = pathlib.Path(reproduce.__file__).parents[1]
  written = (root / "RESULTS.md").read_text()
  assert written == results_page.text(root / "docs/results")
  for name in figures.of_model(figures.NAMES, "embedded"):
    assert f"### {name}: " in written
  readme = (root / "README.md").read_text()
  intervals = re.findall(r"[-+]?\d+\.\d+ \[[^\]]*\]", readme)
  assert len(intervals) >= 15 and [i for i in intervals if i not in written] == []
  for link in re.findall(r"\]\(((?:docs|experiments|[A-Z]+\.)[^)#]*)", readme):
    assert (root / link).exists(), link


@pytest.mark.parametrize(
  "model,name", [(m, n) for m in ("embedded", "vision") for n in figures.of_model(figures.NAMES, m)]
)
def test_every_figure_is_drawn_of_its_records(model, name):
  root = pathlib.Path(reproduce.__file__).parents[1]
  folder = root / "docs/results" / model / name
  picture = figures.get(name).draw(read_records(folder / "records.jsonl"))
  assert (picture is None) == (not (folder / "figure.png").exists())
  if picture is not None:
    picture.canvas.draw()
    pixels = np.asarray(picture.canvas.buffer_rgba())[..., :3]
    assert 0.003 < (pixels.mean(axis=-1) < 230).mean() < 0.7, "it looks empty"
    assert (pixels == pixels[..., :1]).all(), "it has colors"
    plt.close(picture)


def test_an_interrupted_figure_keeps_what_was_measured(run, one_figure, tmp_path):
  given = ("--figure=fig3", "--model=embedded", f"--output={tmp_path}")
  measure = one_figure.measure

  def stopped(work):
    work.measurements().get("n = 1", lambda: 123)
    raise KeyboardInterrupt

  one_figure.measure = stopped
  with pytest.raises(KeyboardInterrupt):
    run(*given)
  one_figure.measure = measure
  run(*given)
  lines = (tmp_path / "embedded/fig3/records.jsonl").read_text().splitlines()
  assert [json.loads(line)["value"] for line in lines] == [123, 0.1]


def test_settings_that_no_figure_uses_are_refused(run, one_figure, tmp_path):
  given = ("--figure=fig3", "--model=embedded", f"--output={tmp_path / 'x'}", "--dry_run")
  with pytest.raises(ValueError, match="--set=num_trials=3: fig3 would not use it"):
    run(*given, "--set=num_trials=3")
  one_figure.commands = lambda work: [work.tune("wordmath")]
  run(*given, "--set=num_trials=3")


def test_other_settings_need_another_folder(run, one_figure, tmp_path):
  given = ("--figure=fig3", "--model=embedded", f"--output={tmp_path}")
  run(*given)
  for other in ("step=0.5", "math=wordmath"):
    with pytest.raises(ValueError, match="has a run with other settings"):
      run(*given, f"--set={other}")


def test_a_dry_run_prints_commands_and_does_nothing(run, one_figure, tmp_path, capsys):
  one_figure.commands = lambda work: [work.tune(task) for task in work.model.math]
  run("--figure=fig3", "--model=mixtral", f"--output={tmp_path / 'x'}", "--dry_run")
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(" ")[2] for line in lines] == ["experiments.tune"] * 5
  assert not (tmp_path / "x").exists()


def test_tasks_are_looked_at_before_anything_runs(run, one_figure, tmp_path):
  given = ("--figure=fig3", "--model=embedded", f"--output={tmp_path / 'x'}")
  one_figure.commands = lambda work: [work.tune(task) for task in work.model.code]
  with pytest.raises(ValueError, match="allow it with --allow_code_execution"):
    run(*given, "--set=code=paper/humaneval")
  with pytest.raises(FileNotFoundError, match="no data of gsm8k"):
    run(*given, "--set=code=paper/gsm8k", f"--data_dir={tmp_path}")
  assert not (tmp_path / "x").exists()


def test_a_model_that_is_not_there_is_told_how_to_make(run, one_figure, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(
    FileNotFoundError, match="make gpt-oss-20b with `.* --source=openai/gpt-oss-20b.*--checkpoint"
  ):
    run("--figure=fig3", "--model=gpt_oss", f"--output={tmp_path}")
