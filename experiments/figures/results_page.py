"""The page of all models' figures, made from the records in docs/results."""

import pathlib
import shutil

from experiments import figures
from experiments.analysis import drawing
from experiments.cli import app
from experiments.figures import main_table
from experiments.figures.figure_models import ALL, Model
from experiments.figures.figure_run import ABOUT, PICTURE, RECORDS, read_records
from roe_jax import typed

PARTS = (
  ("Real text", figures.LANGUAGE),
  ("The paper's figures and tables", figures.PAPER),
  ("What its reviewers asked for", figures.REVIEWERS),
  ("Related systems", figures.SYSTEMS),
  ("Trained for it", figures.TRAINING),
  ("Not language", figures.VISION),
)


def write(path: pathlib.Path, root: pathlib.Path, model: Model) -> str:
  """Writes the page of all models, and redraws this model's pictures.

  First copies the records of complete figures in `root` to docs/results/MODEL next to the page;
  figures that are only there stay.

  Args:
    path: of the page.
    root: the folder with the figures' folders.
    model: the model.

  Returns:
    A one-line summary.
  """
  kept = path.parent / "docs" / "results" / model.name
  for name in figures.NAMES:
    if (root / name / ABOUT).is_file():
      (kept / name).mkdir(parents=True, exist_ok=True)
      for file in (ABOUT, RECORDS):
        shutil.copyfile(root / name / file, kept / name / file)
  found = _complete(kept, figures.NAMES)
  for name in found:
    picture = figures.get(name).draw(read_records(kept / name / RECORDS))
    if picture is not None:
      drawing.save(picture, kept / name / pathlib.Path(PICTURE).stem, ("png",))
  app.write_atomically(path, text(kept.parent))
  of_model = figures.of_model(figures.NAMES, model.name)
  return f"Saved {path} with {len(found)} of {len(of_model)} figures of {model.title}."


def _complete(kept, names):
  return [name for name in names if (kept / name / ABOUT).is_file()]


def text(results: pathlib.Path) -> str:
  """Returns the page for the folder docs/results, with a folder per model."""
  opening = [
    main_table.summary(read_records(path))
    for path in sorted(results.glob(f"*/main_table/{RECORDS}"))
  ]
  parts = [
    "# Results",
    *opening,
    "Made by `python -m experiments.reproduce`; sections give their command, date, "
    "seeds and machine. Intervals are 95 % bootstrap intervals over examples. These results say "
    "nothing about large models: we did not have the paper's checkpoints. With them, run the same "
    "commands with `--model=olmoe`, `mixtral` or `gpt_oss`. Sections dated before 2026-11-27 "
    "addressed noise by the index of an example, and count unique active experts per step of a "
    "batch instead of per token.",
  ]
  for model in ALL.values():
    for title, names in PARTS:
      if names := _complete(results / model.name, names):
        sections = (_section(results / model.name, name) for name in names)
        parts += [f"## {title}: {model.title}", *sections]
  return "\n\n".join(parts) + "\n"


def _section(kept, name):
  figure, about = figures.get(name), typed.read(kept / name / ABOUT)
  records, machine = read_records(kept / name / RECORDS), about["machine"]
  parts = [
    f"### {name}: {figure.TITLE}",
    figure.BACKGROUND,
    f"**Here:** {figure.findings(records)}",
    figure.table(records),
  ]
  if (kept / name / PICTURE).is_file():
    parts.append(f"![{figure.TITLE}](docs/results/{kept.name}/{name}/{PICTURE})")
  parts.append(
    f"`{about['command']}`\n\n{about['date']}; {about['seconds']:.0f} s, including searches and "
    f"comparisons shared with other figures; noise seeds {', '.join(map(str, about['seeds']))}; "
    f"{machine['cpu']}, {machine['cores']} core{'s' if machine['cores'] > 1 else ''}, Python "
    f"{machine['python']}, jax {machine['jax']}."
  )
  return "\n\n".join(parts)
